"""Held-out reward on the way: measured when it is due, of the weights of that version, and seen everywhere."""

import asyncio
import json

import pytest
import torch
from rich.console import Console
from scripted import Chat, brief_model
from speaker import speaker_tokenizer

import glm5
from glm5.cli.main import main
from glm5.cli.rl_environments import named_environment
from glm5.engine import Engine
from glm5.envs import EnvironmentFailure, EpisodeLimits
from glm5.rl import runner
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.held_out import OTHER_SEED, HeldOut, held_out_rewards
from glm5.rl.learner import LearnerConfig
from glm5.rl.lockstep import train_in_lockstep
from glm5.rl.orchestrator import train_rl
from glm5.rl.records import Ticket
from glm5.rl.retention import forgetting
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.runner import play
from glm5.rl.view import snapshot_of
from glm5.rl.view.live import line, render


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(brief_model(), directory, speaker_tokenizer())
    return directory


def length(said):
    """Differs between answers."""
    return len(said[-1]["content"] or "") / 10


class Unseen(Chat):
    """Keeps which tasks were asked for."""

    def __init__(self, **options):
        super().__init__(reward=length, **options)
        self.name, self.asked = "unseen", []

    def task(self, seed, index):
        self.asked.append((seed, index))
        return super().task(seed, index)


def config_of(parent, **changes):
    return RLRunConfig(
        parent=parent, steps=4, rollout=RolloutConfig(seed=7, max_tokens=8), held_out=HeldOut(tasks=5, every=2),
        scheduler=SchedulerConfig(groups_per_batch=2, group_size=2, max_running=8), learner=LearnerConfig(rows=8),
        **changes,
    )  # fmt: skip


def test_it_is_measured_when_due_and_at_the_end_and_shown(parent, tmp_path):
    environment = Unseen()
    run = train_rl(config_of(parent), [Chat(reward=length)], tmp_path / "run", held_out=[environment])
    assert not (run.path / "samples").exists()  # they are in the journal
    lines = run.read("metrics")
    assert ["retention/unseen/reward" in line for line in lines] == [True, False, True, False]
    rounds = [sorted(environment.asked[first : first + 5]) for first in (0, 5, 10)]  # threads ask in any order
    assert rounds == [[(7 + OTHER_SEED, index) for index in range(5)]] * 3 and len(environment.asked) == 15
    last = json.loads((run.path / "retention.json").read_text())
    assert last["version"] == 4

    engine = Engine(glm5.load_model(run.model_directory, dtype=torch.float32), speaker_tokenizer(), strict=True)
    sampling = RolloutConfig(seed=7 + OTHER_SEED, max_tokens=8)
    alone = [asyncio.run(play(Ticket("unseen", i), environment, engine, sampling)).reward.value for i in range(5)]
    assert last["retention/unseen/reward"] == pytest.approx(sum(alone) / 5)
    assert "unseen/reward" in forgetting(lines)

    page = (run.path / "report.html").read_text()
    assert "Held-out rewards, by version" in page and f"{last['retention/unseen/reward']:.3f}" in page
    snapshot = snapshot_of(run)
    first, now = snapshot.held["unseen/reward"]
    assert (first, now) == tuple(lines[i]["retention/unseen/reward"] for i in (0, 2))
    console = Console(record=True, width=110)
    console.print(render(snapshot))
    assert "held out" in console.export_text() and f"unseen/reward {now:.3f}" in line(snapshot)


def test_a_deterministic_run_measures_the_same_inside_its_loop(parent, tmp_path):
    values = [
        train(config_of(parent), [Chat(reward=length)], tmp_path / train.__name__, held_out=[Unseen()]).read("metrics")
        for train in (train_rl, train_in_lockstep)
    ]
    assert values[0][0]["retention/unseen/reward"] == values[1][0]["retention/unseen/reward"]  # both of version 0


class Slow(Unseen):
    """Every one of its methods takes longer than its limits allow."""

    def __init__(self):
        super().__init__(limits=EpisodeLimits(seconds=1e-6, step_seconds=1e-6))


def test_no_clock_is_in_what_a_deterministic_run_measures(parent, tmp_path):
    lines = [
        train(config_of(parent), [Chat(reward=length)], tmp_path / train.__name__, held_out=[Slow()]).read("metrics")
        for train in (train_rl, train_in_lockstep)
    ]
    assert lines[0][0]["retention/unseen/unscored"] == 1.0
    assert "retention/unseen/reward" in lines[1][0] and "retention/unseen/unscored" not in lines[1][0]


def test_a_resumed_run_may_measure_otherwise(parent, tmp_path):
    run = train_rl(config_of(parent), [Chat(reward=length)], tmp_path / "run", held_out=[Unseen()])
    config = RLRunConfig(**{**vars(config_of(parent)), "steps": 6, "held_out": HeldOut(tasks=5, every=5)})
    longer = train_rl(config, [Chat(reward=length)], run.path, resume=True, held_out=[Unseen()])
    measured = ["retention/unseen/reward" in line for line in longer.read("metrics")]
    assert measured == [True, False, True, False, False, True]


def test_failures_are_no_rewards():
    broken = Unseen(broken="score")
    retention = held_out_rewards([broken], speaker_tokenizer(), HeldOut(tasks=3), RolloutConfig(max_tokens=4), "sparse")
    assert retention.measure(brief_model()) == {"retention/unseen/unscored": 1.0}
    assert held_out_rewards([], speaker_tokenizer(), HeldOut(), RolloutConfig(), "sparse") is None


def test_a_server_that_is_away_is_not_waited_for_inside_the_learner(monkeypatch):
    def waited(seconds):
        assert seconds == 0, "the learner would wait through an outage"
        return iter(())

    class Away(Unseen):
        def meet(self, what):
            raise EnvironmentFailure("ws://there cannot be reached", "unreachable")

    monkeypatch.setattr(runner, "pauses", waited)
    retention = held_out_rewards([Away()], speaker_tokenizer(), HeldOut(tasks=3), RolloutConfig(max_tokens=4), "sparse")
    assert retention.measure(brief_model()) == {"retention/unseen/unscored": 1.0}


def test_the_command_line_takes_the_other_split(parent, tmp_path, capsys):
    assert named_environment("sums", split="heldout").environment.name == "sums/heldout/2"
    assert "/heldout" in named_environment("gym:chain_sum", split="heldout").environment.name
    assert named_environment("calculator", split="heldout").environment.questions.split == "heldout"
    status = main([
        "rl", "--parent", str(parent), "--env", "gym:spell_backward", "--held-out-env", "sums", "--out",
        str(tmp_path / "run"), "--steps", "1", "--rollout.max-tokens", "4", "--scheduler.groups-per-batch", "1",
        "--scheduler.group-size", "2", "--uniform-groups", "keep", "--held-out.tasks", "2", "--threads", "1", "--json",
    ])  # fmt: skip
    [first] = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = json.loads((tmp_path / "run" / "retention.json").read_text())
    values = [of["retention/sums/heldout/2/reward"] for of in (first, last)]
    assert status == 0 and json.loads(capsys.readouterr().out)["held_out"] == {
        "sums/heldout/2/reward": [[0, values[0]], [1, values[1]]]
    }
    assert main(["rl", "--resume", "--out", str(tmp_path / "run"), "--threads", "1"]) == 0
    assert (
        "held out: sums/heldout/2/reward {:.3f} at version 0, {:.3f} at version 1".format(*values)
        in capsys.readouterr().out
    )
