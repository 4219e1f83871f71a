"""Context parallel for MLA with sparse attention: every row of tokens is cut over the ranks of a group.

A query needs, of all earlier tokens, one latent row and one indexer key per layer: a few hundred values for all heads
together. So those are gathered whole on every rank (and their gradients summed back, a reduce-scatter), while queries,
feed-forward, logits and losses stay with the rank that has the token; nothing is passed around a ring. Every rank is
given the whole ids and segment ids, so documents that cross a border, rotary positions and the shift by one or more
tokens of multi-token prediction are computed before the cut.

Balance: a rank holds the r-th and the r-th last of 2R pieces of each row (zig-zag). The indexer scores all earlier
tokens, so late queries cost more; the pairs even that out. Attention over the selection costs the same everywhere.

A cut model gives its own tokens' logits, and of every mean over tokens (`balance`, `indexer_kl`) its summand; losses do
the same with `Rows.part` for the targets. The sum over ranks is then the loss, and gradients are summed, not averaged.
Left out: caches, dense attention without the full keys on a rank (ring attention).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from glm5.errors import InputError
from glm5.model import GLM5
from glm5.model.rows import WholeRows
from glm5.ops.spans import Spans
from glm5.parallel.collectives import gather, total


def pieces(tokens: int, ranks: int, rank: int) -> list[range]:
    """The two stretches of a row that `rank` holds; the ranks' numbers of tokens differ by at most one."""
    lengths = [tokens // ranks + (r < tokens % ranks) for r in range(ranks)]
    first = sum(-(-length // 2) for length in lengths[:rank])
    second = tokens - sum(length // 2 for length in lengths[:rank])
    return [range(first, first + -(-lengths[rank] // 2)), range(second - lengths[rank] // 2, second)]


class CutRows:
    """`glm5.model.rows.Rows` for rows cut over `group`."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.ranks, self.rank = group, group.size(), group.rank()
        self._order: tuple[int, Tensor] | None = None

    def part(self, x_BT: Tensor) -> Tensor:
        """See `Rows`; raises InputError for rows with fewer tokens than ranks."""
        tokens = x_BT.shape[1]
        if tokens < self.ranks:
            raise InputError(f"A row of {tokens} token(s) cannot be cut over {self.ranks} ranks; give longer rows.")
        return torch.cat([x_BT[:, piece.start : piece.stop] for piece in pieces(tokens, self.ranks, self.rank)], dim=1)

    def spans(self, spans: Spans) -> Spans:
        """See `Rows`."""
        lo_BT, hi_BT, positions_BT = (self.part(x) for x in (spans.lo_BT, spans.hi_BT, spans.positions_BT))
        self._order = _order(spans.lo_BT.shape[1], self.ranks, lo_BT.device)
        return dataclasses.replace(spans, lo_BT=lo_BT, hi_BT=hi_BT, positions_BT=positions_BT, single=False)

    def gather(self, x_BTC: Tensor) -> Tensor:
        """See `Rows`; the last `spans` says how long the row is."""
        assert self._order is not None
        longest, order_S = self._order
        padded_BTC = torch.nn.functional.pad(x_BTC, (0, 0, 0, longest - x_BTC.shape[1]))
        all_RBTC = gather(padded_BTC.unsqueeze(0), self.group)
        return all_RBTC.transpose(0, 1).flatten(1, 2).index_select(1, order_S)

    def total(self, x: Tensor) -> Tensor:
        """See `Rows`."""
        return total(x, self.group)


def _order(tokens: int, ranks: int, device: torch.device) -> tuple[int, Tensor]:
    """Tokens of the longest part, and where each token of the row stands among the joined padded parts."""
    parts = [pieces(tokens, ranks, rank) for rank in range(ranks)]
    longest = max(sum(len(piece) for piece in part) for part in parts)
    order_S = torch.empty(tokens, dtype=torch.int64)
    for rank, part in enumerate(parts):
        at = rank * longest
        for piece in part:
            order_S[piece.start : piece.stop] = torch.arange(at, at + len(piece))
            at += len(piece)
    return longest, order_S.to(device)


def apply_context_parallel(model: GLM5, group: ProcessGroup) -> None:
    """Makes `model` compute this rank's tokens of the rows that it is given."""
    model.rows = CutRows(group)


@contextlib.contextmanager
def whole_rows(model: GLM5) -> Iterator[None]:
    """Inside the block every rank computes all tokens (evaluation and samples, which want whole rows of logits)."""
    cut, model.rows = model.rows, WholeRows()
    try:
        yield
    finally:
        model.rows = cut
