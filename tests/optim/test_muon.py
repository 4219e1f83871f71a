"""Muon against torch.optim.Muon on plain matrices, and Muon Split against a loop over heads and experts."""

import copy

import pytest
import torch
from torch import nn

from glm5.config import PRESETS
from glm5.optim.groups import split_of
from glm5.optim.muon import UPDATE_RMS, Muon, experts, heads, whole
from glm5.optim.newton_schulz import orthogonalise

LR, MOMENTUM, DECAY = 0.02, 0.95, 0.1


def gradients(shape: tuple[int, ...], steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def run(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, grads: list[torch.Tensor]) -> torch.Tensor:
    for gradient in grads:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def torch_muon(start: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    parameter = nn.Parameter(start.clone())
    optimizer = torch.optim.Muon(
        [parameter], lr=LR, momentum=MOMENTUM, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
    )
    return run(optimizer, parameter, grads)


def ours(start: torch.Tensor, split, grads: list[torch.Tensor]) -> torch.Tensor:
    parameter = nn.Parameter(start.clone())
    return run(Muon([(parameter, split)], lr=LR, momentum=MOMENTUM, weight_decay=DECAY), parameter, grads)


def close(actual: torch.Tensor, expected: torch.Tensor, start: torch.Tensor) -> None:
    """Equal up to bfloat16 rounding inside Newton-Schulz, measured against the distance moved."""
    error = (actual - expected).norm() / (expected - start).norm()
    assert error < 0.02, f"relative error {error:.4f}"


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_plain_matrix_equals_torch(shape):
    start, grads = torch.randn(shape), gradients(shape, 4)
    close(ours(start, whole, grads), torch_muon(start, grads), start)


def test_heads_equal_a_loop_over_heads():
    """kv_b_proj: W^UK (5 rows) and W^UV (7 rows) of each of 3 heads are six separate matrices."""
    start, grads = torch.randn(3 * 12, 16), gradients((36, 16), 3)
    actual = ours(start, heads(5, 7), grads)
    rows = [slice(h * 12 + a, h * 12 + b) for h in range(3) for a, b in ((0, 5), (5, 12))]
    expected = torch.cat([torch_muon(start[r], [g[r] for g in grads]) for r in rows])
    close(actual, expected, start)
    assert (actual - torch_muon(start, grads)).norm() / (expected - start).norm() > 0.1  # not the same as one matrix


def test_experts_equal_a_loop_over_experts():
    start, grads = torch.randn(4, 2 * 6, 10), gradients((4, 12, 10), 3)
    actual = ours(start, experts(2), grads)
    for e in range(4):
        for part in (slice(0, 6), slice(6, 12)):
            close(actual[e, part], torch_muon(start[e, part], [g[e, part] for g in grads]), start[e, part])


def test_update_has_the_root_mean_square_of_adamw():
    """After one step without decay, each full-rank matrix moved by about 0.2 lr per weight, whatever its shape."""
    for shape in [(16, 64), (64, 16), (64, 64)]:
        start = torch.zeros(shape)
        parameter = nn.Parameter(start.clone())
        moved = run(Muon([(parameter, whole)], lr=LR, weight_decay=0.0), parameter, gradients(shape, 1))
        assert moved.square().mean().sqrt().item() == pytest.approx(UPDATE_RMS * LR, rel=0.2)


def test_orthogonalise_makes_singular_values_nearly_equal():
    values = torch.linalg.svdvals(orthogonalise(gradients((5, 12, 30), 1)[0]).float())
    assert values.min() > 0.5 and values.max() < 1.3


def test_split_of_covers_every_element_once():
    config = PRESETS["nano"]()
    h, n, r, v = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    shapes = {
        "model.layers.0.self_attn.q_b_proj.weight": ((h * (n + r), 96), [(h, n + r, 96)]),
        "model.layers.0.self_attn.kv_b_proj.weight": ((h * (n + v), 64), [(h, n, 64), (h, v, 64)]),
        "model.layers.1.mlp.experts.gate_up_proj": ((16, 192, 128), [(16, 96, 128), (16, 96, 128)]),
        "model.layers.1.mlp.experts.down_proj": ((16, 128, 96), [(16, 128, 96)]),
        "model.layers.1.mlp.shared_experts.up_proj.weight": ((96, 128), [(1, 96, 128)]),
    }
    for name, (shape, expected) in shapes.items():
        x = torch.zeros(shape)
        views = split_of(name, config)(x)
        assert [tuple(view.shape) for view in views] == expected
        for view in views:
            view.add_(1)
        assert torch.equal(x, torch.ones(shape))


def test_state_resumes_exactly():
    start, grads = torch.randn(12, 20), gradients((12, 20), 6)
    straight = nn.Parameter(start.clone())
    run(Muon([(straight, whole)], lr=LR), straight, grads)

    first = nn.Parameter(start.clone())
    optimizer = Muon([(first, whole)], lr=LR)
    run(optimizer, first, grads[:3])
    saved = copy.deepcopy(optimizer.state_dict())
    second = nn.Parameter(first.detach().clone())
    resumed = Muon([(second, whole)], lr=1.0)
    resumed.load_state_dict(saved)
    assert torch.equal(run(resumed, second, grads[3:]), straight.detach())


def test_no_gradient_means_no_change():
    parameter = nn.Parameter(torch.randn(4, 4))
    before = parameter.detach().clone()
    Muon([(parameter, whole)], lr=1.0).step()
    assert torch.equal(parameter, before)


def test_the_working_type_has_instructions_on_this_processor():
    native = torch.cpu._is_avx512_bf16_supported()
    assert orthogonalise(gradients((1, 4, 6), 1)[0]).dtype == (torch.bfloat16 if native else torch.float32)
