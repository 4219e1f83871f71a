"""What is served and how it is cut over devices: the request side of a serving plan.

Sharding rules (as vLLM and SGLang run GLM-5). Attention has `data` replicas of `tensor` devices each. Inside a replica
heads, shared experts, dense MLP and both vocabulary tables are cut; the low-rank down projections, the indexer, the
router and the norms are copied. The latent cache is one head for all query heads, so every device of a replica holds
all of it; `data` > 1 gives each replica only its own requests. Routed experts are cut over all devices, in `expert`
groups. Pipeline and context parallelism are left out of serving.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from glm5.errors import InputError
from glm5.planner.shape import ModelShape
from glm5.planner.weights import CacheDtype, check_dtype


@dataclass(frozen=True, kw_only=True)
class Serving:
    """One steady load: `concurrency` requests, each with `context` tokens in the cache."""

    dtype: str = "fp8"
    cache_dtype: str = "bf16"
    context: int = 32_768
    concurrency: int = 1
    mtp: bool = True
    """Keep the MTP layer and its cache row in memory."""
    drafts: int = 0
    """Speculative tokens per step (0: off)."""
    accept_length: float = 1.0
    """Tokens that a step yields on average, the verified one included."""
    chunk: int = 8192
    """Prompt tokens per prefill step."""

    def check(self, shape: ModelShape) -> None:
        """Raises `InputError` for a load that `shape` cannot serve."""
        check_dtype(self.dtype)
        check_dtype(self.cache_dtype, CacheDtype, "cache dtype")
        for name in ("context", "concurrency", "chunk"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.context > shape.positions:
            raise InputError(
                f"context {self.context:,} is beyond the {shape.positions:,} positions of {shape.name}; lower it"
                + (", or plan for glm-5.2, which has 1,048,576." if shape.positions < 1_048_576 else ".")
            )
        if self.drafts < 0:
            raise InputError(f"drafts is {self.drafts}; it must be at least 0.")
        if self.drafts and not (shape.mtp_layers and self.mtp):
            raise InputError(f"drafts is {self.drafts}, but the plan has no MTP layer; set drafts to 0 or keep MTP.")
        if not 1 <= self.accept_length <= self.drafts + 1:
            raise InputError(
                f"accept_length is {self.accept_length:g}; with {self.drafts} draft(s) it lies between 1 and "
                f"{self.drafts + 1}."
            )


@dataclass(frozen=True)
class Sharding:
    """`data` attention replicas of `tensor` devices; routed experts over `expert` groups of all devices."""

    tensor: int
    data: int
    expert: int

    @property
    def devices(self) -> int:
        """All of them."""
        return self.tensor * self.data

    @property
    def text(self) -> str:
        """As engines write it: `TP8 DP1 EP8`."""
        return f"TP{self.tensor} DP{self.data} EP{self.expert}"

    def check(self, shape: ModelShape) -> None:
        """Raises `InputError` when heads or experts do not divide."""
        if min(self.tensor, self.data, self.expert) < 1:
            raise InputError(f"{self.text} has a size below 1; every size must be at least 1.")
        if shape.heads % self.tensor:
            raise InputError(f"{shape.heads} heads do not divide over {self.tensor} tensor-parallel devices.")
        if self.expert > shape.experts:
            raise InputError(
                f"expert parallelism of {self.expert} leaves devices without experts: {shape.name} has "
                f"{shape.experts} a layer; use at most that."
            )
        if shape.experts % self.expert:
            raise InputError(f"{shape.experts} experts do not divide over {self.expert} expert-parallel groups.")
        if self.devices % self.expert:
            raise InputError(f"{self.devices} devices do not divide into {self.expert} expert-parallel groups.")


def sharding_for(shape: ModelShape, devices: int, *, tensor: int = 0, expert: int = 0) -> Sharding:
    """The sharding of `devices` with the sizes given; an `expert` of 0 is the largest that divides."""
    if tensor < 0 or expert < 0:
        raise InputError("Parallel sizes are at least 1 (0: chosen for you).")
    if tensor and devices % tensor:
        raise InputError(f"{devices} device(s) do not divide into replicas of {tensor} tensor-parallel devices.")
    size = tensor or gcd(devices, shape.heads)
    sharding = Sharding(size, devices // size, expert or gcd(devices, shape.experts))
    sharding.check(shape)
    return sharding


def shardings(shape: ModelShape, devices: int, *, expert: int = 0) -> Iterator[Sharding]:
    """Every legal split of `devices` into replicas, the widest tensor parallelism first."""
    for tensor in range(devices, 0, -1):
        if devices % tensor == 0 and shape.heads % tensor == 0:
            yield sharding_for(shape, devices, tensor=tensor, expert=expert)
