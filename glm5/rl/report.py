"""The report page of an RL run: the reward curve, what became of the samples, and rollouts to read."""

from __future__ import annotations

import html
import json
from collections import Counter
from pathlib import Path
from typing import Any

from glm5.files import replacing
from glm5.train import RunDirectory
from glm5.train.charts import HEIGHT, MARGIN, WIDTH
from glm5.train.report import STYLE, configuration

SHOWN = 12


def write_rl_report(run_directory: Path) -> Path:
    """Writes `report.html` from what the run directory holds so far, and gives its path."""
    run = RunDirectory.open(run_directory)
    metrics = run.read("metrics")
    samples = sorted((run.path / "samples").glob("*.jsonl"))
    name = html.escape(run.path.name)
    parts = [
        f"<h1>rl: {name}</h1>",
        _summary(metrics),
        "<h2>Reward</h2>",
        reward_figure(metrics),
        "<h2>What became of the samples</h2>",
        _fates(metrics),
        *(_rollouts(samples[-1]) if samples else []),
        configuration(run),
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>rl {name}</title><style>{STYLE}</style><body>" + "\n".join(parts) + "</body></html>\n"
    )
    path = run.path / "report.html"
    with replacing(path) as file:
        file.write(page.encode())
    return path


def _summary(metrics: list[dict[str, Any]]) -> str:
    if not metrics:
        return "<p>No step has been taken yet.</p>"
    third = max(1, len(metrics) // 3)
    begin = sum(line["reward"] for line in metrics[:third]) / third
    end = sum(line["reward"] for line in metrics[-third:]) / third
    return (
        f"<p>{len(metrics)} steps; mean reward {begin:.3f} over the first {third}, {end:.3f} over the last {third}. "
        f"Largest mismatch of trainer and sampler: {max(line.get('mismatch', 0.0) for line in metrics):.1e} nats.</p>"
    )


def reward_figure(metrics: list[dict[str, Any]]) -> str:
    """Mean reward of every step as a point, and the running mean of five steps as a line. An inline SVG."""
    if len(metrics) < 2:
        return "<p class=faint>Not enough steps for a curve.</p>"
    rewards = [line["reward"] for line in metrics]
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
        "<figcaption>Mean reward of a step's samples; the line is the mean of the last five.</figcaption></figure>"
    )


def _fates(metrics: list[dict[str, Any]]) -> str:
    counts: Counter[str] = Counter()
    for line in metrics:
        counts["sampled"] += line["sampled"]
        counts["trained"] += line["trained"]
        counts["requeued"] += line["requeued"]
        for reason, number in line["dropped"].items():
            counts[f"dropped: {reason}"] += number
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td class=number>{n:,}</td></tr>" for name, n in counts.items())
    return f"<table>{rows}</table>"


def _rollouts(file: Path) -> list[str]:
    """The first samples of the last step."""
    lines = file.read_text(encoding="utf-8").splitlines()[:SHOWN]
    cells = []
    for sample in map(json.loads, lines):
        value = "none" if sample["reward"] is None else f"{sample['reward']['value']:g}"
        shown = (sample["question"], sample["text"], sample["answer"], value, sample["fate"])
        cells.append("<tr>" + "".join(f"<td>{html.escape(str(text))}</td>" for text in shown) + "</tr>")
    heads = "".join(f"<th>{head}</th>" for head in ("question", "answer", "expected", "reward", "fate"))
    return [f"<h2>Samples of the last step</h2><table><tr>{heads}</tr>{''.join(cells)}</table>"]
