"""What a build is made from, as one typed value that a JSON file or the command line's flags give.

    {"sources": [{"kind": "text", "path": "docs", "licence": "MIT"},
                 {"kind": "jsonl", "path": "mail.jsonl.gz", "field": "body", "weight": 2.0}],
     "preparation": {"near_duplicates": 0.8, "languages": ["en"], "quality": true}}

A misspelt field, here or in the file, is refused with the nearest real one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from glm5.data import local_sources
from glm5.data.preparation import Preparation
from glm5.data.quality import Quality
from glm5.data.sources import Source, installed_sources
from glm5.errors import DataError, did_you_mean

Kind = Literal["installed", "text", "jsonl", "parquet", "datasets"]
UNKNOWN_LICENCE = "LicenseRef-unknown"


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One source of a build."""

    kind: Kind
    path: str = ""
    """File or folder; for `datasets` a directory or a name; nothing for `installed`."""
    name: str = ""
    """In manifests and paths; the file's name when left out."""
    licence: str = UNKNOWN_LICENCE
    """SPDX expression that covers the text."""
    field: str = "text"
    """Where a record has its text (`jsonl`, `parquet`, `datasets`)."""
    licence_field: str | None = None
    """Where a record has a licence of its own."""
    suffixes: tuple[str, ...] = local_sources.TEXT_SUFFIXES
    """Endings of the files that a folder is read for (`text`)."""
    split: str = "train"
    """Of a Hugging Face dataset."""
    subset: str | None = None
    """Of a Hugging Face dataset."""
    filtered: bool = True
    """Whether the filters for quality and language judge it; say no for code and tables."""
    weight: float | None = None
    """Share of rows in training when every source has a dataset of its own (of each package for `installed`).

    Give it to all sources, or to none: then shares are in proportion to tokens.
    """

    def sources(self) -> tuple[Source, ...]:
        """What it stands for; one source, or those of the installed packages."""
        if self.kind == "installed":
            return installed_sources()
        if not self.path:
            raise DataError(f"a source of kind {self.kind!r} needs a path.")
        name = self.name or Path(self.path).name.split(".")[0] or self.kind
        path, common = Path(self.path), {"name": name, "licence": self.licence}
        record: dict[str, Any] = {"field": self.field, "licence_field": self.licence_field}
        match self.kind:
            case "text":
                made = local_sources.folder(path, suffixes=self.suffixes, **common)
            case "jsonl":
                made = local_sources.json_lines(path, **common, **record)
            case "parquet":
                made = local_sources.parquet(path, **common, **record)
            case "datasets":
                made = local_sources.hugging_face(self.path, **common, **record, split=self.split, subset=self.subset)
        return (Source(made.name, made.package, made.licence, made.read, self.filtered),)


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """All that decides the bytes of a build."""

    sources: tuple[SourceSpec, ...] = (SourceSpec(kind="installed"),)
    preparation: Preparation = field(default_factory=Preparation)
    heldout_per_thousand: int = 20
    """Documents of a thousand that are held out, chosen by their hash."""
    tokenizer: Path | None = None
    """Directory of a tokenizer; None: one is learned from the training text."""
    vocab_size: int = 4096
    """Tokens of a tokenizer that is learned."""
    tokenizer_megabytes: int = 100
    """Training text that a tokenizer is learned from: a fair sample when there is more."""
    separate: bool = False
    """A training dataset per source, to be mixed by weight, in place of one for all."""

    def __post_init__(self) -> None:
        if not 0 < self.heldout_per_thousand < 1000:
            raise DataError(f"heldout_per_thousand is {self.heldout_per_thousand}; give a number from 1 to 999.")

    def named_sources(self) -> list[tuple[Source, float | None]]:
        """The sources with their weights. Raises DataError when two have one name, or a weight would be ignored."""
        if not self.sources:
            raise DataError("a build of no sources has no text; name at least one.")
        found = [(source, spec.weight) for spec in self.sources for source in spec.sources()]
        names = [source.name for source, _ in found]
        for name in names:
            if names.count(name) > 1:
                raise DataError(f"two sources are called {name!r}; give one of them another name.")
        if not self.separate and any(spec.weight is not None for spec in self.sources):
            raise DataError("weights need a dataset per source; build with separate.")
        unweighted = [source.name for source, weight in found if weight is None]
        if 0 < len(unweighted) < len(found):
            raise DataError(f"source {unweighted[0]!r} has no weight and others have; give one to all or to none.")
        return found


def read_recipe(path: Path) -> DataRecipe:
    """A recipe from a JSON file. Raises DataError that names the field."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path.") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); mend it.") from None
    check_names(value, DataRecipe, str(path))
    try:
        return TypeAdapter(DataRecipe).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the recipe"
        raise DataError(f"{path}: {place}: {first['msg']}.") from None


def check_names(value: Any, kind: type, place: str) -> None:
    """Raises DataError for a field that `kind` does not have, here or below."""
    if not isinstance(value, dict):
        raise DataError(f"{place} must be a JSON object of {kind.__name__}'s fields.")
    known = {f.name for f in fields(kind)}
    inside: dict[str, type] = {"sources": SourceSpec, "preparation": Preparation, "limits": Quality}
    for name, part in value.items():
        if name not in known:
            raise DataError(f"{place} has no field {name!r}.{did_you_mean(name, known)}")
        if name in inside and is_dataclass(inside[name]) and part is not None:
            parts: Sequence[Any] = part if isinstance(part, list) else [part]
            for entry in parts:
                check_names(entry, inside[name], f"{place}: {name}")
