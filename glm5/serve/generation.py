"""The core that every protocol shares: prompt ids and settings in, the steps of the samples out.

A `Generation` is one running request. Each of its samples has its own parser (`glm5.text.AssistantStream`), which
splits the text into reasoning, content and tool calls while it comes; raw endpoints have none. A plain reply is made
after the last step and a streamed one step by step, from the same samples.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from glm5.engine import SamplingParams, TokenDelta
from glm5.engine.outputs import PromptLogprob
from glm5.serve.errors import TOO_LATE, ApiError
from glm5.text import AssistantStream, Tokenizer

Parser = Callable[[str], AssistantStream]
"""Makes the parser of one sample from the seed of its tool calls' identities."""
Delta = dict[str, Any]
MERGED_AHEAD = 64
"""Tokens of several prompts that wait for a slow reader; the engine's own buffers wait behind them."""


class TokenSource(Protocol):
    """The tokens of one prompt, as `glm5.engine.TokenStream` gives them."""

    @property
    def cached_tokens(self) -> int: ...

    @property
    def prompt_logprobs(self) -> Sequence[PromptLogprob] | None: ...

    def close(self) -> None: ...

    def __aiter__(self) -> AsyncIterator[TokenDelta]: ...


class Source(Protocol):
    """What samples: an `Engine`, or another server behind this one."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def version(self) -> int: ...

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        session_id: str | None,
        priority: int,
        deadline: float | None,
    ) -> TokenSource: ...


@dataclass
class Sample:
    """One completion of one prompt, as far as it is."""

    index: int
    """Among all samples of the request: prompt * n + sample."""
    prompt_ids: list[int]
    parser: AssistantStream | None
    tokens: list[TokenDelta] = field(default_factory=list)
    reasoning_tokens: int = 0
    """Tokens up to the end of the reasoning, which they include."""
    first_token_at: float = 0.0
    """Of `time.perf_counter`, as is the next; of no meaning without tokens."""
    last_token_at: float = 0.0

    @property
    def text(self) -> str:
        """All that was written, without control tokens."""
        return "".join(token.text for token in self.tokens)

    @property
    def finish_reason(self) -> str:
        """The engine's word for the end: stop, length, or abort for a sample that the engine gave up."""
        return (self.tokens and self.tokens[-1].finish_reason) or "abort"

    def take(self, token: TokenDelta) -> list[Delta]:
        """Adds a token; what it gives the parser to say."""
        self.last_token_at = time.perf_counter()
        if not self.tokens:
            self.first_token_at = self.last_token_at
        self.tokens.append(token)
        if self.parser is None:
            return []
        self.reasoning_tokens += self.parser.reasoning
        deltas = self.parser.feed(token.text)
        return deltas + self.parser.close() if token.finish_reason else deltas


@dataclass(frozen=True, slots=True)
class Step:
    """One token of one sample and what the parser made of it; no token when the engine gave the sample up."""

    sample: Sample
    token: TokenDelta | None
    deltas: list[Delta]

    @property
    def last(self) -> bool:
        """Whether the sample ends with this step."""
        return self.token is None or self.token.finish_reason is not None


class Generation:
    """One request: some prompts with `n` samples each. `start`, then `steps` to the end.

    Raises `GLM5Error` from `start` for what the engine refuses; leaving `steps` early stops the work.
    """

    def __init__(
        self,
        source: Source,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        parser: Parser | None = None,
        session_id: str | None = None,
        salt: str | None = None,
        priority: int = 0,
        messages: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """messages: the conversation that the one prompt was made of, for whoever records it. salt: only requests of
        the same salt share cached prefixes."""
        self.source = source
        self.prompts = [list(prompt) for prompt in prompts]
        self.params = params
        self.session_id, self.priority, self.messages = session_id, priority, messages
        self._cache_id = session_id if salt is None else _salted(session_id, salt)
        self.started = False
        self.ended = False
        """Whether the recorder was told."""
        self.id = secrets.token_hex(12)
        self.created, self.began = int(time.time()), time.perf_counter()
        self.samples = [
            Sample(index, prompt, parser(f"{self.id}/{index}") if parser else None)
            for index, prompt in enumerate(prompt for prompt in self.prompts for _ in range(params.n))
        ]
        self._streams: list[TokenSource] = []
        self._version = source.version

    def start(self, until: float | None = None) -> None:
        """Asks the source for the tokens of every prompt; it refuses at once what cannot run. May take a moment.

        `until`: when samples that still run are given up, by `time.monotonic`. Raises `ApiError` if it has passed.
        """
        try:
            for prompt in self.prompts:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise ApiError(504, TOO_LATE)
                stream = self.source.stream(
                    prompt, self.params, session_id=self._cache_id, priority=self.priority, deadline=left
                )
                self._streams.append(stream)
            self.started = True
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stops the work on every prompt."""
        for stream in self._streams:
            stream.close()

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Every token of every sample as it comes, those of several prompts side by side."""
        try:
            async with aclosing(self._merged()) as tokens:
                async for prompt, token in tokens:
                    sample = self.samples[prompt * self.params.n + token.index]
                    yield Step(sample, token, sample.take(token))
            for sample in self.samples:
                if sample.finish_reason == "abort":
                    yield Step(sample, None, sample.parser.close() if sample.parser else [])
        finally:
            self.close()

    async def _merged(self) -> AsyncGenerator[tuple[int, TokenDelta], None]:
        if len(self._streams) == 1:
            async for token in self._streams[0]:
                yield 0, token
            return
        # Plain tasks and no task group: this generator may be closed by another task than the one that began it.
        ready: asyncio.Queue[tuple[int, TokenDelta] | BaseException | None] = asyncio.Queue(MERGED_AHEAD)

        async def forward(prompt: int) -> None:
            try:
                async for token in self._streams[prompt]:
                    await ready.put((prompt, token))
            except Exception as error:
                await ready.put(error)
            await ready.put(None)

        tasks = [asyncio.create_task(forward(prompt)) for prompt in range(len(self._streams))]
        try:
            running = len(tasks)
            while running:
                item = await ready.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    # ---- figures of the whole request ---------------------------------------------------------------------------
    @property
    def version(self) -> int:
        """The newest weights that had a part in the answer."""
        return max((sample.tokens[-1].version for sample in self.samples if sample.tokens), default=self._version)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self.prompts))

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache."""
        return sum(stream.cached_tokens for stream in self._streams)

    @property
    def completion_tokens(self) -> int:
        """Sampled tokens of all samples, the stop tokens included."""
        return sum(len(sample.tokens) for sample in self.samples)

    @property
    def reasoning_tokens(self) -> int:
        """Of these, the reasoning."""
        return sum(sample.reasoning_tokens for sample in self.samples)

    def prompt_logprobs(self, prompt: int = 0) -> Sequence[PromptLogprob] | None:
        """One entry per token of a prompt (None for the first), once a token is there; None if not asked for."""
        return self._streams[prompt].prompt_logprobs


def _salted(session_id: str | None, salt: str) -> str:
    """The session under which a source caches the prefixes of a salt: hashed, since `//` has a meaning there."""
    hashed = f"salt-{hashlib.sha256(salt.encode()).hexdigest()[:32]}"
    return hashed if session_id is None else f"{hashed}/{session_id}"
