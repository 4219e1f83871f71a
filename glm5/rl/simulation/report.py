"""Simulations for people: a table, and a page with curves."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from glm5.files import replacing
from glm5.rl.simulation.config import Simulation
from glm5.train.charts import line_chart
from glm5.train.report import STYLE


def comparison(simulations: Sequence[Simulation], spreads: Sequence[float] = ()) -> str:
    """A table with a line for each. spreads: of the steps per hour (`spread_of`), where they are known."""
    head = ("mode", "bound", "running", "steps/h", "rollouts/s", "tokens/s", "trainer idle", "sampler idle",
            "sampler use", "wasted", "staleness")  # fmt: skip
    rows = [head]
    for it, spread in zip_longest(simulations, spreads):
        rows.append((
            it.mode, str(it.max_staleness), str(it.max_running),
            f"{it.steps_per_hour:.0f}" + ("" if spread is None else f" ± {spread:.0f}"),
            f"{it.rollouts_per_second:.2f}", f"{it.tokens_per_second:.0f}", f"{it.trainer_idle:.0%}",
            f"{it.sampler_idle:.0%}", f"{it.sampler_use:.0%}", f"{it.wasted:.0%}",
            f"{it.mean_staleness:.2f}, at most {max(it.staleness, default=0)}"))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def write_page(simulations: Sequence[Simulation], path: Path, spreads: Sequence[float] = ()) -> None:
    """One HTML file: the table, throughput against the bound, and what was under way in each simulation."""
    ahead = [it for it in simulations if it.mode == "async"]
    limits = sorted({it.max_running for it in ahead})
    speed = [(f"at most {limit} rollouts", [(float(it.max_staleness), it.rollouts_per_second) for it in ahead
              if it.max_running == limit]) for limit in limits[:4]]  # fmt: skip
    parts = [
        "<h1>Simulated reinforcement learning</h1>",
        f"<pre>{html.escape(comparison(simulations, spreads))}</pre>",
        "<h2>Rollouts learnt from per second, by the staleness bound</h2>",
        line_chart(speed, label="rollouts per second by bound", caption="async mode; versions"),
    ]
    for it in simulations:
        name = f"{it.mode}, bound {it.max_staleness}, at most {it.max_running} rollouts"
        running = [(seconds, float(n)) for seconds, n, _ in it.timeline]
        ready = [(seconds, float(n)) for seconds, _, n in it.timeline]
        chart = line_chart([("rollouts under way", running), ("groups ready", ready)], label=name, caption="seconds")
        parts.append(f"<details><summary>{html.escape(name)}</summary>{chart}</details>")
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>rl, simulated</title><style>{STYLE}</style><body>" + "\n".join(parts) + "</body></html>\n"
    )
    with replacing(path) as file:
        file.write(page.encode())
