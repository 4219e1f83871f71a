"""Functions and lists as environments."""

import math

import pytest
from episodes import assert_pure, play, said

from glm5.envs import Environment, EnvironmentFailure, Questions, Reward, Task, right_number, single_questions
from glm5.errors import InputError
from glm5.scoring import Grade

CAPITALS = [(f"Capital of country {i}?", f"Town {i}") for i in range(30)]


def test_a_list_is_gone_through_in_passes_of_different_orders():
    env: Environment = single_questions("capitals", CAPITALS)
    assert_pure(env)
    first = [env.task(0, i).answer for i in range(30)]
    second = [env.task(0, i).answer for i in range(30, 60)]
    assert sorted(first) == sorted(second) == sorted(answer for _, answer in CAPITALS)
    assert first != second
    task = env.task(0, 0)
    assert play(env, task, said(f"{task.answer.upper()}."))[1].value == 1.0
    assert play(env, task, said("Atlantis"))[1].value == 0.0


def test_whole_tasks_keep_all_but_their_id():
    given = Task("mine", ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}), "2", "sums")
    env = single_questions("sums", [given], right_number)
    task = env.task(5, 7)
    assert task.id == "sums/5/7" and (task.messages, task.answer, task.category) == (given.messages, "2", "sums")
    assert play(env, task, said("It is 2"))[1].value == 1.0


def test_a_function_draws_questions():
    def draw(random):
        a, b = random.randrange(100), random.randrange(100)
        return f"{a} + {b}?", str(a + b)

    env = single_questions("sums", draw, right_number)
    assert_pure(env)
    task = env.task(0, 10_000_000)
    assert play(env, task, said(task.answer))[1].grade.correct


def test_a_reward_is_a_number_or_says_why():
    length = single_questions("length", CAPITALS, lambda task, message: -len(message["content"]))
    reward = play(length, length.task(0, 0), said("four"))[1]
    assert (reward.value, reward.grade.outcome) == (-4.0, "incorrect")
    whole = Reward(0.5, Grade("correct", "half of it"))
    halves = single_questions("halves", CAPITALS, lambda task, message: whole)
    assert play(halves, halves.task(0, 0), said("x"))[1] is whole


@pytest.mark.parametrize("broken", [lambda task, message: 1 / 0, lambda task, message: math.nan])
def test_a_reward_that_breaks_is_a_failure_and_no_zero(broken):
    env = single_questions("broken", CAPITALS, broken)
    with pytest.raises(EnvironmentFailure, match="broken/0/0") as caught:
        play(env, env.task(0, 0), said("x"))
    assert caught.value.kind == "verifier"


def test_a_reward_that_takes_a_blank_answer_for_text_is_told_of_it():
    env = single_questions("length", CAPITALS, lambda task, message: len(message["content"]))
    with pytest.raises(EnvironmentFailure, match="answer was blank"):
        play(env, env.task(0, 0), said(None))


def test_no_questions_are_refused():
    with pytest.raises(InputError, match="empty has no question"):
        single_questions("empty", [])


def test_they_are_questions_for_the_plain_loop_and_the_evaluations_too():
    questions: Questions = single_questions("capitals", CAPITALS).questions
    task = questions.task(0, 0)
    assert questions.score(task, {"content": task.answer}).value == 1.0
