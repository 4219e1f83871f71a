"""Additive increase, multiplicative decrease, on observed numbers."""

import pytest

from glm5.errors import ConfigError
from glm5.rl.admission import SchedulerConfig
from glm5.rl.concurrency import ConcurrencyConfig, Load, next_limit

CONFIG = ConcurrencyConfig(least=8, most=64, increase=8, decrease=0.5)
SCHEDULER = SchedulerConfig(groups_per_batch=4)


def after(limit, **load):
    return next_limit(CONFIG, SCHEDULER, limit, Load(**load))


@pytest.mark.parametrize(
    ("load", "limit"),
    [
        ({"running": 32, "trainer_idle": 0.5}, 40),
        ({"running": 31, "trainer_idle": 0.5}, 32),  # something else binds
        ({"running": 32}, 32),
        ({"running": 32, "ready": 4}, 32),
        ({"running": 32, "ready": 5}, 24),
        ({"running": 32, "trainer_idle": 0.5, "cache_used": 0.97}, 16),
        ({"running": 32, "trainer_idle": 0.5, "preemptions": 1}, 16),
        ({"running": 32, "trainer_idle": 0.5, "waiting": 9}, 16),
        ({"running": 32, "trainer_idle": 0.5, "waiting": 8}, 40),
    ],
)
def test_rules(load, limit):
    assert after(32, **load) == limit


def test_bounds():
    assert after(60, running=60, trainer_idle=1.0) == 64
    assert after(9, running=9, preemptions=1) == 8 and after(8, running=8, ready=9) == 8
    with pytest.raises(ConfigError, match="least <= most"):
        ConcurrencyConfig(least=9, most=8)


def test_two_runs_that_share_engines_become_equal():
    """The reason for this rule: from any start, taking turns at one capacity of 80 evens the limits out."""
    wide = ConcurrencyConfig(least=1, most=1000, increase=2, decrease=0.5)
    limits = [70, 4]
    for _ in range(200):
        crowded = sum(limits) > 80
        limits = [
            next_limit(wide, SCHEDULER, n, Load(running=n, trainer_idle=1.0, preemptions=int(crowded))) for n in limits
        ]
    assert abs(limits[0] - limits[1]) <= 4 and 40 <= sum(limits) <= 84
