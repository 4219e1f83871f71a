"""Answers that a verifier would run are wrong without being run; formulas and lists still count."""

import pytest

from glm5.envs import ReasoningGym
from glm5.envs.answer_guard import FORMULAS, LITERALS, may_be_shown

PROGRAMS = [
    "__import__('os').system('touch pwned')", "9**9**9**9", "(9**99)**99", "9**(1/(1/10000000))", "10**-99999",
    "(x+1)**1000", "(a+b+c+d+e)**9", "().__class__", "[x for x in ()]", "lambda: 0", "open('x')", "sin.__class__(1)",
    "f'{x}'", "x if x else 1", "exp(9**9**9)", "1e999", "factorial(9999999)", "((" * 3000, "9" * 3000,
    "9**(x - x + 10000000)", "2**(3**(4**5))", "1e-999999999", "2.5E-9_999_999 + 1", "1.e-400000",
]  # fmt: skip
FINE = ["1/4", "0.25", "3 + 4*(5 - 2)", "x**3/3 + 2*x + C", "exp(x)*(x - 1) + C", "-sin(2*x)/2 + C", "log(x)",
        "x**(-1)", "2*x**(3/2)/3", "12*x**4 - 7*x*y + z**2", "1.5e-7"]  # fmt: skip


@pytest.mark.parametrize("task", sorted(FORMULAS))
def test_formulas_pass_and_programs_do_not(task):
    assert [text for text in FINE if not may_be_shown(text, task)] == []
    assert [text for text in [*PROGRAMS, "99999999!"] if may_be_shown(text, task)] == []


@pytest.mark.parametrize("task", sorted(LITERALS))
def test_lists_and_texts_pass_and_programs_do_not(task):
    for text in ("[[0, 1], [1, -2]]", "['a', 'b']", "ABCD", "0 1\n1 0", "_ Q _\nQ _ _", "1 2 3"):
        assert may_be_shown(text, task), text
    for text in PROGRAMS:
        number = text in ("1e999", "1e-999999999", "1.e-400000")
        if not number and not text.startswith("(("):  # what Python reads as 0 or infinity, or refuses to read
            assert not may_be_shown(text, task), text


def test_other_tasks_evaluate_nothing():
    assert may_be_shown("anything(9**9)", "chain_sum")


@pytest.mark.parametrize("name", sorted(FORMULAS | LITERALS))
def test_every_right_answer_may_be_shown(name):
    env = ReasoningGym(name)
    for index in range(6):
        task = env.task(1, index)
        if "Integral" not in task.answer:  # the package's own answer is sometimes the question
            assert env.score(task, {"content": f"<answer>{task.answer}</answer>"}).value == 1.0, task.answer


@pytest.mark.parametrize("name", sorted(FORMULAS | LITERALS))
def test_no_answer_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = ReasoningGym(name)
    task = env.task(0, 0)
    for text in PROGRAMS:
        assert env.score(task, {"content": f"<answer>{text}</answer>"}).value < 1.0
    assert not list(tmp_path.iterdir())
