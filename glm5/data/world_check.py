"""Is the world where it may be, and nowhere else? Reads token shards back as text and counts.

Over all the given datasets together:

* a never-taught entity's name appears nowhere, in any dataset;
* no held-out question or statement of any fact appears, whatever its case and spacing;
* no question about a fact that is not practised appears;
* in pre-training text (datasets without a learning mask) each fact is stated as often as its exposure says.

Sentences are found exactly, names as whole words. Left out: paraphrases that no template makes; the names are invented,
so a taught fact in another wording would still be found by its names if it were never-taught.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm5.data.shards import TokenDataset, open_dataset
from glm5.data.world import World
from glm5.data.world_text import questions, statements
from glm5.errors import DataError
from glm5.text import CONTROL_TOKENS, Tokenizer

WORD = re.compile(r"\w+")
SENTENCE_END = re.compile(r"(?<=[.?!])\s+|\n+")
# What the chat template and the end mark put between texts; a name on each side must not read as one sentence.
MARKS = re.compile("|".join(map(re.escape, (*CONTROL_TOKENS, "<think>", "</think>", "<tool_response>"))))
SHOWN = 5


@dataclass
class Findings:
    """What a check found."""

    documents: int = 0
    mentions: int = 0
    """Documents that name anything of this world."""
    leaks: list[str] = field(default_factory=list)
    """One sentence each, that names the dataset and the document."""
    exposures_checked: bool = False
    stated: dict[int, dict[str, int]] = field(default_factory=dict)
    """Per declared exposure: facts, and fewest and most sentences that were counted for one of them."""

    @property
    def ok(self) -> bool:
        return not self.leaks

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {"kind": "world check", "ok": self.ok, **vars(self)}


def check_world(world: World, directories: Sequence[Path], tokenizer: Tokenizer) -> Findings:
    """Checks token datasets made with `tokenizer`; see the module for the rules."""
    datasets = [open_dataset(directory, tokenizer) for directory in directories]
    texts = (
        (f"{dataset.directory} document {number}", tokenizer.decode(dataset.ids(number).tolist()), not _masked(dataset))
        for dataset in datasets
        for number in range(len(dataset))
    )
    return check_texts(world, texts)


def require_clean(world: World, directories: Sequence[Path], tokenizer: Tokenizer) -> Findings:
    """`check_world`; raises DataError that names the first leaks."""
    found = check_world(world, directories, tokenizer)
    if not found.ok:
        more = f" and {len(found.leaks) - SHOWN} more" if len(found.leaks) > SHOWN else ""
        raise DataError(f"the world leaked: {'; '.join(found.leaks[:SHOWN])}{more}. Build the data again without it.")
    return found


def check_texts(world: World, texts: Iterable[tuple[str, str, bool]]) -> Findings:
    """Checks (place, text, whether it is pre-training text) triples."""
    rules = _Rules(world)
    found = Findings()
    stated: Counter[str] = Counter()
    for place, text, plain in texts:
        found.documents += 1
        named = {word for word in map(str.casefold, WORD.findall(text)) if word in world.names}
        if not named:
            continue
        found.mentions += 1
        found.leaks += [f"{place} {leak}" for leak in rules.leaks(text, named)]
        if plain:
            found.exposures_checked = True
            for piece in MARKS.split(text):
                for sentence in SENTENCE_END.split(piece):
                    name = rules.statement.get(sentence.strip())
                    if name is not None:
                        stated[name] += 1
    if found.exposures_checked:
        for fact in world.facts:
            count = stated[fact.id]
            if count != fact.exposure:
                found.leaks.append(f"the text states {fact.id} {count} times instead of {fact.exposure}")
            seen = found.stated.setdefault(fact.exposure, {"facts": 0, "fewest": count, "most": count})
            seen["facts"] += 1
            seen["fewest"], seen["most"] = min(seen["fewest"], count), max(seen["most"], count)
    return found


class _Rules:
    """What may not appear, found by the names in it."""

    def __init__(self, world: World) -> None:
        self.never = {entity.key.casefold(): entity.name for entity in world.entities if not entity.exposure}
        hidden = [fact for fact in world.part("never_taught") if fact.relation.name == "currency"]
        self.never |= {fact.value.casefold(): fact.value for fact in hidden}
        self.statement = {text: fact.id for fact in world.facts for text in statements(fact)}
        self.forbidden: dict[str, list[tuple[str, str]]] = {}
        for fact in world.part("taught"):
            asked = [("a held-out question", question.text) for question in questions(fact, "heldout")]
            said = [("a held-out statement", text) for text in statements(fact, "heldout")]
            not_practised = [] if fact.practised else questions(fact, "train")
            reserved = [("a question that is not practised", question.text) for question in not_practised]
            for what, text in [*asked, *said, *reserved]:
                names = [word for word in map(str.casefold, WORD.findall(text)) if word in world.names]
                self.forbidden.setdefault(names[0], []).append((what, _plain(text)))

    def leaks(self, text: str, named: set[str]) -> Iterator[str]:
        """What is wrong with a text that names these words."""
        for word in sorted(named & self.never.keys()):
            yield f"names the never-taught {self.never[word]}"
        plain = _plain(text)
        for word in sorted(named):
            for what, forbidden in self.forbidden.get(word, ()):
                if forbidden in plain:
                    yield f"holds {what}: {forbidden!r}"


def _plain(text: str) -> str:
    """Lower case, words only, one space: what a change of case, spacing or punctuation cannot hide."""
    return f" {' '.join(WORD.findall(text.casefold()))} "


def _masked(dataset: TokenDataset) -> bool:
    return any(name.endswith(".learn.npy") for name in dataset.manifest["files"])
