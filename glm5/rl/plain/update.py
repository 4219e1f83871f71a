"""From groups to one gradient: who is learnt from, and the loss over exactly the tokens that the engine sampled.

Rows are prompt + sampled ids as they came from the engine, padded on the right. Micro-batches of rows add up to the
same gradient as one batch, because every token carries its share of the step's weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glm5.model import GLM5
from glm5.rl.advantages import group_advantages
from glm5.rl.loss import Normalisation, PolicyLoss, PolicyTokens, gathered_logprobs, token_weights
from glm5.rl.plain.ledger import Ledger
from glm5.rl.plain.records import Group, Sample
from glm5.rl.plain.rollout import Ticket


@dataclass(frozen=True, slots=True)
class Lesson:
    """A sample that will be learnt from, with its advantage."""

    sample: Sample
    advantage: float


def select(
    groups: Sequence[Group], ledger: Ledger, *, normalise: bool, max_attempts: int
) -> tuple[list[Lesson], list[Ticket]]:
    """Who is learnt from (not yet settled in the ledger), and the tasks to sample again; the others are settled here.

    A group in which the environment failed is sampled again as a whole, up to `max_attempts` times, then dropped. A
    group whose rewards are all equal has no gradient and is dropped.
    """
    lessons: list[Lesson] = []
    again: list[Ticket] = []
    for group in groups:
        rewards = [sample.reward.value for sample in group.samples if sample.reward is not None]
        if len(rewards) < len(group.samples):
            retry = group.attempt + 1 < max_attempts
            for sample in group.samples:
                if retry:
                    ledger.requeued(sample)
                else:
                    ledger.dropped(sample, "environment failure")
            if retry:
                again.append(Ticket(group.task_index, group.attempt + 1))
            continue
        advantages = group_advantages(rewards, normalise=normalise)
        if advantages is None:
            for sample in group.samples:
                ledger.dropped(sample, "all right" if rewards[0] > 0 else "all wrong")
            continue
        lessons += [Lesson(sample, a) for sample, a in zip(group.samples, advantages, strict=True)]
    return lessons, again


def backward(
    model: GLM5,
    lessons: Sequence[Lesson],
    loss: PolicyLoss,
    *,
    normalisation: Normalisation,
    attention: Literal["sparse", "dense"],
    rows: int,
) -> dict[str, float]:
    """Adds the gradient of the step's loss to the parameters, `rows` samples at a time; gives loss and diagnostics.

    The trainer's log-probabilities before the update are those of this forward pass, because a step is one update.
    """
    weights = token_weights([len(lesson.sample.completion.token_ids) for lesson in lessons], normalisation)
    sums: defaultdict[str, float] = defaultdict(float)
    for start in range(0, len(lessons), rows):
        part = lessons[start : start + rows]
        logprobs_N = sampled_logprobs(model, [lesson.sample for lesson in part], attention)
        lengths = torch.tensor([len(lesson.sample.completion.token_ids) for lesson in part])
        tokens = PolicyTokens(
            logprobs_N=logprobs_N,
            old_logprobs_N=logprobs_N.detach(),
            sampled_logprobs_N=torch.tensor([x for lesson in part for x in lesson.sample.completion.logprobs]),
            advantages_N=torch.tensor([lesson.advantage for lesson in part]).repeat_interleave(lengths),
            weights_N=torch.tensor(weights[start : start + rows]).repeat_interleave(lengths),
            sequences_N=torch.arange(len(part)).repeat_interleave(lengths),
            ages_N=torch.zeros(len(logprobs_N), dtype=torch.int64),
        )
        result = loss(tokens)
        result.total.backward()
        sums["loss"] += result.total.item()
        for name, value in result.diagnostics.items():
            sums[name] += value.item()
    return dict(sums)


def sampled_logprobs(model: GLM5, samples: Sequence[Sample], attention: Literal["sparse", "dense"]) -> Tensor:
    """Log-probability [N] of every sampled token under `model`, the samples one after another."""
    rows = [[*sample.prompt_ids, *sample.completion.token_ids] for sample in samples]
    longest = max(map(len, rows))
    # Attention is causal, so padding on the right is seen by no token that counts.
    ids_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    (states_BTD,) = model(ids_BT[:, :-1], attention=attention, collect={"states"}).states
    sampled = [slice(len(s.prompt_ids) - 1, len(row) - 1) for s, row in zip(samples, rows, strict=True)]
    states_ND = torch.cat([states_BTD[b, part] for b, part in enumerate(sampled)])
    targets_N = torch.cat([ids_BT[b, 1:][part] for b, part in enumerate(sampled)])
    return gathered_logprobs(model.lm_head(states_ND), targets_N)
