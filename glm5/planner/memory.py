"""Memory of a served model on each device: weights, cache, workspace, reserve.

The workspace is what one prefill chunk needs at its widest point, in the form this project computes it: latent queries,
gathered expert rows, indexer scores in blocks of 256 queries, logits of every request. Engines that build a full
`chunk x context` score matrix need more. The reserve is a tenth of the device for the runtime: context, graphs,
communication buffers, fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from glm5.planner.hardware import Hardware
from glm5.planner.quantity import Quantity, derive, given
from glm5.planner.serving import Serving, Sharding
from glm5.planner.shape import ModelShape
from glm5.planner.weights import byte_shares, part_bytes, tensor_bytes

RESERVE = 0.10


@dataclass(frozen=True)
class Memory:
    """Bytes of one serving plan; the `device_` fields are those of the fullest device."""

    parts: tuple[Quantity, ...]
    weights: Quantity
    cache_row: Quantity
    indexer_row: Quantity
    cache_token: Quantity
    cache: Quantity
    device_weights: Quantity
    device_cache: Quantity
    workspace: Quantity
    reserve: Quantity
    device_total: Quantity
    capacity: Quantity
    room: Quantity
    """Requests of this context that fit at a time."""
    experts_on_disk: Quantity
    """Share of the routed experts that do not fit and are read from disk in each step; 0 when all fit."""

    @property
    def fits(self) -> bool:
        """Whether everything lies in device memory."""
        return self.device_total.value <= self.capacity.value

    @property
    def streams(self) -> bool:
        """Whether it runs all the same, with experts read from disk."""
        return not self.fits and self.experts_on_disk.value > 0


def cache_rows(shape: ModelShape, cache_dtype: str) -> tuple[Quantity, Quantity]:
    """Bytes of one token in one layer: (latent or keys and values, indexer key)."""
    a = shape.attention
    if cache_dtype == "bf16":
        row = derive("Cache row (one token, one layer)", "B", "values * 2", values=a.cache_values)
        return row, derive("Indexer key (one token, one layer)", "B", "values * 2", values=a.indexer_values)
    row = derive(
        "Cache row (one token, one layer)", "B", "(values - rotary) * (1 + 4 / 128) + rotary * 2",
        values=a.cache_values, rotary=a.rotary_values, source="e4m3 with an FP32 scale per 128; rotary key in BF16",
    )  # fmt: skip
    scale = 4 if a.indexer_values else 0
    key = derive("Indexer key (one token, one layer)", "B", "values + scale", values=a.indexer_values, scale=scale)
    return row, key


def cache_per_token(shape: ModelShape, cache_dtype: str, *, mtp: bool) -> Quantity:
    """Cache bytes of one token over all layers. Layers that share a selection keep no indexer key."""
    row, key = cache_rows(shape, cache_dtype)
    a, extra = shape.attention, shape.mtp_layers if mtp else 0
    return derive(
        "Cache per token", "B/token", "layers * row + indexer_layers * indexer_key",
        row=row, layers=shape.layers + extra,
        indexer_layers=a.indexer_layers + extra if a.indexer_layers else 0, indexer_key=key,
    )  # fmt: skip


def memory(shape: ModelShape, serving: Serving, hardware: Hardware, sharding: Sharding) -> Memory:
    """The memory plan; sizes are assumed checked."""
    mtp = serving.mtp
    held = [t for t in shape.tensors if mtp or not t.mtp]
    parts = part_bytes(shape, serving.dtype, mtp=mtp)
    named = {part.name.replace(" ", "_"): part for part in parts}
    weights = derive("Weights", "B", " + ".join(named), named)
    row, key = cache_rows(shape, serving.cache_dtype)
    token = cache_per_token(shape, serving.cache_dtype, mtp=mtp)
    cache = derive("Cache", "B", "cache_per_token * context * concurrency", cache_per_token=token,
                   context=serving.context, concurrency=serving.concurrency)  # fmt: skip
    shares = byte_shares(held, serving.dtype)
    device_weights = derive(
        "Weights per device", "B", "copied + cut_in_replica / tensor + routed_experts / devices", copied=shares.copied,
        cut_in_replica=shares.tensor, tensor=sharding.tensor, routed_experts=shares.all, devices=sharding.devices,
    )  # fmt: skip
    device_cache = derive(
        "Cache per device", "B", "cache_per_token * context * requests / head_cut", cache_per_token=token,
        context=serving.context, requests=ceil(serving.concurrency / sharding.data),
        head_cut=min(sharding.tensor, shape.attention.cache_heads),
        source="requests of one attention replica; latents are shared by all heads and cannot be cut",
    )  # fmt: skip
    work = workspace(shape, serving, sharding)
    capacity = given("Memory of a device", hardware.device.memory_gb * 1e9, "B", hardware.device.source)
    reserve = derive("Reserve", "B", "share * capacity", share=RESERVE, capacity=capacity)
    total = derive("Total per device", "B", "weights + cache + workspace + reserve", weights=device_weights,
                   cache=device_cache, workspace=work, reserve=reserve)  # fmt: skip
    room = derive(
        "Requests that fit", "requests",
        "data * max(0, floor((capacity - weights - workspace - reserve) * head_cut / (cache_per_token * context)))",
        data=sharding.data, capacity=capacity, weights=device_weights, workspace=work, reserve=reserve,
        head_cut=min(sharding.tensor, shape.attention.cache_heads), cache_per_token=token, context=serving.context,
    )  # fmt: skip
    return Memory(
        parts, weights, row, key, token, cache, device_weights, device_cache, work, reserve, total, capacity, room,
        _on_disk(shape, serving, hardware, total, capacity),
    )  # fmt: skip


def workspace(shape: ModelShape, serving: Serving, sharding: Sharding) -> Quantity:
    """Temporaries of one prefill chunk on one device, at the widest layer, and the logits of one decode step."""
    tokens = min(serving.chunk, serving.context)
    return derive(
        "Workspace per device", "B",
        "tokens * 2"
        " * (6 * hidden + query_width / tensor + experts_per_token * (2 * hidden + 3 * expert_width) / expert)"
        " + score_rows * context * 4 + requests * vocabulary * 4",
        tokens=tokens, hidden=shape.hidden, query_width=shape.query_width, tensor=sharding.tensor,
        experts_per_token=shape.experts_per_token, expert_width=shape.expert_width, expert=sharding.expert,
        score_rows=min(256, tokens) if shape.attention.indexer_layers else 0, context=serving.context,
        requests=ceil(serving.concurrency / sharding.data) * (serving.drafts + 1), vocabulary=shape.vocabulary,
        source="activations in BF16, indexer scores and logits in FP32",
    )  # fmt: skip


def _on_disk(shape: ModelShape, serving: Serving, hardware: Hardware, total: Quantity, capacity: Quantity) -> Quantity:
    """Share of routed experts left on disk when one machine with a disk is too small for all of them."""
    name = "Routed experts on disk"
    routed = tensor_bytes((t for t in shape.tensors if t.storage == "expert" and not t.mtp), serving.dtype)
    missing = total.value - capacity.value
    if not hardware.device.disk_gb_s or hardware.count > 1 or not 0 < missing <= routed:
        return given(name, 0, "")
    return derive(
        name, "", "(total - capacity) / routed_experts", total=total, capacity=capacity, routed_experts=routed
    )
