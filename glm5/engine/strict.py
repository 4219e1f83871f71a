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

BLOCK = 64
STEP = 512
"""Tokens whose logits are held at once."""


def strict_logprobs(model: GLM5, token_ids: Sequence[int], *, attention: str = "sparse") -> Tensor:
    """Log-probability of every token but the first given those before it, fp32 [T - 1]; without gradients."""
    return packed_strict_logprobs(model, [token_ids], attention=attention)[0]


def packed_strict_logprobs(
    model: GLM5, sequences: Sequence[Sequence[int]], *, attention: str = "sparse", temperature: float = 1.0
) -> list[Tensor]:
    """The same of several sequences at once, side by side in every step; to the bit as if each were alone."""
    inputs = [list(ids[:-1]) for ids in sequences]
    for ids in sequences:
        if len(ids) < 2:
            raise InputError(f"A sequence of {len(ids)} token(s) has no log-probabilities; give at least two.")
    blocks = [-(-len(ids) // BLOCK) for ids in inputs]
    cache = PagedCache(model.config, num_blocks=sum(blocks), block_size=BLOCK)
    runner = Runner(model, cache, attention=attention, strict=True)
    tables = [list(range(sum(blocks[:i]), sum(blocks[: i + 1]))) for i in range(len(blocks))]
    found: list[list[float]] = [[] for _ in sequences]
    while True:
        share, chunks, whose = STEP, [], []
        for i, ids in enumerate(inputs):
            part = ids[len(found[i]) : len(found[i]) + share]
            if part:
                share -= len(part)
                chunks.append(Chunk(part, len(found[i]), tables[i], len(part)))
                whose.append(i)
        if not chunks:
            return [torch.tensor(values) for values in found]
        for i, output in zip(whose, runner.run(chunks), strict=True):
            logits_TV = output.logits_KV
            start = len(found[i]) + 1
            targets = sequences[i][start : start + len(logits_TV)]
            found[i] += [
                token_logprobs(row_V, token, None, temperature)[0]
                for row_V, token in zip(logits_TV, targets, strict=True)
            ]
