"""TensorBoard and trackio beside metrics.jsonl."""

import builtins
import sys

import pytest
from small_runs import StopAt, pretrain_config

from glm5.errors import ConfigError, RunError
from glm5.train import LoopConfig, RunInterrupted, pretrain
from glm5.train.watch import watchers


def test_tensorboard_holds_every_step_once(tiny, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = pretrain_config(tiny, watch=("tensorboard",))
    with monkeypatch.context() as patch:
        StopAt(patch, step=2)
        with pytest.raises(RunInterrupted):
            pretrain(config, tmp_path / "run")
    run = pretrain(config, tmp_path / "run", resume=True)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(line["step"], pytest.approx(line["loss"])) for line in run.read("metrics")]
    assert {"grad_norm", "tokens_per_second", "busiest_expert"} <= set(events.Tags()["scalars"])


def test_trackio_gets_the_numbers_of_a_step(tmp_path, monkeypatch):
    """A stand-in for the library: which calls are made."""
    calls = []

    class Library:
        @staticmethod
        def init(**settings):
            calls.append(("init", settings["project"], settings["name"], settings["resume"]))
            return Library

        @staticmethod
        def log(values, step):
            calls.append((step, values))

        @staticmethod
        def finish():
            calls.append("finish")

    monkeypatch.setitem(sys.modules, "trackio", Library)
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    (tmp_path / "chain" / "sft").mkdir(parents=True)
    with watchers(("trackio",), tmp_path / "chain" / "sft", 0) as write:
        write(3, {"step": 3, "loss": 1.5, "skipped": "why", "expert_load": {"1": [1]}, "grad_norm": None})
    assert calls == [("init", "chain", "sft", "allow"), (3, {"loss": 1.5}), "finish"]


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name):
    original = builtins.__import__

    def refuse(module, *rest):
        if module.split(".")[0] == name or module.endswith("utils.tensorboard"):
            raise ImportError(module)
        return original(module, *rest)

    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(RunError, match=rf"{name} is not installed; `pip install glm5\[watch\]`"):
        with watchers((name,), tmp_path, 0):
            pass


def test_a_misspelt_watcher():
    with pytest.raises(ConfigError, match=r"watch is 'tensorbord'; use 'tensorboard' or 'trackio'. Did you mean"):
        LoopConfig(steps=1, watch=("tensorbord",))
