"""Requests that may have killed their engine go on one at a time, and none of them in the way of the others."""

import asyncio

import pytest

from glm5.engine import SamplingParams, TokenDelta
from glm5.engine.admission import Limits
from glm5.errors import FleetError, RequestFailed
from glm5.rl.fleet import FleetConfig, SupervisedFleet
from glm5.rl.fleet.job import Delivery
from glm5.rl.fleet.member import Facts

PATIENT = FleetConfig(max_restarts=1000, max_moves=1000, outage_seconds=300.0)


class Engine:
    """Takes orders and says what the test lets it say."""

    def __init__(self, name, events):
        self.name, self.events, self.orders = name, events, []
        self.facts = Facts(0, Limits(100, 1000, 1 << 60, 0.0), None)

    def wait(self): ...

    def begin(self, order):
        self.orders.append(order.number)

    def abort(self, number): ...

    def trouble(self, stood_still): ...

    def stats(self): ...

    def close(self, *, kill): ...

    def says(self, number):
        delta = TokenDelta(0, token_id=7, logprob=-1.0, top_logprobs=(), version=0, text="", finish_reason=None)
        self.events.delivered(self, [Delivery(number, [delta], 0, None)])

    def refuses(self, number):
        self.events.ended(self, number, RequestFailed("it takes others"))

    def dies(self):
        self.events.lost(self, "it died")


class Engines:
    """An executor; those named in `away` do not start."""

    outlived = False

    def __init__(self):
        self.newest, self.away = {}, set()

    def launch(self, name, events, config):
        if name in self.away:
            raise FleetError("it is away")
        self.newest[name] = Engine(name, events)
        return self.newest[name]

    def close(self): ...


def told(size, story, config=PATIENT):
    async def whole():
        engines = Engines()
        fleet = SupervisedFleet(engines, size, config=config)
        await fleet.start()
        begin = lambda: fleet.stream([1] * 50, SamplingParams(max_tokens=5, seed=0))
        try:
            async with asyncio.timeout(60):
                await story(fleet, engines, begin)
        finally:
            await fleet.close()

    asyncio.run(whole())


async def back(fleet, engines, name):
    engines.away.clear()
    while not fleet.stats().engines[int(name)].up:
        await asyncio.sleep(0.01)
    return engines.newest[name]


def test_a_suspect_that_can_only_wait_holds_up_no_other():
    async def story(fleet, engines, begin):
        first, second = engines.newest["0"], engines.newest["1"]
        streams = [begin()]
        first.refuses(1)  # it goes on at the second
        streams += [begin() for _ in range(5)]
        assert (first.orders, second.orders) == ([1, 2, 3, 5], [1, 4, 6])
        engines.away.add("1")
        second.dies()
        assert first.orders == [1, 2, 3, 5, 4] and fleet.stats().waiting == 1  # only 1 waits for the second
        first.says(4)
        assert first.orders == [1, 2, 3, 5, 4, 6]
        again = await back(fleet, engines, "1")
        assert again.orders == [] and fleet.stats().waiting == 0  # 6 is being tried
        first.says(6)
        assert again.orders == [1]
        again.dies()
        assert first.orders == [1, 2, 3, 5, 4, 6]  # it alone was there
        del streams

    told(2, story)


def test_suspects_that_waited_for_the_only_engine_are_still_tried_one_at_a_time():
    async def story(fleet, engines, begin):
        streams = [begin() for _ in range(3)]
        engines.away.add("0")
        engines.newest["0"].dies()
        assert fleet.stats().waiting == 3
        again = await back(fleet, engines, "0")
        assert again.orders == [1] and fleet.stats().waiting == 0
        again.says(1)
        again.says(3)  # nobody asked it
        assert again.orders == [1, 2]
        streams[1].close()
        assert again.orders == [1, 2, 3]

    told(1, story)


def test_hundreds_of_suspects_end_with_their_fleet():
    async def story(fleet, engines, begin):
        streams = [begin() for _ in range(500)]
        engines.away.add("0")
        engines.newest["0"].dies()
        fleet.failed(fleet._seats[0], "it never came", final=True)
        for stream in streams:
            with pytest.raises(FleetError, match="it never came"):
                await anext(stream)

    told(1, story)
