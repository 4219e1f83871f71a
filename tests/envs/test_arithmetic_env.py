"""The arithmetic environment: pure, split-clean, and judged by the answer alone."""

import pytest

from glm5.data.arithmetic import split_of
from glm5.envs import Arithmetic, Questions
from glm5.errors import ConfigError


def test_tasks_are_functions_of_seed_and_index():
    env: Questions = Arithmetic()
    tasks = [env.task(3, i) for i in range(50)]
    assert tasks == [env.task(3, i) for i in range(50)]
    assert tasks != [env.task(4, i) for i in range(50)]
    assert len({task.id for task in tasks}) == 50
    assert len({task.messages[0]["content"] for task in tasks}) > 40
    assert {task.category for task in tasks} == {"addition", "subtraction", "multiplication"}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_answer_is_right_and_of_its_split(split):
    env = Arithmetic(split=split)
    sign = {"addition": "+", "subtraction": "-", "multiplication": "*"}
    for index in range(100):
        task = env.task(0, index)
        a, b = [int(word.strip("?.,")) for word in task.messages[0]["content"].split() if word.strip("?.,").isdigit()]
        if "Subtract" in task.messages[0]["content"] or "Take" in task.messages[0]["content"]:
            a, b = b, a
        assert split_of(f"{a} {sign[task.category]} {b}") == split
        assert eval(f"{a} {sign[task.category]} {b}") == int(task.answer)


def test_only_the_content_is_judged():
    env = Arithmetic()
    task = env.task(0, 0)
    right = env.score(task, {"role": "assistant", "content": f"It is {task.answer}.", "reasoning_content": "1 or 2"})
    assert (right.value, right.grade.correct) == (1.0, True)
    hidden = env.score(task, {"role": "assistant", "content": None, "reasoning_content": task.answer})
    assert (hidden.value, hidden.grade.outcome) == (0.0, "not_attempted")
    wrong = env.score(task, {"role": "assistant", "content": "-99999"})
    assert (wrong.value, wrong.grade.outcome) == (0.0, "incorrect")
    assert task.answer in wrong.reason


@pytest.mark.parametrize("largest", [-1, 10**200])
def test_numbers_that_cannot_be_graded_are_refused_when_it_is_made(largest):
    with pytest.raises(ConfigError, match="a `largest` from 0 to one of 200 digits"):
        Arithmetic(largest=largest)
    env = Arithmetic(largest=10**200 - 1, operations="*")
    assert env.score(env.task(0, 0), {"content": env.task(0, 0).answer}).value == 1.0
