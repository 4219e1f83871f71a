"""Needle in a haystack: does a model find one short sentence in a long text (G. Kamradt, 2023)?

A grid of lengths and depths; every cell asks `per_cell` held-out questions (`glm5.data.long_context`: pairs of words
that no training row joined, in held-out text). The answer is teacher-forced: all its tokens must be the likeliest at
their places, which is what greedy decoding would say. So one forward pass per question is enough. Questions depend on
the seed alone: dense and sparse attention answer the same ones and can be compared pair by pair.
Left out: other questions than looking up, answers sampled with a temperature.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from glm5.checkpoint import load_model
from glm5.data import TokenDataset, open_dataset
from glm5.data.long_context import DEFAULT_WORDS, SHORTEST_LENGTH, Example, LongContext
from glm5.errors import ConfigError
from glm5.files import write_json
from glm5.model import GLM5
from glm5.scoring import Accuracy, PairedDifference, paired_difference, proportion
from glm5.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class NeedleConfig:
    """The grid."""

    lengths: tuple[int, ...] = (512, 1024, 2048)
    """Tokens of a prompt."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the needle stands: 0 is the beginning of the text, 1 its end."""
    per_cell: int = 20
    """Questions for each length and depth."""
    attention: Literal["dense", "sparse"] = "sparse"
    """Of the model: sparse as it is served, dense before it has learnt to select."""
    words: int | None = DEFAULT_WORDS
    """Words that needles may join; None: all of one token."""
    seed: int = 1
    """Of texts and needles."""
    rows: int = 4
    """Prompts of one forward pass."""

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < SHORTEST_LENGTH:
            raise ConfigError(f"lengths are {self.lengths}; give at least one, of {SHORTEST_LENGTH} tokens or more.")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError(f"depths are {self.depths}; give at least one between 0 and 1.")
        if min(self.per_cell, self.rows) < 1:
            raise ConfigError("per_cell and rows must be at least 1.")
        if self.attention not in ("dense", "sparse"):
            raise ConfigError(f"attention is {self.attention!r}; use 'dense' or 'sparse'.")


@dataclass(frozen=True, slots=True)
class NeedleAnswer:
    """One question."""

    length: int
    depth: float
    """As asked for."""
    correct: bool


@dataclass(frozen=True, slots=True)
class NeedleResult:
    """All answers, in the order of lengths, depths and questions."""

    config: NeedleConfig
    answers: tuple[NeedleAnswer, ...]

    def accuracy(self, length: int | None = None, depth: float | None = None) -> Accuracy:
        """The share found with its 95% interval, of one length or depth or of all."""
        right = [
            answer.correct
            for answer in self.answers
            if length in (None, answer.length) and (depth is None or answer.depth == depth)
        ]
        return proportion(sum(right), len(right))

    def to_json(self) -> dict[str, Any]:
        """The content of `needles.json`."""

        def plain(found: Accuracy) -> dict[str, Any]:
            return {**asdict(found), "value": found.value}

        c = self.config
        return {
            "config": asdict(c),
            "accuracy": plain(self.accuracy()),
            "lengths": {str(length): plain(self.accuracy(length)) for length in c.lengths},
            "cells": [
                {"length": length, "depth": depth, **plain(self.accuracy(length, depth))}
                for length in c.lengths
                for depth in c.depths
            ],
        }


def find_needles(
    model: GLM5,
    tokenizer: Tokenizer,
    filler: TokenDataset,
    config: NeedleConfig | None = None,
    *,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> NeedleResult:
    """Asks every question of the grid. filler: a held-out dataset of the same tokenizer. `show` sees progress."""
    c = config or NeedleConfig()
    source = LongContext(tokenizer, filler, split="heldout", seed=c.seed, words=c.words)
    model.eval()
    answers: list[NeedleAnswer] = []
    total = len(c.lengths) * len(c.depths) * c.per_cell
    for length in c.lengths:
        places = [(depth, index) for depth in c.depths for index in range(c.per_cell)]
        for i in range(0, len(places), c.rows):
            part = places[i : i + c.rows]
            found = right_answers(model, [source.needles(length, k, depth=d) for d, k in part], c.attention)
            answers += [NeedleAnswer(length, d, all(right)) for (d, _), right in zip(part, found, strict=True)]
            show(len(answers), total)
    return NeedleResult(c, tuple(answers))


@torch.no_grad()
def right_answers(model: GLM5, examples: list[Example], attention: Literal["dense", "sparse"]) -> list[list[bool]]:
    """Per example and answer: are all tokens of the answer the model's first choice? All examples have one length."""
    ids_BT = torch.tensor([example.ids for example in examples])
    first = min(start for example in examples for start, _ in example.answers)
    keep = ids_BT.shape[1] - first
    logits_BTV = model(ids_BT[:, :-1], attention=attention, logits_to_keep=keep).logits
    hit_BT = (logits_BTV.argmax(-1) == ids_BT[:, first:]).tolist()
    return [
        [all(hits[start - first : stop - first]) for start, stop in example.answers]
        for hits, example in zip(hit_BT, examples, strict=True)
    ]


def needles_of(
    model: Path, filler: Path, config: NeedleConfig, *, show: Callable[[int, int], None] = lambda done, total: None
) -> NeedleResult:
    """`find_needles` for a model directory and a held-out dataset directory."""
    tokenizer = Tokenizer.from_pretrained(model)
    return find_needles(
        load_model(model, dtype=torch.float32), tokenizer, open_dataset(filler, tokenizer), config, show=show
    )


def compare_needles(first: NeedleResult, second: NeedleResult, length: int | None = None) -> PairedDifference:
    """The accuracy of `second` less that of `first` on the same questions, with its 95% interval."""
    sides = [[a.correct for a in side.answers if length in (None, a.length)] for side in (first, second)]
    return paired_difference(sides[0], sides[1])


def write_needles(directory: Path, result: NeedleResult) -> None:
    """Writes `needles.json` (numbers) and `needles.jsonl` (answers) into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(answer)) + "\n" for answer in result.answers)
    (directory / "needles.jsonl").write_text(lines, encoding="utf-8")
    write_json(directory / "needles.json", {"kind": "needles", **result.to_json()})
