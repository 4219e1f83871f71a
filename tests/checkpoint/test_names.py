"""The layout against names written out by hand, and against the published size of GLM-5."""

import pytest
import torch

import glm5
from glm5.checkpoint.checkpoint import model_layout
from glm5.checkpoint.names import is_shared_copy, layer_number, stored_as_fp8


def test_every_name_of_a_small_model(model: glm5.GLM5) -> None:
    attention = (
        "q_a_proj.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight", "o_proj.weight",
        "q_a_layernorm.weight", "kv_a_layernorm.weight",
    )  # fmt: skip
    indexer = ("wq_b.weight", "wk.weight", "weights_proj.weight", "k_norm.weight", "k_norm.bias")
    projections = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for i in range(4):
        layer = f"model.layers.{i}"
        expected |= {f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"}
        expected |= {f"{layer}.self_attn.{name}" for name in attention}
        if i != 1:
            expected |= {f"{layer}.self_attn.indexer.{name}" for name in indexer}
        if i == 0:
            expected |= {f"{layer}.mlp.{name}" for name in projections}
        else:
            expected |= {f"{layer}.mlp.gate.weight", f"{layer}.mlp.gate.e_score_correction_bias"}
            expected |= {f"{layer}.mlp.shared_experts.{name}" for name in projections}
            expected |= {f"{layer}.mlp.experts.{e}.{name}" for e in range(6) for name in projections}
    expected |= {f"model.layers.3.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")}
    layout = model_layout(model.config)
    assert set(layout.slots) == expected
    assert len(layout.stacked) == 6


def test_slots_tile_the_model_exactly(model: glm5.GLM5) -> None:
    """Writing each slot once touches each element once."""
    layout = model_layout(model.config)
    touched = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    for slot in layout.slots.values():
        place = slot.of(touched[slot.tensor])
        assert tuple(place.shape) == slot.shape
        place += 1
    assert all((count == 1).all() for count in touched.values())


def test_the_three_matrices_of_an_expert_are_neighbours(model: glm5.GLM5) -> None:
    names = list(model_layout(model.config).slots)
    first = names.index("model.layers.1.mlp.experts.4.gate_proj.weight")
    assert [name.split(".")[-2] for name in names[first : first + 3]] == ["gate_proj", "up_proj", "down_proj"]


def test_glm_5_layout_is_the_published_one() -> None:
    """744B weights and the MTP layer, counted without memory; and which kinds of matrix FP8 leaves alone."""
    layout = model_layout(glm5.ModelConfig.from_preset("glm-5"))
    assert sum(torch.Size(slot.shape).numel() for slot in layout.slots.values()) == 753_864_139_008
    assert layout.slots["model.layers.78.mlp.experts.255.down_proj.weight"].shape == (6144, 2048)
    assert layout.slots["model.layers.3.self_attn.kv_b_proj.weight"].shape == (28_672, 512)
    wide = {n for n in layout.slots if not stored_as_fp8(n) and len(layout.slots[n].shape) == 2}
    kinds = {".".join(p for p in n.split(".") if not p.isdigit()) for n in wide}
    assert kinds == {
        "model.embed_tokens.weight", "lm_head.weight", "model.layers.mlp.gate.weight", "model.layers.eh_proj.weight",
        "model.layers.self_attn.indexer.weights_proj.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layer", "copy"),
    [
        ("model.layers.78.embed_tokens.weight", 78, True),
        ("model.layers.78.shared_head.head.weight", 78, True),
        ("model.layers.78.shared_head.norm.weight", 78, False),
        ("model.embed_tokens.weight", None, False),
    ],
)
def test_shared_copies_are_recognised(name: str, layer: int | None, copy: bool) -> None:
    assert layer_number(name) == layer
    assert is_shared_copy(name) is copy
