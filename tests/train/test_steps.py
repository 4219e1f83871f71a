"""One step: micro-batches, recomputed layers, skipped steps, gradients clipped apart."""

import dataclasses
import functools
import json

import pytest
import torch
from small_runs import StopAt, pretrain_config, same, state_of

from glm5.checkpoint.training_state import read_training_state
from glm5.data import Batch, Loader, open_dataset
from glm5.errors import ConfigError
from glm5.model import GLM5, initialize_
from glm5.optim import OptimizerConfig, build_optimizers
from glm5.train import LoopConfig, RunInterrupted, Stage, guards, pretrain, train
from glm5.train.activations import checkpoint_layers
from glm5.train.loop import compute, micro_batches
from glm5.train.losses import Loss, count, language_loss
from glm5.train.run_directory import RunDirectory

WEIGHTS = {"attention": "sparse", "mtp_weight": 0.3, "balance_weight": 1.0, "indexer_weight": 1.0}


def all_losses(model, batch, counts):
    return language_loss(model, batch, counts, **WEIGHTS)


def random_model(config, **changes) -> GLM5:
    model = GLM5(dataclasses.replace(config, **changes))
    initialize_(model, 0.3, seed=1)
    model.mtp_steps = 2
    return model


def uneven(tiny) -> Batch:
    """Five rows of chats: each row has another number of tokens and of targets."""
    return Loader(open_dataset(tiny[0] / "chat"), rows=5, length=48, seed=0, packing="keep_whole").batch(0)


def gradients(model, batch, **loop):
    stage = Stage(name="s", loader=None, loss=all_losses)
    model.zero_grad(set_to_none=True)
    found = compute(stage, model, batch, LoopConfig(steps=1, clip_norm=1e9, **loop))
    return found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_micro_batches_add_up_to_one_batch(tiny, rows):
    batch, model = uneven(tiny), random_model(tiny[1])
    assert len({int((row != -100).sum()) for row in batch.targets_BT}) > 1
    whole, expected = gradients(model, batch)
    parts, found = gradients(model, batch, micro_rows=rows)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5) and parts.tokens == whole.tokens
    assert parts.parts == pytest.approx(whole.parts, rel=1e-5)
    assert parts.grad_norms == pytest.approx(whole.grad_norms, rel=1e-4)
    assert all(torch.equal(parts.loads[layer], load) for layer, load in whole.loads.items())
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-5, msg=name)


def test_a_mean_of_micro_batch_means_would_be_another_loss(tiny):
    """The test above can fail: rows of unequal numbers of targets have unequal means."""
    batch, model = uneven(tiny), random_model(tiny[1])
    means = [language_loss(model, row, **WEIGHTS).parts["lm"] for row in micro_batches(batch, 1)]
    whole = language_loss(model, batch, **WEIGHTS).parts["lm"]
    assert (torch.stack(means).mean() - whole).abs() > 1e-3


def test_counts(tiny):
    batch = Loader(open_dataset(tiny[0] / "train"), rows=5, length=48, seed=0).batch(0)
    counts = count(batch, 2)
    assert int(counts.rows) == 5 and int(counts.tokens) == int((batch.segment_ids_BT >= 0).sum())
    assert int(counts.targets()) == int((batch.targets_BT != -100).sum())
    assert int(counts.targets(2)) < int(counts.targets(1)) < int(counts.targets())


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize("sharing", [(), ("full", "shared")])
def test_recomputed_layers_give_the_same_bits(tiny, attention, sharing):
    """IndexShare layers find the selection of the first run again in the second."""
    batch = Loader(open_dataset(tiny[0] / "train"), rows=2, length=48, seed=0).batch(0)
    batch = Batch(batch.input_ids_BT, batch.targets_BT, torch.zeros_like(batch.segment_ids_BT))
    results = []
    for recompute in (False, True):
        model = random_model(tiny[1], indexer_types=sharing)
        if recompute:
            checkpoint_layers(model)
        loss = language_loss(model, batch, **{**WEIGHTS, "attention": attention})
        loss.total.backward()
        results.append((loss.parts, {name: p.grad for name, p in model.named_parameters()}))
    assert same(results[0], results[1])


def test_recomputed_layers_keep_less(tiny):
    """Tensors that the graph of a forward pass holds, in bytes."""
    batch = Loader(open_dataset(tiny[0] / "train"), rows=8, length=64, seed=0).batch(0)
    kept = []
    for recompute in (False, True):
        model = random_model(tiny[1])
        if recompute:
            checkpoint_layers(model)
        seen: dict[int, int] = {}

        def note(tensor, seen=seen):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden = model(batch.input_ids_BT, attention="dense", collect={"hidden"}).hidden
        assert hidden.requires_grad
        kept.append(sum(seen.values()))
    assert kept[1] < kept[0] / 2


def test_a_recomputed_run_is_the_same_run(tiny, straight, tmp_path):
    run = pretrain(pretrain_config(tiny, checkpoint_activations=True), tmp_path / "run")
    assert same(state_of(run), state_of(straight))
    assert (run.path / "metrics.jsonl").read_bytes() == (straight.path / "metrics.jsonl").read_bytes()


# ---- skipped steps --------------------------------------------------------------------------------------------------
def broken_at(tiny, steps: dict[int, float]) -> Stage:
    """A stage whose loss is multiplied by `steps[step]` at these steps."""
    loader = Loader(open_dataset(tiny[0] / "train"), rows=2, length=32, seed=9)
    firsts = {int(loader.batch(step).input_ids_BT.sum()): factor for step, factor in steps.items()}

    def loss(model, batch, counts):
        found = language_loss(model, batch, counts, attention="dense")
        factor = firsts.get(int(batch.input_ids_BT.sum()), 1.0)
        return Loss(found.total * factor, found.parts, found.router)

    return Stage(name="s", loader=loader, loss=loss, learns=lambda name: ".indexer." not in name and "mtp" not in name)


def start(tiny, path, config, resume=False) -> tuple[RunDirectory, GLM5]:
    run = RunDirectory.start(path, stage="s", config=config, inputs={}, resume=resume)
    model = GLM5(tiny[1])
    initialize_(model, 0.02, seed=1)
    return run, model


def test_a_step_that_is_left_out_changes_nothing_and_is_noted(tiny, tmp_path):
    config = LoopConfig(steps=3, on_spike="skip", checkpoint_every=1, keep_checkpoints=9)
    run, model = start(tiny, tmp_path / "run", config)
    train(broken_at(tiny, {1: float("nan")}), model, run, config)
    states = [read_training_state(path) for path in run.checkpoints()]
    for part in ("model.", "optimizer."):
        first, second, third = ({name: x for name, x in state.items() if name.startswith(part)} for state in states)
        assert same(first, second) and not same(second, third)
    lines = run.read("metrics")
    assert lines[1]["skipped"] == "loss is nan" and lines[1]["loss"] is None
    assert "skipped" not in lines[0] and "skipped" not in lines[2]
    json.loads((run.path / "metrics.jsonl").read_text().splitlines()[1], parse_constant=lambda name: pytest.fail(name))


def test_a_run_with_skipped_steps_resumes_exactly(tiny, tmp_path, monkeypatch):
    """Spike and NaN before and after the interruption; the median must not count what was left out."""
    monkeypatch.setattr(guards, "SPIKE_WINDOW", 3)
    config = LoopConfig(steps=10, on_spike="skip", checkpoint_every=4)
    stage = broken_at(tiny, {4: 50.0, 5: float("inf"), 8: 50.0})
    whole, model = start(tiny, tmp_path / "whole", config)
    train(stage, model, whole, config)
    assert [line["step"] for line in whole.read("metrics") if "skipped" in line] == [4, 5, 8]
    for stop in (4, 6, 7):
        run, other = start(tiny, tmp_path / f"stop-{stop}", config)
        with monkeypatch.context() as patch:
            StopAt(patch, step=stop)
            with pytest.raises(RunInterrupted):
                train(stage, other, run, config)
        run, other = start(tiny, run.path, config, resume=True)
        train(stage, other, run, config)
        assert same(state_of(whole), state_of(run))
        assert (whole.path / "metrics.jsonl").read_bytes() == (run.path / "metrics.jsonl").read_bytes()


def test_a_stopped_run_may_go_on_by_skipping(tiny, tmp_path):
    stop, skip = (LoopConfig(steps=3, on_spike=choice) for choice in ("stop", "skip"))
    stage = broken_at(tiny, {1: float("nan")})
    run, model = start(tiny, tmp_path / "run", stop)
    with pytest.raises(Exception, match="resume with on_spike='skip'"):
        train(stage, model, run, stop)
    run, model = start(tiny, run.path, skip, resume=True)
    train(stage, model, run, skip)
    assert [("skipped" in line) for line in run.read("metrics")] == [False, True, False]


def test_choices_are_checked():
    with pytest.raises(ConfigError, match=r"on_spike is 'skipp'; use 'stop' or 'skip'. Did you mean 'skip'"):
        LoopConfig(steps=1, on_spike="skipp")
    with pytest.raises(ConfigError, match="micro_rows is 0"):
        LoopConfig(steps=1, micro_rows=0)


def test_indexers_are_clipped_apart(tiny):
    """A KL of any weight leaves the clipped gradients of the model as they are."""
    batch = uneven(tiny)
    results = []
    for weight in (1.0, 1000.0):
        model = random_model(tiny[1])
        stage = Stage(
            name="s",
            loader=None,
            loss=functools.partial(language_loss, **{**WEIGHTS, "indexer_weight": weight}),
        )
        compute(stage, model, batch, LoopConfig(steps=1, clip_norm=0.01))
        results.append({name: p.grad for name, p in model.named_parameters()})
    model_norm, indexer_norm = (
        torch.cat([g.flatten() for name, g in results[1].items() if (".indexer." in name) == side]).norm()
        for side in (False, True)
    )
    assert model_norm == pytest.approx(0.01, rel=1e-3) and indexer_norm == pytest.approx(0.01, rel=1e-3)
    for name, gradient in results[0].items():
        if ".indexer." not in name:
            assert torch.equal(gradient, results[1][name])


def test_optimisers_of_a_part(tiny):
    model = random_model(tiny[1])
    config = OptimizerConfig()
    parts = [
        p
        for side in (True, False)
        for o in build_optimizers(model, model.config, config, only=lambda name, s=side: (".indexer." in name) == s)
        for group in o.param_groups
        for p in group["params"]
    ]
    assert len(parts) == len({id(p) for p in parts}) == len(list(model.parameters()))
