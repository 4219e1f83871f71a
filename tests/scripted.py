"""Stand-ins for rollouts: a source of tokens that says prepared texts, and environments of several turns."""

import asyncio
import errno
import os

import torch
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import TokenDelta
from glm5.envs import EpisodeLimits, Observation, Reward, Task
from glm5.scoring import Grade


def brief_model(seed=0, positions=512):
    """A random model that often ends its turn, with any of the three terminators."""
    model = speaker_model(seed, positions)
    with torch.no_grad():
        model.lm_head.weight[list(speaker_tokenizer().eos_ids)] *= 3
    return model


class ScriptedStream:
    """Tokens of one request; `hang_at` stops after so many."""

    cached_tokens = 0
    prompt_logprobs = None

    def __init__(self, deltas, hang_at=None):
        self.deltas, self.hang_at, self.closed = deltas, hang_at, False

    def close(self):
        self.closed = True

    async def __aiter__(self):
        for i, delta in enumerate(self.deltas):
            if i == self.hang_at:
                await asyncio.sleep(3600)
            await asyncio.sleep(0)
            yield delta


class ScriptedSource:
    """Says the next of `texts` at each request, whole with its terminator, and keeps the prompts."""

    def __init__(self, *texts, version=0, max_model_len=4096, hang_at=None):
        self.tokenizer = speaker_tokenizer()
        self.texts, self.version, self.max_model_len, self.hang_at = list(texts), version, max_model_len, hang_at
        self.prompts, self.streams, self.params = [], [], []

    def stream(self, prompt_ids, params, *, session_id, priority, deadline):
        ids = self.tokenizer.encode(self.texts.pop(0))
        stops = ids[-1] in self.tokenizer.eos_ids
        ids, cut = ids[: params.max_tokens], len(ids) > params.max_tokens
        last = "length" if cut else "stop" if stops else None
        deltas = [
            TokenDelta(0, token, -0.5, (), self.version, "", last if i == len(ids) - 1 else None)
            for i, token in enumerate(ids)
        ]
        self.prompts.append(tuple(prompt_ids))
        self.params.append(params)
        self.streams.append(ScriptedStream(deltas, self.hang_at))
        return self.streams[-1]


ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


class Chat:
    """Answers each message with the next of `replies` (a message or a list of them); done when they are used up.

    `reward` of the assistant's messages. `broken`: the name of a method that raises; `slow`: one that takes for ever.
    """

    def __init__(self, *replies, tools=(), limits=None, reward=None, broken=None, slow=None):
        self.name, self.uniform_groups = "chat", "drop"
        self.replies, self.tools = replies, tools
        self.limits = limits or EpisodeLimits(turns=len(replies) + 1)
        self.reward = reward or (lambda messages: 1.0)
        self.broken, self.slow = broken, slow
        self.opened = self.closed = 0

    def task(self, seed, index):
        self.meet("task")
        return Task(f"chat/{seed}/{index}", ({"role": "user", "content": f"What is {index} + 1?"},), "", "one")

    def episode(self, task):
        return ChatEpisode(self, task)

    def meet(self, what):
        if self.broken == what:
            raise ZeroDivisionError("the lights went out")


class ChatEpisode:
    def __init__(self, env, task):
        self.env, self.task, self.said, self.tools = env, task, [], env.tools

    async def meet(self, what):
        self.env.meet(what)
        if self.env.slow == what:
            await asyncio.sleep(3600)

    async def reset(self):
        self.env.opened += 1
        await self.meet("reset")
        return Observation(self.task.messages)

    async def step(self, message):
        await self.meet("step")
        self.said.append(message)
        if len(self.said) > len(self.env.replies):
            return Observation(done=True)
        reply = self.env.replies[len(self.said) - 1]
        return Observation(tuple(reply) if isinstance(reply, list) else (reply,))

    async def score(self):
        await self.meet("score")
        return Reward(self.env.reward(self.said), Grade("correct", "said"))

    async def close(self):
        self.env.closed += 1
        if self.env.broken == "close":
            raise OSError("cannot close")


class FullDisk:
    """A disk on which `takes` more bytes of journals have room, from their line with `word` on; until `free`."""

    def __init__(self, monkeypatch, takes, word=b""):
        self.takes, self.word, self.write, self.begun = takes, word, os.write, False
        self.full = True
        monkeypatch.setattr(os, "write", self)

    def __call__(self, file, data):
        self.begun = self.begun or self.word in bytes(data)
        if not self.full or not self.begun:
            return self.write(file, data)
        data, room = bytes(data), self.takes
        self.takes = max(0, room - len(data))
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.write(file, data[:room])

    def free(self):
        """There is room again."""
        self.full = False
