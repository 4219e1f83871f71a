"""Paired differences: the published interval, and what it says for few disagreements."""

import math

import pytest

from glm5.scoring import paired_difference


def test_by_hand():
    first = [True] * 50 + [False] * 10 + [True] * 4 + [False] * 36
    second = [True] * 50 + [True] * 10 + [False] * 4 + [False] * 36
    found = paired_difference(first, second)
    assert (found.value, found.gained, found.lost, found.total) == (0.06, 10, 4, 100)
    centre, spread = 6 / 102, math.sqrt(10.5 + 4.5 - 36 / 102) / 102
    assert found.low == pytest.approx(centre - 1.959964 * spread, abs=1e-6)
    assert found.high == pytest.approx(centre + 1.959964 * spread, abs=1e-6)


def test_no_disagreement_is_not_certainty():
    few, many = (paired_difference([True] * n, [True] * n) for n in (20, 200))
    assert few.value == many.value == 0
    assert few.low < -0.05 < many.low < 0


def test_pairs_must_match():
    with pytest.raises(ValueError, match="equal"):
        paired_difference([True], [True, False])
