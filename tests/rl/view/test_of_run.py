"""A real run, seen afterwards: its report and the page of its rollouts hold what its journal holds."""

import copy
import io
import json
import os
import re
import shutil

import pytest
import torch
from rich.console import Console
from scripted import Chat
from speaker import speaker_model, speaker_tokenizer
from test_viewer import opened

import glm5
from glm5.cli.main import main
from glm5.engine import Engine
from glm5.envs import EnvironmentFailure, EpisodeLimits
from glm5.optim import OptimizerConfig
from glm5.rl import write_rl_report
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.event_log import events_of
from glm5.rl.fleet import InProcessFleet
from glm5.rl.journal import read_journal
from glm5.rl.learner import LearnerConfig
from glm5.rl.orchestrator import train_rl
from glm5.rl.report import reward_figure
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.view import snapshot_of, trainer_logprobs, view_run, watch_run
from glm5.train import RunDirectory


def reward(said):
    """Now and then the environment breaks."""
    text = said[-1]["content"] or ""
    if len(text) % 7 == 3:
        raise EnvironmentFailure("the zebra server is away", "unreachable")
    return float("e" in text)


def strict_fleet(model, tokenizer, version):
    return InProcessFleet([Engine(copy.deepcopy(model), tokenizer, strict=True, num_blocks=64, version=version)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four steps of two turns each; what the view said meanwhile is `run.said`."""
    directory = tmp_path_factory.mktemp("run")
    glm5.save_model(speaker_model(), directory / "parent", speaker_tokenizer())
    config = RLRunConfig(
        parent=directory / "parent",
        steps=4,
        rollout=RolloutConfig(max_tokens=6),
        scheduler=SchedulerConfig(groups_per_batch=2, group_size=4, max_running=12, max_staleness=2),
        learner=LearnerConfig(
            optimizer=OptimizerConfig(name="adamw", lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0), rows=5
        ),
        patience=60.0,
        watch=("tensorboard",),
    )
    chat = Chat({"role": "user", "content": "Again?"}, limits=EpisodeLimits(turns=2), reward=reward)
    console = Console(file=io.StringIO(), width=200)
    run = train_rl(config, [chat], directory / "run", make_fleet=strict_fleet, console=console)
    run.said = console.file.getvalue()
    return run


def test_the_page_holds_every_rollout_of_the_journal(run):
    events = [event for record in read_journal(run.path / "journal") for event in events_of(record)]
    finished = {event.rollout.id: event.rollout for event in events if event.kind == "finished"}
    page = (run.path / "rollouts.html").read_text()
    index, bodies = opened(page)
    assert index["rows"] and {row["id"] for row in index["rows"]} == finished.keys()
    fates = {event.ticket.id: event.kind for event in events if event.kind in ("dropped", "requeued")}
    for event in events:
        if event.kind == "batch":
            fates |= {ticket.id: "trained" for selection in event.selections for ticket in selection.tickets}
    assert {row["id"]: row["fate"] for row in index["rows"]} == {name: fates.get(name, "dropped") for name in finished}
    assert {row["because"] for row in index["rows"] if row["id"] not in fates} <= {"the run ended"}
    assert {"trained"} < {row["fate"] for row in index["rows"]}
    for row, body in zip(index["rows"], bodies, strict=True):
        assert row["tokens"] == sum(len(turn.output_ids) for turn in finished[row["id"]].turns)
        assert len(body["turns"]) == len(finished[row["id"]].turns)


def test_with_the_weights_that_sampled_the_ratio_is_zero_to_the_bit(run):
    events = [event for record in read_journal(run.path / "journal") for event in events_of(record)]
    rollouts = [event.rollout for event in events if event.kind == "finished"]
    first = [one for one in rollouts if one.num_sampled and set(one.versions) == {0}]
    assert first
    parent = glm5.load_model(run.path.parent / "parent", dtype=torch.float32)
    page = view_run(run.path, trainer=trainer_logprobs(parent, first, strict=True))
    index, bodies = opened(page.read_text())
    known = {one.id for one in first}
    gaps = [
        abs(trainer - logprob)
        for row, body in zip(index["rows"], bodies, strict=True)
        if row["id"] in known
        for path in body["paths"]
        for part in path
        if isinstance(part, dict)
        for trainer, logprob in zip(part["trainer"], part["logprobs"], strict=True)
    ]
    assert gaps and max(gaps) == 0.0


def test_tokens_have_the_ratio_that_the_trainer_saw(run):
    index, bodies = opened(view_run(run.path).read_text())
    assert index["ratios"]
    gaps = {}
    for row, body in zip(index["rows"], bodies, strict=True):
        parts = [part for path in body["paths"] for part in path if isinstance(part, dict)]
        assert all(("trainer" in part) == (row["fate"] == "trained") for part in parts)
        if row["fate"] == "trained":
            gaps.setdefault(row["step"], []).append(
                [abs(t - s) for part in parts for t, s in zip(part["trainer"], part["logprobs"], strict=True)]
            )
    for line in run.read("metrics"):  # that of the loss: every rollout weighs the same
        means = [sum(values) / len(values) for values in gaps[line["step"]]]
        assert sum(means) / len(means) == pytest.approx(line["mismatch"], rel=1e-3, abs=1e-7)
    for path in (run.path / "logprobs").iterdir():
        path.unlink()
    assert not opened(view_run(run.path).read_text())[0]["ratios"]


def test_a_run_is_followed_and_its_numbers_go_elsewhere_too(run, capsys):
    assert main(["rl", "--follow", str(run.path)]) == 0
    assert "step 4/4" in capsys.readouterr().err
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2, 3]
    assert {"trained_reward", "speed/tokens_per_second"} < set(events.Tags()["scalars"])


def test_the_report_adds_up(run):
    page = write_rl_report(run.path).read_text()
    metrics, speed = run.read("metrics"), run.read("speed")
    for title in ("Reward", "What became of the samples", "The bubble", "Trainer, sampler, entropy"):
        assert f"<h2>{title}</h2>" in page, title
    assert ("<h2>Staleness</h2>" in page) == any(int(age) for line in metrics for age in line["staleness"])
    assert 'href="rollouts.html"' in page and "<script" not in page
    table = dict(re.findall(r"<tr><td>([^<]*)</td><td class=number>([\d,]+)</td></tr>", page))
    assert int(table["trained"]) == sum(line["trained"] for line in metrics)
    failed = sum(line["outcomes"].get("env_failure", 0) for line in metrics)
    assert int(table.get("ended: env_failure", 0)) == failed
    idle = sum(line["trainer_idle"] * line["seconds"] for line in speed) / sum(line["seconds"] for line in speed)
    assert f"the trainer was idle {idle:.0%} of the time" in page


def test_the_view_said_a_line_for_every_step(run):
    said = {}  # a failure between two steps has a line of its own, behind that of the step before
    for line in run.said.splitlines():
        if step := re.match(r"step ([1-4])/4 ", line):
            said.setdefault(int(step[1]), re.search(r"reward (\S+)", line)[1])
    expected, newest = {}, "yet"
    for line in run.read("metrics"):  # where nothing was scored since the step before, its reward still stands there
        newest = newest if line["reward"] is None else f"{line['reward']:.3f}"
        expected[line["step"] + 1] = newest
    assert said == expected


def test_a_run_can_be_watched_from_elsewhere(run):
    snapshot = snapshot_of(RunDirectory.open(run.path))
    metrics = run.read("metrics")
    assert (snapshot.step, snapshot.steps, snapshot.mode, snapshot.staleness_bound) == (4, 4, "async", 2)
    assert snapshot.rewards == tuple(line["reward"] for line in metrics if line["reward"] is not None)
    assert snapshot.trained == sum(line["trained"] for line in metrics)
    console = Console(file=io.StringIO(), width=200)
    watch_run(run.path, console)
    last = next(line for line in run.said.splitlines(keepends=True) if line.startswith("step 4/4 "))
    assert console.file.getvalue() == last  # behind it may be a failure that came together with it


def test_a_run_that_writes_nothing_any_more_says_so(run, tmp_path, monkeypatch):
    for name in ("run.json", "metrics.jsonl"):  # as of a run that was killed
        os.utime(shutil.copy(run.path / name, tmp_path), (0, 0))
    looks = iter([None, KeyboardInterrupt])
    monkeypatch.setattr("glm5.rl.view.watch.time.sleep", lambda seconds: _raise(next(looks)))
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(KeyboardInterrupt):
        watch_run(tmp_path, console)
    (line,) = console.file.getvalue().splitlines()
    assert re.search(r"nothing was written since \S+ on \d\d \S+; .* `glm5 rl --resume --out \S+` goes on$", line)


def _raise(error):
    if error is not None:
        raise error


def test_staleness_is_drawn_as_shares(run, tmp_path):
    other = RunDirectory.start(tmp_path / "run", stage="rl", config={}, inputs={}, parent="", resume=False)
    for step, staleness in enumerate([{"0": 4}, {"0": 1, "2": 3}]):
        line = {"step": step, "reward": 0.5, "sampled": 4, "trained": 4, "requeued": 0, "dropped": {"stale": 2}}
        other.append("metrics", {**line, "staleness": staleness})
    page = write_rl_report(other.path).read_text()
    assert "Mean 0.75 versions, at most 2." in page and "row 2, step 1: 0.75" in page and "row 0, step 0: 1.00" in page
    assert "The bubble" not in page and "rollouts.html" not in page
    assert "waited to be learnt from" not in write_rl_report(other.path).read_text()
    other.model_directory.mkdir()
    (other.model_directory / "config.json").write_text("{}")
    assert "waited to be learnt from" not in write_rl_report(other.path).read_text()  # there is no journal
    assert json.loads((other.path / "run.json").read_text())["stage"] == "rl"


def test_the_curve_of_a_long_run_is_no_larger_than_that_of_a_short_one():
    lines = [{"step": step, "reward": step % 2} for step in range(20_000)]
    figure = reward_figure(lines)
    assert figure.count("<circle") <= 600 and len(figure) < 60_000
    assert "the samples of 34 steps" in figure and ">19999<" in figure
    assert reward_figure(lines[:100]).count("<circle") == 100 and "samples of a step;" in reward_figure(lines[:100])
