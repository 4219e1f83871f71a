"""Speculative decoding with the model's own MTP module, which changes no token.

**Drafts** (DeepSeek-V3 report, section 2.2; used as in EAGLE, Li et al. 2024). The MTP module maps the trunk's state of
token i and token i + 1 to a guess of token i + 2. From the newest state and token it gives draft 1; from its own state
and draft 1, draft 2; and so on, k of them. The trunk then computes the newest token and the k drafts in one pass
(`Chunk.logits_to_keep = k + 1`).

**Acceptance.** The token of a position is what the target samples there from its own logits with the random number of
(seed, sample, position); a draft is right when it is that token, and the first wrong one ends the step. So the output
is the output without speculation, token for token, greedy or sampled, as far as the logits of a row do not depend on
the rows beside it: to the bit in strict mode. The distribution is unchanged because the sampler is.

The draft of a position is sampled with the *same* random number (from the module's logits, under the request's own
settings, penalties and grammar), so where the two distributions agree the two tokens do: it is right with the overlap
of the two cumulative distributions. The classical rule (Leviathan et al. 2023) accepts more at high temperature, the
overlap of the distributions themselves (measured: docs/sampling.md), but then a token depends on which drafts there
were, and so on load, preemption and k; a request could not be repeated.

**Rows.** Row i of the module comes from state i and token i + 1, and lies in the slot of token i. Rows of drafts are
made from guessed states; they are overwritten when the true ones are known, and nothing reads beyond them. A block
taken from the prefix cache may end in a row that was made with another next token, or hold none if it was made without
drafting: that costs acceptance, never a token. All steps use the first MTP module (the published models have one).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from glm5.engine.pace import Pace
from glm5.engine.runner import Chunk, DraftChunk, Output
from glm5.engine.scheduler import Work
from glm5.engine.sequence import Sequence
from glm5.errors import InputError

MOST_DRAFTS = 16
HELD_STATES = 64
"""States of a sequence that wait for the module, at most, while drafting does not pay."""


class DraftRunner(Protocol):
    """What runs the trunk and the module: `glm5.engine.runner.Runner`."""

    def run(self, chunks: list[Chunk], collect: frozenset[str]) -> list[Output]:
        """Logits of each chunk and what is collected of its tokens: the trunk's states ("hidden") among it."""

    def draft(self, chunks: list[DraftChunk]) -> list[Output]:
        """One step of the MTP module for each chunk."""


@dataclass
class Followed:
    """How far the module has followed a sequence."""

    rows: int
    """Leading tokens whose rows of the module are in the cache."""
    states: list[Tensor] = field(default_factory=list)
    """The trunk's states of the tokens after them."""

    @property
    def end(self) -> int:
        """The first token without a state."""
        return self.rows + sum(len(states_TD) for states_TD in self.states)


class Speculator:
    """Runs the steps of an engine, keeps the module's rows of every sequence and fills `Sequence.drafts`."""

    def __init__(
        self, runner: DraftRunner, *, drafts: int, block_size: int, max_model_len: int, pace: Pace | None = None
    ) -> None:
        """drafts: k, tokens to guess for each step. max_model_len: no row is made at this position or beyond."""
        self.runner, self.drafts = runner, drafts
        self.block_size, self.max_model_len = block_size, max_model_len
        self.pace = pace or Pace()
        self._followed: weakref.WeakKeyDictionary[Sequence, Followed] = weakref.WeakKeyDictionary()
        self._states: list[Tensor | None] = []
        self._started = 0.0
        self._wanted = False

    def run(self, chunks: list[Chunk], collect: frozenset[str] = frozenset()) -> list[Output]:
        """The trunk's pass, as `Runner.run`."""
        self._started, self._states = time.perf_counter(), []
        outputs = self.runner.run(chunks, collect | {"hidden"})
        self._states = [output.states_TD for output in outputs]
        return outputs

    def after(self, works: list[Work]) -> None:
        """Ends the step that `run` began, when its tokens are taken: drafts for the next, and measures."""
        for work, states_TD in zip(works, self._states, strict=True):
            if states_TD is not None and work.sequence.computed > work.start:
                self.follow(work.sequence, work.start, states_TD)
        sequences = [work.sequence for work in works]
        before, going = self._wanted, sum(not s.done and s.pending == 1 for s in sequences)
        self._wanted = self.pace.wanted(going) if going else before
        self.draft(sequences, wanted=self._wanted)
        uniform = all(len(w.token_ids) - w.drafts == 1 and (w.drafts > 0) is before for w in works)
        if uniform and before is self._wanted:
            tokens = sum(max(w.sequence.computed - w.start, 0) for w in works)
            self.pace.took(before, len(works), time.perf_counter() - self._started, tokens)

    def follow(self, sequence: Sequence, start: int, states_TD: Tensor) -> None:
        """Takes the trunk's states of the tokens from `start` on, of which `sequence.computed` says how many count."""
        known = self._followed.get(sequence)
        if known is None or known.end != start:  # new here, or preempted and computed again
            known = self._followed[sequence] = Followed(start)
        known.states.append(states_TD[: sequence.computed - start].clone())

    def draft(self, sequences: Iterable[Sequence], *, wanted: bool) -> None:
        """Brings the module's rows up to date and, if wanted, drafts for the sequences that decode next."""
        chunks: list[DraftChunk] = []
        drafting: list[Sequence | None] = []
        for sequence in sequences:
            known = self._followed.get(sequence)
            if sequence.done or known is None or known.end != sequence.computed or not known.states:
                continue
            if len(sequence.table) * self.block_size < known.end:  # its request has ended
                continue
            ready = wanted and sequence.pending == 1 and self._most(sequence) > 0
            if not ready and known.end - known.rows < HELD_STATES:
                continue
            next_ids = sequence.token_ids[known.rows + 1 : known.end + 1]
            chunks.append(DraftChunk(torch.cat(known.states), next_ids, known.rows, sequence.table))
            drafting.append(sequence if ready else None)
            known.rows, known.states = known.end, []
        if not chunks:
            return
        outputs = self.runner.draft(chunks)
        active = [(s, output) for s, output in zip(drafting, outputs, strict=True) if s is not None]
        try:
            while active:
                active = self._one_more(active)
        finally:
            for drafted in drafting:
                if drafted is not None:
                    drafted.sampler.rollback(len(drafted.drafts))

    def _one_more(self, active: list[tuple[Sequence, Output]]) -> list[tuple[Sequence, Output]]:
        """Adds a draft to each sequence from the module's output; those that go on, with their next output."""
        going: list[Sequence] = []
        chunks: list[DraftChunk] = []
        for sequence, output in active:
            place = sequence.position + len(sequence.drafts)
            try:
                token_id = sequence.sampler.choose(output.logits_KV[-1], place)
                sequence.sampler.accept(token_id)
            except InputError:  # the structure's limits: the target will say so if it gets there
                continue
            sequence.drafts.append(token_id)
            ends = token_id in sequence.stop_ids or sequence.sampler.complete
            if not ends and len(sequence.drafts) < self._most(sequence) and output.states_TD is not None:
                going.append(sequence)
                # The row of the token before the draft: the newest is at `computed`, whose own state is not known yet.
                start = sequence.computed + len(sequence.drafts) - 1
                chunks.append(DraftChunk(output.states_TD[-1:], [token_id], start, sequence.table))
        return list(zip(going, self.runner.draft(chunks), strict=True)) if going else []

    def _most(self, sequence: Sequence) -> int:
        """Drafts that a sequence can use: its row needs a place, and the last token of all is never drafted."""
        rows = min(len(sequence.table) * self.block_size, self.max_model_len) - sequence.computed
        return min(self.drafts, rows + 1, sequence.max_tokens - len(sequence.deltas) - 1)
