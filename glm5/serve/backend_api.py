"""The words of a backend's API: how a request is said, and what comes back, as pieces of tokens.

* `generate`: `POST /inference/v1/generate` of vLLM and of this project, ids in and ids out.
* `completions`: `POST /v1/completions` with `return_token_ids` (vLLM).
* `sglang`: `POST /generate` of SGLang. Its stream repeats what was said before, or not, by a flag of the server; the
  count of tokens in `meta_info` tells.

Stop strings are not sent: they are found on this side. vLLM's and SGLang's were written from their documentation and
are tested against stand-ins; `generate` is tested against this project's own server.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

from glm5.engine import SamplingParams
from glm5.engine.outputs import FinishReason, TopLogprobs
from glm5.engine.sampling_params import MAX_BIAS
from glm5.errors import InputError
from glm5.serve.errors import ApiError

Events = AsyncIterator[dict[str, Any]]
Token = tuple[int, float, TopLogprobs]
"""An id, its log-probability, and the likeliest ones."""
REASONS: dict[str | None, FinishReason | None] = {
    None: None, "stop": "stop", "eos": "stop", "tool_calls": "stop", "length": "length", "abort": "abort",
}  # fmt: skip
NOT_SENT = ("stop", "stop_from", "include_stop_str_in_output", "structured_outputs", "logprobs", "prompt_logprobs",
            "experts_from", "tempered_logprobs")  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Some tokens of one sample."""

    index: int
    tokens: list[Token]
    finish_reason: FinishReason | None
    version: int = 0
    cached_tokens: int = 0


class BackendApi(Protocol):
    """One API."""

    path: str
    salt: str
    """The field for a text without which cached prefixes are not shared: only requests of one salt share them."""

    def body(self, prompt: Sequence[int], params: SamplingParams, priority: int) -> dict[str, Any]:
        """The request."""

    def pieces(self, events: Events) -> AsyncIterator[Piece]:
        """The tokens in what came back."""


def settings(params: SamplingParams) -> dict[str, Any]:
    """The sampling settings under vLLM's names, without those that hold here."""
    given = {name: value for name, value in asdict(params).items() if value is not None and name not in NOT_SENT}
    given["stop_token_ids"] = list(params.stop_token_ids)
    if given.pop("bad_sequences"):  # a setting of this project: one token becomes a bias that no model overcomes
        if any(len(one) > 1 for one in params.bad_sequences):
            raise InputError("bad_words of more than one token are not passed on to a backend; leave them out.")
        never = {token: -MAX_BIAS for (token,) in params.bad_sequences}
        given["logit_bias"] = {**(params.logit_bias or {}), **never}
    if params.structured_outputs is not None:
        if params.structured_outputs.begins_at is not None:
            raise InputError("structured_outputs.begins_at is not passed on to a backend; leave it out.")
        wanted = asdict(replace(params.structured_outputs, unspelled=()))  # a promise of this project's engine alone
        given["structured_outputs"] = {name: value for name, value in wanted.items() if value not in (None, ())}
    return given


class GenerateApi:
    """`POST /inference/v1/generate`."""

    path = "/inference/v1/generate"
    salt = "cache_salt"

    def __init__(self, model: str | None = None) -> None:
        self.model = model

    def body(self, prompt: Sequence[int], params: SamplingParams, priority: int) -> dict[str, Any]:
        """Log-probabilities are always asked for: they belong to a token."""
        sampling = {**settings(params), "logprobs": params.logprobs or 0}
        body = {"token_ids": list(prompt), "sampling_params": sampling, "stream": True, "priority": priority,
                "stream_options": {"include_usage": True}}  # fmt: skip
        return body if self.model is None else {**body, "model": self.model}

    async def pieces(self, events: Events) -> AsyncIterator[Piece]:
        """One per choice of each event."""
        async for event in events:
            cached = _cached(event)
            for choice in event.get("choices") or ():
                ids = _ids(choice)
                content = _each((choice.get("logprobs") or {}).get("content"), ids)
                tokens = [
                    (token_id, _sampled(entry.get("logprob")), tuple((_token_id(t), _logprob(t)) for t in _tops(entry)))
                    for token_id, entry in zip(ids, content, strict=True)
                ]
                version = max(choice.get("weight_versions") or [0])
                yield Piece(choice.get("index", 0), tokens, _reason(choice), version, cached)


class CompletionsApi:
    """`POST /v1/completions`."""

    path = "/v1/completions"
    salt = "cache_salt"

    def __init__(self, model: str) -> None:
        self.model = model

    def body(self, prompt: Sequence[int], params: SamplingParams, priority: int) -> dict[str, Any]:
        """The likeliest tokens are asked for as ids, since texts do not name a token."""
        extra = {"return_tokens_as_token_ids": True} if params.logprobs else {}
        return {
            **settings(params), **extra, "model": self.model, "prompt": list(prompt), "stream": True,
            "return_token_ids": True, "logprobs": params.logprobs or 0, "priority": priority,
            "stream_options": {"include_usage": True},
        }  # fmt: skip

    async def pieces(self, events: Events) -> AsyncIterator[Piece]:
        """One per choice of each event."""
        async for event in events:
            cached = _cached(event)
            for choice in event.get("choices") or ():
                ids, said = _ids(choice), choice.get("logprobs") or {}
                own = _each(said.get("token_logprobs"), ids)
                tops = said.get("top_logprobs") or [None] * len(ids)
                tokens = [
                    (token_id, _sampled(logprob), _ranked(top or {}))
                    for token_id, logprob, top in zip(ids, own, tops, strict=False)
                ]
                version = max(choice.get("weight_versions") or [0])
                yield Piece(choice.get("index", 0), tokens, _reason(choice), version, cached)


class SGLangApi:
    """`POST /generate`."""

    path = "/generate"
    salt = "extra_key"
    """Releases before the spring of 2026 read it and did nothing with it (SGLang's change 23300)."""

    def body(self, prompt: Sequence[int], params: SamplingParams, priority: int) -> dict[str, Any]:
        """Under SGLang's names. Raises `InputError` for settings that it has not."""
        names = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed"}
        given = {names.get(name, name): value for name, value in settings(params).items()}
        if given["top_k"] <= 0:
            given["top_k"] = -1
        wanted = given.pop("structured_outputs", {})
        for name, theirs in (("json", "json_schema"), ("regex", "regex"), ("grammar", "ebnf")):
            if name in wanted:
                given[theirs] = wanted[name]
        if "choice" in wanted:
            raise InputError("structured_outputs.choice is not passed on to SGLang; use a regex.")
        return {"input_ids": list(prompt), "sampling_params": given, "stream": True, "return_logprob": True,
                "top_logprobs_num": params.logprobs or 0, "priority": priority}  # fmt: skip

    async def pieces(self, events: Events) -> AsyncIterator[Piece]:
        """What is new in each event."""
        seen: dict[int, int] = {}
        async for event in events:
            meta, index = event.get("meta_info") or {}, event.get("index", 0)
            ids = _ids({"token_ids": event.get("output_ids")})
            total = int(meta.get("completion_tokens", len(ids)))
            new = max(0, total - seen.get(index, 0))
            seen[index] = total
            fresh = ids[len(ids) - new :] if new <= len(ids) else ()
            own = _each(list(meta.get("output_token_logprobs") or ())[-new:] if new else (), fresh)
            tops = _last(meta.get("output_top_logprobs"), new, [])
            tokens = [
                (token_id, _sampled(said[0]), tuple((top[1], float(top[0])) for top in likeliest or ()))
                for token_id, said, likeliest in zip(fresh, own, tops, strict=True)
            ]
            finish = meta.get("finish_reason") or {}
            yield Piece(
                index, tokens, _reason({"finish_reason": finish.get("type")}), 0, int(meta.get("cached_tokens", 0))
            )


def _ids(choice: Mapping[str, Any]) -> list[int]:
    ids = choice.get("token_ids")
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        raise ApiError(502, "The backend gives no token ids; it must be one that can, or be asked by another API.")
    return ids


def _cached(event: Mapping[str, Any]) -> int:
    details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def _reason(choice: Mapping[str, Any]) -> FinishReason | None:
    return REASONS.get(choice.get("finish_reason"), "stop")


def _each(said: Any, ids: Sequence[int]) -> Sequence[Any]:
    """What is said of the log-probabilities of these tokens: of each of them, or the answer is of no use."""
    if len(said or ()) != len(ids):
        raise ApiError(502, f"The backend gives {len(said or ())} log-probabilities of {len(ids)} tokens; ask another.")
    return said or ()


def _sampled(logprob: Any) -> float:
    """That of a sampled token, which JSON may hold as null or NaN: with those nothing can be learnt."""
    if not isinstance(logprob, int | float) or not math.isfinite(logprob):
        raise ApiError(502, f"The backend gives a log-probability of {logprob}; look at its log.")
    return float(logprob)


def _logprob(entry: Mapping[str, Any]) -> float:
    return float(entry.get("logprob") or 0.0)


def _tops(entry: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return entry.get("top_logprobs") or ()


def _token_id(entry: Mapping[str, Any]) -> int:
    return int(entry["token_id"]) if "token_id" in entry else _named(entry.get("token", ""))


def _named(name: str) -> int:
    """The id in `token_id:17`."""
    kind, _, number = name.partition(":")
    if kind != "token_id" or not number.isdigit():
        raise ApiError(502, "The backend names its likeliest tokens by text; their ids are needed.")
    return int(number)


def _ranked(found: Mapping[str, float]) -> TopLogprobs:
    return tuple(sorted(((_named(name), logprob) for name, logprob in found.items()), key=lambda item: -item[1]))


def _last(values: Any, count: int, missing: list[Any]) -> list[Any]:
    """The last `count` of a list that may be missing, or too short: filled up in front."""
    kept = list(values or ())[-count:] if count else []
    return [*([missing] * (count - len(kept))), *kept]


ApiName = Literal["generate", "completions", "sglang"]


def backend_api(name: ApiName, model: str | None = None) -> BackendApi:
    """The API of that name; `model` is what the backend calls its model. Raises `InputError`."""
    if name == "sglang":
        return SGLangApi()
    if name == "generate":
        return GenerateApi(model)
    if model is None:
        raise InputError("The backend's /v1/completions needs the name of its model; give --backend-model.")
    return CompletionsApi(model)
