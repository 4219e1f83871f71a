"""The engine's thread ends when there is no work; a request that comes at that very moment is answered all the same."""

import time

from tiny import tiny_model

from glm5.engine import Engine, SamplingParams


def test_a_request_between_the_timeout_and_the_lock_is_answered():
    engine = Engine(tiny_model())
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    late, wait = [], engine._changed.wait

    def timed_out(seconds):
        if late:
            return wait(seconds)
        late.append(engine.stream([3, 4], params))  # the waiter no longer hears the notification
        return False

    engine._changed.wait = timed_out
    engine.generate([[1, 2]], params)
    end = time.monotonic() + 20
    while not (late and all(late[0].finish_reasons)) and time.monotonic() < end:
        time.sleep(0.01)
    assert late[0].finish_reasons == ("length",)
    engine.close()
