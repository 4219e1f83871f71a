"""Which loss moves which parameter, and by how much: analytic gradients against finite differences in fp64.

The choices (experts, positions) are recorded once and replayed, because a choice has no derivative.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model
from torch import Tensor

import glm5
from glm5.model import ModelOutput, Replay, add_adapters

IDS = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(7))
SEGMENTS = torch.tensor([[0] * 12 + [1] * 6 + [-1] * 2, [0] * 20])


def cross_entropy(logits_BTV: Tensor, shift: int) -> Tensor:
    """Mean loss of the tokens `shift` ahead inside the same segment."""
    same = (SEGMENTS[:, shift:] == SEGMENTS[:, :-shift]) & (SEGMENTS[:, shift:] >= 0)
    return F.cross_entropy(logits_BTV[:, :-shift][same], IDS[:, shift:][same])


def language_model(out: ModelOutput) -> Tensor:
    return cross_entropy(out.logits, 1)


def mtp(out: ModelOutput) -> Tensor:
    return sum(cross_entropy(logits, 2 + step) for step, logits in enumerate(out.mtp_logits))  # type: ignore[return-value]


def balance(out: ModelOutput) -> Tensor:
    return torch.stack([record.balance for record in out.router]).sum()


def indexer_kl(out: ModelOutput) -> Tensor:
    return torch.stack(list(out.indexer_kl.values())).sum()


def is_indexer(name: str) -> bool:
    return ".indexer." in name


def is_mtp(name: str) -> bool:
    return name.startswith("mtp.")


# loss -> (what it collects, which parameters it may move)
LOSSES: dict[Callable[[ModelOutput], Tensor], tuple[set[str], Callable[[str], bool]]] = {
    language_model: (set(), lambda name: not is_indexer(name) and not is_mtp(name)),
    mtp: ({"mtp"}, lambda name: not is_indexer(name)),
    balance: ({"router"}, lambda name: not is_indexer(name) and not is_mtp(name) and "lm_head" not in name),
    indexer_kl: ({"indexer_kl"}, lambda name: is_indexer(name) and not is_mtp(name)),
}


def frozen_choices(model: glm5.GLM5, attention: str) -> Replay:
    with torch.no_grad():
        out = model(IDS, segment_ids_BT=SEGMENTS, attention=attention, collect={"mtp", "router", "selection"})
    positions = out.selection if attention == "sparse" else {}
    return Replay(experts={r.layer: r.experts_BTK for r in out.router}, positions=positions)


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_gradients_equal_finite_differences_and_are_zero_elsewhere(loss, attention):
    """IndexShare included: layer 1 reuses layer 0's indexer, so its attention teaches it too."""
    collect, may_move = LOSSES[loss]
    pattern = ("full", "shared", "full")
    model = tiny_model(3, std=0.3, dtype=torch.float64, num_hidden_layers=3, indexer_types=pattern, index_topk=5)
    replay = frozen_choices(model, attention)

    def value() -> Tensor:
        out = model(IDS, segment_ids_BT=SEGMENTS, attention=attention, collect=collect, replay=replay)
        return loss(out)

    model.zero_grad()
    value().backward()
    generator = torch.Generator().manual_seed(1)
    moved = 0
    for name, parameter in model.named_parameters():
        if not may_move(name):
            assert parameter.grad is None or not parameter.grad.any(), f"{loss.__name__} moves {name}"
            continue
        if parameter.grad is None:  # nothing of this part lies on the loss's path (the last layer's experts, say)
            parameter.grad = torch.zeros_like(parameter)
        # The derivative along a random direction, by central differences.
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        analytic = float((parameter.grad * direction).sum())
        step, values = 1e-7, []  # small: a larger one carries some ReLU of the indexer across its kink
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * step)
                values.append(float(value()))
                parameter.add_(direction, alpha=-sign * step)
        numeric = (values[0] - values[1]) / (2 * step)
        assert analytic == pytest.approx(numeric, rel=1e-5, abs=1e-7), name
        moved += analytic != 0
    assert moved >= 5


def test_only_the_indexers_of_the_trunk_learn_from_their_own_kl():
    """Each KL term moves its own layer's indexer and no other."""
    model = tiny_model(3, index_topk=5)
    out = model(IDS, collect={"indexer_kl"})
    out.indexer_kl[1].backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {n for n, _ in model.named_parameters() if n.startswith("model.layers.1.self_attn.indexer.")}


def test_gradients_do_not_depend_on_the_blocks(monkeypatch):
    """Long rows are recomputed block by block in the backward pass; the gradient must not notice."""
    from glm5.ops import attention, indexer_loss

    def gradients() -> list[Tensor]:
        model = tiny_model(3, dtype=torch.float64)
        out = model(IDS, segment_ids_BT=SEGMENTS, collect={"mtp", "indexer_kl"})
        (language_model(out) + mtp(out) + indexer_kl(out)).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    whole = gradients()
    monkeypatch.setattr(attention, "BLOCK_BUDGET", 500)
    monkeypatch.setattr(indexer_loss, "BLOCK_BUDGET", 500)
    blocked = gradients()
    assert len(whole) == len(blocked) > 30
    for one, other in zip(whole, blocked, strict=True):
        torch.testing.assert_close(one, other)


def test_adapters_start_at_zero_change_and_alone_receive_gradients():
    model = tiny_model(3)
    before = model(IDS).logits
    names = add_adapters(model, rank=2, targets=("*.kv_b_proj", "*.experts", "*.o_proj", "*.indexer.wk"))
    assert len(names) == 3 * 3 + 2  # two layers and the MTP module; two of the three hold experts
    assert torch.equal(model(IDS).logits, before)
    out = model(IDS, collect={"mtp", "indexer_kl"})
    (language_model(out) + mtp(out) + indexer_kl(out)).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if "lora_" in name}
