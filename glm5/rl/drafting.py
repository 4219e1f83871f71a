"""MTP during RL: the draft modules go on learning what the policy says, or speculation gets worse as the policy moves.

The modules learn the sampled tokens themselves by cross-entropy, whatever their advantage: they shall guess what the
policy will say, not what it should have said; at the policy's temperature, at which engines sample drafts too.
"detached" (default): only the modules' own weights take that gradient, so the policy is trained as if they were not
there. "joint": as in pre-training (GLM-5 report, appendix A), the trunk, the embedding and the head learn from it too,
which pulls the policy towards all it sampled. "frozen": neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from glm5.model import GLM5, ModelOutput
from glm5.rl.head import said_of
from glm5.rl.packing import Example, Passes, Places, Rows

Drafting = Literal["detached", "joint", "frozen"]


def draft_counts(examples: Sequence[Example], steps: int) -> list[int]:
    """Targets of every draft step over all examples: sampled tokens with at least 2 + step tokens before them."""
    return [sum(i >= 2 + step for e in examples for i in e.sampled) for step in range(steps)]


def draft_loss(model: GLM5, output: ModelOutput, rows: Rows, counts: Sequence[int], passes: Passes) -> Tensor:
    """This micro-batch's summand of the mean over the draft steps of their cross-entropies over `counts` targets.

    The logits of draft step j at a position predict the token 2 + j further on; those of a sampled token's own step
    stand 1 + j before the position that predicts it.
    """
    first_N = torch.tensor([i for e in rows.examples for i in e.sampled])
    total, at = output.logits.new_zeros((), dtype=torch.float32), rows.sampled
    for step, count in enumerate(counts):
        reachable_N = first_N >= 2 + step
        places = Places(at.rows_N[reachable_N], at.columns_N[reachable_N] - 1 - step, at.targets_N[reachable_N])
        said = said_of(model, output, places, passes, ahead=1 + step)
        total = total - said.logprobs_N.sum() / max(count, 1)
    return total / max(len(counts), 1)
