"""Whether to draft, from made-up times."""

from collections import Counter

from glm5.engine.pace import PERIOD, TRIES, Pace


def chosen(pace: Pace, seconds: dict[bool, float], sequences: int, steps: int) -> Counter:
    """How often each way was taken, if a token takes `seconds`."""
    found: Counter = Counter()
    for _ in range(steps):
        drafting = pace.wanted(sequences)
        found[drafting] += 1
        pace.took(drafting, sequences, seconds[drafting] * 2 * sequences, 2 * sequences)
    return found


def test_the_cheaper_way_is_taken_and_the_other_tried_now_and_then():
    for best in (True, False):
        pace = Pace()
        found = chosen(pace, {best: 1.0, not best: 1.5}, 3, 10 * PERIOD)
        assert TRIES * 9 <= found[not best] <= TRIES * 11
        assert pace.seconds_per_token(best, 3) == 1.0


def test_both_ways_are_measured_first_drafting_before():
    pace = Pace()
    first = []
    for _ in range(2 * TRIES):
        first.append(pace.wanted(1))
        pace.took(first[-1], 1, 1.0, 1)
    assert first == [True] * TRIES + [False] * TRIES


def test_a_change_is_noticed():
    pace = Pace()
    chosen(pace, {True: 1.0, False: 2.0}, 1, 4 * PERIOD)
    found = chosen(pace, {True: 3.0, False: 2.0}, 1, 10 * PERIOD)
    assert found[False] > found[True]


def test_batches_of_other_sizes_are_judged_by_themselves():
    pace = Pace()
    one = chosen(pace, {True: 1.0, False: 2.0}, 1, 4 * PERIOD)
    many = chosen(pace, {True: 2.0, False: 1.0}, 20, 4 * PERIOD)
    assert one[True] > one[False] and many[False] > many[True]
    assert pace.seconds_per_token(True, 5) is None
