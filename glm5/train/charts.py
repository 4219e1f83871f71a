"""Curves and heat maps as inline SVG: no scripts, no outside resources, colours from the page's style."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Sequence

WIDTH, HEIGHT, MARGIN = 720, 260, 56
RIGHT = 16
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
    for value, text in _log_ticks(low, high) if log else ticks(low, high):
        _, y = place(0, value)
        marks.append(f'<line class=grid x1="{MARGIN}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for step, text in ticks(0, max(last, 1), whole=True):
        x, _ = place(step, low)
        marks.append(f'<text x="{x:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{text}</text>')
    for index, (_, points) in enumerate(series):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(step, value) for step, value in thinned(points)))
        marks.append(f'<polyline class=curve style="stroke: var(--c{index % 4})" points="{path}"/>')
    return (
        f'<figure>{_legend([name for name, _ in series])}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(label)}">{"".join(marks)}</svg><figcaption>{caption}</figcaption></figure>'
    )


def _legend(names: Sequence[str]) -> str:
    """The names of the curves in their colours, above them."""
    spans = [f'<span style="color: var(--c{i % 4})">{html.escape(name)}</span>' for i, name in enumerate(names)]
    return f"<p class=legend>{''.join(spans)}</p>"


def ticks(low: float, high: float, *, whole: bool = False) -> list[tuple[float, str]]:
    """(place, text) of three to eight round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    gap = next(power * size for size in (5, 2, 1) if (high - low) / (power * size) >= 3 or size == 1)
    gap = max(gap, 1.0) if whole else gap
    digits = max(0, -math.floor(math.log10(gap) + 1e-9))
    numbers = [i * gap for i in range(math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9) + 1)]
    return [
        (number, short(number) if abs(number) >= 10_000 and not whole else f"{number:,.{digits}f}")
        for number in numbers
    ]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """(log10, text) of round numbers on a logarithmic axis: 1, 2 and 5, or powers of ten over a wide range."""
    sizes = (1, 2, 5) if high - low < 2.5 else (1,)
    places = [power + math.log10(size) for power in range(math.floor(low), math.ceil(high) + 1) for size in sizes]
    return [(place, f"{10**place:.3g}") for place in places if low <= place <= high] or [(low, short(10**low))]


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
    for i in range(0, len(columns), max(1, -(-len(columns) // 6))):
        x = MARGIN + (i + 0.5) * width
        cells.append(f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{columns[i]:,}</text>')
    cells.append(f'<text x="{MARGIN - 8}" y="{8 + height:.1f}" text-anchor="end">0</text>')
    cells.append(f'<text x="{MARGIN - 8}" y="{bottom:.1f}" text-anchor="end">{len(rows) - 1}</text>')
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {bottom + 28:.0f}" role="img" aria-label="{html.escape(label)}">'
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
