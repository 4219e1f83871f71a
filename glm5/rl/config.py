"""The settings of a run. The environments themselves are passed beside them, as objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro
from pydantic import TypeAdapter, ValidationError

from glm5.errors import ConfigError, RunError
from glm5.rl.admission import SchedulerConfig
from glm5.rl.advantages import AGAINST_GROUP
from glm5.rl.aids_config import AidsConfig
from glm5.rl.concurrency import ConcurrencyConfig
from glm5.rl.held_out import HeldOut
from glm5.rl.learner_config import LearnerConfig
from glm5.rl.losses import DDIS, AnyLoss
from glm5.rl.runner import RolloutConfig
from glm5.train import RunDirectory
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
    """Steps between two checkpoints; after a crash, the steps behind the last one are learnt from again."""
    keep_checkpoints: int = 2
    """The newest so many; older ones are removed."""
    command: Annotated[Mapping[str, Any] | None, tyro.conf.Fixed, tyro.conf.Suppress] = None
    """What the command line said beside these settings, such as how its environments are made: `--resume` takes it
    from here. None: the run was begun in Python."""

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


def recorded_config(run: RunDirectory) -> RLRunConfig:
    """The settings in a run's `run.json`: those that it was started with, or resumed with last.

    Raises RunError for a run of another kind or version. A loss of a run that did not note its class is DDIS.
    """
    stage, values = run.description.get("stage"), dict(run.description.get("config") or {})
    if stage != "rl":
        raise RunError(f"{run.path} is a run of {stage!r}, not of rl; `glm5 train --resume` goes on with those.")
    learner = dict(values.get("learner", {}))
    loss = dict(learner.pop("loss", {}))
    kinds = {kind.__name__: kind for kind in get_args(AnyLoss)}
    try:
        kind = kinds[loss.pop("class", DDIS.__name__)]
        config: RLRunConfig = TypeAdapter(RLRunConfig).validate_python({**values, "learner": learner})
        return replace(config, learner=replace(config.learner, loss=TypeAdapter(kind).validate_python(loss)))
    except KeyError as error:
        raise RunError(f"{run.path / 'run.json'} has the loss {error}, which this version does not know.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(f"{run.path / 'run.json'} has a {where} that cannot be read: {first['msg']}.") from error
