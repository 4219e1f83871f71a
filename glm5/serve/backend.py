"""Another server as the source of tokens: our APIs, parsers and page in front of vLLM, SGLang or ourselves.

`Backend` stands where an `Engine` stands: prompt ids go out, sampled ids and their log-probabilities come back. Text,
stop strings, tool calls and reasoning are made here, from the ids, so nothing is tokenised twice. `backend_api` has the
words of the three APIs that it speaks.

Each request has a connection of its own, and closing it is how a backend hears that a request was given up.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio.from_thread
import httpx

from glm5.config import ModelConfig
from glm5.engine import SamplingParams, TokenDelta
from glm5.engine.admission import go_on
from glm5.engine.outputs import PromptLogprob
from glm5.engine.sampler import SampledToken
from glm5.engine.sequence import Sequence as Completion
from glm5.engine.sequence import fresh_seed
from glm5.engine.sessions import group_of
from glm5.errors import InputError
from glm5.serve.auth import check_key
from glm5.serve.backend_api import BackendApi, Piece
from glm5.serve.errors import ApiError
from glm5.text import Detokenizer, Tokenizer

CONNECT_SECONDS = 10.0
READY_SECONDS = 2.0
"""Time for a backend to answer its `/health`."""
KNOWN_SECONDS = 5.0
"""How long what it answered is believed."""
LONGEST_ANSWER = 4000
"""Characters of a backend's refusal that are passed on."""


class BackendAway(ApiError):
    """No answer, or the half of one: which may have been the last word of a server."""


class Backend:
    """A server at `url`, with the tokenizer (and the context limit) of a local directory.

    `stream` must be called from a worker thread of the event loop, as `Service` does. `transport` is for tests.
    """

    version = 0
    """Of the weights, as far as known: that of the last token."""

    def __init__(
        self,
        url: str,
        directory: str | Path,
        api: BackendApi,
        *,
        max_model_len: int | None = None,
        api_key: str | None = None,
        silence_seconds: float = 600.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`api_key`: what the backend asks for. `silence_seconds`: how long it may say nothing, at the start too.

        Raises `InputError` for a URL that is none, and the errors of the directory's parts.
        """
        if httpx.URL(url).scheme not in ("http", "https") or not httpx.URL(url).host:
            raise InputError(f"The backend {url!r} is no URL; give one such as http://127.0.0.1:8001.")
        self.url, self.api, self.transport = url.rstrip("/").removesuffix("/v1"), api, transport
        self.tokenizer = Tokenizer.from_pretrained(directory)
        config = ModelConfig.from_pretrained(directory)
        self.max_model_len = max_model_len or config.max_position_embeddings
        self.vocab_size = config.vocab_size
        self.eos_ids = frozenset(config.eos_token_ids or self.tokenizer.eos_ids)
        self.headers = {} if api_key is None else {"Authorization": f"Bearer {check_key(api_key)}"}
        self.timeout = httpx.Timeout(CONNECT_SECONDS, read=silence_seconds)
        self._tls = httpx.create_ssl_context(trust_env=False)  # once: it reads all certificates, for 30 ms
        self._asking: asyncio.Future[bool] | None = None
        self._asked = 0.0

    def client(self, timeout: httpx.Timeout) -> httpx.AsyncClient:
        """Makes connections to the backend."""
        return httpx.AsyncClient(timeout=timeout, transport=self.transport, verify=self._tls, trust_env=False)

    async def ready(self) -> bool:
        """Whether the backend answers, as it is known for a few seconds; it may be asked as often as one likes."""
        now = time.monotonic()
        if self._asking is None or (self._asking.done() and now > self._asked + KNOWN_SECONDS):
            self._asked, self._asking = now, asyncio.ensure_future(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> bool:
        try:
            async with self.client(httpx.Timeout(READY_SECONDS)) as client:
                reply = await client.get(f"{self.url}/health", headers=self.headers)
        except httpx.HTTPError:
            return False
        return reply.status_code < 500  # one without the endpoint is there all the same

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        session_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        said: Sequence[TokenDelta] = (),
    ) -> BackendStream:
        """Starts a request. Raises `InputError` for what does not fit, `ApiError` for what the backend refuses.

        said: tokens that the same request has got before, as in `Engine.stream`; the backend sees them as prompt.
        """
        stream = self.request(
            prompt_ids, params, session_id=session_id, priority=priority, deadline=deadline, said=said
        )  # fmt: skip
        anyio.from_thread.run(stream.open)
        return stream

    def request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        session_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        said: Sequence[TokenDelta] = (),
    ) -> BackendStream:
        """`stream` for callers in the event loop: a request that is still to be sent, by `BackendStream.open`."""
        prompt = tuple(prompt_ids)
        if not prompt or any(not 0 <= token < self.vocab_size for token in prompt):
            raise InputError(f"The prompt must be token ids below {self.vocab_size}, at least one.")
        room = self.max_model_len - len(prompt)
        if room < 1 or (params.max_tokens or 1) > room:
            raise InputError(
                f"The request needs {len(prompt)} prompt tokens + {params.max_tokens or 1} new, but the context limit "
                f"is {self.max_model_len} tokens; shorten the prompt or max_tokens."
            )
        if params.prompt_logprobs is not None:
            raise InputError("prompt_logprobs are not passed on to a backend; ask the backend itself.")
        if params.experts_from is not None:
            raise InputError("experts_from is not passed on to a backend: a reply over HTTP names no experts.")
        if params.tempered_logprobs:
            raise InputError("tempered_logprobs is not passed on to a backend, which reports the model's own.")
        most = room if params.max_tokens is None else params.max_tokens
        completions = [
            Completion(
                prompt,
                # The backend samples and holds structures; what ends the text is found here.
                replace(params, structured_outputs=None),
                index=index,
                seed=fresh_seed() if params.seed is None else params.seed,
                max_tokens=most,
                eos_ids=self.eos_ids,
                detokenizer=Detokenizer(self.tokenizer, skip_special_tokens=True),
            )
            for index in range(params.n)
        ]
        go_on(completions, said, self.vocab_size)
        if said:
            _check_goes_on(params)
        more = replace(params, max_tokens=most - len(said), min_tokens=max(0, params.min_tokens - len(said)))
        body = self.api.body((*prompt, *(delta.token_id for delta in said)), more, priority)
        headers = self.headers
        if session_id:  # an empty one names none, and an empty salt would be refused
            body[self.api.salt] = group_of(session_id)
            headers = {**headers, "X-Session-ID": session_id}
        return BackendStream(self, completions, body, headers, deadline)


class BackendStream:
    """The tokens of one request, with `glm5.engine.TokenStream`'s face for asyncio."""

    prompt_logprobs: tuple[PromptLogprob, ...] | None = None

    def __init__(
        self, backend: Backend, completions: list[Completion], body: dict[str, Any], headers: dict[str, str],
        deadline: float | None,
    ) -> None:  # fmt: skip
        self.backend, self.completions = backend, completions
        self._body, self._headers, self._deadline = body, headers, deadline
        self.cached_tokens = 0
        self._ready: deque[TokenDelta] = deque()
        self._closing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Sends the request; returns when the backend accepts it."""
        loop = self._loop = asyncio.get_running_loop()
        self._until = None if self._deadline is None else loop.time() + self._deadline
        backend = self.backend
        self._client = backend.client(backend.timeout)
        request = self._client.build_request(
            "POST", backend.url + backend.api.path, json=self._body, headers=self._headers
        )  # fmt: skip
        try:
            async with asyncio.timeout_at(self._until):
                self._response = await self._client.send(request, stream=True)
                if self._response.status_code != 200:
                    await self._response.aread()
        except TimeoutError:
            await self._client.aclose()
            raise ApiError(504, "The request's deadline passed before the backend took it; ask again.") from None
        except httpx.HTTPError as error:
            await self._client.aclose()
            raise self._away(error) from None
        except BaseException:
            await self._client.aclose()
            raise
        if self._response.status_code != 200:
            await self._client.aclose()
            raise _refusal(self._response)
        self._pieces = backend.api.pieces(_events(self._response))

    def close(self) -> None:
        """Closes the connection, from any thread."""
        self._loop.call_soon_threadsafe(self._close)

    def _close(self) -> None:
        self._closing = self._closing or self._loop.create_task(self.aclose())

    async def aclose(self) -> None:
        """`close`, at once."""
        await self._client.aclose()

    def __aiter__(self) -> BackendStream:
        return self

    async def __anext__(self) -> TokenDelta:
        while not self._ready:
            if all(completion.done for completion in self.completions):
                self.close()
                raise StopAsyncIteration
            try:
                async with asyncio.timeout_at(self._until):
                    piece = await anext(self._pieces)
            except TimeoutError:  # the deadline: what is not done counts as given up
                self.close()
                raise StopAsyncIteration from None
            except (StopAsyncIteration, httpx.HTTPError) as error:
                if self._closing is not None:  # given up on this side
                    raise StopAsyncIteration from None
                self.close()
                if isinstance(error, httpx.HTTPError):
                    raise self._away(error) from None
                raise BackendAway(502, "The backend ended its answer in the middle; ask again.") from None
            self._take(piece)
        return self._ready.popleft()

    def _take(self, piece: Piece) -> None:
        """Adds tokens to their completion; the backend's own end counts where ours has not come before it."""
        self.cached_tokens = piece.cached_tokens or self.cached_tokens
        completion = self.completions[piece.index]
        for number, token in enumerate(piece.tokens, 1):
            if completion.done:
                return
            token_id, logprob, tops = token  # vLLM adds the sampled one to the likeliest
            if not 0 <= token_id < self.backend.vocab_size:
                raise ApiError(
                    502, f"The backend gives a token {token_id}, which the model has not; is its model the same?"
                )
            sampled = SampledToken(token_id, logprob, tops[: completion.params.logprobs or 0])
            delta = completion.append(sampled, piece.version)
            if number == len(piece.tokens) and piece.finish_reason and not completion.done:
                delta = completion.deltas[-1] = replace(delta, finish_reason=piece.finish_reason)
            self._ready.append(delta)
        self.backend.version = max(self.backend.version, piece.version)
        if piece.finish_reason and not completion.done:
            raise ApiError(502, "The backend ended its answer without saying with which token; it must return ids.")

    def _away(self, error: httpx.HTTPError) -> BackendAway:
        what = "did not answer in time" if isinstance(error, httpx.TimeoutException) else "is away"
        return BackendAway(502, f"The backend at {self.backend.url} {what} ({type(error).__name__}); look at its log.")


def _check_goes_on(params: SamplingParams) -> None:
    """Refuses what a backend, to which earlier tokens are prompt, would compute otherwise."""
    changed = {"n": params.n != 1, "structured_outputs": params.structured_outputs is not None,
               "repetition_penalty": params.repetition_penalty != 1.0,
               "presence_penalty": params.presence_penalty != 0.0,
               "frequency_penalty": params.frequency_penalty != 0.0}  # fmt: skip
    for name, wrong in changed.items():
        if wrong:
            raise InputError(f"A request with {name} cannot go on at another server; begin it anew, or leave it out.")


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, or the one object of a plain reply."""
    if "text/event-stream" not in response.headers.get("content-type", ""):
        yield _parsed(await response.aread())
        return
    async for line in response.aiter_lines():
        if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
            event = _parsed(data)
            if "error" in event:
                raise ApiError(502, f"The backend failed: {_message(event)}")
            yield event


def _parsed(data: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ApiError(502, "The backend sent something that is no JSON object; is its address right?")
    return found


def _refusal(response: httpx.Response) -> ApiError:
    """What the backend refuses in its own words; 400 and 429 stay what they are, all else is a bad gateway."""
    try:
        message = _message(response.json())
    except ValueError:
        message = response.text
    status = response.status_code if response.status_code in (400, 413, 422, 429) else 502
    return ApiError(status, f"The backend answered {response.status_code}: {message[:LONGEST_ANSWER]}")


def _message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)
