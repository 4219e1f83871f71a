"""The trainer's log-probabilities of sampled tokens, to be held beside the sampler's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from glm5.engine.sampler import tempered
from glm5.engine.strict import packed_strict_logprobs
from glm5.model import GLM5
from glm5.rl.loss import gathered_logprobs
from glm5.rl.records import Rollout
from glm5.rl.seen import TrainerLogprobs


def trainer_logprobs(
    model: GLM5,
    rollouts: Iterable[Rollout],
    *,
    attention: Literal["sparse", "dense"] = "sparse",
    strict: bool = False,
    temperature: float = 1.0,
) -> TrainerLogprobs:
    """Under the model's present weights. strict: as the strict engine computes them, to the bit. temperature: at which
    the run sampled.
    """
    found: TrainerLogprobs = {}
    for rollout in rollouts:
        found[rollout.id] = []
        for trajectory in rollout.trajectories:
            ids = trajectory.token_ids
            if strict:
                [logprobs_T] = packed_strict_logprobs(model, [ids], attention=attention, temperature=temperature)
            else:
                logprobs_T = _forward(model, ids, attention, temperature)
            found[rollout.id].append([float(logprobs_T[i - 1]) for i, s in enumerate(trajectory.sampled) if s])
    return found


def _forward(
    model: GLM5, token_ids: Sequence[int], attention: Literal["sparse", "dense"], temperature: float
) -> Tensor:
    """Of every token but the first [T - 1], in one forward pass."""
    ids_BT = torch.tensor([list(token_ids)])
    with torch.no_grad():
        logits_BTV = model(ids_BT[:, :-1], attention=attention).logits
        return gathered_logprobs(tempered(logits_BTV.float(), temperature), ids_BT[:, 1:])[0]
