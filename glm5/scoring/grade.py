"""What a grader says about one answer. The same grade is an evaluation's score and a reward's reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["correct", "incorrect", "not_attempted"]


@dataclass(frozen=True, slots=True)
class Grade:
    """The grade of one answer."""

    outcome: Outcome
    reason: str
    """One phrase for a person: what was found, what was expected."""
    extracted: str | None = None
    """The part of the response that was taken as the answer; None when there was none."""
    judged: bool = True
    """Whether somebody said that it is right or wrong; False where the outcome is no more than the sign of a number."""

    @property
    def correct(self) -> bool:
        """True for a correct answer only."""
        return self.outcome == "correct"
