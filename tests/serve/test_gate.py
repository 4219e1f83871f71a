"""Places: given in order, given back by whoever leaves, and refused when too many wait."""

import asyncio

import pytest
from chat_client import USER, ask, client_of

from glm5.serve import Limits
from glm5.serve.errors import ApiError
from glm5.serve.gate import Gate, Place


async def never():
    await asyncio.Event().wait()


def test_places_are_given_in_order_and_a_full_queue_is_refused():
    async def go():
        gate, order = Gate(1, max_waiting=3), []

        async def one(name, rank):
            await Place(gate, never, rank).take()
            order.append(name)

        await one("a", 9.0)
        waiting = [asyncio.create_task(one(name, rank)) for name, rank in (("b", 2.0), ("c", 2.0), ("d", 1.0))]
        await asyncio.sleep(0)
        assert (gate.running, gate.waiting) == (1, 3)
        with pytest.raises(ApiError, match="3 wait"):
            await Place(gate, never).take()
        for _ in range(4):
            gate.leave()
            await asyncio.sleep(0.01)
        await asyncio.gather(*waiting)
        return order, gate.running, gate.waiting

    assert asyncio.run(go()) == (["a", "d", "b", "c"], 0, 0)


def test_who_leaves_the_queue_takes_no_place():
    async def go():
        gate, left = Gate(1, max_waiting=5), asyncio.Event()
        await gate.enter(never, 0.0)
        gone = asyncio.create_task(gate.enter(left.wait, 0.0))
        cancelled = asyncio.create_task(gate.enter(never, 0.0))
        late = asyncio.create_task(gate.enter(never, 0.0))
        await asyncio.sleep(0)
        left.set()
        cancelled.cancel()
        with pytest.raises(ApiError, match="went away"):
            await gone
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        gate.leave()
        late.cancel()  # it has just been given the place
        with pytest.raises(asyncio.CancelledError):
            await late
        return gate.running, gate.waiting

    assert asyncio.run(go()) == (0, 0)


def test_who_steps_aside_lets_others_run_and_comes_back_first():
    async def go():
        gate, order = Gate(1, max_waiting=5), []
        first, second, third = (Place(gate, never, float(rank)) for rank in range(3))

        async def one(name, place):
            await place.take()
            order.append(name)

        await first.take()
        others = [asyncio.create_task(one(*pair)) for pair in (("second", second), ("third", third))]
        async with first.aside():
            await asyncio.sleep(0.01)
            assert order == ["second"] and (gate.running, gate.waiting) == (1, 2)
            asyncio.get_running_loop().call_later(0.01, second.leave)
        order.append("first")
        with pytest.raises(ZeroDivisionError):
            async with first.aside():
                raise ZeroDivisionError
        await asyncio.gather(*others)
        for place in (first, second, third, third):  # whoever holds none gives none back
            place.leave()
        return order, gate.running, gate.waiting

    assert asyncio.run(go()) == (["second", "first", "third"], 0, 0)


def test_one_request_too_many_says_when_to_come_back():
    reply = ask(client_of("ok", limits=Limits(max_concurrent=0, max_waiting=0)), messages=USER)
    assert reply.status_code == 429 and reply.headers["retry-after"] == "1"
