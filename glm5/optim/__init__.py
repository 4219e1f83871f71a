"""Optimisers: Muon Split and AdamW, learning-rate schedules, and the balance of the router."""

from glm5.optim.clip import clip_gradients
from glm5.optim.groups import OptimizerConfig, build_optimizers, set_rate
from glm5.optim.muon import Muon
from glm5.optim.router_balance import update_router_bias
from glm5.optim.schedules import Schedule, rate_at

__all__ = [
    "Muon",
    "clip_gradients",
    "OptimizerConfig",
    "Schedule",
    "build_optimizers",
    "rate_at",
    "set_rate",
    "update_router_bias",
]
