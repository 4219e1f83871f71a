"""Forward passes over the paged cache: what one step of the engine computes.

Sequences that add a few tokens (decoding, verification of drafts) go through the model together, flattened into one
row; a longer run of tokens (a chunk of a prompt) is a pass of its own over its sequence. Of small fp32 models on a CPU
what is not too long for it goes through their decoder (`model/decode.py`), straight over the pool, all of it together.

Strict mode: every token is computed by the same instructions whatever else the step computes, and however a prompt was
cut into chunks. The decoder does that for any number of rows, so it takes prompts and decoding alike; where there is
none, the modules take every token as a pass of its own, which is the plain reference and slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from glm5.engine.choices import Array
from glm5.engine.paged_cache import PagedCache
from glm5.engine.views import BatchView, Run, SequenceView
from glm5.errors import InputError
from glm5.model import GLM5
from glm5.model.checks import check_attention
from glm5.model.decode import Decoder
from glm5.model.fast_steps import FEW_ROWS
from glm5.model.slots import Slots
from glm5.ops import gpu
from glm5.ops.decoding import Stored

FEW_TOKENS = 16
"""Sequences with at most this many new tokens share a pass."""
Block = list[tuple[int, int]]
"""Tokens of one step of a decoder: (number of the chunk, number of its token)."""
ROWS_AT_ONCE = 64
"""Tokens of one step of a decoder: enough that a weight which was read serves many of them."""


@dataclass
class Chunk:
    """What one sequence does in one step."""

    token_ids: list[int]
    """The new tokens, at positions `start` and following."""
    start: int
    """How many tokens of the sequence already lie in the cache."""
    block_table: list[int]
    """Physical blocks of the sequence, which cover the new tokens too."""
    logits_to_keep: int
    """Logits of the last so many tokens: 0 (unfinished prefill), 1, k + 1 (verification) or all (prompt logprobs)."""


@dataclass
class DraftChunk:
    """What the MTP modules of one sequence do in one step: the state of token i and token i + 1 draft token i + 2."""

    states_TD: Tensor
    """States of the tokens at positions `start` and following, as `Output` or an earlier draft gave them."""
    next_ids: list[int]
    """For each of them the token that follows it."""
    start: int
    block_table: list[int]


@dataclass
class Output:
    """What a chunk gave."""

    logits_KV: Tensor
    """fp32, on the CPU: of the last `logits_to_keep` tokens (of a draft: of the last one)."""
    states_TD: Tensor | None = None
    """Of every new token, where the model is, if they were asked for: what the MTP modules go on from."""
    experts_TLK: Array | None = None
    """uint8 or uint16: of every new token the experts that each sparse layer chose, if they were asked for."""


class Runner:
    """Runs chunks of sequences through one model; the rows that they add lie in the cache afterwards."""

    def __init__(self, model: GLM5, cache: PagedCache, *, attention: str = "sparse", strict: bool = False) -> None:
        if strict and (cache.dtype, cache.storage) != (torch.float32, "fp32"):
            raise InputError("Strict mode computes and keeps fp32; use a cache of fp32, or leave strict out.")
        check_attention(attention)
        self.model, self.cache, self.attention, self.strict = model, cache, attention, strict
        self._in_memory = cache.dtype == torch.float32 and cache.device.type == "cpu"
        """Whether a decoder can read the pools."""
        self.kernels = None if strict else gpu.kernels(model.config, cache.dtype, cache.device)
        """Of a GPU. Strict mode keeps the plain path: how a kernel adds depends on how many rows come together."""
        self._latents, self._keys = (
            {layer: Stored.of(pool.rows_XW, pool.scales_XG) for layer, pool in pools.items()} if self._in_memory else {}
            for pools in (cache.latents, cache.keys)
        )

    @torch.inference_mode()
    def run(self, chunks: list[Chunk], collect: frozenset[str] = frozenset()) -> list[Output]:
        """One output for each chunk. Raises InputError for a chunk that cannot run.

        collect: as of the model: "hidden" for the states of the new tokens, "router" for their experts.
        """
        for chunk in chunks:
            if not 0 <= chunk.logits_to_keep <= len(chunk.token_ids):
                raise InputError(
                    f"logits_to_keep is {chunk.logits_to_keep}, but the chunk has {len(chunk.token_ids)} tokens; "
                    "ask for as many at most."
                )
            wrong = next((t for t in chunk.token_ids if not 0 <= t < self.model.config.vocab_size), None)
            if wrong is not None:
                raise InputError(
                    f"Token id {wrong} is outside the vocabulary of {self.model.config.vocab_size:,}; "
                    "encode the text with this model's tokenizer."
                )
        runs = [self._checked(len(chunk.token_ids), chunk.start, chunk.block_table) for chunk in chunks]
        if self.strict:
            decoder = self._fitting(self.model.exact_decoder())
            if decoder is not None:
                return self._by_rows(decoder, chunks, collect)
            return [self._by_token(chunk, run, collect) for chunk, run in zip(chunks, runs, strict=True)]
        outputs: dict[int, Output] = {}
        decoder, by_rows = self._fitting(self.model.decoder(1)), list[int]()
        for group, view in self._passes(runs):
            if decoder is not None and sum(runs[i].tokens for i in group) <= FEW_ROWS:
                by_rows += group
            else:
                outputs.update(zip(group, self._pass([chunks[i] for i in group], view(), collect), strict=True))
        if decoder is not None and by_rows:
            done = self._by_rows(decoder, [chunks[i] for i in by_rows], collect)
            outputs.update(zip(by_rows, done, strict=True))
        return [outputs[i] for i in range(len(chunks))]

    def _fitting(self, decoder: Decoder | None) -> Decoder | None:
        """The decoder, if it can read this cache."""
        return decoder if decoder is not None and self._in_memory and decoder.fits(self.cache) else None

    def _by_rows(self, decoder: Decoder, chunks: list[Chunk], collect: frozenset[str]) -> list[Output]:
        """All tokens of all chunks by the decoder."""
        config, chosen = self.model.config, list[Tensor]()

        def step(_: Block, ids: list[int], slots: Slots, keep: list[int]) -> tuple[Tensor, Tensor]:
            experts_LNK = None
            if "router" in collect:
                shape = len(config.sparse_layers), len(ids), config.num_experts_per_tok
                experts_LNK = torch.empty(shape, dtype=torch.int64)
                chosen.append(experts_LNK)
            return decoder.step(ids, slots, self.attention == "sparse", keep, experts_LNK)

        outputs = self._in_blocks(chunks, [c.token_ids for c in chunks], [c.logits_to_keep for c in chunks], step)
        if chosen:
            experts = torch.cat(chosen, dim=1).transpose(0, 1).split([len(c.token_ids) for c in chunks])
            for output, experts_TLK in zip(outputs, experts, strict=True):
                output.experts_TLK = self._compact(experts_TLK)
        return outputs

    def _drafts_by_rows(self, decoder: Decoder, chunks: list[DraftChunk]) -> list[Output]:
        """A draft step of all tokens of all chunks by the decoder."""

        def step(block: Block, ids: list[int], slots: Slots, keep: list[int]) -> tuple[Tensor, Tensor]:
            states_ND = torch.stack([chunks[i].states_TD[j] for i, j in block])
            return decoder.draft(states_ND, ids, slots, self.attention == "sparse", keep)

        return self._in_blocks(chunks, [c.next_ids for c in chunks], [1] * len(chunks), step)

    def _in_blocks(
        self,
        chunks: list[Chunk] | list[DraftChunk],
        ids: list[list[int]],
        kept: list[int],
        step: Callable[[Block, list[int], Slots, list[int]], tuple[Tensor, Tensor]],
    ) -> list[Output]:
        """`step` on all tokens of all chunks in order, some at a time; of each chunk the last `kept` logits."""
        rows = [(i, j) for i, tokens in enumerate(ids) for j in range(len(tokens))]
        logits: list[list[Tensor]] = [[] for _ in chunks]
        states: list[list[Tensor]] = [[] for _ in chunks]
        for first in range(0, len(rows), ROWS_AT_ONCE):
            block = rows[first : first + ROWS_AT_ONCE]
            number = {i: n for n, i in enumerate(dict.fromkeys(i for i, _ in block))}
            tables = [chunks[i].block_table for i in number]
            places = [(number[i], chunks[i].start + j) for i, j in block]
            slots = Slots(self._latents, self._keys, self.cache.block_size, tables, places)
            keep = [n for n, (i, j) in enumerate(block) if j >= len(ids[i]) - kept[i]]
            logits_KV, states_ND = step(block, [ids[i][j] for i, j in block], slots, keep)
            for row, n in enumerate(keep):
                logits[block[n][0]].append(logits_KV[row])
            for n, (i, _) in enumerate(block):
                states[i].append(states_ND[n])
        nothing_0V = torch.empty(0, self.model.config.vocab_size)
        stacked = [torch.stack(rows_V) if rows_V else nothing_0V for rows_V in logits]
        return [Output(logits_KV, torch.stack(a)) for logits_KV, a in zip(stacked, states, strict=True)]

    def _pass(self, chunks: list[Chunk], view: BatchView | SequenceView, collect: frozenset[str]) -> list[Output]:
        """One forward pass. Of a batch, whose sequences want different rows, all logits are computed; they are few."""
        ids_BT = self._ids([token for chunk in chunks for token in chunk.token_ids])
        keep = max(chunks[0].logits_to_keep, 1) if len(chunks) == 1 else 0
        out = self.model(ids_BT, cache=view, attention=self.attention, collect=collect, logits_to_keep=keep)
        logits_TV, tokens = out.logits[0].float().cpu(), [len(chunk.token_ids) for chunk in chunks]
        logits = logits_TV.split(tokens) if keep == 0 else (logits_TV,)
        nothing = [None] * len(chunks)
        states = nothing if out.hidden is None else out.hidden[0].split(tokens)
        experts: Sequence[Array | None] = nothing
        if out.router:
            experts_TLK = torch.stack([record.experts_BTK[0] for record in out.router], dim=1)
            experts = [self._compact(part_TLK) for part_TLK in experts_TLK.cpu().split(tokens)]
        return [
            Output(logits_TV[len(logits_TV) - chunk.logits_to_keep :], states_TD, experts_TLK)
            for chunk, logits_TV, states_TD, experts_TLK in zip(chunks, logits, states, experts, strict=True)
        ]

    def _by_token(self, chunk: Chunk, run: Run, collect: frozenset[str]) -> Output:
        """A pass for every token of a chunk."""
        outs = []
        for i, token in enumerate(chunk.token_ids):
            one = Run(1, run.start + i, run.block_table)
            kept = int(i >= run.tokens - chunk.logits_to_keep)
            outs += self._pass(
                [Chunk([token], one.start, chunk.block_table, kept)], BatchView(self.cache, [one]), collect
            )
        states = [out.states_TD for out in outs if out.states_TD is not None]
        experts = [out.experts_TLK for out in outs if out.experts_TLK is not None]
        return Output(
            torch.cat([out.logits_KV for out in outs]),
            torch.cat(states) if states else None,
            np.concatenate(experts) if experts else None,
        )

    def _compact(self, experts_TLK: Tensor) -> Array:
        """In one byte a number where that is enough."""
        number = np.uint8 if self.model.config.n_routed_experts <= 256 else np.uint16
        compact: Array = experts_TLK.numpy().astype(number)
        return compact

    @torch.inference_mode()
    def draft(self, chunks: list[DraftChunk], *, step: int = 0) -> list[Output]:
        """A draft step of every sequence (see `GLM5.draft`): logits of its last token [1, V], states of all [T, D]."""
        if not self.cache.draft:
            raise InputError("The cache has no room for the MTP modules' rows; make it with draft=True.")
        runs = [self._checked(len(chunk.next_ids), chunk.start, chunk.block_table) for chunk in chunks]
        outputs: dict[int, Output] = {}
        decoder, by_rows = self._fitting(self.model.decoder(1)), list[int]()
        if not (step == 0 or len(self.model.mtp) == 1) or not (decoder and decoder.can_draft(self.cache)):
            decoder = None
        for group, view in self._passes(runs):
            if decoder is not None and sum(runs[i].tokens for i in group) <= FEW_ROWS:
                by_rows += group
                continue
            states_BTD = torch.cat([chunks[i].states_TD for i in group]).unsqueeze(0)
            ids_BT = self._ids([token for i in group for token in chunks[i].next_ids])
            keep = 0 if len(group) > 1 else 1
            state_BTD, logits_BTV = self.model.draft(
                states_BTD, ids_BT, step=step, cache=view(), attention=self.attention, logits_to_keep=keep
            )
            tokens = [runs[i].tokens for i in group]
            logits = logits_BTV[0].float().cpu()
            parts = logits.split(tokens) if keep == 0 else [logits]
            for i, state_TD, logits_TV in zip(group, state_BTD[0].split(tokens), parts, strict=True):
                outputs[i] = Output(logits_TV[-1:], state_TD)
        if decoder is not None and by_rows:
            drafts = self._drafts_by_rows(decoder, [chunks[i] for i in by_rows])
            outputs.update(zip(by_rows, drafts, strict=True))
        return [outputs[i] for i in range(len(chunks))]

    def _passes(self, runs: list[Run]) -> Iterator[tuple[list[int], Callable[[], BatchView | SequenceView]]]:
        """Which runs go through the model together, and what then makes their view of the cache."""
        few = [i for i, run in enumerate(runs) if run.tokens <= FEW_TOKENS]
        if few:
            yield few, partial(BatchView, self.cache, [runs[i] for i in few], self.kernels)
        for i, run in enumerate(runs):
            if run.tokens > FEW_TOKENS:
                yield [i], partial(SequenceView, self.cache, run, self.kernels)

    def _checked(self, tokens: int, start: int, block_table: list[int]) -> Run:
        """The rows of a chunk, or an InputError: rows outside the cache would be another sequence's, or nobody's."""
        cache, end = self.cache, start + tokens
        if tokens < 1 or start < 0:
            raise InputError(f"A chunk of {tokens} tokens after {start}; give at least one token, after at least none.")
        if end > self.model.config.max_position_embeddings:
            raise InputError(
                f"A sequence of {end:,} tokens exceeds the model's {self.model.config.max_position_embeddings:,} "
                "positions; ask for a shorter context."
            )
        if len(block_table) * cache.block_size < end:
            raise InputError(
                f"{len(block_table)} blocks of {cache.block_size} tokens do not cover a sequence of {end:,}; "
                "give it more blocks."
            )
        if min(block_table) < 0 or max(block_table) >= cache.num_blocks:
            raise InputError(
                f"A block table names a block outside the cache's {cache.num_blocks}; give its own blocks."
            )
        return Run(tokens, start, block_table)

    def _ids(self, token_ids: list[int]) -> Tensor:
        return torch.tensor([token_ids], device=self.cache.device)
