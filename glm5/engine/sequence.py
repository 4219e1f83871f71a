"""One completion while it is generated: what it has sampled, what of it lies in the cache, and when it ends."""

from __future__ import annotations

import secrets

from torch import Tensor

from glm5.engine.block_manager import Digest
from glm5.engine.choices import SequenceChoices, joined
from glm5.engine.grammar_state import GrammarState
from glm5.engine.lazy_grammar import LazyGrammar
from glm5.engine.outputs import CompletionOutput, FinishReason, TokenDelta
from glm5.engine.sampler import SampledToken
from glm5.engine.sampling_params import SamplingParams
from glm5.engine.spellings import GuardedGrammar
from glm5.engine.stop_strings import StopStrings
from glm5.engine.token_sampler import TokenSampler
from glm5.text import Detokenizer


class Sequence:
    """Completion number `index` of one request. `append` takes its tokens one by one; `done` says that it ended.

    The second group of fields is the scheduler's: how much of the sequence lies in which blocks of the cache.
    """

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
        grammar: GrammarState | GuardedGrammar | LazyGrammar | None = None,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.params = params
        self.index = index
        self.seed = seed
        self.max_tokens = max_tokens
        self.model_eos_ids = frozenset() if params.ignore_eos else eos_ids
        self.stop_ids = frozenset(params.stop_token_ids) | self.model_eos_ids
        self.detokenizer = detokenizer
        self.sampler = TokenSampler(params, prompt_ids, seed=seed, index=index, stop_ids=self.stop_ids, grammar=grammar)
        self.stop_strings = StopStrings(
            tuple(params.stop), include=params.include_stop_str_in_output, begin=tuple(params.stop_from)
        )
        self.choices = None if params.experts_from is None else SequenceChoices(params.experts_from)
        """The experts that its tokens were sent to; None where nobody asked."""
        self.deltas: list[TokenDelta] = []
        self.token_ids = list(prompt_ids)
        """Prompt and sampled tokens."""

        self.computed = 0
        """Leading tokens whose rows lie in the cache."""
        self.table: list[int] = []
        """The blocks that hold them."""
        self.drafts: list[int] = []
        """Guesses of the next tokens, to be verified together with the last one in the next step."""
        self.digests: list[Digest] = []
        """Of its leading full blocks, as far as they were needed, under the present weights."""
        self.published = 0
        """Leading blocks that were published or taken from the prefix cache."""
        self.mixed = False
        """Whether rows of older weights lie in its blocks; such blocks are not published."""

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet: 1 while it decodes, more while its prompt is computed."""
        return len(self.token_ids) - self.computed

    @property
    def most_rows(self) -> int:
        """Rows that it ever needs in the cache: its last token is sampled and never put there."""
        return len(self.prompt_ids) + self.max_tokens - 1

    @property
    def position(self) -> int:
        """Position of the token that is sampled next; the random number depends on it."""
        return len(self.token_ids)

    @property
    def done(self) -> bool:
        """True once the last token carries a finish reason."""
        return bool(self.deltas) and self.deltas[-1].finish_reason is not None

    def sample(self, logits_V: Tensor) -> SampledToken:
        """The next token, from the logits of the last one [V]."""
        return self.sampler.sample(logits_V, self.position)

    def append(self, token: SampledToken, version: int) -> TokenDelta:
        """Takes the next sampled token and says what it adds to the text and whether it ends the completion."""
        token_id = token.token_id
        self.sampler.accept(token_id)
        experts = None if self.choices is None else self.choices.take(len(self.token_ids))
        self.token_ids.append(token_id)
        text, reason, stopped_by = self._ending(token_id)
        delta = TokenDelta(self.index, *token, version, text, reason, stopped_by, experts)
        self.deltas.append(delta)
        return delta

    def _ending(self, token_id: int) -> tuple[str, FinishReason | None, int | str | None]:
        """What the newest token adds to the text, and whether and why it is the last (its finish and stop reason)."""
        if token_id in self.stop_ids:
            return self._finish("", "stop", token_id if token_id in self.params.stop_token_ids else None)
        text, stop = self.detokenizer.feed(token_id) if self.detokenizer else "", None
        if len(self.deltas) >= self.params.min_tokens:
            text, stop = self.stop_strings.feed(text)
        else:
            text = self.stop_strings.skip(text)
        if stop is not None:
            return text, "stop", stop
        if self.sampler.complete:
            return self._finish(text, "stop", None)
        if len(self.deltas) + 1 == self.max_tokens:
            return self._finish(text, "length", None)
        return text, None, None

    def _finish(
        self, text: str, reason: FinishReason, stopped_by: int | None
    ) -> tuple[str, FinishReason, int | str | None]:
        """The last token: lets out the text held back, which may still complete a stop string."""
        rest, met = self.stop_strings.feed(self.detokenizer.finish() if self.detokenizer else "")
        if met is not None:
            return text + rest, "stop", met
        return text + rest + self.stop_strings.finish(), reason, stopped_by

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
            experts=joined(d.experts for d in self.deltas),
        )


def fresh_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbits(63)
