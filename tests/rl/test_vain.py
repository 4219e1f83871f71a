"""Groups that teach nothing: a task that is learnt ends its run as finished, anything else as an error that goes on."""

import io
import json
import shutil
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.cli.rl import summarise
from glm5.envs import Reward, SingleTurn, Task
from glm5.envs.rewards import rewarded
from glm5.optim import OptimizerConfig, Schedule
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.event_log import events_of
from glm5.rl.events import Accepted, Dropped, Finished, Selection
from glm5.rl.journal import read_journal
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.learnt import Learnt
from glm5.rl.lockstep import train_in_lockstep
from glm5.rl.orchestrator import train_rl
from glm5.rl.records import Rollout, Ticket
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.tasks import TaskSource
from glm5.rl.vain import NothingLearnt, Vain
from glm5.rl.view import History
from glm5.scoring import Grade
from glm5.train import RunDirectory

FAST = OptimizerConfig(name="adamw", lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(speaker_model(), directory, speaker_tokenizer())
    return directory


def config_of(parent, **changes):
    return RLRunConfig(
        parent=parent,
        rollout=RolloutConfig(max_tokens=4, report_every=2),
        scheduler=SchedulerConfig(groups_per_batch=2, group_size=4, max_running=8),
        **{"steps": 20, "groups_in_vain": 5, "learner": LearnerConfig(optimizer=FAST, rows=8), **changes},
    )


class Course:
    """Tasks before number `mastered` teach; the samples of later ones all get `then`, for an answer of that grade."""

    name = "course"

    def __init__(self, mastered=0, then=1.0, grade="correct"):
        self.mastered, self.then, self.grade = mastered, then, grade
        self.scored = {}

    def task(self, seed, index):
        return Task(f"{index}", ({"role": "user", "content": f"{index % 5}"},), "", "one")

    def score(self, task, response):
        self.scored[task.id] = self.scored.get(task.id, 0) + 1
        if int(task.id) < self.mastered:
            right = self.scored[task.id] % 2
            return Reward(float(right), Grade("correct" if right else "incorrect", ""))
        return Reward(self.then, Grade(self.grade, ""))


def weights_of(directory):
    return glm5.load_model(directory, dtype=torch.float32).state_dict()


def drops_of(run):
    return sum(e.kind == "dropped" for record in read_journal(run.path / "journal") for e in events_of(record))


@pytest.mark.parametrize("train", [train_rl, train_in_lockstep])
def test_a_task_that_is_learnt_ends_its_run_as_finished(parent, tmp_path, train):
    log, environment = io.StringIO(), [SingleTurn(Course(mastered=6))]
    run = train(config_of(parent), environment, tmp_path / "run", console=Console(file=log, width=500))
    steps, learnt = len(run.read("metrics")), json.loads((run.path / "learnt.json").read_text())
    assert run.finished and 1 <= steps <= 3 and learnt["step"] == steps and learnt["steps"] == 20
    sentence = f"All of the last {learnt['groups']} groups were right (rewards: 1 ({learnt['rewards']['1']} times)): "
    sentence += f"the task is learnt; stopped after step {steps} of 20."
    assert learnt["sentence"] == sentence and sentence in log.getvalue() and learnt["groups"] >= 5
    assert sentence in (run.path / "report.html").read_text()
    assert any(not w.equal(weights_of(parent)[n]) for n, w in weights_of(run.model_directory).items())
    assert run.checkpoints()[-1].name == f"step-{steps:08d}"

    # Resumed, it is finished; killed before its model was there, it ends at once; asked for more steps, it goes on.
    drops, before = drops_of(run), weights_of(run.model_directory)
    log.truncate(0)
    assert train(config_of(parent), environment, run.path, resume=True, console=Console(file=log, width=500)).finished
    assert f"is finished: {sentence} --steps with more" in log.getvalue() and drops_of(run) == drops
    shutil.rmtree(run.model_directory)
    train(config_of(parent), environment, run.path, resume=True)
    assert drops_of(run) == drops and all(w.equal(before[n]) for n, w in weights_of(run.model_directory).items())
    train(config_of(parent, steps=30), environment, run.path, resume=True)
    assert drops_of(run) >= drops + 20 and "of 30." in (run.path / "learnt.json").read_text()
    assert (run.path / f"model-{steps}").exists()


def test_a_parent_that_knows_it_all_is_the_result(parent, tmp_path):
    run = train_rl(config_of(parent), [SingleTurn(Course())], tmp_path / "run", publish_to=tmp_path / "weights")
    assert run.finished and run.read("metrics") == [] and "stopped after step 0 of 20" in report_of(run)
    assert all(w.equal(weights_of(parent)[n]) for n, w in weights_of(run.model_directory).items())


def watched(monkeypatch):
    """Where the `Vain` of a run will be."""
    vains, init = [], Vain.__init__

    def begin(self, *arguments):
        vains.append(self)
        init(self, *arguments)

    monkeypatch.setattr(Vain, "__init__", begin)
    return vains


def wait(vains):
    """Until the newest one is full, or ten minutes."""
    for _ in range(30_000):
        if vains[-1].full:
            return
        time.sleep(0.02)


@pytest.fixture
def slow_learner(monkeypatch):
    """Steps take until the run is full of what teaches nothing. Gives what raises in them, if anything."""
    vains, broken, step = watched(monkeypatch), [], Learner.step

    def slow(self, batch):
        wait(vains)
        if broken:
            raise broken.pop()
        return step(self, batch)

    monkeypatch.setattr(Learner, "step", slow)
    return broken


def test_what_waits_to_be_learnt_from_is_learnt_from_before_the_end(parent, tmp_path, slow_learner):
    wide = SchedulerConfig(groups_per_batch=2, group_size=4, max_running=8, max_staleness=6)
    run = train_rl(replace(config_of(parent), scheduler=wide), [SingleTurn(Course(mastered=6))], tmp_path / "run")
    assert run.finished and len(run.read("metrics")) == 3
    assert json.loads((run.path / "learnt.json").read_text())["step"] == 3


def test_a_batch_that_was_handed_out_before_a_crash_is_learnt_from_before_the_end(parent, tmp_path, slow_learner):
    slow_learner.append(MemoryError("of the learner"))
    with pytest.raises(MemoryError):
        train_rl(config_of(parent), [SingleTurn(Course(mastered=2))], tmp_path / "run")
    run = train_rl(config_of(parent), [SingleTurn(Course(mastered=2))], tmp_path / "run", resume=True)
    assert run.finished and [line["trained"] for line in run.read("metrics")] == [8]
    assert any(not w.equal(weights_of(parent)[n]) for n, w in weights_of(run.model_directory).items())


def test_a_run_without_steps_has_no_fifths_and_one_with_a_falling_rate_is_not_told_to_ask_for_more(
    parent, tmp_path, capsys
):
    falling = LearnerConfig(optimizer=FAST, rows=8, schedule=Schedule(shape="linear", warmup_steps=0))
    config, log = config_of(parent, learner=falling), io.StringIO()
    run = train_rl(config, [SingleTurn(Course())], tmp_path / "run")
    summarise(run, Console(file=log, width=500), as_json=False)
    assert "0 steps, nothing was learnt from\n" in log.getvalue() and "fifth" not in log.getvalue()
    summarise(run, Console(file=log, width=500), as_json=True)
    assert json.loads(capsys.readouterr().out)["reward_first_fifth"] is None
    train_rl(config, [SingleTurn(Course())], run.path, resume=True, console=Console(file=log, width=500))
    assert f"start a new run with {run.path} as its parent" in log.getvalue() and "--steps" not in log.getvalue()


@pytest.mark.parametrize("train", [train_rl, train_in_lockstep])
def test_the_report_counts_what_was_not_learnt_from(parent, tmp_path, train):
    run = train(config_of(parent, steps=1), [SingleTurn(Course(mastered=1000))], tmp_path / "run")
    history = History().follow(e for record in read_journal(run.path / "journal") for e in events_of(record))
    history.ended()
    left = sum(one.because == "the run ended" for one in history)
    assert (f"<p>{left} samples waited to be learnt from" in report_of(run)) == (left > 0)
    assert left > 0 or train is train_rl  # whose learner may be quicker than the next sample


def test_rewards_that_look_alike_are_counted_together():
    vain = vain_after(*[(1.0 - 1e-9 * n, "correct", "all right") for n in range(8)])
    assert Learnt.of(vain, 0, 20).rewards == {"1": 8}


def report_of(run):
    return (run.path / "report.html").read_text()


def test_what_was_not_right_throughout_is_an_error_and_the_run_goes_on(parent, tmp_path):
    environment = [SingleTurn(Course(mastered=6, then=0.25, grade="incorrect"))]
    with pytest.raises(NothingLearnt) as error:
        train_rl(config_of(parent, checkpoint_every=50), environment, tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    steps, said = len(run.read("metrics")), str(error.value)
    assert not run.finished and 1 <= steps <= 3 and run.checkpoints()[-1].name == f"step-{steps:08d}"
    assert "all right; rewards: 0.25 (2" in said and "Take harder tasks, larger groups, a higher --roll" in said
    assert f"{tmp_path / 'run'} after step {steps} of 20. Run the same command with --resume to go on. With" in said
    assert not (run.path / "learnt.json").exists()

    learner = Learner(speaker_model(), config_of(parent).learner, steps=20)
    assert learner.load(run) == steps
    with pytest.raises(NothingLearnt, match="Take harder"):  # as many groups again
        train_rl(config_of(parent), environment, run.path, resume=True)
    stood = train_rl(config_of(parent, steps=steps), environment, run.path, resume=True)  # as the sentence says
    assert stood.finished and all(
        w.equal(learner.model.state_dict()[n]) for n, w in weights_of(stood.model_directory).items()
    )


def test_a_falling_rate_has_no_end_before_its_steps(parent, tmp_path):
    falling = LearnerConfig(optimizer=FAST, rows=8, schedule=Schedule(shape="linear", warmup_steps=0))
    with pytest.raises(NothingLearnt, match=r"of 20. Run the same command with --resume to go on.$"):
        train_rl(
            config_of(parent, learner=falling), [SingleTurn(Course(mastered=6, then=0.0, grade="incorrect"))],
            tmp_path / "run",
        )  # fmt: skip


def vain_after(*samples, most=8, environments=("course",)):
    """Samples are (reward, grade, reason): what they got, and why they were dropped."""
    vain = Vain(environments, 4, most)
    for number, (reward, grade, reason) in enumerate(samples):
        ticket = Ticket("course", number)
        scored = None if reward is None else Reward(reward, Grade(grade or "correct", "", judged=bool(grade)))
        outcome = "env_failure" if reward is None else "ok"
        vain.note(Finished(Rollout(ticket, None, (), outcome, scored)))
        vain.note(Dropped(ticket, reason))
    return vain


RIGHT, WRONG = (1.0, "correct", "all right"), (0.0, "incorrect", "all wrong")
BARE = (0.1, "", "all right")
PARTLY, FAILED = (0.5, "incorrect", "all right"), (None, "", "env_failure")


@pytest.mark.parametrize(
    ("samples", "all_right", "said"),
    [
        ([RIGHT] * 8, True, "All of the last 2 groups were right (rewards: 1 (8 times))"),
        ([RIGHT] * 6 + [FAILED] * 2, True, "All of the 6 scored samples of the last 2 groups were right"),
        (
            [RIGHT] * 7 + [WRONG],
            False,
            "7 all right and 1 all wrong; rewards: 1 (7 times), 0 (1 times)). Take easier ",
        ),
        ([RIGHT] * 7 + [PARTLY], False, "Take harder tasks"),
        ([BARE] * 8, False, "rewards: 0.1 (8 times)). Take harder tasks"),
        ([BARE] * 8, False, "That a number is positive does not say that an answer is right"),
        ([RIGHT] * 7 + [BARE], False, "That a number is positive"),
        ([RIGHT] * 3 + [FAILED] * 5, False, "The newest failure was in course: crash."),
        ([FAILED] * 8, False, "dropped (8 env_failure). Take easier or harder"),
    ],
)
def test_what_is_said_of_groups_in_vain(samples, all_right, said):
    vain = vain_after(*samples)
    assert vain.full and vain.all_right is all_right
    assert said in (vain.learnt() if all_right else vain.in_vain("course: crash."))


def test_every_environment_of_a_run_has_its_part_in_an_end_as_learnt():
    vain = vain_after(*[RIGHT] * 8, environments=("course", "slow"))
    assert vain.full and vain.undecided and not vain.all_right
    assert "What was scored was right, but nothing was scored of slow." in vain.in_vain("")


class Late(Course):
    """Tasks that teach, whose first answers are judged when the run has met too much in vain."""

    name = "late"

    def __init__(self, vains):
        super().__init__(mastered=1000)
        self.vains = vains

    def score(self, task, response):
        wait(self.vains)
        return super().score(task, response)


def test_what_is_under_way_is_waited_for_before_a_task_counts_as_learnt(parent, tmp_path, monkeypatch):
    vains = watched(monkeypatch)
    scheduler = SchedulerConfig(groups_per_batch=1, group_size=4, max_running=16, max_staleness=8)
    environments = [SingleTurn(Course()), SingleTurn(Late(vains))]
    sources = [TaskSource.of(environments[0]), TaskSource.of(environments[1], max_running=4)]
    run = train_rl(
        replace(config_of(parent, steps=1), scheduler=scheduler), environments, tmp_path / "run", sources=sources
    )  # fmt: skip
    assert run.finished and len(run.read("metrics")) == 1 and not (run.path / "learnt.json").exists()


def test_a_positive_number_for_everyone_is_no_task_that_is_learnt(parent, tmp_path):
    class Bonus(Course):
        def score(self, task, response):
            return rewarded(lambda task, message: 0.1, task, response)

    with pytest.raises(NothingLearnt, match=r"a Reward with a Grade does"):
        train_rl(config_of(parent), [SingleTurn(Bonus())], tmp_path / "run")
    assert not (tmp_path / "run" / "learnt.json").exists()


def test_one_group_that_teaches_begins_the_count_anew_and_so_does_a_resumption_of_what_was_not_right():
    vain = vain_after(*[WRONG] * 7)
    assert not vain.full
    vain.note(Accepted(Selection(Ticket("course", 99), ((0, 4),))))
    assert vain.groups == 0 and vain.rewards.total() == 0
    for right, go_on, full in ((RIGHT, False, True), (RIGHT, True, False), (WRONG, False, False)):
        vain = vain_after(*[right] * 8)
        vain.resumed(go_on=go_on)
        assert vain.full is full


def test_a_run_that_starves_names_a_failure_and_says_the_same_until_there_is_twice_as_much():
    vain = vain_after(*[WRONG] * 16, most=64)
    vain.group_size = 1
    assert (
        vain.starving("course: no room")
        == "nothing could be learnt from the last 16 groups (all wrong); the run ends after 64"
    )
    for sample in range(16):
        vain.note(Dropped(Ticket("course", 50 + sample), "env_failure"))
        told = vain.starving(f"course: no room on disk {sample}")
    assert told == (
        "nothing could be learnt from the last 32 groups (all wrong and env_failure); the run ends after 64; the "
        "newest failure was in course: no room on disk 15"
    )
    assert vain.starving("course: another") == told


def test_a_run_that_starves_is_seen_to(parent, tmp_path):
    console = Console(file=io.StringIO(), width=400)
    with pytest.raises(NothingLearnt):
        train_rl(
            config_of(parent, groups_in_vain=40), [SingleTurn(Course(then=0.0))], tmp_path / "run", console=console
        )
    said = [line for line in console.file.getvalue().splitlines() if "nothing could be learnt" in line]
    assert [line.partition("nothing")[2] for line in said] == [
        f" could be learnt from the last {groups} groups (all wrong); the run ends after 40" for groups in (16, 32)
    ]
