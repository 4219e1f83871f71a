"""The settings of the scheduler, and how many groups may begin.

A group may begin iff running + accepted < (S + v + 1) * B, in groups (AReaL, arXiv 2505.24298, section 5.1): v is the
version that the engines hold, S the staleness bound, B the groups of a batch, and accepted counts what was trained too.
It bounds the sum, not each sample: a slow one is overtaken by those that began later. Hence the scheduler's sweep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glm5.errors import ConfigError
from glm5.train.checks import check_choice, check_counts

Mode = Literal["sync", "one-step-off", "async"]


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What is sampled when, and what becomes of it."""

    mode: Mode = "async"
    """sync: sample a batch under the newest weights, learn from it, repeat. one-step-off: a batch is sampled while the
    one before is learnt from. async: sampling never waits, up to the staleness bound."""
    groups_per_batch: int = 8
    """Tasks of one learning step."""
    group_size: int = 8
    """Rollouts of one task."""
    max_staleness: int = 4
    """In async mode: versions between the oldest token of a sample and the weights that learn from it."""
    max_attempts: int = 3
    """Times that a group is begun, when it fails or becomes too old, before its task is dropped."""
    max_running: int = 64
    """Rollouts at once; the concurrency control may change it during the run."""
    stale: Literal["requeue", "drop"] = "requeue"
    """What happens to the task of a group of which too little is left because of its age."""
    repair: Literal["repeat", "never"] = "repeat"
    """Whether a group that lost samples is filled up with repeats of the others, or given up."""
    refill: bool = False
    """In sync and one-step-off mode: another task is begun for each group that is not learnt from, so that every step
    has all its groups. Without it a step learns from what is left, which may be nothing."""
    publish_every: int = 1
    """Batches between two publications of the weights."""

    def __post_init__(self) -> None:
        check_choice(self, "mode", "sync", "one-step-off", "async")
        check_choice(self, "stale", "requeue", "drop")
        check_choice(self, "repair", "repeat", "never")
        check_counts(self, "groups_per_batch", "group_size", "max_attempts", "max_running", "publish_every")
        check_counts(self, "max_staleness", least=0)
        if self.publish_every > self.bound + 1:
            raise ConfigError(
                f"publish_every is {self.publish_every}, but with a staleness of at most {self.bound} only "
                f"{self.bound + 1} batches can be sampled from one set of weights; publish more often."
            )

    @property
    def bound(self) -> int:
        """The staleness that no trained sample exceeds, in versions."""
        return {"sync": 0, "one-step-off": 1, "async": self.max_staleness}[self.mode]


def room(config: SchedulerConfig, *, step: int, published: int, open: int, accepted: int, begun: int) -> int:
    """Groups that may begin now.

    step: batches handed out. published: version of the engines. open, accepted: groups that are being sampled, and that
    wait for a batch. begun: groups begun since the last batch.
    """
    if config.mode == "async":
        return (config.bound + published + 1 - step) * config.groups_per_batch - open - accepted
    if published + config.bound < step:  # the next batch would be too old
        return 0
    return config.groups_per_batch - (open + accepted if config.refill else begun)
