"""Runs whose environments hang, break or lie: the run goes on, or says why it does not."""

import asyncio
import errno
import io
import threading
from collections import Counter
from contextlib import suppress

import pytest
from rich.console import Console
from scripted import Chat, ChatEpisode, FullDisk
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.envs import EpisodeLimits, GymEnvironment, Reward, SingleTurn, Task
from glm5.errors import RunError
from glm5.optim import OptimizerConfig
from glm5.rl import episode_task
from glm5.rl.admission import SchedulerConfig
from glm5.rl.asking import quoted
from glm5.rl.config import RLRunConfig
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.lockstep import train_in_lockstep
from glm5.rl.orchestrator import train_rl
from glm5.rl.rollout_config import RolloutConfig
from glm5.scoring import Grade

FAST = OptimizerConfig(name="adamw", lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(speaker_model(), directory, speaker_tokenizer())
    return directory


def config_of(parent, *, steps=2, scheduler=None, rollout=None, **changes):
    return RLRunConfig(
        parent=parent,
        steps=steps,
        rollout=RolloutConfig(**{"max_tokens": 6, "report_every": 2, **(rollout or {})}),
        scheduler=SchedulerConfig(**{"groups_per_batch": 2, "group_size": 4, "max_running": 24, **(scheduler or {})}),
        learner=LearnerConfig(optimizer=FAST, rows=8),
        **{"patience": 60.0, **changes},
    )


class Game:
    """A game of one move, rewarded for an "e"; `hang` is asked at each."""

    def __init__(self, hang=lambda: None):
        self.hang = hang

    def reset(self, *, seed):
        return "?", {}

    def step(self, action):
        self.hang()
        return "", float("e" in action), True, False, {}


def test_calls_that_hang_hold_up_neither_the_learner_nor_the_end(parent, tmp_path):
    release, waited, lock = threading.Event(), [], threading.Lock()
    left = [12]

    def hang():
        with lock:
            left[0] -= 1
            hangs = left[0] >= 0
        if hangs:
            waited.append(release.wait(300))

    environment = GymEnvironment("game", lambda: Game(hang), limits=EpisodeLimits(step_seconds=1.0))
    try:
        run = train_rl(config_of(parent), [environment], tmp_path / "run")
        assert run.finished and left[0] < 0 and not waited
    finally:
        release.set()


class Stubborn:
    """A coroutine that goes on when it is cancelled; released by a clock where a test would hang."""

    def __init__(self):
        self.released = False
        self.watchdog = threading.Timer(300, lambda: setattr(self, "released", True))
        self.watchdog.daemon = True
        self.watchdog.start()

    async def __call__(self, ticket=None):
        while not self.released:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.05)


def test_calls_that_cannot_be_cancelled_hold_up_neither_the_learner_nor_the_end(parent, tmp_path, monkeypatch):
    monkeypatch.setattr(episode_task, "GRACE", 0.1)
    stuck, left = Stubborn(), [12]

    class Stuck(ChatEpisode):
        async def step(self, message):
            left[0] -= 1
            if left[0] >= 0:
                await stuck()
            return await super().step(message)

    environment = Chat(reward=lambda said: len(said[-1]["content"] or "") % 2, limits=EpisodeLimits(step_seconds=1.0))
    environment.episode = lambda task: Stuck(environment, task)
    run = train_rl(config_of(parent), [environment], tmp_path / "run")
    stuck.watchdog.cancel()
    assert run.finished and left[0] < 0 and not stuck.released


def test_players_that_cannot_be_cancelled_do_not_hold_up_the_end(parent, tmp_path, monkeypatch):
    monkeypatch.setattr(episode_task, "END_SECONDS", 0.1)
    stuck = Stubborn()
    with pytest.raises(RunError, match="Nothing has moved"):
        train_rl(config_of(parent, patience=0.5), [Chat()], tmp_path / "run", player=stuck)
    stuck.watchdog.cancel()
    assert not stuck.released


class Tasks:
    """Tasks whose rewards `worth` tells from (index, how many of the task were scored before)."""

    def __init__(self, worth, name="tasks"):
        self.name, self.worth, self.scored, self.lock = name, worth, Counter(), threading.Lock()

    def task(self, seed, index):
        return Task(f"{self.name}/{seed}/{index}", ({"role": "user", "content": f"{index % 5}"},), "", "one")

    def score(self, task, response):
        with self.lock:
            before = self.scored[task.id]
            self.scored[task.id] += 1
        return Reward(float(self.worth(int(task.id.rsplit("/", 1)[1]), before)), Grade("correct", "said"))


def test_a_broken_environment_is_found_soon_and_with_its_reason(parent, tmp_path):
    mended = []

    def worth(index, before):
        if not mended:
            raise LookupError(f"no table\nof task {index}")
        return before % 2

    environment = SingleTurn(Tasks(worth))
    reason = r"The last 40 rollouts of tasks all failed, the newest with crash: score: LookupError"
    for number, train in enumerate((train_rl, train_in_lockstep)):
        log = io.StringIO()
        path = tmp_path / str(number)
        mended.clear()
        with pytest.raises(RunError, match=reason + ".*no table of task [0-9]+.*then resume the run"):
            train(config_of(parent), [environment], path, console=Console(file=log, width=500))
        assert sum(environment.questions.scored.values()) < 400
        environment.questions.scored.clear()
        if train is train_rl:
            assert log.getvalue().count("tasks: crash: score: LookupError: no table of task") == 1
        mended.append(True)
        assert train(config_of(parent), [environment], path, resume=True).finished


def test_a_failure_is_quoted_in_a_sentence():
    assert quoted("verifier: score:\n9 is not a number.") == "verifier: score: 9 is not a number"
    assert quoted("9" * 900 + " is not a number.") == "9" * 300 + "…"


def test_an_environment_that_always_fails_is_not_hidden_by_another(parent, tmp_path):
    def broken(index, before):
        raise LookupError("no table")

    environments = [SingleTurn(Tasks(lambda index, before: before % 2)), SingleTurn(Tasks(broken, "lost"))]
    for number, train in enumerate((train_rl, train_in_lockstep)):
        with pytest.raises(RunError, match=r"The last \d\d rollouts of lost all failed, the newest with crash: score"):
            train(config_of(parent, steps=60), environments, tmp_path / str(number))


def test_all_that_run_may_fail_together_once(parent, tmp_path):
    left = [36]  # more than run at once, as when a server is away for a moment

    def worth(index, before):
        left[0] -= 1
        if left[0] >= 0:
            raise LookupError("the server restarts")
        return before % 2

    run = train_rl(config_of(parent, scheduler={"max_attempts": 99}), [SingleTurn(Tasks(worth))], tmp_path / "run")
    assert run.finished and left[0] < 0


def test_tasks_that_taught_nothing_may_be_mended(parent, tmp_path):
    mended = []
    environment = SingleTurn(Tasks(lambda index, before: before % 2 if mended else 0.0))
    for number, train in enumerate((train_rl, train_in_lockstep)):
        mended.clear()
        config = config_of(parent, groups_in_vain=5)  # six run at once, and may all end in one turn of the loop
        with pytest.raises(RunError, match=r"the last ([5-9]|10) groups.*all wrong"):
            train(config, [environment], tmp_path / str(number))
        mended.append(True)
        assert train(config, [environment], tmp_path / str(number), resume=True).finished


def test_failures_between_scores_stop_nothing(parent, tmp_path):
    def worth(index, before):
        if before < 3 and index % 2:
            raise LookupError("flaky")
        return before % 2

    config = config_of(parent, steps=4, scheduler={"max_attempts": 9}, groups_in_vain=4)
    assert train_rl(config, [SingleTurn(Tasks(worth))], tmp_path / "run").finished


def test_rare_useful_groups_are_enough_to_go_on(parent, tmp_path):
    useful = lambda index, before: index % 7 == 0 and before % 2
    config = config_of(parent, scheduler={"groups_per_batch": 4, "group_size": 2, "max_running": 8}, groups_in_vain=12)
    for number, train in enumerate((train_rl, train_in_lockstep)):
        run = train(config, [SingleTurn(Tasks(useful))], tmp_path / str(number))
        assert all(sum(line["dropped"].values()) > 0 for line in run.read("metrics")) and run.finished


@pytest.mark.parametrize("mode", ["sync", "one-step-off"])
def test_a_run_of_empty_batches_does_not_end_as_if_it_had_learnt(parent, tmp_path, mode):
    config = config_of(parent, steps=3, scheduler={"mode": mode})
    nothing = r"Nothing could be learnt from the last \d groups.*all wrong; rewards: 0 \(\d+ times\)\). Take easier"
    for resume in (False, True):
        with pytest.raises(RunError, match=nothing):
            train_rl(config, [Chat(reward=lambda said: 0.0)], tmp_path / "short", resume=resume)
    assert not (tmp_path / "short" / "model").exists()
    config = config_of(parent, steps=300, scheduler={"mode": mode}, groups_in_vain=5)
    with pytest.raises(RunError, match=r"the last ([5-9]|10) groups.*all wrong"):
        train_rl(config, [Chat(reward=lambda said: 0.0)], tmp_path / "long")


@pytest.mark.parametrize("train", [train_rl, train_in_lockstep])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(parent, tmp_path, monkeypatch, train):
    environment = SingleTurn(Tasks(lambda index, before: before % 2))
    disk = FullDisk(monkeypatch, takes=100, word=b'"kind":"batch"')
    with pytest.raises(RunError, match=r"The disk refused to write in .*journal .No space left on device.*then resume"):
        train(config_of(parent), [environment], tmp_path / "run")
    disk.free()

    def refused(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "save", refused)
        with pytest.raises(RunError, match=r"The disk refused to write in .*no checkpoint was written yet"):
            train(config_of(parent), [environment], tmp_path / "run", resume=True)
    with monkeypatch.context() as patch:  # there is still no room, not even to note that it goes on
        patch.setattr("glm5.train.run_directory.write_json", refused)
        with pytest.raises(RunError, match=r"run cannot be written in .No space left on device.; .*same command again"):
            train(config_of(parent), [environment], tmp_path / "run", resume=True)
    run = train(config_of(parent), [environment], tmp_path / "run", resume=True)
    assert run.finished and [line["step"] for line in run.read("metrics")] == [0, 1]
