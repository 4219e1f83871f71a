"""What the engine gives back: one record per sampled token while it runs, one per request at the end.

Token ids, log-probabilities and weight versions stay together from here to the loss; nothing is tokenised again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glm5.engine.choices import ExpertChoices

FinishReason = Literal["stop", "length", "abort"]
TopLogprobs = tuple[tuple[int, float], ...]
"""(token id, log-probability), the likeliest first."""
PromptLogprob = tuple[int, float, TopLogprobs] | None
"""A prompt token, its log-probability after the tokens before it, and the likeliest; None for the first token."""


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """One sampled token of a running request."""

    index: int
    """Which of the request's `n` completions it belongs to."""
    token_id: int
    logprob: float
    top_logprobs: TopLogprobs
    version: int
    """The weight version that sampled it."""
    text: str
    """Text that became certain with this token: empty inside a multi-byte character or a possible stop string."""
    finish_reason: FinishReason | None = None
    """Set on the last token only."""
    stop_reason: int | str | None = None
    """The token id or string that stopped the sequence; None when the model's own end-of-turn id did."""
    experts: ExpertChoices | None = None
    """Of the tokens before this one, those that no earlier token of the completion told of; None unless asked for."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One finished completion. The tuples have one entry per sampled token; the stop token is included."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    """Without stop string and control tokens, with the tags of reasoning and calls; empty without a tokenizer."""
    logprobs: tuple[float, ...]
    """Of each sampled token under the model itself (temperature 1, nothing cut off)."""
    top_logprobs: tuple[TopLogprobs, ...]
    versions: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None
    seed: int
    """The seed that was used; the same request with it gives the same tokens."""
    experts: ExpertChoices | None = None
    """Of the prompt and of every sampled token but the last, when they were asked for."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request: `outputs` holds its `n` completions; the fields of the first are also read directly."""

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    cached_tokens: int = 0
    """Prompt tokens that were taken from the prefix cache."""
    prompt_logprobs: tuple[PromptLogprob, ...] | None = None
    """One entry per prompt token, when they were asked for."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Sampled ids of the first completion."""
        return self.outputs[0].token_ids

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.outputs[0].text

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Log-probability of each sampled token of the first completion."""
        return self.outputs[0].logprobs

    @property
    def versions(self) -> tuple[int, ...]:
        """Weight version of each sampled token of the first completion."""
        return self.outputs[0].versions

    @property
    def experts(self) -> ExpertChoices | None:
        """Of the prompt and of the first completion's tokens but the last, when they were asked for."""
        return self.outputs[0].experts

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first completion ended."""
        return self.outputs[0].finish_reason


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine does now, and what it has done since it was made."""

    running: int
    """Sequences that hold blocks."""
    waiting: int
    """Sequences that wait for their turn, preempted ones included."""
    blocks_used: int
    blocks_total: int
    steps: int
    prompt_tokens: int
    """Of the requests that began, each prompt counted once."""
    cached_prompt_tokens: int
    """Of these, taken from the prefix cache."""
    cached_tokens: int
    """Tokens taken from the prefix cache instead of being computed, after preemptions too."""
    computed_tokens: int
    """Tokens that went through the model, drafts included."""
    sampled_tokens: int
    preemptions: int
    """Sequences that gave their blocks back, to be computed again later."""
    drafted_tokens: int
    accepted_tokens: int
    """Of the drafted ones."""
    version: int
    """Of the weights."""
