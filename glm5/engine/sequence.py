"""One completion while it is generated: what it has sampled, and when it ends."""

from __future__ import annotations

import secrets
from dataclasses import replace

from glm5.engine.outputs import CompletionOutput, FinishReason, TokenDelta, TopLogprobs
from glm5.engine.sampling_params import SamplingParams
from glm5.engine.stop_strings import StopStrings
from glm5.text import Detokenizer


class Sequence:
    """Completion number `index` of one request. `append` takes its tokens one by one; `done` says that it ended."""

    def __init__(
        self,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        *,
        index: int,
        seed: int,
        max_tokens: int,
        eos_ids: frozenset[int],
        detokenizer: Detokenizer | None,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.params = params
        self.index = index
        self.seed = seed
        self.max_tokens = max_tokens
        self.model_eos_ids = frozenset() if params.ignore_eos else eos_ids
        self.stop_ids = frozenset(params.stop_token_ids) | self.model_eos_ids
        self.detokenizer = detokenizer
        self.stop_strings = StopStrings(tuple(params.stop), include=params.include_stop_str_in_output)
        self.deltas: list[TokenDelta] = []

    @property
    def position(self) -> int:
        """Position of the token that is sampled next; the random number depends on it."""
        return len(self.prompt_ids) + len(self.deltas)

    @property
    def done(self) -> bool:
        """True once the last token carries a finish reason."""
        return bool(self.deltas) and self.deltas[-1].finish_reason is not None

    @property
    def may_stop(self) -> bool:
        """False while fewer than `min_tokens` were sampled: stop tokens must not be sampled yet."""
        return len(self.deltas) >= self.params.min_tokens

    def append(self, token_id: int, logprob: float, top_logprobs: TopLogprobs, version: int) -> TokenDelta:
        """Takes the next sampled token and says what it adds to the text and whether it ends the completion."""
        delta = TokenDelta(self.index, token_id, logprob, top_logprobs, version, text="")
        if token_id in self.stop_ids:
            named = token_id if token_id in self.params.stop_token_ids else None
            delta = self._finish(delta, "stop", named)
        else:
            piece = self.detokenizer.feed(token_id) if self.detokenizer else ""
            text, stop = self.stop_strings.feed(piece)
            delta = replace(delta, text=text)
            if stop is not None:
                delta = replace(delta, finish_reason="stop", stop_reason=stop)
            elif len(self.deltas) + 1 == self.max_tokens:
                delta = self._finish(delta, "length", None)
        self.deltas.append(delta)
        return delta

    def _finish(self, delta: TokenDelta, reason: FinishReason, stop: int | str | None) -> TokenDelta:
        """The last token: lets out the text held back, which may still complete a stop string."""
        text, met = self.stop_strings.feed(self.detokenizer.finish() if self.detokenizer else "")
        if met is not None:
            return replace(delta, text=delta.text + text, finish_reason="stop", stop_reason=met)
        text += self.stop_strings.finish()
        return replace(delta, text=delta.text + text, finish_reason=reason, stop_reason=stop)

    def output(self) -> CompletionOutput:
        """The finished completion (or what there is of it: then `finish_reason` is "abort")."""
        last = self.deltas[-1] if self.deltas else None
        return CompletionOutput(
            index=self.index,
            token_ids=tuple(d.token_id for d in self.deltas),
            text="".join(d.text for d in self.deltas),
            logprobs=tuple(d.logprob for d in self.deltas),
            top_logprobs=tuple(d.top_logprobs for d in self.deltas),
            versions=tuple(d.version for d in self.deltas),
            finish_reason=(last and last.finish_reason) or "abort",
            stop_reason=last.stop_reason if last else None,
            seed=self.seed,
        )


def fresh_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbits(63)
