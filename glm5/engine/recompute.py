"""The plain reference of the runner: no cache of latents, every step computes every sequence from its first token.

Its "cache" holds the token ids themselves, slot by slot as the paged cache holds latents, and is read through the block
tables. So it gives the tokens that any other runner must give, a block in wrong hands shows as a wrong token, and any
module that maps token ids to logits can stand in for a model. The cost grows with the square of the length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glm5.engine.runner import Chunk, Output


class TokenCache:
    """Token ids in blocks; the storage of `RecomputingRunner`."""

    bytes_per_token = 8

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.ids = torch.zeros(num_blocks, block_size, dtype=torch.int64)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block."""
        return self.bytes_per_token * self.block_size

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copies whole blocks, (from, to) each."""
        for old, new in pairs:
            self.ids[new] = self.ids[old]


class RecomputingRunner:
    """See `glm5.engine.runner.Runner`; `model(ids_1T, attention=...)` gives an output with `logits` [1, T, V]."""

    def __init__(self, model: nn.Module, cache: TokenCache, *, attention: str = "sparse") -> None:
        self.model: Any = model
        self.cache, self.attention = cache, attention

    def run(self, chunks: list[Chunk], collect: frozenset[str] = frozenset()) -> list[Output]:
        """Logits of each chunk; nothing else can be collected."""
        assert not collect
        return [Output(self._run(chunk)) for chunk in chunks]

    def _run(self, chunk: Chunk) -> Tensor:
        size, table = self.cache.block_size, torch.tensor(chunk.block_table)
        positions_T = torch.arange(chunk.start + len(chunk.token_ids))
        blocks_T, offsets_T = table[positions_T // size], positions_T % size
        self.cache.ids[blocks_T[chunk.start :], offsets_T[chunk.start :]] = torch.tensor(chunk.token_ids)
        logits_TV = self.model(self.cache.ids[blocks_T, offsets_T][None], attention=self.attention).logits[0]
        return logits_TV[len(logits_TV) - chunk.logits_to_keep :].float()
