"""How many rollouts run at once in a resumed run, and who of those that were under way has a place."""

import asyncio
import dataclasses

import pytest
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.envs import Reward, Task
from glm5.errors import ConfigError, InputError
from glm5.rl.admission import SchedulerConfig
from glm5.rl.concurrency import ConcurrencyConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.event_log import events_of
from glm5.rl.events import Limited
from glm5.rl.gateway import train_from_gateway, train_from_records
from glm5.rl.gateway.learning import Address
from glm5.rl.gateway.rollouts import OutsideAgents
from glm5.rl.gateway.settings import outside
from glm5.rl.journal import read_journal
from glm5.rl.orchestrator import Orchestrator, train_rl
from glm5.rl.outgoing import Outgoing
from glm5.rl.records import Rollout, Turn
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.scheduler import Scheduler
from glm5.rl.session import Session
from glm5.rl.tasks import TaskSource, TaskStream
from glm5.rl.tree import EpisodeTree
from glm5.scoring import Grade
from glm5.train import RunDirectory


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(speaker_model(), directory, speaker_tokenizer())
    return directory


def config_of(parent, *, steps=2, concurrency=None, **scheduler):
    settings = {"groups_per_batch": 2, "group_size": 2, "max_running": 16, **scheduler}
    return RLRunConfig(
        parent=parent, steps=steps, scheduler=SchedulerConfig(**settings), concurrency=concurrency, patience=5.0
    )


class Agents:
    """Play at once, in some milliseconds, with rewards that differ; `fails`: whether a ticket's rollout fails."""

    def __init__(self, fails=lambda ticket: False):
        self.fails, self.open, self.most, self.played = fails, 0, 0, []

    async def play(self, ticket):
        self.open += 1
        self.most = max(self.most, self.open)
        self.played.append(ticket.id)
        try:
            await asyncio.sleep(0.01 if ticket.sample else 0)
        finally:
            self.open -= 1
        if self.fails(ticket):
            return Rollout(ticket, Task(ticket.id, (), "", "g"), (), "env_failure", None, failure="the lights went out")
        turn = Turn((1, 2), (3, 4), (-1.0, -1.0), (0, 0), "stop")
        reward = Reward(float(ticket.sample % 2), Grade("correct", ""))
        parts = EpisodeTree((turn,)).trajectories()
        return Rollout(ticket, Task(ticket.id, (), "", "g"), parts, "ok", reward, turns=(turn,))


def killed_with(under_way, config, path):
    """A run that dies when so many rollouts are under way, of which none is known."""
    begun = []

    async def player(ticket):
        begun.append(ticket)
        if len(begun) == under_way:
            raise KeyError
        await asyncio.sleep(3600)

    with pytest.raises(KeyError):
        train_rl(config, [OutsideAgents()], path, player=player)


def events_in(path):
    return [event for record in read_journal(path / "journal") for event in events_of(record)]


def test_rollouts_of_before_take_every_place_there_is_and_only_those_that_play_count(parent, tmp_path, monkeypatch):
    path, agents, seen, take_news = tmp_path / "run", Agents(), [], Orchestrator._take_news
    killed_with(16, config_of(parent), path)

    async def looking(self):
        scheduler = self.session.scheduler
        under_way = len(scheduler.running) + len(scheduler.cancelled)
        seen.append((scheduler.max_running, under_way, len(self.playing), agents.open))
        await take_news(self)
        if scheduler.max_running == 2:  # as the control of concurrency raises it
            self.session.limit(8)

    monkeypatch.setattr(Orchestrator, "_take_news", looking)
    run = train_rl(config_of(parent, max_running=2), [OutsideAgents()], path, player=agents.play, resume=True)
    assert run.finished and all(playing == min(under_way, limit) for limit, under_way, playing, _ in seen)
    assert seen[0] == (2, 16, 2, 2) and any(now == 8 < under_way for _, under_way, _, now in seen)
    assert agents.most == 8 and max(line["running"] for line in run.read("speed")) == 8


def test_those_that_are_called_off_before_they_had_a_place_come_back(parent, tmp_path):
    path, agents = tmp_path / "run", Agents(fails=lambda ticket: ticket.task_index == 0)
    killed_with(8, config_of(parent, group_size=4, max_running=8, max_attempts=1), path)
    config = config_of(parent, group_size=4, max_running=1, max_attempts=1)
    assert train_rl(config, [OutsideAgents()], path, player=agents.play, resume=True).finished
    events = events_in(path)
    cancelled = [event.ticket.id for event in events if event.kind == "cancelled"]
    assert len(cancelled) == 2 and not set(cancelled) & set(agents.played)
    assert [event.ticket.id for event in events if event.kind == "released"] == cancelled


def test_one_that_is_called_off_before_its_first_line_comes_back(parent, tmp_path, monkeypatch):
    agents = Agents(fails=lambda ticket: ticket.task_index == ticket.attempt == 0 and ticket.sample in (1, 2))
    publish = Outgoing.publish

    async def slow(self):
        await asyncio.sleep(0.05)  # in which the second and third fail; then the fourth begins
        return await publish(self)

    monkeypatch.setattr(Outgoing, "publish", slow)
    config = config_of(parent, steps=1, groups_per_batch=1, group_size=4, max_running=3)
    train_rl(config, [OutsideAgents()], tmp_path / "run", player=agents.play)
    events = events_in(tmp_path / "run")
    cancelled = [event.ticket.id for event in events if event.kind == "cancelled"]
    assert cancelled and [event.ticket.id for event in events if event.kind == "released"] == cancelled


def test_the_control_goes_on_from_where_it_was_unless_another_number_is_said(parent, tmp_path, monkeypatch):
    begun, under_way = [], Session.under_way
    monkeypatch.setattr("glm5.rl.orchestrator.next_limit", lambda *_: 8)
    monkeypatch.setattr(
        Session, "under_way", lambda self: (begun.append(self.scheduler.max_running), under_way(self))[1]
    )
    run = lambda steps, most=9, **scheduler: train_rl(
        config_of(parent, steps=steps, concurrency=ConcurrencyConfig(least=1, most=most), max_staleness=9, **scheduler),
        [OutsideAgents()], tmp_path / "run", player=Agents().play, resume=steps > 1,
    )  # fmt: skip
    run(1, max_running=4)
    run(2, max_running=4)
    run(3, max_running=3)
    run(4, max_running=3)
    with monkeypatch.context() as patch:  # stopped while engines come up: what was said is said still
        patch.setattr(Outgoing, "start", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(5, max_running=2)
    run(5, max_running=2)
    run(6, max_running=2, most=5)
    run(7, max_running=9)
    assert begun == [4, 8, 3, 8, 2, 5, 9]


def test_a_limit_of_a_journal_that_does_not_say_what_was_given_holds(parent):
    scheduler = Scheduler(SchedulerConfig(max_running=7), TaskStream([TaskSource.of(OutsideAgents())]))
    scheduler.apply(Limited(5))
    assert (scheduler.max_running, scheduler.given) == (5, 7)


def test_a_resumed_run_of_outside_agents_has_its_places(parent, tmp_path):
    config, path, adapted = config_of(parent, max_running=64), tmp_path / "run", ConcurrencyConfig(least=1, most=2)
    settings = outside(config, patience=config.patience)
    resumed = lambda config: train_from_records(config, tmp_path / "nowhere", path, resume=True)
    start = lambda settings, resume: RunDirectory.start(
        path, stage="rl", config=settings, inputs={}, resume=resume, may_change=frozenset({"concurrency"})
    )
    start(settings, False)
    for changed, says in (
        (dataclasses.replace(config, concurrency=adapted), "leave concurrency out"),
        (config_of(parent, max_running=3), "scheduler.max_running is 3, .* always 20 here"),
        (dataclasses.replace(config, rollout=RolloutConfig(step_seconds=9.0)), "rollout.step_seconds says how this"),
    ):
        with pytest.raises(ConfigError, match=says):
            resumed(changed)
    borne = dataclasses.replace(config, rollout=RolloutConfig(outage_seconds=9.0), patience=9.0)
    with pytest.raises(ConfigError, match="leave patience out"):  # and not the outage, which its servers follow
        train_from_gateway(borne, path, Address(port=0), resume=True)
    with pytest.raises(ConfigError, match=r"rollout\.outage_seconds says how this"):
        resumed(borne)
    start(dataclasses.replace(settings, concurrency=adapted), True)  # as earlier versions let it
    for said in (config, dataclasses.replace(settings, concurrency=adapted)):
        with pytest.raises(InputError, match="no recorded sessions"):
            resumed(said)
    assert outside(dataclasses.replace(config, concurrency=adapted), patience=1.0).concurrency is None


@pytest.mark.parametrize("name", ["step_seconds", "episode_seconds"])
def test_a_new_run_of_outside_agents_refuses_to_set_no_limit_to_what_it_does_not_play(parent, tmp_path, name):
    config = RLRunConfig(parent=parent, rollout=RolloutConfig(**{name: None}))
    with pytest.raises(ConfigError, match=rf"rollout\.{name} says how this"):
        train_from_records(config, tmp_path / "nowhere", tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"rollout\.{name} says how this"):
        train_from_gateway(config, tmp_path / "run", Address(port=0))
