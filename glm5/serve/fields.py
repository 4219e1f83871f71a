"""What the request bodies of all endpoints share: how unknown fields are met, and the settings of sampling.

The rule: a misspelt or unknown field is refused with the nearest real name. A field that the API knows and this server
has no use for is accepted unread (`UNREAD`). One that would change the answer and is not built is refused, unless its
value asks for nothing (`REFUSED`). A field that is null counts as absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from glm5.engine import SamplingDefaults, SamplingParams
from glm5.engine.sampling_params import MAX_BAD, MAX_STOPS
from glm5.errors import did_you_mean
from glm5.text import Tokenizer

UNREAD = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "spaces_between_special_tokens",
        "store",
        "user",
    }
)


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (), "include_reasoning": (True,), "length_penalty": (1.0,), "moderation": (),
    "skip_special_tokens": (True,), "truncate_prompt_tokens": (), "use_beam_search": (False,),
}  # fmt: skip
"""What is refused everywhere but at these values."""


class RequestBody(BaseModel):
    """Base of the bodies."""

    model_config = ConfigDict(extra="forbid")
    unread: ClassVar[frozenset[str]] = UNREAD
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Known fields that are not built, and the values at which they ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            raise ValueError("the body must be one JSON object")
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds half of a surrogate pair; send whole characters") from None
        except RecursionError:
            raise ValueError("the body is nested too deeply; send a flatter one") from None
        known = cls.model_fields.keys() | cls.refused.keys() | cls.unread
        for name, value in body.items():
            if name not in known:
                raise ValueError(f"Unknown field {name!r}.{did_you_mean(name, known)}")
            if name in cls.refused and value is not None and value not in cls.refused[name]:
                raise ValueError(f"{name} is not supported by this server; leave it out")
        return {name: value for name, value in body.items() if name in cls.model_fields and value is not None}


def bad_sequences(words: Iterable[str] | None, tokenizer: Tokenizer) -> list[list[int]]:
    """`bad_words` as the tokenizer writes them, alone and behind a space, as in vLLM; blanks as they are. Other ways to
    cut a word into tokens stay open."""
    named = [(word.strip(), f" {word.strip()}") if word.strip() else (word,) for word in words or () if word]
    return [tokenizer.encode(form, allow_special=False) for forms in named for form in forms]


class StreamOptions(BaseModel):
    """`stream_options`. Obfuscation of the stream is not done."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class SamplingFields(RequestBody):
    """The settings that chat completions and completions have in common; OpenAI's names, then vLLM's."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = None
    n: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int = 0
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=MAX_STOPS - 1)
    """Room for `</tool_call>`, where one call is allowed."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    priority: int = 0
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    """Names the tokens of log-probabilities by their ids: `token_id:17`."""
    bad_words: list[str] | None = Field(default=None, max_length=MAX_BAD // 2 - 1)
    """Each in two forms, and room for `<tool_call>`, where there are no tools."""
    cache_salt: str | None = Field(default=None, min_length=1)

    def sampling(self, defaults: SamplingDefaults, **settings: Any) -> SamplingParams:
        """The engine's settings, over `defaults` and under `settings`; raises `InputError` for values out of range."""
        given: dict[str, Any] = {
            "n": self.n,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self._biases(),
            "min_tokens": self.min_tokens,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "seed": None if self.seed is None else self.seed % 2**64,
            "prompt_logprobs": self.prompt_logprobs,
            **settings,
        }
        return SamplingParams(
            max_tokens=given.pop("max_tokens", self.max_tokens),
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            **defaults.under(**given),
        )

    def _biases(self) -> dict[int, float] | None:
        """`logit_bias` with its keys as the numbers that they spell."""
        if self.logit_bias is None:
            return None
        wrong = next((key for key in self.logit_bias if not (key.isascii() and key.isdigit() and len(key) < 10)), None)
        if wrong is not None:
            raise ValueError(f"logit_bias has the key {wrong!r}; the keys are token ids")
        return {int(key): bias for key, bias in self.logit_bias.items()}

    @model_validator(mode="after")
    def _sampling_is_consistent(self) -> SamplingFields:
        self._biases()
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs come with the whole reply only; leave out stream")
        return self
