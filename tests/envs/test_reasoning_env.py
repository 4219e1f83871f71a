"""All tasks of reasoning-gym, their verifiers, and a split that no question crosses."""

import sys

import pytest
from episodes import assert_pure, play, said

from glm5.envs import EnvironmentFailure, ReasoningGym, SingleTurn
from glm5.errors import InputError

QUICK = [
    "basic_arithmetic",
    "binary_matrix",
    "boxnet",
    "chain_sum",
    "game_of_life",
    "gsm_symbolic",
    "n_queens",
    "number_sorting",
    "pool_matrix",
    "prime_factorization",
    "propositional_logic",
    "spiral_matrix",
    "syllogism",
]
OWN_ANSWER_IS_NOT_SHOWN = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


def every(names):
    for name in names:
        env = SingleTurn(ReasoningGym(name))
        task = env.task(0, 0)
        assert task == SingleTurn(ReasoningGym(name)).task(0, 0), name
        assert task.messages[0]["content"], name
        own = play(env, task, said(f"<answer>{task.answer}</answer>"))[1]
        if name not in OWN_ANSWER_IS_NOT_SHOWN:
            assert own.value == 1.0 and own.grade.correct, name
        for text in ("", "x", "((", "[[1]]", '{"a": [1]}', "None", "\\boxed{", "<answer></answer>"):
            assert 0 <= play(env, task, said(text))[1].value <= 1, (name, text)
    return len(names)


def test_tasks_of_every_kind_are_pure_and_take_their_own_answers():
    assert every(QUICK) == len(QUICK)


@pytest.mark.soak
def test_every_task_is_pure_and_takes_its_own_answer():
    assert every(ReasoningGym.names()) == 105


def test_no_question_of_one_split_is_in_the_other():
    small = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    splits = [SingleTurn(ReasoningGym("chain_sum", small, split=split)) for split in ("train", "heldout")]
    for env in splits:
        assert_pure(env)
    asked = [{env.task(seed, i).messages[0]["content"] for seed in range(3) for i in range(60)} for env in splits]
    assert len(asked[0]) > 80 and len(asked[1]) > 20 and not asked[0] & asked[1]


def test_settings_reach_the_task_and_its_name():
    env = ReasoningGym("chain_sum", {"min_terms": 6, "max_terms": 6})
    assert env.task(0, 0).messages[0]["content"].count(" + ") + env.task(0, 0).messages[0]["content"].count(" - ") == 5
    assert env.name == "reasoning-gym/chain_sum/train/max_terms=6,min_terms=6"


def test_the_answer_may_stand_in_tags_in_a_box_or_alone():
    env = ReasoningGym("chain_sum")
    task = env.task(0, 0)
    for text in ("{a}", "Well, \\boxed{{{a}}}", "The answer is: {a}", "1 or 2? <answer> {a} </answer> I am sure."):
        assert env.score(task, {"content": text.format(a=task.answer)}).value == 1.0


def test_no_text_is_right_whatever_it_says():
    env = ReasoningGym("game_of_life_halting")
    tasks = [env.task(0, index) for index in range(12)]
    assert {task.answer for task in tasks} == {"True", "False"}
    for task in tasks:
        wrong = {"True": "False", "False": "True"}[task.answer]
        values = [env.score(task, {"content": text}).value for text in (task.answer, task.answer.lower(), wrong, "x")]
        assert values == [1.0, 1.0, 0.0, 0.0]


def test_wrong_names_and_settings_are_refused():
    with pytest.raises(InputError, match="Did you mean 'chain_sum'"):
        ReasoningGym("chain_sums")
    with pytest.raises(InputError, match=r"no setting 'max_term'\. Did you mean 'max_terms'.* It has: allow_negation"):
        ReasoningGym("chain_sum", {"max_term": 3})
    with pytest.raises(InputError, match="no setting 'seed'"):
        ReasoningGym("chain_sum", {"seed": 3})
    with pytest.raises(InputError, match="refuses"):
        ReasoningGym("chain_sum", {"min_terms": 9, "max_terms": 3})


def test_a_verifier_that_refuses_the_right_answer_is_a_failure():
    env = ReasoningGym("chain_sum")
    task = env.task(0, 0)

    class Broken:
        def score_answer(self, answer, entry):
            raise RuntimeError("no space left")

    entry, _ = env._entry(0, 0)
    env._entry = lambda seed, index: (entry, Broken())
    with pytest.raises(EnvironmentFailure, match="no space left"):
        env.score(task, {"content": "1"})


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match=r"glm5\[envs\]"):
        ReasoningGym("chain_sum")
