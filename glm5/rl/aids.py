"""What a learner may have beside the model that it trains: other models, other data, and what it is measured by.

None of it is state: a run that is resumed is given the same again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from glm5.model import GLM5
from glm5.rl.retention import Retention
from glm5.train.loop import BatchSource


@dataclass(frozen=True, kw_only=True)
class Aids:
    """Everything is optional."""

    reference: GLM5 | None = None
    """What the KL term holds the policy to; by default the model as the learner is given it."""
    teachers: Mapping[str, GLM5] = field(default_factory=dict)
    """For distillation, by the name of the environment."""
    replay: BatchSource | None = None
    """Batches of earlier stages: number `version * updates + i` goes with update i of a batch."""
    retention: Retention | None = None
    """Measures that join the metrics of the step that begins with the weights which they are of."""
