"""Blocking calls in threads of their own: side by side, and nobody waits for one that hangs."""

import asyncio
import contextvars
import threading
import weakref

import pytest

from glm5.envs import EnvironmentFailure, Toolbox
from glm5.envs import threads as own_threads
from glm5.threads import OneThread, in_thread


def test_any_number_of_calls_runs_at_once():
    everybody = threading.Barrier(40, timeout=120)

    async def main():
        return await asyncio.gather(*(in_thread(lambda n: (everybody.wait(), n)[1], n) for n in range(40)))

    assert asyncio.run(main()) == list(range(40))


def test_a_loop_ends_while_calls_hang():
    release, ended = threading.Event(), []

    def hang():
        ended.append(release.wait(120))

    async def main():
        calls = [asyncio.ensure_future(in_thread(hang)) for _ in range(9)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await calls[0]
        return "done"

    assert asyncio.run(main()) == "done" and not ended
    release.set()


@pytest.mark.parametrize("error", [StopIteration("x"), SystemExit(3), KeyError("k")])
def test_what_a_call_raises_arrives(error):
    def fail():
        raise error

    async def main():
        await in_thread(fail)

    expected = RuntimeError if isinstance(error, StopIteration) else type(error)
    with pytest.raises(expected):
        asyncio.run(main())


def test_a_call_sees_the_context_of_its_caller():
    name = contextvars.ContextVar("name", default="")

    async def main():
        name.set("mine")
        return await in_thread(name.get)

    assert asyncio.run(main()) == "mine"


def test_used_up_threads_are_a_failure_of_the_environment_and_not_told_to_the_model(monkeypatch):
    def tool() -> int:
        return 1

    call = {"function": {"name": "tool", "arguments": "{}"}}
    monkeypatch.setattr(own_threads, "MOST", 0)
    with pytest.raises(EnvironmentFailure, match="no thread is left"):
        asyncio.run(Toolbox([tool]).answer([call]))


def test_a_tool_that_leaves_the_program_is_told_to_the_model():
    def tool() -> int:
        raise SystemExit("usage: tool [-h]")

    call = {"function": {"name": "tool", "arguments": "{}"}}
    (answer,) = asyncio.run(Toolbox([tool]).answer([call]))
    assert answer["content"] == '{"error": "usage: tool [-h]"}'


# ---- one thread ---------------------------------------------------------------------------------------------------
class Load:
    """Something that a weak reference can point to."""


async def until_gone(reference):
    for _ in range(1000):
        if reference() is None:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it is still held")


def test_one_thread_runs_calls_in_their_order_and_their_errors_do_not_end_it():
    async def main():
        work = OneThread()
        first = work({}.pop, "k")
        seen = await asyncio.gather(*(work(lambda n: (n, threading.get_ident()), n) for n in range(5)))
        with pytest.raises(KeyError, match="k"):
            await first
        assert [n for n, _ in seen] == [*range(5)] and len({thread for _, thread in seen}) == 1
        work.close()

    asyncio.run(main())


def test_one_thread_keeps_nothing_of_a_call_and_ends_when_it_is_closed():
    here = threading.local()

    def mark(load):
        here.load = Load()  # lives as long as the thread
        return weakref.ref(here.load)

    async def main():
        work, load = OneThread(), Load()
        given, thread = weakref.ref(load), await work(mark, load)
        del load
        await until_gone(given)
        assert thread() is not None
        work.close()
        await until_gone(thread)

    asyncio.run(main())
