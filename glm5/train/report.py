"""The report page of a run: one HTML file that opens from disk, without scripts or outside resources.

Loss curves as inline SVG, held-out bits per byte beside the lines that a model must beat, speed, samples and
configuration. Follows the reader's light or dark setting.
"""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm5.files import replacing
from glm5.train.run_directory import RunDirectory

WIDTH, HEIGHT, MARGIN = 720, 260, 44
CURVES = (
    ("loss", "total loss"),
    ("lm", "next token"),
    ("mtp", "multi-token prediction"),
    ("indexer_kl", "indexer KL"),
)
STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --paper: #fff; --faint: #8a919e; --line: #d9dde4;
        --c0: #2457d6; --c1: #0e8a5f; --c2: #c2571a; --c3: #8a3fb5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --paper: #15181d; --line: #333944;
          --c0: #7ea2ff; --c1: #4fcf9f; --c2: #f0955c; --c3: #c58af0; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .25rem .75rem .25rem 0;
       border-bottom: 1px solid var(--line); } td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: color-mix(in srgb, var(--line) 35%, transparent);
      padding: .75rem; border-radius: 6px; font-size: .85rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 11px; } .grid { stroke: var(--line); }
.curve { fill: none; stroke-width: 1.6; } figcaption, .faint { color: var(--faint); font-size: .9rem; }
"""


def write_report(run_directory: Path) -> Path:
    """Writes `report.html` from what the run directory holds so far, and gives its path."""
    run = RunDirectory.open(run_directory)
    metrics, speed = run.read("metrics"), run.read("speed")
    evaluation_file = run.path / "evaluation.json"
    evaluation = json.loads(evaluation_file.read_text(encoding="utf-8")) if evaluation_file.exists() else {}
    samples = sorted((run.path / "samples").glob("*.txt"))
    stage = run.description["stage"]
    parts = [
        f"<h1>{html.escape(stage)}: {html.escape(run.path.name)}</h1>",
        _summary(metrics, speed),
        "<h2>Loss</h2>",
        loss_figure(metrics),
        _evaluation(evaluation, metrics),
        f"<h2>Samples</h2><p class=faint>{html.escape(samples[-1].name)}</p><pre>"
        f"{html.escape(samples[-1].read_text(encoding='utf-8'))}</pre>" if samples else "",
        "<h2>Configuration</h2><pre>" + html.escape(json.dumps(run.description, indent=2)) + "</pre>",
    ]  # fmt: skip
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(stage)} {html.escape(run.path.name)}</title><style>{STYLE}</style><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    path = run.path / "report.html"
    with replacing(path) as file:
        file.write(page.encode())
    return path


def _summary(metrics: list[dict[str, Any]], speed: list[dict[str, Any]]) -> str:
    if not metrics or not speed:
        return "<p>No step has been taken yet.</p>"
    seconds = sum(line["seconds"] for line in speed)
    middle = statistics.median(line["tokens_per_second"] for line in speed)
    return (
        f"<p>{len(metrics):,} steps in {seconds:,.0f} seconds, {middle:,.0f} tokens per second (median); "
        f"loss {metrics[0]['loss']:.3f} &rarr; {metrics[-1]['loss']:.3f}.</p>"
    )


def _evaluation(evaluation: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    curve = [(line["step"] + 1, line["heldout_bits_per_byte"]) for line in metrics if "heldout_bits_per_byte" in line]
    if not evaluation and not curve:
        return ""
    rows = [(f"after step {step} (a part of the held-out text)", value) for step, value in curve]
    if evaluation:
        held = evaluation["heldout"]
        rows.append(
            (f"this model, {held['bytes']:,} bytes in rows of {evaluation['row_length']}", held["bits_per_byte"])
        )
        rows += list(evaluation["sanity_lines"].items())
    cells = "".join(f"<tr><td>{html.escape(n)}</td><td class=number>{v:.3f}</td></tr>" for n, v in rows)
    return f"<h2>Bits per byte of held-out text</h2><table>{cells}</table>"


def loss_figure(metrics: list[dict[str, Any]]) -> str:
    """All loss curves that the metrics hold, on one pair of axes."""
    series = [(label, [(line["step"], line[key]) for line in metrics if key in line]) for key, label in CURVES]
    series = [(label, points) for label, points in series if len(points) > 1]
    if not series:
        return "<p class=faint>Not enough steps for a curve.</p>"
    values = [value for _, points in series for _, value in points]
    low, high, last = min(values), max(values), max(points[-1][0] for _, points in series)
    high = high if high > low else low + 1

    def place(step: float, value: float) -> tuple[float, float]:
        x = MARGIN + (WIDTH - MARGIN - 8) * step / max(last, 1)
        return x, 8 + (HEIGHT - MARGIN - 8) * (high - value) / (high - low)

    marks = []
    for i in range(5):
        value = low + (high - low) * i / 4
        _, y = place(0, value)
        marks.append(f'<line class=grid x1="{MARGIN}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>')
        x, _ = place(last * i / 4, low)
        marks.append(f'<text x="{x:.1f}" y="{HEIGHT - 20}" text-anchor="middle">{last * i // 4}</text>')
    for index, (label, points) in enumerate(series):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(step, value) for step, value in _thinned(points)))
        marks.append(f'<polyline class=curve style="stroke: var(--c{index})" points="{path}"/>')
        at = f'x="{WIDTH - 12}" y="{20 + 15 * index}"'
        marks.append(f'<text {at} text-anchor="end" style="fill: var(--c{index})">{label}</text>')
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss over steps">{"".join(marks)}</svg>'
        "<figcaption>Nats per token over steps.</figcaption></figure>"
    )


def _thinned(points: Sequence[tuple[int, float]], most: int = 600) -> list[tuple[float, float]]:
    """Means of equal groups, so that a long run is as small a page as a short one."""
    size = max(1, -(-len(points) // most))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(statistics.fmean(s for s, _ in group), statistics.fmean(v for _, v in group)) for group in groups]
