"""Fixtures of the tests of the decoder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from glm5.model.decode import Decoder


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per step that a decoder ran."""
    done: list[int] = []
    step = Decoder.step

    def counted(self: Decoder, ids: list[int], *rest: object) -> tuple[Tensor, Tensor]:
        done.append(len(ids))
        return step(self, ids, *rest)

    monkeypatch.setattr(Decoder, "step", counted)
    return done
