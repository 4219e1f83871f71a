"""A question as an environment."""

import asyncio

import pytest

from glm5.envs import Environment, SingleTurn, Sums


def test_a_question_is_asked_once_and_scored():
    env: Environment = SingleTurn(Sums(split="train"))
    task = env.task(3, 14)

    async def play(answer):
        episode = env.episode(task)
        first = await episode.reset()
        assert first.messages == task.messages and not first.done
        last = await episode.step({"role": "assistant", "content": answer})
        assert last.done and not last.messages
        reward = await episode.score()
        await episode.close()
        return reward.value

    assert asyncio.run(play(task.answer)) == 1.0
    assert asyncio.run(play("no idea")) == 0.0
    assert env.name == Sums(split="train").name


def test_scoring_before_an_answer_is_a_mistake():
    episode = SingleTurn(Sums(split="train")).episode(Sums(split="train").task(0, 0))
    with pytest.raises(RuntimeError, match="before it was answered"):
        asyncio.run(episode.score())
