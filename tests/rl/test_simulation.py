"""The simulator against runs whose times are known in closed form."""

import json
import math
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from thin_rollouts import rollout

from glm5.errors import InputError
from glm5.rl.admission import SchedulerConfig
from glm5.rl.concurrency import ConcurrencyConfig
from glm5.rl.records import Ticket
from glm5.rl.simulation import (
    AssumedWorkload,
    EngineSpeed,
    LongTail,
    Measured,
    MeasuredWorkload,
    SimulationConfig,
    comparison,
    machine,
    rollout_record,
    shortness,
    simulate,
    spread_of,
    sweep,
    write_page,
)
from glm5.rl.simulation.spread import redrawn
from glm5.rl.simulation.workload import Play
from glm5.rl.tasks import Pools, TaskSource


def fixed(value):
    return LongTail(value, value)


def config(mode="sync", *, tokens=100, tools=0.0, turns=1, **changes):
    """2 groups of 4 of equal length, all learnt from; 8 sequences make 80 tokens per second, so 100 take 10 s."""
    scheduler = SchedulerConfig(mode=mode, groups_per_batch=2, group_size=4, max_running=8, max_staleness=4)
    workload = AssumedWorkload(tokens=fixed(tokens), tool_seconds=fixed(tools), turns=turns)
    keep = TaskSource(environment="tasks", uniform_groups="keep")
    defaults = {
        "scheduler": scheduler, "sources": (keep,), "workloads": {"tasks": workload}, "batches": 20, "warmup": 4,
        "engine": EngineSpeed(points=((8, 80.0), (16, 80.0))), "train_seconds": 4.0, "publish_seconds": 1.0,
    }  # fmt: skip
    return SimulationConfig(**(defaults | changes))


def seconds_per_step(simulation):
    return 3600 / simulation.steps_per_hour


def test_sync_takes_the_sum():
    it = simulate(config())
    assert seconds_per_step(it) == pytest.approx(10 + 4 + 1)
    assert it.trainer_idle == pytest.approx(10 / 15) and it.sampler_idle == pytest.approx(5 / 15)
    assert it.tokens_per_second == pytest.approx(800 / 15) and it.wasted == 0
    assert set(it.staleness) == {0} and it.sampler_use == pytest.approx(10 / 15)


def test_one_step_off_takes_the_longer_of_the_two():
    assert seconds_per_step(simulate(config("one-step-off"))) == pytest.approx(10 + 1)
    it = simulate(config("one-step-off", train_seconds=30.0))
    assert seconds_per_step(it) == pytest.approx(30 + 1) and set(it.staleness) == {1}


def test_async_is_as_fast_as_the_slower_part():
    assert seconds_per_step(simulate(config("async"))) == pytest.approx(10)
    slow_trainer = simulate(config("async", train_seconds=30.0))
    assert seconds_per_step(slow_trainer) == pytest.approx(31) and slow_trainer.trainer_idle == pytest.approx(0)
    assert max(slow_trainer.staleness) <= 4


def test_tools_leave_the_engine_to_others():
    # A rollout takes 30 s, of which the tools have 20; the engine could make 8 of them in 10 s.
    sync = simulate(config(tokens=50, tools=10.0, turns=2))
    assert seconds_per_step(sync) == pytest.approx(2 * (5 + 10) + 5)
    wide = replace(config("async", tokens=50, tools=10.0, turns=2), scheduler=SchedulerConfig(
        groups_per_batch=2, group_size=4, max_running=64, max_staleness=8))  # fmt: skip
    it = simulate(wide)
    assert it.sampler_use == pytest.approx(1, abs=0.02)
    assert seconds_per_step(it) == pytest.approx(10, rel=0.1), "800 tokens at 80 tokens per second"


def test_nothing_is_gained_from_overlap_on_one_device_that_both_need():
    shared = config("async", shared=0.5, publish_seconds=0.0)
    assert seconds_per_step(simulate(shared)) == pytest.approx(10 + 4, rel=0.02)


def test_engines_stand_still_for_new_weights():
    it = simulate(config("async", swap_seconds=1.0))
    assert seconds_per_step(it) == pytest.approx(10 + 1, rel=0.02)
    assert it.sampler_idle == pytest.approx(1 / 11, rel=0.05)


def test_sequences_wait_for_a_place_in_the_engine():
    it = simulate(config(engine=EngineSpeed(points=((1, 20.0),), places=1)))
    assert seconds_per_step(it) == pytest.approx(8 * 5 + 5)
    two = simulate(config(engine=EngineSpeed(points=((1, 20.0),), places=1, engines=2)))
    assert seconds_per_step(two) == pytest.approx(4 * 5 + 5)


def test_the_longer_the_tail_the_more_async_gains_and_no_sample_breaks_the_bound():
    gains = []
    for p99 in (100, 3000):
        workload = AssumedWorkload(tokens=LongTail(100, p99), failing=0.05)
        long = config(workloads={"tasks": workload}, sources=(TaskSource(environment="tasks"),), batches=25)
        engine = EngineSpeed(points=((1, 10.0), (32, 160.0)))
        scheduler = replace(long.scheduler, max_running=8)
        rates = {it.mode: it for it in sweep(replace(long, engine=engine, scheduler=scheduler), max_staleness=(4,))}
        gains.append(rates["async"].rollouts_per_second / rates["sync"].rollouts_per_second)
        assert all(max(it.staleness) <= it.max_staleness for it in rates.values())
        assert rates["async"].wasted > 0 and rates["async"].accounts["dropped"]
    assert gains[1] > 1.5 * gains[0] > 1.5


def test_a_simulation_is_a_function_of_its_settings(tmp_path):
    workload = {"tasks": AssumedWorkload(tokens=LongTail(50, 900), tool_seconds=LongTail(1, 9), failing=0.1, turns=3)}
    one = config("async", workloads=workload, sources=(TaskSource(environment="tasks"),))
    first, again, other = simulate(one), simulate(one), simulate(replace(one, seed=1))
    assert first == again and first.seconds != other.seconds
    values = json.loads(json.dumps(first.to_dict()))
    assert values["staleness"] == {str(age): n for age, n in sorted(first.staleness.items())}
    table = comparison([first, other]).splitlines()
    assert len(table) == 3 and len({len(line) for line in table}) == 1
    assert f"{first.steps_per_hour:.0f} ± 7" in comparison([first, other], [7.0, 8.0])
    write_page(sweep(one, max_staleness=(1, 4)), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("<svg") == 5  # one of all, and one of each of the four


def test_what_was_measured_is_predicted():
    """Records of an imaginary run give back the workload that they were made of."""
    truth = AssumedWorkload(tokens=LongTail(100, 900), tool_seconds=LongTail(2, 20), turns=2, failing=0.1)
    records = [{"kind": "train", "seconds": 2 + 0.001 * n, "tokens": n} for n in (500, 700, 1300)]
    records += [{"kind": "publish", "seconds": 0.5}, {"kind": "publish", "seconds": 1.5}, {"kind": "something else"}]
    records += [
        {"kind": "engine", "running": n, "tokens_per_second": s} for n, s in ((1, 10.0), (8, 60), (8, 80), (8, 90))
    ]
    for group in range(300):
        for sample in range(4):
            play = truth.play(Ticket("e", group, 0, sample), Random(group), Random(f"{group}/{sample}"))
            records.append({
                "kind": "rollout", "environment": "e", "group": str(group), "turn_tokens": list(play.tokens),
                "tool_seconds": sum(play.tool_seconds), "outcome": play.outcome,
                "reward": play.reward if play.outcome == "ok" else None})  # fmt: skip
    measured = Measured.from_records(records)
    assert measured.train_seconds == pytest.approx(2) and measured.train_seconds_per_token == pytest.approx(0.001)
    assert measured.publish_seconds == 1.0 and measured.counts["rollout"] == 1200
    assert measured.points == ((1, 10.0), (8, 80.0))

    base = SimulationConfig(scheduler=SchedulerConfig(groups_per_batch=4, group_size=4), batches=60, warmup=10)
    predicted = simulate(base.as_measured(measured))
    engine = EngineSpeed(points=measured.points)
    known = simulate(replace(base, workloads={"tasks": truth}, engine=engine, train_seconds=2.0,
                             train_seconds_per_token=0.001, publish_seconds=1.0))  # fmt: skip
    assert predicted.steps_per_hour == pytest.approx(known.steps_per_hour, rel=0.15)
    assert predicted.wasted == pytest.approx(known.wasted, abs=0.1)


def test_steps_that_learnt_nothing_do_not_make_tokens_dearer():
    """Half of the steps of a sync run had only uniform groups: asynchronous steps have twice the tokens of the rest."""
    rollouts = [rollout_record(rollout(Ticket("e", n // 2, 0, n % 2), (4,) * 10, reward=n % 2)) for n in range(18)]
    learnt = [{"kind": "train", "seconds": 4 + 0.1 * tokens, "tokens": tokens} for tokens in (18, 20, 22)]
    nothing = {"kind": "train", "seconds": 0.0, "tokens": 0}
    measured = Measured.from_records([*rollouts, *learnt, *[nothing] * 3])
    assert (measured.train_seconds, measured.train_seconds_per_token) == pytest.approx((4.0, 0.1))
    scheduler = SchedulerConfig(groups_per_batch=2, group_size=2, max_running=64, max_staleness=8)
    engine = EngineSpeed(points=((1, 1e6),))
    it = simulate(config(scheduler=scheduler).as_measured(measured, engine=engine, publish_seconds=0.0))
    assert seconds_per_step(it) == pytest.approx(4 + 0.1 * 40, rel=1e-3) and it.trainer_idle < 1e-3
    with pytest.raises(InputError, match="hold no step that learnt from tokens; give those of a run that has"):
        Measured.from_records([*rollouts, nothing])


class Known:
    """Each ticket's play is given: that of task n waits n + 1 s."""

    def play(self, ticket, group, sample):
        return Play((1,), (ticket.task_index + 1.0,), "ok", float(ticket.sample % 2))


def test_a_workload_may_know_what_each_ticket_plays():
    scheduler = SchedulerConfig(mode="sync", groups_per_batch=1, group_size=2)
    fast = EngineSpeed(points=((1, 1e9),))
    it = simulate(config(scheduler=scheduler, workloads={"tasks": Known()}, engine=fast, batches=6, warmup=2))
    assert seconds_per_step(it) == pytest.approx((3 + 4 + 5 + 6) / 4 + 4 + 1)


def records_like(workload, groups, *, name="e", samples=4):
    """Of a run in which that was played, with a learning step for every four groups."""
    places = [(group, n) for group in range(groups) for n in range(samples)]
    plays = [(g, workload.play(Ticket(name, g, 0, n), Random(g), Random(f"{g}/{n}"))) for g, n in places]
    rollouts = [
        {"kind": "rollout", "environment": name, "group": f"{name}/{group}", "turn_tokens": list(play.tokens),
         "tool_seconds": 0.0, "outcome": play.outcome, "reward": play.reward} for group, play in plays
    ]  # fmt: skip
    steps = [{"kind": "train", "seconds": 3.0 + n % 3, "tokens": 100} for n in range(max(1, groups // 4))]
    return [*rollouts, *steps, {"kind": "engine", "running": 8, "tokens_per_second": 80.0}]


def test_a_record_drawn_anew_has_whole_groups_of_the_same_environments():
    records = [*records_like(AssumedWorkload(), 6), *records_like(AssumedWorkload(), 3, name="f", samples=2)]
    again = redrawn(records, Random(1))
    assert Counter(r["kind"] for r in again) == Counter(r["kind"] for r in records)
    groups = {}
    for record in again:
        if record["kind"] == "rollout":
            groups.setdefault((record["environment"], record["group"]), []).append(tuple(record["turn_tokens"]))
    assert Counter(name for name, _ in groups) == {"e": 6, "f": 3}
    assert {len(plays) for (name, _), plays in groups.items() if name == "e"} == {4}
    there = {}
    for record in records:
        if record["kind"] == "rollout":
            there.setdefault(record["group"], []).append(tuple(record["turn_tokens"]))
    assert all(plays in there.values() for plays in groups.values())
    assert len({tuple(plays) for plays in groups.values()}) < 9, "some are drawn twice"


def test_the_spread_is_none_without_chance_and_shrinks_with_the_record():
    same = [*records_like(AssumedWorkload(tokens=fixed(100)), 8)]
    for record in same:
        record.update({"seconds": 4.0} if record["kind"] == "train" else {})
        record.update({"reward": float(len(record["group"]))} if record["kind"] == "rollout" else {})
    keep = TaskSource(environment="e", uniform_groups="keep")
    still = config("async", batches=12, warmup=2).as_measured(Measured.from_records(same), sources=(keep,))
    assert max(spread_of(still, same, draws=3, max_staleness=(4,)).steps_per_hour) == pytest.approx(0, abs=1e-9)
    spreads = []
    for groups in (4, 128):
        records = records_like(AssumedWorkload(tokens=LongTail(100, 900)), groups)
        measured = config("async", batches=24, warmup=4).as_measured(Measured.from_records(records), sources=(keep,))
        spread = spread_of(measured, records, draws=12, max_staleness=(4,)).steps_per_hour[-1]
        spreads.append(spread / simulate(measured).steps_per_hour)
    assert 0 < 2 * spreads[1] < spreads[0]


def taught_by_one_of(groups, *, mixed=1):
    """A record of groups of 4 with equal rewards, but for so many."""
    records = records_like(AssumedWorkload(tokens=fixed(100)), groups)
    for number, record in enumerate(r for r in records if r["kind"] == "rollout"):
        record["reward"], record["outcome"] = float(number < 4 * mixed and number % 4 == 0), "ok"
    measured = Measured.from_records(records)
    return config("async", batches=8, warmup=2, sources=()).as_measured(measured), records


def test_draws_that_teach_nothing_end_and_are_left_out(monkeypatch):
    monkeypatch.setattr(machine, "GROUPS_IN_VAIN", 128)
    simulated, records = taught_by_one_of(16)
    found = spread_of(simulated, records, draws=5)
    assert 0 < found.left_out < 15 and all(math.isfinite(it) and it > 0 for it in found.steps_per_hour)
    nothing, records = taught_by_one_of(8, mixed=0)
    with pytest.raises(InputError, match=r"learns nothing from 128 groups in a row: .*\(512 [^)]*\)"):
        simulate(nothing)
    with pytest.raises(InputError, match="In 8 of 8 draws of the record no group teaches"):
        spread_of(nothing, records, draws=2)


def test_what_was_called_off_counts_as_longer_than_it_got():
    """Of answers of 10 to 1,000 tokens those over 500 are cut at 505 but for one in ten: the mean stays."""
    lengths = [10 * n for n in range(1, 101)] * 10
    cut = [length > 500 and number % 10 > 0 for number, length in enumerate(sorted(lengths))]
    rows = [
        {"kind": "rollout", "environment": "e", "group": str(number % 250), "turn_tokens": [505 if off else length],
         "tool_seconds": 0.0, "outcome": "aborted" if off else "ok", "reward": None if off else float(number % 2)}
        for number, (length, off) in enumerate(zip(sorted(lengths), cut, strict=True))
    ]  # fmt: skip
    measured = Measured.from_records([*rows, {"kind": "train", "seconds": 1.0, "tokens": 1}])
    plays = [play for group in measured.workloads["e"].groups for play in group]
    assert len(plays) == 1000 and {play.outcome for play in plays} == {"ok"}
    mean = sum(sum(play.tokens) for play in plays) / 1000
    assert mean == pytest.approx(505, rel=0.05), "300 tokens without them"
    with pytest.raises(InputError, match="no finished rollout"):
        Measured.from_records([row for row in rows if row["outcome"] == "aborted"])


def test_what_was_not_measured_or_is_given_stays_in_every_draw():
    records = records_like(AssumedWorkload(tokens=fixed(100)), 16)
    keep = TaskSource(environment="e", uniform_groups="keep")
    given = {"train_seconds": 40.0, "train_seconds_per_token": 0.0}
    base = config("async", batches=10, warmup=2, publish_seconds=20.0, engine=EngineSpeed(engines=3))
    two = base.as_measured(Measured.from_records(records), sources=(keep,), **given)
    assert two.publish_seconds == 20.0 and two.engine == EngineSpeed(points=((8, 80.0),), engines=3)
    assert seconds_per_step(simulate(two)) == pytest.approx(60.0, rel=0.01)
    spread = spread_of(two, records, draws=2, max_staleness=(4,), given=given).steps_per_hour
    assert spread[-1] == pytest.approx(0.0, abs=1e-6), "the trainer decides, and its time is given"


def test_more_sequences_than_the_engine_is_known_with_are_told_of():
    assert simulate(config("sync")).beyond == 0.0
    assert simulate(config("sync", engine=EngineSpeed(points=((4, 40.0),)))).beyond == 1.0


def test_a_task_of_a_pool_is_as_hard_as_before():
    """Some tasks are always solved, the others never."""
    workload = {"tasks": MeasuredWorkload(tuple((Play((10,), (0.0,), "ok", reward),) * 4 for reward in (0.0, 1.0)))}
    source = TaskSource(environment="tasks", pools=Pools(size=40))
    machine_ = machine._Machine(config("sync", workloads=workload, sources=(source,)))
    tickets = [Ticket("tasks", task, attempt) for task in range(8) for attempt in range(3)]
    for ticket in tickets:
        machine_._start(ticket)
    rewards = [machine_.playing[ticket.id].play.reward for ticket in tickets]
    assert set(rewards) == {0.0, 1.0} and all(len(set(rewards[n : n + 3])) == 1 for n in range(0, 24, 3))


def test_a_short_record_is_warned_of():
    assert shortness(records_like(AssumedWorkload(), 32)) is None
    assert "8 steps and 124 rollouts" in shortness(records_like(AssumedWorkload(), 32)[4:])
    assert "7 steps and 248 rollouts" in shortness(records_like(AssumedWorkload(), 31, samples=8))


def test_the_record_of_a_rollout():
    record = rollout_record(rollout(Ticket("e", 3, 1, 2), (4, 5), reward=0.5))
    assert record["group"] == "e/3/1/0" and record["turn_tokens"] == [2] and record["reward"] == 0.5
    Measured.from_records([record, {"kind": "train", "seconds": 1.0, "tokens": 2}])
    failed = rollout_record(rollout(Ticket("e", 3), (), outcome="env_failure"))
    assert failed["reward"] is None
    with pytest.raises(InputError, match="no step that learnt"):
        Measured.from_records([failed])


def test_concurrency_is_adapted_in_virtual_time():
    workload = {"tasks": AssumedWorkload(tokens=fixed(100), tool_seconds=fixed(60.0))}
    scheduler = SchedulerConfig(groups_per_batch=2, group_size=4, max_running=8, max_staleness=6)
    still = config("async", workloads=workload, scheduler=scheduler, batches=40)
    adapted = simulate(replace(still, concurrency=ConcurrencyConfig(least=8, most=256)))
    assert adapted.max_running > 16
    assert adapted.steps_per_hour > 2 * simulate(still).steps_per_hour


def test_settings_that_cannot_be():
    assert LongTail(3.0, 3.0).draw(Random(0)) == 3.0
    draws = sorted(LongTail(10, 100).draw(Random(i)) for i in range(4000))
    assert draws[2000] == pytest.approx(10, rel=0.1) and draws[3960] == pytest.approx(100, rel=0.35)
    for wrong in ({"warmup": 20}, {"swap_seconds": 2.0}, {"workloads": {}}, {"shared": 1.5}):
        with pytest.raises(InputError):
            config(**wrong)
    with pytest.raises(InputError, match="long tail"):
        LongTail(2, 1)
    for wrong in (math.inf, math.nan):
        with pytest.raises(InputError, match="long tail"):
            LongTail(2, wrong)
        with pytest.raises(InputError, match="tokens per second"):
            EngineSpeed(points=((1, wrong),))
    with pytest.raises(InputError, match="rise"):
        EngineSpeed(points=((8, 1.0), (1, 2.0)))
    assert math.isclose(EngineSpeed(points=((2, 10.0), (4, 30.0))).tokens_per_second(3), 20.0)
