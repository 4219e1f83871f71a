"""What the tests of the decoder share: steps that are counted, and steps by the modules alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import glm5
from glm5.model import LatentCache
from glm5.model.fast_steps import FastSteps
from glm5.ops import decoding

IDS = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(5))

needs_extension = pytest.mark.skipif(not decoding.available(), reason="the install found no C compiler")


@contextlib.contextmanager
def modules_only() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FastSteps, "logits", lambda *arguments: None)
        yield


def filled(model: glm5.GLM5, rows: int = 1, tokens: int = 30) -> LatentCache:
    """A cache of the first tokens, by the modules."""
    dtype = model.lm_head.weight.dtype
    cache = LatentCache(model.config, batch=rows, capacity=45, dtype=dtype)
    if tokens:
        with modules_only():
            model(IDS[:rows, :tokens], cache=cache)
    return cache


def assert_like_the_modules(model: glm5.GLM5) -> Tensor:
    """The logits of the next token, which are the modules'."""
    fast = model(IDS[:1, 30:31], cache=filled(model)).logits
    with modules_only():
        slow = model(IDS[:1, 30:31], cache=filled(model)).logits
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    return fast
