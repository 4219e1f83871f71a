"""Decode speed: a roofline per device, plus the latencies that a roofline does not see.

One step reads every weight it touches once. With `tokens` in the batch and uniform routing a layer touches
`E (1 - (1 - k/E)^tokens)` distinct experts. Attention reads the cache rows of the selected keys (all of them without
DSA) and the indexer's keys of the whole context. Then

    step = max(memory, arithmetic, disk) + layers * latency + communication

Two answers stand beside each other: `limit`, the datasheet alone, and the expected speed with the class's efficiency
and latency. Drafting costs one pass of the MTP layer and the head per drafted token; verification reads the selected
rows of every drafted query again. Left out: sampling, the drafts' own cache reads, imbalance between experts (real
routing touches fewer distinct experts than uniform routing, but loads devices unevenly).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from glm5.planner.hardware import Hardware
from glm5.planner.memory import Memory
from glm5.planner.quantity import Quantity, derive, given
from glm5.planner.serving import Serving, Sharding
from glm5.planner.shape import ModelShape, Tensor
from glm5.planner.weights import byte_shares, parameter_shares


@dataclass(frozen=True)
class Decode:
    """Times of one step and the resulting rates."""

    experts_touched: Quantity
    weight_bytes: Quantity
    draft_bytes: Quantity
    cache_bytes: Quantity
    flops: Quantity
    memory_seconds: Quantity
    compute_seconds: Quantity
    disk_seconds: Quantity
    latency_seconds: Quantity
    communication_seconds: Quantity
    step_seconds: Quantity
    token_seconds: Quantity
    per_request: Quantity
    aggregate: Quantity
    limit: Quantity


def decode(shape: ModelShape, serving: Serving, hardware: Hardware, sharding: Sharding, memory: Memory) -> Decode:
    """Decode at `serving.context` tokens per request, on the fullest device."""
    device = hardware.device
    requests = ceil(serving.concurrency / sharding.data)
    tokens, replica_tokens = serving.concurrency * (serving.drafts + 1), requests * (serving.drafts + 1)
    touched = _experts_touched(shape, tokens)
    step_tensors = [t for t in shape.tensors if not t.mtp and t.part != "embedding" and _runs(shape, t)]
    weight_bytes = _weight_bytes("Weights read per step and device", step_tensors, shape, serving, sharding, touched)
    draft = [t for t in shape.tensors if t.mtp or t.part == "output head"] if serving.drafts else []
    draft_bytes = _weight_bytes("Weights read by drafting, per step and device", draft, shape, serving, sharding,
                                _experts_touched(shape, serving.concurrency), passes=serving.drafts)  # fmt: skip
    cache_bytes = _cache_bytes(shape, serving, sharding, memory, requests)
    flops = _flops(shape, step_tensors, serving, sharding, tokens, replica_tokens)
    memory_seconds = derive(
        "Memory time", "s", "(weights + drafting + cache) / (bandwidth * efficiency)", weights=weight_bytes,
        drafting=draft_bytes, cache=cache_bytes, bandwidth=device.bandwidth_gb_s * 1e9,
        efficiency=device.bandwidth_efficiency, source=f"{device.name}: {device.source}",
    )  # fmt: skip
    peak = device.flops(serving.dtype)
    compute_seconds = derive(
        "Arithmetic time", "s", "flops / (peak * efficiency)", flops=flops, peak=peak,
        efficiency=device.compute_efficiency,
    )  # fmt: skip
    disk_seconds = _disk_seconds(shape, serving, hardware, memory, touched)
    latency = derive(
        "Latency of layers", "s", "(layers + drafts * mtp_layers) * layer_latency", layers=shape.layers,
        drafts=serving.drafts, mtp_layers=shape.mtp_layers, layer_latency=device.layer_seconds,
    )  # fmt: skip
    communication = _communication(shape, serving, hardware, sharding, replica_tokens)
    step = derive(
        "Step", "s", "max(memory, arithmetic, disk) + latency + communication", memory=memory_seconds,
        arithmetic=compute_seconds, disk=disk_seconds, latency=latency, communication=communication,
    )  # fmt: skip
    token = derive("Time per output token", "s", "step / accept_length", step=step, accept_length=serving.accept_length)
    per_request = derive("Decode, one request", "tok/s", "1 / token_time", token_time=token)
    aggregate = derive("Decode, all requests", "tok/s", "concurrency / token_time", token_time=token,
                       concurrency=serving.concurrency)  # fmt: skip
    limit = derive(
        "Datasheet limit, one request", "tok/s",
        "accept_length / max((weights + drafting + cache) / bandwidth, flops / peak, disk)",
        accept_length=serving.accept_length, weights=weight_bytes, drafting=draft_bytes, cache=cache_bytes,
        bandwidth=device.bandwidth_gb_s * 1e9, flops=flops, peak=peak, disk=disk_seconds,
        source="no latency, no communication, full efficiency",
    )  # fmt: skip
    return Decode(
        touched, weight_bytes, draft_bytes, cache_bytes, flops, memory_seconds, compute_seconds, disk_seconds, latency,
        communication, step, token, per_request, aggregate, limit,
    )  # fmt: skip


def _runs(shape: ModelShape, t: Tensor) -> bool:
    """Without DSA the indexer's weights lie idle."""
    return t.part != "indexer" or bool(shape.attention.indexer_layers)


def _experts_touched(shape: ModelShape, tokens: int) -> Quantity:
    return derive(
        "Distinct experts per layer", "experts", "experts * (1 - (1 - chosen / experts) ** tokens)",
        experts=shape.experts, chosen=shape.experts_per_token, tokens=tokens, source="uniform routing",
    )  # fmt: skip


def _weight_bytes(
    name: str, tensors: list[Tensor], shape: ModelShape, serving: Serving, sharding: Sharding, touched: Quantity,
    passes: int = 1,
) -> Quantity:  # fmt: skip
    if not tensors:
        return given(name, 0, "B")
    shares = byte_shares(tensors, serving.dtype)
    return derive(
        name, "B", "passes * (copied + cut_in_replica / tensor + routed_experts * touched / experts / devices)",
        passes=passes, copied=shares.copied, cut_in_replica=shares.tensor, tensor=sharding.tensor,
        routed_experts=shares.all, touched=touched, experts=shape.experts, devices=sharding.devices,
    )  # fmt: skip


def _cache_bytes(shape: ModelShape, serving: Serving, sharding: Sharding, memory: Memory, requests: int) -> Quantity:
    a = shape.attention
    name = "Cache read per step and device"
    head_cut = min(sharding.tensor, a.cache_heads)
    if not a.topk:
        return derive(name, "B", "requests * layers * context * row / head_cut", requests=requests, layers=shape.layers,
                      context=serving.context, row=memory.cache_row, head_cut=head_cut)  # fmt: skip
    return derive(
        name, "B", "requests * (queries * layers * min(topk, context) * row + indexer_layers * context * indexer_key)",
        requests=requests, queries=serving.drafts + 1, layers=shape.layers, topk=a.topk, context=serving.context,
        row=memory.cache_row, indexer_layers=a.indexer_layers, indexer_key=memory.indexer_row,
    )  # fmt: skip


def _flops(
    shape: ModelShape, tensors: list[Tensor], serving: Serving, sharding: Sharding, tokens: int, replica_tokens: int
) -> Quantity:
    shares, a = parameter_shares(tensors), shape.attention
    keys = min(a.topk, serving.context) if a.topk else serving.context
    return derive(
        "Arithmetic per step and device", "FLOP",
        "2 * replica_tokens * (copied + cut_in_replica / tensor) + 2 * tokens * routed * chosen / experts / devices"
        " + replica_tokens * (layers * keys * attention / tensor + indexer_layers * context * indexer)",
        tokens=tokens, replica_tokens=replica_tokens, copied=shares.copied, cut_in_replica=shares.tensor,
        tensor=sharding.tensor, routed=shares.all, chosen=shape.experts_per_token, experts=shape.experts,
        devices=sharding.devices, layers=shape.layers, keys=keys, attention=a.decode_flops,
        indexer_layers=a.indexer_layers, context=serving.context, indexer=a.indexer_flops,
    )  # fmt: skip


def _disk_seconds(
    shape: ModelShape, serving: Serving, hardware: Hardware, memory: Memory, touched: Quantity
) -> Quantity:
    name = "Disk time"
    if not memory.streams:
        return given(name, 0, "s")
    experts = [t for t in shape.tensors if t.storage == "expert" and not t.mtp]
    return derive(
        name, "s", "routed_experts * touched / experts * on_disk / disk_bandwidth",
        routed_experts=byte_shares(experts, serving.dtype).all, touched=touched, experts=shape.experts,
        on_disk=memory.experts_on_disk, disk_bandwidth=hardware.device.disk_gb_s * 1e9,
        source="whole experts read in parallel with the arithmetic; no prediction, uniform routing",
    )  # fmt: skip


def _communication(
    shape: ModelShape, serving: Serving, hardware: Hardware, sharding: Sharding, replica_tokens: int
) -> Quantity:
    """Two collectives per layer: an all-reduce after attention, and one after the experts (or an all-to-all)."""
    name = "Communication"
    if sharding.devices == 1:
        return given(name, 0, "s")
    t, n = sharding.tensor, sharding.devices
    attention_latency, attention_link = hardware.link(t) if t > 1 else (0.0, 1.0)
    expert_latency, expert_link = hardware.link(n)
    row = 2 * shape.hidden  # BF16
    # An all-reduce moves 2 (n-1)/n of its rows; an all-to-all sends a token once per chosen expert and gets it back.
    expert_rows = 2 * (n - 1) / n if sharding.data == 1 else 2 * min(shape.experts_per_token, n - 1) / t
    return derive(
        name, "s",
        "layers * (attention_latency + expert_latency"
        " + tokens * row_bytes * (attention_rows / attention_link + expert_rows / expert_link))",
        layers=shape.layers + serving.drafts * shape.mtp_layers, attention_latency=attention_latency,
        expert_latency=expert_latency, tokens=replica_tokens, row_bytes=row, attention_rows=2 * (t - 1) / t,
        attention_link=attention_link, expert_rows=expert_rows, expert_link=expert_link,
    )  # fmt: skip
