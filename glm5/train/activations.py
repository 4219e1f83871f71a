"""Activation checkpointing, laid over the model from outside: a layer keeps its input, and runs again going backward.

Chen et al. 2016 (arXiv 1604.06174). A layer here also reads and writes the `Pass` that goes from layer to layer (the
selection that IndexShare layers take over, the KL terms): both runs are given a copy of what the layer found, so that
the second run finds what the first one found and changes nothing. Gradients equal those without it, to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from glm5.model import GLM5
from glm5.model.layer import DecoderLayer
from glm5.model.mla import Pass
from glm5.model.output import RouterRecord


def checkpoint_layers(model: GLM5) -> None:
    """Makes every decoder layer and MTP module of `model` recompute its activations; once is enough."""
    for layer in [*model.model.layers, *model.mtp]:
        assert isinstance(layer, DecoderLayer)
        layer.forward = _recomputing(type(layer).forward.__get__(layer))  # type: ignore[method-assign, assignment]


def _recomputing(forward: Callable[[Tensor, Pass], Any]) -> Callable[[Tensor, Pass], Any]:
    def run_layer(h_BTD: Tensor, run: Pass) -> tuple[Tensor, RouterRecord | None]:
        if not torch.is_grad_enabled():
            return forward(h_BTD, run)
        found = copy.copy(run)

        def compute(h_BTD: Tensor) -> tuple[Tensor, RouterRecord | None, Pass]:
            mine = copy.copy(found)
            mine.selection, mine.kl_terms = {}, {}
            h_BTD, record = forward(h_BTD, mine)
            return h_BTD, record, mine

        h_BTD, record, after = checkpoint(compute, h_BTD, use_reentrant=False, preserve_rng_state=False)
        run.full_layer, run.index, run.selected_BTK = after.full_layer, after.index, after.selected_BTK
        run.selection.update(after.selection)
        for layer, terms in after.kl_terms.items():
            run.kl_terms.setdefault(layer, []).extend(terms)
        return h_BTD, record

    return run_layer
