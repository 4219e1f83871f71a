"""Policy losses, one file each, all callables of `PolicyTokens`; docs/rl-losses.md compares them."""

from glm5.rl.losses.ddis import DDIS
from glm5.rl.losses.icepop import IcePop

AnyLoss = DDIS | IcePop
"""What a configuration may name."""

__all__ = ["DDIS", "AnyLoss", "IcePop"]
