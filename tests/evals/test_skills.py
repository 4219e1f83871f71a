"""The skill evaluation's numbers, with engines that answer from the key, always the same, or not at all."""

import json
from types import SimpleNamespace

import pytest
from speaker import speaker_model, speaker_tokenizer

from glm5.cli import eval_skills
from glm5.data.world import build_world
from glm5.data.world_text import write_world
from glm5.engine import Engine
from glm5.errors import ConfigError, InputError
from glm5.evals.skills import BARS, SkillsConfig, evaluate_skills, write_skills

SMALL = SkillsConfig(facts=24, sums=12, tools=10, unknown=6)


@pytest.fixture(scope="module")
def world():
    return build_world()


class KeyEngine:
    """Stands in for an engine: reads the question out of the prompt and answers with `answer(question)`."""

    def __init__(self, answer, finish_reason="stop"):
        self.tokenizer, self.answer, self.finish_reason = speaker_tokenizer(), answer, finish_reason

    def generate(self, prompts, params):
        assert params.temperature == 0.0 and params.max_tokens == SMALL.max_tokens
        for prompt in prompts:
            text = self.tokenizer.decode(prompt)
            question = text.rsplit("<|user|>", 1)[1].split("<|assistant|>")[0]
            thought = "ones 1+1+0=02</think>" if text.endswith("<think>") else ""
            yield SimpleNamespace(text=thought + self.answer(question), finish_reason=self.finish_reason)


def key_of(world):
    """The right answer to every question that the evaluation may ask."""
    _, records = evaluate_skills(KeyEngine(lambda question: ""), world, SMALL)
    key = {}
    for record in records:
        expected = record["expected"]
        if expected.startswith("{"):
            call = json.loads(expected)
            values = "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in call["arguments"].items())
            expected = f"<tool_call>{call['name']}{values}</tool_call>"
        key[record["question"]] = expected
    return key


def test_the_key_gets_everything_right(world):
    key = key_of(world)
    result, records = evaluate_skills(KeyEngine(key.__getitem__), world, SMALL)
    assert result.met and all(skill.share.value == 1.0 for skill in result.skills)
    assert set(BARS) <= {skill.name for skill in result.skills}
    assert result["facts, held-out wording"].total == result["known, answered"].total == 24
    for exposure in (1, 4, 16, 64):
        assert result[f"facts, held-out wording, exposure {exposure}"].total == 6
    assert result["stops by itself"].total == len(records) == 3 * 24 + 2 * 12 + 10 + 3 * 6
    assert 0.02 < result.best_constant < 0.4


def test_ignorance_everywhere_is_no_skill(world):
    result, _ = evaluate_skills(KeyEngine(lambda q: "I don't know."), world, SMALL)
    assert not result.met and result["facts, held-out wording"].value == result["known, answered"].value == 0
    assert result["unknown, strangers"].value == result["unknown, never taught"].value == 1.0


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("I call the tool.", False),
        ("<tool_call>format_disk</tool_call>", False),
        ("<tool_call>set_alarm<arg_key>hour</arg_key><arg_value>seven</arg_value></tool_call>", False),
        ("<tool_call>set_alarm</tool_call><tool_call>set_alarm</tool_call>", False),
    ],
)
def test_malformed_calls_are_counted(world, text, valid):
    result, _ = evaluate_skills(KeyEngine(lambda q: text), world, SMALL)
    assert (result["tools, well-formed call"].value == 1.0) is valid


def test_a_valid_call_of_the_wrong_kind_is_well_formed_only(world):
    values = "".join(f"<arg_key>{key}</arg_key><arg_value>1</arg_value>" for key in ("hour", "minute"))
    wrong = f"<tool_call>set_alarm{values}</tool_call>"
    result, records = evaluate_skills(KeyEngine(lambda q: wrong), world, SMALL)
    offered = [r for r in records if r["expected"].startswith("{")]
    assert 0 < result["tools, well-formed call"].correct < len(offered)
    assert result["tools, right arguments"].value == 0


def test_answers_cut_by_the_limit_do_not_stop(world):
    result, _ = evaluate_skills(KeyEngine(lambda q: "", finish_reason="length"), world, SMALL)
    assert result["stops by itself"].value == 0 and not result.met


def test_every_answer_is_written(world, tmp_path):
    result, records = evaluate_skills(KeyEngine(lambda q: "I don't know."), world, SMALL)
    write_skills(tmp_path / "skills", result, records)
    written = json.loads((tmp_path / "skills" / "result.json").read_text())
    assert written["kind"] == "skills" and written["met"] is False
    lines = (tmp_path / "skills" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == len(records) and json.loads(lines[0])["text"] == "I don't know."


def test_refusals(world):
    with pytest.raises(ConfigError, match="sums is 0"):
        SkillsConfig(sums=0)
    with pytest.raises(InputError, match="holds a tokenizer"):
        evaluate_skills(Engine(speaker_model()), world)


def test_the_verb_prints_a_table_and_fails_when_a_bar_is_missed(world, tmp_path, capsys, monkeypatch):
    write_world(world, tmp_path / "world")
    for answer, status in (("I don't know.", 1), (None, 0)):
        engine = KeyEngine(key_of(world).__getitem__ if answer is None else lambda q: "I don't know.")
        monkeypatch.setattr(eval_skills, "Engine", lambda model, dtype, engine=engine: engine)
        assert eval_skills.run(tmp_path, tmp_path / "world", SMALL, out=tmp_path / "out", json=False) == status
        assert ("missed" in capsys.readouterr().out) is (status == 1)
        assert json.loads((tmp_path / "out" / "result.json").read_text())["met"] is (status == 0)
    with pytest.raises(InputError, match="as --world"):
        eval_skills.run(tmp_path, None, SMALL, out=None, json=True)
