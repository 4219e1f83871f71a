"""`glm5 data inspect DATASET...`: counts and lengths of datasets, or the batch of one step as text."""

from __future__ import annotations

import json as json_text
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from glm5.data import Batch, Loader, open_corpus, open_dataset, open_mixture
from glm5.data.build import shares_of
from glm5.data.inspection import describe_dataset, spans
from glm5.data.verify import tokenizer_beside
from glm5.errors import DataError, InputError
from glm5.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """What a dataset holds; with --step, the batch that a run with these settings reads at that step.

    Grey text is read but not learned. A line begins each document of a row. (`glm5 train --out RUN --replay-step N`
    takes the settings from a run.)
    """

    dataset: Annotated[tuple[str, ...], tyro.conf.Positional]
    """A dataset, a corpus, or a whole build; with --step several PATH:WEIGHT too."""
    step: int | None = None
    """Print the batch of this step (from 0)."""
    rows: int = 8
    """Rows of a batch, as in the run."""
    length: int = 256
    """Tokens of a row, as in the run."""
    seed: int = 0
    """The run's seed."""
    warmup: str | None = None
    """The run's batch warm-up, START:STEPS[:MULTIPLE]."""
    packing: Literal["cut", "keep_whole"] = "cut"
    """keep_whole for chat data."""
    tokenizer: Path | None = None
    """The tokenizer's directory; looked for beside the dataset when left out."""
    json: bool = False
    """Print one JSON object."""


def inspect(options: InspectOptions) -> int:
    """Prints the description, or the batch."""
    if options.step is not None:
        return inspect_step(options, options.step)
    if len(options.dataset) != 1:
        raise DataError("name one directory to describe, or a --step of a mixture of several.")
    found = describe(Path(options.dataset[0]))
    if options.json:
        print(json_text.dumps(found))
    else:
        show(found, Console())
    return 0


def inspect_step(options: InspectOptions, step: int) -> int:
    """Prints the batch of a step."""
    from glm5.cli.train_flags import share, warmup  # loads the training room, which the other subverbs do without

    if step < 0:
        raise DataError(f"there is no step {step}; steps count from 0.")
    shares = tuple(map(share, options.dataset))
    if len(shares) == 1 and (shares[0].path / "train").is_dir():
        shares = shares_of(shares[0].path)
    place = options.tokenizer or next(filter(None, (tokenizer_beside(part.path) for part in shares)), None)
    if place is None:
        raise DataError(f"there is no tokenizer beside {options.dataset[0]}; give its directory with --tokenizer.")
    tokenizer = Tokenizer.from_pretrained(place)
    try:
        growth = warmup(options.warmup) if options.warmup is not None else None
    except ValueError as error:
        raise InputError(f"--warmup {error}.") from None
    loader = Loader(
        open_mixture(shares, tokenizer),
        rows=options.rows,
        length=options.length,
        seed=options.seed,
        packing=options.packing,
        warmup=growth,
    )
    batch, plan = loader.batch(step), loader.plan(step)
    names = [str(shares[number].path) for number, _ in plan]
    if options.json:
        fields = ("segment", "learned", "text")
        rows = [
            {"dataset": name, "spans": [dict(zip(fields, span, strict=True)) for span in spans(batch, row, tokenizer)]}
            for row, name in enumerate(names)
        ]
        print(json_text.dumps({"step": step, "seed": options.seed, "epochs": loader.epochs(step), "rows": rows}))
    else:
        show_batch(batch, tokenizer, Console(), [f"step {step}, row {row}, {name}" for row, name in enumerate(names)])
    return 0


def describe(directory: Path) -> dict[str, Any]:
    """Counts of a build, a corpus or a dataset."""
    try:
        kind = json_text.loads((directory / "manifest.json").read_text(encoding="utf-8")).get("kind")
    except FileNotFoundError:
        raise DataError(f"{directory} has no manifest.json, so nothing was built there; check the path.") from None
    except (ValueError, AttributeError):
        raise DataError(f"{directory / 'manifest.json'} is damaged; build it again.") from None
    if kind == "corpus":
        manifest = open_corpus(directory).manifest
        return {"kind": kind, **{k: v for k, v in manifest.items() if k not in ("kind", "files")}}
    if kind == "data build":
        names = json_text.loads((directory / "manifest.json").read_text(encoding="utf-8"))["datasets"]
        parts = {name: describe_dataset(open_dataset(directory / name)) for name in names}
        return {**describe(directory / "corpus"), "kind": kind, "datasets": parts}
    return {"kind": "token dataset", "datasets": {directory.name: describe_dataset(open_dataset(directory))}}


def show(found: dict[str, Any], console: Console) -> None:
    """The description as tables."""
    if "sources" in found:
        table = Table(title="sources")
        for head in ("name", "documents", "MB", "dropped", "licence"):
            table.add_column(head, justify="right" if head in ("documents", "MB", "dropped") else "left")
        for source in found["sources"]:
            dropped = sum(entry["documents"] for entry in source["dropped"].values())
            size = f"{source['bytes'] / 1e6:.2f}"
            table.add_row(source["name"], f"{source['documents']:,}", size, f"{dropped:,}", source["licence"])
        console.print(table)
        for source in found["sources"]:
            for reason, entry in source["dropped"].items():
                examples = ", ".join(entry["examples"])
                line = f"{source['name']}: dropped {entry['documents']:,} as {reason}, such as {examples}"
                console.print(line, style="dim", markup=False, highlight=False)
    for name, part in found.get("datasets", {}).items():
        title = (
            f"{name}: {part['documents']:,} documents, {part['tokens']:,} tokens, {part['learned_tokens']:,} learned"
        )
        table = Table(title=title)
        for head in ("document length", "documents", "tokens", "share of tokens"):
            table.add_column(head, justify="right")
        for line in part["lengths"]:
            share = f"{line['tokens'] / part['tokens']:.1%}"
            table.add_row(f"{line['from']:,} to {line['to']:,}", f"{line['documents']:,}", f"{line['tokens']:,}", share)
        console.print(table)


def show_batch(batch: Batch, tokenizer: Tokenizer, console: Console, titles: Sequence[str]) -> None:
    """Every row as text; what is not learned is grey, or between double brackets where there is no colour."""
    for row, title in enumerate(titles):
        console.rule(Text(title), align="left")
        last, text = 0, "\n"
        for segment, learned, text in spans(batch, row, tokenizer):
            if segment != last:
                console.print(Text(f"\n--- document {segment} of the row", style="bold"))
                last = segment
            marked = text if learned or console.is_terminal else f"[[{text}]]"
            console.print(Text(marked, style="" if learned else "dim"), end="", soft_wrap=True)
        if not text.endswith("\n"):
            console.print()
