"""Training memory: the byte rules by hand, what each kind of parallelism cuts, and the published recipe."""

from dataclasses import replace

import pytest

from glm5.config import ModelConfig, count_parameters
from glm5.planner import TrainingMemory, TrainingPlan, hardware_from, training_memory

NANO = ModelConfig.from_preset("nano")
GLM5 = ModelConfig.from_preset("glm-5")


def plan(config: ModelConfig, **sizes: object) -> TrainingMemory:
    parallel = TrainingPlan(**sizes)  # type: ignore[arg-type]
    return training_memory(config, parallel, hardware_from(f"H200x{parallel.devices}"))


def test_one_device_by_hand() -> None:
    trainable = NANO.num_parameters(mtp=True) - 4 * 16  # four routers (three layers and MTP) of 16 experts: no gradient
    adamw = plan(NANO, optimizer="adamw", shard="none")
    assert adamw.weights.value == 2 * trainable
    assert adamw.gradients.value == 4 * trainable
    assert adamw.optimizer.value == 12 * trainable
    assert adamw.gathered.value == 0
    muon = plan(NANO, optimizer="muon", shard="none")
    counts = count_parameters(NANO)
    layers, hidden = 4, 128
    vectors = (layers + 1) * (NANO.q_lora_rank + NANO.kv_lora_rank + 2 * NANO.index_head_dim)
    vectors += (2 * layers + 1) * hidden + 5 * hidden
    assert muon.optimizer.value == 8 * trainable + 4 * (2 * counts.embedding + vectors)


def test_sharding_levels() -> None:
    sizes = {"data_shard": 8, "expert": 8}
    none, optimizer, gradients, full = (
        plan(NANO, shard=shard, **sizes) for shard in ("none", "optimizer", "gradients", "full")
    )
    assert none.weights.value == optimizer.weights.value == gradients.weights.value > full.weights.value
    assert none.gradients.value == optimizer.gradients.value > gradients.gradients.value == full.gradients.value
    assert none.optimizer.value > optimizer.optimizer.value == full.optimizer.value
    whole = plan(NANO, shard="none")
    for field in ("weights", "gradients", "optimizer"):
        assert getattr(full, field).value == pytest.approx(getattr(whole, field).value / 8)
    assert full.gathered.value > 0


def test_each_axis_cuts_activations() -> None:
    base = plan(GLM5, sequence=8192)
    assert plan(GLM5, sequence=8192, context=2).saved_activations.value == base.saved_activations.value / 2
    assert plan(GLM5, sequence=8192, tensor=2).saved_activations.value == base.saved_activations.value / 2
    assert plan(GLM5, sequence=8192, micro_batch=3).saved_activations.value == 3 * base.saved_activations.value
    # 1F1B: fewer layers, as many more micro batches in flight.
    assert plan(GLM5, sequence=8192, pipeline=2).saved_activations.value == base.saved_activations.value
    assert base.saved_activations.value == 78 * 8192 * 6144 * 2
    kept = plan(GLM5, sequence=8192, checkpointing=False)
    assert kept.saved_activations.value > 20 * base.saved_activations.value
    assert kept.weights.value == base.weights.value


def test_pipeline_stage_is_the_fullest_one() -> None:
    whole, stage = plan(GLM5, shard="none"), plan(GLM5, shard="none", pipeline=13)
    expert = 3 * 6144 * 2048
    sparse_layer = 256 * expert + 165_022_208 + 9_371_904 + expert + 256 * 6144
    last = 6 * sparse_layer + 154_880 * 6144  # six layers and the head
    mtp = sparse_layer + 2 * 6144 * 6144
    assert stage.weights.value / 2 == pytest.approx(last + mtp, rel=1e-4)
    assert whole.weights.value / 13 < stage.weights.value < whole.weights.value / 10


def test_muon_needs_less_than_adamw() -> None:
    muon, adamw = plan(GLM5, data_shard=64, expert=64), plan(GLM5, data_shard=64, expert=64, optimizer="adamw")
    assert muon.optimizer.value / adamw.optimizer.value == pytest.approx(8 / 12, rel=0.01)
    states = 2 + 4 + 12
    assert (adamw.weights.value + adamw.gradients.value + adamw.optimizer.value) * 64 == pytest.approx(
        states * 753_864_139_008, rel=1e-4
    )


def test_published_recipe_fits_and_half_of_it_does_not() -> None:
    """Megatron-Bridge: SFT of GLM-5.2 in BF16 at 128K on 416 H100 (PP13, CP32, TP1)."""
    config = ModelConfig.from_preset("glm-5.2")
    parallel = TrainingPlan(pipeline=13, context=32, expert=32, sequence=131_072, optimizer="adamw")
    assert training_memory(config, parallel, hardware_from("H100x416")).fits
    half = replace(parallel, context=16, expert=16)
    assert not training_memory(config, half, hardware_from("H100x208")).fits
