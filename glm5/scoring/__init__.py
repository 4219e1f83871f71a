"""Scoring: grades and metrics as typed data; no model inside."""

from glm5.scoring.accuracy import Accuracy, accuracy, proportion
from glm5.scoring.grade import Grade, Outcome
from glm5.scoring.graders import (
    MAX_DIGITS,
    abstains,
    extract_answer,
    grade_exact,
    grade_fact,
    grade_number,
    parse_number,
)
from glm5.scoring.paired import PairedDifference, paired_difference

__all__ = ["MAX_DIGITS", "Accuracy", "Grade", "Outcome", "PairedDifference", "abstains", "accuracy", "extract_answer",
           "grade_exact", "grade_fact", "grade_number", "paired_difference", "parse_number", "proportion"]  # fmt: skip
