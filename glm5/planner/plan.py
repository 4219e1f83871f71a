"""A serving plan: memory, speed and cost of one model on one set of machines, with the alternatives beside it.

Data first: `ServingPlan` holds quantities only; `glm5.planner.report` prints them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from glm5.config.glm47 import GLM47Config
from glm5.errors import InputError
from glm5.planner.decode import Decode, decode
from glm5.planner.hardware import DEVICES, Device, Hardware
from glm5.planner.memory import Memory, memory
from glm5.planner.prefill import Prefill, prefill
from glm5.planner.quantity import Quantity, derive
from glm5.planner.serving import Serving, Sharding, sharding_for, shardings
from glm5.planner.shape import ModelShape, shape_of

_COUNTS = tuple(2**power for power in range(10))


@dataclass(frozen=True)
class Estimate:
    """One model on one set of machines under one sharding."""

    model: str
    hardware: Hardware
    sharding: Sharding
    memory: Memory
    decode: Decode
    prefill: Prefill
    input_cost: Quantity
    output_cost: Quantity

    @property
    def runs(self) -> bool:
        """Whether it fits, or at least runs from disk."""
        return self.memory.fits or self.memory.streams


@dataclass(frozen=True)
class Option:
    """The smallest set of one device that holds the model, or none up to 512."""

    device: str
    devices: int
    sharding: Sharding | None
    device_total: Quantity | None
    per_request: Quantity | None
    output_cost: Quantity | None
    streams: bool = False
    """Nothing fits, but one machine runs it with experts from disk."""


@dataclass(frozen=True)
class ServingPlan:
    """What `glm5 plan` answers."""

    model: str
    parameters: int
    active_parameters: int
    serving: Serving
    estimate: Estimate
    without_dsa: Estimate | None
    smallest: tuple[Option, ...]
    predecessor: Estimate | None
    """GLM-4.7 on the same machines at the same load, for the price of a token."""


def plan_serving(
    shape: ModelShape,
    serving: Serving,
    hardware: Hardware,
    *,
    tensor: int = 0,
    expert: int = 0,
    price: float | None = None,
) -> ServingPlan:
    """Plans `serving`; raises `InputError` for a load, sharding or price that is impossible.

    tensor, expert: parallel sizes (0: the fastest that fits). price: dollars per device-hour (None: the table's).
    """
    serving.check(shape)
    if price is not None and not 0 <= price < float("inf"):
        raise InputError(f"The price per device-hour is {price}; give a number of dollars of at least 0.")
    best = best_estimate(shape, serving, hardware, tensor=tensor, expert=expert, price=price)
    dense = estimate(shape.without_dsa(), serving, hardware, best.sharding, price) if shape.attention.topk else None
    old = shape_of(GLM47Config(), "glm-4.7")
    predecessor = None
    if shape.name != old.name and serving.context <= old.positions:
        predecessor = best_estimate(old, serving, hardware, price=price)
    return ServingPlan(
        shape.name, shape.parameters(), shape.active_parameters(), serving, best, dense, smallest_sets(shape, serving),
        predecessor,
    )  # fmt: skip


def best_estimate(
    shape: ModelShape,
    serving: Serving,
    hardware: Hardware,
    *,
    tensor: int = 0,
    expert: int = 0,
    price: float | None = None,
) -> Estimate:
    """The sharding asked for, or else the fastest one that fits (the leanest when none does)."""
    if tensor:
        chosen = [sharding_for(shape, hardware.count, tensor=tensor, expert=expert)]
    else:
        chosen = list(shardings(shape, hardware.count, expert=expert))
    estimates = [estimate(shape, serving, hardware, sharding, price) for sharding in chosen]
    running = [e for e in estimates if e.runs]
    if running:
        return max(running, key=lambda e: e.decode.aggregate.value)
    return min(estimates, key=lambda e: e.memory.device_total.value)


def estimate(
    shape: ModelShape, serving: Serving, hardware: Hardware, sharding: Sharding, price: float | None = None
) -> Estimate:
    """Memory, speed and cost under exactly this sharding."""
    held = memory(shape, serving, hardware, sharding)
    speed = decode(shape, serving, hardware, sharding, held)
    start = prefill(shape, serving, hardware, sharding)
    hourly = hardware.device.price_per_hour if price is None else price
    costs = [
        derive(f"{name}, per million tokens", "$", "price * devices / 3600 / rate * 10 ** 6", price=hourly,
               devices=hardware.count, rate=rate, source=source)
        for name, rate, source in (("Input", start.throughput, "machines that only prefill, no prefix cache"),
                                   ("Output", speed.aggregate, "machines that only decode, at this concurrency"))
    ]  # fmt: skip
    return Estimate(shape.name, hardware, sharding, held, speed, start, costs[0], costs[1])


def smallest_sets(shape: ModelShape, serving: Serving) -> tuple[Option, ...]:
    """For every device of the table the smallest power of two that holds model, cache and reserve.

    Where none does, one machine that streams experts from its disk, with prefill chunks of at most 1,024 tokens.
    """
    return tuple(_smallest(shape, serving, device) for device in DEVICES)


def _smallest(shape: ModelShape, serving: Serving, device: Device) -> Option:
    for count in _COUNTS:
        if count > device.node_devices and not device.network_gb_s:
            break
        fitting = [s for s in shardings(shape, count) if memory(shape, serving, Hardware(device, count), s).fits]
        if fitting:
            estimates = [estimate(shape, serving, Hardware(device, count), s) for s in fitting]
            return _option(max(estimates, key=lambda e: e.decode.aggregate.value))
    alone = best_estimate(shape, replace(serving, chunk=min(serving.chunk, 1024)), Hardware(device, 1))
    return _option(alone) if alone.memory.streams else Option(device.name, 0, None, None, None, None)


def _option(e: Estimate) -> Option:
    return Option(e.hardware.device.name, e.hardware.count, e.sharding, e.memory.device_total, e.decode.per_request,
                  e.output_cost, e.memory.streams)  # fmt: skip
