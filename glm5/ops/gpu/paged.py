"""The two operations of a decoding step over a paged cache, by kernels; `glm5.ops.gpu.kernels` gives this file.

Neither waits for the GPU: choices stay there, and how much is launched follows from shapes.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from glm5.ops import selection
from glm5.ops.gpu.attention import attend_in_parts
from glm5.ops.gpu.scores import prompt_scores, scores
from glm5.ops.gpu.stored import Places, StoredRows

SCORES = 1 << 24
"""Scores alive at once: 64 MB, and some 400 MB of top-k beside them."""
FEW_QUERIES = 16
"""Up to this many queries of one sequence each read its keys anew, most of them from the cache of the GPU."""
PROGRAMS = 2
"""Programs per processor of the GPU that keep it busy."""


@torch.no_grad()
def select(q_THI: Tensor, w_TH: Tensor, keys: StoredRows, places: Places, k: int) -> Tensor:
    """Positions [T, K] (int64) of the k best keys that each query sees, ascending, -1 padded; the lowest wins a tie.

    q: indexer queries, fp32 or bf16, to which stored keys are rounded. w: scaled head weights in fp32.
    """
    q_THI, w_TH = q_THI.contiguous(), w_TH.contiguous()
    many = len(places.tables_RB) == 1 and len(q_THI) > FEW_QUERIES
    score, step = prompt_scores if many else scores, max(1, SCORES // places.longest)
    chosen = []
    with on(q_THI.device):
        for first in range(0, len(q_THI), step):
            part = slice(first, first + step)
            chosen.append(selection.top_positions(score(q_THI[part], w_TH[part], keys, places.part(part)), k))
    return torch.cat(chosen)


@torch.no_grad()
def attend(q_THC: Tensor, latents: StoredRows, selected_TK: Tensor, value_width: int, scale: float) -> Tensor:
    """Absorbed attention [T, H, value_width] over the slots that each query selected, -1 padded."""
    programs = 1
    if q_THC.device.type == "cuda":
        programs = PROGRAMS * torch.cuda.get_device_properties(q_THC.device).multi_processor_count
    with on(q_THC.device):
        return attend_in_parts(q_THC, latents, selected_TK, value_width, scale, programs=programs)


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton starts kernels on the current GPU, whatever GPU the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
