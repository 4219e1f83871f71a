"""`glm5 data build OUT`: sources to corpus, tokenizer and token shards."""

from __future__ import annotations

import json as json_text
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from glm5.data.build import build_data


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Build a corpus, a tokenizer and token shards from the text that installed packages carry."""

    out: Annotated[Path, tyro.conf.Positional]
    """Directory to write; it appears when it is complete."""
    tokenizer: Path | None = None
    """Directory of a tokenizer to use; one is learned from the training text when left out."""
    vocab_size: int = 4096
    """Tokens of a tokenizer that is learned."""
    heldout_per_thousand: int = 20
    """Documents of a thousand that are held out, chosen by their hash."""
    overwrite: bool = False
    """Replace an earlier build once the new one is complete."""
    json: bool = False
    """Print the manifest as one JSON object."""


def build(options: BuildOptions) -> int:
    """Builds with a bar on the standard error stream; prints where everything is."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        built = build_data(
            options.out,
            tokenizer=options.tokenizer,
            vocab_size=options.vocab_size,
            heldout_per_thousand=options.heldout_per_thousand,
            overwrite=options.overwrite,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    if options.json:
        print(json_text.dumps({"directory": str(options.out), **built.manifest}))
        return 0
    for split, part in built.manifest["datasets"].items():
        counts = f"{part['documents']:,} documents, {part['bytes'] / 1e6:,.2f} MB, {part['tokens']:,} tokens"
        print(f"{options.out / split}: {counts}")
    print(f"Look at it:  glm5 data inspect {options.out} --step 0")
    return 0
