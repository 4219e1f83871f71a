"""`TokenSampler`: everything that stands between the logits of one completion and its next token.

In this order, which is vLLM's (x: logits in fp32, c: how often a token is in the output):

    structure            x = -inf for every token that the grammar does not allow now
    bad_sequences        x = -inf for the last token of a sequence behind the others of it
    min_tokens           x = -inf for stop tokens while the output is shorter
    logit_bias           x += bias
    repetition_penalty   x = x / r if x > 0 else x * r, for tokens in the prompt or the output
    frequency_penalty    x -= f * c
    presence_penalty     x -= p, for c > 0
    then `sampler.sample_token`: temperature, min_p, top_k, top_p and one draw

The log-probabilities that are reported are the model's own, of the logits before all of this (`tempered_logprobs`: at
the temperature). bf16 logits should be
cast to fp32 by the caller; on fp32 logits without any of these settings nothing is copied.

The state is a function of the prompt and of the tokens accepted so far: `rollback` undoes the last ones, and a sequence
that is preempted and computed again keeps its sampler.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glm5.engine.grammar_state import GrammarState
from glm5.engine.lazy_grammar import LazyGrammar
from glm5.engine.sampler import SampledToken, sample_token, token_logprobs, uniforms
from glm5.engine.sampling_params import SamplingParams
from glm5.engine.spellings import GuardedGrammar

BLOCK = 64
"""Positions whose random numbers are drawn together: starting the generator costs more than drawing."""


class TokenSampler:
    """The sampler of completion number `index` of one request: `sample`, then `accept` what the sequence takes."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        seed: int,
        index: int = 0,
        stop_ids: Set[int] = frozenset(),
        grammar: GrammarState | GuardedGrammar | LazyGrammar | None = None,
    ) -> None:
        """`stop_ids`: what `min_tokens` holds back. `grammar`: the completion's own state of its structure."""
        self.params = params
        self.prompt_ids = prompt_ids
        self.seed, self.index = seed, index
        self.grammar = grammar
        self.output_ids: list[int] = []
        self._stop_ids = sorted(stop_ids)
        self._bad = [(one[:-1], one[-1]) for one in params.bad_sequences]
        self._biased_ids = list(params.logit_bias or {})
        self._biases = torch.tensor(list((params.logit_bias or {}).values()), dtype=torch.float32)
        self._repetition = params.repetition_penalty != 1.0
        self._counting = self._repetition or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
        self._counts_V: npt.NDArray[np.float32] | None = None
        self._in_prompt_V: npt.NDArray[np.bool_] | None = None
        self._random: tuple[int, list[float]] = (-1, [])

    @property
    def complete(self) -> bool:
        """Whether the structure is complete and can only end here; the sequence then has finished ("stop")."""
        return self.grammar is not None and self.grammar.complete

    def sample(self, logits_V: Tensor, position: int) -> SampledToken:
        """The token of `position` (an index into prompt and output) from its logits [V], on the CPU. Changes nothing.

        Raises InputError where the structure needs more work than its limits allow.
        """
        token_id = self.choose(logits_V, position)
        temperature = self.params.temperature if self.params.tempered_logprobs else 1.0
        return SampledToken(token_id, *token_logprobs(logits_V, token_id, self.params.logprobs, temperature))

    def choose(self, logits_V: Tensor, position: int) -> int:
        """`sample` without the log-probabilities: also what a draft model would say there with the same number."""
        random = 0.0 if self.params.temperature == 0.0 else self.uniform(position)
        return sample_token(self.adjusted(logits_V), self.params, random)

    def accept(self, token_id: int) -> None:
        """Takes a token into the output. Raises InputError for one that the structure does not allow."""
        if self.grammar is not None:
            self.grammar.accept(token_id)
        self.output_ids.append(token_id)
        if self._counts_V is not None:
            self._counts_V[token_id] += 1

    def rollback(self, count: int) -> None:
        """Undoes the last `count` accepted tokens."""
        if not 0 <= count <= len(self.output_ids):
            raise ValueError(f"{len(self.output_ids)} tokens were accepted, {count} cannot be undone")
        if self.grammar is not None:
            self.grammar.rollback(count)
        for _ in range(count):
            token_id = self.output_ids.pop()
            if self._counts_V is not None:
                self._counts_V[token_id] -= 1

    def uniform(self, position: int) -> float:
        """The random number in [0, 1) of a position."""
        start = position - position % BLOCK
        if start != self._random[0]:
            self._random = start, uniforms(self.seed, self.index, start, BLOCK)
        return self._random[1][position - start]

    def adjusted(self, logits_V: Tensor) -> Tensor:
        """The logits that are sampled, with all of the above but temperature and cuts. Float32; may be the input."""
        params, early = self.params, len(self.output_ids) < self.params.min_tokens and bool(self._stop_ids)
        bad_ids = self._bad_ids() if self._bad else []
        permitted_V = None if self.grammar is None else self.grammar.allowed()
        if permitted_V is None and not (early or bad_ids or self._biased_ids or self._counting):
            return logits_V
        x_V = logits_V.detach().float().clone()
        if bad_ids:
            x_V[bad_ids] = -torch.inf
        if early:
            x_V[self._stop_ids] = -torch.inf
        if self._biased_ids:
            x_V[self._biased_ids] += self._biases
        if self._counting:
            counts_V, in_prompt_V = self._seen(len(x_V))
            if self._repetition:
                factor = torch.tensor(params.repetition_penalty, dtype=torch.float32)
                penalised_V = torch.where(x_V > 0, x_V / factor, x_V * factor)
                x_V = torch.where(torch.from_numpy(in_prompt_V | (counts_V > 0)), penalised_V, x_V)
            if params.frequency_penalty:
                x_V -= params.frequency_penalty * torch.from_numpy(counts_V)
            if params.presence_penalty:
                x_V -= params.presence_penalty * torch.from_numpy((counts_V > 0).astype(np.float32))
        if permitted_V is None:
            return x_V
        allowed_V = torch.from_numpy(permitted_V)
        masked_V = x_V.where(allowed_V, -torch.inf)
        # Neither must forbid the only tokens that the structure still has.
        if (early or bad_ids) and masked_V.max() == -torch.inf:
            return logits_V.float().where(allowed_V, -torch.inf)
        return masked_V

    def _bad_ids(self) -> list[int]:
        """The tokens that would complete a bad sequence now."""
        said = self.output_ids
        return [last for head, last in self._bad if not head or tuple(said[-len(head) :]) == head]

    def _seen(self, vocab_size: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """How often each token is in the output, and whether it is in the prompt."""
        if self._counts_V is None or self._in_prompt_V is None:
            self._counts_V = np.bincount(np.array(self.output_ids, dtype=np.int64), minlength=vocab_size).astype(
                np.float32
            )
            self._in_prompt_V = np.zeros(vocab_size, dtype=np.bool_)
            self._in_prompt_V[np.array(self.prompt_ids, dtype=np.int64)] = True
        return self._counts_V, self._in_prompt_V
