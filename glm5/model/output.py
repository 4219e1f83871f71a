"""What a forward pass returns, and what it can be asked to replay."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

COLLECTABLE = frozenset({"hidden", "states", "mtp", "router", "selection", "indexer_kl", "indexer_recall"})
"""Names that `collect` accepts."""


@dataclass(frozen=True)
class RouterRecord:
    """What the router of one sparse layer did. Padding tokens count nowhere."""

    layer: int
    experts_BTK: Tensor
    """int64, chosen experts."""
    load_E: Tensor
    """How many tokens each expert received."""
    balance: Tensor
    """Sequence-level balance loss without its weight (DeepSeek-V3 report, equations 17-20); 1.0 is perfect balance."""


@dataclass(frozen=True)
class Replay:
    """Recorded choices that a forward pass uses instead of its own; layers that are not named choose freely."""

    experts: dict[int, Tensor] = field(default_factory=dict)
    """layer -> [B, T, K] int64, -1 for a token that chooses freely; the weights are computed anew from the scores."""
    positions: dict[int, Tensor] = field(default_factory=dict)
    """full-indexer layer -> [B, T, K] int64, padded with -1; the layers that share it follow."""


@dataclass(frozen=True)
class ModelOutput:
    """`logits` always; the other fields when `collect` names them. MTP modules count as layers after the trunk.

    With "states" the head is left to the caller, who applies `lm_head` to the states of the tokens that it needs.
    """

    logits: Tensor
    """[B, T or logits_to_keep, V]; with "states" [B, 0, V]."""
    hidden: Tensor | None = None
    """[B, T, D], the trunk state that multi-token prediction reads (`config.mtp_hidden`)."""
    mtp_logits: tuple[Tensor, ...] = ()
    """Per draft step j: [B, T, V]; position i predicts token i + 2 + j. None with "states"."""
    states: tuple[Tensor, ...] = ()
    """[B, T, D]: what the head reads, of the trunk and, with "mtp", of every draft step."""
    router: tuple[RouterRecord, ...] = ()
    selection: dict[int, Tensor] = field(default_factory=dict)
    """layer -> positions [B, T, K] that its attention saw, ascending, -1 padded."""
    indexer_kl: dict[int, Tensor] = field(default_factory=dict)
    """full-indexer layer -> mean KL over the real tokens and over the layers that share the indexer."""
    indexer_recall: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """full-indexer layer -> shares of the true top-k that its selection holds, of the positions and of their attention
    mass; a mean over the queries that see more than `index_topk` keys and over the layers that share the indexer."""

    @property
    def drafts(self) -> int:
        """Draft steps that were run."""
        return len(self.states[1:] if self.states else self.mtp_logits)
