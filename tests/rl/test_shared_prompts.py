"""The samples of a group compute their prompt once, wherever they are sampled."""

import asyncio
from pathlib import Path

import pytest
from scripted import Chat
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import Engine
from glm5.rl.config import RLRunConfig
from glm5.rl.executors import engine_settings
from glm5.rl.fleet import InProcessFleet
from glm5.rl.records import Ticket
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.runner import play

BLOCK, GROUP = 4, 8


def test_engines_of_a_run_share_prompts_that_are_short():
    settings = engine_settings(RLRunConfig(parent=Path("parent"), steps=1))
    assert settings["block_size"] <= 16  # a question of a sentence is 20 to 40 tokens


@pytest.mark.parametrize("engines", [1, 2])
def test_the_prompt_of_a_group_is_prefilled_once(engines):
    """Counted by the engines: each prompt once, and of every other sample what its last block does not fill."""

    def engine():
        return Engine(speaker_model(), speaker_tokenizer(), strict=True, block_size=BLOCK, num_blocks=400)

    async def story():
        fleet = InProcessFleet([engine() for _ in range(engines)])
        tickets = [Ticket("chat", 7, sample=sample) for sample in range(GROUP)]
        rollouts = await asyncio.gather(*(play(t, Chat(), fleet, RolloutConfig(max_tokens=5)) for t in tickets))
        stats = [state.engine for state in fleet.stats().engines]
        await fleet.close()
        return rollouts, stats

    rollouts, stats = asyncio.run(story())
    turns = [turn for rollout in rollouts for turn in rollout.turns]
    prompt = len(turns[0].prompt_ids)
    shared = (prompt - 1) // BLOCK * BLOCK
    assert len(turns) == GROUP and {turn.prompt_ids for turn in turns} == {turns[0].prompt_ids} and shared > 2 * BLOCK
    assert sorted(turn.cached_tokens for turn in turns) == [0] + [shared] * (GROUP - 1)
    inputs = sum(len(turn.output_ids) - 1 for turn in turns)  # the last token of an answer is no input
    assert sum(s.computed_tokens for s in stats) == prompt + (GROUP - 1) * (prompt - shared) + inputs
    assert len({turn.output_ids for turn in turns}) > 1
