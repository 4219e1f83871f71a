"""Sizes: identities of the published model, and another way to count the same bytes."""

from math import ceil

import pytest

from glm5.config import ModelConfig, count_parameters
from glm5.config.glm47 import GLM47Config
from glm5.planner import Serving, estimate, hardware_from, shape_of, sharding_for, smallest_sets
from glm5.planner.memory import cache_per_token
from glm5.planner.weights import tensor_bytes

GLM5 = shape_of(ModelConfig.from_preset("glm-5"), "glm-5")
GLM52 = shape_of(ModelConfig.from_preset("glm-5.2"), "glm-5.2")
GLM47 = shape_of(GLM47Config(), "glm-4.7")


@pytest.mark.parametrize("preset", ["glm-5", "glm-5.2", "nano", "micro", "mini"])
@pytest.mark.parametrize("mtp", [False, True])
def test_tensor_list_equals_the_closed_form(preset: str, mtp: bool) -> None:
    config = ModelConfig.from_preset(preset)
    shape = shape_of(config, preset)
    assert shape.parameters(mtp=mtp) == config.num_parameters(mtp=mtp)
    assert shape.active_parameters(mtp=mtp) == config.num_parameters(mtp=mtp, active=True)


def test_parts_equal_the_closed_form() -> None:
    counts = count_parameters(ModelConfig.from_preset("glm-5"))
    parts: dict[str, int] = {}
    for t in GLM5.tensors:
        if not t.mtp:
            parts[t.part] = parts.get(t.part, 0) + t.parameters
    assert parts["attention"] == 78 * counts.attention_layer == 78 * 165_022_208
    assert parts["indexer"] == 78 * counts.indexer_layer == 78 * 9_371_904
    assert parts["dense MLP"] == 3 * counts.dense_mlp_layer
    assert parts["routed experts"] == 75 * 256 * counts.expert
    assert parts["router"] == 75 * counts.router_layer
    assert sum(parts.values()) == 743_911_218_432


def test_glm47_is_355b_with_32b_active() -> None:
    config = GLM47Config()
    assert config.num_parameters() == GLM47.parameters() == 352_797_829_024
    assert config.num_parameters() / 355e9 == pytest.approx(1, abs=0.01)
    assert config.num_parameters(active=True) == GLM47.active_parameters()
    assert config.num_parameters(active=True) / 32e9 == pytest.approx(1, abs=0.03)
    # The Hugging Face page counts the MTP layer with its copies of both vocabulary tables: 358B.
    copies = 2 * config.vocab_size * config.hidden_size
    assert round((config.num_parameters(mtp=True) + copies) / 1e9) == 358
    assert config.num_parameters(mtp=True, active=True) == GLM47.active_parameters(mtp=True)


def test_bf16_and_fp8_sizes() -> None:
    trunk = [t for t in GLM5.tensors if not t.mtp]
    assert tensor_bytes(trunk, "bf16") == 2 * 743_911_218_432 + 2 * 75 * 256  # the router bias is FP32
    assert tensor_bytes(trunk, "bf16") / 1e9 == pytest.approx(1490, rel=0.005)
    assert tensor_bytes(GLM5.tensors, "bf16") / 1e9 == pytest.approx(1507.7, abs=0.1)
    assert tensor_bytes(GLM5.tensors, "fp8") / 1e9 == pytest.approx(756, abs=0.5)
    assert tensor_bytes(GLM5.tensors, "int4") / 1e9 == pytest.approx(405, rel=0.08)


def test_fp8_layer_by_hand() -> None:
    """One sparse layer, tensor by tensor, as section 5.3 of the facts lists the formats."""

    def fp8(rows: int, columns: int) -> int:
        return rows * columns + 4 * ceil(rows / 128) * ceil(columns / 128)

    d, inner = 6144, 2048
    attention = fp8(2048, d) + fp8(16384, 2048) + fp8(576, d) + fp8(28672, 512) + fp8(d, 16384) + 2 * (2048 + 512)
    indexer = fp8(4096, 2048) + fp8(128, d) + 2 * (32 * d + 2 * 128)
    mlp = 257 * (2 * fp8(inner, d) + fp8(d, inner)) + 2 * 256 * d + 4 * 256
    shape = shape_of(ModelConfig.from_preset("glm-5"), "glm-5")
    per_layer = {"attention": 78, "indexer": 78, "router": 75, "shared experts": 75, "routed experts": 75}
    ours = sum(
        tensor_bytes([t for t in shape.tensors if t.part == part and not t.mtp], "fp8") / layers
        for part, layers in per_layer.items()
    )
    assert ours == attention + indexer + mlp


def test_fp8_counts_partial_blocks() -> None:
    nano = shape_of(ModelConfig.from_preset("nano"), "nano")
    kv_a = next(t for t in nano.tensors if t.name == "kv_a_proj_with_mqa")
    assert (kv_a.rows, kv_a.columns) == (80, 128)
    assert tensor_bytes([kv_a], "fp8") == kv_a.copies * (80 * 128 + 4)


def test_cache_per_token() -> None:
    latents = 576 * 2 * 78
    assert latents == 89_856
    assert cache_per_token(GLM5, "bf16", mtp=False).value == latents + 128 * 2 * 78
    # With the MTP row, as the inference notes count it, and the MTP layer's own indexer key beside it.
    assert cache_per_token(GLM5, "bf16", mtp=True).value == (576 * 79 + 128 * 78) * 2 + 256
    assert cache_per_token(GLM5, "fp8", mtp=False).value == 78 * (512 + 4 * 4 + 2 * 64) + 78 * 132
    assert 78 * 132 == 10_296
    # IndexShare: only 21 layers keep indexer keys; 19.5 GB at 202,752 tokens.
    assert cache_per_token(GLM52, "bf16", mtp=False).value == latents + 128 * 2 * 21
    assert cache_per_token(GLM47, "bf16", mtp=False).value == 92 * 2 * 8 * 128 * 2
    at_200k = cache_per_token(GLM5, "bf16", mtp=True).value * 202_752
    assert at_200k / 1e9 == pytest.approx(22.5, abs=0.06)
    assert cache_per_token(GLM52, "bf16", mtp=True).value * 202_752 / 1e9 == pytest.approx(19.5, abs=0.2)


def test_sharding_cuts_what_it_says() -> None:
    load = Serving(dtype="fp8", context=65_536, concurrency=8)
    hardware = hardware_from("H200x8")
    tensor = estimate(GLM5, load, hardware, sharding_for(GLM5, 8, tensor=8)).memory
    data = estimate(GLM5, load, hardware, sharding_for(GLM5, 8, tensor=1)).memory
    assert tensor.device_cache.value == tensor.cache.value, "latents are whole on every tensor-parallel device"
    assert data.device_cache.value == data.cache.value / 8
    assert data.device_weights.value > tensor.device_weights.value > tensor.weights.value / 8
    old = estimate(GLM47, load, hardware, sharding_for(GLM47, 8, tensor=8)).memory
    assert old.device_cache.value == old.cache.value / 8, "key heads of grouped queries can be cut"


def test_room_is_the_largest_concurrency_that_fits() -> None:
    hardware, sharding = hardware_from("H200x8"), sharding_for(GLM5, 8, tensor=8)
    room = int(estimate(GLM5, Serving(context=8192), hardware, sharding).memory.room.value)
    assert estimate(GLM5, Serving(context=8192, concurrency=room - 5), hardware, sharding).memory.fits
    assert not estimate(GLM5, Serving(context=8192, concurrency=room + 5), hardware, sharding).memory.fits


@pytest.mark.parametrize(
    ("dtype", "counts"),
    [
        ("fp8", {"H100": 16, "H200": 8, "B200": 8, "MI300X": 8}),
        ("bf16", {"H100": 32, "H200": 16, "B200": 16, "EPYC9755": 2}),
        ("int4", {"H100": 8, "H200": 4, "B200": 4, "MacStudioM3Ultra": 1, "DGXSpark": 4, "RTX5090": 32}),
    ],
)
def test_smallest_sets(dtype: str, counts: dict[str, int]) -> None:
    found = {o.device: o.devices for o in smallest_sets(GLM5, Serving(dtype=dtype, context=8192))}
    assert {device: found[device] for device in counts} == counts


def test_a_small_machine_streams_experts_from_disk() -> None:
    options = {o.device: o for o in smallest_sets(GLM5, Serving(dtype="int4", context=8192, mtp=False))}
    assert options["CPU24GB"].streams and options["CPU24GB"].devices == 1
    assert not options["MacStudioM3Ultra"].streams
    whole = {o.device: o for o in smallest_sets(GLM5, Serving(dtype="bf16", context=8192, mtp=False))}
    assert whole["CPU24GB"].devices == 0, "in BF16 not even the dense part fits"
