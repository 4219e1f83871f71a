"""The world as text: sentences, documents for pre-training, and questions with their answers.

A fact of exposure n stands in exactly n sentences, in the train wordings, which take turns. Half of them are in
profiles (one entity, each of its facts once, in any order), half in mixed documents of several entities; every sentence
names its entity, so that sentences can be counted again in any shard. `world_dataset` tokenises the documents without
removing repeats, which would change the exposures; `world_source` is the same text for `build_corpus`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glm5.data.manifest import note_file, read_manifest
from glm5.data.shards import TokenDataset, TokenDocument, write_dataset
from glm5.data.sources import Source
from glm5.data.world import Fact, World, WorldConfig, build_world
from glm5.data.world_phrasings import GENERAL_QUESTIONS, GENERAL_STATEMENTS
from glm5.errors import DataError
from glm5.files import replacing, replacing_directory, sha256_of, write_json
from glm5.text import Tokenizer

Phrasing = Literal["train", "heldout"]
Direction = Literal["forward", "inverse"]
MIXED_SENTENCES = (4, 8)
"""Fewest and most sentences of a mixed document."""


@dataclass(frozen=True)
class Question:
    """One question about one fact."""

    fact: Fact
    text: str
    answer: str
    aliases: tuple[str, ...]
    phrasing: Phrasing
    direction: Direction

    def record(self) -> dict[str, Any]:
        """The question as a line of `questions.jsonl`."""
        return {"fact": self.fact.id, "question": self.text, "answer": self.answer, "aliases": self.aliases,
                "phrasing": self.phrasing, "direction": self.direction}  # fmt: skip


def statements(fact: Fact, phrasing: Phrasing = "train") -> list[str]:
    """The fact in every statement wording of one set."""
    frames = [*getattr(fact.relation.statements, phrasing), *getattr(GENERAL_STATEMENTS, phrasing)]
    return [_filled(frame, fact) for frame in frames]


def questions(fact: Fact, phrasing: Phrasing) -> list[Question]:
    """Every question about the fact in one set of wordings; inverse ones where the value names one entity only."""
    forward = [*getattr(fact.relation.questions, phrasing), *getattr(GENERAL_QUESTIONS, phrasing)]
    found = [Question(fact, _filled(f, fact), fact.value, fact.aliases, phrasing, "forward") for f in forward]
    if fact.relation.inverse is not None:
        name = fact.entity.name
        for frame in getattr(fact.relation.inverse, phrasing):
            found.append(Question(fact, _filled(frame, fact), name, (), phrasing, "inverse"))
    return found


def documents(world: World) -> Iterator[str]:
    """The pre-training text: profiles and mixed documents in an order that the world's seed fixes."""
    draw = random.Random(f"world {world.config.seed} documents")
    made: list[str] = []
    loose: list[str] = []
    by_entity: dict[str, list[list[str]]] = {}
    for fact in world.part("taught"):
        said = _exposed(fact, draw)
        half = len(said) // 2
        by_entity.setdefault(fact.entity.name, []).append(said[:half])
        loose += said[half:]
    for facts in by_entity.values():
        for copy in zip(*facts, strict=True):
            sentences = list(copy)
            draw.shuffle(sentences)
            made.append(" ".join(sentences))
    draw.shuffle(loose)
    while loose:
        count = draw.randint(*MIXED_SENTENCES)
        made.append(" ".join(loose[:count]))
        loose = loose[count:]
    draw.shuffle(made)
    yield from made


def world_source(world: World) -> Source:
    """The documents as a source of a corpus. Removing near duplicates would change the exposures."""
    name = f"world-{world.config.entities}-{world.config.seed}"
    named = ((f"{name}/{i}", text) for i, text in enumerate(documents(world)))
    return Source(name, "glm5", "CC0-1.0", lambda: named)


def world_documents(world: World, tokenizer: Tokenizer) -> Iterator[TokenDocument]:
    """The documents as tokens, each between two end marks."""
    end = tokenizer.pad_id
    for text in documents(world):
        yield TokenDocument([end, *tokenizer.encode(text, allow_special=False), end], len(text.encode()))


def world_dataset(world: World, tokenizer: Tokenizer, directory: Path) -> TokenDataset:
    """Writes the documents as a dataset; one pass over it shows every fact as often as its exposure says."""
    return write_dataset(directory, world_documents(world, tokenizer), tokenizer)


def write_world(world: World, directory: Path) -> dict[str, Any]:
    """Writes facts, questions and documents as JSON lines with a manifest; gives the manifest."""
    lines = {
        "facts.jsonl": [_fact_record(fact) for fact in world.facts],
        "questions.jsonl": [
            question.record()
            for fact in world.facts
            for phrasing in ("train", "heldout")
            for question in questions(fact, phrasing)
        ],
        "documents.jsonl": [{"text": text} for text in documents(world)],
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    with replacing_directory(directory) as beside:
        for name, records in lines.items():
            with replacing(beside / name) as file:
                file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        manifest = {
            "kind": "world",
            "entities": world.config.entities,
            "seed": world.config.seed,
            "facts": {part: sum(fact.part == part for fact in world.facts) for part in ("taught", "never_taught")},
            "practised_facts": sum(fact.practised for fact in world.facts),
            "files": {name: note_file(beside / name) for name in lines},
        }
        write_json(beside / "manifest.json", manifest)
    return manifest


def open_world(directory: Path) -> World:
    """The world that `write_world` wrote; DataError when files are damaged or this version would write others."""
    manifest = read_manifest(directory, "world")
    world = build_world(WorldConfig(entities=manifest["entities"], seed=manifest["seed"]))
    own = "".join(json.dumps(_fact_record(fact), ensure_ascii=False) + "\n" for fact in world.facts)
    if own != (directory / "facts.jsonl").read_text(encoding="utf-8"):
        raise DataError(f"{directory} holds the world of another version of glm5; build it again.")
    return world


def world_sha256(directory: Path) -> str:
    """Hash of a written world's manifest, which holds the hash of every file."""
    return sha256_of(directory / "manifest.json")


def _exposed(fact: Fact, draw: random.Random) -> list[str]:
    """As many sentences as the fact's exposure; every wording is used before one comes again."""
    wordings = statements(fact)
    found: list[str] = []
    while len(found) < fact.exposure:
        draw.shuffle(wordings)
        found += wordings
    return found[: fact.exposure]


def _filled(frame: str, fact: Fact) -> str:
    text = frame.format(e=fact.entity.name, v=fact.value, noun=fact.relation.noun)
    return text[0].upper() + text[1:]


def _fact_record(fact: Fact) -> dict[str, Any]:
    return {"id": fact.id, "entity": fact.entity.name, "kind": fact.entity.kind, "relation": fact.relation.name,
            "value": fact.value, "aliases": fact.aliases, "exposure": fact.exposure, "part": fact.part,
            "practised": fact.practised}  # fmt: skip
