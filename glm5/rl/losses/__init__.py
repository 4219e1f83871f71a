"""Policy losses, one file each, all callables of `PolicyTokens`; docs/rl-losses.md compares them."""

from glm5.rl.losses.cispo import CISPO
from glm5.rl.losses.ddis import DDIS
from glm5.rl.losses.decoupled import DecoupledPPO
from glm5.rl.losses.dppo import DPPO
from glm5.rl.losses.gspo import GSPO
from glm5.rl.losses.icepop import IcePop
from glm5.rl.losses.opsm import OPSM
from glm5.rl.losses.ppo import PPO
from glm5.rl.losses.reinforce import Reinforce
from glm5.rl.losses.tis import TIS

AnyLoss = DDIS | IcePop | PPO | DecoupledPPO | TIS | CISPO | GSPO | DPPO | OPSM | Reinforce
"""What a configuration may name."""

__all__ = ["CISPO", "DDIS", "DPPO", "GSPO", "OPSM", "PPO", "TIS", "AnyLoss", "DecoupledPPO", "IcePop", "Reinforce"]
