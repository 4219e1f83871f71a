"""Several engines in one process give what one engine gives."""

import asyncio

import pytest
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import Engine, SamplingParams
from glm5.errors import FleetError, InputError
from glm5.rl.fleet import InProcessFleet

PROMPTS = [[7, 9, 11 + i, 3] for i in range(12)]


def engine(**options):
    return Engine(speaker_model(), speaker_tokenizer(), strict=True, **options)


async def run(source, *, seed=5):
    async def one(i, prompt):
        params = SamplingParams(max_tokens=10, seed=seed + i, ignore_eos=True)
        stream = source.stream(prompt, params, session_id=f"s{i}", priority=0, deadline=None)
        return [(d.token_id, d.logprob, d.version, d.text) async for d in stream]

    return await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(PROMPTS)))


def test_a_fleet_of_engines_gives_what_one_gives_and_takes_new_weights():
    async def story():
        alone, fleet = engine(), InProcessFleet([engine() for _ in range(3)])
        await fleet.start()
        assert fleet.version == 0 and fleet.max_model_len == 512 and fleet.tokenizer is not None
        assert await run(fleet) == await run(alone)
        served = [state.requests for state in fleet.stats().engines]
        assert sum(served) == len(PROMPTS) and min(served) >= 2
        new = speaker_model(seed=1).state_dict()
        await fleet.publish(3, new)
        alone.update_weights(3, new)
        assert fleet.version == 3 and await run(fleet) == await run(alone)
        with pytest.raises(InputError, match="came after version 3"):
            await fleet.publish(3, new)
        await fleet.close()
        with pytest.raises(InputError, match="closed"):
            fleet.stream(PROMPTS[0])
        alone.close()

    asyncio.run(story())


def test_engines_that_differ_are_refused():
    with pytest.raises(FleetError, match="at least one engine"):
        InProcessFleet([])
    with pytest.raises(FleetError, match="different versions"):
        InProcessFleet([engine(), engine(version=2)])
