"""Scoring: grades and metrics as typed data; no model inside."""

from glm5.scoring.accuracy import Accuracy, accuracy, proportion
from glm5.scoring.grade import Grade, Outcome
from glm5.scoring.graders import extract_answer, grade_exact, grade_number, parse_number

__all__ = ["Accuracy", "Grade", "Outcome", "accuracy", "extract_answer", "grade_exact", "grade_number", "parse_number",
           "proportion"]  # fmt: skip
