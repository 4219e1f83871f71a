"""What a stopped run can go on from: spikes, lost lines, damaged checkpoints, a kill at the very end."""

import os
import shutil

import pytest
import torch
from small_runs import StopAt, pretrain_config, same, state_of

from glm5.errors import RunError
from glm5.optim import OptimizerConfig
from glm5.train import RunDirectory, RunInterrupted, guards, pretrain
from glm5.train.job import perform


@pytest.fixture
def stopped(tiny, tmp_path, monkeypatch):
    """A run stopped behind step 3 of 6, with the checkpoints of steps 2 and 3."""
    with monkeypatch.context() as patch:
        StopAt(patch, step=2)
        with pytest.raises(RunInterrupted):
            pretrain(pretrain_config(tiny), tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    assert [p.name for p in run.checkpoints()] == ["step-00000002", "step-00000003"]
    return run


def assert_equal(run, other):
    assert same(state_of(run), state_of(other))
    assert (run.path / "metrics.jsonl").read_bytes() == (other.path / "metrics.jsonl").read_bytes()


def test_after_a_spike_the_run_goes_on_as_its_sentence_says(tiny, straight, tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "SPIKE_WINDOW", 3)
    monkeypatch.setattr(guards.statistics, "median", lambda values: next(iter(values)) / 4)
    with pytest.raises(RunError, match="look at it, then resume with spike_factor=None to let it pass, or on_spike"):
        pretrain(pretrain_config(tiny), tmp_path / "run")
    again = pretrain(pretrain_config(tiny, spike_factor=None, keep_checkpoints=9), tmp_path / "run", resume=True)
    assert_equal(again, straight)
    notes = [session["settings"] for session in again.description["sessions"]]
    assert [(note["spike_factor"], note["keep_checkpoints"]) for note in notes] == [(3.0, 2), (None, 9)]
    assert len(again.checkpoints()) >= 2
    changed = pretrain_config(tiny, optimizer=OptimizerConfig(lr=1e-3))
    with pytest.raises(RunError, match=r"another config.loop.optimizer.lr"):
        pretrain(changed, again.path, resume=True)


def test_lines_are_on_the_disk_before_the_checkpoint(tmp_path, monkeypatch):
    run = RunDirectory.start(tmp_path / "run", stage="s", config={}, inputs={})
    run.append("metrics", {"step": 0})
    run.append("speed", {"step": 0})
    synced = []
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), original(handle)))
    run.save_checkpoint(1, torch.nn.Linear(2, 2), [])
    files = [run.path / "metrics.jsonl", run.path / "speed.jsonl", run.checkpoints()[-1] / "__0_0.distcp"]
    order = [synced.index(file.stat().st_ino) for file in files]
    assert max(order[:2]) < order[2]


def test_a_run_that_lost_lines_says_so_and_goes_on_from_an_older_checkpoint(tiny, straight, stopped):
    metrics = stopped.path / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    before = metrics.read_bytes()
    with pytest.raises(RunError, match=r"lacks lines of the 3 steps before the newest checkpoint; restore it, remove"):
        pretrain(pretrain_config(tiny), stopped.path, resume=True)
    assert metrics.read_bytes() == before
    shutil.rmtree(stopped.checkpoints()[-1])
    assert_equal(pretrain(pretrain_config(tiny), stopped.path, resume=True), straight)


def test_a_damaged_checkpoint_is_refused_and_the_older_one_named(tiny, straight, stopped):
    newest = stopped.checkpoints()[-1]
    data = bytearray((newest / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "__0_0.distcp").write_bytes(data)
    with pytest.raises(RunError, match="step-00000003 is damaged; remove that directory to resume from step-00000002"):
        pretrain(pretrain_config(tiny), stopped.path, resume=True)
    shutil.rmtree(newest)
    assert_equal(pretrain(pretrain_config(tiny), stopped.path, resume=True), straight)


def test_the_only_checkpoint_damaged(tiny, stopped):
    old, newest = stopped.checkpoints()
    shutil.rmtree(old)
    (newest / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="step-00000003 is damaged; remove that directory to resume from the beginning"):
        pretrain(pretrain_config(tiny), stopped.path, resume=True)


def test_a_finished_run_has_its_report(tiny, tmp_path, monkeypatch):
    """A kill while the report is written leaves a run that is not finished."""
    with monkeypatch.context() as patch:
        patch.setitem(perform.__globals__, "write_report", lambda path: path.died)
        with pytest.raises(AttributeError):
            pretrain(pretrain_config(tiny, steps=2), tmp_path / "run")
    run = pretrain(pretrain_config(tiny, steps=2), tmp_path / "run", resume=True)
    assert run.finished and (run.path / "report.html").exists()
