"""The losses of language-model training: next token, multi-token prediction, expert balance, indexer KL.

GLM-5 report, appendix A (weights as in GLM-4.5: MTP 0.3, sequence-level balance 1e-4); DeepSeek-V3.2 report, equations
3 and 4 for the indexer. Each is a mean over what the *step* counts: a micro-batch divides its sum by the `Counts` of
the whole step, so that the micro-batches of a step add up to the loss of one large batch. So do ranks: each gives the
summands of its rows, of its tokens of a row (`model.rows`, context parallel) and of its layers (pipeline).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5.data import IGNORED, Batch
from glm5.model import GLM5, LOGITS, ModelOutput, RouterRecord, by_pieces, without_head


@dataclass(frozen=True)
class Counts:
    """What the means of one step divide by: one vector, so that micro-batches and ranks are added at once."""

    values: Tensor
    """int64: rows, real tokens, next-token targets, then the targets of each draft step."""

    @property
    def rows(self) -> Tensor:
        return self.values[0]

    @property
    def tokens(self) -> Tensor:
        return self.values[1]

    def targets(self, ahead: int = 0) -> Tensor:
        """Targets of the next token (0) or of draft step `ahead - 1`."""
        return self.values[2 + ahead]


@dataclass(frozen=True)
class Loss:
    """What a stage's loss function gives the loop for a micro-batch: its share of the step's loss."""

    total: Tensor
    """The scalar to differentiate."""
    parts: dict[str, Tensor]
    """Detached scalars for the metrics, without their weights."""
    router: tuple[RouterRecord, ...] = ()
    """For the router-bias update."""


def count(batch: Batch, drafts: int) -> Counts:
    """The counts of a batch of which `drafts` draft steps are trained."""
    targets = [batch.targets_BT, *(mtp_targets(batch, step) for step in range(drafts))]
    rows = torch.tensor(len(batch.input_ids_BT), device=batch.input_ids_BT.device)
    tokens = (batch.segment_ids_BT >= 0).sum()
    return Counts(torch.stack([rows, tokens, *((part != IGNORED).sum() for part in targets)]))


def language_loss(
    model: GLM5,
    batch: Batch,
    counts: Counts | None = None,
    *,
    attention: str,
    mtp_weight: float = 0.0,
    balance_weight: float = 0.0,
    indexer_weight: float = 0.0,
    most: int = LOGITS,
) -> Loss:
    """next token + mtp_weight x MTP + balance_weight x balance + indexer_weight x KL of the indexers.

    most: logits that are held at once, of the trunk and all draft steps together (`glm5.model.head`).

    The KL has no gradient outside the indexers and the others none inside: the model detaches both (DSA report, 2.1.1).
    """
    drafts = model.mtp_steps if mtp_weight else 0
    counts = counts or count(batch, drafts)
    collect = {"router"} | ({"mtp"} if drafts and len(model.mtp) else set())
    collect |= {"indexer_kl"} if indexer_weight else set()
    output = model(
        batch.input_ids_BT, None, batch.segment_ids_BT, attention=attention,
        collect=without_head(model, batch.input_ids_BT, collect, most),
    )  # fmt: skip
    lm = None
    if output.logits.shape[-1]:  # in a pipeline the last stage alone has logits
        lm = token_loss(model, output, model.rows.part(batch.targets_BT), counts.targets(), most=most)
    total, parts = output.logits.new_zeros(()), {}
    for name, weight, found in (
        ("lm", 1.0, lm),
        ("mtp", mtp_weight, mtp_loss(model, output, batch, counts, most) if output.drafts else None),
        ("balance", balance_weight, balance_loss(output, counts) if output.router else None),
        ("indexer_kl", indexer_weight, kl_loss(model, output, batch, counts, drafts) if indexer_weight else None),
    ):
        if found is not None:
            total = total + weight * found
            parts[name] = found.detach()
    return Loss(total, parts, output.router)


def token_loss(
    model: GLM5, output: ModelOutput, targets_BT: Tensor, targets: Tensor, *, ahead: int = 0, most: int = LOGITS
) -> Tensor:
    """`next_token_loss` of the trunk (ahead = 0) or of draft step `ahead - 1`, with logits or with states."""
    if not output.states:
        return next_token_loss((output.logits, *output.mtp_logits)[ahead], targets_BT, targets)
    learnt_BT = targets_BT != IGNORED
    states_ND, targets_N = output.states[ahead][learnt_BT], targets_BT[learnt_BT]
    sums = by_pieces(model, states_ND, targets_N, nats, most, heads=len(output.states))
    return torch.stack(sums).sum() / targets.clamp(min=1)


def nats(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the targets that are not IGNORED."""
    return F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORED, reduction="sum")


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor, targets: Tensor | None = None) -> Tensor:
    """Cross-entropy in nats over the targets that are not IGNORED, divided by `targets` (default: their own number).

    0 when there is none.
    """
    total = nats(logits_BTV.flatten(0, 1), targets_BT.flatten())
    return total / ((targets_BT != IGNORED).sum() if targets is None else targets).clamp(min=1)


def mtp_targets(batch: Batch, step: int) -> Tensor:
    """Targets [B, T] of draft step `step`: token i + 2 + step at position i, where its document reaches so far."""
    shift = step + 1
    targets_BT = torch.full_like(batch.targets_BT, IGNORED)
    segments = batch.segment_ids_BT
    same = (segments[:, shift:] == segments[:, :-shift]) & (segments[:, :-shift] >= 0)
    targets_BT[:, :-shift] = torch.where(same, batch.targets_BT[:, shift:], IGNORED)
    return targets_BT


def mtp_loss(model: GLM5, output: ModelOutput, batch: Batch, counts: Counts, most: int = LOGITS) -> Tensor:
    """Mean over the draft steps of their cross-entropies."""
    losses = []
    for step in range(output.drafts):
        targets_BT = model.rows.part(mtp_targets(batch, step))
        losses.append(token_loss(model, output, targets_BT, counts.targets(step + 1), ahead=step + 1, most=most))
    return torch.stack(losses).mean()


def balance_loss(output: ModelOutput, counts: Counts) -> Tensor:
    """Sum over the sparse layers of the sequence-level balance term, each 1.0 where balance is perfect.

    A sum, because the published weight of 1e-4 belongs to the term of one layer. A mean over the rows.
    """
    total = torch.stack([record.balance for record in output.router]).sum()
    return total * (output.logits.shape[0] / counts.rows)


def kl_loss(model: GLM5, output: ModelOutput, batch: Batch, counts: Counts, drafts: int) -> Tensor:
    """Mean KL over the real tokens, and over the full-indexer layers and the MTP modules that `drafts` steps run.

    The mean is over the indexers of the whole model, also where only some are here (a stage of a pipeline).
    """
    indexers = model.config.indexer_types.count("full") + min(drafts, model.config.num_nextn_predict_layers)
    kl = torch.stack(list(output.indexer_kl.values())).sum() / indexers
    return kl * ((batch.segment_ids_BT >= 0).sum() / counts.tokens.clamp(min=1))
