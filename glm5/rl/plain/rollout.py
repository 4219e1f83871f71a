"""Rollouts: tasks to prompts, prompts to sampled groups, answers to rewards.

The random numbers of a sample follow from (run seed, task, attempt, sample, position), so a rollout that is
repeated under the same weights is the same rollout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from glm5.engine import CompletionOutput, Engine, SamplingParams
from glm5.envs import EnvironmentFailure, Questions, Task
from glm5.errors import InputError
from glm5.rl.plain.records import Group, Sample
from glm5.text import Tokenizer, parse_assistant


@dataclass(frozen=True, slots=True)
class Ticket:
    """A task that is to be sampled: its number, and how often that was tried before."""

    task_index: int
    attempt: int = 0


class Sampler:
    """Samples `group_size` answers to each task with one engine at temperature 1, as the losses assume."""

    def __init__(
        self, engine: Engine, env: Questions, *, seed: int, group_size: int, max_tokens: int, thinking: bool
    ) -> None:
        if engine.tokenizer is None:
            raise InputError("Reinforcement learning needs a tokenizer; give a model directory that holds one.")
        self.engine = engine
        self.tokenizer: Tokenizer = engine.tokenizer
        self.env = env
        self.seed = seed
        self.group_size = group_size
        self.max_tokens = max_tokens
        self.thinking = thinking

    def sample(self, tickets: Sequence[Ticket]) -> list[Group]:
        """One group for each ticket, in order, all under the engine's present weights."""
        tasks = [self.env.task(self.seed, ticket.task_index) for ticket in tickets]
        prompts = [
            self.tokenizer.apply_chat_template(task.messages, enable_thinking=self.thinking, escape_special=True)
            for task in tasks
        ]
        params = [
            SamplingParams(
                n=self.group_size,
                temperature=1.0,
                max_tokens=self.max_tokens,
                seed=sampling_seed(self.seed, ticket.task_index, ticket.attempt),
            )
            for ticket in tickets
        ]
        outputs = self.engine.generate(prompts, params)
        return [
            Group(
                ticket.task_index,
                ticket.attempt,
                tuple(self._scored(task, tuple(o.prompt_token_ids), c) for c in o.outputs),
            )
            for ticket, task, o in zip(tickets, tasks, outputs, strict=True)
        ]

    def _scored(self, task: Task, prompt_ids: tuple[int, ...], completion: CompletionOutput) -> Sample:
        message = parse_assistant(completion.text, thinking=self.thinking)
        try:
            reward = self.env.score(task, message)
        except EnvironmentFailure:
            return Sample(task, prompt_ids, completion, None, "env_failure")
        return Sample(
            task, prompt_ids, completion, reward, "truncated" if completion.finish_reason == "length" else "ok"
        )


def sampling_seed(seed: int, task_index: int, attempt: int) -> int:
    """The request seed of one attempt at one task: 63 bits of a hash of the three."""
    digest = hashlib.sha256(f"{seed}/{task_index}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
