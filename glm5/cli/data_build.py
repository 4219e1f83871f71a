"""`glm5 data build OUT`: sources to corpus, tokenizer and token shards."""

from __future__ import annotations

import dataclasses
import json as json_text
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from glm5.data.build import build_data
from glm5.data.local_sources import TEXT_SUFFIXES
from glm5.data.preparation import Preparation
from glm5.data.recipe import UNKNOWN_LICENCE, DataRecipe, Kind, SourceSpec, read_recipe
from glm5.errors import InputError


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Build a corpus, a tokenizer and token shards from any text.

    Without a source, from the text that the installed packages carry.
    """

    out: Annotated[Path, tyro.conf.Positional]
    """Directory to write; it appears when it is complete."""
    text: tuple[str, ...] = ()
    """Folders or files of plain text, Markdown, reStructuredText or code."""
    jsonl: tuple[str, ...] = ()
    """Files or folders of JSON lines, also .gz and .zst."""
    parquet: tuple[str, ...] = ()
    """Files or folders of Parquet."""
    datasets: tuple[str, ...] = ()
    """Directories or names for the Hugging Face `datasets` library."""
    installed: bool = False
    """The text of installed packages too."""
    licence: str = UNKNOWN_LICENCE
    """SPDX expression for the sources above."""
    field: str = "text"
    """Where a record has its text."""
    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    """Endings of the files that a folder of --text is read for."""
    config: Path | None = None
    """A recipe as JSON, in place of all options of sources and preparation; see docs/data.md."""
    preparation: Annotated[Preparation, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=Preparation)
    tokenizer: Path | None = None
    """Directory of a tokenizer to use; one is learned from the training text when left out."""
    vocab_size: int = 4096
    """Tokens of a tokenizer that is learned."""
    tokenizer_megabytes: int = 100
    """Training text that a tokenizer is learned from: a fair sample when there is more."""
    heldout_per_thousand: int = 20
    """Documents of a thousand that are held out, chosen by their hash."""
    separate: bool = False
    """A training dataset per source, to be mixed by weight, in place of one for all."""
    overwrite: bool = False
    """Replace an earlier build once the new one is complete."""
    json: bool = False
    """Print the manifest as one JSON object."""


def recipe_of(options: BuildOptions) -> DataRecipe:
    """The recipe that the flags, or the file, describe."""
    plain = BuildOptions(out=options.out, config=options.config, overwrite=options.overwrite, json=options.json)
    if options.config is not None:
        if options != plain:
            raise InputError("--config holds the whole recipe; give it without options of sources or preparation.")
        return read_recipe(options.config)
    kinds: tuple[tuple[Kind, tuple[str, ...]], ...] = (
        ("text", options.text), ("jsonl", options.jsonl), ("parquet", options.parquet), ("datasets", options.datasets),
    )  # fmt: skip
    specs = [
        SourceSpec(kind=kind, path=path, licence=options.licence, field=options.field, suffixes=options.suffixes)
        for kind, paths in kinds
        for path in paths
    ]
    if options.installed or not specs:
        specs.insert(0, SourceSpec(kind="installed"))
    return DataRecipe(
        sources=tuple(specs),
        preparation=options.preparation,
        heldout_per_thousand=options.heldout_per_thousand,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        tokenizer_megabytes=options.tokenizer_megabytes,
        separate=options.separate,
    )


def build(options: BuildOptions) -> int:
    """Builds with a bar on the standard error stream; prints where everything is and what was dropped."""
    recipe = recipe_of(options)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        built = build_data(
            options.out,
            recipe,
            overwrite=options.overwrite,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    if options.json:
        print(json_text.dumps({"directory": str(options.out), **built.manifest}))
        return 0
    for source in built.manifest["sources"]:
        reasons = ", ".join(f"{entry['documents']:,} {reason}" for reason, entry in source["dropped"].items())
        print(f"{source['name']}: {source['documents']:,} documents" + (f"; dropped {reasons}" if reasons else ""))
    for name in built.manifest["skipped_sources"]:
        print(f"{name}: its package is not installed")
    for split, part in built.manifest["datasets"].items():
        counts = f"{part['documents']:,} documents, {part['bytes'] / 1e6:,.2f} MB, {part['tokens']:,} tokens"
        print(f"{options.out / split}: {counts}")
    print(f"Look at it:  glm5 data inspect {options.out} --step 0")
    return 0
