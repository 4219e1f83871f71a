"""Rollouts made by hand: turns over the speaker's tokenizer, with random log-probabilities."""

import random

from speaker import speaker_tokenizer

from glm5.envs import Reward, Task
from glm5.rl.records import Rollout, Ticket, Turn
from glm5.rl.tree import EpisodeTree
from glm5.scoring import Grade


def turn(prompt_ids, text, *, version=0, finish="stop", draw=None):
    """A turn that says `text`; the second half of its tokens is of the next version."""
    draw = draw or random.Random(text)
    ids = tuple(speaker_tokenizer().encode(text, allow_special=False))
    half = len(ids) // 2
    versions = (version,) * half + (version + 1,) * (len(ids) - half)
    return Turn(tuple(prompt_ids), ids, tuple(-3 * draw.random() for _ in ids), versions, finish, 0.5, 2)


def rollout(
    sample=0,
    *,
    index=0,
    reward=1.0,
    question="What is 12 + 30?",
    said="The answer is 42.",
    calls=(),
    outcome=None,
    environment="sums",
    version=0,
    failure="",
    reason="the expected number",
    fork=False,
):
    """An episode of one turn, or of one more for each call; `fork` drops the first turn from the last prompt."""
    ticket = Ticket(environment, index, 0, sample)
    tokenizer = speaker_tokenizer()
    prompt = tokenizer.encode(question, allow_special=False)
    messages = [{"role": "user", "content": question}]
    turns = []
    for number, (name, arguments, result) in enumerate(calls):
        turns.append(turn(prompt, f"call {name} {arguments}", version=version))
        function = {"name": name, "arguments": arguments}
        call = {"id": f"call_{number}", "type": "function", "function": function}
        messages.append({"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        kept = [] if fork else [*turns[-1].output_ids]
        prompt = [*prompt, *kept, *tokenizer.encode(result, allow_special=False)]
    turns.append(turn(prompt, said, version=version))
    messages.append({"role": "assistant", "content": said, "reasoning_content": None, "tool_calls": []})
    outcome = outcome or ("env_failure" if reward is None else "ok")
    grade = Grade("correct" if reward and reward > 0 else "incorrect", reason)
    return Rollout(
        ticket, Task(f"{environment}/0/{index}", (messages[0],), "42", "addition"), EpisodeTree(turns).trajectories(),
        outcome, None if reward is None else Reward(reward, grade), tuple(messages), tuple(turns), failure, 1.25, 0.5,
    )  # fmt: skip
