"""How one request is sampled: the field names and defaults of vLLM's `SamplingParams`, checked when it is made.

Left out for now: penalties, logit bias, prompt log-probabilities and structured output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from glm5.engine.checks import as_tuple, check_number, check_whole
from glm5.errors import InputError

MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_SAMPLES = 256


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one request; `dataclasses.replace` changes a field (it validates again).

    The order of the filters is temperature, `min_p`, `top_k`, `top_p`, as in vLLM. Raises `InputError`.
    """

    n: int = 1
    """Completions of the same prompt; each draws its own random numbers."""
    temperature: float = 1.0
    """0 takes the likeliest token (the lowest id of equals)."""
    top_p: float = 1.0
    """Keeps the likeliest tokens until their probabilities reach this sum; 1 keeps all."""
    top_k: int = 0
    """Keeps this many of the likeliest tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Drops tokens less likely than this share of the likeliest one."""
    max_tokens: int | None = 16
    """Tokens to sample at most; None: as many as the context limit leaves."""
    min_tokens: int = 0
    """No stop token is sampled before this many tokens."""
    stop: str | Iterable[str] = ()
    """Strings that end the text; stored as a tuple. They need an engine with a tokenizer."""
    stop_token_ids: Iterable[int] = ()
    """Token ids that end the sequence, beside the model's own end-of-turn ids; stored as a tuple."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Goes on after the model's own end-of-turn ids (`stop_token_ids` still stop)."""
    seed: int | None = None
    """Seed of this request; None draws a fresh one, which the output reports."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report at each position. The sampled token's own is always reported."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else as_tuple("stop", self.stop, "strings")
        stop_token_ids = as_tuple("stop_token_ids", self.stop_token_ids, "token ids")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        check_whole("n", self.n, 1, MAX_SAMPLES)
        check_number("temperature", self.temperature, 0.0)
        check_number("top_p", self.top_p, 0.0, 1.0, above=True)
        check_number("min_p", self.min_p, 0.0, 1.0)
        check_whole("top_k", self.top_k, -1)
        if self.max_tokens is not None:
            check_whole("max_tokens", self.max_tokens, 1)
        check_whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.seed is not None:
            check_whole("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            check_whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(stop) > MAX_STOPS or len(stop_token_ids) > MAX_STOPS:
            raise InputError(f"stop and stop_token_ids hold at most {MAX_STOPS} entries each; give fewer.")
        for text in stop:
            if not isinstance(text, str) or not text:
                raise InputError(f"stop holds {text!r}; each entry must be a text of at least one character.")
        for token in stop_token_ids:
            check_whole("stop_token_ids entry", token, 0)
