"""Which tokens of each row this process computes: all of them, unless context parallelism cuts rows over ranks.

The one seam between the forward pass and `parallel.context`. A pass is always given whole rows of ids, segments and
positions (integers, small); what is computed per token exists for the tokens of this process only.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from glm5.ops.spans import Spans


class Rows(Protocol):
    """How a row's tokens are spread."""

    def part(self, x_BT: Tensor) -> Tensor:
        """This process's tokens of a row-wise tensor."""

    def spans(self, spans: Spans) -> Spans:
        """The spans of this process's queries; keys stay numbered over the whole row."""

    def gather(self, x_BTC: Tensor) -> Tensor:
        """Everybody's tokens in the order of the row, [B, S, C]; differentiable."""

    def total(self, x: Tensor) -> Tensor:
        """Sum over the processes that share a row; not differentiable."""


class WholeRows:
    """Every token is here."""

    def part(self, x_BT: Tensor) -> Tensor:
        """See `Rows`."""
        return x_BT

    def spans(self, spans: Spans) -> Spans:
        """See `Rows`."""
        return spans

    def gather(self, x_BTC: Tensor) -> Tensor:
        """See `Rows`."""
        return x_BTC

    def total(self, x: Tensor) -> Tensor:
        """See `Rows`."""
        return x
