"""Curves and heat maps as inline SVG: no scripts, no outside resources, colours from the page's style."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Sequence

WIDTH, HEIGHT, MARGIN = 720, 260, 44
RIGHT = 8
Points = Sequence[tuple[float, float]]


def line_chart(series: Sequence[tuple[str, Points]], *, label: str, caption: str, log: bool = False) -> str:
    """Curves of (step, value) on one pair of axes; a curve of fewer than two points is left out.

    label: what a screen reader says. log: a logarithmic axis, for values above 0.
    """
    if log:
        series = [(name, [(step, math.log10(value)) for step, value in points if value > 0]) for name, points in series]
    series = [(name, points) for name, points in series if len(points) > 1]
    if not series:
        return "<p class=faint>Not enough steps for a curve.</p>"
    values = [value for _, points in series for _, value in points]
    low, high, last = min(values), max(values), max(points[-1][0] for _, points in series)
    high = high if high > low else low + 1

    def place(step: float, value: float) -> tuple[float, float]:
        x = MARGIN + (WIDTH - MARGIN - RIGHT) * step / max(last, 1)
        return x, 8 + (HEIGHT - MARGIN - 8) * (high - value) / (high - low)

    marks = []
    for i in range(5):
        value = low + (high - low) * i / 4
        _, y = place(0, value)
        marks.append(f'<line class=grid x1="{MARGIN}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shown = 10**value if log else value
        marks.append(f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{short(shown)}</text>')
        x, _ = place(last * i / 4, low)
        marks.append(f'<text x="{x:.1f}" y="{HEIGHT - 20}" text-anchor="middle">{last * i / 4:.0f}</text>')
    for index, (name, points) in enumerate(series):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(step, value) for step, value in thinned(points)))
        marks.append(f'<polyline class=curve style="stroke: var(--c{index % 4})" points="{path}"/>')
        at = f'x="{WIDTH - 12}" y="{20 + 15 * index}"'
        marks.append(f'<text {at} text-anchor="end" style="fill: var(--c{index % 4})">{html.escape(name)}</text>')
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">{"".join(marks)}'
        f"</svg><figcaption>{caption}</figcaption></figure>"
    )


def heat_map(rows: Sequence[Sequence[float]], columns: Sequence[int], *, label: str, caption: str, most: float) -> str:
    """Cells from 0 (the page's colour) to `most` (full colour); a title on each cell says its value.

    rows: top to bottom, each as long as `columns`, whose numbers (steps) stand below.
    """
    height = max(4.0, min(14.0, 220 / max(1, len(rows))))
    width = (WIDTH - MARGIN - RIGHT) / max(1, len(columns))
    cells = []
    for i, row in enumerate(rows):
        cells += [
            f'<rect class=heat x="{MARGIN + j * width:.1f}" y="{8 + i * height:.1f}" width="{width + 0.2:.1f}" '
            f'height="{height + 0.2:.1f}" fill-opacity="{min(1.0, value / most):.2f}">'
            f"<title>row {i}, step {columns[j]}: {value:.2f}</title></rect>"
            for j, value in enumerate(row)
        ]
    bottom = 8 + len(rows) * height
    for i in range(0, len(columns), max(1, len(columns) // 5)):
        cells.append(f'<text x="{MARGIN + i * width:.1f}" y="{bottom + 16:.1f}">{columns[i]}</text>')
    cells.append(f'<text x="{MARGIN - 6}" y="{8 + height:.1f}" text-anchor="end">0</text>')
    cells.append(f'<text x="{MARGIN - 6}" y="{bottom:.1f}" text-anchor="end">{len(rows) - 1}</text>')
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {bottom + 24:.0f}" role="img" aria-label="{html.escape(label)}">'
        f"{''.join(cells)}</svg><figcaption>{caption}</figcaption></figure>"
    )


def short(value: float) -> str:
    """A number for an axis."""
    if value and (abs(value) >= 10_000 or abs(value) < 0.01):
        return f"{value:.0e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"


def thinned(points: Points, most: int = 600) -> list[tuple[float, float]]:
    """Means of equal groups, so that a long run is as small a page as a short one."""
    size = max(1, -(-len(points) // most))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(statistics.fmean(s for s, _ in group), statistics.fmean(v for _, v in group)) for group in groups]
