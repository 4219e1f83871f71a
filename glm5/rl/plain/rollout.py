"""Rollouts: tasks to prompts, prompts to sampled groups, answers to rewards.

The random numbers of a sample follow from (run seed, environment, task, attempt, sample, position), as those of the
orchestrator do, so a rollout that is repeated under the same weights is the same rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glm5.engine import CompletionOutput, Engine, SamplingParams
from glm5.envs import EnvironmentFailure, Questions, Task
from glm5.errors import InputError
from glm5.rl import records
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
                temperature=1.0,
                max_tokens=self.max_tokens,
                seed=records.Ticket(self.env.name, ticket.task_index, ticket.attempt, sample).seed(self.seed),
            )
            for ticket in tickets
            for sample in range(self.group_size)
        ]
        outputs = self.engine.generate([prompt for prompt in prompts for _ in range(self.group_size)], params)
        groups = []
        for number, (ticket, task) in enumerate(zip(tickets, tasks, strict=True)):
            own = outputs[number * self.group_size : (number + 1) * self.group_size]
            samples = tuple(self._scored(task, tuple(o.prompt_token_ids), o.outputs[0]) for o in own)
            groups.append(Group(ticket.task_index, ticket.attempt, samples))
        return groups

    def _scored(self, task: Task, prompt_ids: tuple[int, ...], completion: CompletionOutput) -> Sample:
        message = parse_assistant(completion.text, thinking=self.thinking)
        try:
            reward = self.env.score(task, message)
        except EnvironmentFailure:
            return Sample(task, prompt_ids, completion, None, "env_failure")
        return Sample(
            task, prompt_ids, completion, reward, "truncated" if completion.finish_reason == "length" else "ok"
        )
