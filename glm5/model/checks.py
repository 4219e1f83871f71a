"""Inputs that a forward pass cannot run, each refused with a sentence before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from glm5.config import ModelConfig
from glm5.errors import InputError, did_you_mean
from glm5.model.output import COLLECTABLE, Replay
from glm5.ops.spans import Spans

ATTENTION = ("sparse", "dense")


def check_ids(config: ModelConfig, ids_BT: Tensor) -> None:
    """Token ids [B, T], int64, inside the vocabulary, not more than there are positions."""
    if ids_BT.dim() != 2 or ids_BT.shape[0] == 0 or ids_BT.shape[1] == 0 or ids_BT.dtype != torch.int64:
        raise InputError(
            f"input_ids are {ids_BT.dtype} of shape {list(ids_BT.shape)}; give int64 token ids [batch, tokens] "
            "with at least one of each."
        )
    low, high = int(ids_BT.min()), int(ids_BT.max())
    if low < 0 or high >= config.vocab_size:
        raise InputError(
            f"input_ids hold {low if low < 0 else high}, outside the vocabulary of {config.vocab_size:,}; "
            "check that the tokenizer belongs to this model."
        )
    if ids_BT.shape[1] > config.max_position_embeddings:
        raise InputError(
            f"The input has {ids_BT.shape[1]:,} tokens; this model has {config.max_position_embeddings:,} "
            "positions. Shorten the input."
        )


def check_shapes(ids_BT: Tensor, **by_token: Tensor | None) -> None:
    """What is given per token has the shape of the ids."""
    for name, given in by_token.items():
        if given is not None and given.shape != ids_BT.shape:
            raise InputError(f"{name} have shape {list(given.shape)}, input_ids {list(ids_BT.shape)}; make them equal.")


def check_attention(attention: str) -> None:
    """One of the two kinds."""
    if attention not in ATTENTION:
        hint = did_you_mean(attention, ATTENTION)
        raise InputError(f"attention is {attention!r}; use 'sparse' or 'dense'.{hint}")


def check_collect(collect: frozenset[str], *, has_mtp: bool, has_cache: bool) -> None:
    """Known names, and MTP only where it can run."""
    for name in sorted(collect - COLLECTABLE):
        known = ", ".join(sorted(COLLECTABLE))
        raise InputError(f"collect names {name!r}; it may hold {known}.{did_you_mean(name, COLLECTABLE)}")
    if "mtp" in collect and not has_mtp:
        raise InputError("collect names 'mtp' but this model has no MTP module (num_nextn_predict_layers is 0).")
    if "mtp" in collect and has_cache:
        raise InputError("collect={'mtp'} is for training; with a cache, call `draft` after the forward pass.")


def check_replay(config: ModelConfig, replay: Replay, spans: Spans) -> None:
    """Recorded choices fit the input: shapes, ranges, and no query that sees what it may not."""
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    for kind, recorded in (("experts", replay.experts), ("positions", replay.positions)):
        for layer, choice_BTK in recorded.items():
            if not 0 <= layer < layers:
                raise InputError(f"replay.{kind} names layer {layer}, but the model has {layers}.")
            if choice_BTK.dim() != 3 or choice_BTK.shape[:2] != spans.lo_BT.shape or choice_BTK.dtype != torch.int64:
                raise InputError(
                    f"replay.{kind}[{layer}] is {choice_BTK.dtype} of shape {list(choice_BTK.shape)}; give int64 "
                    f"[{spans.lo_BT.shape[0]}, {spans.lo_BT.shape[1]}, K], as `collect` returned it."
                )
    for layer, experts_BTK in replay.experts.items():
        free_BTK = experts_BTK == -1
        if not torch.equal(free_BTK.any(-1), free_BTK.all(-1)):
            raise InputError(f"replay.experts[{layer}] has -1 beside an expert; give a token all, or -1 only.")
        if int(experts_BTK.min()) < -1 or int(experts_BTK.max()) >= config.n_routed_experts:
            raise InputError(f"replay.experts[{layer}] names an expert outside 0 to {config.n_routed_experts - 1}.")
    for layer, at_BTK in replay.positions.items():
        seen = (at_BTK >= spans.lo_BT[..., None]) & (at_BTK < spans.hi_BT[..., None])
        if not bool((seen | (at_BTK == -1)).all()):
            raise InputError(
                f"replay.positions[{layer}] holds a position that its query may not see; "
                "record and replay the same rows."
            )
