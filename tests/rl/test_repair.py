"""Repair and filter of groups, and the admission formula, by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm5.errors import ConfigError
from glm5.rl.admission import SchedulerConfig, room
from glm5.rl.repair import enough, repeated, uniform


def test_exactly_half_is_not_enough():
    assert [enough(n, 8, "repeat") for n in range(9)] == [False] * 5 + [True] * 4
    assert [enough(n, 7, "repeat") for n in range(8)] == [False] * 4 + [True] * 4
    assert [enough(n, 3, "never") for n in range(4)] == [False, False, False, True]


def test_repeats_go_round_in_sample_order():
    assert repeated([6, 1, 3], 5) == ((1, 2), (3, 2), (6, 1))
    assert repeated([0, 1, 2, 3], 4) == ((0, 1), (1, 1), (2, 1), (3, 1))


@given(st.sets(st.integers(0, 40), min_size=1), st.integers(1, 60))
def test_the_weights_are_those_of_a_list_filled_up(valid, size):
    size = max(size, len(valid))
    filled = [sorted(valid)[i % len(valid)] for i in range(size)]
    assert dict(repeated(list(valid), size)) == {sample: filled.count(sample) for sample in valid}


def test_uniform_groups_are_named():
    assert uniform([1.0, 1.0]) == "all right" and uniform([0.0, 0.0, 0.0]) == "all wrong"
    assert uniform([-1.0, -1.0]) == "all wrong"
    assert uniform([1.0, 0.5]) is None and uniform([0.0]) is None and uniform([]) is None


def test_admission_is_areals_formula():
    config = SchedulerConfig(groups_per_batch=4, max_staleness=2)
    assert room(config, step=0, published=0, open=0, accepted=0, begun=0) == 12  # (2 + 0 + 1) * 4
    assert room(config, step=3, published=2, open=3, accepted=1, begun=9) == 4  # (2 + 2 + 1) * 4 - 12 trained - 4
    sync = SchedulerConfig(mode="sync", groups_per_batch=4)
    assert room(sync, step=1, published=0, open=0, accepted=0, begun=0) == 0
    assert room(sync, step=1, published=1, open=1, accepted=1, begun=3) == 1
    one_off = SchedulerConfig(mode="one-step-off", groups_per_batch=4, refill=True)
    assert room(one_off, step=1, published=0, open=1, accepted=1, begun=3) == 2
    assert room(one_off, step=2, published=0, open=0, accepted=0, begun=0) == 0


def test_weights_must_be_published_before_the_batches_run_out():
    SchedulerConfig(max_staleness=3, publish_every=4)
    with pytest.raises(ConfigError, match="only 4 batches"):
        SchedulerConfig(max_staleness=3, publish_every=5)
    with pytest.raises(ConfigError, match="one-step-off"):
        SchedulerConfig(mode="one-step-of")
