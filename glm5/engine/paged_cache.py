"""The paged cache: a pool of equal blocks of tokens, each with its latents, indexer keys and MTP rows in every layer.

Storage only. Which sequence owns which blocks is the block manager's business; position p of a sequence lies in slot
`block_table[p // block_size] * block_size + p % block_size` of every layer's pool. Latent, indexer key and the rows of
the MTP modules of one token share that slot, so they are copied, forked and forgotten together: a cache that restored
one without the others would give silently wrong text above `index_topk` tokens.

Bytes per token: per layer `kv_lora_rank + qk_rope_head_dim` values, per full-indexer layer (the MTP modules are such)
`index_head_dim` more; 4, 2 or 1 bytes each, in fp8 plus one scale byte per 64 values (`pool.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glm5.config import ModelConfig
from glm5.engine.checks import check_whole
from glm5.engine.pool import Pool, Storage, check_storage
from glm5.errors import InputError
from glm5.model import draft_layers


class PagedCache:
    """`num_blocks` blocks of `block_size` tokens. Memory is taken by the system as blocks are first written.

    dtype: what the model computes in and reads. storage: what is kept. draft: room for the rows of the MTP modules.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        storage: Storage = "fp32",
        draft: bool = False,
    ) -> None:
        check_whole("num_blocks", num_blocks, 1)
        check_whole("block_size", block_size, 1)
        check_storage(storage)
        if draft and not config.num_nextn_predict_layers:
            raise InputError("draft=True, but this model has no MTP module; leave draft out.")
        self.config, self.num_blocks, self.block_size = config, num_blocks, block_size
        self.dtype, self.device, self.storage, self.draft = dtype, torch.device(device), storage, draft
        layers = [*range(config.num_hidden_layers), *(draft_layers(config) if draft else ())]
        kinds = config.indexer_types + ("full",) * config.num_nextn_predict_layers
        slots, latent = num_blocks * block_size, config.kv_lora_rank + config.qk_rope_head_dim

        def pool(width: int) -> Pool:
            return Pool(slots, width, storage, self.device)

        self.latents = {layer: pool(latent) for layer in layers}
        self.keys = {layer: pool(config.index_head_dim) for layer in layers if kinds[layer] == "full"}

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes, all layers together."""
        return sum(pool.bytes_per_row for pool in self._pools())

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block."""
        return self.block_size * self.bytes_per_token

    def slots(self, block_table: Sequence[int], start: int, end: int) -> Tensor:
        """Physical slots (int64) of the positions from `start` to `end` of a sequence."""
        first, last = start // self.block_size, -(-end // self.block_size)
        blocks = torch.tensor(block_table[first:last], dtype=torch.int64, device=self.device)
        places = blocks[:, None] * self.block_size + torch.arange(self.block_size, device=self.device)
        return places.flatten()[start - first * self.block_size : end - first * self.block_size]

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copies whole blocks, (from, to): latents, indexer keys and MTP rows of every layer."""
        for block in {block for pair in pairs for block in pair}:
            if not 0 <= block < self.num_blocks:
                raise InputError(f"Block {block} is outside the cache's {self.num_blocks}; give blocks of this cache.")
        if pairs:
            for pool in self._pools():
                pool.copy(pairs, self.block_size)

    def _pools(self) -> list[Pool]:
        return [*self.latents.values(), *self.keys.values()]
