"""The losses of language-model training: next token, multi-token prediction, expert balance.

GLM-5 report, appendix A (weights as in GLM-4.5: MTP 0.3, sequence-level balance 1e-4). Each is a mean over the
positions that the batch marks as targets. Left out: sums over micro-batches and
ranks (every batch here is one forward pass).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5.data import IGNORED, Batch
from glm5.model import ModelOutput, RouterRecord


@dataclass(frozen=True)
class Loss:
    """What a stage's loss function gives the loop."""

    total: Tensor
    """The scalar to differentiate."""
    parts: dict[str, Tensor]
    """Detached scalars for the metrics, without their weights."""
    router: tuple[RouterRecord, ...] = ()
    """For the router-bias update."""


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the targets that are not IGNORED; 0 when there is none."""
    total = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (targets_BT != IGNORED).sum().clamp(min=1)


def mtp_targets(batch: Batch, step: int) -> Tensor:
    """Targets [B, T] of draft step `step`: token i + 2 + step at position i, where its document reaches so far."""
    shift = step + 1
    targets_BT = torch.full_like(batch.targets_BT, IGNORED)
    segments = batch.segment_ids_BT
    same = (segments[:, shift:] == segments[:, :-shift]) & (segments[:, :-shift] >= 0)
    targets_BT[:, :-shift] = torch.where(same, batch.targets_BT[:, shift:], IGNORED)
    return targets_BT


def mtp_loss(output: ModelOutput, batch: Batch) -> Tensor:
    """Mean over the draft steps of their cross-entropies."""
    losses = [next_token_loss(logits, mtp_targets(batch, step)) for step, logits in enumerate(output.mtp_logits)]
    return torch.stack(losses).mean()


def balance_loss(output: ModelOutput) -> Tensor:
    """Sum over the sparse layers of the sequence-level balance term, each 1.0 where balance is perfect.

    A sum, because the published weight of 1e-4 belongs to the term of one layer.
    """
    return torch.stack([record.balance for record in output.router]).sum()
