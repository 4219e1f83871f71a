"""Readers of an answer that take little, and such that take nothing."""

import asyncio

from asgi_client import Call, scope_of

from glm5.serve import Limits
from glm5.serve.slow_readers import SendAtLeisure


class Transport:
    """A connection in which `size` bytes wait; each look at them finds `taken` less, and then calls `empty`."""

    def __init__(self, size, taken, empty=lambda: None):
        self.size, self.taken, self.empty, self.aborted = size, taken, empty, 0

    def get_write_buffer_size(self):
        if self.size > 0:
            self.size -= self.taken
            if self.size <= 0:
                self.empty()
        return self.size

    def abort(self):
        self.aborted += 1


async def _parts(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for number in range(10):
        await send({"type": "http.response.body", "body": b"x" * 100, "more_body": number < 9})


def read(size, taken, *, stall):
    """Runs the app for a client whose connection is full (`stall`) or takes over all that is sent; both of them."""

    async def go():
        call = Call(SendAtLeisure(_parts, Limits(stall_seconds=0.05)), scope_of(), stall=stall)
        transport = Transport(size, taken, call.leave)
        call.scope["state"] = {"transport": transport}
        await asyncio.wait_for(call.run(), 60)
        return call, transport

    return asyncio.run(go())


def test_a_reader_that_takes_little_for_long_is_not_cut_off():
    call, transport = read(40, 1, stall=True)
    assert len(call.sent) == 11 and call.sent[-1]["more_body"] is False and transport.aborted == 0


def test_a_reader_that_takes_nothing_is_cut_off_with_what_waits_for_it():
    call, transport = read(40, 0, stall=True)
    assert len(call.sent) == 1 and transport.aborted == 1


def test_a_request_lasts_until_the_end_of_its_answer_is_taken():
    _, slow = read(40, 1, stall=False)
    assert slow.size == 0 and slow.aborted == 0
    _, stalled = read(40, 0, stall=False)
    assert stalled.aborted == 1
