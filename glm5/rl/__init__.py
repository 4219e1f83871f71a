"""Reinforcement learning: rollouts, losses, accounts, and the synchronous loop."""

from glm5.rl.advantages import group_advantages
from glm5.rl.loss import PolicyLoss, PolicyLossResult, PolicyTokens, token_weights
from glm5.rl.losses import IcePop
from glm5.rl.plain.ledger import Ledger
from glm5.rl.plain.loop import RLConfig, train_policy
from glm5.rl.plain.records import Group, Sample
from glm5.rl.plain.rollout import Sampler, Ticket
from glm5.rl.report import write_rl_report

__all__ = [
    "Group", "IcePop", "Ledger", "PolicyLoss", "PolicyLossResult", "PolicyTokens", "RLConfig", "Sample", "Sampler",
    "Ticket", "group_advantages", "token_weights", "train_policy", "write_rl_report",
]  # fmt: skip
