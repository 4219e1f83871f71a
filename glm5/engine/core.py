"""One step after another: schedule, run the model, sample, deliver. No threads here; `engine.py` has them.

A step that fails costs the requests that were in it and nothing else: their reader gets the error, their blocks are
given back, and the next step runs.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from glm5.engine.choices import ChoicePool
from glm5.engine.outputs import EngineStats, TokenDelta
from glm5.engine.request import Request
from glm5.engine.runner import Chunk, Output
from glm5.engine.sampler import prompt_logprobs
from glm5.engine.scheduler import Scheduler, Work
from glm5.engine.sequence import Sequence
from glm5.engine.speculative import Speculator
from glm5.errors import CheckpointError


class Storage(Protocol):
    """The cache behind the runner, as far as the blocks are concerned."""

    @property
    def bytes_per_block(self) -> int:
        """Of all layers together."""

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copies whole blocks, (from, to) each."""


class StepRunner(Protocol):
    """The forward pass of a step; `glm5.engine.runner.Runner` has the contract."""

    def run(self, chunks: list[Chunk], collect: frozenset[str]) -> list[Output]:
        """Logits [logits_to_keep, V] of each chunk, fp32, on the CPU; with "router", the experts of its tokens."""


class Core:
    """The requests that are not finished, and the step that moves them on. One thread at a time."""

    def __init__(
        self, runner: StepRunner, cache: Storage, scheduler: Scheduler, speculator: Speculator | None = None
    ) -> None:
        """speculator: drafts for the next step after each one; it is the runner then."""
        self.runner, self.cache, self.scheduler = speculator or runner, cache, scheduler
        self.speculator = speculator
        self.choices = ChoicePool(scheduler.blocks.num_blocks, scheduler.blocks.block_size)
        self.requests: dict[int, Request] = {}
        self.steps = self.sampled_tokens = self.drafted_tokens = self.accepted_tokens = 0

    def add(self, request: Request) -> None:
        """Queues a request: the first of its sequences, from which the others are forked, or all that go on apart, the
        others when the prompt's log-probabilities are there, if these are wanted."""
        self.requests[request.number] = request
        if request.complete:
            self.end(request)
        elif request.forked and not request.wants_prompt:
            self._go_on(request, request.sequences)
        else:
            self.scheduler.add(request, request.first)

    def _go_on(self, request: Request, sequences: list[Sequence]) -> None:
        """Queues what has not ended of sequences that have got tokens elsewhere."""
        for sequence in sequences:
            if not sequence.done:
                self.scheduler.add(request, sequence)

    def end(self, request: Request, error: BaseException | None = None) -> None:
        """Ends a request as it is, with the error if there is one, and gives back what it holds."""
        if self.requests.pop(request.number, None) is not None:
            for sequence in request.sequences:
                self.scheduler.remove(sequence)
            request.mailbox.finish(error)

    def take_all(self) -> list[Request]:
        """Gives every request up, for the caller to end, and all blocks back, whatever state an error left them in."""
        requests, self.requests = list(self.requests.values()), {}
        self.scheduler.clear()
        return requests

    @property
    def next_deadline(self) -> float | None:
        """The earliest deadline of all requests."""
        return min((r.deadline for r in self.requests.values() if r.deadline is not None), default=None)

    @torch.inference_mode()
    def step(self, now: float) -> bool:
        """Runs one step at this time (`time.monotonic`); False if nothing could run."""
        for request in list(self.requests.values()):
            if request.aborted or (request.deadline is not None and now >= request.deadline):
                self.end(request)
        step = self.scheduler.schedule()
        if step.copies:
            copies = [(old, new) for new, old in step.copies.items()]
            self.cache.copy_blocks(copies)
            self.choices.copy(copies)
        if not step.works:
            return False
        self.steps += 1
        chunks = [Chunk(w.token_ids, w.start, w.sequence.table, w.keep) for w in step.works]
        recorded = any(w.sequence.choices is not None for w in step.works)
        try:
            outputs = self.runner.run(chunks, frozenset({"router"}) if recorded else frozenset())
        except Exception as error:
            for work in step.works:
                work.request.step_failed = True
                self.end(work.request, error)
            return True
        deltas: dict[int, list[TokenDelta]] = {}
        for work, output in zip(step.works, outputs, strict=True):
            if work.request.number not in self.requests:
                continue  # another of its sequences failed
            try:
                deltas.setdefault(work.request.number, []).extend(self._take(work, output))
            except Exception as error:
                self.end(work.request, error)
        if self.speculator is not None:
            self.speculator.after(step.works)
        for number, new in deltas.items():
            if number in self.requests:
                request = self.requests[number]
                request.mailbox.put(new)
                if request.complete:
                    self.end(request)
        return True

    def _take(self, work: Work, output: Output) -> list[TokenDelta]:
        """What one sequence's part of the step gives."""
        sequence, request, version = work.sequence, work.request, self.scheduler.version
        logits_KV = output.logits_KV
        # The sum is one operation, and finite unless a logit is not (or a sum overflows, hence the second look).
        if not math.isfinite(float(logits_KV.sum())) and not logits_KV.isfinite().all():
            raise CheckpointError(
                f"The model (weights version {version}) gives NaN or infinite logits; look for the damaged weight with "
                "load_model(directory, check_finite=True)."
            )
        self._prompt_logprobs(work, logits_KV)
        if sequence.choices is not None and output.experts_TLK is not None:
            self.choices.record(sequence.choices, sequence.table, work.start, output.experts_TLK)
        if not work.samples:
            self.scheduler.computed(work)
            return []
        deltas, accepted = [], 0
        guesses = work.token_ids[len(work.token_ids) - work.drafts :]
        rows_KV = logits_KV[len(logits_KV) - 1 - work.drafts :]
        for i in range(len(rows_KV)):
            delta = sequence.append(sequence.sample(rows_KV[i]), version)
            deltas.append(delta)
            # A draft is right when it is the token that would have been sampled: then its row of logits counts too.
            if sequence.done or i == work.drafts or guesses[i] != delta.token_id:
                break
            accepted += 1
        sequence.drafts = []
        if sequence.choices is not None:
            sequence.choices.forget()  # those of wrong drafts
        self.drafted_tokens += work.drafts
        self.accepted_tokens += accepted
        self.scheduler.computed(work, accepted)
        if not request.forked:
            request.forked = True
            for child in request.sequences[1:]:
                if child.choices is not None and deltas[0].experts is not None:
                    child.choices.add(deltas[0].experts)
                deltas.append(child.append(child.sample(rows_KV[0]), version))
                if not child.done:
                    self.scheduler.fork(sequence, child)
        self.sampled_tokens += len(deltas)
        if sequence.done:
            self.scheduler.remove(sequence)
        return deltas

    def _prompt_logprobs(self, work: Work, logits_KV: Tensor) -> None:
        """Takes the prompt's log-probabilities from the rows of its tokens."""
        request, entries = work.request, work.request.prompt_of(work.sequence)
        prompt, top = work.sequence.prompt_ids, work.sequence.params.prompt_logprobs
        if entries is None or top is None:
            return
        known, end = len(entries), min(work.end + 1, len(prompt))
        first = work.end - len(logits_KV)  # the position of the first row that was kept; it predicts the next token
        entries += prompt_logprobs(logits_KV[known - 1 - first : end - 1 - first], list(prompt[known:end]), top)
        if request.forked and not request.wants_prompt:
            self._go_on(request, [sequence for sequence in request.sequences if sequence is not request.first])

    def stats(self, queued: int) -> EngineStats:
        """The counters; `queued` requests have not been taken over yet."""
        scheduler = self.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + queued,
            blocks_used=scheduler.blocks.used,
            blocks_total=scheduler.blocks.num_blocks,
            steps=self.steps,
            prompt_tokens=scheduler.prompt_tokens,
            cached_prompt_tokens=scheduler.cached_prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            computed_tokens=scheduler.computed_tokens,
            sampled_tokens=self.sampled_tokens,
            preemptions=scheduler.preemptions,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            version=scheduler.version,
        )
