"""Strict mode seen from the learner: the sampler's log-probability of every token minus the trainer's is exactly 0.0.

Each token is judged by the weights that sampled it, so an answer that was interrupted by new weights is judged in
pieces; and as a whole sequence, whatever turns it was made in and whatever stands beside it. The strict engine computes
what it has cached anew when weights change, which is why that is the right thing to compare with (docs/engine.md).
Anything but zero is a mistake in one of the two: another numeric path, a token that was tokenised again, a wrong
version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glm5.engine.strict import packed_strict_logprobs
from glm5.model import GLM5
from glm5.rl.records import Trajectory


def strict_differences(
    weights_of: Callable[[int], GLM5],
    trajectories: Sequence[Trajectory],
    *,
    attention: str = "sparse",
    temperature: float = 1.0,
) -> list[Tensor]:
    """Sampler minus trainer of the sampled tokens of every trajectory, fp32 [n] each.

    weights_of: the model under a version's weights; called once for each version that sampled something.
    temperature: at which it sampled.
    """
    found = [torch.full((t.num_sampled,), torch.nan) for t in trajectories]
    for version in sorted({v for t in trajectories for v in t.versions if v >= 0}):
        concerned = [i for i, t in enumerate(trajectories) if version in t.versions]
        model = weights_of(version)
        logprobs = packed_strict_logprobs(
            model, [trajectories[i].token_ids for i in concerned], attention=attention, temperature=temperature
        )
        for i, trainer_T in zip(concerned, logprobs, strict=True):
            t = trajectories[i]
            at = [k for k, counts in enumerate(t.sampled) if counts]
            for n, k in enumerate(at):
                if t.versions[k] == version:
                    found[i][n] = torch.tensor(t.logprobs[k]) - trainer_T[k - 1]
    return found
