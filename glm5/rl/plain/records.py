"""What the sampler hands to the trainer: the engine's own token ids, log-probabilities and weight versions.

Nothing here is text that would be tokenised again. A `Group` is all samples of one task, the unit of the baseline.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from glm5.engine import CompletionOutput
from glm5.envs import Reward, Task

Outcome = Literal["ok", "truncated", "env_failure"]
"""`truncated`: ended by the length limit (it has a reward). `env_failure`: could not be scored; never a reward of 0."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled answer to a task, with what is needed to learn from it exactly."""

    task: Task
    prompt_ids: tuple[int, ...]
    completion: CompletionOutput
    reward: Reward | None
    outcome: Outcome

    @property
    def id(self) -> str:
        """Names the sample in this run: a task that is sampled again draws another seed."""
        return f"{self.task.id}/{self.completion.seed}/{self.completion.index}"

    def staleness(self, version: int) -> int:
        """Versions between the oldest weights that made a token and `version`."""
        return version - min(self.completion.versions)

    def record(self, fate: str) -> dict[str, Any]:
        """The sample as a JSON object for `samples/`; its text is there for people only."""
        completion = asdict(self.completion)
        del completion["top_logprobs"]
        reward = None if self.reward is None else {"value": self.reward.value, "reason": self.reward.reason}
        return {"id": self.id, "question": self.task.messages[-1]["content"], "answer": self.task.answer,
                "category": self.task.category, "prompt_ids": self.prompt_ids, **completion, "reward": reward,
                "outcome": self.outcome, "fate": fate}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Group:
    """All samples of one task under one weight version."""

    task_index: int
    attempt: int
    """How often the task was tried before, when its environment failed."""
    samples: tuple[Sample, ...]
