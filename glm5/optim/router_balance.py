"""Loss-free load balance of the experts: the router's correction bias follows the load, outside the gradient.

Wang et al. 2024 (arXiv 2408.15664), used by DeepSeek-V3 and GLM-5: after a step, the bias of an overloaded expert falls
by a fixed rate and that of an underloaded one rises. The bias takes part in the choice of experts only, never in their
weights. GLM-5 uses 0.001 for the first 15T tokens, then 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def update_router_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> None:
    """Moves `bias_E` in place by `rate` towards an even load.

    `load_E` counts the tokens that chose each expert since the last update, over all micro-batches and ranks.
    """
    bias_E.add_(torch.sign(load_E.mean() - load_E).to(bias_E.dtype), alpha=rate)
