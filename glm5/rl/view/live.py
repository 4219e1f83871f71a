"""The live view of a run: `render` makes a picture of a snapshot, `LiveView` keeps it on the terminal.

Where there is no terminal (a log file, a pipe), the view writes one plain line a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import TracebackType

from rich import box
from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from glm5.rl.view.snapshot import RECENT_REWARDS, Snapshot

BARS = "▁▂▃▄▅▆▇█"
CURVE = 40
"""Columns of the reward curve."""
LONGEST_REASON = 24
MOST_ENVIRONMENTS = 8
"""That are told apart."""


def render(snapshot: Snapshot) -> RenderableType:
    """All of it as a panel, some 90 columns wide; narrower terminals stack its parts."""
    done = Table.grid(padding=(0, 1))
    done.add_row(
        f"step {snapshot.step}/{snapshot.steps}",
        ProgressBar(total=max(snapshot.steps, 1), completed=snapshot.step, width=30),
        f"{snapshot.tokens_per_second:,.0f} tokens/s",
        "" if snapshot.left is None else f"{_time(snapshot.left)} left",
    )
    parts: list[RenderableType] = [
        done,
        _reward(snapshot),
        Columns([_flow(snapshot), _staleness(snapshot), _fates(snapshot)]),
    ]
    if len(snapshot.by_environment) > 1:
        parts.insert(2, _environments(snapshot))
    if snapshot.held:
        parts.append(_held(snapshot))
    if snapshot.engines:
        parts.append(_engines(snapshot))
    if snapshot.note:
        parts.append(Text(snapshot.note, style="bold yellow"))
    title = Text(f"rl: {snapshot.name}" + (f" ({snapshot.mode})" if snapshot.mode else ""))
    return Panel(Group(*parts), title=title, box=box.ROUNDED, expand=False)


def line(snapshot: Snapshot) -> str:
    """The same as one line of plain text."""
    reward = f"reward {snapshot.rewards[-1]:.3f}" if snapshot.rewards else "no reward yet"
    known = [
        f"step {snapshot.step}/{snapshot.steps}",
        reward,
        f"{snapshot.tokens_per_second:,.0f} tokens/s",
        f"running {snapshot.running}",
        f"queue {snapshot.queue}",
        f"stale {max(snapshot.staleness, default=0)}",
    ]
    if snapshot.trainer_idle is not None and snapshot.sampler_idle is not None:
        known.append(f"idle trainer {snapshot.trainer_idle:.0%} sampler {snapshot.sampler_idle:.0%}")
    if snapshot.mismatch is not None:
        known.append(f"mismatch {snapshot.mismatch:.1e}")
    if snapshot.entropy is not None:
        known.append(f"entropy {snapshot.entropy:.3f}")
    known += [f"{name} {now:.3f}" for name, (_, now) in snapshot.held.items() if name.endswith("/reward")]
    known.append(f"trained {snapshot.trained} dropped {sum(snapshot.dropped.values())}")
    known.append(f"requeued {sum(snapshot.requeued.values())}")
    return "  ".join([*known, *([snapshot.note] if snapshot.note else [])])


class LiveView:
    """A context manager; `show` replaces what is seen. `console` None: standard error."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._said = (-1, "")

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, snapshot: Snapshot) -> None:
        """On a terminal at once; elsewhere a line when a step was taken, or there is a new note."""
        if self._live is not None:
            self._live.update(render(snapshot), refresh=True)
        elif (snapshot.step, snapshot.note) != self._said:
            self._said = (snapshot.step, snapshot.note)
            self._console.print(line(snapshot), markup=False, highlight=False, soft_wrap=True)


def curve(values: Sequence[float], width: int = CURVE) -> str:
    """Values as a row of bars from their least to their most; of many, means of equal parts."""
    if not values:
        return ""
    count = min(width, len(values))
    cuts = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    return "".join(BARS[round((v - low) / (high - low) * (len(BARS) - 1)) if high > low else 0] for v in means)


def _reward(snapshot: Snapshot) -> RenderableType:
    if not snapshot.rewards:
        return Text("no reward yet", style="dim")
    recent = snapshot.rewards[-RECENT_REWARDS:]
    text = Text(f"reward {sum(recent) / len(recent):.3f} ", style="bold")
    text.append(curve(snapshot.rewards), style="green")
    text.append(f" {min(snapshot.rewards):.2f} to {max(snapshot.rewards):.2f}", style="dim")
    return text


def _environments(snapshot: Snapshot) -> RenderableType:
    """The reward of each: their mean also moves with their shares."""
    table = Table.grid(padding=(0, 2))
    for name, rewards in list(snapshot.by_environment.items())[:MOST_ENVIRONMENTS]:
        table.add_row(Text(f"  {name}", style="dim"), f"{sum(rewards) / len(rewards):.3f}")
    more = len(snapshot.by_environment) - MOST_ENVIRONMENTS
    return Group(table, Text(f"  and {more} more", style="dim")) if more > 0 else table


def _flow(snapshot: Snapshot) -> RenderableType:
    """Where work is, and who waits."""
    table = _table("flow")
    queue = f"{snapshot.queue}" + (f" of {snapshot.groups_per_batch}" if snapshot.groups_per_batch else "")
    table.add_row("rollouts running", str(snapshot.running))
    table.add_row("groups queued", queue)
    for name, share in (("trainer idle", snapshot.trainer_idle), ("sampler idle", snapshot.sampler_idle)):
        table.add_row(name, "" if share is None else f"{_bar(share)} {share:4.0%}")
    table.add_row("mismatch", "" if snapshot.mismatch is None else f"{snapshot.mismatch:.2e} nats")
    table.add_row("entropy", "" if snapshot.entropy is None else f"{snapshot.entropy:.3f} nats")
    return table


def _staleness(snapshot: Snapshot) -> RenderableType:
    """Tokens by age, the last steps together."""
    bound = "" if snapshot.staleness_bound is None else f", at most {snapshot.staleness_bound}"
    table = _table(f"staleness{bound}")
    found = snapshot.staleness
    total = sum(found.values())
    for age in range(max(found, default=0) + 1) if len(found) <= 12 else sorted(found):
        share = found.get(age, 0) / total if total else 0.0
        table.add_row(f"{age}", f"{_bar(share)} {share:4.0%}")
    return table


def _fates(snapshot: Snapshot) -> RenderableType:
    """What became of the samples."""
    table = _table("samples")
    table.add_row("trained", f"{snapshot.trained:,}")
    for name, reasons in (("dropped", snapshot.dropped), ("requeued", snapshot.requeued)):
        table.add_row(name, f"{sum(reasons.values()):,}")
        for reason, count in _ordered(reasons):
            table.add_row(Text(f"  {_cut(reason)}", style="dim"), Text(f"{count:,}", style="dim"))
    return table


def _held(snapshot: Snapshot) -> RenderableType:
    """What is measured and never learnt from."""
    table = _table("held out, now and at first")
    for name, (first, now) in snapshot.held.items():
        table.add_row(Text(name), f"{now:.3f}", Text(f"{first:.3f}", style="dim"))
    return table


def _engines(snapshot: Snapshot) -> RenderableType:
    text = Text("engines ", style="dim")
    for engine in snapshot.engines:
        state = f"v{engine.version}" if engine.up else "down"
        if engine.up and engine.engine is not None:
            state += f", {engine.engine.running} running"
        again = f", restarted {engine.restarts}×" if engine.restarts else ""
        text.append(f" {engine.name}: {state}{again} ", style="" if engine.up else "bold red")
    return text


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    return table


def _bar(share: float, width: int = 10) -> str:
    full = round(max(0.0, min(1.0, share)) * width)
    return "█" * full + "░" * (width - full)


def _ordered(reasons: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:5]


def _cut(text: str) -> str:
    return text if cell_len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"


def _time(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
