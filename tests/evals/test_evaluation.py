"""The evaluation's numbers, against counts made by hand from its own sample file."""

import json

import pytest
from speaker import ScriptedModel, speaker_model, speaker_tokenizer

from glm5.engine import Engine
from glm5.envs import Arithmetic, EnvironmentFailure
from glm5.errors import ConfigError, InputError
from glm5.evals import EvalConfig, evaluate, write_evaluation
from glm5.scoring import proportion


def test_a_model_that_always_says_42(tmp_path):
    env = Arithmetic(split="heldout")
    engine = Engine(ScriptedModel("It is 42."), speaker_tokenizer())
    config = EvalConfig(tasks=150, seed=7, max_tokens=40)
    result, answers = evaluate(engine, env, config)
    right = [i for i in range(150) if env.task(7, i).answer == "42"]
    assert result.accuracy == proportion(len(right), 150)
    assert [i for i, a in enumerate(answers) if a.reward.grade.correct] == right
    for name, part in result.categories.items():
        mine = [i for i in range(150) if env.task(7, i).category == name]
        assert part == proportion(len(set(mine) & set(right)), len(mine))
    assert (result.failures, result.truncated) == (0, 0)
    write_evaluation(tmp_path / "eval", result, answers)
    written = json.loads((tmp_path / "eval" / "result.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "eval" / "samples.jsonl").read_text().splitlines()]
    assert sum(line["outcome"] == "correct" for line in lines) == written["accuracy"]["correct"] == len(right)
    assert written["accuracy"]["value"] == pytest.approx(len(right) / 150)
    assert lines[0]["text"] == "It is 42." and lines[0]["extracted"] == "42"


class Oracle(Arithmetic):
    """Accepts anything, but breaks on every third task."""

    def score(self, task, response):
        if int(task.id.split("/")[-1]) % 3 == 0:
            raise EnvironmentFailure("down")
        return super().score(task, {"content": task.answer})


def test_an_environment_failure_is_never_a_wrong_answer():
    result, answers = evaluate(
        Engine(ScriptedModel("x"), speaker_tokenizer()), Oracle(), EvalConfig(tasks=9, max_tokens=4)
    )
    assert (result.accuracy.correct, result.accuracy.total, result.failures) == (6, 6, 3)
    assert answers[0].record()["outcome"] == "environment_failure"


def test_the_same_evaluation_gives_the_same_answers():
    config = EvalConfig(tasks=12, temperature=1.0, max_tokens=5)
    runs = [evaluate(Engine(speaker_model(), speaker_tokenizer()), Arithmetic(), config) for _ in range(2)]
    assert runs[0][0] == runs[1][0]
    assert [a.output.token_ids for a in runs[0][1]] == [a.output.token_ids for a in runs[1][1]]
    assert len({a.output.token_ids for a in runs[0][1]}) > 6  # each task draws its own numbers
    assert runs[0][0].truncated > 0


def test_refusals():
    with pytest.raises(ConfigError, match="tasks is 0"):
        EvalConfig(tasks=0)
    with pytest.raises(InputError, match="needs a tokenizer"):
        evaluate(Engine(speaker_model()), Arithmetic())
