"""On-policy distillation from several teachers (GLM-5 report, 3.5): earlier stages teach what a later one forgot.

The student samples; the advantage of each token is sg(log pi_teacher - log pi_theta), and any policy loss takes it
(the report: that of reasoning RL). Each prompt has one teacher, by its environment; groups need only one rollout. The
teachers are judged by this project's forward pass, not by an engine, so there is no mismatch to mask on their side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glm5.errors import InputError
from glm5.model import GLM5
from glm5.rl.aids_config import EVERY
from glm5.rl.forward import PerExample, fixed_logprobs
from glm5.rl.packing import Example, Passes
from glm5.train.checks import check_numbers


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How the gap to the teacher counts: it is added to the advantage of the rollout (of the kind "none": alone)."""

    coefficient: float = 1.0
    """On the gap, in nats a token."""

    def __post_init__(self) -> None:
        check_numbers(self, "coefficient", above=0)


def teacher_logprobs(teachers: Mapping[str, GLM5], examples: Sequence[Example], passes: Passes) -> PerExample:
    """Under the teacher of each example's environment, or of every other one. Raises InputError where there is none."""
    by_environment: dict[str, list[Example]] = {}
    for example in examples:
        by_environment.setdefault(example.environment, []).append(example)
    found: PerExample = {}
    for environment, some in by_environment.items():
        teacher = teachers.get(environment, teachers.get(EVERY))
        if teacher is None:
            raise InputError(
                f"No teacher for the environment {environment!r}; there are teachers for {', '.join(sorted(teachers))}."
            )
        found |= fixed_logprobs(teacher, some, passes)
    return found
