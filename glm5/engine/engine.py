"""The engine: token ids in, token ids with their log-probabilities and weight versions out.

One thread of its own runs step after step while there is work (`core.py`) and ends when there has been none for a
moment. Callers only queue requests and read tokens, so a slow or vanished reader holds nobody up. How a request flows,
what strict mode promises and how much memory is taken: docs/engine.md. A caller that needs a clock of its own makes the
engine without the thread and calls `step`.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from glm5.checkpoint import load_model
from glm5.engine.admission import Limits, admit, check_queueing, end_ids, go_on, one_each, tokenizer_in
from glm5.engine.backend import CacheSize, StorageName, build_backend
from glm5.engine.block_manager import BlockManager
from glm5.engine.checks import check_whole
from glm5.engine.core import Core
from glm5.engine.grammar import GrammarCompiler
from glm5.engine.leader import leader_of
from glm5.engine.outputs import EngineStats, RequestOutput, TokenDelta
from glm5.engine.request import BUFFERED_TOKENS, Mailbox, Request, finish_all
from glm5.engine.sampling_params import SamplingParams
from glm5.engine.scheduler import PRIORITY_SECONDS, Scheduler
from glm5.engine.sessions import group_of
from glm5.engine.stream import TokenStream
from glm5.errors import InputError, UnavailableError
from glm5.model import GLM5
from glm5.parallel import InferencePlan
from glm5.text import Tokenizer

IDLE_SECONDS = 1.0
"""How long the thread waits for work before it ends; the next request starts another."""


class Engine:
    """Generates with one model: continuous batching over a paged cache. Thread-safe.

    `model` is a `GLM5` (used as it is, not copied) or a Hugging Face directory, whose tokenizer is then taken along.
    `storage` is the cache's format, by default that of the weights; `memory_bytes` or `num_blocks` its size, by default
    a share of the free memory. `strict` (fp32): tokens and log-probabilities depend on nothing but the request and the
    weights, to the bit. `num_speculative_tokens`: guesses of the MTP module to verify in each step, where that pays
    (`speculative.py`); they change no token. `parallel`: each of several processes that torchrun started reads its own
    part of the directory (`inference_plan.py`); this one is the first, the others call `follow`. `threaded=False`:
    nothing runs until `step`. Raises `InputError` for requests that cannot run, before any work starts,
    `CheckpointError` when the model gives logits that are not finite, and `ParallelError` when a process is lost.
    """

    def __init__(
        self,
        model: GLM5 | str | Path,
        tokenizer: Tokenizer | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        attention: Literal["sparse", "dense"] = "sparse",
        strict: bool = False,
        storage: StorageName | None = None,
        block_size: int = 64,
        num_blocks: int | None = None,
        memory_bytes: int | None = None,
        enable_prefix_caching: bool = True,
        num_speculative_tokens: int = 0,
        parallel: InferencePlan | None = None,
        version: int = 0,
        threaded: bool = True,
    ) -> None:
        self.leader = leader_of(
            model, parallel, dtype, torch.device(device), attention=attention, storage=storage, block_size=block_size,
            strict=strict, drafts=num_speculative_tokens,
        )  # fmt: skip
        if isinstance(model, str | Path):
            tokenizer = tokenizer_in(Path(model)) if tokenizer is None else tokenizer
            model = self.leader.model if self.leader else load_model(model, dtype=dtype, device=device)
        self.model = model.eval()
        self.config, self.tokenizer = model.config, tokenizer
        positions = self.config.max_position_embeddings
        self.max_model_len = positions if max_model_len is None else max_model_len
        check_whole("max_model_len", self.max_model_len, 2, positions)
        check_whole("max_num_seqs", max_num_seqs, 1)
        check_whole("max_num_batched_tokens", max_num_batched_tokens, 1)
        check_whole("block_size", block_size, 1)
        self.strict, self.threaded = strict, threaded
        self.eos_ids = end_ids(self.config, tokenizer)
        self.grammars = None if tokenizer is None else GrammarCompiler(tokenizer, self.config.vocab_size, self.eos_ids)
        size = CacheSize(block_size, num_blocks, memory_bytes, self.max_model_len, max_num_seqs)
        backend = self.leader.open(size, drafts=num_speculative_tokens) if self.leader else build_backend(
            model, size, attention=attention, strict=strict, storage=storage, drafts=num_speculative_tokens
        )  # fmt: skip
        self._weights = backend.weights
        self.limits = Limits(
            vocab_size=self.config.vocab_size, max_model_len=self.max_model_len, experts=backend.experts,
            cache_tokens=backend.num_blocks * block_size, bytes_per_token=backend.cache.bytes_per_block / block_size,
        )  # fmt: skip
        scheduler = Scheduler(
            BlockManager(backend.num_blocks, block_size, prefix_caching=enable_prefix_caching),
            max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
            vocab_size=self.config.vocab_size, version=version,
        )  # fmt: skip
        self._core = Core(backend.runner, backend.cache, scheduler, backend.speculator)
        # What the threads share: all of it changes under `_changed` only.
        self._changed = threading.Condition()
        self._arrived: deque[Request] = deque()
        self._count = self._swaps = 0
        self._woken = self._closed = False
        self._thread: threading.Thread | None = None
        self.failure: str | None = None
        """The kind of mistake of its own by which the engine's thread has ended; no more requests are taken then."""
        self._step_lock = threading.Lock()
        """Held while a step runs and while weights are swapped. Taken before `_changed`, never after it."""

    @property
    def version(self) -> int:
        """Of the weights that the next step uses."""
        return self._core.scheduler.version

    # ---- requests -----------------------------------------------------------------------------------------------
    def generate(
        self,
        prompts: SequenceOf[SequenceOf[int]],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Runs every prompt (a list of token ids) to its end; `params` is one for all or one for each."""
        requests = [self._request(ids, own, buffered=None) for ids, own in one_each(prompts, params)]
        self._submit(requests)
        try:
            while not self.threaded and not all(request.mailbox.finished for request in requests):
                self.step()
            for request in requests:
                request.mailbox.wait(for_end=True)
                request.mailbox.raise_error()
        finally:  # an error or Ctrl-C ends them all
            for request in requests:
                self._abort(request)
        return [request.output() for request in requests]

    def stream(
        self,
        prompt_ids: SequenceOf[int],
        params: SamplingParams | None = None,
        *,
        session_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        said: SequenceOf[TokenDelta] = (),
    ) -> TokenStream:
        """Starts a request; the result yields each token as it is sampled (of all `n` completions in turn).

        The request is checked by the call itself, not by the first token. session_id: only requests of the same
        session share cached prefixes with it, or of the same group (`GROUP//MEMBER`); None shares with all others
        that name none. priority: a lower number is served earlier, each level by so much as `PRIORITY_SECONDS` of
        waiting. deadline: seconds from now after which the request ends, finished or not (finish reason "abort").
        said: tokens that the same request, which must name its seed, has got elsewhere or earlier; it goes on after
        them as if it had not stopped.
        """
        check_queueing(session_id, priority, deadline)
        buffered = BUFFERED_TOKENS if self.threaded else 1
        request = self._request(
            prompt_ids, params or SamplingParams(), buffered=buffered, session_id=session_id, priority=priority,
            deadline=deadline, said=said,
        )  # fmt: skip
        self._submit([request])
        return TokenStream(request, self._abort)

    def step(self) -> bool:
        """One step of an engine that has no thread (`threaded=False`); False if nothing could run.

        A request goes on only when its last token was read, so `while engine.step(): pass` gives each running sequence
        exactly one token, however its prompt is cut and whatever is cached.
        """
        if self.threaded:
            raise RuntimeError("This engine steps by itself; make it with threaded=False to step it.")
        return self._step()

    def stats(self) -> EngineStats:
        """Counters of what runs now and of everything since the engine was made."""
        return self._core.stats(len(self._arrived))

    def close(self) -> None:
        """Ends every request (finish reason "abort") and the engine's thread; more requests are refused."""
        with self._changed:
            self._closed = True
            self._wake()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        if not self.threaded:
            self._end_all()
        if self.grammars is not None:
            self.grammars.close()
        if self.leader is not None:
            within = thread is threading.current_thread()  # a reader's callback, in the middle of a step
            with contextlib.nullcontext() if within else self._step_lock:
                self.leader.close()

    # ---- weights ------------------------------------------------------------------------------------------------
    def update_weights(self, version: int, state_dict: Mapping[str, Tensor], *, recompute: bool | None = None) -> None:
        """Takes new weights between two steps; later tokens carry `version`.

        `state_dict` is the whole model's, or that of all its adapters. Everything is checked, and brought into the
        model's dtype, before the first weight changes: the version must be newer, names and shapes the same, values
        finite. Cached prefixes of older weights are not used again. recompute: running sequences compute what they have
        cached anew, which is exact, instead of keeping it; by default in strict mode only.
        """
        check_whole("version", version, 0)
        ready = self._weights.staged(state_dict, version)
        with self._changed:
            self._swaps += 1  # the next step waits
        try:
            with self._step_lock:
                if version <= self.version:
                    raise InputError(
                        f"Weights of version {version} came after version {self.version}; versions must grow."
                    )
                self._weights.swap(ready)
                self._core.scheduler.new_weights(version, recompute=self.strict if recompute is None else recompute)
        finally:
            with self._changed:
                self._swaps -= 1
                self._wake()

    # ---- between the threads ------------------------------------------------------------------------------------
    def _request(
        self,
        prompt_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        buffered: int | None,
        session_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        said: SequenceOf[TokenDelta] = (),
    ) -> Request:
        """A checked request."""
        sequences = admit(
            prompt_ids, params, self.limits, eos_ids=self.eos_ids, tokenizer=self.tokenizer, grammars=self.grammars
        )
        go_on(sequences, said, self.limits.vocab_size)
        now = time.monotonic()
        with self._changed:
            self._count += 1
            number = self._count
        return Request(
            number=number,
            sequences=sequences,
            mailbox=Mailbox(buffered, self._wake),
            rank=now + PRIORITY_SECONDS * priority,
            salt=None if session_id is None else group_of(session_id),
            deadline=None if deadline is None else now + deadline,
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
            forked=bool(said),
        )

    def _submit(self, requests: list[Request]) -> None:
        with self._changed:
            if self.failure is not None:
                raise UnavailableError(f"This engine ended by a mistake of its own ({self.failure}); make a new one.")
            if self._closed:
                raise InputError("This engine is closed; make a new one.")
            if self._thread is None and self.threaded:
                thread = threading.Thread(target=self._run, name="glm5-engine", daemon=True)
                thread.start()  # where the system has no more, that is the caller's error, and nothing was taken
                self._thread = thread
                atexit.register(self.close)  # a thread inside the model must not meet the end of the interpreter
            self._arrived += requests
            self._wake()

    def _abort(self, request: Request) -> None:
        """Ends a request for its reader at once and for the engine before its next step."""
        if not request.mailbox.finished:
            request.aborted = True
            request.mailbox.abandon()
            self._wake()

    def _wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def _run(self) -> None:
        """The engine's thread: steps while there is work, waits for more, and ends when none comes."""
        busy = False
        try:
            while self._wait(busy):
                busy = self._step()
            if self._closed:
                self._end_all()
        except BaseException as error:  # nobody may wait for a thread that is gone
            with self._changed:
                self._closed, self.failure = True, type(error).__name__  # a message might quote somebody's prompt
            atexit.unregister(self.close)
            self._end_all(error)
            raise

    def _step(self) -> bool:
        """Takes over what has arrived and runs one step."""
        with self._step_lock:
            try:
                while self._arrived:
                    with self._changed:
                        request = self._arrived.popleft()
                    self._core.add(request)
                return self._core.step(time.monotonic())
            except BaseException as error:  # a mistake of the engine itself: nobody may wait for it
                requests = self._core.take_all()
                for request in requests:
                    request.step_failed = True
                finish_all(requests, error)
                return bool(self._arrived)  # those behind a request that could not be taken over

    def _wait(self, busy: bool) -> bool:
        """Waits until there is something to do; False ends the thread."""
        with self._changed:
            while not self._closed:
                if not self._swaps and (busy or self._woken):
                    self._woken = False
                    return True
                deadline = self._core.next_deadline
                idle = IDLE_SECONDS if deadline is None else max(deadline - time.monotonic(), 0.0)
                if not self._changed.wait(idle):
                    if self._core.requests or self._arrived:  # all paused, or a deadline has come
                        self._woken = True
                    elif not self._swaps and not self._woken:  # a request may come between timeout and lock
                        self._thread = None
                        break
            atexit.unregister(self.close)
            return False

    def _end_all(self, error: BaseException | None = None) -> None:
        """Of an engine that takes no more requests and runs no more."""
        finish_all([*self._core.take_all(), *self._arrived], error)
        self._arrived.clear()
