"""How a model is computed in this process: the options that every verb with an engine of its own shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from glm5.engine import Engine
from glm5.parallel import InferencePlan


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Base of the options of such verbs."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model is; with several processes a GPU for each."""
    cache: Literal["fp32", "bf16", "fp8"] | None = None
    """Format of the cache; that of the weights when left out."""
    cache_bytes: int | None = None
    """Memory of the cache; a share of what is free when left out."""
    max_model_len: int | None = None
    """Longest prompt and answer together, in tokens; the model's own limit when left out."""
    draft_tokens: int = 0
    """Tokens that the MTP module guesses ahead, where measurement finds that it pays; they change no answer."""
    strict: bool = False
    """Answers depend on nothing but the request and the weights, to the bit (float32)."""

    def engine(self, directory: Path, *, max_num_seqs: int, parallel: InferencePlan | None = None) -> Engine:
        """The engine of a model directory."""
        return Engine(
            directory, dtype=getattr(torch, self.dtype), device=self.device, max_model_len=self.max_model_len,
            strict=self.strict, storage=self.cache, memory_bytes=self.cache_bytes, max_num_seqs=max_num_seqs,
            num_speculative_tokens=self.draft_tokens, parallel=parallel,
        )  # fmt: skip
