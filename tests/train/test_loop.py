"""The loop: exact resume, interruption, guards, what is frozen, and that it learns."""

import dataclasses
import json

import pytest
import torch
from small_runs import StopAt, pretrain_config, same, state_of, weights_of

from glm5.checkpoint import load_model
from glm5.data import Loader, open_dataset
from glm5.errors import ConfigError, RunError
from glm5.model import GLM5, initialize_
from glm5.optim import OptimizerConfig
from glm5.train import LoopConfig, RunInterrupted, SFTConfig, Stage, pretrain, sft, train
from glm5.train.guards import trouble_with
from glm5.train.losses import Loss
from glm5.train.run_directory import RunDirectory


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_six_steps_equal_three_and_three(tiny, tmp_path, monkeypatch, name):
    config = pretrain_config(tiny, optimizer=OptimizerConfig(name=name, lr=5e-3))
    whole = pretrain(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        StopAt(patch, step=2)
        with pytest.raises(RunInterrupted, match="Stopped after step 3 of 6"):
            pretrain(config, tmp_path / "parts")
    parts = pretrain(config, tmp_path / "parts", resume=True)
    assert same(state_of(whole), state_of(parts))
    assert (whole.path / "metrics.jsonl").read_bytes() == (parts.path / "metrics.jsonl").read_bytes()
    for file in ("model/model-00001-of-00001.safetensors", "evaluation.json", "samples/step-00000006.txt"):
        assert (whole.path / file).read_bytes() == (parts.path / file).read_bytes()


def test_a_kill_between_checkpoints_loses_nothing(tiny, straight, tmp_path, monkeypatch):
    """The process dies inside step 5: the checkpoint is of step 4, the metrics run ahead, a line is cut short."""
    with monkeypatch.context() as patch:
        original = Loader.batch
        patch.setattr(Loader, "batch", lambda self, step: original(self, step) if step < 5 else None.died)
        with pytest.raises(AttributeError):
            pretrain(pretrain_config(tiny), tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    (tmp_path / "run" / "checkpoints" / "step-00000006.partial").mkdir()
    again = pretrain(pretrain_config(tiny), tmp_path / "run", resume=True)
    assert same(state_of(straight), state_of(again))
    assert (straight.path / "metrics.jsonl").read_bytes() == (again.path / "metrics.jsonl").read_bytes()


def test_what_a_finished_run_holds(tiny, straight):
    names = {path.name for path in straight.path.iterdir()}
    assert names >= {"run.json", "metrics.jsonl", "speed.jsonl", "checkpoints", "samples", "report.html", "model"}
    assert [p.name for p in straight.checkpoints()] == ["step-00000004", "step-00000006"]
    lines = straight.read("metrics")
    assert [line["step"] for line in lines] == list(range(6))
    assert "heldout_bits_per_byte" in lines[2] and "heldout_bits_per_byte" not in lines[3]
    assert {"lm", "mtp", "balance", "grad_norm", "rate", "busiest_expert"} <= lines[0].keys()
    model = load_model(straight.model_directory)
    assert same(dict(model.state_dict()), weights_of(straight))
    description = json.loads((straight.path / "run.json").read_text())
    assert description["config"]["loop"]["optimizer"]["lr"] == 5e-3 and len(description["inputs"]["train_data"]) == 64


def test_the_router_bias_follows_the_load_and_the_indexer_stays(tiny, straight):
    state = weights_of(straight)
    biases = [value for name, value in state.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2 and all(bias.abs().max() > 0 for bias in biases)
    _, config = tiny
    fresh = GLM5(config)
    initialize_(fresh, config.initializer_range, seed=5)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, state[name]) == (".indexer." in name), name


def test_a_longer_run_learns(tiny, tmp_path):
    run = pretrain(pretrain_config(tiny, steps=40, checkpoint_every=40), tmp_path / "run")
    lines = run.read("metrics")
    assert lines[-1]["lm"] < lines[0]["lm"] - 1.2


def test_sft_starts_from_its_parent_and_learns_the_answers(tiny, straight, tmp_path):
    root, _ = tiny
    config = SFTConfig(
        parent=straight.path, train_data=root / "chat", rows=4, length=64,
        loop=LoopConfig(steps=30, optimizer=OptimizerConfig(lr=5e-3), router_bias_rate=0.0),
    )  # fmt: skip
    run = sft(config, tmp_path / "sft")
    lines = run.read("metrics")
    assert lines[-1]["lm"] < 0.6 * lines[0]["lm"]
    assert run.description["parent"] is not None
    before, after = (load_model(d).state_dict() for d in (straight.model_directory, run.model_directory))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(
        ".indexer." in name or name.startswith("mtp.") or "correction_bias" in name for name in moved
    )


def test_refusals(tiny, straight, tmp_path):
    config = pretrain_config(tiny)
    with pytest.raises(RunError, match="already holds a run"):
        pretrain(config, straight.path)
    changed = dataclasses.replace(config, rows=3)
    with pytest.raises(RunError, match=r"another config.rows \(2, now 3\)"):
        pretrain(changed, straight.path, resume=True)
    with pytest.raises(ConfigError, match="train a smaller tokenizer"):
        pretrain(dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=300)), tmp_path / "a")
    with pytest.raises(RunError, match="neither a run nor a model"):
        sft(SFTConfig(parent=tmp_path, train_data=tiny[0] / "chat"), tmp_path / "b")


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tiny, straight, tmp_path):
    root, _ = tiny
    model = load_model(straight.model_directory)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stage = Stage(
        name="broken",
        loader=Loader(open_dataset(root / "train"), rows=2, length=32, seed=9),
        loss=lambda model, batch, counts: Loss(model.lm_head.weight.sum() * float("nan"), {}),
    )
    run = RunDirectory.start(tmp_path / "run", stage="broken", config=LoopConfig(steps=3), inputs={})
    with pytest.raises(RunError, match=r"loss is nan at step 0 of broken.*number 0 of seed 9"):
        train(stage, model, run, LoopConfig(steps=3))
    assert same(before, dict(model.state_dict()))
    overflow = dataclasses.replace(
        stage, loss=lambda model, batch, counts: Loss((model.lm_head.weight[0, 0].abs() * 0).sqrt(), {})
    )
    with pytest.raises(RunError, match=r"gradient norm is nan at step 0 of broken"):
        train(overflow, model, run, LoopConfig(steps=3))
    assert same(before, dict(model.state_dict()))


def test_a_spike_is_three_times_the_median():
    healthy = {"grad_norm": 1.0}
    assert trouble_with(5.9, healthy, [2.0] * 20, 3.0) is None
    assert trouble_with(6.1, healthy, [2.0] * 20, 3.0) == "loss jumped to 6.100 from a median of 2.000"
    assert trouble_with(6.1, healthy, [2.0] * 19, 3.0) is None  # too early to know
    assert trouble_with(6.1, healthy, [2.0] * 20, None) is None
    assert trouble_with(2.0, {"grad_norm": 1.0, "indexer_grad_norm": float("inf")}, [], None) == "gradient norm is inf"


def test_bf16_autocast_trains(tiny, tmp_path):
    run = pretrain(pretrain_config(tiny, precision="bf16"), tmp_path / "run")
    assert run.finished and run.read("metrics")[-1]["lm"] < run.read("metrics")[0]["lm"]


def test_gradients_are_clipped_before_the_step(tiny, tmp_path):
    """A gradient far below AdamW's epsilon moves nothing; the metrics hold the norm before clipping."""
    root, config = tiny
    model = GLM5(config)
    before = {name: value.clone() for name, value in model.named_parameters()}
    stage = Stage(
        name="s",
        loader=Loader(open_dataset(root / "train"), rows=2, length=32, seed=9),
        loss=lambda model, batch, counts: Loss(
            model(batch.input_ids_BT, attention="dense").logits.square().mean() * 1e3, {}
        ),
    )
    still = OptimizerConfig(name="adamw", lr=5e-3, weight_decay=0.0)
    settings = LoopConfig(steps=2, optimizer=still, clip_norm=1e-12, router_bias_rate=0.0)
    run = RunDirectory.start(tmp_path / "run", stage="s", config=settings, inputs={})
    train(stage, model, run, settings)
    assert max((value - before[name]).abs().max().item() for name, value in model.named_parameters()) < 1e-5
    assert run.read("metrics")[0]["grad_norm"] > 0.1
