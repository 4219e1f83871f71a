"""Mid-training and sparse training: what they minimise, what they move, and where gradients may not go."""

import contextlib
import dataclasses
import json

import pytest
import torch
from small_runs import StopAt, same, state_of

from glm5.checkpoint import load_model
from glm5.data import Batch, Loader, open_dataset
from glm5.errors import ConfigError
from glm5.model import GLM5, initialize_
from glm5.ops import reference
from glm5.ops.rotary import rotate, rotation
from glm5.optim import OptimizerConfig
from glm5.train import (
    DSAConfig,
    LoopConfig,
    MidtrainConfig,
    Phase,
    RunInterrupted,
    SparseConfig,
    midtrain,
    train_sparse,
    warm_up_indexer,
)
from glm5.train.losses import language_loss
from glm5.train.midtrain import midtrain_job


@pytest.fixture(scope="module")
def model(tiny):
    model = GLM5(tiny[1])
    initialize_(model, 0.3, seed=1)
    model.mtp_steps = 2
    return model


def midtrain_config(tiny, parent, **changes) -> MidtrainConfig:
    phases = (Phase(length=32, rows=3, steps=2), Phase(length=64, rows=2, steps=2))
    values = {
        "parent": parent, "train_data": tiny[0] / "train", "heldout_data": tiny[0] / "heldout",
        "heldout_documents": 2, "phases": phases, "rope_theta": 2.0, "mtp_steps": 2,
        "loop": LoopConfig(steps=4, seed=3, optimizer=OptimizerConfig(lr=1e-3)), **changes,
    }  # fmt: skip
    return MidtrainConfig(**values)


def sparse_config(tiny, parent, **loop) -> SparseConfig:
    settings = {"steps": 3, "optimizer": OptimizerConfig(lr=1e-3), **loop}
    settings.setdefault("indexer_optimizer", OptimizerConfig(name="adamw", lr=2e-3, weight_decay=0.0))
    return SparseConfig(
        parent=parent, train_data=tiny[0] / "train", heldout_data=tiny[0] / "heldout", rows=2, length=64,
        heldout_documents=2, mtp_steps=2, loop=LoopConfig(**settings),
    )  # fmt: skip


def one_document(tiny) -> Batch:
    """Rows longer than index_topk without borders, so that sparse attention leaves something out."""
    batch = Loader(open_dataset(tiny[0] / "train"), rows=2, length=48, seed=0).batch(0)
    return Batch(batch.input_ids_BT, batch.targets_BT, torch.zeros_like(batch.segment_ids_BT))


# ---- mid-training ---------------------------------------------------------------------------------------------------
def test_phases_follow_each_other(tiny, straight):
    job = midtrain_job(midtrain_config(tiny, straight.path))
    shapes = [tuple(job.stage.loader.batch(step).input_ids_BT.shape) for step in range(4)]
    assert shapes == [(3, 32), (3, 32), (2, 64), (2, 64)]
    again = Loader(open_dataset(tiny[0] / "train"), rows=2, length=64, seed=4).batch(1)
    assert torch.equal(job.stage.loader.batch(3).input_ids_BT, again.input_ids_BT)


def test_a_phase_may_have_data_of_its_own(tiny, straight):
    phases = (Phase(length=32, rows=3, steps=2), Phase(length=64, rows=2, steps=2, train_data=tiny[0] / "heldout"))
    job = midtrain_job(midtrain_config(tiny, straight.path, phases=phases))
    own = Loader(open_dataset(tiny[0] / "heldout"), rows=2, length=64, seed=4).batch(1)
    assert torch.equal(job.stage.loader.batch(3).input_ids_BT, own.input_ids_BT)
    plain = midtrain_job(midtrain_config(tiny, straight.path))
    assert torch.equal(job.stage.loader.batch(1).input_ids_BT, plain.stage.loader.batch(1).input_ids_BT)
    assert job.inputs["train_data of phase 1"] == open_dataset(tiny[0] / "heldout").sha256
    assert set(plain.inputs) == {"train_data", "heldout_data"}


def test_midtraining_changes_the_rotary_base_and_keeps_the_indexer(tiny, straight, tmp_path):
    run = midtrain(midtrain_config(tiny, straight.path), tmp_path / "run")
    before, after = (load_model(d, dtype=torch.float32) for d in (straight.model_directory, run.model_directory))
    assert (before.config.rope_theta, after.config.rope_theta) == (1e6, 2.0)
    old = before.state_dict()
    still = {name for name, value in after.state_dict().items() if torch.equal(value, old[name])}
    assert still == {name for name in old if ".indexer." in name}
    assert [line["tokens"] for line in run.read("metrics")] == [96, 96, 128, 128]
    kept = midtrain(midtrain_config(tiny, straight.path, rope_theta=None), tmp_path / "kept")
    assert load_model(kept.model_directory).config.rope_theta == 1e6
    assert [line["lm"] for line in run.read("metrics")] != [line["lm"] for line in kept.read("metrics")]


def test_phases_and_loop_must_agree(tiny, straight):
    with pytest.raises(ConfigError, match="the phases have 4 steps and the loop 5"):
        midtrain_config(tiny, straight.path, loop=LoopConfig(steps=5))


# ---- sparse training ------------------------------------------------------------------------------------------------
def test_the_kl_is_that_of_the_selected_keys(tiny, model):
    """KL construction: softmax of the index scores against the summed attention, both over the selection alone."""
    batch = one_document(tiny)
    output = model(batch.input_ids_BT, attention="sparse", collect={"indexer_kl", "selection", "mtp", "router"})
    loss = language_loss(
        model, batch, attention="sparse", mtp_weight=0.3, balance_weight=1e-4, indexer_weight=2.0
    )  # fmt: skip
    kl = torch.stack(list(output.indexer_kl.values())).mean()
    torch.testing.assert_close(loss.parts["indexer_kl"], kl.detach())
    expected = loss.parts["lm"] + 0.3 * loss.parts["mtp"] + 1e-4 * loss.parts["balance"] + 2.0 * kl.detach()
    torch.testing.assert_close(loss.total.detach(), expected)
    assert set(output.indexer_kl) == {0, 1, 2}

    attention = model.model.layers[0].self_attn
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(batch.input_ids_BT))
    c = model.config
    positions_BT = torch.arange(48).expand(2, 48)
    tables = [
        rotation(positions_BT, c.qk_rope_head_dim, c.rope_theta, torch.float32, interleaved=layout)
        for layout in (c.rope_interleave, c.indexer_rope_interleave)
    ]
    c_q = attention.q_a_layernorm(attention.q_a_proj(x))
    scores = reference.index_scores(*attention.indexer(x, c_q, tables[1]))
    chosen = output.selection[0]
    # where the selection is padded with -1, every visible key is in it, so the first one is too
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen.clamp(min=0), True)
    assert mask.sum(-1).max() == model.config.index_topk < 48
    p = _probabilities(model, attention, x, c_q, tables[0], mask).sum(2)
    p = p / p.sum(-1, keepdim=True)
    q = scores.masked_fill(~mask, -torch.inf).log_softmax(-1)
    by_hand = (p * (p.clamp(min=1e-30).log() - q.masked_fill(~mask, 0.0))).sum(-1).mean()
    torch.testing.assert_close(output.indexer_kl[0], by_hand, rtol=1e-4, atol=1e-5)


def _probabilities(model, attention, x, c_q, table, mask):
    """Softmax over the selected keys per head [B, T, H, S], in the expanded form."""
    c = model.config
    q = attention.q_b_proj(c_q).unflatten(-1, (c.num_attention_heads, c.qk_head_dim))
    q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
    latent, k_rope = attention.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
    kv = attention.kv_b_proj(attention.kv_a_layernorm(latent)).unflatten(-1, (c.num_attention_heads, -1))
    scores = torch.einsum("bthn,bshn->bths", q_nope, kv[..., : c.qk_nope_head_dim])
    rotated = rotate(k_rope.unsqueeze(2), table)[:, :, 0]
    scores = scores + torch.einsum("bthr,bsr->bths", rotate(q_rope, table), rotated)
    return (scores * c.qk_head_dim**-0.5).masked_fill(~mask[:, :, None], -torch.inf).softmax(-1)


def test_each_loss_stays_on_its_side(tiny, model):
    """Gradient boundary: the KL moves indexers alone, every other loss everything else alone."""
    batch = one_document(tiny)

    def touched(**weights) -> set[str]:
        model.zero_grad(set_to_none=True)
        language_loss(model, batch, attention="sparse", **weights).total.backward()
        return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}

    names = {name for name, _ in model.named_parameters()}
    indexers = {name for name in names if ".indexer." in name}
    without = touched(mtp_weight=0.3, balance_weight=1e-4)
    assert without == names - indexers
    with_kl = touched(mtp_weight=0.3, balance_weight=1e-4, indexer_weight=1.0)
    assert with_kl == names


def test_the_kl_leaves_the_model_s_gradient_alone(tiny, model):
    batch = one_document(tiny)
    grads = []
    for weight in (0.0, 1.0, 50.0):
        model.zero_grad(set_to_none=True)
        language_loss(model, batch, attention="sparse", mtp_weight=0.3, indexer_weight=weight).total.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if ".indexer." not in n})
    assert same(grads[0], grads[1]) and same(grads[1], grads[2])


def test_padding_counts_nowhere(tiny, model):
    """Query masking: rows with padding have the KL and the losses of their real tokens."""
    batch = one_document(tiny)
    ids, targets, segments = (x.clone() for x in (batch.input_ids_BT, batch.targets_BT, batch.segment_ids_BT))
    ids[:, 40:], segments[:, 40:], targets[:, 40:] = 0, -1, -100  # as the loader pads
    targets[:, 39] = -100
    padded = Batch(ids, targets, segments)
    short = Batch(ids[:, :40], targets[:, :40], segments[:, :40])
    weights = {"mtp_weight": 0.3, "balance_weight": 1.0, "indexer_weight": 1.0}
    a, b = (language_loss(model, x, attention="sparse", **weights).parts for x in (padded, short))
    assert a.keys() == b.keys() == {"lm", "mtp", "balance", "indexer_kl"}
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_both_learn_each_at_its_own_rate(tiny, straight, tmp_path):
    """A rate of (almost) nothing for one side leaves that side where it was."""
    slow = OptimizerConfig(name="adamw", lr=1e-30, weight_decay=0.0)
    run = train_sparse(sparse_config(tiny, straight.path, indexer_optimizer=slow, router_bias_rate=0.0), tmp_path / "a")
    other = train_sparse(sparse_config(tiny, straight.path, optimizer=slow, router_bias_rate=0.0), tmp_path / "b")
    old = load_model(straight.model_directory).state_dict()
    for found, still in ((run, True), (other, False)):
        for name, value in load_model(found.model_directory).state_dict().items():
            if "correction_bias" not in name:
                moved = bool((value - old[name]).abs().max() > 1e-20)
                assert moved == ((".indexer." in name) != still), name
    line = run.read("metrics")[0]
    assert {"lm", "mtp", "balance", "indexer_kl", "grad_norm", "indexer_grad_norm"} <= line.keys()
    assert line["loss"] == pytest.approx(
        line["lm"] + 0.3 * line["mtp"] + 1e-4 * line["balance"] + line["indexer_kl"], rel=1e-5
    )


def test_mtp_without_weight_is_frozen_nowhere_but_moves_nothing(tiny, straight, tmp_path):
    """MTP freezing: without its loss the module has no gradient; its indexer neither, as it never ran."""
    config = dataclasses.replace(sparse_config(tiny, straight.path), mtp_weight=0.0)
    run = train_sparse(config, tmp_path / "run")
    old, new = (load_model(d).state_dict() for d in (straight.model_directory, run.model_directory))
    assert all(torch.equal(old[name], new[name]) for name in old if name.startswith("mtp."))
    kinds = {(".indexer." in name, name.rpartition(".")[2]) for name in state_of(run) if name.startswith("optimizer.")}
    assert {kind for indexer, kind in kinds if indexer} == {"exp_avg", "exp_avg_sq", "step"}  # AdamW alone
    assert {kind for indexer, kind in kinds if not indexer} == {"exp_avg", "exp_avg_sq", "step", "momentum_buffer"}


def test_the_recall_of_the_indexer_is_written_down(tiny, straight, tmp_path):
    """Where there is held-out text of 8 x index_topk; the tiny held-out set is too short for it."""
    config = dataclasses.replace(sparse_config(tiny, straight.path), heldout_data=tiny[0] / "train")
    run = train_sparse(config, tmp_path / "run")
    found = json.loads((run.path / "evaluation.json").read_text())["indexer_recall"]
    assert found["length"] == 8 * found["index_topk"] == 128 and found["layers"].keys() == {"0", "1"}
    masses = [layer["mass"] for layer in found["layers"].values()]
    assert run.read("metrics")[-1]["indexer_recall"] == pytest.approx(sum(masses) / 2) and max(masses) <= 1.0
    assert "Indexer recall" in (run.path / "report.html").read_text()
    short = train_sparse(sparse_config(tiny, straight.path), tmp_path / "short")
    assert "indexer_recall" not in json.loads((short.path / "evaluation.json").read_text())


@pytest.mark.parametrize("stop", [(0, 0), (2, 2)])
def test_save_exit_and_relaunch_at_both_borders_of_the_sparse_stages(tiny, straight, tmp_path, monkeypatch, stop):
    """Megatron-LM issue 6392: dense -> warm-up -> sparse, stopped in the first and in the last step of each."""
    root, _ = tiny

    def chain(path, stops) -> tuple:
        warm = DSAConfig(
            parent=straight.path, train_data=root / "train", rows=2, length=48,
            loop=LoopConfig(steps=3, optimizer=OptimizerConfig(name="adamw", lr=5e-3), router_bias_rate=0.0),
        )  # fmt: skip
        runs = []
        for stage, config, step in (
            (warm_up_indexer, warm, stops[0]),
            (train_sparse, sparse_config(tiny, path / "dsa1"), stops[1]),
        ):
            where = path / ("dsa1" if stage is warm_up_indexer else "dsa2")
            if step is not None:
                with monkeypatch.context() as patch:
                    StopAt(patch, step)
                    with contextlib.suppress(RunInterrupted):  # the last step ends the loop by itself
                        stage(config, where)
            runs.append(stage(config, where, resume=step is not None))
        return tuple(runs)

    whole, parts = chain(tmp_path / "whole", (None, None)), chain(tmp_path / "parts", stop)
    for one, other in zip(whole, parts, strict=True):
        assert same(state_of(one), state_of(other))
        assert (one.path / "metrics.jsonl").read_bytes() == (other.path / "metrics.jsonl").read_bytes()
    assert whole[1].description["parent"] == parts[1].description["parent"]
