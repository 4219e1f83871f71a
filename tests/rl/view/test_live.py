"""The live view: what it adds up, and how it looks with and without a terminal."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from glm5.rl.fleet import EngineState
from glm5.rl.view import LiveView, Snapshot, render
from glm5.rl.view.live import curve, line
from glm5.rl.view.snapshot import RECENT
from glm5.rl.view.watch import Watch

METRICS = {"reward": 0.5, "staleness": {"0": 30, "2": 10}, "mismatch": 2.5e-7, "surprise": 0.75, "trained": 8,
           "dropped": {"all right": 4, "stale": 1}, "requeued_because": {"environment failure": 2}}  # fmt: skip
SPEED = {
    "seconds": 2.0,
    "tokens_per_second": 812.0,
    "trainer_idle": 0.25,
    "sampler_idle": 0.0,
    "running": 48,
    "queue": 3,
}


def after(steps, **changes):
    snapshot = Snapshot(name="sums", mode="async", steps=20, groups_per_batch=4, staleness_bound=2, **changes)
    for step in range(steps):
        snapshot = snapshot.after({"step": step, **METRICS, "reward": step / 10}, SPEED)
    return snapshot


def text_of(renderable, width=110, **options):
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(renderable)
    return console.file.getvalue()


def test_steps_add_up():
    snapshot = after(12)
    assert (snapshot.step, snapshot.seconds, snapshot.trained) == (12, 24.0, 96)
    assert snapshot.dropped == {"all right": 48, "stale": 12} and snapshot.requeued == {"environment failure": 24}
    assert snapshot.staleness == {0: 30 * RECENT, 2: 10 * RECENT}
    assert snapshot.rewards == tuple(step / 10 for step in range(12))
    assert snapshot.left == pytest.approx(16.0)
    assert Snapshot(name="x", steps=3).left is None


def test_a_resumed_run_counts_its_pace_from_where_it_began():
    snapshot = Snapshot(name="x", steps=20, step=10).after({"step": 10, **METRICS}, SPEED)
    assert snapshot.left == pytest.approx(9 * 2.0)


def test_steps_that_were_learnt_from_again_have_no_pace():
    snapshot = Snapshot(name="x", steps=20)
    for step in range(10):  # as after a kill: the speed of what the checkpoint did not hold is not known
        snapshot = snapshot.after({"step": step, **METRICS}, SPEED if step < 4 else {})
    assert snapshot.left == pytest.approx(10 * 2.0)


def test_environments_are_told_apart_where_there_are_several():
    snapshot = after(1)
    for step in range(1, 8):
        snapshot = snapshot.after({"step": step, **METRICS, "rewards": {"sums": step / 10, "[b]": 0.25}}, SPEED)
    text = text_of(render(snapshot))
    assert "sums  0.500" in text and "[b]   0.250" in text  # the last five steps
    alone = after(1).after({"step": 1, **METRICS, "rewards": {"sums": 0.125}}, SPEED)
    assert "0.125" not in text_of(render(alone))
    many = {f"e{number}": 0.0 for number in range(20)}
    assert "and 13 more" in text_of(render(alone.after({"step": 2, **METRICS, "rewards": many}, SPEED)))


def test_everything_is_seen():
    engines = (EngineState("a", True, 12, 40, 1, None), EngineState("b", False, 3, 9, 0, None))
    snapshot = replace(after(12), engines=engines, note="the learner is slow")
    text = text_of(render(snapshot))
    for part in ("rl: sums (async)", "step 12/20", "812 tokens/s", "0:16 left", "reward 0.900", "3 of 4", "25%",
                 "2.50e-07", "0.750 nats", "staleness, at most 2", "75%", "96", "60", "all right", "48",
                 "environment failure", "a: v12, restarted 1×", "b: down", "the learner is slow"):  # fmt: skip
        assert part in text, part
    assert all(len(row) <= 60 for row in text_of(render(snapshot), width=60).splitlines())


def test_names_and_reasons_are_no_markup():
    snapshot = replace(after(1), name="[red]x[/red]", dropped={"[link=x]y[/link]": 1})
    text = text_of(render(snapshot))
    assert "[red]x[/red]" in text and "[link=x]y[/link]" in text


def test_a_view_without_steps_can_be_drawn():
    assert "no reward yet" in text_of(render(Snapshot(name="x", steps=3)))
    assert "no reward yet" in line(Snapshot(name="x", steps=3))


def test_without_a_terminal_each_step_is_one_line():
    console = Console(file=io.StringIO(), width=40)
    with LiveView(console) as view:
        for steps in range(4):
            for _ in range(3):  # between two steps nothing is said
                view.show(after(steps))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[3] == (
        "step 3/20  reward 0.200  812 tokens/s  running 48  queue 3  stale 2  idle trainer 25% sampler 0%  "
        "mismatch 2.5e-07  entropy 0.750  trained 24 dropped 15  requeued 6"
    )


def test_on_a_terminal_the_picture_is_redrawn_in_place():
    console = Console(file=io.StringIO(), width=110, force_terminal=True, color_system=None)
    with LiveView(console) as view:
        view.show(after(1))
        view.show(after(2))
    text = console.file.getvalue()
    assert "step 1/20" in text and "step 2/20" in text and "\x1b[1A" in text


def test_curves_go_from_their_least_to_their_most():
    assert curve([]) == "" and curve([2, 2]) == "▁▁" and curve([0, 1]) == "▁█"
    assert curve(range(1000), width=8) == "▁▂▃▄▅▆▇█"


def test_a_watch_draws_steps_at_once_and_glances_now_and_then():
    seen = []
    watch = Watch(seen.append, Snapshot(name="x", steps=5))
    for running in range(50):
        watch.glance(running, 2, lambda: [])
    assert 1 <= len(seen) < 50 and (seen[0].running, seen[0].queue) == (0, 2)
    seen.clear()
    watch.note("slow")
    watch.note("slow")
    assert [one.note for one in seen] == ["slow"]
    watch.learnt({"step": 0, **METRICS}, SPEED)
    assert (seen[-1].step, seen[-1].note, seen[-1].running) == (1, "", 48)
