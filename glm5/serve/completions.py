"""`POST /v1/completions`: raw prompts, as text or as token ids, several at a time; no template and no parser.

Special tokens spelled in a text prompt are special tokens here, so that a client can render a template itself. What
`echo` gives back is the prompt, and with `logprobs` its log-probabilities too: how evaluations score given answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field

from glm5.serve.errors import ApiError, error_body
from glm5.serve.event_stream import COMMENT
from glm5.serve.fields import NEUTRAL, UNREAD, SamplingFields, bad_sequences
from glm5.serve.generation import Generation, Sample, Step
from glm5.serve.schema import StructuredFields
from glm5.serve.service import DONE, Service, data_event
from glm5.serve.wording import LOWEST_LOGPROB, envelope, prompt_logprobs, usage
from glm5.text import token_bytes

MOST_PROMPTS = 64
DEFAULT_MAX_TOKENS = 16
Row = tuple[int, float | None, Any]
"""A token id, its log-probability and the likeliest; no log-probability for the first token of a prompt."""


class CompletionRequest(SamplingFields):
    """The body."""

    unread: ClassVar[frozenset[str]] = UNREAD | {"add_special_tokens"}  # the tokenizer adds none
    refused: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL | {"suffix": ("",), "best_of": (1,)}

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    structured_outputs: StructuredFields | None = None

    @property
    def given(self) -> list[str | list[int]]:
        """The prompts one by one."""
        prompt: Any = self.prompt
        single = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        return [prompt] if single else prompt


def install_completions(app: FastAPI, service: Service) -> None:
    """Adds the endpoint."""

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        prompts = len(body.given)
        if not 1 <= prompts <= MOST_PROMPTS or prompts * (body.n or 1) > MOST_PROMPTS:
            raise ApiError(
                400, f"Give 1 to {MOST_PROMPTS} prompts, and at most {MOST_PROMPTS} samples of all together."
            )
        if (body.n or 1) > service.limits.max_n:
            raise ApiError(400, f"At most n = {service.limits.max_n} is accepted; send less.")
        session = request.headers.get("x-session-id")
        return await service.answer(
            request, lambda: CompletionReply(body, service, session), stream=body.stream, priority=body.priority
        )


class CompletionReply:
    """The reply to one request."""

    end = DONE
    pause = COMMENT

    def __init__(self, request: CompletionRequest, service: Service, session_id: str | None) -> None:
        self.request, self.service = request, service
        scoring = request.echo and request.logprobs is not None
        if request.max_tokens == 0 and not request.echo:
            raise ApiError(400, "max_tokens is 0, so there is nothing to give; ask for a token, or for echo.")
        if scoring and request.stream:
            raise ApiError(400, "echo with logprobs comes with the whole reply only; leave out stream.")
        most = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        structure = None if request.structured_outputs is None else request.structured_outputs.outputs()
        settings = {} if not scoring or request.prompt_logprobs is not None else {"prompt_logprobs": request.logprobs}
        # With max_tokens 0 a token is sampled all the same, and not shown: the prompt must be read.
        params = request.sampling(
            service.defaults, max_tokens=max(1, most), logprobs=request.logprobs, structured_outputs=structure,
            bad_sequences=bad_sequences(request.bad_words, service.tokenizer), **settings,
        )  # fmt: skip
        self.hidden = most == 0
        self.said: dict[int, int] = {}
        """Characters that a stream has given of each sample."""
        encode = service.tokenizer.encode
        prompts = [encode(prompt) if isinstance(prompt, str) else prompt for prompt in request.given]
        self.generation = Generation(
            service.source, prompts, params, session_id=session_id, salt=request.cache_salt, priority=request.priority
        )

    def whole(self) -> dict[str, Any]:
        """The `text_completion` object."""
        body = {**self._envelope(), "choices": [self._choice(sample) for sample in self.generation.samples]}
        if self.request.return_token_ids:
            body["prompt_token_ids"] = self.generation.prompts[0]
        return {**body, "usage": self._usage()}

    def _choice(self, sample: Sample) -> dict[str, Any]:
        shown = [] if self.hidden else sample.tokens
        text = "".join(token.text for token in shown)
        rows: list[Row] = [(token.token_id, token.logprob, token.top_logprobs) for token in shown]
        pieces = [token.text for token in shown]
        if self.request.echo:
            prompt = sample.index // self.generation.params.n
            text = self._prompt_text(sample) + text
            pieces = [self._spelling(token_id) for token_id in sample.prompt_ids] + pieces
            found = self.generation.prompt_logprobs(prompt) or [None] * len(sample.prompt_ids)
            read = zip(sample.prompt_ids, found, strict=True)
            rows = [(token_id, *(entry[1:] if entry else (None, ()))) for token_id, entry in read] + rows
        choice = {
            "index": sample.index,
            "text": text,
            "logprobs": self._logprobs(rows, pieces) if self.request.logprobs is not None else None,
            "finish_reason": "length" if self.hidden else sample.finish_reason,
        }
        return {**choice, **self._details(sample, shown, last=True)}

    def opening(self) -> Iterator[dict[str, Any]]:
        """The prompts, with `echo`."""
        for sample in self.generation.samples if self.request.echo else ():
            yield self._chunk(sample, {"text": self._prompt_text(sample), "logprobs": None, "finish_reason": None})

    def step(self, step: Step) -> Iterator[dict[str, Any]]:
        """One token's text, when it gives any or details are wanted."""
        token = step.token
        details = self.request.logprobs is not None or self.request.return_token_ids
        if not step.last and not details and not (token and token.text):
            return
        choice: dict[str, Any] = {"text": "", "logprobs": None, "finish_reason": None}
        if token is not None and not self.hidden:
            choice["text"] = token.text
            if self.request.logprobs is not None:
                before = self.said.get(step.sample.index, 0)
                self.said[step.sample.index] = before + len(token.text)
                row = (token.token_id, token.logprob, token.top_logprobs)
                choice["logprobs"] = self._logprobs([row], [token.text], before)
            choice |= self._details(step.sample, [token], last=False)
        if step.last:
            choice["finish_reason"] = "length" if self.hidden else step.sample.finish_reason
            choice["stop_reason"] = token.stop_reason if token else None
        yield self._chunk(step.sample, choice)

    def closing(self) -> Iterator[dict[str, Any]]:
        """The usage, when it was asked for."""
        if self._says_usage:
            yield {**self._envelope(), "choices": [], "usage": self._usage()}

    def failure(self, status: int, message: str) -> dict[str, Any]:
        """An error event."""
        return error_body(status, message)

    def encode(self, body: dict[str, Any]) -> str:
        """A chunk as it is sent."""
        return data_event(body)

    def _usage(self) -> dict[str, Any]:
        """A token that is not shown was not asked for."""
        counts = usage(self.generation)
        return counts | ({"completion_tokens": 0, "total_tokens": counts["prompt_tokens"]} if self.hidden else {})

    # ---- parts --------------------------------------------------------------------------------------------------
    def _details(self, sample: Sample, tokens: list[Any], *, last: bool) -> dict[str, Any]:
        """The fields of a choice that OpenAI does not have."""
        found: dict[str, Any] = {}
        if last:
            found["stop_reason"] = tokens[-1].stop_reason if tokens else None
            if self.request.prompt_logprobs is not None:
                prompt = sample.index // self.generation.params.n
                found["prompt_logprobs"] = prompt_logprobs(self.service.tokenizer, self.generation, prompt)
            if self.request.return_token_ids:
                found["prompt_token_ids"] = sample.prompt_ids
        if self.request.return_token_ids:
            found["token_ids"] = [token.token_id for token in tokens]
            found["weight_versions"] = [token.version for token in tokens]
        return found

    def _logprobs(self, rows: list[Row], pieces: list[str], start: int = 0) -> dict[str, Any]:
        """OpenAI's older form: parallel lists. An offset is where the text stood when the token came."""
        offsets = []
        for piece in pieces:
            offsets.append(start)
            start += len(piece)
        wanted = bool(self.request.logprobs)
        return {
            "tokens": [self._spelling(token_id) for token_id, _, _ in rows],
            "token_logprobs": [None if own is None else max(own, LOWEST_LOGPROB) for _, own, _ in rows],
            "top_logprobs": [self._likeliest(*row) if wanted else None for row in rows],
            "text_offset": offsets,
        }

    def _likeliest(self, token_id: int, own: float | None, top: Any) -> dict[str, float] | None:
        """Spellings and log-probabilities, the token's own among them; of tokens spelled alike the likelier stays."""
        if own is None:
            return None
        found: dict[str, float] = {}
        for other, logprob in (*top, (token_id, own)):
            found.setdefault(self._spelling(other), max(logprob, LOWEST_LOGPROB))
        return found

    def _spelling(self, token_id: int) -> str:
        if self.request.return_tokens_as_token_ids:
            return f"token_id:{token_id}"
        return token_bytes(self.service.tokenizer, token_id).decode(errors="replace")

    def _prompt_text(self, sample: Sample) -> str:
        given = self.request.given[sample.index // self.generation.params.n]
        return given if isinstance(given, str) else self.service.tokenizer.decode(given)

    def _chunk(self, sample: Sample, choice: dict[str, Any]) -> dict[str, Any]:
        said = {"usage": None} if self._says_usage else {}  # in every chunk, as OpenAI does
        return {**self._envelope(), "choices": [{"index": sample.index, **choice}], **said}

    @property
    def _says_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and options.include_usage

    def _envelope(self) -> dict[str, Any]:
        return envelope(self.generation, "text_completion", "cmpl", self.service.model_name)
