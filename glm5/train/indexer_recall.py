"""The indexer against the attention that it imitates, on held-out long text (the measure of DSA stage 1).

Dense attention runs; per full-indexer layer, the indexer's `index_topk` keys are held against the true ones
(`ops/indexer_recall.py`). Rows are the first `length` tokens of held-out documents that are long enough; where too few
are, text is joined over document borders without a mask, as one context. The result says which.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from glm5.data import TokenDataset
from glm5.errors import InputError
from glm5.model import GLM5


@dataclass(frozen=True)
class LayerRecall:
    """Of one full-indexer layer: shares of the true top-k, 1.0 at best."""

    positions: float
    """How many of the true top-k positions are selected."""
    mass: float
    """Attention mass of the selection over that of the true top-k."""


@dataclass(frozen=True)
class IndexerRecall:
    """What `measure_indexer_recall` found."""

    length: int
    index_topk: int
    rows: int
    joined: bool
    """Whether rows run over document borders, because too few documents are as long as a row."""
    layers: dict[int, LayerRecall]

    @property
    def mass(self) -> float:
        """Mean over the layers."""
        return float(np.mean([layer.mass for layer in self.layers.values()]))

    @property
    def positions(self) -> float:
        """Mean over the layers."""
        return float(np.mean([layer.positions for layer in self.layers.values()]))

    @property
    def worst_mass(self) -> float:
        """Of the layer that recalls least."""
        return min(layer.mass for layer in self.layers.values())


@torch.no_grad()
def measure_indexer_recall(
    model: GLM5, heldout: TokenDataset, *, length: int | None = None, rows: int = 8, rows_at_once: int = 2
) -> IndexerRecall:
    """Recall on `rows` rows of `length` tokens (default: 8 x index_topk). The MTP modules are left out.

    Raises InputError when no query of such a row sees more than `index_topk` keys, or when the text is too short.
    """
    topk = model.config.index_topk
    length = 8 * topk if length is None else length
    if length <= topk or rows < 1:
        raise InputError(
            f"recall takes at least one row of more than index_topk = {topk} tokens; got {rows} x {length}."
        )
    texts, joined = long_rows(heldout, rows, length)
    training = model.training
    model.eval()
    found: dict[int, list[tuple[float, float]]] = {}
    for i in range(0, rows, rows_at_once):
        ids_BT = torch.from_numpy(texts[i : i + rows_at_once])
        out = model(ids_BT, attention="dense", collect={"indexer_recall"}, logits_to_keep=1)
        for layer, shares in out.indexer_recall.items():
            found.setdefault(layer, []).extend([(shares[0].item(), shares[1].item())] * len(ids_BT))
    model.train(training)
    means = {layer: np.mean(pairs, axis=0) for layer, pairs in found.items()}
    layers = {layer: LayerRecall(float(pair[0]), float(pair[1])) for layer, pair in means.items()}
    return IndexerRecall(length, topk, rows, joined, layers)


def long_rows(dataset: TokenDataset, rows: int, length: int) -> tuple[NDArray[np.int64], bool]:
    """Token rows [rows, length] of the dataset's text, and whether they are joined over document borders."""
    long = np.flatnonzero(dataset.lengths >= length)
    if len(long) >= rows:
        return np.stack([dataset.ids(int(i), 0, length) for i in long[:rows]]), False
    if int(dataset.lengths.sum()) < rows * length:
        raise InputError(f"{dataset.directory} is too short for {rows} rows of {length} tokens; ask for fewer.")
    parts: Iterator[NDArray[np.int64]] = (dataset.ids(i) for i in range(len(dataset)))
    ids, size = [], 0
    while size < rows * length:
        ids.append(next(parts))
        size += len(ids[-1])
    return np.concatenate(ids)[: rows * length].reshape(rows, length), True
