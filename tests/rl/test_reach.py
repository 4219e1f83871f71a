"""Who samples, and where the weights go: a directory beside the run, servers of somebody else, the cache at a swap."""

import dataclasses
import json

import pytest
import torch
from live_server import live
from safetensors import SafetensorError
from scripted import Chat, brief_model
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.cli.main import main
from glm5.engine import Engine
from glm5.errors import ConfigError, WeightsError
from glm5.rl.adapters import LoRA
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.executors import engine_processes, engine_servers
from glm5.rl.learner import LearnerConfig
from glm5.rl.lockstep import train_in_lockstep
from glm5.rl.orchestrator import train_rl
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.weights import DirectorySubscriber
from glm5.rl.weights.directory import versions
from glm5.rl.weights.follow import Follower
from glm5.serve.app import create_app


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(brief_model(), directory, speaker_tokenizer())
    return directory


def letters():
    """Rewards that differ between answers."""
    return Chat(reward=lambda said: len(said[-1]["content"] or "") / 10)


def config_of(parent, *, steps=3, learner=None, **changes):
    return RLRunConfig(
        parent=parent, steps=steps, rollout=RolloutConfig(max_tokens=6), learner=LearnerConfig(rows=8, **learner or {}),
        scheduler=SchedulerConfig(groups_per_batch=2, group_size=2, max_running=8), **changes,
    )  # fmt: skip


def held_in(path):
    """The names and sizes of all files there."""
    return {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}


def weights_of(run):
    return glm5.load_model(run.model_directory, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_every_version_is_where_others_find_it(parent, tmp_path, lora):
    config = config_of(parent, learner={"lora": lora})
    run = train_rl(config, [letters()], tmp_path / "run", publish_to=tmp_path / "weights")
    follower = Engine(parent, num_blocks=8)
    snapshot = DirectorySubscriber(tmp_path / "weights").newest()
    follower.update_weights(snapshot.version, snapshot.tensors)  # as glm5 serve --weights-from does
    assert snapshot.version == 3 == follower.version
    assert all(torch.equal(tensor, snapshot.tensors[name]) for name, tensor in weights_of(run).items())
    follower.close()

    with pytest.raises(WeightsError, match=r"another run \(version 3\); publish to a new directory"):
        train_rl(config, [letters()], tmp_path / "other", publish_to=tmp_path / "weights")
    longer = train_rl(
        dataclasses.replace(config, steps=5), [letters()], run.path, publish_to=tmp_path / "weights", resume=True
    )
    snapshot = DirectorySubscriber(tmp_path / "weights").newest()
    assert snapshot.version == 5
    assert all(torch.equal(tensor, snapshot.tensors[name]) for name, tensor in weights_of(longer).items())


def test_a_resumed_run_leaves_the_weights_of_another_alone(parent, tmp_path):
    theirs = tmp_path / "theirs"
    train_rl(config_of(parent), [letters()], tmp_path / "other", publish_to=theirs)
    run = train_rl(config_of(parent, steps=1), [letters()], tmp_path / "run", publish_to=tmp_path / "ours")
    before = held_in(theirs)
    for path in (run.path, tmp_path / "new"):
        with pytest.raises(WeightsError, match=r"another run \(version 3\); publish to a new directory"):
            train_rl(config_of(parent, steps=2), [letters()], path, publish_to=theirs, resume=True)
    make = engine_servers(config_of(parent), ["http://127.0.0.1:9"], theirs, run.path)
    with pytest.raises(WeightsError, match="another run"):
        make(speaker_model(), speaker_tokenizer(), 1)
    assert held_in(theirs) == before
    (tmp_path / "run").rename(tmp_path / "moved")
    train_rl(config_of(parent, steps=2), [letters()], tmp_path / "moved", publish_to=tmp_path / "ours", resume=True)
    assert versions(tmp_path / "ours")[-1] == 2


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_a_disk_that_refuses_does_not_stop_the_run(parent, tmp_path, monkeypatch, caplog, error):
    def full(tensors, path):
        raise error("no space left")

    monkeypatch.setattr("glm5.rl.weights.directory.save_file", full)
    assert train_rl(config_of(parent, steps=1), [letters()], tmp_path / "run", publish_to=tmp_path / "w").finished
    assert "Version 1 was not written" in caplog.text and "no space left" in caplog.text
    assert versions(tmp_path / "w") == []


@pytest.mark.parametrize("choice", [True, False, None])
def test_the_cache_is_kept_or_computed_anew_by_choice(parent, tmp_path, monkeypatch, choice):
    seen, take = [], Engine.update_weights

    def noted(self, version, tensors, *, recompute=None):
        seen.append(recompute)
        take(self, version, tensors, recompute=recompute)

    monkeypatch.setattr(Engine, "update_weights", noted)
    config = config_of(parent, recompute=choice)
    for train in (train_rl, train_in_lockstep):
        train(config, [letters()], tmp_path / train.__name__)
        assert seen and set(seen) == {choice}
        seen.clear()
    assert engine_processes(config, 1)(speaker_model(), speaker_tokenizer(), 0)._executor.recompute is choice


def test_servers_sample_and_take_new_weights(parent, tmp_path, capsys):
    weights = tmp_path / "weights"
    weights.mkdir()
    engine = Engine(parent, num_blocks=64)
    follower = Follower(engine, weights, poll_seconds=0.05)
    with live(create_app(engine)) as url:
        status = main([
            "rl", "--parent", str(parent), "--env", "gym:spell_backward", "--out", str(tmp_path / "run"),
            "--steps", "3", "--rollout.max-tokens", "4", "--scheduler.groups-per-batch", "1",
            "--scheduler.group-size", "2",
            "--uniform-groups", "keep", "--learner.advantages", "reward", "--learner.loss", "ddis", "--executor",
            "servers", "--server", url, "--publish-to", str(weights), "--threads", "1", "--json",
        ])  # fmt: skip
        assert status == 0, capsys.readouterr().err
    follower.close(), engine.close()
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    assert engine.version == 3 == versions(weights)[-1]  # they go on without the run
    trained = glm5.load_model(tmp_path / "run" / "model", dtype=torch.float32).state_dict()
    assert all(torch.equal(t, trained[n]) for n, t in DirectorySubscriber(weights).newest().tensors.items())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["mismatch"] for line in lines if line["max_staleness"] == 0) < 1e-4


def test_what_servers_cannot_do_is_refused(parent, tmp_path):
    for changes, says in (
        ({"recompute": True}, "recompute"), ({"learner": {"lora": LoRA(rank=2)}}, "sync=merged"),
        ({"rollout": RolloutConfig(replay_experts=True)}, "experts"),
    ):  # fmt: skip
        config = dataclasses.replace(config_of(parent, learner=changes.pop("learner", None)), **changes)
        with pytest.raises(ConfigError, match=says):
            engine_servers(config, ["http://127.0.0.1:9"], tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--executor", "servers"], "--server URL together"),
        (["--server", "http://127.0.0.1:9"], "--server URL together"),
        (["--executor", "servers", "--server", "http://127.0.0.1:9"], "--publish-to"),
        (["--publish-to", "w", "--deterministic"], "--publish-to out"),
        (["--executor", "ray", "--ray", "auto", "--engines", "2", "--deterministic"], "one process"),
    ],
)
def test_options_that_do_not_go_together_are_refused(parent, tmp_path, capsys, more, says):
    assert main(["rl", "--parent", str(parent), "--env", "sums", "--out", str(tmp_path / "none"), *more]) == 1
    assert says in capsys.readouterr().err
