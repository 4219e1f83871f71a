"""Machines: a table of real ones, `H100x8` as text, and a JSON file for others.

Every number of the table is a datasheet value (vendor's public sheet, dense rates without structured sparsity) unless
its `source` says otherwise. Memory counts as sheets do, in decimal GB, although most cards hold slightly more. Prices
are round public cloud list prices of 2026 for one device; they are assumptions to override, not facts.

The efficiency of a class is how much of the sheet a served model of this kind was seen to reach; `CLASSES` gives each
figure with its reason. `glm5.planner.validation` shows what they predict and which figures they were set on.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm5.errors import InputError, did_you_mean


@dataclass(frozen=True)
class HardwareClass:
    """How far from its datasheet a class of machines serves a sparse mixture of experts."""

    bandwidth_efficiency: float
    compute_efficiency: float
    """Of dense FLOPs, for the linear weights in prefill, as served: scheduling and chunking included."""
    attention_efficiency: float
    """Of dense FLOPs, for attention and indexer, which are few large kernels."""
    layer_seconds: float
    """Launches, routing and dependencies of one layer that no roofline sees; dominates at batch 1."""
    why: str


CLASSES: dict[str, HardwareClass] = {
    "datacenter": HardwareClass(
        0.70, 0.12, 0.50, 200e-6,
        "70% of HBM bandwidth is usual for decode kernels; 200 us per layer is set on SGLang's 20.2 ms per token on "
        "8xB200 at batch 1; 12% of dense FLOPs in prefill lies between the 6% behind vLLM's time to first token on "
        "8xH200 and the quarter that tuned deployments of DeepSeek-V3 report; FlashMLA reports up to 65% of dense "
        "FLOPs in sparse prefill",
    ),
    "consumer": HardwareClass(0.70, 0.12, 0.40, 200e-6, "as datacenter cards, with smaller matrices on each card"),
    "unified": HardwareClass(
        0.75, 0.50, 0.40, 200e-6,
        "set on a Mac Studio M3 Ultra at 4.5 bits per weight: 17.3 tok/s decode, 194 tok/s prefill",
    ),
    "cpu": HardwareClass(
        0.50, 0.50, 0.25, 100e-6,
        "set on ik_llama.cpp on a Ryzen 3995WX: 3.8 tok/s decode and 35 tok/s prefill with 4-bit weights",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator, or one computer when its memory is shared by everything."""

    name: str
    kind: str
    """A key of `CLASSES`."""
    memory_gb: float
    bandwidth_gb_s: float
    bf16_tflops: float
    fp8_tflops: float = 0.0
    """0: no FP8 arithmetic; FP8 weights are widened to BF16 on the fly."""
    link_gb_s: float = 0.0
    """To the other devices of its node, one direction, one device."""
    link_latency_us: float = 10.0
    """One collective inside a node."""
    node_devices: int = 1
    network_gb_s: float = 0.0
    """To other nodes, per device. 0: cannot be joined."""
    network_latency_us: float = 30.0
    disk_gb_s: float = 0.0
    """Sequential reads of NVMe; 0: weights are not streamed."""
    price_per_hour: float = 0.0
    """Dollars; 0: not rented by the hour."""
    bandwidth_efficiency: float = 0.0
    """0: that of the class; so for the next three."""
    compute_efficiency: float = 0.0
    attention_efficiency: float = 0.0
    layer_seconds: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in CLASSES:
            known = ", ".join(CLASSES)
            raise InputError(f"Device kind {self.kind!r} is not one of {known}.{did_you_mean(self.kind, CLASSES)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("name", "kind", "source"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise InputError(f"{field.name} of device {self.name!r} is {value!r}; give a number of at least 0.")
        for name in ("memory_gb", "bandwidth_gb_s", "bf16_tflops", "node_devices"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} of device {self.name!r} is {getattr(self, name)!r}; it must be above 0.")
        if not isinstance(self.node_devices, int):
            raise InputError(f"node_devices of device {self.name!r} is {self.node_devices}; give a whole number.")
        for name in ("bandwidth_efficiency", "compute_efficiency", "attention_efficiency"):
            if getattr(self, name) > 1:
                raise InputError(f"{name} of device {self.name!r} is {getattr(self, name)}; it is a share, at most 1.")
        for name in ("bandwidth_efficiency", "compute_efficiency", "attention_efficiency", "layer_seconds"):
            if not getattr(self, name):
                object.__setattr__(self, name, getattr(CLASSES[self.kind], name))

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s for weights of `dtype` (int4 weights are widened to BF16)."""
        return 1e12 * (self.fp8_tflops if dtype == "fp8" and self.fp8_tflops else self.bf16_tflops)


_SHEET = "datasheet"
DEVICES: tuple[Device, ...] = (
    Device(name="H100", kind="datacenter", memory_gb=80, bandwidth_gb_s=3350, bf16_tflops=989, fp8_tflops=1979,
           link_gb_s=450, link_latency_us=20, node_devices=8, network_gb_s=50, price_per_hour=2.5,
           source=f"{_SHEET}: NVIDIA H100 SXM5 (NVLink 4, 400 Gb/s InfiniBand per GPU)"),
    Device(name="H200", kind="datacenter", memory_gb=141, bandwidth_gb_s=4800, bf16_tflops=989, fp8_tflops=1979,
           link_gb_s=450, link_latency_us=20, node_devices=8, network_gb_s=50, price_per_hour=3.0,
           source=f"{_SHEET}: NVIDIA H200 SXM"),
    Device(name="B200", kind="datacenter", memory_gb=180, bandwidth_gb_s=8000, bf16_tflops=2250, fp8_tflops=4500,
           link_gb_s=900, link_latency_us=20, node_devices=8, network_gb_s=50, price_per_hour=4.5,
           source=f"{_SHEET}: NVIDIA HGX/DGX B200 (1,440 GB for 8; the chip carries 192 GB)"),
    Device(name="MI300X", kind="datacenter", memory_gb=192, bandwidth_gb_s=5300, bf16_tflops=1307, fp8_tflops=2615,
           link_gb_s=448, link_latency_us=25, node_devices=8, network_gb_s=50, price_per_hour=2.5,
           source=f"{_SHEET}: AMD Instinct MI300X (7 Infinity Fabric links of 64 GB/s each way)"),
    Device(name="Ascend910C", kind="datacenter", memory_gb=128, bandwidth_gb_s=3200, bf16_tflops=780,
           link_gb_s=196, link_latency_us=25, node_devices=16, network_gb_s=25, price_per_hour=2.0,
           source="public reports of Huawei's Atlas 800T/900 A3 (no official sheet); INT8 but no FP8 arithmetic"),
    Device(name="RTX5090", kind="consumer", memory_gb=32, bandwidth_gb_s=1792, bf16_tflops=209.5, fp8_tflops=419,
           link_gb_s=50, link_latency_us=30, node_devices=8, network_gb_s=12.5, price_per_hour=0.6,
           source=f"{_SHEET}: NVIDIA RTX Blackwell (PCIe 5 x16 through the host)"),
    Device(name="DGXSpark", kind="unified", memory_gb=128, bandwidth_gb_s=273, bf16_tflops=125, fp8_tflops=250,
           node_devices=1, network_gb_s=25, network_latency_us=30, disk_gb_s=6,
           compute_efficiency=0.1,
           source=f"{_SHEET}: NVIDIA DGX Spark (GB10, 1 PFLOP FP4 sparse, 200 Gb/s ConnectX-7); efficiency in prefill "
                  "set on 512 tok/s with four of them"),
    Device(name="MacStudioM3Ultra", kind="unified", memory_gb=512, bandwidth_gb_s=819, bf16_tflops=28.4,
           node_devices=1, network_gb_s=10, network_latency_us=60, disk_gb_s=6,
           source=f"{_SHEET}: Apple M3 Ultra, 80 GPU cores (arithmetic rate from public measurements)"),
    Device(name="EPYC9755", kind="cpu", memory_gb=1152, bandwidth_gb_s=576, bf16_tflops=44, node_devices=1,
           network_gb_s=12.5, network_latency_us=30, disk_gb_s=12, price_per_hour=3.0,
           source=f"{_SHEET}: AMD EPYC 9755, one socket, 12 x 96 GB DDR5-6000; 44 TFLOP/s from 128 cores x 2.7 GHz x "
                  "128 BF16 operations a cycle; one PCIe 5 NVMe disk"),
    Device(name="CPU24GB", kind="cpu", memory_gb=24.7, bandwidth_gb_s=35, bf16_tflops=0.81, node_devices=1,
           disk_gb_s=1.7, bandwidth_efficiency=0.9,
           source="measured: 2 virtual cores, 23 GiB; memory 33-37 GB/s, disk 1.2-2.2 GB/s (the middle is used)"),
)  # fmt: skip

_BY_NAME = {device.name.lower(): device for device in DEVICES}


@dataclass(frozen=True)
class Hardware:
    """`count` equal devices, in nodes of `device.node_devices`."""

    device: Device
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"{self.device.name}x{self.count} has no devices; give a count of at least 1.")
        if self.count > 1 and self.device.node_devices > 1 and not self.device.link_gb_s:
            raise InputError(f"{self.device.name}x{self.count} needs the link_gb_s between the devices of a node.")
        if self.count > self.device.node_devices and not self.device.network_gb_s:
            raise InputError(
                f"{self.device.name}x{self.count} spans nodes, but {self.device.name} has no network_gb_s."
            )

    @property
    def name(self) -> str:
        """As it is written: `H100x8`."""
        return f"{self.device.name}x{self.count}"

    def link(self, group: int) -> tuple[float, float]:
        """(seconds per collective, bytes per second and device) for a group of `group` devices."""
        d = self.device
        if group <= d.node_devices:
            return d.link_latency_us * 1e-6, d.link_gb_s * 1e9
        return d.network_latency_us * 1e-6, d.network_gb_s * 1e9


def hardware_from(text: str) -> Hardware:
    """`"H100x8"`, `"H100"` (one), or the path of a `.json` file with the fields of `Device` and `count`."""
    if text.endswith(".json"):
        return _from_file(Path(text))
    match = re.fullmatch(r"(?i)(.+?)(?:\s*[x*]\s*(-?\d+))?", text.strip())
    name = match[1].replace(" ", "").replace("-", "") if match else text
    device = _BY_NAME.get(name.lower())
    if device is None:
        near = did_you_mean(name.lower(), _BY_NAME)
        near = near.replace(near.split("'")[1], _BY_NAME[near.split("'")[1]].name) if near else ""
        known = ", ".join(d.name for d in DEVICES)
        raise InputError(f"There is no hardware {text!r}; known: {known}, each with xN, or a .json file.{near}")
    return Hardware(device, int(match[2]) if match and match[2] else 1)


def _from_file(path: Path) -> Hardware:
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give a hardware file, or a name such as H100x8.") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not readable JSON ({error}); write one object with the fields of a device."
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}; write one object with the fields of a device.")
    count = values.pop("count", 1)
    known = {field.name: field for field in dataclasses.fields(Device)}
    for name in values:
        if name not in known:
            raise InputError(f"{path}: a device has no field {name!r}.{did_you_mean(name, known)}")
    missing = [n for n, field in known.items() if field.default is dataclasses.MISSING and n not in values]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; add them (GB, GB/s and TFLOP/s as numbers).")
    if isinstance(count, bool) or not isinstance(count, int):
        raise InputError(f"{path}: count is {count!r}; give a whole number of devices.")
    return Hardware(Device(**values), count)
