"""Log-probabilities as the strict engine computes them: the trainer's side of the comparison, equal to the bit.

Both sides run `Runner` in strict mode, whose rows do not depend on their company, and take the logarithm row by row
with the sampler's own function. So a token that the strict engine sampled under some weights has exactly the
log-probability that the trainer computes for it under the same weights on the same machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glm5.engine.paged_cache import PagedCache
from glm5.engine.runner import Chunk, Runner
from glm5.engine.sampler import token_logprobs
from glm5.errors import InputError
from glm5.model import GLM5

STEP = 512
"""Tokens whose logits are held at once."""


def strict_logprobs(model: GLM5, token_ids: Sequence[int], *, attention: str = "sparse") -> Tensor:
    """Log-probability of every token but the first given those before it, fp32 [T - 1]; without gradients."""
    ids = list(token_ids)
    if len(ids) < 2:
        raise InputError(f"A sequence of {len(ids)} token(s) has no log-probabilities; give at least two.")
    cache = PagedCache(model.config, num_blocks=-(-len(ids) // 64), block_size=64)
    runner, table = Runner(model, cache, attention=attention, strict=True), list(range(cache.num_blocks))
    found: list[float] = []
    for start in range(0, len(ids) - 1, STEP):
        part = ids[start : min(start + STEP, len(ids) - 1)]
        [logits_TV] = runner.run([Chunk(part, start, table, len(part))])
        following = ids[start + 1 : start + 1 + len(part)]
        found += [token_logprobs(row_V, token, None)[0] for row_V, token in zip(logits_TV, following, strict=True)]
    return torch.tensor(found)
