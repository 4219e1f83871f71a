"""What a user can get wrong around a training run: one sentence each, and nothing is lost."""

import dataclasses
import errno
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import StopAt, pretrain_config, same, state_of

from glm5.data import BatchWarmup, Share, write_dataset
from glm5.data.shards import TokenDocument
from glm5.errors import ConfigError, DataError, GLM5Error, RunError
from glm5.text import Tokenizer
from glm5.train import (
    DSAConfig,
    LoopConfig,
    MidtrainConfig,
    Phase,
    RunDirectory,
    RunInterrupted,
    SFTConfig,
    SparseConfig,
    midtrain,
    pretrain,
    sft,
    train_sparse,
    warm_up_indexer,
)
from glm5.train.guards import SPIKE_WINDOW, skipped_in_a_row, unhealthy
from glm5.train.job import perform
from glm5.train.pretrain import random_model
from glm5.train.recorded import Difference, RunChanged
from glm5.train.run_directory import exclusive
from glm5.train.verify_resume import Kill, Verdict, verify_resume

LOOP = LoopConfig(steps=2)


@pytest.fixture
def root(tiny, tmp_path):
    """A copy of the datasets, to be spoilt."""
    return shutil.copytree(tiny[0], tmp_path / "data")


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "tokenizer"
    tokenizer = Tokenizer.train(["quite another text about ships and snow"] * 20, 300)
    tokenizer.save(path)
    return tokenizer


STAGES = [
    (midtrain, MidtrainConfig, {"phases": (Phase(length=32, rows=2, steps=2),)}),
    (warm_up_indexer, DSAConfig, {}),
    (train_sparse, SparseConfig, {}),
    (sft, SFTConfig, {}),
]


@pytest.mark.parametrize(("run", "config", "more"), STAGES, ids=["midtrain", "dsa1", "dsa2", "sft"])
def test_every_stage_that_has_a_parent(tiny, straight, root, other_tokenizer, tmp_path, run, config, more):
    def attempt(problem: str, kind: type[Exception] = GLM5Error, out: str = "out", **changes):
        values = {"parent": straight.path, "train_data": root / "train", "rows": 2, "length": 32, "loop": LOOP}
        with pytest.raises(kind, match=problem):
            run(config(**{**values, **more, **changes}), tmp_path / out)
        assert not (tmp_path / out / "metrics.jsonl").exists()

    attempt("neither a run nor a model directory", RunError, parent=tmp_path)
    attempt("no finished model yet; resume that run first", RunError, parent=unfinished(straight, tmp_path))
    attempt("is no token dataset|no manifest|not found|does not exist", DataError, train_data=tmp_path / "nothing")
    write_dataset(root / "foreign", [TokenDocument([1, 2, 3] * 50, 9)], other_tokenizer)
    attempt("tokenizer", DataError, train_data=root / "foreign")
    attempt("tokenizer", DataError, heldout_data=root / "foreign")
    attempt(
        "different tokenizers|tokenizer",
        DataError,
        train_data=(Share(path=root / "train"), Share(path=root / "foreign")),
    )
    attempt("a mixture of no datasets", DataError, train_data=())
    if run is midtrain:
        attempt("does not fill one row", DataError, phases=(Phase(length=50_000, rows=1, steps=2),))
        attempt("longer than the model's", ConfigError, phases=(Phase(length=10**7, rows=1, steps=2),))
    else:
        if run is not sft:  # conversations are never cut, so any fills a row
            attempt("does not fill one row", DataError, length=50_000)
        attempt("longer than the model's", ConfigError, length=10**7)
    corrupt(root / "train")
    attempt("train.*(damaged|hash|corrupt|SHA)", DataError)


def unfinished(straight, tmp_path):
    path = tmp_path / "unfinished"
    if not path.exists():
        shutil.copytree(straight.path, path)
        shutil.rmtree(path / "model")
    return path


def corrupt(dataset):
    shard = max((p for p in dataset.iterdir() if p.suffix != ".json"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


@pytest.fixture
def stopped(tiny, root, tmp_path, monkeypatch):
    """A stopped run on the copied data, and its configuration."""
    config = dataclasses.replace(
        pretrain_config(tiny), train_data=root / "train", heldout_data=root / "heldout", tokenizer=root / "tokenizer"
    )
    with monkeypatch.context() as patch:
        StopAt(patch, step=2)
        with pytest.raises(RunInterrupted):
            pretrain(config, tmp_path / "run")
    return config, tmp_path / "run"


@pytest.mark.parametrize(("change", "named"), [
    ({"rows": 3}, r"config.rows \(2, now 3\)"),
    ({"length": 48}, r"config.length \(32, now 48\)"),
    ({"mtp_weight": 0.1}, r"config.mtp_weight \(0.3, now 0.1\)"),
    ({"loop.seed": 6}, r"config.loop.seed \(5, now 6\)"),
    ({"loop.steps": 7}, r"config.loop.steps \(6, now 7\)"),
    ({"loop.micro_rows": 1}, r"config.loop.micro_rows \(None, now 1\)"),
])  # fmt: skip
def test_a_resumed_run_with_another_setting(stopped, change, named):
    config, path = stopped
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    ((name, value),) = change.items()
    if name.startswith("loop."):
        value = dataclasses.replace(config.loop, **{name.removeprefix("loop."): value})
        name = "loop"
    with pytest.raises(RunError, match=rf"another {named}; leave it unchanged, or start a new run"):
        pretrain(dataclasses.replace(config, **{name: value}), path, resume=True)
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_resumed_run_with_other_data(stopped, tiny, root):
    config, path = stopped
    shutil.rmtree(root / "train")
    shutil.copytree(tiny[0] / "heldout", root / "train")
    with pytest.raises(RunError, match=r"another inputs.train_data"):
        pretrain(config, path, resume=True)


def test_a_resumed_run_whose_parent_changed(tiny, straight, tmp_path, monkeypatch):
    parent = shutil.copytree(straight.path, tmp_path / "parent")
    config = SparseConfig(parent=parent, train_data=tiny[0] / "train", rows=2, length=32, loop=LoopConfig(steps=4))
    with monkeypatch.context() as patch:
        StopAt(patch, step=1)
        with pytest.raises(RunInterrupted):
            train_sparse(config, tmp_path / "run")
    settings = json.loads((parent / "model/config.json").read_text())
    (parent / "model/config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-3}))
    with pytest.raises(RunError, match="another parent"):
        train_sparse(config, tmp_path / "run", resume=True)


@pytest.mark.parametrize("when", ["a checkpoint", "a line of metrics", "the model"])
def test_a_full_disk(tiny, straight, tmp_path, monkeypatch, when):
    """Nothing whole is lost, and the run goes on exactly once there is space."""

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    append, save = RunDirectory.append, RunDirectory.save_checkpoint
    checkpoints = []

    def append_until_full(run, file, values):
        return (full if values["step"] == 3 else append)(run, file, values)

    def save_until_full(run, step, *args, **kwargs):
        """The disk fills up inside the second checkpoint."""
        checkpoints.append(step)
        with pytest.MonkeyPatch.context() as inner:
            if len(checkpoints) == 2:
                inner.setattr(torch, "save", full)
                inner.setattr("os.fsync", full)
            return save(run, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        if when == "a checkpoint":
            patch.setattr(RunDirectory, "save_checkpoint", save_until_full)
        elif when == "a line of metrics":
            patch.setattr(RunDirectory, "append", append_until_full)
        else:
            patch.setitem(perform.__globals__, "save_model", full)
        with pytest.raises(RunError, match=r"disk refused to write in .*No space.*step-0000000\d is whole.*resume"):
            pretrain(pretrain_config(tiny), tmp_path / "run")
    run = pretrain(pretrain_config(tiny), tmp_path / "run", resume=True)
    assert same(state_of(run), state_of(straight))
    assert (run.path / "metrics.jsonl").read_bytes() == (straight.path / "metrics.jsonl").read_bytes()
    assert not list((run.path / "checkpoints").glob("*.partial"))


def test_a_moved_tree_is_the_same_run(tiny, tmp_path):
    """Places may change; contents are compared by hash."""
    config = dataclasses.replace(pretrain_config(tiny), loop=dataclasses.replace(pretrain_config(tiny).loop, steps=2))
    pretrain(config, tmp_path / "run")
    moved = shutil.copytree(tiny[0], tmp_path / "elsewhere")
    again = dataclasses.replace(config, train_data=moved / config.train_data.name)
    assert pretrain(again, tmp_path / "run", resume=True).finished


def test_two_processes_do_not_train_one_run(tiny, tmp_path):
    config = pretrain_config(tiny)
    pretrain(dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=1)), tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    changed = dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=1, checkpoint_every=7))
    with exclusive(tmp_path / "run"):
        with pytest.raises(RunError, match="is being trained by another process"):
            pretrain(changed, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert pretrain(changed, tmp_path / "run", resume=True).finished
    assert (tmp_path / "run" / "run.json").read_bytes() != before


def test_a_run_is_locked_before_its_first_step(tiny, tmp_path, monkeypatch):
    """The model is made, and judged, before the loop begins."""
    config, tried = pretrain_config(tiny, steps=1), []

    def make(config):
        with pytest.raises(RunError, match="is being trained by another process"):
            pretrain(config, tmp_path / "run", resume=True)
        tried.append(config)
        return random_model(config)

    monkeypatch.setitem(pretrain.__globals__, "random_model", make)
    pretrain(config, tmp_path / "run")
    assert tried


def test_a_refusal_is_the_same_on_all_processes():
    error = RunChanged(Path("run"), Difference("config.rows", 1, 2))
    heard = pickle.loads(pickle.dumps(error))
    assert (str(heard), heard.path, heard.difference) == (str(error), error.path, error.difference)


@pytest.mark.parametrize("settings", [
    {"keep_best": "heldout_bits_per_bite"},
    {"keep_best": "heldout_bits_per_byte", "evaluate_every": 7, "checkpoint_every": 5},
])  # fmt: skip
def test_a_best_checkpoint_that_would_never_be_known(settings):
    with pytest.raises(ConfigError, match="keep_best"):
        LoopConfig(steps=2, **settings)


def test_a_warmup_that_phases_would_ignore(tmp_path):
    with pytest.raises(ConfigError, match="leave warmup out"):
        MidtrainConfig(
            parent=tmp_path, train_data=tmp_path, phases=(Phase(length=8, rows=2, steps=2),), loop=LOOP,
            warmup=BatchWarmup(start=1, steps=2),
        )  # fmt: skip


def test_a_level_that_stays_ends_the_skipping():
    """Skipped losses are not in the median, so a lasting shift would leave out every step to the end."""
    lines = [{"loss": 1.0}] * 3 + [{"loss": 9.0, "skipped": "loss jumped"}] * SPIKE_WINDOW
    assert skipped_in_a_row(lines) == SPIKE_WINDOW
    assert skipped_in_a_row([*lines, {"loss": 1.0}]) == 0
    said = str(unhealthy("loss jumped to 9", "sft", 23, 0, SPIKE_WINDOW))
    assert "20 steps before it were left out" in said and "spike_factor=None" in said


def test_a_proof_without_a_kill_proves_nothing(tiny, tmp_path):
    with pytest.raises(RunError, match="at least one"):
        verify_resume(pretrain_config(tiny), tmp_path / "proof", kills=0)
    same_hashes = {"metrics.jsonl": "0"}
    late = Kill(target=1, seconds_after=0.0, lines=2, finished=True)
    assert not Verdict((late,), same_hashes, same_hashes).proved
    assert Verdict((dataclasses.replace(late, finished=False),), same_hashes, same_hashes).proved
