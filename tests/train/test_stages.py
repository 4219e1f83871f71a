"""What each stage minimises and moves, against sums that are written out here."""

import pytest
import torch
from small_runs import state_of

from glm5.checkpoint import load_model
from glm5.data import IGNORED, Loader, open_dataset
from glm5.model import GLM5, initialize_
from glm5.optim import OptimizerConfig
from glm5.train import LoopConfig, SFTConfig, sft
from glm5.train.dsa import DSAConfig, indexer_loss, warm_up_indexer
from glm5.train.losses import language_loss


@pytest.fixture(scope="module")
def model(tiny):
    model = GLM5(tiny[1])
    initialize_(model, 0.3, seed=1)
    return model


def assert_report_before_model(run):
    """The model says that a run is finished, so all else must be there before it."""
    assert (run.path / "report.html").stat().st_mtime_ns < run.model_directory.stat().st_mtime_ns


def test_pretrain_minimises_the_weighted_sum_of_its_parts(tiny, model):
    batch = Loader(open_dataset(tiny[0] / "train"), rows=2, length=32, seed=0).batch(0)
    loss = language_loss(model, batch, attention="dense", mtp_weight=0.7, balance_weight=5.0)
    total = loss.parts["lm"] + 0.7 * loss.parts["mtp"] + 5.0 * loss.parts["balance"]
    torch.testing.assert_close(loss.total.detach(), total)
    assert min(part.item() for part in loss.parts.values()) > 0.5  # so that none could be left out unseen
    assert "mtp" not in language_loss(model, batch, attention="dense", mtp_weight=0.0, balance_weight=0.0).parts


def test_sft_learns_from_masked_targets_alone(tiny, straight, tmp_path):
    chat = tiny[0] / "chat"
    config = SFTConfig(
        parent=straight.path, train_data=chat, rows=4, length=64, balance_weight=2.0,
        loop=LoopConfig(steps=1, optimizer=OptimizerConfig(lr=1e-3), router_bias_rate=0.0),
    )  # fmt: skip
    run = sft(config, tmp_path / "sft")
    assert_report_before_model(run)
    line = run.read("metrics")[0]

    batch = Loader(open_dataset(chat), rows=4, length=64, seed=0, packing="keep_whole").batch(0)
    learned = batch.targets_BT != IGNORED
    assert 0 < learned.sum() < (batch.segment_ids_BT >= 0).sum() / 2
    parent = load_model(straight.model_directory, dtype=torch.float32)
    with torch.no_grad():
        logp = parent(batch.input_ids_BT, None, batch.segment_ids_BT, attention="dense").logits.log_softmax(-1)
    expected = -logp[learned].gather(-1, batch.targets_BT[learned][:, None]).mean().item()
    assert line["lm"] == pytest.approx(expected, rel=1e-5)
    assert line["loss"] == pytest.approx(expected + 2.0 * line["balance"], rel=1e-5) and line["balance"] > 0.5


def test_sft_runs_under_the_attention_that_it_is_given(tiny, model):
    batch = Loader(open_dataset(tiny[0] / "chat"), rows=2, length=64, seed=0, packing="keep_whole").batch(0)
    losses = [language_loss(model, batch, attention=form, balance_weight=0.0).total for form in ("dense", "sparse")]
    assert losses[0] != losses[1]


def test_the_indexer_learns_from_dense_attention(tiny, model):
    batch = Loader(open_dataset(tiny[0] / "train"), rows=2, length=64, seed=0).batch(0)
    batch = type(batch)(batch.input_ids_BT, batch.targets_BT, torch.zeros_like(batch.segment_ids_BT))  # above top-k
    found = indexer_loss(model, batch).total
    terms = {
        form: model(batch.input_ids_BT, attention=form, collect={"indexer_kl", "mtp"}).indexer_kl
        for form in ("dense", "sparse")
    }
    assert terms["dense"].keys() == {0, 1, 2}  # two layers and the MTP module
    dense, sparse = (sum(terms[form].values()) / 3 for form in ("dense", "sparse"))
    torch.testing.assert_close(found, dense)
    assert (dense - sparse).abs() > 0.01


def test_the_warm_up_moves_every_indexer_and_nothing_else(tiny, straight, tmp_path):
    root, _ = tiny
    config = DSAConfig(
        parent=straight.path, train_data=root / "train", heldout_data=root / "heldout", rows=2, length=32,
        heldout_documents=2,
        loop=LoopConfig(steps=20, optimizer=OptimizerConfig(name="adamw", lr=5e-3, weight_decay=0.1)),
    )  # fmt: skip
    run = warm_up_indexer(config, tmp_path / "dsa")
    assert_report_before_model(run)
    before, after = (load_model(path, dtype=torch.float32) for path in (straight.model_directory, run.model_directory))
    old = before.state_dict()
    moved = {name for name, value in after.state_dict().items() if not torch.equal(value, old[name])}
    assert moved and all(".indexer." in name for name in moved)
    assert {name.split(".self_attn")[0] for name in moved} == {"model.layers.0", "model.layers.1", "mtp.0"}
    states = [name.removeprefix("optimizer.") for name in state_of(run) if name.startswith("optimizer.")]
    owned = {name.rpartition(".")[0] for name in states}
    assert owned == {name for name, _ in before.named_parameters() if ".indexer." in name}
    batch = Loader(open_dataset(root / "train"), rows=8, length=32, seed=1).batch(0)
    for term in (0, 1, 2):
        kl = [
            m(batch.input_ids_BT, None, batch.segment_ids_BT, attention="dense", collect={"indexer_kl", "mtp"})
            .indexer_kl[term].item()
            for m in (before, after)
        ]  # fmt: skip
        assert kl[1] < kl[0], term
