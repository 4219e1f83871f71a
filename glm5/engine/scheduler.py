"""What runs in the next step: continuous batching under a token budget, over the blocks of one cache.

Every step has a budget of tokens. First every decoding sequence gets its token (and the drafts it verifies), then
prompts that are partly computed go on, then waiting sequences start, each group in order of rank. Long prompts are so
cut into chunks that fill what the decoding sequences leave.

**Rank, and why nobody starves.** A request's rank is its time of arrival plus `PRIORITY_SECONDS` for each level of its
priority (as in vLLM a lower number is served earlier). It never changes, so a request waits only for requests that
arrived before it or at most so many seconds after it. Nobody overtakes: the first waiting sequence that does not fit
ends the step's admissions.

**A prompt is computed once.** A waiting sequence whose next block a running one is about to compute waits for it, and
others may begin meanwhile. It takes the block from the prefix cache, a step or a few later, and need not compute it.

**Preemption by recompute.** A sequence that needs a block when none is free takes those of the lowest-ranked sequence
behind it, which returns to the queue with its place, keeps its tokens, and computes its rows again later, mostly from
the prefix cache. The first in rank can take from everybody and every admitted request fits alone, so there is always
progress. Sequences whose reader is slow are paused: they are not computed, and are the first to give way.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from glm5.engine.block_manager import BlockManager, OutOfBlocks, chain, chain_root
from glm5.engine.request import Request
from glm5.engine.sequence import Sequence

PRIORITY_SECONDS = 10.0
"""Waiting that one level of priority is worth."""
PROMPT_LOGPROB_VALUES = 1 << 24
"""Logits that one chunk keeps when the prompt's log-probabilities are wanted: 64 MiB."""


@dataclass(frozen=True)
class Work:
    """The part of one sequence in a step: `token_ids` at positions `start ..`, logits of the last `keep` of them."""

    request: Request
    sequence: Sequence
    token_ids: list[int]
    start: int
    keep: int
    drafts: int
    """How many of the tokens, at the end, are guesses."""

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + len(self.token_ids)

    @property
    def samples(self) -> bool:
        """Whether the sequence is computed to its end, so that its next token is sampled."""
        return self.end - self.drafts == len(self.sequence.token_ids)


@dataclass
class Step:
    """One step: blocks to copy before anything is written, then the work of each sequence."""

    copies: dict[int, int] = field(default_factory=dict)
    """To -> from. Of a block that was taken twice the last copy counts."""
    works: list[Work] = field(default_factory=list)


class Scheduler:
    """Holds every unfinished sequence, waiting or running. Not thread-safe: the engine's thread alone calls it."""

    def __init__(
        self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int, vocab_size: int, version: int
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs, self.budget, self.version = max_num_seqs, max_num_batched_tokens, version
        self.logprob_rows = max(1, PROMPT_LOGPROB_VALUES // vocab_size)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.request_of: dict[Sequence, Request] = {}
        self.prompt_tokens = self.cached_prompt_tokens = 0
        self.cached_tokens = self.computed_tokens = self.preemptions = 0

    # ---- coming and going ---------------------------------------------------------------------------------------
    def add(self, request: Request, sequence: Sequence) -> None:
        """A new sequence waits for its turn."""
        self.request_of[sequence] = request
        bisect.insort(self.waiting, sequence, key=self._rank)

    def remove(self, sequence: Sequence) -> None:
        """A sequence ended, wherever it is. Does nothing for one that is not here."""
        if self.request_of.pop(sequence, None) is not None:
            (self.running if sequence in self.running else self.waiting).remove(sequence)
            self.blocks.release(sequence.table)

    def clear(self) -> None:
        """Forgets every sequence, every block and the prefix cache."""
        self.waiting, self.running, self.request_of = [], [], {}
        old = self.blocks
        self.blocks = BlockManager(old.num_blocks, old.block_size, prefix_caching=old.prefix_caching)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """A sequence with the parent's prompt starts with the parent's rows, or waits if no seat is left."""
        self.add(self.request_of[parent], child)
        if len(self.running) < self.max_num_seqs:
            child.table, child.computed = self.blocks.fork(parent.table), parent.computed
            child.digests, child.published, child.mixed = list(parent.digests), parent.published, parent.mixed
            self._move(child, self.waiting, self.running)

    def new_weights(self, version: int, *, recompute: bool) -> None:
        """Nobody finds rows of older weights again; with `recompute` running sequences compute theirs anew."""
        self.version = version
        self.blocks.forget()
        for sequence in [*self.running, *self.waiting]:
            sequence.digests, sequence.published, sequence.mixed = [], 0, sequence.computed > 0
        if recompute:
            for sequence in list(self.running):
                self._to_queue(sequence)

    # ---- a step -------------------------------------------------------------------------------------------------
    def schedule(self) -> Step:
        """Chooses the next step's work and takes the blocks for it. Empty when all that is here is paused."""
        step = Step()
        left = self.budget
        for decoding in (True, False):
            for sequence in list(self.running):
                # It may have been preempted by one before it.
                if (sequence.pending == 1) is decoding and sequence in self.running and not self._paused(sequence):
                    left -= self._plan(sequence, left, step)
        coming = {digest for sequence in self.running for digest in self._coming(sequence)}
        for sequence in list(self.waiting):
            if self._paused(sequence) or self._next_block(sequence) in coming:
                continue
            if left < 1 or not self._admit(sequence, step):
                break
            left -= self._plan(sequence, left, step)
            coming.update(self._coming(sequence))
        return step

    def computed(self, work: Work, accepted: int = 0) -> None:
        """The rows of the work are in the cache; of its drafts the first `accepted` were right."""
        sequence = work.sequence
        sequence.computed = work.end - work.drafts + accepted
        self.computed_tokens += len(work.token_ids)
        if self.blocks.prefix_caching and not sequence.mixed:
            full = sequence.computed // self.blocks.block_size
            self._digest(sequence, full)
            for i in range(sequence.published, full):
                self.blocks.publish(sequence.table[i], sequence.digests[i])
            sequence.published = full

    def check(self) -> None:
        """Asserts that no block is lost and that everybody is in exactly one place. For tests."""
        assert not set(self.waiting) & set(self.running)
        assert set(self.request_of) == set(self.waiting) | set(self.running)
        assert len(self.running) <= self.max_num_seqs and not any(s.table for s in self.waiting)
        for group in (self.waiting, self.running):
            assert group == sorted(group, key=self._rank)
        self.blocks.check([s.table for s in self.running])

    # ---- parts --------------------------------------------------------------------------------------------------
    def _plan(self, sequence: Sequence, left: int, step: Step) -> int:
        """Adds what the sequence can do with the tokens left in the budget; returns how many it takes."""
        request, start = self.request_of[sequence], sequence.computed
        size = min(sequence.pending, left)
        entries = request.prompt_of(sequence)
        if entries is not None:
            size = min(size, self.logprob_rows)
            if sequence.done:  # it is here for its prompt alone
                size = min(size, len(sequence.prompt_ids) - start)
        drafts = self._drafts(sequence, left - size) if size == sequence.pending else []
        if size < 1 or not self._make_room(sequence, start + size + len(drafts), step):
            return 0
        end = start + size
        keep = 1 + len(drafts) if end == len(sequence.token_ids) else 0
        if entries is not None:  # the row of a token predicts the next one
            keep = max(keep, end + len(drafts) - max(start, len(entries) - 1))
        ids = sequence.token_ids[start:end] + drafts
        step.works.append(Work(request, sequence, ids, start, keep, len(drafts)))
        return len(ids)

    def _drafts(self, sequence: Sequence, left: int) -> list[int]:
        """The guesses that a step verifies: all that the budget leaves room for, none beyond the sequence's last token.

        So a sequence never needs more blocks than admission has counted for it.
        """
        return sequence.drafts[: max(0, min(left, sequence.most_rows - len(sequence.token_ids)))]

    def _make_room(self, sequence: Sequence, tokens: int, step: Step) -> bool:
        """Blocks for so many tokens, taken from others if need be; False if it must wait with what it has."""
        while True:
            try:
                for old, new in self.blocks.make_writable(sequence.table, sequence.computed):
                    step.copies[new] = old
                self.blocks.extend(sequence.table, tokens)
            except OutOfBlocks:
                victim = self._victim(sequence, step)
                if victim is None:
                    return False
                self._preempt(victim)
            else:
                return True

    def _victim(self, sequence: Sequence | None, step: Step) -> Sequence | None:
        """Who gives way: the last in rank of the paused, else of those behind `sequence`; nobody who is in the step."""
        planned = {work.sequence for work in step.works}
        others = [s for s in self.running if s is not sequence and s not in planned]
        paused = [s for s in others if self._paused(s)]
        if paused or sequence is None:
            return paused[-1] if paused else None
        behind = [s for s in others if self._rank(s) > self._rank(sequence)]
        return behind[-1] if behind else None

    def _admit(self, sequence: Sequence, step: Step) -> bool:
        """Gives a waiting sequence a seat and its cached prefix, if all that it has so far will find room."""
        while True:
            # What running sequences will take soon: the rest of their prompts, and a block for each to go on.
            promised = sum(1 + max(self.blocks.blocks_for(len(s.token_ids)) - len(s.table), 0) for s in self.running)
            if len(self.running) < self.max_num_seqs and promised < self.blocks.free:
                found = self.blocks.match(self._reusable(sequence))
                needed = self.blocks.blocks_for(min(len(sequence.token_ids) + 1, sequence.most_rows))
                if needed - len(found) + promised <= self.blocks.free:
                    break
                self.blocks.release(found)
            victim = self._victim(None, step)
            if victim is None:
                return False
            self._preempt(victim)
        sequence.table, sequence.published = found, len(found)
        sequence.computed, sequence.mixed = len(found) * self.blocks.block_size, False
        self.cached_tokens += sequence.computed
        request = self.request_of[sequence]
        if request.cached_tokens is None:
            request.cached_tokens = min(sequence.computed, len(sequence.prompt_ids))
            self.prompt_tokens += len(sequence.prompt_ids)
            self.cached_prompt_tokens += request.cached_tokens
        self._move(sequence, self.waiting, self.running)
        return True

    def _coming(self, sequence: Sequence) -> list[bytes]:
        """Digests of the blocks that a running sequence will publish before it samples; none of one that is paused."""
        waits = sequence.mixed or self._paused(sequence) or not self.blocks.prefix_caching
        return [] if waits else sequence.digests[sequence.published :]

    def _next_block(self, sequence: Sequence) -> bytes | None:
        """The first block that a waiting sequence could take from the prefix cache and that is not there."""
        return next((digest for digest in self._reusable(sequence) if not self.blocks.found(digest)), None)

    def _reusable(self, sequence: Sequence) -> list[bytes]:
        """Digests of the blocks that it could take: at least its last token is computed, for its logits."""
        last = len(sequence.token_ids) - 1
        entries = self.request_of[sequence].prompt_of(sequence)
        if entries is not None:
            last = len(entries) - 1
        blocks = last // self.blocks.block_size
        if self.blocks.prefix_caching:
            self._digest(sequence, blocks)
        return sequence.digests[:blocks]

    def _digest(self, sequence: Sequence, blocks: int) -> None:
        """Continues the sequence's chain of digests to so many blocks."""
        size, digests = self.blocks.block_size, sequence.digests
        while len(digests) < blocks:
            parent = digests[-1] if digests else self._root(sequence)
            start = len(digests) * size
            digests.append(chain(parent, sequence.token_ids[start : start + size]))

    def _root(self, sequence: Sequence) -> bytes:
        return chain_root(self.version, self.request_of[sequence].salt, experts=sequence.choices is not None)

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._to_queue(sequence)

    def _to_queue(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.table)
        sequence.computed, sequence.published, sequence.mixed, sequence.drafts = 0, 0, False, []
        if sequence.choices is not None:
            sequence.choices.forget()
        self._move(sequence, self.running, self.waiting)

    def _move(self, sequence: Sequence, source: list[Sequence], target: list[Sequence]) -> None:
        source.remove(sequence)
        bisect.insort(target, sequence, key=self._rank)

    def _rank(self, sequence: Sequence) -> tuple[float, int, int]:
        return (*self.request_of[sequence].place, sequence.index)

    def _paused(self, sequence: Sequence) -> bool:
        return self.request_of[sequence].mailbox.full
