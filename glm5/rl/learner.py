"""The learner: a batch goes in, the weights move by one version, metrics come out. A function of (state, batch).

The state is weights, optimiser moments and a version; nothing is drawn at random, so the batches of a journal give the
same weights to the bit whenever they are learnt from again. Micro-batches of rows add up to the gradient of the whole
batch (`packing.py`); with one update per batch and the loss of reasoning RL the step is that of `plain/update.py`.

What learns: everything but the indexers, whose choice of tokens must not drift from what the engine chose (GLM-5
report, section 3.2), and the router's correction biases.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from glm5.errors import InputError, RunError
from glm5.model import GLM5
from glm5.optim import OptimizerConfig, build_optimizers, clip_gradients
from glm5.rl.advantages import KINDS, Advantages
from glm5.rl.loss import PolicyTokens
from glm5.rl.losses import DDIS, AnyLoss
from glm5.rl.packing import Example, Judged, Normalisation, Rows, examples_of, judged, micro_batches
from glm5.rl.records import Batch, Metrics
from glm5.train import RunDirectory
from glm5.train.checks import check_choice, check_counts, check_numbers
from glm5.train.guards import LOWER_RATE


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How a batch is learnt from."""

    loss: AnyLoss = field(default_factory=DDIS)
    """DDIS for asynchronous runs; IcePop is that of the report's synchronous reasoning RL."""
    advantages: Advantages = "grpo"
    normalisation: Normalisation = "sequence-mean"
    fixed_length: int = 1024
    """Of the normalisation of that name: tokens that a full answer has."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(name="adamw", lr=1e-4, betas=(0.9, 0.98), weight_decay=0.0)
    )
    clip_norm: float = 1.0
    attention: Literal["sparse", "dense"] = "sparse"
    """As the engine's."""
    rows: int = 64
    """Rows per forward pass."""
    row_tokens: int | None = None
    """Pack trajectories into rows of so many tokens; None: one trajectory a row, padded to the longest."""
    updates: int = 1
    """Optimiser steps per batch, each on its share of the rollouts."""
    reset_optimizer: bool = False
    """Forget the optimiser's moments after every batch, when the engines take the new weights (GLM-5 report, 4.1.2)."""
    on_trouble: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop with the batch's number, or leave the update out and say so."""

    def __post_init__(self) -> None:
        check_counts(self, "fixed_length", "rows", "updates")
        if self.row_tokens is not None:
            check_counts(self, "row_tokens")
        check_numbers(self, "clip_norm", above=0)
        check_choice(self, "advantages", *KINDS)
        check_choice(self, "normalisation", "sequence-mean", "token-mean", "fixed-length")
        check_choice(self, "attention", "sparse", "dense")
        check_choice(self, "on_trouble", "stop", "skip")


class Learner:
    """Trains `model` in place. `version` counts the batches that were learnt from."""

    def __init__(self, model: GLM5, config: LearnerConfig, *, version: int = 0) -> None:
        self.model = model
        self.config = config
        self.version = version
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".indexer." not in name and not name.startswith("mtp."))
        self.optimizers = build_optimizers(model, model.config, config.optimizer)

    # ---- learning -------------------------------------------------------------------------------------------------
    def step(self, batch: Batch) -> Metrics:
        """Learns from a batch of this version; afterwards the weights are those of the next version.

        Raises InputError for a batch of another version, and RunError for a loss or gradient that is not finite, before
        the weights change, unless `on_trouble` is "skip".
        """
        if batch.version != self.version:
            raise InputError(f"The batch is of version {batch.version} and the learner at version {self.version}.")
        config = self.config
        metrics: defaultdict[str, float] = defaultdict(float)
        parts = [
            examples_of(part, config.normalisation, fixed_length=config.fixed_length, version=batch.version)
            for part in _parts(judged(batch, config.advantages), config.updates)
            if part
        ]
        before = self._logprobs_before(parts) if len(parts) > 1 else None
        for part in parts:
            for name, value in self._update(part, before).items():
                metrics[name] += value / len(parts)
        self.version += 1
        if config.reset_optimizer:
            self.reset_optimizer()
        return {**metrics, **batch_metrics(batch)}

    def reset_optimizer(self) -> None:
        """Forgets the moments: the next update is as if it were the first."""
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def _logprobs_before(self, parts: Sequence[Sequence[Example]]) -> dict[int, Tensor]:
        """Log-probabilities of every example under the weights before the batch, by the identity of its trajectory."""
        found = {}
        with torch.no_grad():
            for part in parts:
                for rows in micro_batches(part, self.config.rows, self.config.row_tokens):
                    pieces = self._logprobs(rows).split(rows.lengths)
                    found.update({id(e.trajectory): p for e, p in zip(rows.examples, pieces, strict=True)})
        return found

    def _update(self, examples: Sequence[Example], before: dict[int, Tensor] | None) -> dict[str, float]:
        """One optimiser step."""
        values = self.backward(examples, before)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        values["grad_norm"] = clip_gradients(parameters, self.config.clip_norm)
        healthy = self._healthy(values)
        for optimizer in self.optimizers:
            if healthy:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return values if healthy else {"skipped_updates": 1.0}

    def backward(self, examples: Sequence[Example], before: dict[int, Tensor] | None) -> dict[str, float]:
        """Adds the gradient of one update to the parameters; gives loss and diagnostics.

        before: the old policy's log-probabilities (see `_logprobs_before`); None: it is this very forward pass.
        """
        sums: defaultdict[str, float] = defaultdict(float)
        for rows in micro_batches(examples, self.config.rows, self.config.row_tokens):
            logprobs_N = self._logprobs(rows)
            old_N = logprobs_N.detach()
            if before is not None:
                old_N = torch.cat([before[id(example.trajectory)] for example in rows.examples])
            tokens = policy_tokens(rows, logprobs_N, old_N)
            result = self.config.loss(tokens)
            result.total.backward()
            sums["loss"] += result.total.item()
            for name, value in {**result.diagnostics, **common_diagnostics(tokens)}.items():
                sums[name] += value.item()
        return dict(sums)

    def _healthy(self, values: dict[str, float]) -> bool:
        trouble = next((f"{n} is {values[n]}" for n in ("loss", "grad_norm") if not math.isfinite(values[n])), None)
        if trouble is None or self.config.on_trouble == "skip":
            return trouble is None
        raise RunError(
            f"The {trouble} in batch {self.version}, before the weights changed; look at its rollouts, then "
            f"{LOWER_RATE}, or set on_trouble='skip' to leave such updates out."
        )

    def _logprobs(self, rows: Rows) -> Tensor:
        """Log-probability [N] of every sampled token."""
        logits_BTV = self.model(rows.ids_BT, None, rows.segments_BT, attention=self.config.attention).logits
        logits_NV = logits_BTV[rows.rows_N, rows.columns_N].float()
        return logits_NV.log_softmax(-1).gather(-1, rows.targets_N[:, None])[:, 0]

    # ---- what leaves, and what stays ------------------------------------------------------------------------------
    def weights(self) -> dict[str, Tensor]:
        """The weights of `version`, the model's own tensors: a publisher copies them before the next step."""
        return dict(self.model.state_dict())

    @property
    def module(self) -> nn.Module:
        """All that a checkpoint holds beside the optimisers."""
        return self.model

    def save(self, run: RunDirectory, *, keep: int = 2, wait: bool = True) -> None:
        """A checkpoint under the number of the version."""
        run.save_checkpoint(self.version, self.module, self.optimizers, keep=keep, wait=wait)

    def load(self, run: RunDirectory) -> int:
        """Goes on from the run's newest checkpoint, if it has one; gives the version."""
        self.version = run.load_checkpoint(self.module, self.optimizers)
        return self.version


def policy_tokens(rows: Rows, logprobs_N: Tensor, old_N: Tensor) -> PolicyTokens:
    """What a loss reads, of one micro-batch."""
    examples, lengths = rows.examples, torch.tensor(rows.lengths)
    return PolicyTokens(
        logprobs_N=logprobs_N,
        old_logprobs_N=old_N,
        sampled_logprobs_N=torch.tensor([e.trajectory.logprobs[i] for e in examples for i in e.sampled]),
        advantages_N=rows.per_token([e.advantage for e in examples]),
        weights_N=rows.per_token([e.weight for e in examples]),
        sequences_N=torch.arange(len(examples)).repeat_interleave(lengths),
        ages_N=torch.tensor([age for e in examples for age in e.ages]),
    )


def common_diagnostics(tokens: PolicyTokens) -> dict[str, Tensor]:
    """Weighted means that mean the same for every loss: `mismatch` |log old - log sampled|, `surprise` -log p."""
    mismatch_N = (tokens.old_logprobs_N - tokens.sampled_logprobs_N).abs()
    return {
        "mismatch": (mismatch_N * tokens.weights_N).sum(),
        "surprise": -(tokens.logprobs_N.detach() * tokens.weights_N).sum(),
        "ratio": ((tokens.logprobs_N.detach() - tokens.sampled_logprobs_N).exp() * tokens.weights_N).sum(),
    }


def batch_metrics(batch: Batch) -> Metrics:
    """What was learnt from: rollouts, tokens, rewards (repeats counted), ages."""
    rollouts = list(batch.rollouts)
    rewards = [reward for group in batch.groups for reward in group.rewards]
    ages = [batch.version - version for rollout in rollouts for version in rollout.versions]
    return {
        "reward": sum(rewards) / len(rewards) if rewards else 0.0,
        "rollouts": len(rollouts),
        "trained_tokens": len(ages),
        "staleness": sum(ages) / len(ages) if ages else 0.0,
        "max_staleness": max(ages, default=0),
    }


def _parts(lessons: list[Judged], updates: int) -> list[list[Judged]]:
    """The lessons cut into so many nearly equal runs."""
    cuts = [len(lessons) * i // updates for i in range(updates + 1)]
    return [lessons[first:last] for first, last in itertools.pairwise(cuts)]
