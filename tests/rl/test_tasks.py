"""Ratios, speeds, gates, bands and pools."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.envs import Arithmetic, SingleTurn
from glm5.errors import ConfigError
from glm5.rl.tasks import Band, Gate, Pools, TaskSource, TaskStream


def source(name, **settings):
    return TaskSource(environment=name, **settings)


def draw(stream, names=None):
    ticket = stream.choose(names or list(stream.sources))
    if ticket:
        stream.take(ticket, again=False)
    return ticket


def play(stream, reward, count):
    """Draws, scores and returns; gives the tasks."""
    found = []
    for _ in range(count):
        ticket = draw(stream)
        stream.scored(ticket, [reward(ticket)] * 2)
        stream.returned(ticket)
        found.append(ticket)
    return found


def test_ratios_are_kept_at_every_moment():
    stream = TaskStream([source("a", weight=1), source("b", weight=3)])
    names = [draw(stream).environment for _ in range(400)]
    assert all(abs(names[:n].count("b") - 0.75 * n) <= 1 for n in range(1, 401))
    assert [draw(stream, ["a"]).task_index for _ in range(3)] == [100, 101, 102], "in order, without gaps"


def test_one_that_had_no_place_catches_up():
    stream = TaskStream([source("a"), source("b")])
    assert {draw(stream, ["a"]).environment for _ in range(10)} == {"a"}
    assert Counter(draw(stream).environment for _ in range(10)) == {"b": 10}
    assert stream.choose([]) is None


def test_a_gate_opens_when_the_easier_tasks_are_mastered():
    stream = TaskStream([source("easy"), source("hard", gate=Gate(environment="easy", success=0.7, groups=4))])
    assert {t.environment for t in play(stream, lambda t: 0.0, 20)} == {"easy"}
    play(stream, lambda t: 1.0, 40)
    after = Counter(t.environment for t in play(stream, lambda t: 0.0, 20))
    assert after == {"easy": 10, "hard": 10}, "open for good, without claims for the time before"


def test_one_that_comes_late_claims_nothing_where_another_has_no_place():
    stream = TaskStream([source("slow"), source("fast"), source("late", gate=Gate(environment="fast", groups=100))])
    assert {draw(stream).environment for _ in range(2)} == {"slow", "fast"}
    for _ in range(100):  # all places of "slow" are taken meanwhile
        stream.scored(draw(stream, ["fast"]), [1.0])
    assert Counter(draw(stream, ["fast", "late"]).environment for _ in range(20)) == {"fast": 10, "late": 10}


def test_a_pool_that_is_left_alone_gives_no_claims_to_others():
    stream = TaskStream([source("a", pools=Pools(size=50, easy=0.0, hard=1.0))])
    play(stream, lambda ticket: 1.0, 20)  # to the easy ones, which nobody draws
    (hard,) = play(stream, lambda ticket: 0.0, 1)
    assert [ticket.task_index == hard.task_index for ticket in play(stream, lambda ticket: 0.0, 4)].count(True) <= 2


def test_a_band_turns_down_what_is_too_easy():
    stream = TaskStream([source("a", band=Band(high=0.9, outside=0.25)), source("b")])
    play(stream, lambda t: float(t.environment == "a" or t.task_index % 2), 100)
    names = Counter(t.environment for t in play(stream, lambda t: float(t.environment == "a"), 100))
    assert names["a"] == pytest.approx(20, abs=2)


def test_pools_follow_the_success_at_each_task():
    stream = TaskStream([source("a", pools=Pools(size=30, unseen=1, middle=1, hard=0.5, easy=0.1))])
    reward = {task: (0.0, 0.5, 1.0)[task % 3] for task in range(30)}

    def play_one(count):
        found = []
        for _ in range(count):
            ticket = draw(stream)
            stream.scored(
                ticket, [1.0] * round(2 * reward[ticket.task_index]) + [0.0] * round(2 - 2 * reward[ticket.task_index])
            )
            stream.returned(ticket)
            found.append(ticket)
        return found

    play_one(200)
    pools = stream.pools["a"].pools
    assert not pools["unseen"] and {task % 3 for task in pools["middle"]} == {1}
    assert sorted(map(len, pools.values())) == [0, 10, 10, 10]
    shares = Counter(t.task_index % 3 for t in play_one(160))
    assert (
        shares[1] == pytest.approx(100, abs=3)
        and shares[0] == pytest.approx(50, abs=3)
        and shares[2] == pytest.approx(10, abs=3)
    )
    tickets = play_one(100)
    assert len({t.id for t in tickets}) == 100, "a task that comes again is another attempt"


def test_the_first_pass_shows_every_task_once_in_an_order_of_the_seed():
    orders = []
    for seed in (0, 0, 1):
        stream = TaskStream([source("a", pools=Pools(size=20, easy=0.0, middle=0.0, hard=0.0))], seed)
        orders.append([t.task_index for t in play(stream, lambda t: 1.0, 20)])
    assert sorted(orders[0]) == list(range(20)) and orders[0] == orders[1] != orders[2]
    assert [t.task_index for t in play(stream, lambda t: 1.0, 1)], "shares of 0 do not stop the run"


def test_a_task_that_is_being_sampled_is_not_drawn():
    stream = TaskStream([source("a", pools=Pools(size=3))])
    tickets = [draw(stream) for _ in range(3)]
    assert {t.task_index for t in tickets} == {0, 1, 2} and draw(stream) is None
    stream.returned(tickets[1])
    assert draw(stream).task_index == tickets[1].task_index


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("dsr"), st.integers(0, 20), st.floats(0, 1)), max_size=60))
def test_a_restored_stream_goes_on_the_same(steps):
    def build():
        return TaskStream([source("a", weight=0.7, band=Band(low=0.3)), source("b", pools=Pools(size=9)),
                           source("c", gate=Gate(environment="b", success=0.5, groups=2))], 3)  # fmt: skip

    stream, out = build(), []
    for what, number, reward in steps:
        if what == "d" and (ticket := draw(stream)):
            out.append(ticket)
        elif out and what == "s":
            stream.scored(out[number % len(out)], [reward, 1.0])
        elif out and what == "r":
            stream.returned(out.pop(number % len(out)))
    other = build()
    other.restore(json.loads(json.dumps(stream.state())))
    assert other.state() == stream.state()
    assert [draw(other) for _ in range(30)] == [draw(stream) for _ in range(30)]


def test_sources_take_the_rules_of_their_environment():
    environment = SingleTurn(Arithmetic())
    it = TaskSource.of(environment, weight=2.0)
    assert (it.environment, it.uniform_groups, it.max_attempts, it.weight) == (environment.name, "drop", None, 2.0)


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError, match="Did you mean 'easy'"):
        TaskStream([source("easy"), source("hard", gate=Gate(environment="eazy"))])
    with pytest.raises(ConfigError, match="without a gate"):
        TaskStream([source("a", gate=Gate(environment="a"))])
    with pytest.raises(ConfigError, match="Two environments of the run are called"):
        TaskStream([source("a"), source("a")])
    with pytest.raises(ConfigError, match="uniform_groups"):
        source("a", uniform_groups="hide")
    with pytest.raises(ConfigError, match="weight"):
        source("a", weight=0.0)
    for settings_of in (
        lambda: Gate(environment="a", success=80),
        lambda: Band(low=5, high=95),
        lambda: Band(low=0.9, high=0.1),
        lambda: Pools(size=9, low=0.9, high=0.1),
    ):
        with pytest.raises(ConfigError, match="a success is a share from 0 to 1"):
            settings_of()


def test_a_curriculum_that_never_opens_is_refused():
    waiting = [source("b", gate=Gate(environment="c")), source("c", gate=Gate(environment="b"))]
    with pytest.raises(ConfigError, match=r"never open: b for c, c for b waits"):
        TaskStream([source("a"), *waiting])
    TaskStream([source("a"), waiting[0], source("c", gate=Gate(environment="a"))])  # one after the other
