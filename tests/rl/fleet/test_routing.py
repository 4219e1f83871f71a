"""Placement of sessions: even, sticky, and with little movement when an engine comes or goes."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm5.rl.fleet.routing import SIBLINGS, SLACK, Ring, Router

SESSIONS = [f"env/{task}/0/{sample}" for task in range(500) for sample in range(8)]


def router_of(names):
    router = Router()
    for name in names:
        router.ring.add(name)
    return router


@pytest.mark.parametrize("count", [2, 3, 8])
def test_sessions_spread_evenly(count):
    ring = Ring()
    for seat in range(count):
        ring.add(str(seat))
    shares = Counter(ring.order(session)[0] for session in SESSIONS)
    assert max(shares.values()) < 1.35 * len(SESSIONS) / count and min(shares.values()) > 0.65 * len(SESSIONS) / count


def test_only_the_sessions_of_an_engine_that_leaves_move_and_they_come_back():
    ring = Ring()
    for seat in range(5):
        ring.add(str(seat))
    before = {session: ring.order(session)[0] for session in SESSIONS}
    ring.remove("3")
    after = {session: ring.order(session)[0] for session in SESSIONS}
    assert {s for s in SESSIONS if before[s] != after[s]} == {s for s in SESSIONS if before[s] == "3"}
    heirs = Counter(after[s] for s in SESSIONS if before[s] == "3")
    assert len(heirs) == 4 and min(heirs.values()) > 0.1 * sum(heirs.values())
    ring.add("3")
    assert {session: ring.order(session)[0] for session in SESSIONS} == before


@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=200), st.integers(1, 6))
def test_no_engine_has_more_than_its_share_and_sessions_stay(steps, count):
    router = router_of(str(seat) for seat in range(count))
    loads, homes = {str(seat): 0 for seat in range(count)}, {}
    running = []
    for number, ends in steps:
        if ends and running:
            loads[running.pop(0)] -= 1
        session = str(number)
        total, before = sum(loads.values()), dict(loads)
        name = router.choose(session, loads)
        loads[name] += 1
        running.append(name)
        bound = -(-SLACK * (total + 1) // count)
        assert loads[name] <= bound
        if session in homes and before[homes[session]] < bound:
            assert name == homes[session]
        homes[session] = name


def test_requests_without_a_session_go_to_the_least_busy_and_dead_engines_get_nothing():
    router = router_of("abc")
    assert router.choose(None, {"a": 3, "b": 1, "c": 2}) == "b"
    homes = {s: router.choose(s, {"a": 0, "b": 0, "c": 0}) for s in SESSIONS[:50]}
    assert {router.choose(s, {"a": 0, "c": 0}) for s in SESSIONS[:50] if homes[s] == "b"} == {"a", "c"}


def test_members_of_a_group_are_together_unless_their_engine_has_twice_its_share():
    router, loads = router_of("abcd"), dict.fromkeys("abcd", 0)
    homes = {}
    for group in range(24):
        for sample in range(8):
            total = sum(loads.values())
            homes[group, sample] = name = router.choose(f"t/{group}//{sample}", loads)
            loads[name] += 1
            assert loads[name] <= -(-SIBLINGS * (total + 1) // 4)
    together = [len({homes[group, sample] for sample in range(8)}) for group in range(24)]
    assert together[6:] == [1] * 18  # the first ones meet idle engines, which are worth a second prompt
    assert max(loads.values()) < 1.5 * sum(loads.values()) / 4
    # Later turns go where the earlier ones were, also of those that were placed apart.
    even = dict.fromkeys("abcd", 10)
    assert all(router.choose(f"t/{group}//{sample}", even) == home for (group, sample), home in homes.items())
    gone = homes[20, 0]
    left = {name: 10 for name in "abcd" if name != gone}
    assert len({router.choose(f"t/20//{sample}", left) for sample in range(8)}) == 1
