"""Everything that a recipe reads, built before anything is trained, and where it lies.

data/corpus  tokenizer  data/train  data/heldout       text of the installed packages
data/world  data/facts                                 the closed world, and its text as a dataset
data/long-LENGTH                                       lookups over long rows
data/chats                                             the instruct set
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from glm5.data import (
    Corpus,
    Share,
    TokenDataset,
    build_corpus,
    open_corpus,
    open_dataset,
    tokenize_corpus,
    write_dataset,
)
from glm5.data.instruct import InstructConfig
from glm5.data.long_context import Kind, LongContext
from glm5.data.recipe_sets import NANO_DIGITS, build_nano_instruct, tokenizer_texts
from glm5.data.world import World, WorldConfig, build_world
from glm5.data.world_check import check_world
from glm5.data.world_text import open_world, world_dataset, write_world
from glm5.errors import DataError
from glm5.text import Tokenizer
from glm5.train import Phase


@dataclass(frozen=True)
class Layout:
    """Paths below the directory of a recipe's run."""

    out: Path

    def stage(self, name: str) -> Path:
        """A stage's run directory."""
        return self.out / name

    def model(self, name: str) -> Path:
        """The model of a finished stage."""
        return self.out / name / "model"

    def data(self, name: str) -> Path:
        return self.out / "data" / name

    @property
    def tokenizer(self) -> Path:
        return self.out / "tokenizer"

    @property
    def train(self) -> Path:
        return self.data("train")

    @property
    def heldout(self) -> Path:
        return self.data("heldout")

    @property
    def world(self) -> Path:
        return self.data("world")

    @property
    def facts(self) -> Path:
        return self.data("facts")

    @property
    def chats(self) -> Path:
        return self.data("chats")

    def long(self, name: str) -> Path:
        """Long-context rows."""
        return self.data("long") / name


@dataclass(frozen=True, kw_only=True)
class LongPhase:
    """A phase of mid-training on generated rows of one length, with a share of plain text."""

    length: int
    rows: int
    steps: int
    kinds: Mapping[Kind, float]
    """Kind -> weight."""
    words: int
    """The rows look up the first so many words."""
    zipf: float | None = None
    """Frequency of the words; None: all alike."""
    text: float
    """Share of plain text in the rows."""

    @property
    def name(self) -> str:
        """Unique in a curriculum."""
        kinds = "-".join(sorted(self.kinds))
        return f"{self.length}-{self.words}-{self.zipf or 'even'}-{kinds}"

    def mixture(self, layout: Layout) -> tuple[Share, Share]:
        """Generated rows and plain text."""
        rows = Share(path=layout.long(self.name), weight=1 - self.text, packing="keep_whole")
        return rows, Share(path=layout.train, weight=self.text)

    def phase(self, layout: Layout) -> Phase:
        """The phase as a stage takes it."""
        return Phase(length=self.length, rows=self.rows, steps=self.steps, train_data=self.mixture(layout))

    def build(self, layout: Layout, tokenizer: Tokenizer, path: Path) -> TokenDataset:
        """Writes the generated rows; none is seen twice."""
        text = open_dataset(layout.train, tokenizer)
        source = LongContext(tokenizer, text, split="train", words=self.words, zipf=self.zipf)
        rows = source.documents(self.rows * self.steps + 1, self.length, self.kinds)
        return write_dataset(path, rows, tokenizer)


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """What is built."""

    vocab_size: int = 4096
    world: WorldConfig = field(default_factory=WorldConfig)
    curriculum: tuple[LongPhase, ...] = ()
    """Generated rows of mid-training."""
    chats: InstructConfig = field(default_factory=InstructConfig)


def build_all(plan: DataPlan, layout: Layout, console: Console) -> dict[str, Any]:
    """Builds what is not there yet; gives what the summary says of it."""
    path = layout.data("corpus")
    corpus = open_corpus(path) if path.exists() else build_corpus(path)
    for source in corpus.manifest["sources"]:
        name = f"{source['name']} ({source['package']} {source['version']}, {source['licence']})"
        console.print(f"  {source['bytes'] / 1e6:6.2f} MB  {source['documents']:6,} documents  {name}")
    if not layout.world.exists():
        write_world(build_world(plan.world), layout.world)
    world = open_world(layout.world)
    tokenizer = tokenizer_of(plan, layout, corpus, world)
    made: dict[str, Callable[[Path], TokenDataset]] = {
        "train": lambda path: tokenize_corpus(corpus, "train", tokenizer, path),
        "heldout": lambda path: tokenize_corpus(corpus, "heldout", tokenizer, path),
        "facts": lambda path: world_dataset(world, tokenizer, path),
        "chats": lambda path: build_nano_instruct(path, tokenizer, world, plan.chats),
        **{f"long/{phase.name}": functools.partial(phase.build, layout, tokenizer) for phase in plan.curriculum},
    }
    sizes = {}
    for name, build in made.items():
        path = layout.data(name)
        dataset = open_dataset(path, tokenizer) if path.exists() else build(path)
        sizes[name] = {part: dataset.manifest[part] for part in ("documents", "tokens", "bytes")}
    table = Table("dataset", Column("documents", justify="right"), Column("tokens", justify="right"), box=None)
    for name, size in sizes.items():
        table.add_row(name, f"{size['documents']:,}", f"{size['tokens']:,}")
    console.print(table)
    refuse_leaks(world, layout, [layout.data(name) for name in made if name != "heldout"], tokenizer)
    return {"sources": corpus.manifest["sources"], "sizes": sizes, "facts": len(world.facts)}


def tokenizer_of(plan: DataPlan, layout: Layout, corpus: Corpus, world: World) -> Tokenizer:
    """The tokenizer of the run, learned from its text if it is not there yet."""
    if not (layout.tokenizer / "chat_template.jinja").exists():  # the last file that `save` writes
        texts = tokenizer_texts(corpus.texts("train"), world)
        Tokenizer.train(texts, vocab_size=plan.vocab_size, digits=NANO_DIGITS).save(layout.tokenizer)
    return Tokenizer.from_pretrained(layout.tokenizer)


def refuse_leaks(world: World, layout: Layout, datasets: list[Path], tokenizer: Tokenizer) -> None:
    """Raises DataError when anything that the evaluation relies on being unseen stands in the training data."""
    found = check_world(world, datasets, tokenizer)
    if not found.ok:
        raise DataError(f"the closed world leaked into the training data of {layout.out}: {found.leaks[0]}")
