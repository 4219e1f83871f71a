"""Batches as text, with what is learned and what is not: what one step of a run has read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np

from glm5.data.loader import IGNORED, Batch
from glm5.data.shards import TokenDataset
from glm5.text import Tokenizer

LENGTH_EDGES = (0, 16, 64, 256, 1024, 4096, 16_384, 65_536, 262_144)


def spans(batch: Batch, row: int, tokenizer: Tokenizer) -> Iterator[tuple[int, bool, str]]:
    """(segment, learned, text) of each run of positions of a row; padding is left out.

    The text of a position is the token that stands there; it is learned when the position before has it as target, so
    the first token of a row never is.
    """
    ids, targets = batch.input_ids_BT[row].tolist(), batch.targets_BT[row].tolist()
    segments = batch.segment_ids_BT[row].tolist()
    learned = [False] + [targets[i - 1] != IGNORED and segments[i - 1] == segments[i] for i in range(1, len(ids))]
    positions = (i for i in range(len(ids)) if segments[i] >= 0)
    for (segment, is_learned), run in groupby(positions, key=lambda i: (segments[i], learned[i])):
        yield segment, is_learned, tokenizer.decode([ids[i] for i in run])


def describe_dataset(dataset: TokenDataset) -> dict[str, Any]:
    """Counts of a dataset and the histogram of its document lengths (documents and tokens by length)."""
    lengths = dataset.lengths
    edges = [*LENGTH_EDGES, max(int(lengths.max()) + 1, LENGTH_EDGES[-1] + 1)]
    documents, _ = np.histogram(lengths, bins=edges)
    tokens, _ = np.histogram(lengths, bins=edges, weights=lengths)
    histogram = [
        {"from": low, "to": high - 1, "documents": int(count), "tokens": int(total)}
        for low, high, count, total in zip(edges, edges[1:], documents, tokens, strict=False)
        if count
    ]
    learned = sum(int(dataset.learn(i).sum()) for i in range(len(dataset))) if dataset.masked else int(lengths.sum())
    return {
        "documents": len(dataset),
        "tokens": int(lengths.sum()),
        "learned_tokens": learned,
        "bytes": int(dataset.byte_counts.sum()),
        "median_length": int(np.median(lengths)),
        "longest": int(lengths.max()),
        "lengths": histogram,
    }
