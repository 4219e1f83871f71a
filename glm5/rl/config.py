"""The settings of a run. The environments themselves are passed beside them, as objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from glm5.errors import ConfigError
from glm5.rl.admission import SchedulerConfig
from glm5.rl.advantages import AGAINST_GROUP
from glm5.rl.aids_config import AidsConfig
from glm5.rl.concurrency import ConcurrencyConfig
from glm5.rl.held_out import HeldOut
from glm5.rl.learner_config import LearnerConfig
from glm5.rl.runner import RolloutConfig
from glm5.train.checks import check_choice, check_counts, check_numbers
from glm5.train.watch import Watcher


@dataclass(frozen=True, kw_only=True)
class RLRunConfig:
    """One run of the orchestrator (`train_rl`), or of the deterministic mode (`train_in_lockstep`)."""

    parent: Path
    """The run or model directory to start from; its tokenizer is used."""
    steps: int = 20
    """Batches to learn from."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """Among them the mode: sync, one-step-off or async."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    aids: AidsConfig = field(default_factory=AidsConfig)
    """What the learner has beside its model: teachers, replay, a reference, measures."""
    held_out: HeldOut = field(default_factory=HeldOut)
    """How often, and of how many tasks, the reward of held-out environments is measured, where there are any."""
    concurrency: ConcurrencyConfig | None = None
    """Adapts the number of rollouts at once to what trainer and engines bear; None: always the scheduler's."""
    recompute: bool | None = None
    """Whether sequences that run compute their cache anew when the engines take new weights, so that what they say next
    is of these weights alone; kept, swaps cost nothing. None: anew in strict mode only."""
    learning_ticks: int = 8
    """In deterministic mode: tokens that every rollout gets while a batch is learnt from."""
    patience: float = 600.0
    """Seconds without a token, a finished rollout or a step, after which the run stops and says what it waits for."""
    groups_in_vain: int = 256
    """Groups in a row that teach nothing (all rewards equal, or too many failures), after which the run stops."""
    keep_logprobs: bool = True
    """Keep what the trainer thought of each token before it learnt from it: the viewer's colours by ratio. About four
    bytes a token."""
    watch: tuple[Watcher, ...] = ()
    """Send metrics and speeds to tensorboard or trackio too (extra `watch`)."""
    checkpoint_every: int = 10
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        check_counts(self, "steps", "learning_ticks", "groups_in_vain", "checkpoint_every", "keep_checkpoints")
        check_numbers(self, "patience", above=0)
        for name in self.watch:
            check_choice(self, "watch", "tensorboard", "trackio", value=name)
        if self.rollout.max_episode_tokens is not None and self.rollout.max_episode_tokens <= 2:
            raise ConfigError("rollout.max_episode_tokens leaves no room for a prompt and an answer; raise it.")

    def check_groups(self, *, taught: bool) -> None:
        """Raises ConfigError when groups of one are compared with themselves and nothing else is learnt from."""
        kind = self.learner.advantages
        if self.scheduler.group_size == 1 and kind in AGAINST_GROUP and not taught and self.learner.kl is None:
            raise ConfigError(
                f"{kind} compares the samples of a task with each other, and scheduler.group_size is 1, so nothing "
                "would be learnt; take larger groups, or the advantages reinforce++, gae or reward."
            )
