"""Deterministic mode: stale tokens and swaps inside sequences occur, and a killed run is the run that was not."""

import dataclasses
import random
import shutil
import time

import lockstep_runs
import pytest
from scripted import brief_model
from speaker import speaker_tokenizer

import glm5
from glm5.errors import ConfigError
from glm5.rl.concurrency import ConcurrencyConfig
from glm5.rl.event_log import events_of
from glm5.rl.journal import read_journal
from glm5.rl.lockstep import train_in_lockstep
from glm5.rl.losses import CISPO


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(brief_model(), directory, speaker_tokenizer())
    return directory


@pytest.fixture(scope="module")
def whole(parent, tmp_path_factory):
    """A run that nobody interrupts."""
    return lockstep_runs.run(parent, tmp_path_factory.mktemp("whole") / "run", resume=False)


def test_staleness_and_swaps_inside_sequences_occur(whole):
    lines = whole.read("metrics")
    assert max(line["max_staleness"] for line in lines) >= 2
    assert any(len(line["staleness"]) > 2 for line in lines)
    learnt = [
        trajectory for _, _, _, trajectories, _ in lockstep_runs.consumed(whole.path) for trajectory in trajectories
    ]
    swapped = [t for t in learnt if len({v for v, s in zip(t.versions, t.sampled, strict=True) if s}) > 1]
    assert len(swapped) > 3
    finished = [e.rollout for r in read_journal(whole.path / "journal") for e in events_of(r) if e.kind == "finished"]
    assert any(len(set(turn.versions)) > 1 for rollout in finished for turn in rollout.turns)
    assert any(len(rollout.turns) == 3 for rollout in finished)


def test_the_same_run_again_is_the_same(whole, parent, tmp_path):
    again = lockstep_runs.run(parent, tmp_path / "run", resume=False)
    assert lockstep_runs.fingerprint(again.path) == lockstep_runs.fingerprint(whole.path)
    assert (again.path / "journal").stat().st_size > 1000


def test_a_journal_cut_at_any_line_goes_on_to_the_same_end(whole, parent, tmp_path):
    """As if killed right behind each of some lines, with the checkpoints that were there then."""
    lines = (whole.path / "journal").read_bytes().splitlines(keepends=True)
    expected = lockstep_runs.fingerprint(whole.path)
    for cut in random.Random(0).sample(range(len(lines)), 4):
        path = tmp_path / f"run-{cut}"
        shutil.copytree(whole.path, path, ignore=shutil.ignore_patterns("model", "checkpoints", "report.html"))
        (path / "journal").write_bytes(b"".join(lines[:cut]))
        assert lockstep_runs.fingerprint(lockstep_runs.run(parent, path, resume=True).path) == expected, f"line {cut}"


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.soak)])
def test_a_run_killed_at_random_moments_is_the_same_run(whole, parent, tmp_path, kills):
    started = time.perf_counter()
    lockstep_runs.run(parent, tmp_path / "timed", resume=False)
    seconds = time.perf_counter() - started
    expected, died, number = lockstep_runs.fingerprint(whole.path), 0, 0
    while died < kills:
        path = tmp_path / f"killed-{number}"
        died += lockstep_runs.killed(lockstep_runs.run, parent, path, min(kills - died, 10), seconds, seed=number)
        assert lockstep_runs.fingerprint(path) == expected
        number += 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Talkative(CISPO):
    """Holds nearly all weights at a bound, and has a figure of its own by a name that the run has too."""

    epsilon_low: float = 0.0
    epsilon_high: float = 0.0

    def __call__(self, tokens):
        result = super().__call__(tokens)
        told = {**result.diagnostics, "truncated": result.diagnostics["capped"]}
        return dataclasses.replace(result, diagnostics=told)


def test_figures_of_the_loss_stand_beside_those_of_what_came_back(parent, tmp_path):
    config = lockstep_runs.config_of(parent, steps=2)
    config = dataclasses.replace(config, learner=dataclasses.replace(config.learner, loss=Talkative()))
    lines = train_in_lockstep(config, [lockstep_runs.chat()], tmp_path / "run").read("metrics")
    for line in lines:
        outcomes = line["outcomes"]
        assert line["truncated"] == outcomes.get("truncated", 0) / sum(outcomes.values())
        assert line["trained_truncated"] == line["capped"] and 0.5 < line["capped"] <= 1.001


def test_modes_that_it_cannot_order_are_refused(parent, tmp_path):
    config = lockstep_runs.config_of(parent)
    config = dataclasses.replace(config, scheduler=dataclasses.replace(config.scheduler, mode="sync"))
    with pytest.raises(ConfigError, match="asynchronous"):
        lockstep_runs.train_in_lockstep(config, [lockstep_runs.chat()], tmp_path / "run")
    config = dataclasses.replace(lockstep_runs.config_of(parent), concurrency=ConcurrencyConfig())
    with pytest.raises(ConfigError, match="leave concurrency out"):
        lockstep_runs.train_in_lockstep(config, [lockstep_runs.chat()], tmp_path / "run")
