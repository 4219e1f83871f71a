"""The losses a piece of the tokens at a time: the same numbers, and never more logits at once than allowed."""

import dataclasses
import functools
import importlib
import itertools

import pytest
import torch
from small_runs import pretrain_config, same, state_of
from spawned import run
from test_steps import random_model, uneven

from glm5.data import IGNORED, Batch, Loader, open_dataset
from glm5.errors import ConfigError
from glm5.model import GLM5, add_adapters
from glm5.optim import OptimizerConfig
from glm5.parallel import ParallelPlan
from glm5.parallel.mesh import open_mesh
from glm5.train import LoopConfig, Stage, evaluate_bits_per_byte, pretrain
from glm5.train.activations import checkpoint_layers
from glm5.train.dsa import indexer_loss
from glm5.train.loop import compute, micro_batches, prepare, update
from glm5.train.losses import language_loss, mtp_targets, token_loss

WEIGHTS = {"attention": "sparse", "mtp_weight": 0.3, "balance_weight": 1.0, "indexer_weight": 1.0}
FEW = 3
"""Positions at once."""


def positions(model: GLM5) -> list[int]:
    """How many positions the head is given, call after call."""
    calls = []
    model.lm_head.register_forward_hook(lambda module, given, out: calls.append(out.shape[:-1].numel()))
    return calls


def learnt(model, batch, most=None, **loop):
    """What a step finds, its gradients, and the positions of each call of the head."""
    limit = {} if most is None else {"most": most}
    calls = positions(model)
    stage = Stage(name="s", loader=None, loss=functools.partial(language_loss, **WEIGHTS, **limit))
    found = compute(stage, model, batch, LoopConfig(steps=1, clip_norm=1e9, **loop))
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, calls


def text(tiny, rows=3) -> Batch:
    """Packed documents."""
    return Loader(open_dataset(tiny[0] / "train"), rows=rows, length=48, seed=0).batch(0)


def assert_equal(found, expected, rtol):
    assert found[0].loss == pytest.approx(expected[0].loss, rel=rtol)
    assert found[0].parts == pytest.approx(expected[0].parts, rel=rtol)
    assert found[1].keys() == expected[1].keys() and "lm_head.weight" in found[1]
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= rtol * gradient.norm(), name


@pytest.mark.parametrize("loop", [
    {}, {"micro_rows": 2}, {"checkpoint_activations": True, "micro_rows": 1},
], ids=["whole", "micro-batches", "recomputed"])  # fmt: skip
@pytest.mark.parametrize("kind", [text, uneven], ids=["packed", "chats"])
def test_a_piece_at_a_time_is_the_same_in_float64(tiny, kind, loop):
    batch, results = kind(tiny), []
    for few in (False, True):
        model = random_model(tiny[1]).double()
        if "checkpoint_activations" in loop:
            checkpoint_layers(model)
        results.append(learnt(model, batch, FEW * tiny[1].vocab_size if few else None, **loop))
    whole, pieces = results
    assert max(pieces[2]) == FEW < min(whole[2])
    assert_equal(pieces, whole, 1e-6)  # the cross-entropy of either is of float32 logits


def test_only_tokens_with_a_target_meet_the_head(tiny):
    """Once forward and once backward: of the trunk and of each draft step; prompts, padding, ends never."""
    model, batch = random_model(tiny[1]), uneven(tiny)
    targets = [batch.targets_BT, *(mtp_targets(batch, step) for step in range(model.mtp_steps))]
    _, _, calls = learnt(model, batch, FEW * tiny[1].vocab_size)
    assert sum(calls) == 2 * sum(int((part != IGNORED).sum()) for part in targets)


def test_what_fits_is_made_at_once_to_the_bit(tiny):
    batch = text(tiny)
    logits = batch.input_ids_BT.numel() * tiny[1].vocab_size * 3  # trunk and two draft steps
    plain, fits, less = (learnt(random_model(tiny[1]), batch, most) for most in (None, logits, logits - 1))
    assert plain[2] == fits[2] == [batch.input_ids_BT.numel()] * 3
    assert plain[0].loss == fits[0].loss and same(plain[1], fits[1])
    assert less[2] != plain[2]


def test_one_piece_is_the_same_to_the_bit(tiny):
    """Where every token has a target and one piece suffices, the head and the loss are given the same numbers."""
    batch, results = text(tiny), []
    targets_BT = batch.input_ids_BT.roll(-1, 1)
    for collect in (frozenset(), {"states"}):
        model = random_model(tiny[1])
        output = model(batch.input_ids_BT, attention="dense", collect=collect)
        loss = token_loss(model, output, targets_BT, torch.tensor(targets_BT.numel()))
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert same(*results)


def test_a_batch_without_targets_gives_gradients_of_zero(tiny):
    model, batch = random_model(tiny[1]), text(tiny)
    nothing = Batch(batch.input_ids_BT, torch.full_like(batch.targets_BT, IGNORED), batch.segment_ids_BT)
    loss = language_loss(model, nothing, attention="dense", mtp_weight=0.3, most=1)
    loss.total.backward()
    assert loss.parts["lm"] == loss.parts["mtp"] == 0
    assert model.lm_head.weight.grad.abs().max() == model.model.norm.weight.grad.abs().max() == 0


def test_adapters_of_the_head_learn_alike(tiny):
    results = []
    for most in (1 << 26, FEW * tiny[1].vocab_size):
        model = random_model(tiny[1])
        add_adapters(model, targets=("lm_head",))
        with torch.no_grad():
            model.lm_head.adapter.lora_A.copy_(torch.linspace(-1, 1, 8 * tiny[1].hidden_size).view(8, -1))
            model.lm_head.adapter.lora_B.fill_(0.01)
        language_loss(model, text(tiny), attention="dense", mtp_weight=0.3, most=most).total.backward()
        results.append([model.lm_head.adapter.lora_A.grad, model.lm_head.adapter.lora_B.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_held_out_text_is_judged_alike(tiny):
    model, heldout = random_model(tiny[1]).eval(), open_dataset(tiny[0] / "heldout")
    whole = evaluate_bits_per_byte(model, heldout, length=32, rows=3)
    calls = positions(model)
    pieces = evaluate_bits_per_byte(model, heldout, length=32, rows=3, most=FEW * tiny[1].vocab_size)
    assert max(calls) == FEW and sum(calls) == whole.tokens
    assert dataclasses.replace(pieces, bits_per_byte=0, nats_per_token=0) == dataclasses.replace(
        whole, bits_per_byte=0, nats_per_token=0
    )
    assert pieces.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-6)


PLANS = {"fsdp": ParallelPlan(data_shard=2), "tensor": ParallelPlan(tensor=2)}


def judged_between_steps(config, root, plans):
    """Bits per byte before and after a step, a piece at a time, and the step's loss, under each plan."""
    most, results = FEW * config.vocab_size, {}
    stage = Stage(name="s", loader=None, loss=functools.partial(language_loss, **WEIGHTS, most=most))
    batch, heldout = text((root, config), rows=2), open_dataset(root / "heldout")
    for name, plan in plans.items():
        model, mesh = random_model(config), open_mesh(plan)
        loop = LoopConfig(steps=1, parallel=plan, optimizer=OptimizerConfig(name="adamw", lr=0.1))
        optimizers = prepare(stage, model, loop, mesh)
        mine = next(itertools.islice(micro_batches(batch, 1), mesh.index("data"), None)) if plan.data > 1 else batch
        judge = functools.partial(evaluate_bits_per_byte, model, heldout, length=32, documents=2, most=most)
        before = judge().bits_per_byte
        found = compute(stage, model, mine, loop, mesh)
        update(model, optimizers, found.loads, loop)
        results[name] = [before, found.loss, judge().bits_per_byte]
    return results


def test_a_cut_model_is_judged_and_trained_alike(tiny):
    root, config = tiny
    one = judged_between_steps(config, root, {"one": ParallelPlan()})["one"]
    assert one[2] != pytest.approx(one[0], rel=1e-2)
    for results in run(2, judged_between_steps, config, root, PLANS):
        for name, found in results.items():
            assert found == pytest.approx(one, rel=1e-4), name


def test_the_indexers_alone_need_no_head(tiny):
    model = random_model(tiny[1])
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    indexer_loss(model, text(tiny)).total.backward()
    assert model.lm_head.weight.grad is None
    assert all(p.grad is not None for name, p in model.named_parameters() if ".indexer." in name)


def test_a_run_takes_the_setting(tiny, straight, tmp_path, monkeypatch):
    """Of the loop, for its loss and its evaluations, in the unit of MiB."""
    stage = importlib.import_module("glm5.train.pretrain")
    monkeypatch.setattr(stage, "logits_in", lambda mib: mib * FEW * tiny[1].vocab_size)
    pieces = pretrain(pretrain_config(tiny, logits_mib=1), tmp_path / "run")
    assert not same(state_of(pieces), state_of(straight))
    for one, other in zip(pieces.read("metrics"), straight.read("metrics"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    with pytest.raises(ConfigError, match="logits_mib is 0"):
        LoopConfig(steps=1, logits_mib=0)
