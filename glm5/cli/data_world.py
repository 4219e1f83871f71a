"""`glm5 data world OUT`: the closed world of facts as files; with `--check`, whether it leaked into token datasets."""

from __future__ import annotations

import json as json_text
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from glm5.data.world import WorldConfig, build_world
from glm5.data.world_check import Findings, check_world
from glm5.data.world_text import open_world, world_dataset, write_world
from glm5.errors import DataError
from glm5.text import Tokenizer

SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class WorldOptions:
    """Invent a closed world of facts, or check that it leaked nowhere."""

    out: Annotated[Path, tyro.conf.Positional]
    """Directory of the world; with --check, one that exists."""
    entities: int = 100
    """Invented entities, a multiple of 100."""
    seed: int = 0
    """Of the whole world."""
    tokenizer: Path | None = None
    """Directory of a tokenizer: also write the documents as a token dataset, OUT/train. --check needs it."""
    check: tuple[Path, ...] = ()
    """Check these token datasets (all that a model is trained on) instead of building; the status is 1 for a leak."""
    overwrite: bool = False
    """Replace a world that is already there."""
    json: bool = False
    """Print one JSON object."""


def world(options: WorldOptions) -> int:
    """Builds or checks; prints what was made or found."""
    if options.check:
        return _check(options)
    if options.out.exists() and any(options.out.iterdir()) and not options.overwrite:
        raise DataError(f"{options.out} is not empty; give --overwrite, or another directory.")
    built = build_world(WorldConfig(entities=options.entities, seed=options.seed))
    manifest = write_world(built, options.out)
    if options.tokenizer is not None:
        dataset = world_dataset(built, Tokenizer.from_pretrained(options.tokenizer), options.out / "train")
        manifest = {**manifest, "train": {key: dataset.manifest[key] for key in ("documents", "tokens", "bytes")}}
    if options.json:
        print(json_text.dumps(manifest))
        return 0
    taught, never = manifest["facts"]["taught"], manifest["facts"]["never_taught"]
    print(f"{options.out}: {options.entities} entities, {taught} taught facts, {never} that are never taught")
    if options.tokenizer is not None:
        print(f"{options.out / 'train'}: {manifest['train']['tokens']:,} tokens, one pass shows each exposure")
    return 0


def _check(options: WorldOptions) -> int:
    if options.tokenizer is None:
        raise DataError("--check reads token datasets back as text; give their --tokenizer.")
    found = check_world(open_world(options.out), options.check, Tokenizer.from_pretrained(options.tokenizer))
    if options.json:
        print(json_text.dumps(found.to_json()))
    else:
        _show(found, Console())
    return 0 if found.ok else 1


def _show(found: Findings, console: Console) -> None:
    console.print(f"{found.documents:,} documents, {found.mentions:,} of them name something of this world")
    if found.exposures_checked:
        table = Table(title="sentences per fact in the pre-training text")
        for head in ("declared", "facts", "fewest", "most"):
            table.add_column(head, justify="right")
        for exposure, seen in sorted(found.stated.items()):
            table.add_row(*map(str, (exposure, seen["facts"], seen["fewest"], seen["most"])))
        console.print(table)
    else:
        console.print("no pre-training text among them, so exposures were not counted")
    for leak in found.leaks[:SHOWN]:
        console.print(f"LEAK: {leak}", markup=False, highlight=False)
    if len(found.leaks) > SHOWN:
        console.print(f"... and {len(found.leaks) - SHOWN} more")
    if found.ok:
        console.print("no leak found")
