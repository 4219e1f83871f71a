"""The run loop in its modes: sync equals the plain loop to the bit, async learns and loses nothing."""

import asyncio
import copy
import os
import signal
import time

import pytest
import torch
from scripted import Chat, brief_model
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.engine import Engine
from glm5.envs import EnvironmentFailure, EpisodeLimits, Reward, SingleTurn, Task
from glm5.errors import RunError
from glm5.optim import OptimizerConfig
from glm5.rl.admission import SchedulerConfig
from glm5.rl.concurrency import ConcurrencyConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.event_log import events_of
from glm5.rl.executors import engine_processes
from glm5.rl.fleet import FleetConfig, InProcessFleet
from glm5.rl.journal import read_journal
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.lockstep import train_in_lockstep
from glm5.rl.losses import IcePop
from glm5.rl.orchestrator import train_rl
from glm5.rl.plain.loop import RLConfig, train_policy
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.tasks import TaskSource
from glm5.scoring import Grade
from glm5.train import RunInterrupted

FAST = OptimizerConfig(name="adamw", lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)


class Letters:
    """Reward for an answer that holds an "e"; breaks once for each of the tasks `broken`."""

    name = "letters"

    def __init__(self, *broken):
        self.broken = {f"{self.name}/0/{index}": 1 for index in broken}

    def task(self, seed, index):
        return Task(f"{self.name}/{seed}/{index}", ({"role": "user", "content": f"{index % 5}"},), "e", "one")

    def score(self, task, response):
        if self.broken.get(task.id):
            self.broken[task.id] -= 1
            raise EnvironmentFailure("the lights went out")
        said = "e" in (response["content"] or "")
        return Reward(float(said), Grade("correct" if said else "incorrect", "an e" if said else "no e"))


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(speaker_model(), directory, speaker_tokenizer())
    return directory


@pytest.fixture(scope="module")
def brief_parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("brief")
    glm5.save_model(brief_model(), directory, speaker_tokenizer())
    return directory


def config_of(parent, *, steps=3, scheduler=None, learner=None, rollout=None, **changes):
    return RLRunConfig(
        parent=parent,
        steps=steps,
        rollout=RolloutConfig(**{"max_tokens": 6, "report_every": 2, **(rollout or {})}),
        scheduler=SchedulerConfig(**{"groups_per_batch": 3, "group_size": 4, "max_running": 12, **(scheduler or {})}),
        learner=LearnerConfig(**{"optimizer": FAST, "rows": 5, **(learner or {})}),
        **{"checkpoint_every": 2, "patience": 60.0, **changes},
    )


def strict_fleet(model, tokenizer, version):
    return InProcessFleet([Engine(copy.deepcopy(model), tokenizer, strict=True, num_blocks=64, version=version)])


def weights_of(run):
    return glm5.load_model(run.model_directory, dtype=torch.float32).state_dict()


def same_weights(ours, theirs):
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("broken", [(), (1, 4)])
def test_sync_mode_is_the_plain_loop_to_the_bit(parent, tmp_path, broken):
    plain = train_policy(
        RLConfig(
            parent=parent, steps=4, prompts_per_step=3, group_size=4, max_tokens=6, rows=5, optimizer=FAST, strict=True
        ),
        Letters(*broken),
        tmp_path / "plain",
    )  # fmt: skip
    config = config_of(parent, steps=4, scheduler={"mode": "sync", "repair": "never"}, learner={"loss": IcePop()})
    run = train_rl(config, [SingleTurn(Letters(*broken))], tmp_path / "run", make_fleet=strict_fleet)
    ours, theirs = run.read("metrics"), plain.read("metrics")
    assert sum(line["requeued"] for line in theirs) == 4 * len(broken)
    for line, other in zip(ours, theirs, strict=True):
        shared = other.keys() - {"next_task", "pending"}
        if broken:  # the orchestrator calls off what the plain loop samples to its end in vain
            shared -= {"scored", "reward", "truncated", "tokens", "surprise"}
        assert {name: line.get(name) for name in shared} == {name: other[name] for name in shared}
    assert any("grad_norm" in line for line in ours)
    assert same_weights(weights_of(run), weights_of(plain))


def chat(**changes):
    """Two answers, rewarded for an "e" in the last one."""
    reward = lambda said: float("e" in (said[-1]["content"] or ""))
    return Chat({"role": "user", "content": "Again?"}, limits=EpisodeLimits(turns=2), reward=reward, **changes)


def fates_of(run):
    """How often each sample got a fate, over the whole journal, and the batches."""
    fates, batches = {}, []
    for record in read_journal(run.path / "journal"):
        for event in events_of(record):
            if event.kind in ("dropped", "requeued"):
                fates.setdefault(event.ticket.id, []).append(event.kind)
            if event.kind == "batch":
                tickets = [ticket for selection in event.selections for ticket in selection.tickets]
                batches.append(tickets)
                for ticket in tickets:
                    fates.setdefault(ticket.id, []).append("trained")
    return fates, batches


def test_async_mode_keeps_its_bound_and_every_sample_has_one_fate(brief_parent, tmp_path):
    config = config_of(
        brief_parent, steps=6, rollout={"max_tokens": 24}, scheduler={"max_staleness": 2, "group_size": 3}
    )  # fmt: skip
    run = train_rl(config, [chat(), SingleTurn(Letters())], tmp_path / "run")
    fates, batches = fates_of(run)
    assert run.finished and len(batches) == 6
    assert all(len(found) == 1 for found in fates.values())
    assert {ticket.environment for tickets in batches for ticket in tickets} == {"chat", "letters"}
    lines = run.read("metrics")
    assert [line["step"] for line in lines] == list(range(6))
    for line in lines:
        assert max(map(int, line["staleness"])) <= 2 and line["max_staleness"] <= 2
        assert line["sampled"] == line["trained"] + line["requeued"] + sum(line["dropped"].values())
    # What was settled after the last batch has no line.
    assert sum(line["trained"] for line in lines) == sum(map(len, batches))
    assert sum(line["sampled"] for line in lines) <= len(fates)
    assert {age for line in lines for age in line["staleness"]} > {"0"}
    speed = run.read("speed")[-1]
    assert 0 <= speed["trainer_idle"] <= 1 and 0 <= speed["sampler_idle"] <= 1 and speed["tokens_per_second"] > 0
    page = (run.path / "report.html").read_text()
    assert "<svg" in page and "<td>chat</td>" in page and "<td>letters</td>" in page


def test_engines_in_processes_die_and_the_run_goes_on(parent, tmp_path):
    config = config_of(parent, steps=4, concurrency=ConcurrencyConfig(least=4, most=24, increase=4))
    fleets = []

    def make(*arguments):
        fleets.append(engine_processes(config, 2, limits=FleetConfig(silence_seconds=60), strict=True)(*arguments))
        return fleets[-1]

    class Murderous(Letters):
        """Kills an engine when an answer to the tenth task is scored."""

        def score(self, task, response):
            if task.id.endswith("/9") and fleets[0].stats().engines[0].restarts == 0:
                os.kill(fleets[0]._seats[0].member.process_id, signal.SIGKILL)
            return super().score(task, response)

    run = train_rl(config, [SingleTurn(Murderous())], tmp_path / "run", make_fleet=make)
    assert run.finished and sum(state.restarts for state in fleets[0].stats().engines) >= 1
    fates, batches = fates_of(run)
    assert len(batches) == 4 and all(len(found) == 1 for found in fates.values())
    assert max(line["mismatch"] for line in run.read("metrics") if line["max_staleness"] == 0) < 1e-5


def test_one_step_off_publishes_between_samplings(parent, tmp_path):
    config = config_of(parent, steps=4, scheduler={"mode": "one-step-off"})
    run = train_rl(config, [SingleTurn(Letters())], tmp_path / "run")
    for line in run.read("metrics"):
        assert max(map(int, line["staleness"]), default=0) <= 1
    for record in read_journal(run.path / "journal"):
        for event in events_of(record):
            if event.kind == "finished":  # no swap inside a rollout
                assert len(set(event.rollout.versions)) <= 1


def test_an_interrupted_run_says_so_and_goes_on(parent, tmp_path, monkeypatch):
    config, environment = config_of(parent, steps=5), [SingleTurn(Letters())]
    learnt = []
    step = Learner.step

    def interrupting(self, batch):
        learnt.append(batch.step)
        if len(learnt) == 2:  # Ctrl-C while the second step runs
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(Learner, "step", interrupting)
    with pytest.raises(RunInterrupted, match="Stopped after step 2 of 5 of rl"):
        train_rl(config, environment, tmp_path / "run")
    monkeypatch.undo()
    finished = [
        e.rollout.id for r in read_journal(tmp_path / "run" / "journal") for e in events_of(r) if e.kind == "finished"
    ]
    with pytest.raises(RunError, match="already holds a run"):
        train_rl(config, environment, tmp_path / "run")
    run = train_rl(config, environment, tmp_path / "run", resume=True)
    events = [e for r in read_journal(run.path / "journal") for e in events_of(r)]
    again = [e.rollout.id for e in events if e.kind == "finished"]
    assert again[: len(finished)] == finished and len(set(again)) == len(again)
    assert [line["step"] for line in run.read("metrics")] == list(range(5))
    assert train_rl(config, environment, tmp_path / "run", resume=True).finished


def test_a_run_that_hangs_says_what_it_waits_for(parent, tmp_path):
    config = config_of(parent, patience=3.0)
    with pytest.raises(
        RunError, match=r"12 are in their environments, the learner is idle, engine 0 is up at version 0"
    ):
        train_rl(config, [Chat(slow="reset")], tmp_path / "run")


def test_a_run_that_teaches_nothing_says_so(parent, tmp_path):
    config = config_of(parent, groups_in_vain=5)  # three groups at once may come back in one turn of the loop
    nothing = r"the last [5-7] groups.*\(2\d all wrong; rewards: 0 \(2\d times\)\). Take easier tasks"
    for run in (train_rl, train_in_lockstep):
        path = tmp_path / run.__name__
        with pytest.raises(RunError, match=nothing):
            run(config, [Chat(reward=lambda said: 0.0)], path)
        with pytest.raises(RunError, match=r"the last (9|1[0-4]) groups"):  # five more: something may have been mended
            run(config, [Chat(reward=lambda said: 0.0)], path, resume=True)


def test_a_mistake_of_the_engine_stops_the_run_with_its_sentence(parent, tmp_path):
    def broken_fleet(model, tokenizer, version):
        engine = Engine(copy.deepcopy(model), tokenizer)
        with torch.no_grad():
            engine.model.lm_head.weight.fill_(float("nan"))
        return InProcessFleet([engine])

    with pytest.raises(glm5.errors.CheckpointError, match="NaN or infinite logits"):
        train_rl(config_of(parent), [SingleTurn(Letters())], tmp_path / "run", make_fleet=broken_fleet)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_whose_engine_failed_says_so_and_is_resumed(parent, tmp_path):
    config = config_of(parent, steps=3)

    def mistaken_fleet(model, tokenizer, version):
        fleet = strict_fleet(model, tokenizer, version)
        engine = fleet.engines["0"]
        wait = engine._wait
        engine._wait = lambda busy: 1 / 0 if engine.stats().sampled_tokens > 100 else wait(busy)
        return fleet

    sentence = r"Engine 0 has ended by a mistake of its own \(ZeroDivisionError\); nothing .* lost\. .*--resume"
    with pytest.raises(RunError, match=sentence):
        train_rl(config, [SingleTurn(Letters())], tmp_path / "run", make_fleet=mistaken_fleet)
    run = train_rl(config, [SingleTurn(Letters())], tmp_path / "run", make_fleet=strict_fleet, resume=True)
    assert run.finished and [line["step"] for line in run.read("metrics")] == [0, 1, 2]


def test_a_run_whose_engines_are_gone_ends_also_when_nobody_asks_them(parent, tmp_path):
    fleets = []

    def make(*arguments):
        fleets.append(strict_fleet(*arguments))
        return fleets[-1]

    async def outside_agent(ticket):
        fleets[0].engines["0"].failure = "ZeroDivisionError"
        await asyncio.sleep(600)

    with pytest.raises(RunError, match=r"Engine 0 has ended by a mistake of its own"):
        train_rl(config_of(parent), [SingleTurn(Letters())], tmp_path / "run", make_fleet=make, player=outside_agent)


def test_it_learns_asynchronously(parent, tmp_path):
    config = config_of(
        parent, steps=40, learner={"rows": 64}, checkpoint_every=40,
        scheduler={"groups_per_batch": 4, "group_size": 8, "max_staleness": 2, "max_running": 64},
    )  # fmt: skip
    env = SingleTurn(Letters())
    mastered = [TaskSource.of(env, uniform_groups="keep")]  # however fast it learns, there is always a batch
    run = train_rl(config, [env], tmp_path / "run", sources=mastered)
    rewards = [line["reward"] for line in run.read("metrics") if line["reward"] is not None]
    assert sum(rewards[:4]) / 4 < 0.6 and sum(rewards[-4:]) / 4 > 0.85


def test_the_last_step_is_recorded_however_late_its_news_is(parent, tmp_path, monkeypatch):
    step = Learner.step

    def slow(self, batch):
        values = step(self, batch)
        time.sleep(0.5)  # the version has moved; the loop looks at it several times before it hears of the step
        return values

    monkeypatch.setattr(Learner, "step", slow)
    run = train_rl(config_of(parent, steps=2), [SingleTurn(Letters())], tmp_path / "run")
    assert [line["step"] for line in run.read("metrics")] == [0, 1]


@pytest.mark.parametrize("broken", ["glm5.rl.report.view_run", "glm5.rl.run_ends.write_rl_report"])
def test_a_page_that_cannot_be_made_does_not_cost_the_model(parent, tmp_path, monkeypatch, caplog, broken):
    def fails(*arguments, **settings):
        raise ValueError("no page")

    monkeypatch.setattr(broken, fails)
    run = train_rl(config_of(parent, steps=1), [SingleTurn(Letters())], tmp_path / "run")
    assert run.finished and weights_of(run) and "no page" in caplog.text
    if "view_run" in broken:
        assert "could not be made: ValueError" in (run.path / "report.html").read_text()
    else:
        monkeypatch.undo()
        train_rl(config_of(parent, steps=1), [SingleTurn(Letters())], run.path, resume=True)
        assert (run.path / "report.html").exists()
