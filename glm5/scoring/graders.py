"""Graders of short answers: the same text, or the same number. Plain functions of (response, expected answer).

A response may explain itself. The answer is taken from the last `\\boxed{...}`, else from the rest of the line
after the last "answer:" or "answer is", else from the whole response. A number is compared by value, exactly (as a
fraction): "0.50", "1/2" and "50%" are equal, "1,234" is 1234.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

from glm5.scoring.grade import Grade

_ANSWER = re.compile(r"\banswer\s*(?:is\b|:|=)\s*:?\s*([^\n]*)", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+(?![\d.]))?\s*%?|(?<![\w.])[-+−]?\.\d+\s*%?"
)
MAX_DIGITS = 400
"""Longer runs of digits are no answer; the bound keeps a hostile response from costing time."""


def grade_exact(response: str, answer: str) -> Grade:
    """Correct when the extracted answer is the expected text, but for case, spacing, and a final full stop."""
    found = extract_answer(response)
    if not _normalised(found):
        return Grade("not_attempted", "the response is empty")
    if _normalised(found) == _normalised(answer):
        return Grade("correct", "the expected text", found)
    return Grade("incorrect", f"found {_short(found)!r}, expected {_short(answer)!r}", found)


def grade_number(response: str, answer: str) -> Grade:
    """Correct when the last number of the extracted answer has the expected value.

    Raises `ValueError` when `answer` itself is not a number (a fault of the task, not of the response).
    """
    expected = parse_number(answer)
    if expected is None:
        raise ValueError(f"The expected answer {answer!r} is not a number.")
    numbers = _NUMBER.findall(extract_answer(response))
    if not numbers:
        return Grade("not_attempted", "no number in the answer")
    found = numbers[-1].strip()
    if parse_number(found) == expected:
        return Grade("correct", "the expected number", found)
    return Grade("incorrect", f"found {_short(found)}, expected {answer}", found)


def grade_fact(response: str, answers: Sequence[str]) -> Grade:
    """Correct for any of the expected texts; an answer that says it does not know was not attempted."""
    if abstains(response):
        return Grade("not_attempted", "it says that it does not know", extract_answer(response))
    grades = [grade_exact(response, answer) for answer in answers]
    return next((grade for grade in grades if grade.correct), grades[0])


def abstains(response: str) -> bool:
    """Whether an answer says that the model does not know."""
    return "don't know" in response.casefold().replace("’", "'")


def extract_answer(response: str) -> str:
    """The part of a response that states the answer (see the module's rule)."""
    boxed = _last_boxed(response)
    if boxed is not None:
        return boxed.strip()
    stated = [m for m in _ANSWER.findall(response) if m.strip()]
    return stated[-1].strip() if stated else response.strip()


def parse_number(text: str) -> Fraction | None:
    """The exact value of a text that is one number and nothing else; None otherwise."""
    text = text.strip()
    if len(text) > MAX_DIGITS or not _NUMBER.fullmatch(text):
        return None
    percent = text.endswith("%")
    plain = text.rstrip("% ").replace(",", "").replace("−", "-").replace(" ", "")
    try:
        value = Fraction(plain)
    except ZeroDivisionError:
        return None
    return value / 100 if percent else value


def _last_boxed(response: str) -> str | None:
    """The content of the last complete `\\boxed{...}`, braces balanced."""
    start = response.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for i in range(begin, len(response)):
        if response[i] == "}" and depth == 0:
            return response[begin:i]
        depth += (response[i] == "{") - (response[i] == "}")
    return None


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".").strip()


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
