"""The report page of an RL run: rewards, what became of the samples, how stale they were, who waited, how far trainer
and sampler were apart. One HTML file from what the run directory holds, of the plain loop as of the orchestrator; a run
with a journal also gets the page of its rollouts (`glm5.rl.view`).
"""

from __future__ import annotations

import html
import json
import logging
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm5.errors import RunError
from glm5.files import replacing
from glm5.rl.event_log import events_of
from glm5.rl.journal import read_journal
from glm5.rl.learnt import Learnt
from glm5.rl.retention import PREFIX
from glm5.rl.session import JOURNAL
from glm5.rl.view.history import RUN_ENDED, waiting
from glm5.rl.view.of_run import view_run
from glm5.train import RunDirectory
from glm5.train.charts import HEIGHT, MARGIN, WIDTH, Points, heat_map, line_chart, thinned
from glm5.train.report import STYLE, configuration

log = logging.getLogger("glm5.rl")
SHOWN = 12
RETENTION, REPORT = "retention.json", "report.html"
"""In the run directory: what was measured of the finished model, and the page."""
ROLLOUT_TOKENS = 1_000_000
"""Of the page of rollouts that the report makes."""
MOST_COLUMNS = 120
Lines = list[dict[str, Any]]


def write_rl_report(run_directory: Path) -> Path:
    """Writes `report.html` from what the run directory holds so far, and gives its path."""
    run = RunDirectory.open(run_directory)
    metrics, speed = run.read("metrics"), run.read("speed")
    samples = sorted((run.path / "samples").glob("*.jsonl"))
    name = html.escape(run.path.name)
    parts = [
        f"<h1>rl: {name}</h1>",
        _summary(metrics),
        _learnt(run, metrics),
        _link(run),
        "<h2>Reward</h2>",
        reward_figure(metrics),
        _by_environment(metrics),
        *_held(metrics, run),
        "<h2>What became of the samples</h2>",
        _fates(metrics),
        _left(run.path / JOURNAL) if run.finished else "",
        _staleness(metrics),
        _bubble(speed),
        _distance(metrics),
        *(_rollouts(samples[-1]) if samples else []),
        configuration(run),
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>rl {name}</title><style>{STYLE}</style><body>" + "\n".join(parts) + "</body></html>\n"
    )
    path = run.path / REPORT
    with replacing(path) as file:
        file.write(page.encode())
    return path


def _summary(metrics: Lines) -> str:
    if not metrics:
        return "<p>No step has been taken yet.</p>"
    rewards = [line["reward"] for line in metrics if line["reward"] is not None]
    third = max(1, len(rewards) // 3)
    said = "nothing was scored"
    if rewards:
        begin, end = statistics.fmean(rewards[:third]), statistics.fmean(rewards[-third:])
        said = f"mean reward {begin:.3f} over the first {third} with one, {end:.3f} over the last {third}"
    return (
        f"<p>{len(metrics)} steps; {said}. "
        f"Largest mismatch of trainer and sampler: {max(line.get('mismatch', 0.0) for line in metrics):.1e} nats.</p>"
    )


def _learnt(run: RunDirectory, metrics: Lines) -> str:
    """Why it ended before its last step."""
    learnt = Learnt.read(run.path)
    return "" if learnt is None or learnt.step != len(metrics) else f"<p>{html.escape(learnt.sentence)}</p>"


def _link(run: RunDirectory) -> str:
    """Makes the page of rollouts, and points to it."""
    if not (run.path / JOURNAL).exists():
        return ""
    try:
        page = view_run(run.path, most_tokens=ROLLOUT_TOKENS)
    except Exception as error:  # the figures do not need it
        log.exception("The page of rollouts of %s could not be made.", run.path)
        return f"<p>The page of rollouts could not be made: {html.escape(repr(error))}</p>"
    return f'<p><a href="{page.name}">The rollouts</a>: every episode, turn, tool call and token.</p>'


def reward_figure(metrics: Lines) -> str:
    """Mean reward of every step as a point, and the running mean of five points as a line. An inline SVG.

    Of many steps a point is the mean of several, so that a long run is as small a page as a short one.
    """
    metrics = [line for line in metrics if line["reward"] is not None]
    if len(metrics) < 2:
        return "<p class=faint>Not enough steps for a curve.</p>"
    rewards = [reward for _, reward in thinned(_points(metrics, "reward"))]
    each = -(-len(metrics) // len(rewards))
    low, high = min(0.0, *rewards), max(1.0, *rewards)

    def place(step: int, value: float) -> str:
        x = MARGIN + (WIDTH - MARGIN - 8) * step / (len(rewards) - 1)
        return f"{x:.1f},{8 + (HEIGHT - MARGIN - 8) * (high - value) / (high - low):.1f}"

    marks = []
    for value in (low, (low + high) / 2, high):
        y = place(0, value).split(",")[1]
        marks.append(f'<line class=grid x1="{MARGIN}" x2="{WIDTH - 8}" y1="{y}" y2="{y}"/>')
        marks.append(f'<text x="{MARGIN - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    marks.append(f'<text x="{MARGIN}" y="{HEIGHT - 20}">0</text>')
    marks.append(f'<text x="{WIDTH - 8}" y="{HEIGHT - 20}" text-anchor="end">{metrics[-1]["step"]}</text>')
    for step, reward in enumerate(rewards):
        x, y = place(step, reward).split(",")
        marks.append(f'<circle cx="{x}" cy="{y}" r="2.5" style="fill: var(--faint)"/>')
    means = [sum(rewards[max(0, i - 4) : i + 1]) / min(i + 1, 5) for i in range(len(rewards))]
    line = " ".join(place(step, value) for step, value in enumerate(means))
    marks.append(f'<polyline class=curve style="stroke: var(--c0)" points="{line}"/>')
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="reward over steps">{"".join(marks)}</svg>'
        f"<figcaption>Mean reward of the samples of {'a step' if each == 1 else f'{each} steps'}; the line is the mean "
        "of the last five points.</figcaption></figure>"
    )


def _by_environment(metrics: Lines) -> str:
    """Rewards of each environment, where there are several: their mean also moves with their shares."""
    noted = [{"step": line["step"], **line.get("rewards", {})} for line in metrics]
    names = sorted({name for line in noted for name in line} - {"step"})
    if len(names) < 2:
        return ""
    rows, series = [], list[tuple[str, Points]]()
    for name in names:
        points = _points(noted, name)
        series.append((name, points))
        third = max(1, len(points) // 3)
        means = [statistics.fmean(value for _, value in part) for part in (points[:third], points[-third:])]
        values = "".join(f"<td class=number>{value:.3f}</td>" for value in means)
        rows.append(f"<tr><td>{html.escape(name)}</td>{values}</tr>")
    head = "<tr><th>environment</th><th>first third</th><th>last third</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>" + line_chart(
        series, label="rewards of environments over steps",
        caption="Mean reward of a step's samples of each environment. The mean of all, above, also moves when one "
        "environment gets a larger share.",
    )  # fmt: skip


def measured(run: RunDirectory, metrics: Lines) -> dict[str, Points]:
    """What is measured on the way (`retention.py`, `held_out.py`), by name: the values of versions in their order, the
    last those of the finished model."""
    last = json.loads((run.path / RETENTION).read_text()) if (run.path / RETENTION).exists() else {}
    finished = last.get("version") == len(metrics)  # not those of a model that has learnt on since
    lines = [*metrics, {**last, "step": last["version"]}] if finished else metrics
    names = sorted({name for line in lines for name in line if name.startswith(PREFIX)})
    return {name.removeprefix(PREFIX): _points(lines, name) for name in names}


def _held(metrics: Lines, run: RunDirectory) -> list[str]:
    """Charts and a table of what was measured."""
    series = list(measured(run, metrics).items())
    if not series:
        return []
    rows = []
    for short, points in series:
        values = "".join(f"<td class=number>{value:.3f}</td>" for value in (points[0][1], points[-1][1]))
        rows.append(f"<tr><td>{html.escape(short)}</td>{values}</tr>")
    charts = [
        line_chart(some, label=f"held-out {what} over versions", caption=f"Held-out {what}, by version.")
        for what, some in (
            ("rewards", [one for one in series if one[0].endswith("/reward")]),
            ("bits per byte", [one for one in series if one[0].endswith("bits_per_byte")]),
        )
        if some
    ]
    head = "<tr><th>measure</th><th>first</th><th>last</th></tr>"
    return ["<h2>Held out</h2>", *charts, f"<table>{head}{''.join(rows)}</table>"]


def _fates(metrics: Lines) -> str:
    """The accounts, and how the episodes ended."""
    counts: Counter[str] = Counter()
    for line in metrics:
        counts["sampled"] += line["sampled"]
        counts["trained"] += line["trained"]
        counts["requeued"] += line["requeued"]
        for reason, number in line["dropped"].items():
            counts[f"dropped: {reason}"] += number
        for outcome, number in line.get("outcomes", {}).items():
            counts[f"ended: {outcome}"] += number
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td class=number>{n:,}</td></tr>" for name, n in counts.items())
    return f"<table>{rows}</table>"


def _left(journal: Path) -> str:
    """What a finished run has sampled and not learnt from; nothing for runs without a journal."""
    try:
        samples = waiting(event for record in read_journal(journal) for event in events_of(record))
    except RunError:  # damaged, as the place of the link to the rollouts says
        samples = 0
    return (
        f"<p>{samples:,} samples waited to be learnt from when the run ended. They, and what was under way, count as "
        f"dropped ({RUN_ENDED}) until the run is made longer.</p>"
        if samples else ""
    )  # fmt: skip


def _staleness(metrics: Lines) -> str:
    """Ages of the tokens that were learnt from, step by step; nothing for runs that note none."""
    noted = [line for line in metrics if isinstance(line.get("staleness"), dict)]
    ages = [{int(age): count for age, count in line["staleness"].items()} for line in noted]
    oldest = max((age for one in ages for age in one), default=0)
    if not oldest:
        return ""
    size = -(-len(noted) // MOST_COLUMNS)
    columns = [noted[i]["step"] for i in range(0, len(noted), size)]
    merged = [sum((Counter(one) for one in ages[i : i + size]), Counter()) for i in range(0, len(ages), size)]
    rows = [[one[age] / max(one.total(), 1) for one in merged] for age in range(oldest + 1)]
    total = sum(merged, Counter())
    mean = sum(age * count for age, count in total.items()) / total.total()
    return f"<h2>Staleness</h2><p>Mean {mean:.2f} versions, at most {oldest}.</p>" + heat_map(
        rows, columns, most=1.0, label="staleness over steps",
        caption="Share of a step's tokens by the versions between the weights that sampled them and those that learnt: "
        "0 at the top; steps from left to right.",
    )  # fmt: skip


def _bubble(speed: Lines) -> str:
    """Who waited, and how much was under way; nothing for runs that note none."""
    if not any("trainer_idle" in line for line in speed):
        return ""
    seconds = sum(line["seconds"] for line in speed) or 1.0
    shares = {
        name: sum(line[f"{name}_idle"] * line["seconds"] for line in speed) / seconds for name in ("trainer", "sampler")
    }
    return (
        f"<h2>The bubble</h2><p>Over {seconds:,.0f} s the trainer was idle {shares['trainer']:.0%} of the time and the "
        f"sampler {shares['sampler']:.0%}.</p>"
        + line_chart(
            [("trainer idle", _points(speed, "trainer_idle")), ("sampler idle", _points(speed, "sampler_idle"))],
            label="idle shares over steps", caption="Share of each step's time in which nobody learnt, or sampled.",
        )
        + line_chart(
            [("running", _points(speed, "running")), ("queued groups", _points(speed, "queue"))],
            label="rollouts under way over steps",
            caption="The most rollouts that ran at once in a step, and groups that waited when it ended.",
        )
    )  # fmt: skip


def _distance(metrics: Lines) -> str:
    """Mismatch and entropy."""
    parts = []
    if any(line.get("mismatch") for line in metrics):
        parts.append(
            line_chart(
                [("mismatch", _points(metrics, "mismatch"))], label="mismatch over steps", log=True,
                caption="Mean |log-probability of the trainer - of the sampler| of trained tokens, nats; logarithmic.",
            )
        )  # fmt: skip
    if any("surprise" in line for line in metrics):
        parts.append(
            line_chart(
                [("entropy", _points(metrics, "surprise"))], label="entropy over steps",
                caption="Mean -log p of the sampled tokens, nats: an estimate of the policy's entropy.",
            )
        )  # fmt: skip
    return "".join(["<h2>Trainer, sampler, entropy</h2>", *parts]) if parts else ""


def _points(lines: Sequence[dict[str, Any]], key: str) -> Points:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _rollouts(file: Path) -> list[str]:
    """The first samples of the last step, of the plain loop."""
    lines = file.read_text(encoding="utf-8").splitlines()[:SHOWN]
    cells = []
    for sample in map(json.loads, lines):
        value = "none" if sample["reward"] is None else f"{sample['reward']['value']:g}"
        shown = (sample["question"], sample["text"], sample["answer"], value, sample["fate"])
        cells.append("<tr>" + "".join(f"<td>{html.escape(str(text))}</td>" for text in shown) + "</tr>")
    heads = "".join(f"<th>{head}</th>" for head in ("question", "answer", "expected", "reward", "fate"))
    return [f"<h2>Samples of the last step</h2><table><tr>{heads}</tr>{''.join(cells)}</table>"]
