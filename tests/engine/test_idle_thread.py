"""The engine's thread ends when there is no work, and only then: whoever has asked gets an answer or an error."""

import time

import pytest
from tiny import tiny_model

from glm5.engine import Engine, SamplingParams

PARAMS = SamplingParams(max_tokens=2, ignore_eos=True)


def ended(stream):
    """Waits for the end of a request, for so long that only one that nobody ends is missed; how many tokens it got."""
    end = time.monotonic() + 120
    while not stream._request.mailbox.finished:
        assert time.monotonic() < end, "nobody ends this request"
        time.sleep(0.01)
    return len(list(stream))


def test_a_request_between_the_timeout_and_the_lock_is_answered():
    engine = Engine(tiny_model())
    late, wait = [], engine._changed.wait

    def timed_out(seconds):
        if late:
            return wait(seconds)
        late.append(engine.stream([3, 4], PARAMS))  # the waiter no longer hears the notification
        return False

    engine._changed.wait = timed_out
    engine.generate([[1, 2]], PARAMS)
    while not late:
        time.sleep(0.01)
    assert ended(late[0]) == 2
    assert late[0].finish_reasons == ("length",)
    engine.close()


def not_taken_over(engine):
    """The next request of an engine cannot be taken over, by a mistake; four that have arrived at once."""
    add = engine._core.add

    def mistake(request):
        engine._core.add = add
        add(request)
        raise RuntimeError("a mistake")

    engine._core.add = mistake
    with engine._changed:  # the thread sees them when all are here
        return [engine.stream([1, 2, 3], PARAMS) for _ in range(4)]


def test_requests_behind_one_that_cannot_be_taken_over_are_answered():
    engine = Engine(tiny_model())
    first, *others = not_taken_over(engine)
    with pytest.raises(RuntimeError, match="a mistake"):
        ended(first)
    assert [ended(other) for other in others] == [2, 2, 2]
    assert engine.failure is None
    engine.close()


def test_an_engine_that_is_stepped_goes_on_behind_such_a_request():
    engine = Engine(tiny_model(), threaded=False)
    first, *others = not_taken_over(engine)
    while engine.step():
        pass
    with pytest.raises(RuntimeError, match="a mistake"):
        first.poll()
    assert all(other.poll() for other in others)
    engine.close()
