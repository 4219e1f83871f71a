"""The cache and the runner of an engine, chosen by what its model is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from glm5.engine.checks import check_whole
from glm5.engine.core import StepRunner, Storage
from glm5.engine.memory import available_bytes, cache_blocks
from glm5.engine.paged_cache import PagedCache
from glm5.engine.pool import Storage as StorageName
from glm5.engine.recompute import RecomputingRunner, TokenCache
from glm5.engine.runner import Runner
from glm5.engine.speculative import MOST_DRAFTS, DraftRunner, Speculator
from glm5.engine.weights import ModelWeights
from glm5.errors import InputError
from glm5.model import GLM5


@dataclass(frozen=True)
class CacheSize:
    """What the engine was asked to hold; see `memory.cache_blocks`."""

    block_size: int
    num_blocks: int | None
    memory_bytes: int | None
    max_model_len: int
    max_num_seqs: int

    def blocks(self, bytes_per_token: float, free: int | None) -> int:
        """Blocks of the cache in so many free bytes, or an InputError that says why they do not fit."""
        return cache_blocks(
            bytes_per_token=bytes_per_token,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            free=free,
            num_blocks=self.num_blocks,
            memory_bytes=self.memory_bytes,
        )


class Weights(Protocol):
    """The model's weights, as far as they are exchanged: `glm5.engine.weights.ModelWeights` has the contract."""

    def staged(self, state_dict: Mapping[str, Tensor], version: int) -> Mapping[str, Tensor]:
        """The new weights, checked; the model's own stay as they are."""

    def swap(self, ready: Mapping[str, Tensor]) -> None:
        """Puts staged weights in place of the model's own."""


@dataclass(frozen=True)
class Backend:
    """A runner over a cache of `num_blocks` blocks."""

    runner: StepRunner
    cache: Storage
    num_blocks: int
    weights: Weights
    speculator: Speculator | None = None
    experts: bool = False
    """Whether the runner can collect which experts were chosen."""


def build_backend(
    model: torch.nn.Module, size: CacheSize, *, attention: str, strict: bool, storage: StorageName | None, drafts: int
) -> Backend:
    """The paged cache and its runner for a GLM5, recomputation for any other module that gives logits.

    drafts: tokens to guess for each step, 0 for none. Raises InputError for a cache that does not fit into the memory
    that is free, and for strict mode on weights or a cache that are not fp32.
    """
    check_drafts(model, drafts)
    if not isinstance(model, GLM5):
        blocks = size.blocks(TokenCache.bytes_per_token, available_bytes(torch.device("cpu")))
        tokens = TokenCache(blocks, size.block_size)
        return Backend(RecomputingRunner(model, tokens, attention=attention), tokens, blocks, ModelWeights(model))
    weight = model.lm_head.weight
    if storage is None:
        storage = "fp32" if weight.dtype == torch.float32 else "bf16"
    if strict and (weight.dtype != torch.float32 or storage != "fp32"):
        raise InputError(
            f"Strict mode computes in fp32, but the weights are {weight.dtype} and the cache is {storage}; load the "
            "model with dtype=torch.float32 and give storage='fp32'."
        )
    new_cache = partial(
        PagedCache,
        model.config,
        block_size=size.block_size,
        dtype=weight.dtype,
        storage=storage,
        draft=drafts > 0,
    )
    blocks = size.blocks(new_cache(num_blocks=1, device="meta").bytes_per_token, available_bytes(weight.device))
    cache = new_cache(num_blocks=blocks, device=weight.device)
    runner = Runner(model, cache, attention=attention, strict=strict)
    speculator = speculator_of(runner, drafts, size)
    return Backend(runner, cache, blocks, ModelWeights(model), speculator, experts=bool(model.config.sparse_layers))


def check_drafts(model: torch.nn.Module, drafts: int) -> None:
    """Refuses drafts that the model cannot make."""
    check_whole("num_speculative_tokens", drafts, 0, MOST_DRAFTS)
    if drafts and not (isinstance(model, GLM5) and len(model.mtp)):
        raise InputError(
            f"num_speculative_tokens is {drafts}, but this model has no MTP module to draft with; load one with "
            "num_nextn_predict_layers of at least 1, or leave it at 0."
        )


def speculator_of(runner: DraftRunner, drafts: int, size: CacheSize) -> Speculator | None:
    """What drafts so many tokens for each step; None for none."""
    if not drafts:
        return None
    return Speculator(runner, drafts=drafts, block_size=size.block_size, max_model_len=size.max_model_len)
