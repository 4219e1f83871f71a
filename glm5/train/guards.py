"""Steps that no healthy run has: a loss or gradient that is not finite, and a loss that jumps.

By choice the run stops with the number of the batch, or leaves the step out: weights, optimiser and router biases stay,
and the line in `metrics.jsonl` says so, which is all that a resumed run needs to do the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from glm5.errors import RunError

SPIKE_WINDOW = 20
LOWER_RATE = "start a new run with a lower learning rate"


def recent_losses(lines: Iterable[dict[str, Any]]) -> list[float]:
    """The losses that a spike is measured against: of the last steps that were taken."""
    return [line["loss"] for line in lines if "skipped" not in line][-SPIKE_WINDOW:]


def skipped_in_a_row(lines: Iterable[dict[str, Any]]) -> int:
    """Steps left out since the last one that was taken."""
    count = 0
    for line in lines:
        count = count + 1 if "skipped" in line else 0
    return count


def trouble_with(
    loss: float, grad_norms: dict[str, float], recent: list[float], spike_factor: float | None
) -> str | None:
    """What is wrong with a step, or None: `loss is nan`, `gradient norm is inf`, `loss jumped to ...`."""
    if not math.isfinite(loss):
        return f"loss is {loss}"
    for norm in grad_norms.values():
        if not math.isfinite(norm):
            return f"gradient norm is {norm}"
    if spike_factor and len(recent) == SPIKE_WINDOW and loss > spike_factor * statistics.median(recent):
        return f"loss jumped to {loss:.3f} from a median of {statistics.median(recent):.3f}"
    return None


def unhealthy(trouble: str, stage: str, step: int, seed: int, skipped: int = 0) -> RunError:
    """The error that names the batch behind such a step, and the ways on; `skipped` steps before it were left out."""
    remedy = f"resume with on_spike='skip' to leave such steps out, or {LOWER_RATE}"
    if skipped:
        trouble = f"{trouble} (the {skipped} steps before it were left out)"
        remedy = f"resume with spike_factor=None if that is the level of this data, or {LOWER_RATE}"
    elif "jumped" in trouble:
        remedy = f"resume with spike_factor=None to let it pass, or on_spike='skip' to leave it out, or {LOWER_RATE}"
    return RunError(
        f"The {trouble} at step {step} of {stage}, before the weights changed. The batch is number {step} of seed "
        f"{seed} (`glm5 train --replay-step {step}` shows it); look at it, then {remedy}."
    )
