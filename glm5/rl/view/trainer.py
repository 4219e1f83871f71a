"""The trainer's log-probabilities of sampled tokens, to be held beside the sampler's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

from glm5.model import GLM5
from glm5.rl.loss import gathered_logprobs
from glm5.rl.records import Rollout

TrainerLogprobs = dict[str, list[list[float]]]
"""By rollout: of each trajectory, of its sampled tokens in order."""


def trainer_logprobs(
    model: GLM5, rollouts: Iterable[Rollout], *, attention: Literal["sparse", "dense"] = "sparse"
) -> TrainerLogprobs:
    """Under the model's present weights, one trajectory at a time; the sampler's own where these made the token."""
    found: TrainerLogprobs = {}
    with torch.no_grad():
        for rollout in rollouts:
            found[rollout.id] = []
            for trajectory in rollout.trajectories:
                ids_BT = torch.tensor([trajectory.token_ids])
                logits_BTV = model(ids_BT[:, :-1], attention=attention).logits
                logprobs_T = gathered_logprobs(logits_BTV, ids_BT[:, 1:])[0]
                found[rollout.id].append([float(logprobs_T[i - 1]) for i, s in enumerate(trajectory.sampled) if s])
    return found
