"""Engines in processes: the same tokens, deaths that nobody sees, and limits on what goes round."""

import asyncio
import os
import random
import signal
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import fleet_engines
import pytest
from fleet_engines import PROMPTS, params_of, play, undisturbed
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import StructuredOutputs
from glm5.errors import ConfigError, FleetError, InputError, WeightsError
from glm5.rl.fleet import FleetConfig, ProcessExecutor, SupervisedFleet

CALM = FleetConfig(silence_seconds=120, stuck_seconds=120, max_restarts=3)
"""A busy machine is no reason to replace an engine. Where silence is, it is asked for."""


def fleet_of(build, size, config=CALM, **options):
    return SupervisedFleet(ProcessExecutor(build, **options), size, tokenizer=speaker_tokenizer(), config=config)


def pids(fleet):
    """Of the engines that are up."""
    return [seat.member.process_id for seat in fleet._seats if seat.member is not None]


async def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def running(fleet):
    """A fleet that runs for the time of a `with` block."""
    try:
        await fleet.start()
        yield fleet
    finally:
        await fleet.close()


def test_tokens_weights_and_refusals():
    wanted = undisturbed()

    async def story():
        fleet = fleet_of(fleet_engines.strict_engine, 2)
        with pytest.raises(FleetError, match="has not been started"):
            fleet.stream(PROMPTS[0])
        async with running(fleet):
            assert await play(fleet) == wanted
            assert min(state.requests for state in fleet.stats().engines) >= 1 and fleet.max_model_len == 512
            with pytest.raises(InputError, match="context limit is 512"):
                fleet.stream([1] * 600)
            with pytest.raises(InputError, match="deadline"):
                fleet.stream([1], deadline=-1.0)
            bad = fleet.stream([1], params_of(0, structured_outputs=StructuredOutputs(regex="(")))
            with pytest.raises(InputError):
                await anext(bad)

            new = speaker_model(seed=1)
            await fleet.publish(4, new.state_dict())
            alone = fleet_engines.strict_engine()
            alone.update_weights(4, new.state_dict())
            assert fleet.version == 4 and await play(fleet) == await play(alone)
            alone.close()
            with pytest.raises(WeightsError, match="version 4 came after version 4"):
                await fleet.publish(4, new.state_dict())
            spoilt = {name: tensor * float("nan") for name, tensor in new.state_dict().items()}
            with pytest.raises(InputError, match="NaN or infinity"):
                await fleet.publish(5, spoilt)
            with pytest.raises(InputError, match=r"lack 'lm_head.weight'"):
                await fleet.publish(5, {n: t for n, t in new.state_dict().items() if n != "lm_head.weight"})
            assert [state.version for state in fleet.stats().engines] == [4, 4]

            short = fleet.stream(PROMPTS[0], params_of(0, max_tokens=None), deadline=0.02)
            assert len([delta async for delta in short]) < 508 and short.finish_reasons == ("abort",)
            left = fleet.stream(PROMPTS[0], params_of(0, max_tokens=None))
            await anext(left)
            left.close()
            assert [delta async for delta in left] == []
            del short, left
            await until(lambda: not fleet._jobs and all(s.engine.running == 0 for s in fleet.stats().engines))
        with pytest.raises(FleetError, match="closed"):
            fleet.stream(PROMPTS[0])
        with pytest.raises(FleetError, match="started before"):
            await fleet.start()

    asyncio.run(story())


def said(fleet):
    """Tokens of the requests that run."""
    return sum(len(job.said) for job in fleet._jobs.values())


def test_an_engine_killed_in_the_middle_of_a_token_changes_no_bit(tmp_path):
    """Two kills; weights come in between. The tokens are those of an undisturbed engine."""
    wanted, hold = undisturbed(n=2, stop=["zzz"], experts_from=0), tmp_path / "hold"
    assert all(experts is not None for tokens in wanted for *_, experts in tokens)
    new = speaker_model(seed=1)

    async def story():
        async with running(fleet_of(partial(fleet_engines.held_engine, hold), 2)) as fleet:
            hold.touch()
            work = asyncio.create_task(play(fleet, n=2, stop=["zzz"], experts_from=0))
            await until(lambda: said(fleet) > 30)
            os.kill(pids(fleet)[0], signal.SIGKILL)
            await until(lambda: fleet.stats().moved)
            hold.unlink()
            first = await asyncio.wait_for(work, 120)
            assert [sorted(tokens) for tokens in first] == [sorted(tokens) for tokens in wanted]
            await until(lambda: len(pids(fleet)) == 2)

            # The one that was started anew has the newest weights, also when they came while it was starting.
            hold.touch()
            os.kill(pids(fleet)[1], signal.SIGKILL)
            await until(lambda: len(pids(fleet)) == 1)
            await fleet.publish(7, new.state_dict())
            hold.unlink()
            await until(lambda: len(pids(fleet)) == 2)
            assert [state.version for state in fleet.stats().engines] == [7, 7]
            assert sum(state.restarts for state in fleet.stats().engines) == 2

    asyncio.run(story())


def test_an_engine_that_is_stopped_says_nothing_and_is_replaced(tmp_path):
    wanted, hold = undisturbed(), tmp_path / "hold"

    async def story():
        config = replace(CALM, silence_seconds=2, max_restarts=9)
        async with running(fleet_of(partial(fleet_engines.held_engine, hold), 2, config)) as fleet:
            hold.touch()
            work = asyncio.create_task(play(fleet))
            await until(lambda: said(fleet) > 30)
            stopped = pids(fleet)[0]
            os.kill(stopped, signal.SIGSTOP)
            hold.unlink()
            assert await asyncio.wait_for(work, 120) == wanted
            assert fleet.stats().moved >= 1 and fleet.stats().engines[0].restarts >= 1
            await until(lambda: not Path(f"/proc/{stopped}").exists() and stopped not in pids(fleet))

    asyncio.run(story())


def test_an_engine_that_failed_is_replaced_and_its_requests_go_on(tmp_path, caplog):
    wanted, alone, flag = undisturbed(n=2), undisturbed(), tmp_path / "flag"
    flag.touch()

    async def story():
        config = replace(CALM, max_moves=1, max_restarts=9)
        async with running(fleet_of(partial(fleet_engines.mistaken_engine, flag), 2, config)) as fleet:
            first = await play(fleet, n=2)
            assert [sorted(tokens) for tokens in first] == [sorted(tokens) for tokens in wanted]
            assert not flag.exists() and fleet.stats().moved and fleet.failure is None
            assert sum(state.restarts for state in fleet.stats().engines) == 1
            assert "its engine has ended by a mistake of its own (ZeroDivisionError)" in caplog.text
            await until(lambda: len(pids(fleet)) == 2)

            # What ends a request alone ends it, and neither the engine nor those beside it.
            beside, before = asyncio.create_task(play(fleet)), pids(fleet)
            for _ in range(3):
                with pytest.raises(FleetError, match=r"The engine failed: ValueError\('its own'\)"):
                    await asyncio.wait_for(anext(fleet.stream([1, 301], params_of(0))), 60)
            assert await beside == alone and pids(fleet) == before

            # A request that fails every engine's step is tried a few times and ends, whatever it raises.
            with pytest.raises(
                FleetError, match=r"2 engines died under one request \(a step of its engine failed \(System"
            ):
                await asyncio.wait_for(anext(fleet.stream([1, 300], params_of(0))), 120)

        flag.touch()
        one = fleet_of(partial(fleet_engines.mistaken_engine, flag), 1, replace(CALM, max_restarts=0))
        async with running(one) as fleet:
            with pytest.raises(
                FleetError, match=r"No engine is left: engine 0 failed \(1 times\): its engine has ended"
            ):
                await play(fleet)
            assert fleet.failure.startswith("No engine is left: engine 0 failed (1 times): its engine has ended")

    asyncio.run(story())


def test_an_engine_whose_step_fails_is_replaced_and_no_request_ends(tmp_path, caplog):
    wanted, flag = undisturbed(), tmp_path / "flag"
    flag.touch()

    async def story():
        async with running(fleet_of(partial(fleet_engines.short_of_memory_engine, flag), 2)) as fleet:
            assert await play(fleet) == wanted and not flag.exists()
            assert fleet.stats().moved and sum(state.restarts for state in fleet.stats().engines) == 1
            assert "a step of its engine failed (RuntimeError('out of memory'))" in caplog.text

    asyncio.run(story())


def test_an_engine_that_dies_before_it_has_its_seat_is_replaced_at_once(monkeypatch):
    seat, killed = SupervisedFleet.take, []

    def late(self, seat_, member, has):
        if not killed:
            killed.append(member.process_id)
            os.kill(member.process_id, signal.SIGKILL)
            while not member._closing:
                time.sleep(0.01)
        return seat(self, seat_, member, has)

    monkeypatch.setattr(SupervisedFleet, "take", late)

    async def story():
        async with running(fleet_of(fleet_engines.strict_engine, 1, replace(CALM, silence_seconds=600))) as fleet:
            await until(lambda: pids(fleet) not in ([], killed))
            assert len(await play(fleet, count=1)) == 1

    asyncio.run(story())


@pytest.mark.soak
def test_engines_killed_at_random_moments_change_no_bit():
    """Twenty rounds, each with one to three kills or stop signals among three engines."""
    wanted, pick = undisturbed(), random.Random(0)
    config = replace(CALM, silence_seconds=2, max_restarts=10**6, max_moves=100)

    async def story():
        async with running(fleet_of(fleet_engines.slow_engine, 3, config)) as fleet:
            for _ in range(20):
                work = asyncio.create_task(play(fleet))
                for _ in range(pick.randint(1, 3)):
                    await asyncio.sleep(pick.random() * 0.6)
                    if found := pids(fleet):
                        os.kill(pick.choice(found), pick.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]))
                assert await asyncio.wait_for(work, 300) == wanted
            assert fleet.stats().moved > 20

    asyncio.run(story())


def test_an_engine_that_computes_nothing_is_replaced_and_poison_stops(tmp_path):
    hold = tmp_path / "hold"

    async def stuck():
        async with running(fleet_of(fleet_engines.stuck_engine, 1, replace(CALM, stuck_seconds=4, max_moves=0))) as f:
            with pytest.raises(FleetError, match=r"1 engines died under one request \(no step for"):
                await anext(f.stream([1, 300], params_of(0)))
            assert len(await play(f, count=1)) == 1

    async def poisoned():
        config = replace(CALM, max_moves=1, max_restarts=9)
        async with running(fleet_of(partial(fleet_engines.poisoned_engine, hold), 2, config)) as fleet:
            hold.touch()
            beside = asyncio.create_task(play(fleet))
            await until(lambda: said(fleet) > 30)
            poison = fleet.stream([1, 300], params_of(0))
            hold.unlink()
            with pytest.raises(FleetError, match=r"2 engines died under one request \(its process has ended"):
                await asyncio.wait_for(anext(poison), 120)
            assert await beside == undisturbed_later

    undisturbed_later = undisturbed()
    asyncio.run(stuck())
    asyncio.run(poisoned())


def test_when_no_engine_is_left_every_stream_ends_with_an_error():
    async def story():
        config = replace(CALM, max_restarts=0)
        async with running(fleet_of(fleet_engines.slow_engine, 2, config)) as fleet:
            streams = [fleet.stream(PROMPTS[i], params_of(i, max_tokens=400)) for i in range(4)]
            await anext(streams[0])
            for pid in pids(fleet):
                os.kill(pid, signal.SIGKILL)
            for stream in streams:
                with pytest.raises(FleetError, match=r"No engine is left: engine \d failed"):
                    await asyncio.wait_for(_all(stream), 120)
            with pytest.raises(FleetError, match="No engine is left"):
                await anext(fleet.stream(PROMPTS[0]))
            with pytest.raises(FleetError, match="No engine is left"):
                await fleet.publish(3, speaker_model().state_dict())

    asyncio.run(story())


async def _all(stream):
    return [delta async for delta in stream]


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (fleet_engines.refusing_engine, "No engine could be started: engine 0 failed: There is no model at /nowhere"),
        (fleet_engines.dying_engine, r"engine 0 failed \(2 times\): its process has ended"),
    ],
)
def test_engines_that_do_not_start(build, sentence):
    async def story():
        async with running(fleet_of(build, 1, FleetConfig(max_restarts=1))):
            raise AssertionError

    with pytest.raises(FleetError, match=sentence):
        asyncio.run(story())


def test_wrong_settings_are_refused():
    with pytest.raises(FleetError, match="size is 0"):
        fleet_of(fleet_engines.strict_engine, 0)
    with pytest.raises(ConfigError, match="silence_seconds is 0"):
        FleetConfig(silence_seconds=0)
    with pytest.raises(InputError, match="at least one thread"):
        ProcessExecutor(fleet_engines.strict_engine, threads=0)
