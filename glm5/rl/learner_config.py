"""All settings of the learner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from glm5.errors import ConfigError
from glm5.model import logits_in
from glm5.optim import OptimizerConfig, Schedule
from glm5.rl.adapters import LoRA
from glm5.rl.advantages import KINDS, Advantages
from glm5.rl.critic import Critic
from glm5.rl.distillation import Distillation
from glm5.rl.drafting import Drafting
from glm5.rl.losses import DDIS, AnyLoss
from glm5.rl.packing import Normalisation, Passes
from glm5.rl.reference import KL
from glm5.train.checks import check_choice, check_counts, check_numbers


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How a batch is learnt from."""

    loss: AnyLoss = field(default_factory=DDIS)
    """DDIS for asynchronous runs; IcePop is that of the report's synchronous reasoning RL."""
    advantages: Advantages = "grpo"
    """How much better a rollout is than its siblings, or than the batch (docs/rl-losses.md); none: no better."""
    normalisation: Normalisation = "sequence-mean"
    """How tokens share the loss: each answer alike, each token alike, or each token a `fixed_length`th of an answer."""
    fixed_length: int = 1024
    """Of the normalisation of that name: tokens that a full answer has."""
    truncated: Literal["train", "mask"] = "train"
    """Answers that a limit of tokens or turns cut off: learnt from, or left out of the loss, since nobody knows how
    they would have ended (DAPO, arXiv 2503.14476, section 3.4). Their rewards count in the baseline either way."""
    critic: Critic = field(default_factory=Critic)
    """Of the advantages "gae"."""
    distillation: Distillation = field(default_factory=Distillation)
    """From the learner's teachers, where it has any; with the advantages "none", nothing else."""
    kl: KL | None = None
    """To the model that the learner was given, or to its `reference`."""
    entropy: float = 0.0
    """Coefficient of a bonus on the entropy of every sampled token's distribution."""

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(name="adamw", lr=1e-4, betas=(0.9, 0.98), weight_decay=0.0)
    )
    schedule: Schedule = field(default_factory=lambda: Schedule(shape="constant"))
    """Of the rate over the run's steps. One that falls to 0 lets old samples end as old in versions, not in policy."""
    clip_norm: float = 1.0
    """Of the policy's gradient; those of MTP, indexers and value head are clipped apart, by the same."""
    updates: int = 1
    """Optimiser steps per batch, each on its share of the rollouts."""
    reset_optimizer: bool = False
    """Forget the optimiser's moments when the version is a multiple of the scheduler's `publish_every`. That is where
    the engines take new weights (GLM-5 report, 3.3), unless a resumed run or a swap that had to wait moved these: a
    rule of the version alone makes the same weights however a run was interrupted."""
    on_trouble: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop with the batch's number, or leave the update out and say so."""

    attention: Literal["sparse", "dense"] = "sparse"
    """As the engine's."""
    rows: int = 64
    """At most, of one forward pass."""
    pass_tokens: int = 8192
    """Tokens of one forward pass at most, padding included; memory follows it. A longer row has a pass of its own."""
    logits_mib: int = 256
    """MiB of logits that are held at once. A pass whose tokens that are learnt from have more, drafts counted, makes so
    many at a time, and again in its backward pass; the loss takes a few times this memory."""
    row_tokens: int | None = None
    """Pack trajectories into rows of so many tokens; None: one trajectory a row, padded to the longest."""

    lora: LoRA | None = None
    """Train adapters; everything else, MTP and indexers too, is then frozen."""
    mtp: Drafting = "detached"
    """Whether draft modules learn the sampled tokens: alone, with the policy (joint), or not (frozen)."""
    mtp_weight: float = 0.3
    """On the loss of the draft modules, GLM-4.5's."""
    indexer_weight: float = 0.0
    """On the KL loss of the indexers; at 0 they are frozen, as in the report."""
    freeze: tuple[str, ...] = ()
    """Patterns of names of parameters that do not learn: *.experts.* for the routed experts, *.gate.* for routers."""
    replay_weight: float = 1.0
    """On the language loss of the learner's `replay` of earlier stages, where it has one."""

    def __post_init__(self) -> None:
        check_counts(self, "fixed_length", "rows", "pass_tokens", "logits_mib", "updates")
        if self.row_tokens is not None:
            check_counts(self, "row_tokens")
        check_numbers(self, "clip_norm", above=0)
        check_numbers(self, "entropy", "mtp_weight", "indexer_weight", "replay_weight")
        check_choice(self, "advantages", *KINDS)
        check_choice(self, "normalisation", "sequence-mean", "token-mean", "fixed-length")
        check_choice(self, "truncated", "train", "mask")
        check_choice(self, "attention", "sparse", "dense")
        check_choice(self, "on_trouble", "stop", "skip")
        check_choice(self, "mtp", "detached", "joint", "frozen")
        if self.lora is not None and self.indexer_weight:
            raise ConfigError("indexer_weight needs whole weights to train; leave it at 0 with LoRA.")
        if self.lora is not None and self.freeze:
            raise ConfigError("With LoRA all weights are frozen but the adapters of its targets; leave freeze out.")

    @property
    def passes(self) -> Passes:
        """How examples are cut. The loss of the indexers must not see padding, so rows then carry segments."""
        one_a_row = 1 if self.indexer_weight else None
        return Passes(
            attention=self.attention, rows=self.rows, tokens=self.pass_tokens, row_tokens=self.row_tokens or one_a_row,
            logits=logits_in(self.logits_mib),
        )  # fmt: skip
