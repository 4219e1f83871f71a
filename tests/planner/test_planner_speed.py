"""Speed and cost: the roofline written out by hand, its limits, and every published figure within its stated bound."""

from dataclasses import replace
from pathlib import Path

import pytest

from glm5.config import ModelConfig
from glm5.config.glm47 import GLM47Config
from glm5.planner import (
    Serving,
    best_estimate,
    estimate,
    hardware_from,
    plan_serving,
    shape_of,
    sharding_for,
    validation,
)

GLM5 = shape_of(ModelConfig.from_preset("glm-5"), "glm-5")
GLM52 = shape_of(ModelConfig.from_preset("glm-5.2"), "glm-5.2")
ROWS = validation.rows()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_published_figure_within_its_bound(row: validation.Row) -> None:
    assert row.holds, f"{row.what}: predicted {row.predicted:.4g}, published {row.published:.4g}, bound {row.bound}"


def test_most_figures_were_not_used_to_set_anything() -> None:
    speeds = [row for row in ROWS if row.unit in ("tok/s", "ms", "s")]
    assert sum(not row.set_on for row in speeds) > sum(row.set_on for row in speeds)


def test_docs_hold_the_printed_table() -> None:
    docs = Path(__file__).parents[2] / "docs" / "planner.md"
    assert validation.table() in docs.read_text(encoding="utf-8"), "run python -m glm5.planner.validation"


def test_decode_step_by_hand() -> None:
    """GLM-5 in FP8 on 8 H200, 16 requests of 32,768 tokens, tensor parallel."""
    e = estimate(
        GLM5, Serving(context=32_768, concurrency=16), hardware_from("H200x8"), sharding_for(GLM5, 8, tensor=8)
    )
    distinct = 256 * (1 - (248 / 256) ** 16)
    assert e.decode.experts_touched.value == pytest.approx(distinct)
    experts = 75 * distinct * (3 * 6144 * 2048) * (1 + 4 / 128**2) / 8
    cache = 16 * 78 * (2048 * 576 * 2 + 32_768 * 128 * 2)
    rest = e.decode.weight_bytes.value - experts
    copied = 78 * (2048 * 6144 + 576 * 6144 + 8_388_608 + 786_432)  # latent projections, wq_b and wk: on every device
    cut = 78 * (16384 * 2048 + 28672 * 512 + 6144 * 16384) + 75 * 3 * 6144 * 2048 + 3 * 3 * 6144 * 12288
    head_and_router = 2 * 154_880 * 6144 / 8 + 2 * 75 * 256 * 6144
    assert rest == pytest.approx(copied + cut / 8 + head_and_router, rel=0.01)
    assert e.decode.cache_bytes.value == cache
    memory = (e.decode.weight_bytes.value + cache) / (4.8e12 * 0.70)
    assert e.decode.memory_seconds.value == pytest.approx(memory)
    assert e.decode.step_seconds.value == pytest.approx(memory + 78 * 200e-6 + e.decode.communication_seconds.value)
    assert e.decode.aggregate.value == pytest.approx(16 * e.decode.per_request.value)


def test_active_operations_per_token() -> None:
    """One token on one device: two operations per active weight, plus attention over 2,048 keys and the indexer."""
    e = estimate(GLM5, Serving(dtype="int4", context=100_000), hardware_from("MacStudioM3Ultra"), sharding_for(GLM5, 1))
    attention = 78 * 2048 * 64 * 2 * (576 + 512)
    indexer = 78 * 100_000 * 32 * 128 * 2
    active = ModelConfig.from_preset("glm-5").num_parameters(active=True)
    assert e.decode.flops.value == pytest.approx(2 * active + attention + indexer, rel=1e-6)


def test_the_limit_bounds_the_estimate() -> None:
    for name in ("H100x16", "B200x8", "MacStudioM3Ultra", "EPYC9755"):
        decode = best_estimate(GLM5, Serving(dtype="int4"), hardware_from(name)).decode
        assert decode.per_request.value < decode.limit.value


def test_dsa_helps_long_contexts_and_indexshare_more() -> None:
    hardware, one = hardware_from("H200x8"), sharding_for(GLM5, 8, tensor=8)
    for context in (32_768, 202_752):
        load = Serving(context=context, concurrency=8, cache_dtype="fp8")
        sparse, dense = (estimate(s, load, hardware, one) for s in (GLM5, GLM5.without_dsa()))
        shared = estimate(GLM52, load, hardware, one)
        assert shared.decode.step_seconds.value < sparse.decode.step_seconds.value < dense.decode.step_seconds.value
        assert shared.prefill.seconds.value < sparse.prefill.seconds.value
    assert sparse.prefill.seconds.value < dense.prefill.seconds.value
    # The report: DSA cuts the attention work of long sequences by 1.5 to 2 (on tensor-parallel engines).
    core = dense.prefill.attention_seconds.value
    ours = sparse.prefill.attention_seconds.value + sparse.prefill.indexer_seconds.value
    assert 1.5 < core / ours < 2.1


def test_prefill_grows_quadratically_only_without_dsa() -> None:
    hardware, one = hardware_from("H200x8"), sharding_for(GLM5, 8, tensor=8)

    def core(context: int, dense: bool) -> float:
        shape = GLM5.without_dsa() if dense else GLM5
        return estimate(shape, Serving(context=context), hardware, one).prefill.attention_flops.value

    assert core(131_072, True) / core(65_536, True) == pytest.approx(4)
    assert core(131_072, False) / core(65_536, False) == pytest.approx(2, abs=0.05)
    assert core(2048, False) == pytest.approx(78 * 64 * 2 * 1088 * 2048**2 / 2)


def test_speculation_pays_at_batch_one_and_not_when_rejected() -> None:
    hardware = hardware_from("H200x8")

    def rate(concurrency: int, drafts: int, accept: float) -> float:
        load = Serving(context=8192, concurrency=concurrency, drafts=drafts, accept_length=accept)
        return best_estimate(GLM5, load, hardware).decode.aggregate.value

    assert rate(1, 3, 3.48) > 2.5 * rate(1, 0, 1)
    assert rate(1, 3, 1.0) < rate(1, 0, 1)
    assert rate(256, 3, 2.0) / rate(256, 0, 1) < rate(1, 3, 2.0) / rate(1, 0, 1), "the gain shrinks with the batch"


def test_streaming_is_the_disk_bound() -> None:
    disk = hardware_from("CPU24GB")
    load = Serving(dtype="int4", context=1024, mtp=False)
    e = best_estimate(GLM5, load, disk)
    assert e.memory.streams and not e.memory.fits and e.runs
    cold = 75 * 8 * (3 * 6144 * 2048) * 0.5625  # bytes of the chosen experts: 12.7 GB
    assert cold / 1e9 == pytest.approx(12.7, abs=0.05)
    assert e.decode.disk_seconds.value == pytest.approx(cold * e.memory.experts_on_disk.value / 1.7e9)
    assert 0.09 < e.decode.per_request.value < 0.17
    faster = replace(disk, device=replace(disk.device, disk_gb_s=3.4))
    assert best_estimate(GLM5, load, faster).decode.per_request.value == pytest.approx(
        2 * e.decode.per_request.value, rel=0.01
    )


def test_cost_follows_the_price() -> None:
    hardware, load = hardware_from("H200x8"), Serving(context=8192, concurrency=64)
    plan = plan_serving(GLM5, load, hardware, price=3.6)
    e = plan.estimate
    assert e.output_cost.value == pytest.approx(3.6 * 8 / 3600 / e.decode.aggregate.value * 1e6)
    assert e.input_cost.value == pytest.approx(3.6 * 8 / 3600 / e.prefill.throughput.value * 1e6)
    double = plan_serving(GLM5, load, hardware, price=7.2).estimate
    assert double.output_cost.value == pytest.approx(2 * e.output_cost.value)
    assert plan_serving(GLM5, load, hardware, price=0).estimate.output_cost.value == 0


def test_the_predecessor_is_planned_beside_it() -> None:
    load = Serving(context=8192, concurrency=64)
    plan = plan_serving(GLM5, load, hardware_from("H200x8"))
    assert plan.predecessor is not None and plan.predecessor.model == "glm-4.7"
    assert plan.estimate.output_cost.value > plan.predecessor.output_cost.value
    alone = plan_serving(shape_of(GLM47Config(), "glm-4.7"), load, hardware_from("H200x8"))
    assert alone.predecessor is None and alone.without_dsa is None


def test_the_chosen_sharding_is_the_fastest_that_fits() -> None:
    hardware, load = hardware_from("H200x8"), Serving(context=131_072, concurrency=8, cache_dtype="fp8")
    best = best_estimate(GLM5, load, hardware)
    assert best.memory.fits
    for tensor in (1, 2, 4, 8):
        other = estimate(GLM5, load, hardware, sharding_for(GLM5, 8, tensor=tensor))
        assert not other.memory.fits or other.decode.aggregate.value <= best.decode.aggregate.value
