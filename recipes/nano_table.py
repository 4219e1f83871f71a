"""The results of a run of `recipes.nano`: `python -m recipes.nano_table runs/nano --out docs/results/nano.md`.

Everything printed is read from the run: its summary, its stages' metrics and speeds, and the bars that its evaluation
was given. Nothing is measured here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.measure import machine

NEEDLES_BAR, RECALL_BAR = 0.9, 0.9


@dataclass
class Options:
    """Options of the table."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the whole run."""
    out: Path | None = None
    """Write the table there as Markdown."""
    commit: str = "unknown"
    """That the run was made at."""


def judged(value: float, bar: float | None) -> str:
    """Against its bar."""
    return "" if bar is None else f"{bar:.0%}: {'met' if value >= bar else 'MISSED'}"


def share(part: dict[str, Any]) -> str:
    """A proportion with its 95% interval."""
    return f"{part['value']:.1%} [{part['low']:.1%}, {part['high']:.1%}] ({part['correct']}/{part['total']})"


def times(run: Path) -> tuple[int, float]:
    """(steps, seconds of training) of a stage."""
    lines = [json.loads(line) for line in (run / "speed.jsonl").read_text(encoding="utf-8").splitlines()]
    return len(lines), sum(line["seconds"] for line in lines)


def stage_rows(root: Path, stages: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Steps, time and bits per byte."""
    for name, found in stages.items():
        steps, seconds = times(root / name)
        bits = found.get("bits_per_byte")
        said = "" if bits is None else f"{bits:.3f} in rows of {found['row_length']}"
        yield f"`{name}`", f"{steps:,}", f"{seconds:,.0f}", said


def result_rows(stages: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """What every stage's evaluation found, beside its bar."""
    for name, found in stages.items():
        lines = {what: f"{value:.3f}" for what, value in found.get("sanity_lines", {}).items()}
        yield from ((f"`{name}`, bits per byte: {what}", value, "") for what, value in lines.items())
        if "transformers" in found:
            worst = found["transformers"]["relative_difference"]
            yield f"`{name}`: logits against transformers, largest relative difference", f"{worst:.1e}", "1e-4"
        needles = found.get("needles", {})
        for length, part in needles.get("lengths", {}).items():
            bar = NEEDLES_BAR if needles["attention"] == "dense" and int(length) == 2048 else None
            what = f"`{name}`: needles in {int(length):,} tokens, {needles['attention']} attention"
            yield what, share(part), judged(part["value"], bar)
        if "indexer_recall" in found:
            recall = found["indexer_recall"]
            what = f"`{name}`: attention mass of the true top-k that the indexer finds, {recall['length']} tokens"
            bar = RECALL_BAR if name == "dsa1" else None
            yield what, f"{recall['mass']:.1%} (worst layer {recall['worst_mass']:.1%})", judged(recall["mass"], bar)
        for skill in found.get("skills", {}).get("skills", []):
            yield f"`{name}`: {skill['name']}", share(skill), judged(skill["value"], skill["bar"])


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ("---",) * len(head), *rows])


def main(options: Options) -> None:
    """Prints both tables."""
    stages = json.loads((options.run / "summary.json").read_text(encoding="utf-8"))["stages"]
    rows = list(stage_rows(options.run, stages))
    total = sum(times(options.run / name)[1] for name in stages) / 60
    session = json.loads((options.run / "pretrain" / "run.json").read_text(encoding="utf-8"))["sessions"][0]
    here = machine()
    text = "\n\n".join(
        [
            "# The recipe at `nano` size",
            f"`python -m recipes.nano --threads {session['threads']}`, one run, commit {options.commit}, PyTorch "
            f"{session['torch']}, {here['cpu']} with {here['cores']} cores.\nTable: `python -m recipes.nano_table`. "
            f"{total:.0f} minutes of training (at most 120 on two cores were asked), other work beside it.\nA skill's "
            "rows give the share of right answers with its 95% interval; the bars are for the last stage.",
            table(("stage", "steps", "seconds of training", "held-out bits per byte"), rows),
            table(("what", "found", "bar"), list(result_rows(stages))),
        ]
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
