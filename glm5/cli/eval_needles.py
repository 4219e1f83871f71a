"""`glm5 eval RUN --suite needles --filler DATASET`: the share of needles found, by length and depth."""

from __future__ import annotations

import json as json_text
from pathlib import Path

from rich.console import Console
from rich.table import Table

from glm5.errors import InputError
from glm5.evals.needles import NeedleConfig, NeedleResult, needles_of, write_needles


def run(model: Path, filler: Path | None, config: NeedleConfig, *, out: Path | None, json: bool) -> int:
    """Prints a table, or one JSON object; `out` keeps numbers and answers. Raises InputError without `filler`."""
    if filler is None:
        raise InputError("needles are hidden in text; name a held-out dataset, such as --filler runs/x/data/heldout.")
    result = needles_of(model, filler, config)
    if out is not None:
        write_needles(out, result)
    if json:
        print(json_text.dumps(result.to_json()))
    else:
        Console().print(table(result))
    return 0


def table(result: NeedleResult) -> Table:
    """One line per length: the accuracy at each depth, and as a whole with its interval."""
    c = result.config
    shown = Table(title=f"needles found, {c.attention} attention, {c.per_cell} questions a cell")
    for head in ("tokens", *(f"depth {depth:.0%}" for depth in c.depths), "all", "95% interval"):
        shown.add_column(head, justify="right")
    for length in c.lengths:
        whole = result.accuracy(length)
        cells = [f"{result.accuracy(length, depth).value:.0%}" for depth in c.depths]
        shown.add_row(f"{length:,}", *cells, f"{whole.value:.1%}", f"{whole.low:.1%} to {whole.high:.1%}")
    return shown
