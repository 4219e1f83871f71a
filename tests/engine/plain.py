"""What the tests of the scheduler share: models that the engine runs by recomputation, and steps without a thread."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from speaker import speaker_config

from glm5.engine import SamplingParams
from glm5.engine.admission import Limits, admit
from glm5.engine.block_manager import BlockManager
from glm5.engine.core import Core
from glm5.engine.recompute import RecomputingRunner, TokenCache
from glm5.engine.request import Mailbox, Request
from glm5.engine.scheduler import PRIORITY_SECONDS, Scheduler

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


class ToyModel(torch.nn.Module):
    """Logits of a position depend on every token up to it and on its place, and cost almost nothing."""

    def __init__(self, vocabulary: int = 320) -> None:
        super().__init__()
        self.config = speaker_config()
        generator = torch.Generator().manual_seed(0)
        self.embed = torch.nn.Parameter(torch.randn(vocabulary, 8, generator=generator))
        self.head = torch.nn.Parameter(torch.randn(8, vocabulary, generator=generator))
        self.tokens = 0
        """Tokens that went through it."""

    def forward(self, ids_1T, *, attention):
        self.tokens += ids_1T.shape[1]
        places_T1 = torch.arange(1, ids_1T.shape[1] + 1)[:, None]
        state_TD = torch.cumsum(self.embed[ids_1T[0]] * (places_T1 % 7 + 1), 0).sin()
        return SimpleNamespace(logits=(state_TD @ self.head)[None])


def toy_core(*, num_blocks=64, block_size=4, seqs=8, budget=16, prefix_caching=True, model=None):
    """An engine's core over the toy model; it is stepped by hand."""
    model = model or ToyModel()
    cache = TokenCache(num_blocks, block_size)
    scheduler = Scheduler(
        BlockManager(num_blocks, block_size, prefix_caching=prefix_caching),
        max_num_seqs=seqs, max_num_batched_tokens=budget, vocab_size=320, version=0,
    )  # fmt: skip
    return Core(RecomputingRunner(model, cache), cache, scheduler)


def submit(core, prompt, params=GREEDY, *, now=0.0, priority=0, deadline=None, salt=None, buffered=None):
    """Queues a request that arrives at `now`."""
    blocks = core.scheduler.blocks
    limits = Limits(320, 512, blocks.num_blocks * blocks.block_size, 8)
    number = max(core.requests, default=0) + 1 + core.steps
    entries = None if params.prompt_logprobs is None else [None]
    request = Request(
        number=number,
        sequences=admit(prompt, params, limits, eos_ids=frozenset(), tokenizer=None, grammars=None),
        mailbox=Mailbox(buffered, lambda: None), rank=now + PRIORITY_SECONDS * priority, salt=salt, deadline=deadline,
        prompt_logprobs=entries,
    )  # fmt: skip
    core.add(request)
    return request


def run(core, *, now=0.0, steps=2000):
    """Steps until nothing can run; every invariant holds after each."""
    for _ in range(steps):
        if not core.step(now):
            break
        core.scheduler.check()
    else:
        raise AssertionError("no end")


def tokens_and_logprobs(request):
    """Of every completion."""
    return [(tuple(d.token_id for d in s.deltas), tuple(d.logprob for d in s.deltas)) for s in request.sequences]


def alone(prompt, params=GREEDY):
    """What the request gives by itself, with room for everything."""
    core = toy_core(num_blocks=200, budget=4096)
    request = submit(core, prompt, params)
    run(core)
    return tokens_and_logprobs(request)
