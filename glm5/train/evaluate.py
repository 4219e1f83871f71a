"""Bits per byte of held-out text, and two lines that a language model must beat: zlib and a bigram model.

Bits per byte count the cost of every token of the text, and of its end, over the bytes of the text; unlike the loss per
token they compare models with different vocabularies, and compressors. A document longer than the row continues without
its past, so a longer row is a better score: state it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glm5.data import IGNORED, TokenDataset, once
from glm5.errors import InputError
from glm5.model import GLM5, LOGITS, by_pieces, without_head
from glm5.text import Tokenizer


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_bits_per_byte` measured."""

    bits_per_byte: float
    nats_per_token: float
    tokens: int
    bytes: int
    documents: int


@torch.no_grad()
def evaluate_bits_per_byte(
    model: GLM5,
    dataset: TokenDataset,
    *,
    length: int = 256,
    rows: int = 16,
    documents: int | None = None,
    attention: Literal["dense", "sparse"] = "dense",
    most: int = LOGITS,
) -> Evaluation:
    """Evaluates `model` on the first `documents` documents (default: all) in rows of `length` tokens.

    most: logits that are held at once (`glm5.model.head`).
    """
    if min(length, rows, len(dataset) if documents is None else documents) < 1:
        raise InputError("An evaluation needs at least one document, and rows of at least one token.")
    nats, tokens = 0.0, 0
    for batch in once(dataset, rows=rows, length=length, documents=documents):
        collect = without_head(model, batch.input_ids_BT, frozenset(), most)
        output = model(batch.input_ids_BT, None, batch.segment_ids_BT, attention=attention, collect=collect)
        counted_BT = batch.targets_BT != IGNORED
        if output.states:
            states_ND, targets_N = output.states[0][counted_BT], batch.targets_BT[counted_BT]
            losses = torch.cat(by_pieces(model, states_ND, targets_N, _nats, most))
        else:
            losses = _nats(output.logits.flatten(0, 1), batch.targets_BT.flatten())
        nats += losses.double().sum().item()
        tokens += int(counted_BT.sum())
    count = len(dataset) if documents is None else min(documents, len(dataset))
    size = int(dataset.byte_counts[:count].sum())
    return Evaluation(nats / math.log(2) / size, nats / tokens, tokens, size, count)


def _nats(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORED, reduction="none")


def zlib_bits_per_byte(texts: Iterable[str], *, dictionary: str = "") -> float:
    """The texts joined and compressed at level 9; `dictionary` is 32 kB that it may refer back to."""
    data = "\n".join(texts).encode()
    compressor = zlib.compressobj(9, zdict=dictionary.encode()[-(1 << 15) :])
    return 8 * len(compressor.compress(data) + compressor.flush()) / len(data)


def bigram_bits_per_byte(train: TokenDataset, heldout: TokenDataset) -> float:
    """A bigram model over the same tokens, fitted on `train`, Witten-Bell interpolated with add-one unigrams.

    p(b | a) = (count(a, b) + kinds(a) p(b)) / (count(a) + kinds(a)), where kinds(a) counts what was seen after a.
    """
    vocabulary = int(train.manifest["vocab_size"])
    first, second = _pairs(train)
    keys, counts = np.unique(first * vocabulary + second, return_counts=True)
    kinds = np.bincount(keys // vocabulary, minlength=vocabulary)
    seen = np.bincount(first, minlength=vocabulary)
    unigram = (np.bincount(second, minlength=vocabulary) + 1) / (len(second) + vocabulary)

    first, second = _pairs(heldout)
    wanted = first * vocabulary + second
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    count = np.where(keys[place] == wanted, counts[place], 0)
    never = seen[first] == 0  # then only the unigram is left
    weight = np.where(never, 1, kinds[first])
    p = (count + weight * unigram[second]) / (seen[first] + weight)
    return float(-np.log2(p).sum() / heldout.byte_counts.sum())


def sanity_lines(train: TokenDataset, heldout: TokenDataset, tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per byte on the held-out text of what a language model must beat."""
    texts = [tokenizer.decode(heldout.ids(i)[1:-1].tolist()) for i in range(len(heldout))]
    seen = "\n".join(tokenizer.decode(train.ids(i)[1:-1].tolist()) for i in range(min(len(train), 40)))
    return {
        "zlib": zlib_bits_per_byte(texts),
        "zlib with 32 kB of training text": zlib_bits_per_byte(texts, dictionary=seen),
        "bigram over the same tokens": bigram_bits_per_byte(train, heldout),
    }


def _pairs(dataset: TokenDataset) -> tuple[np.ndarray, np.ndarray]:
    """All (token, next token) of the documents, as two arrays."""
    documents = [dataset.ids(i) for i in range(len(dataset))]
    return np.concatenate([ids[:-1] for ids in documents]), np.concatenate([ids[1:] for ids in documents])
