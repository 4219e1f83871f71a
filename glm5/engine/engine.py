"""The engine: token ids in, token ids with their log-probabilities and weight versions out.

One loop behind the final interface: sequences whose prompts have the same length decode together as the rows of one
contiguous latent cache, which grows with them, and leave when they end. Random numbers depend on (seed, sample,
position) only; logits may differ in the last bits with the number of rows, so `max_num_seqs=1` is the setting whose
results do not depend on the batch at all.

Left out for now: continuous batching, the paged cache with prefixes, chunked prefill mixed with decode, preemption,
speculation, and recomputing a cache when new weights arrive while a sequence runs (its cached latents are kept).
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from glm5.checkpoint import load_model
from glm5.engine.checks import check_whole
from glm5.engine.memory import available_bytes
from glm5.engine.outputs import RequestOutput, TokenDelta
from glm5.engine.sampler import sample_token, token_logprobs, uniform
from glm5.engine.sampling_params import SamplingParams
from glm5.engine.sequence import Sequence, fresh_seed
from glm5.errors import CheckpointError, InputError
from glm5.model import GLM5, LatentCache
from glm5.text import Detokenizer, Tokenizer

PREFILL_CHUNK = 4096
FIRST_ROOM = 256
"""New tokens that a cache has room for at first; it doubles each time it is full."""

TokenStream = Generator[TokenDelta, None, None]
"""Sampled tokens as they come; `close()` aborts."""


class Engine:
    """Generates with one model. Thread-safe: requests of several threads take turns token by token.

    `model` is a `GLM5` (used as it is, not copied) or a Hugging Face directory, whose tokenizer is then taken along.
    Raises `InputError` for requests that cannot run, before any work starts, and `CheckpointError` when the model gives
    logits that are not finite.
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
        attention: Literal["sparse", "dense"] = "sparse",
        version: int = 0,
    ) -> None:
        if isinstance(model, str | Path):
            directory = Path(model)
            model = load_model(directory, dtype=dtype, device=device)
            if tokenizer is None and (directory / "tokenizer.json").is_file():
                tokenizer = Tokenizer.from_pretrained(directory)
        self.model = model.eval()
        self.config = model.config
        self.tokenizer = tokenizer
        positions = self.config.max_position_embeddings
        self.max_model_len = positions if max_model_len is None else max_model_len
        check_whole("max_model_len", self.max_model_len, 2, positions)
        check_whole("max_num_seqs", max_num_seqs, 1)
        self.max_num_seqs = max_num_seqs
        self.attention: Literal["sparse", "dense"] = attention
        self.version = version
        self.eos_ids = frozenset(self.config.eos_token_ids or (tokenizer.eos_ids if tokenizer else ()))
        if max(self.eos_ids, default=0) >= self.config.vocab_size:
            raise InputError(
                f"The tokenizer ends a turn with id {max(self.eos_ids)}, but the model's vocabulary has "
                f"{self.config.vocab_size}; give the model's own tokenizer."
            )
        self._step_lock = threading.Lock()

    # ---- requests -----------------------------------------------------------------------------------------------
    def generate(
        self,
        prompts: SequenceOf[SequenceOf[int]],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Runs every prompt (a list of token ids) to its end; `params` is one for all or one for each."""
        if not isinstance(prompts, SequenceOf) or any(isinstance(prompt, int) for prompt in prompts):
            raise InputError("prompts must be a list of lists of token ids; wrap a single prompt in a list.")
        if params is None:
            params = SamplingParams()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        if not isinstance(each, SequenceOf) or len(each) != len(prompts):
            given = f"{len(each)} SamplingParams" if isinstance(each, SequenceOf) else f"a {type(each).__name__}"
            raise InputError(f"There are {len(prompts)} prompts and {given}; give one SamplingParams, or one each.")
        requests = [self._admit(ids, p) for ids, p in zip(prompts, each, strict=True)]
        batches = list(_batches([s for request in requests for s in request], self.max_num_seqs))
        for rows in batches:
            self._check_memory(rows)
        for rows in batches:
            for _ in self._decode(rows):
                pass
        return [RequestOutput(request[0].prompt_ids, tuple(s.output() for s in request)) for request in requests]

    def stream(self, prompt_ids: SequenceOf[int], params: SamplingParams | None = None) -> TokenStream:
        """Yields each token as it is sampled (of all `n` completions in turn). Closing the iterator aborts.

        The request is checked by the call itself, not by the first `next`.
        """
        rows = self._admit(prompt_ids, params or SamplingParams())
        if len(rows) > self.max_num_seqs:
            raise InputError(
                f"n is {len(rows)}, but this engine runs {self.max_num_seqs} sequences at once; ask for fewer."
            )
        self._check_memory(rows)
        return self._decode(rows)

    # ---- weights ------------------------------------------------------------------------------------------------
    def update_weights(self, version: int, state_dict: Mapping[str, Tensor]) -> None:
        """Takes new weights between two decode steps; later tokens carry `version`.

        Everything is checked before the first weight changes: the version must be newer, names and shapes the same,
        values finite.
        """
        if version <= self.version:
            raise InputError(f"Weights of version {version} came after version {self.version}; versions must grow.")
        own = self.model.state_dict()
        for what, names in (("lack", own.keys() - state_dict.keys()), ("hold unknown", state_dict.keys() - own.keys())):
            if names:
                raise InputError(
                    f"The new weights {what} {sorted(names)[0]!r} ({len(names)} such); send the full model."
                )
        for name, tensor in state_dict.items():
            if tensor.shape != own[name].shape:
                raise InputError(
                    f"{name} is {tuple(tensor.shape)}, the model has {tuple(own[name].shape)}; send its own."
                )
            if not tensor.to(own[name].dtype).isfinite().all():
                raise InputError(f"{name} of version {version} holds NaN or infinity; keep the weights from before.")
        with self._step_lock:
            self.model.load_state_dict(state_dict)
            self.version = version

    # ---- the loop -----------------------------------------------------------------------------------------------
    def _admit(self, prompt_ids: SequenceOf[int], params: SamplingParams) -> list[Sequence]:
        """The request's sequences, or an `InputError` that says why it cannot run."""
        if not isinstance(prompt_ids, SequenceOf):
            raise InputError(f"The prompt is a {type(prompt_ids).__name__}; give a list of token ids.")
        if not isinstance(params, SamplingParams):
            raise InputError(f"The sampling settings are a {type(params).__name__}; give a SamplingParams.")
        prompt = tuple(prompt_ids)
        if not prompt:
            raise InputError("The prompt is empty; give at least one token id.")
        for name, ids in (("The prompt", prompt), ("stop_token_ids", params.stop_token_ids)):
            wrong = next((t for t in ids if not isinstance(t, int) or not 0 <= t < self.config.vocab_size), None)
            if wrong is not None:
                raise InputError(f"{name} holds {wrong!r}, which is no token id below {self.config.vocab_size}.")
        room = self.max_model_len - len(prompt)
        max_tokens = room if params.max_tokens is None else params.max_tokens
        if room < 1 or max_tokens > room:
            asked = f"{len(prompt)} prompt tokens" + (f" + {params.max_tokens} new" if params.max_tokens else "")
            raise InputError(
                f"The request needs {asked}, but the context limit is {self.max_model_len} tokens; "
                "shorten the prompt or max_tokens."
            )
        if params.stop and self.tokenizer is None:
            raise InputError("stop strings need a tokenizer, and this engine has none; use stop_token_ids.")
        seed = fresh_seed() if params.seed is None else params.seed
        return [
            Sequence(
                prompt,
                params,
                index=index,
                seed=seed,
                max_tokens=max_tokens,
                eos_ids=self.eos_ids,
                detokenizer=Detokenizer(self.tokenizer, skip_special_tokens=True) if self.tokenizer else None,
            )
            for index in range(params.n)
        ]

    def _check_memory(self, rows: list[Sequence]) -> None:
        """Refuses sequences whose cache could not be held if all of them ran to their last token."""
        weight = self.model.model.embed_tokens.weight
        sample = LatentCache(self.config, batch=1, capacity=1, dtype=weight.dtype, device="meta")
        tokens = _most_tokens(rows)
        needed, free = len(rows) * tokens * sample.bytes_per_token, available_bytes(weight.device)
        if free is not None and needed > free:
            raise InputError(
                f"{len(rows)} sequence(s) of up to {tokens:,} tokens need {needed / 1e9:,.2f} GB of cache, and "
                f"{free / 1e9:,.2f} GB are free; lower max_tokens, n or max_num_seqs."
            )

    def _decode(self, rows: list[Sequence]) -> TokenStream:
        """Runs sequences with prompts of one length to their ends, a token of each per step."""
        weight = self.model.model.embed_tokens.weight
        most = _most_tokens(rows)
        capacity = min(len(rows[0].prompt_ids) + FIRST_ROOM, most)
        cache = LatentCache(self.config, batch=len(rows), capacity=capacity, dtype=weight.dtype, device=weight.device)
        input_ids = [list(row.prompt_ids) for row in rows]
        while not all(row.done for row in rows):
            if cache.length + len(input_ids[0]) > cache.capacity:
                cache.grow(min(2 * cache.capacity, most))
            with self._step_lock:
                logits_BV = self._forward(input_ids, cache)
                version = self.version
            if not logits_BV.isfinite().all():
                raise CheckpointError(
                    f"The model (weights version {version}) gives NaN or infinite logits; look for the "
                    "damaged weight with load_model(directory, check_finite=True)."
                )
            deltas = [self._sample(row, logits_BV[b], version) for b, row in enumerate(rows) if not row.done]
            # A row that ended feeds its last token on until the others end; nobody reads what it computes.
            input_ids = [[row.deltas[-1].token_id] for row in rows]
            yield from deltas

    @torch.inference_mode()
    def _forward(self, input_ids: list[list[int]], cache: LatentCache) -> Tensor:
        """Appends tokens to the cache, long prompts in chunks; logits of the last position [B, V] on the CPU."""
        ids_BT = torch.tensor(input_ids, device=self.model.model.embed_tokens.weight.device)
        for chunk_BT in ids_BT.split(PREFILL_CHUNK, dim=1):
            output = self.model(chunk_BT, cache=cache, attention=self.attention, logits_to_keep=1)
        return output.logits[:, -1].cpu()

    def _sample(self, row: Sequence, logits_V: Tensor, version: int) -> TokenDelta:
        """The next token of one sequence."""
        allowed_V = logits_V
        if not row.may_stop and row.stop_ids:
            allowed_V = logits_V.clone()
            allowed_V[list(row.stop_ids)] = -torch.inf
        random = 0.0 if row.params.temperature == 0 else uniform(row.seed, row.index, row.position)
        token_id = sample_token(allowed_V, row.params, random)
        return row.append(token_id, *token_logprobs(logits_V, token_id, row.params.logprobs), version)


def _most_tokens(rows: list[Sequence]) -> int:
    """Tokens of the longest of the sequences if it ran to its last token; their prompts have one length."""
    return len(rows[0].prompt_ids) + max(row.max_tokens for row in rows)


def _batches(sequences: list[Sequence], limit: int) -> Iterator[list[Sequence]]:
    """Groups of at most `limit` sequences with prompts of one length, shorter prompts first."""
    by_length: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        by_length.setdefault(len(sequence.prompt_ids), []).append(sequence)
    for _, group in sorted(by_length.items()):
        for start in range(0, len(group), limit):
            yield group[start : start + limit]
