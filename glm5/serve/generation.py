"""The core that every protocol shares: prompt ids and settings in, the steps of the samples out.

A `Generation` is one running request. Each of its samples has its own parser (`glm5.text.AssistantStream`), which
splits the text into reasoning, content and tool calls while it comes; raw endpoints have none. A plain reply is made
after the last step and a streamed one step by step, from the same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from glm5.engine.outputs import PromptLogprob
from glm5.text import AssistantStream

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
    def prompt_logprobs(self, prompt: int = 0) -> Sequence[PromptLogprob] | None:
        """One entry per token of a prompt (None for the first), once a token is there; None if not asked for."""
        return self._streams[prompt].prompt_logprobs
