"""Prefill time of one prompt: linear weights, attention, indexer.

Linear weights cost two operations per active weight and token. Core attention costs O(L k) with DSA, O(L^2 / 2)
without. The indexer still looks at all pairs, O(L^2 / 2), but with few narrow heads; engines do not cut it over
tensor-parallel devices, so it runs on each device of a replica. Dense prefill uses the expanded form of MLA, sparse
prefill the absorbed one. A replica works on one prompt at a time; replicas work side by side. Left out: the output
head (one row per prompt), the causal half that a blocked kernel cannot skip, prefix caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from glm5.planner.hardware import Hardware
from glm5.planner.quantity import Quantity, derive
from glm5.planner.serving import Serving, Sharding
from glm5.planner.shape import ModelShape
from glm5.planner.weights import byte_shares


@dataclass(frozen=True)
class Prefill:
    """Operations and times for one prompt of `Serving.context` tokens, without a prefix cache."""

    linear_flops: Quantity
    attention_flops: Quantity
    indexer_flops: Quantity
    linear_seconds: Quantity
    attention_seconds: Quantity
    indexer_seconds: Quantity
    overhead_seconds: Quantity
    seconds: Quantity
    throughput: Quantity


def prefill(shape: ModelShape, serving: Serving, hardware: Hardware, sharding: Sharding) -> Prefill:
    """Prefill of one prompt by one attention replica, all replicas busy."""
    device, a = hardware.device, shape.attention
    length, layers = serving.context, shape.layers
    active = [t for t in shape.tensors if t.part not in ("embedding", "output head") and not t.mtp]
    if not a.indexer_layers:
        active = [t for t in active if t.part != "indexer"]
    weights = sum(
        t.parameters * shape.experts_per_token / shape.experts if t.storage == "expert" else t.parameters
        for t in active
    )
    linear = derive("Linear operations", "FLOP", "2 * active * length", active=weights, length=length)
    if a.topk:
        attention = derive(
            "Attention operations (DSA)", "FLOP", "layers * per_pair * (keys * length - keys * keys / 2)",
            layers=layers, per_pair=a.decode_flops, keys=min(a.topk, length), length=length,
        )  # fmt: skip
    else:
        attention = derive("Attention operations (dense)", "FLOP", "layers * per_pair * length * length / 2",
                           layers=layers, per_pair=a.dense_flops, length=length)  # fmt: skip
    indexer = derive("Indexer operations", "FLOP", "indexer_layers * per_pair * length * length / 2",
                     indexer_layers=a.indexer_layers, per_pair=a.indexer_flops, length=length)  # fmt: skip

    chunks = ceil(length / serving.chunk)
    shares = byte_shares(active, serving.dtype)
    step_bytes = derive(
        "Weights per device", "B", "copied + cut_in_replica / tensor + routed / devices", copied=shares.copied,
        cut_in_replica=shares.tensor, tensor=sharding.tensor, routed=shares.all, devices=sharding.devices,
    )  # fmt: skip
    linear_seconds = derive(
        "Linear time", "s",
        "max(data * linear / (devices * peak * efficiency),"
        " chunks * weight_bytes / (bandwidth * bandwidth_efficiency))",
        data=sharding.data, linear=linear, devices=sharding.devices, peak=device.flops(serving.dtype),
        efficiency=device.compute_efficiency, chunks=chunks, weight_bytes=step_bytes,
        bandwidth=device.bandwidth_gb_s * 1e9, bandwidth_efficiency=device.bandwidth_efficiency,
        source="arithmetic, or reading every weight once per chunk",
    )  # fmt: skip
    attention_seconds = derive(
        "Attention time", "s", "attention / (tensor * peak * efficiency)", attention=attention, tensor=sharding.tensor,
        peak=device.bf16_tflops * 1e12, efficiency=device.attention_efficiency,
    )  # fmt: skip
    indexer_seconds = derive("Indexer time", "s", "indexer / (peak * efficiency)", indexer=indexer,
                             peak=device.flops(serving.dtype), efficiency=device.attention_efficiency,
                             source="not cut over tensor-parallel devices")  # fmt: skip
    latency, link = hardware.link(sharding.devices) if sharding.devices > 1 else (0.0, 1.0)
    overhead = derive(
        "Latency and communication", "s",
        "layers * (chunks * (layer_latency + 2 * latency) + 2 * length * row_bytes * rows / link)", layers=layers,
        chunks=chunks, layer_latency=device.layer_seconds, latency=latency, length=length, row_bytes=2 * shape.hidden,
        rows=2 * (sharding.devices - 1) / sharding.devices, link=link,
    )  # fmt: skip
    seconds = derive("Prefill of one prompt", "s", "linear + attention + indexer + overhead", linear=linear_seconds,
                     attention=attention_seconds, indexer=indexer_seconds, overhead=overhead)  # fmt: skip
    throughput = derive("Prefill, all replicas", "tok/s", "data * length / seconds", data=sharding.data, length=length,
                        seconds=seconds)  # fmt: skip
    return Prefill(linear, attention, indexer, linear_seconds, attention_seconds, indexer_seconds, overhead, seconds,
                   throughput)  # fmt: skip
