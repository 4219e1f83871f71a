"""How `glm5 train` prints a replayed step and the verdict on resume."""

from __future__ import annotations

import dataclasses
import json

from rich.console import Console
from rich.table import Table

from glm5.train.replay import Replayed
from glm5.train.verify_resume import Verdict


def print_replay(found: Replayed, console: Console, *, as_json: bool) -> int:
    """The batch as text, the numbers then and now; the exit status is 1 when they differ."""
    if as_json:
        print(json.dumps({**dataclasses.asdict(found), "equal": found.equal}))
        return 0 if found.equal or found.recorded is None else 1
    for row, text in enumerate(found.texts):
        console.rule(f"row {row}", align="left")
        console.print(text, markup=False, highlight=False)
    console.rule(f"step {found.step}, computed again from the checkpoint of step {found.restored}", align="left")
    table = Table("", "now", "metrics.jsonl")
    for name, value in found.values.items():
        recorded = "-" if found.recorded is None else repr(found.recorded.get(name))
        differs = found.recorded is not None and name in found.differences
        table.add_row(name, repr(value), recorded, style="red" if differs else None)
    console.print(table)
    if found.recorded is None:
        console.print("metrics.jsonl has no line of this step: the run stopped in it, or before it.")
        return 0
    console.print("Equal to metrics.jsonl, to the bit." if found.equal else "NOT equal to metrics.jsonl.")
    return 0 if found.equal else 1


def print_verdict(verdict: Verdict, console: Console, *, as_json: bool) -> int:
    """Kills, hashes, verdict; the exit status is 1 when the runs differ or nothing was proved."""
    if as_json:
        print(json.dumps({**dataclasses.asdict(verdict), "equal": verdict.equal, "proved": verdict.proved}))
        return 0 if verdict.proved else 1
    kills = Table("kill", "after step", "seconds later", "lines written", title="SIGKILL")
    for i, kill in enumerate(verdict.kills, 1):
        lines = "the run had ended" if kill.finished else str(kill.lines)
        kills.add_row(str(i), str(kill.target), f"{kill.seconds_after:.3f}", lines)
    console.print(kills)
    files = Table("", "uninterrupted", "killed and resumed")
    for name in sorted(verdict.whole.keys() | verdict.killed.keys()):
        same = name not in verdict.differences
        hashes = (verdict.whole.get(name, "missing")[:16], verdict.killed.get(name, "missing")[:16])
        files.add_row(name, *hashes, style=None if same else "red")
    console.print(files)
    said = "THE RUNS DIFFER."
    if verdict.proved:
        said = "the killed and resumed run is the same run, to the bit."
    elif verdict.equal:
        said = "no kill met a run that was still going; take more steps or kills."
    console.print(f"Verdict: {said}")
    return 0 if verdict.proved else 1
