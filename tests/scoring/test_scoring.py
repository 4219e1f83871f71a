"""Graders and intervals against hand-made cases and published numbers."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm5.scoring import Grade, accuracy, extract_answer, grade_exact, grade_number, parse_number, proportion


@pytest.mark.parametrize(
    ("response", "answer", "outcome"),
    [
        ("42", "42", "correct"),
        ("First 40, then 2 more.\nThe answer is 42.", "42", "correct"),
        ("The answer is 41, not 42", "42", "correct"),  # the last number of the stated line counts
        ("12 + 30 = 42", "42", "correct"),
        ("Answer: 1,234", "1234", "correct"),
        ("so \\boxed{\\text{}-7} or 3", "-7", "correct"),
        ("−7", "-7", "correct"),
        ("7", "-7", "incorrect"),
        ("0.50", "1/2", "correct"),
        ("50%", "0.5", "correct"),
        (".5", "0.5", "correct"),
        ("3/0", "3", "incorrect"),
        ("x42", "42", "not_attempted"),
        ("", "42", "not_attempted"),
        ("I do not know", "42", "not_attempted"),
        ("9" * 100_000, "42", "incorrect"),
        ("420", "42", "incorrect"),
    ],
)
def test_grade_number(response, answer, outcome):
    assert grade_number(response, answer).outcome == outcome


def test_grade_number_refuses_a_task_without_a_number():
    with pytest.raises(ValueError, match="not a number"):
        grade_number("1", "one")


@pytest.mark.parametrize(
    ("response", "outcome"),
    [("Paris", "correct"), ("  paris. ", "correct"), ("The answer is: PARIS", "correct"), ("\\boxed{Paris}", "correct"),
     ("London", "incorrect"), ("Paris, France", "incorrect"), (" . ", "not_attempted")],
)  # fmt: skip
def test_grade_exact(response, outcome):
    assert grade_exact(response, "Paris").outcome == outcome


def test_the_last_complete_box_wins_and_braces_nest():
    assert extract_answer("\\boxed{1} then \\boxed{a{b}c}") == "a{b}c"
    assert extract_answer("answer: 3\n\\boxed{unclosed") == "3"


@given(st.fractions(max_denominator=1000))
def test_a_printed_fraction_is_read_back(value):
    assert parse_number(str(value)) == value


@given(st.integers(-(10**12), 10**12))
def test_thousands_commas_are_read_back(value):
    assert parse_number(f"{value:,}") == Fraction(value)


@given(st.text())
def test_no_response_breaks_a_grader(text):
    assert grade_number(text, "42").outcome in ("correct", "incorrect", "not_attempted")
    assert grade_exact(text, "x").outcome in ("correct", "incorrect", "not_attempted")


def test_wilson_interval_equals_published_values():
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3: the score interval at 95%.
    for successes, total, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
                                        (1, 29, 0.0061, 0.1718), (29, 29, 0.8830, 1.0)]:  # fmt: skip
        interval = proportion(successes, total)
        assert interval.low == pytest.approx(low, abs=5e-5)
        assert interval.high == pytest.approx(high, abs=5e-5)


def test_accuracy_counts_unattempted_as_not_correct():
    grades = [Grade("correct", ""), Grade("incorrect", ""), Grade("not_attempted", "")]
    result = accuracy(grades)
    assert (result.correct, result.total) == (1, 3)
    assert "33.3%" in str(result)
    assert math.isnan(accuracy([]).value)
    with pytest.raises(ValueError, match="no share"):
        proportion(3, 2)
