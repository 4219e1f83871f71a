"""Runs on two processes against runs on one: every stage, stops and kills, another number of processes afterwards."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import StopAt, pretrain_config, same, state_of
from spawned import run

from glm5.errors import InputError
from glm5.optim import OptimizerConfig
from glm5.parallel import ParallelPlan
from glm5.parallel.mesh import world_rank
from glm5.train import DSAConfig, LoopConfig, RunDirectory, RunInterrupted, SFTConfig, SparseConfig, pretrain
from glm5.train.export import export_checkpoint
from glm5.train.job import perform
from glm5.train.stages import job_of, with_plan

TWO = ParallelPlan(data_shard=2)
CUT_EXPERTS = ParallelPlan(data_shard=2, expert=2)


def later_stages(tiny, parent):
    root, loop = tiny[0], {"steps": 3, "optimizer": OptimizerConfig(lr=1e-3), "evaluate_every": 2}
    shared = {"parent": parent, "rows": 4, "length": 32, "heldout_documents": 2}
    heldout = {"train_data": root / "train", "heldout_data": root / "heldout"}
    rates = LoopConfig(**loop, indexer_optimizer=OptimizerConfig(name="adamw", lr=1e-3))
    again = LoopConfig(**loop, micro_rows=1, checkpoint_activations=True)
    return [
        DSAConfig(**shared, **heldout, loop=LoopConfig(**loop)),
        SparseConfig(**shared, **heldout, loop=rates),
        SFTConfig(**shared, train_data=root / "chat", loop=again),
    ]


def finish(configs, plan, place):
    for i, config in enumerate(configs):
        perform(job_of(with_plan(config, plan)), place / str(i), resume=True)


def assert_near(one: RunDirectory, two: RunDirectory, tolerance=2e-4, without=frozenset()):
    """Equal up to the order of sums, which optimisers magnify."""
    first, second = one.read("metrics"), two.read("metrics")
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() - without == b.keys()
        for name, value in ((name, a[name]) for name in b):
            if name == "expert_load":  # a token between two experts may go either way
                for layer, counts in value.items():
                    moved = sum(abs(x - y) for x, y in zip(counts, b[name][layer], strict=True))
                    assert moved <= 0.02 * sum(counts), layer
                continue
            if name == "busiest_expert":
                assert b[name] == pytest.approx(value, rel=0.02)
                continue
            assert b[name] == (pytest.approx(value, rel=tolerance) if isinstance(value, float) else value), name
    a, b = state_of(one), state_of(two)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert (b[name] - value).norm() <= 0.02 * value.norm(), name


def test_every_later_stage_on_two_processes(tiny, straight, tmp_path):
    configs = later_stages(tiny, straight.path)
    finish(configs, ParallelPlan(), tmp_path / "one")
    run(2, finish, configs, CUT_EXPERTS, tmp_path / "two")
    for i in range(len(configs)):
        one, two = (RunDirectory.open(tmp_path / name / str(i)) for name in ("one", "two"))
        assert_near(one, two)
        assert two.finished and (two.path / "report.html").exists()


def stop_and_go_on(config, place):
    """Two runs of two processes: one straight, one stopped by a signal that one process gets."""
    perform(job_of(with_plan(config, TWO)), place / "straight")
    with pytest.MonkeyPatch.context() as patch:
        if world_rank() == 1:
            StopAt(patch, step=2)
        with pytest.raises(RunInterrupted):
            perform(job_of(with_plan(config, TWO)), place / "stopped")
    perform(job_of(with_plan(config, TWO)), place / "stopped", resume=True)


def test_two_processes_resume_to_the_bit_and_stop_together(tiny, tmp_path):
    run(2, stop_and_go_on, pretrain_config(tiny), tmp_path)
    straight, stopped = (RunDirectory.open(tmp_path / name) for name in ("straight", "stopped"))
    assert same(state_of(straight), state_of(stopped))
    assert (straight.path / "metrics.jsonl").read_bytes() == (stopped.path / "metrics.jsonl").read_bytes()
    assert len(stopped.description["sessions"]) == 1  # the same settings twice


def test_torchrun_killed_and_resumed_on_one_process_and_exported(tiny, tmp_path):
    """1 -> 2 -> 1: two steps on one process, then two by torchrun until a kill, the rest on one."""
    config = pretrain_config(tiny, steps=12, checkpoint_every=2, keep_checkpoints=99, evaluate_every=0)
    straight = pretrain(config, tmp_path / "straight")
    place = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        StopAt(patch, step=1)
        with pytest.raises(RunInterrupted):
            pretrain(config, place)
    flags = ["train", "--out", str(place), "--resume", "--parallel.data-shard", "2", "--parallel.expert", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", "-m", "glm5.cli.main", *flags]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        begun = time.monotonic()
        while process.poll() is None and not (place / "checkpoints" / "step-00000004").exists():
            if time.monotonic() - begun > 400:
                break
            time.sleep(0.02)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")  # each in a process group of its own
        for number in [process.pid, *map(int, workers.read_text().split())] if process.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        errors = process.communicate()[1].decode()
    run_ = RunDirectory.open(place)
    plans = [session["settings"]["parallel"]["data_shard"] for session in run_.description["sessions"]]
    assert plans == [1, 2], errors[-2000:]
    if run_.finished:
        pytest.skip("the machine was faster than the kill")
    again = pretrain(config, place, resume=True)
    assert_near(straight, again)
    assert export_checkpoint(place, tmp_path / "exported", step=4) == 4
    assert json.loads((tmp_path / "exported/config.json").read_text())["model_type"] == "glm_moe_dsa"
    assert export_checkpoint(place, tmp_path / "last") == 12
    for name in (file.name for file in again.model_directory.glob("*.safetensors")):
        assert (tmp_path / "last" / name).read_bytes() == (again.model_directory / name).read_bytes()


def test_a_plan_for_another_world_is_refused_before_anything_is_written(tiny, tmp_path):
    config = with_plan(pretrain_config(tiny), TWO)
    with pytest.raises(InputError, match="start 2 with `torchrun --nproc-per-node 2`"):
        perform(job_of(config), tmp_path / "run")
    assert not Path(tmp_path / "run").exists()
