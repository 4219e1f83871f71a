"""What is minimised on one micro-batch: the policy loss and whatever a run adds to it.

    policy loss(A + c (log teacher - log pi) - b k1)  +  b k2|k3  -  e entropy  +  w_i KL of the indexers  [+ w_m MTP]

In brackets: beside it, unless joint (`drafting.py`). Every term is a sum over tokens that bring their share of the
update's weight, so micro-batches add up. Values that come before the update (old policy, reference, teachers, critic)
are computed once, for all of its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm5.model import GLM5, ModelOutput
from glm5.rl.critic import Estimates, ValueHead, value_loss, values_of
from glm5.rl.drafting import draft_counts, draft_loss
from glm5.rl.forward import PerExample, by_example, gathered, run
from glm5.rl.head import said_of
from glm5.rl.learner_config import LearnerConfig
from glm5.rl.loss import PolicyTokens
from glm5.rl.packing import Example, Normalisation, Passes, Rows
from glm5.rl.reference import estimate


@dataclass(frozen=True)
class Given:
    """What is known of an update's tokens before it begins; None where it is not needed."""

    old: PerExample | None = None
    """Under the trainer's weights before the batch; None: those of the update's own forward pass."""
    reference: PerExample | None = None
    teacher: PerExample | None = None
    critic: Estimates | None = None


@dataclass(frozen=True)
class Totals:
    """What the means of an update divide by."""

    tokens: int
    drafts: list[int]
    weight: float
    """Of all sampled tokens together."""


@dataclass(frozen=True)
class Objective:
    """Of one micro-batch. The three have separate backward passes."""

    policy: Tensor
    draft: Tensor | None
    """For the weights of the MTP modules alone."""
    value: Tensor | None
    """For the value head alone."""
    diagnostics: dict[str, Tensor]
    before: PerExample
    """The trainer's log-probabilities before the batch."""


def totals_of(model: GLM5, examples: Sequence[Example], normalisation: Normalisation) -> Totals:
    """Over all examples of an update."""
    tokens, weight = sum(len(e.trajectory.token_ids) - 1 for e in examples), 1.0
    if normalisation == "fixed-length":  # the weights of the others add up to 1
        weight = math.fsum(e.weight * len(e.sampled) for e in examples)
    return Totals(tokens, draft_counts(examples, model.mtp_steps), weight)


def objective(
    model: GLM5,
    head: ValueHead | None,
    rows: Rows,
    config: LearnerConfig,
    given: Given,
    totals: Totals,
    passes: Passes,
) -> Objective:
    """Runs the model once, and sums up."""
    drafting = drafts(model, config)
    collect = frozenset(
        name for name, wanted in (
            ("mtp", drafting), ("hidden", head is not None), ("indexer_kl", config.indexer_weight > 0),
        ) if wanted
    )  # fmt: skip
    output = run(model, rows, passes.attention, collect)
    said = said_of(model, output, rows.sampled, passes, entropy=config.entropy > 0)
    logprobs_N = said.logprobs_N
    tokens = policy_tokens(rows, logprobs_N, given, config)
    result = config.loss(tokens)
    total, found = result.total, {**result.diagnostics, **common_diagnostics(tokens)}
    if given.teacher is not None:
        found["teacher_kl"] = ((logprobs_N.detach() - gathered(given.teacher, rows)) * tokens.weights_N).sum()
    if given.reference is not None and config.kl is not None:
        kl_N = estimate(logprobs_N, gathered(given.reference, rows), config.kl.estimator)
        found["kl"] = (kl_N.detach() * tokens.weights_N).sum()
        if config.kl.estimator != "k1":
            total = total + config.kl.coefficient * (kl_N * tokens.weights_N).sum()
    if config.entropy:
        entropy = (said.entropies_N * tokens.weights_N).sum()
        found["entropy"] = entropy.detach()
        total = total - config.entropy * entropy
    found = {name: value / totals.weight for name, value in found.items()}
    if config.indexer_weight:
        own = [kl for layer, kl in output.indexer_kl.items() if layer < model.config.num_hidden_layers]  # no MTP module
        kl = torch.stack(own).mean() * _share(rows, totals)
        found["indexer_kl"] = kl.detach()
        total = total + config.indexer_weight * kl
    draft = draft_loss(model, output, rows, totals.drafts, passes) if drafting else None
    if draft is not None:
        found["mtp"] = draft.detach()
        draft = config.mtp_weight * draft
        if config.mtp == "joint":
            total, draft = total + draft, None
    before = by_example(rows, tokens.old_logprobs_N)
    return Objective(total, draft, _value(head, output, rows, config, given, tokens, totals, found), found, before)


def mismatch(examples: Sequence[Example], before: PerExample) -> dict[str, float]:
    """|log trainer - log sampler| of the tokens that the weights before the batch sampled: median, 99th percentile and
    maximum; nothing when all are stale."""
    gaps = [
        (before[id(e.trajectory)] - torch.tensor([e.trajectory.logprobs[i] for i in e.sampled])).abs()[
            torch.tensor(e.ages) == 0
        ]
        for e in examples
    ]
    ordered_M = torch.cat(gaps).double().sort().values if gaps else torch.empty(0)
    if not len(ordered_M):
        return {}
    at = {"median": (len(ordered_M) - 1) // 2, "p99": math.ceil(0.99 * len(ordered_M)) - 1, "max": -1}
    return {f"mismatch_{name}": ordered_M[i].item() for name, i in at.items()}


def drafts(model: GLM5, config: LearnerConfig) -> bool:
    """Whether MTP modules are there and learn."""
    return len(model.mtp) > 0 and config.mtp != "frozen" and config.mtp_weight > 0 and config.lora is None


def policy_tokens(rows: Rows, logprobs_N: Tensor, given: Given, config: LearnerConfig) -> PolicyTokens:
    """What a loss reads, of one micro-batch."""
    examples, lengths = rows.examples, torch.tensor(rows.lengths)
    advantages_N = rows.per_token([e.advantage for e in examples])
    if given.critic is not None:
        advantages_N = gathered(given.critic.advantages, rows)
    now_N = logprobs_N.detach()
    if given.teacher is not None:
        advantages_N = advantages_N + config.distillation.coefficient * (gathered(given.teacher, rows) - now_N)
    if given.reference is not None and config.kl is not None and config.kl.estimator == "k1":
        advantages_N = advantages_N - config.kl.coefficient * estimate(now_N, gathered(given.reference, rows), "k1")
    return PolicyTokens(
        logprobs_N=logprobs_N,
        old_logprobs_N=now_N if given.old is None else gathered(given.old, rows),
        sampled_logprobs_N=torch.tensor([e.trajectory.logprobs[i] for e in examples for i in e.sampled]),
        advantages_N=advantages_N,
        weights_N=rows.per_token([e.weight for e in examples]),
        sequences_N=torch.arange(len(examples)).repeat_interleave(lengths),
        ages_N=torch.tensor([age for e in examples for age in e.ages]),
    )


def common_diagnostics(tokens: PolicyTokens) -> dict[str, Tensor]:
    """Means that say the same for every loss.

    mismatch: |log old - log sampled|. surprise: -log p, an estimate of the entropy. ratio: p / p(sampled). All over the
    update's tokens by their weights.
    """
    now_N = tokens.logprobs_N.detach()
    return {
        "mismatch": ((tokens.old_logprobs_N - tokens.sampled_logprobs_N).abs() * tokens.weights_N).sum(),
        "surprise": -(now_N * tokens.weights_N).sum(),
        "ratio": ((now_N - tokens.sampled_logprobs_N).exp() * tokens.weights_N).sum(),
    }


def _value(
    head: ValueHead | None, output: ModelOutput, rows: Rows, config: LearnerConfig, given: Given,
    tokens: PolicyTokens, totals: Totals, found: dict[str, Tensor],
) -> Tensor | None:  # fmt: skip
    if head is None or given.critic is None:
        return None
    values_N, returns_N = values_of(head, output, rows), gathered(given.critic.returns, rows)
    loss = value_loss(values_N, gathered(given.critic.values, rows), returns_N, tokens.weights_N, config.critic.clip)
    found["value_loss"] = loss.detach() / totals.weight
    return loss


def _share(rows: Rows, totals: Totals) -> float:
    """Of the update's tokens that are in these rows."""
    return sum(len(e.trajectory.token_ids) - 1 for e in rows.examples) / totals.tokens
