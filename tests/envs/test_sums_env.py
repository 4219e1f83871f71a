"""Sums with a thought: pure, split by number, judged by the answer alone."""

import re

import pytest

from glm5.data.addition import number_is_held_out
from glm5.envs import Questions, Sums
from glm5.errors import ConfigError


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_answer_is_right_and_of_its_split(split):
    env: Questions = Sums(split=split)
    for index in range(100):
        task = env.task(0, index)
        assert task == env.task(0, index)
        a, b = map(int, re.findall(r"\d+", task.messages[0]["content"]))
        assert int(task.answer) == a + b
        assert (number_is_held_out(a) or number_is_held_out(b)) == (split == "heldout")


def test_only_the_content_is_judged():
    env = Sums()
    task = env.task(0, 0)
    assert env.score(task, {"content": f"It is {task.answer}.", "reasoning_content": "1 or 2"}).value == 1.0
    assert env.score(task, {"content": None, "reasoning_content": task.answer}).value == 0.0
    assert env.score(task, {"content": "-99999"}).value == 0.0


@pytest.mark.parametrize("digits", [0, 400, 900])
def test_numbers_whose_sum_cannot_be_graded_are_refused_when_it_is_made(digits):
    with pytest.raises(ConfigError, match=f"numbers of {digits} digits cannot be graded; take from 1 to 399"):
        Sums(digits=digits)
    longest = Sums(digits=399)
    task = longest.task(0, 0)
    assert longest.score(task, {"content": task.answer}).value == 1.0
