"""The settings of a run. The environments themselves are passed beside them, as objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import tyro
from pydantic import TypeAdapter, ValidationError

from glm5.errors import ConfigError, RunError
from glm5.rl.admission import SchedulerConfig
from glm5.rl.advantages import AGAINST_GROUP
from glm5.rl.aids_config import AidsConfig
from glm5.rl.concurrency import ConcurrencyConfig
from glm5.rl.critic import Critic
from glm5.rl.distillation import Distillation
from glm5.rl.held_out import HeldOut
from glm5.rl.learner_config import LearnerConfig
from glm5.rl.losses import AnyLoss
from glm5.rl.rollout_config import RolloutConfig
from glm5.train import RunDirectory
from glm5.train.checks import check_choice, check_counts, check_numbers
from glm5.train.watch import Watcher

T = TypeVar("T")
PACE = frozenset({"max_running", "concurrency"})
"""Settings of how much is under way, which a resumed run may change: the machine may bear less than was thought. Like
the clock, they change which samples come when and not how one is made. The deterministic mode keeps them."""


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
    """Seconds without a token, a finished rollout or a step, after which the run stops and says what it waits for.
    While somebody is away, `rollout.outage_seconds` come on top."""
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

    def check_learning(self, *, taught: bool, replayed: bool, drafting: bool) -> None:
        """Raises ConfigError for a run that would learn nothing, and for settings that would do nothing.

        taught, replayed: whether there are teachers, or batches of earlier stages. drafting: whether the parent has
        draft modules, which may learn alone.
        """
        learner, kind = self.learner, self.learner.advantages
        if self.aids.reference is not None and learner.kl is None:
            raise ConfigError(
                "aids.reference is the model that learner.kl holds the policy to, and there is no learner.kl; give it "
                "(--learner.kl on), or leave the reference out."
            )
        for name, given, used, needs in (
            ("critic", learner.critic != Critic(), kind == "gae", "the advantages gae (--learner.advantages gae)"),
            ("distillation", learner.distillation != Distillation(), taught, "a teacher (--aids.teacher)"),
            ("replay_weight", learner.replay_weight not in (0, 1), replayed, "data (--aids.replay.data)"),
            ("fixed_length", learner.fixed_length != LearnerConfig.fixed_length,
             learner.normalisation == "fixed-length", "that normalisation (--learner.normalisation fixed-length)"),
        ):  # fmt: skip
            if given and not used:
                raise ConfigError(f"learner.{name} would do nothing without {needs}; give that too, or leave it out.")
        if learner.lora is not None and learner.mtp == "joint":
            raise ConfigError("With LoRA the MTP modules stay as they are; leave learner.mtp out.")
        others = taught or learner.kl is not None
        drafting = drafting and learner.mtp != "frozen" and learner.mtp_weight > 0 and learner.lora is None
        if kind == "none" and not (others or replayed or learner.entropy or learner.indexer_weight or drafting):
            raise ConfigError(
                "With the advantages none the policy learns from teachers, KL, entropy or replay alone, and there is "
                "none of them; give a teacher (--aids.teacher), or other advantages."
            )
        if self.scheduler.group_size == 1 and kind in AGAINST_GROUP and not others:
            raise ConfigError(
                f"{kind} compares the samples of a task with each other, and scheduler.group_size is 1, so nothing "
                "would be learnt; take larger groups, or the advantages reinforce++, gae or reward."
            )


def recorded_config(run: RunDirectory, *, loss: str | None = None) -> RLRunConfig:
    """The settings in a run's `run.json`: those that it was started with, or resumed with last.

    loss: the class, in any case, of the loss of a run that did not note it. Raises RunError for a run of another kind
    or version, and where the settings of its loss could be of several classes and nobody says which.
    """
    values = _recorded(run)
    learner = dict(values.get("learner", {}))
    recorded = learner.pop("loss", None)
    config = _read(run, RLRunConfig, {**values, "learner": learner})
    if recorded is None:
        return config
    kind = _class_of(run, recorded, loss)
    settings = {name: value for name, value in recorded.items() if name != "class"}
    return replace(config, learner=replace(config.learner, loss=_read(run, kind, settings)))


def recorded_scheduler(run: RunDirectory) -> SchedulerConfig:
    """Of `recorded_config`, what a run of any loss says."""
    return _read(run, SchedulerConfig, _recorded(run).get("scheduler", {}))


def recorded_concurrency(run: RunDirectory) -> ConcurrencyConfig | None:
    """Of `recorded_config`, how it adapts the rollouts at once; None: it does not."""
    values = _recorded(run).get("concurrency")
    return None if values is None else _read(run, ConcurrencyConfig, values)


def _recorded(run: RunDirectory) -> dict[str, Any]:
    stage = run.description.get("stage")
    if stage != "rl":
        raise RunError(f"{run.path} is a run of {stage!r}, not of rl; `glm5 train --resume` goes on with those.")
    return dict(run.description.get("config") or {})


def _class_of(run: RunDirectory, recorded: Mapping[str, Any], said: str | None) -> type[AnyLoss]:
    """That of a recorded loss; where it was not noted, the one that has these settings, or which of those is said."""
    kinds: dict[str, type[AnyLoss]] = {kind.__name__: kind for kind in get_args(AnyLoss)}
    if "class" in recorded:
        if recorded["class"] not in kinds:
            raise RunError(
                f"{run.path / 'run.json'} has the loss {recorded['class']!r}, which this version does not know."
            )
        return kinds[recorded["class"]]
    fitting = {name: kind for name, kind in kinds.items() if {it.name for it in fields(kind)} == set(recorded)}
    chosen = [kind for name, kind in fitting.items() if len(fitting) == 1 or name.lower() == (said or "").lower()]
    if not chosen:
        raise RunError(
            f"{run.path / 'run.json'} does not note of which class its loss is: "
            f"{' or '.join(fitting) or 'none of this version'} has the settings {dict(recorded)}; say with "
            "--learner.loss which it was."
        )
    return chosen[0]


def _read(run: RunDirectory, kind: type[T], values: Mapping[str, Any]) -> T:
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(f"{run.path / 'run.json'} has a {where} that cannot be read: {first['msg']}.") from error
