"""`GLM5`: embedding, decoder layers, output head and MTP modules, with the forward pass that everything else calls.

Single-device code on tensors only; parallelism, training and serving are laid over it elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm5.config import ModelConfig
from glm5.errors import InputError
from glm5.model.cache import Cache, LatentCache
from glm5.model.checks import check_attention, check_collect, check_ids, check_replay, check_shapes
from glm5.model.decode import Decoder
from glm5.model.fast_steps import FastSteps
from glm5.model.initialization import initialize_
from glm5.model.layer import DecoderLayer, MTPModule
from glm5.model.mla import Pass
from glm5.model.output import ModelOutput, Replay, RouterRecord
from glm5.model.rows import Rows, WholeRows
from glm5.ops.linear import Linear
from glm5.ops.norm import RMSNorm
from glm5.ops.rotary import rotation
from glm5.ops.spans import Spans, plain_spans, segment_spans

CHUNK = 8192
"""Tokens of a prefill that run at once when no gradient is wanted."""


def keeps_fp32(name: str) -> bool:
    """Whether a tensor stays in fp32 when the model is stored in bf16."""
    return name.endswith(("e_score_correction_bias", "indexer.weights_proj.weight"))


class Trunk(nn.Module):
    """Embedding, layers and final norm, named as in the published checkpoints."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        # Built from an empty weight: nn.Embedding would otherwise draw random numbers that are thrown away.
        weight = torch.empty(config.vocab_size, config.hidden_size, **place)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, mlp_type=mlp_type, indexer_type=indexer_type, **place)
            for i, (mlp_type, indexer_type) in enumerate(zip(config.mlp_layer_types, config.indexer_types, strict=True))
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **place)


class GLM5(nn.Module):
    """The model. On the meta device nothing is allocated or initialised."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        where = None if device is None else torch.device(device)
        self.model = Trunk(config, dtype=dtype, device=where)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype, device=where)
        layers = config.num_hidden_layers
        self.mtp = nn.ModuleList(
            MTPModule(config, layers + i, dtype=dtype, device=where) for i in range(config.num_nextn_predict_layers)
        )
        self.mtp_steps = len(self.mtp)
        """Draft steps that `collect={"mtp"}` runs; the last module serves every further step."""
        self.rows: Rows = WholeRows()
        """Which tokens of the rows it is given this process computes."""
        self._fast_steps = FastSteps()
        if not self.lm_head.weight.is_meta:
            initialize_(self, config.initializer_range)

    def forward(
        self,
        input_ids_BT: Tensor,
        positions_BT: Tensor | None = None,
        segment_ids_BT: Tensor | None = None,
        *,
        cache: Cache | None = None,
        attention: str = "sparse",
        collect: frozenset[str] | set[str] = frozenset(),
        replay: Replay | None = None,
        logits_to_keep: int = 0,
    ) -> ModelOutput:
        """Next-token logits of every token, or of the last `logits_to_keep`.

        input_ids_BT: int64 [B, T]. positions_BT: rotary positions; by default each token's index in its segment.
        segment_ids_BT: int64; tokens attend within their own contiguous segment; negative ids are padding (its outputs
        mean nothing). cache: earlier tokens; the new ones are appended. attention: "sparse" (top-k of the indexer) or
        "dense". collect: names of `ModelOutput` fields to fill ("hidden", "states", "mtp", "router", "selection",
        "indexer_kl", "indexer_recall").
        replay: recorded experts and positions to use. Raises InputError for inputs that cannot be run.
        """
        wanted = frozenset(collect)
        check_ids(self.config, input_ids_BT)
        check_shapes(input_ids_BT, positions=positions_BT, segment_ids=segment_ids_BT)
        check_attention(attention)
        check_collect(wanted, has_mtp=len(self.mtp) > 0, has_cache=cache is not None)
        if logits_to_keep < 0:
            raise InputError(f"logits_to_keep is {logits_to_keep}; give 0 for all positions or a positive number.")
        sparse, whole = attention == "sparse", isinstance(self.rows, WholeRows)
        if whole and positions_BT is None and segment_ids_BT is None and replay is None and not wanted:
            logits_BTV = self._fast_steps.logits(self, self.config, input_ids_BT, cache, sparse)
            if logits_BTV is not None:
                return ModelOutput(logits=logits_BTV)
        unasked = wanted <= {"states"} and not (torch.is_grad_enabled() or replay)
        if input_ids_BT.shape[1] > CHUNK and whole and unasked:
            return self._in_chunks(input_ids_BT, positions_BT, segment_ids_BT, cache, sparse, logits_to_keep, wanted)
        return self._run(input_ids_BT, positions_BT, segment_ids_BT, cache, sparse, logits_to_keep, wanted, replay)

    def decoder(self, tokens: int) -> Decoder | None:
        """What runs so many tokens at once faster than the modules would, if there is such a thing."""
        return self._fast_steps.decoder(self, self.config, tokens) if self._plain() else None

    def exact_decoder(self) -> Decoder | None:
        """What computes every token by the same instructions in any company, if there is such a thing."""
        return self._fast_steps.exact_decoder(self, self.config) if self._plain() else None

    def _plain(self) -> bool:
        """Whether a pass is `forward` and nothing else: of whole rows, with no hook that waits for it."""
        own = type(self) is GLM5 and "forward" not in self.__dict__
        return own and isinstance(self.rows, WholeRows) and not (self._forward_hooks or self._forward_pre_hooks)

    def _in_chunks(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor | None,
        segments_BT: Tensor | None,
        cache: Cache | None,
        sparse: bool,
        logits_to_keep: int,
        collect: frozenset[str],
    ) -> ModelOutput:
        """A long prefill, chunk after chunk through the cache: beside it, memory holds one chunk's activations."""
        batch, tokens = ids_BT.shape
        if cache is None:
            weight = self.lm_head.weight
            cache = LatentCache(self.config, batch=batch, capacity=tokens, dtype=weight.dtype, device=weight.device)
        start, first_kept = cache.length, tokens - (logits_to_keep or tokens)
        outputs = []
        try:
            for i in range(0, tokens, CHUNK):
                part = slice(i, min(i + CHUNK, tokens))
                positions, segments = (None if x is None else x[:, part] for x in (positions_BT, segments_BT))
                keep = part.stop - max(first_kept, i)
                out = self._run(ids_BT[:, part], positions, segments, cache, sparse, max(keep, 1), collect)
                if keep > 0:
                    outputs.append(out)
        except BaseException:
            cache.truncate(start)  # an interrupted prefill leaves the cache as it was
            raise
        states = (torch.cat([out.states[0] for out in outputs], dim=1),) if "states" in collect else ()
        return ModelOutput(logits=torch.cat([out.logits for out in outputs], dim=1), states=states)

    def _run(
        self,
        input_ids_BT: Tensor,
        positions_BT: Tensor | None,
        segment_ids_BT: Tensor | None,
        cache: Cache | None,
        sparse: bool,
        logits_to_keep: int,
        collect: frozenset[str] = frozenset(),
        replay: Replay | None = None,
    ) -> ModelOutput:
        """One pass over checked inputs."""
        h_BTD = self.model.embed_tokens(self.rows.part(input_ids_BT))
        h_BTD, run, records = self.run_layers(
            h_BTD, input_ids_BT, positions_BT, segment_ids_BT, cache, sparse, collect, replay
        )
        return self.finish(h_BTD, input_ids_BT, run, records, logits_to_keep)

    def run_layers(
        self,
        h_BTD: Tensor,
        input_ids_BT: Tensor,
        positions_BT: Tensor | None,
        segment_ids_BT: Tensor | None,
        cache: Cache | None,
        sparse: bool,
        collect: frozenset[str],
        replay: Replay | None,
    ) -> tuple[Tensor, Pass, list[RouterRecord | None]]:
        """The state after the layers, with what they left behind."""
        spans = _spans(input_ids_BT, positions_BT, segment_ids_BT, cache)
        if replay:
            check_replay(self.config, replay, spans)
        run = self._pass(h_BTD.dtype, spans, cache, sparse, collect, replay or Replay())
        records: list[RouterRecord | None] = []
        for layer in self.model.layers:
            h_BTD, record = layer(h_BTD, run)
            records.append(record)
        return h_BTD, run, records

    def finish(
        self,
        h_BTD: Tensor,
        input_ids_BT: Tensor,
        run: Pass,
        records: list[RouterRecord | None],
        logits_to_keep: int = 0,
    ) -> ModelOutput:
        """From the last layer's state to everything that `run` was asked for; `records` are the layers' so far."""
        normed_BTD = self.model.norm(h_BTD)
        state_BTD = normed_BTD if self.config.mtp_hidden == "after_norm" else h_BTD

        headless = "states" in run.collect  # then the head is the caller's to apply
        drafts: list[Tensor] = []
        if "mtp" in run.collect:
            draft_BTD = state_BTD
            for step in range(self.mtp_steps):
                next_BT = F.pad(input_ids_BT[:, step + 1 :], (0, min(step + 1, input_ids_BT.shape[1])))
                next_BTD = self.model.embed_tokens(self.rows.part(next_BT))
                draft_BTD, record = self._module(step).draft(draft_BTD, next_BTD, run)
                records.append(record)
                drafts.append(draft_BTD if headless else self.lm_head(draft_BTD))
        if run.cache is not None:
            run.cache.commit()
        nothing_BTV = normed_BTD.new_empty(len(normed_BTD), 0, self.config.vocab_size)
        return ModelOutput(
            logits=nothing_BTV if headless else self.lm_head(normed_BTD[:, -logits_to_keep:]),
            hidden=state_BTD if "hidden" in run.collect else None,
            mtp_logits=() if headless else tuple(drafts),
            states=(normed_BTD, *drafts) if headless else (),
            router=tuple(record for record in records if record is not None),
            selection=run.selection,
            indexer_kl=self.mean_kl(run),
            indexer_recall={layer: _mean_pairs(pairs) for layer, pairs in run.recall_terms.items()},
        )

    def mean_kl(self, run: Pass) -> dict[int, Tensor]:
        """Per full-indexer layer the mean over its terms; of rows cut over processes, this one's summand."""
        if not run.kl_terms:
            return {}
        queries = run.spans.valid_BT.sum()
        share = queries.clamp_min(1) / self.rows.total(queries).clamp_min(1)
        return {layer: torch.stack(terms).mean() * share for layer, terms in run.kl_terms.items()}

    def draft(
        self,
        hidden_BTD: Tensor,
        next_ids_BT: Tensor,
        positions_BT: Tensor | None = None,
        *,
        step: int = 0,
        cache: Cache | None = None,
        attention: str = "sparse",
        logits_to_keep: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """One draft step: state of token i and token i + 1 give state [B, T, D] and logits [B, T, V] of token i + 2.

        The state goes into the next step. `cache` holds the rows of the MTP modules (`layers=draft_layers(config)`).
        logits_to_keep: of how many last tokens; 0 for all.
        """
        if not self.mtp:
            raise InputError("This model has no MTP module; load one with num_nextn_predict_layers of at least 1.")
        check_ids(self.config, next_ids_BT)
        check_shapes(next_ids_BT, positions=positions_BT)
        check_attention(attention)
        if hidden_BTD.shape != (*next_ids_BT.shape, self.config.hidden_size):
            raise InputError(
                f"hidden states have shape {list(hidden_BTD.shape)}, next ids {list(next_ids_BT.shape)}; "
                f"give one state of {self.config.hidden_size} values per id."
            )
        spans = _spans(next_ids_BT, positions_BT, None, cache)
        run = self._pass(hidden_BTD.dtype, spans, cache, attention == "sparse", frozenset(), Replay())
        state_BTD, _ = self._module(step).draft(hidden_BTD, self.model.embed_tokens(next_ids_BT), run)
        if cache is not None:
            cache.commit()
        return state_BTD, self.lm_head(state_BTD[:, -logits_to_keep:])

    def _module(self, step: int) -> MTPModule:
        module = self.mtp[min(step, len(self.mtp) - 1)]
        assert isinstance(module, MTPModule)
        return module

    def _pass(
        self,
        dtype: torch.dtype,
        spans: Spans,
        cache: Cache | None,
        sparse: bool,
        collect: frozenset[str],
        replay: Replay,
    ) -> Pass:
        c, part = self.config, self.rows.part
        spans = self.rows.spans(spans)
        replay = Replay(*({i: part(x) for i, x in kept.items()} for kept in (replay.experts, replay.positions)))
        tables = {
            layout: rotation(spans.positions_BT, c.qk_rope_head_dim, c.rope_theta, dtype, interleaved=layout)
            for layout in {c.rope_interleave, c.indexer_rope_interleave}
        }
        return Pass(
            spans=spans,
            rotation=tables[c.rope_interleave],
            indexer_rotation=tables[c.indexer_rope_interleave],
            sparse=sparse,
            collect=collect,
            replay=replay,
            cache=cache,
            rows=self.rows,
        )


def _mean_pairs(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    firsts, seconds = zip(*pairs, strict=True)
    return torch.stack(firsts).mean(), torch.stack(seconds).mean()


def _spans(ids_BT: Tensor, positions_BT: Tensor | None, segments_BT: Tensor | None, cache: Cache | None) -> Spans:
    batch, tokens = ids_BT.shape
    if cache is not None:
        return cache.reserve(batch, tokens, segments_BT, positions_BT)
    if segments_BT is None:
        return plain_spans(batch, tokens, 0, positions_BT, ids_BT.device)
    return segment_spans(segments_BT, tokens, positions_BT)
