"""`POST /inference/v1/generate`: token ids in, token ids out. For trainers and evaluations; nothing is tokenised.

The body is vLLM's: `token_ids`, `sampling_params` with the engine's own field names, and a few fields beside them. The
reply has ids, log-probabilities and the weight version of every token; streamed, one event per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field

from glm5.engine import SamplingParams, StructuredOutputs, TokenDelta
from glm5.engine.sampling_params import MAX_BAD, MAX_BAD_LENGTH
from glm5.errors import InputError, did_you_mean
from glm5.serve.errors import ApiError, error_body
from glm5.serve.event_stream import COMMENT
from glm5.serve.fields import RequestBody, StreamOptions, bad_sequences
from glm5.serve.generation import Generation, Sample, Step
from glm5.serve.service import DONE, Service, data_event
from glm5.serve.wording import LOWEST_LOGPROB, prompt_logprobs, usage
from glm5.text import Tokenizer

UNUSED = {"detokenize", "skip_special_tokens", "spaces_between_special_tokens", "output_kind"}
"""Settings of vLLM that concern its own text; there is none here."""


class GenerateRequest(RequestBody):
    """The body."""

    unread: ClassVar[frozenset[str]] = frozenset({"request_id", "kv_transfer_params"})
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {"features": (), "routed_experts": (False,)}

    model: str | None = None
    token_ids: list[int] = Field(min_length=1)
    sampling_params: dict[str, Any] = Field(default_factory=dict)
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int = 0
    cache_salt: str | None = Field(default=None, min_length=1)

    def params(self, tokenizer: Tokenizer) -> SamplingParams:
        """The engine's settings; raises `InputError` for an unknown name or a value out of range."""
        given = {n: v for n, v in self.sampling_params.items() if v is not None and n not in UNUSED}
        words = given.pop("bad_words", ())
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
            raise InputError("sampling_params.bad_words must be a list of texts.")
        if words:
            given["bad_sequences"] = _with_words(given.get("bad_sequences", []), words, tokenizer)
        known = {field.name for field in fields(SamplingParams)}
        wrong = next((name for name in given if name not in known), None)
        if wrong is not None:
            raise InputError(f"sampling_params has no field {wrong!r}.{did_you_mean(wrong, known)}")
        for name in ("experts_from", "tempered_logprobs"):
            if name in given:
                raise InputError(f"sampling_params.{name} is for callers in the same program; leave it out.")
        structured = given.get("structured_outputs")
        if structured is not None:
            wanted = [field.name for field in fields(StructuredOutputs)]
            if not isinstance(structured, dict) or not structured.keys() <= set(wanted):
                raise InputError(f"structured_outputs must be an object with one of {', '.join(wanted)}.")
            given["structured_outputs"] = StructuredOutputs(**structured)
        if isinstance(biases := given.get("logit_bias"), dict):  # JSON's keys are texts
            given["logit_bias"] = {int(k) if k.isascii() and k.isdigit() and len(k) < 10 else k: b
                                   for k, b in biases.items()}  # fmt: skip
        return SamplingParams(**given)


def install_generate(app: FastAPI, service: Service) -> None:
    """Adds the endpoint."""

    @app.post("/inference/v1/generate", response_model=None)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        service.check_model(body.model)
        session = request.headers.get("x-session-id")
        return await service.answer(
            request, lambda: GenerateReply(body, service, session), stream=body.stream, priority=body.priority
        )


def _with_words(also: Any, words: Sequence[str], tokenizer: Tokenizer) -> list[Any]:
    """`bad_sequences` with those of `bad_words` behind them; the engine checks what stands in the former."""
    if not isinstance(also, list):
        raise InputError(f"sampling_params.bad_sequences is {also!r:.40}; give a list of lists of token ids.")
    made = bad_sequences(words, tokenizer)
    if len(also) <= MAX_BAD < len(also) + len(made) or any(len(one) > MAX_BAD_LENGTH for one in made):
        raise InputError(
            f"sampling_params.bad_words holds at most {MAX_BAD // 2} words of {MAX_BAD_LENGTH} tokens, and fewer "
            "beside bad_sequences; give less."
        )
    return [*also, *made]


class GenerateReply:
    """The reply to one request."""

    end = DONE
    pause = COMMENT

    def __init__(self, request: GenerateRequest, service: Service, session_id: str | None) -> None:
        self.request, self.service = request, service
        params = request.params(service.tokenizer)
        if params.n > service.limits.max_n:
            raise ApiError(400, f"n is {params.n}; at most {service.limits.max_n} samples are made of one prompt.")
        self.generation = Generation(
            service.source, [request.token_ids], params, session_id=session_id, salt=request.cache_salt,
            priority=request.priority,
        )  # fmt: skip

    def whole(self) -> dict[str, Any]:
        """Everything at once."""
        body = {
            **self._envelope(),
            "choices": [self._choice(sample, sample.tokens) for sample in self.generation.samples],
        }
        body["prompt_token_ids"] = self.generation.prompts[0]
        body["prompt_logprobs"] = prompt_logprobs(self.service.tokenizer, self.generation)
        return {**body, "usage": usage(self.generation)}

    def opening(self) -> Iterator[dict[str, Any]]:
        """The prompt's ids, and no choices."""
        yield {**self._envelope(), "choices": [], "prompt_token_ids": self.generation.prompts[0]}

    def step(self, step: Step) -> Iterator[dict[str, Any]]:
        """One token: a choice like that of the whole reply, with lists of one."""
        yield {
            **self._envelope(),
            "choices": [self._choice(step.sample, [step.token] if step.token else [], step.last)],
        }

    def closing(self) -> Iterator[dict[str, Any]]:
        """The usage, when it was asked for."""
        if self.request.stream_options is not None and self.request.stream_options.include_usage:
            yield {**self._envelope(), "choices": [], "usage": usage(self.generation)}

    def failure(self, status: int, message: str) -> dict[str, Any]:
        """An error event."""
        return error_body(status, message)

    def encode(self, body: dict[str, Any]) -> str:
        """An event as it is sent."""
        return data_event(body)

    def _envelope(self) -> dict[str, Any]:
        return {"request_id": f"gen-{self.generation.id}", "model": self.service.model_name,
                "weight_version": self.generation.version}  # fmt: skip

    def _choice(self, sample: Sample, tokens: list[TokenDelta], ended: bool = True) -> dict[str, Any]:
        content = [
            {
                "token": f"token_id:{token.token_id}",  # as vLLM spells a token that is not to be decoded
                "token_id": token.token_id,
                "logprob": max(token.logprob, LOWEST_LOGPROB),
                "top_logprobs": [
                    {"token": f"token_id:{other}", "token_id": other, "logprob": max(logprob, LOWEST_LOGPROB)}
                    for other, logprob in token.top_logprobs
                ],
            }
            for token in tokens
        ]
        wanted = self.generation.params.logprobs is not None
        return {
            "index": sample.index,
            "token_ids": [token.token_id for token in tokens],
            "weight_versions": [token.version for token in tokens],
            "logprobs": {"content": content} if wanted else None,
            "finish_reason": sample.finish_reason if ended else None,
            "stop_reason": tokens[-1].stop_reason if ended and tokens else None,
        }
