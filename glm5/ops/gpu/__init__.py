"""Kernels for CUDA GPUs, in Triton: what the engine reads of a paged cache, read where it lies. Chosen here only.

`scores.py` scores indexer keys, `attention.py` attends to selected latents; both read a pool's rows in its own format
(`rows.py`). They were compared with `reference` in Triton's interpreter and compiled ahead of time for sm_80, sm_90 and
sm_100 (`tests/ops/test_gpu_kernels.py`); no GPU ran them. Where they are not taken, PyTorch's operators do the same.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Protocol

import torch
from torch import Tensor

from glm5.config import ModelConfig
from glm5.ops.gpu.stored import GROUP, Places, StoredRows

SWITCH = "GLM5_GPU_KERNELS"
"""Environment variable: 0 leaves everything to PyTorch's operators."""


class Kernels(Protocol):
    """What the engine asks of `paged.py`, which has the contracts."""

    def select(self, q_THI: Tensor, w_TH: Tensor, keys: StoredRows, places: Places, k: int) -> Tensor:
        """Positions [T, K] of the k best keys."""

    def attend(self, q_THC: Tensor, latents: StoredRows, selected_TK: Tensor, value_width: int, scale: float) -> Tensor:
        """Attention [T, H, value_width] over selected slots."""


def kernels(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """The kernels, where this model in this dtype can use them on this device; else None."""
    if not (fits(config, dtype) and runs_on(device)):
        return None
    from glm5.ops.gpu import paged  # Triton is optional, and slow to import

    return paged


def fits(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether the kernels know the dtype and the widths: an fp8 latent's values end where a group of scales does."""
    one_group = config.kv_lora_rank + config.qk_rope_head_dim <= GROUP
    return dtype in (torch.float32, torch.bfloat16) and (one_group or config.kv_lora_rank % GROUP == 0)


def runs_on(device: torch.device) -> bool:
    """Whether Triton has kernels for this device: an NVIDIA GPU from sm_80 on, unless `SWITCH` forbids them."""
    if device.type != "cuda" or torch.version.hip or importlib.util.find_spec("triton") is None:
        return False
    return os.environ.get(SWITCH) != "0" and torch.cuda.get_device_capability(device) >= (8, 0)
