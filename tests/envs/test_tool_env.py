"""Functions as tools: schemas, calls, errors that are messages and failures that are not."""

import asyncio
import json
import threading
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import pytest
from episodes import assert_pure, play, said
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field

from glm5.data.tools import CALCULATOR
from glm5.data.world import build_world
from glm5.envs import (
    EnvironmentFailure,
    Sums,
    Toolbox,
    ToolEnvironment,
    calculator,
    calculator_environment,
    lookup_environment,
)
from glm5.errors import ConfigError, InputError
from glm5.text import CHAT_TEMPLATE, parse_assistant
from glm5.text.template import render


class Place(BaseModel):
    title: str
    at: tuple[float, float] = (0.0, 0.0)


def find(place: Place, kind: Literal["hill", "lake"], most: Annotated[int, Field(ge=1, le=9)] = 3) -> list[str]:
    """Finds places
    near another.

    This paragraph is for programmers.
    """
    return [f"{kind} {i} at {place.title}" for i in range(most)]


def answers(functions, *calls):
    message = said("", *calls)
    return [m["content"] for m in asyncio.run(Toolbox(functions).answer(message["tool_calls"]))]


def test_the_schema_comes_from_the_signature():
    (tool,) = Toolbox([find]).tools
    function = tool["function"]
    assert function["name"] == "find" and function["description"] == "Finds places near another."
    schema = function["parameters"]
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    assert validator.is_valid({"place": {"title": "Arlo"}, "kind": "hill"})
    assert not validator.is_valid({"place": {"title": "Arlo"}, "kind": "sea"})
    assert not validator.is_valid({"place": {"title": "Arlo"}, "kind": "hill", "most": 10})
    assert not validator.is_valid({"kind": "hill"})


def test_the_calculator_looks_as_the_supervised_stage_showed_it():
    (tool,) = Toolbox([calculator]).tools
    assert tool == CALCULATOR


def test_arguments_are_checked_and_converted():
    good = '{"place": {"title": "Arlo"}, "kind": "lake", "most": 2}'
    assert json.loads(answers([find], ("find", good))[0]) == ["lake 0 at Arlo", "lake 1 at Arlo"]
    for call, words in [
        (("find", '{"kind": "lake"}'), "place: Field required"),
        (("find", '{"place": {"title": "Arlo"}, "kind": "sea"}'), "kind: "),
        (("find", '{"place": {}, "kind": "lake"}'), "place.title"),
        (("find", '{"place": {"title": "A"}, "kind": "lake", "colour": 1}'), "colour: Extra inputs"),
        (("find", "{"), "no JSON"),
        (("find", '{"most": ' + "1" * 5000 + "}"), "no JSON"),
        (("find", '{"most": ' + "[" * 100_000 + "]" * 100_000 + "}"), "no JSON"),
        (("find", "[1]"), "valid dictionary"),
        (("fnid", "{}"), "there is no tool fnid. Did you mean 'find'?"),
    ]:
        assert words in json.loads(answers([find], call)[0])["error"]


def test_a_result_that_cannot_be_written_is_a_message():
    """What the model asked for made it so: nobody may leave an episode by a large number."""

    def power(exponent: int) -> int:
        return 10**exponent

    found = answers([power], ("power", '{"exponent": 2}'), ("power", '{"exponent": 5000}'))
    assert found[0] == "100" and "4300 digits" in json.loads(found[1])["error"]


def test_an_exception_is_a_message_and_the_infrastructure_is_a_failure():
    def tool(how: str) -> str:
        raise {"value": ValueError("no such town"), "empty": KeyError(), "lost": ConnectionResetError("gone"),
               "memory": MemoryError(), "own": EnvironmentFailure("down", "unreachable")}[how]  # fmt: skip

    assert answers([tool], ("tool", '{"how": "value"}')) == ['{"error": "no such town"}']
    assert answers([tool], ("tool", '{"how": "empty"}')) == ['{"error": "KeyError"}']
    for how, kind in [("lost", "unreachable"), ("memory", "crash"), ("own", "unreachable")]:
        with pytest.raises(EnvironmentFailure) as caught:
            answers([tool], ("tool", json.dumps({"how": how})))
        assert caught.value.kind == kind


def test_calls_beside_one_that_fails_are_called_off():
    ended = []

    async def slow() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("slow")

    async def broken() -> str:
        await asyncio.sleep(0)
        raise EnvironmentFailure("down", "unreachable")

    async def story():
        with pytest.raises(EnvironmentFailure, match="down"):
            await Toolbox([slow, broken]).answer(said("", ("slow", ""), ("broken", ""))["tool_calls"])
        await asyncio.sleep(0)
        assert ended == ["slow"]

    asyncio.run(story())


def test_parameters_may_have_names_that_pydantic_uses_itself(recwarn):
    def write(json: str, copy: int = 2, *, _hidden: bool, model_config: str = "x") -> str:
        return f"{json} {copy} {_hidden} {model_config}"

    (tool,) = Toolbox([write]).tools
    assert list(tool["function"]["parameters"]["properties"]) == ["json", "copy", "_hidden", "model_config"]
    assert answers([write], ("write", '{"json": "a", "_hidden": true}')) == ["a 2 True x"]
    assert "_hidden: Field required" in answers([write], ("write", '{"json": "a"}'))[0]
    assert "field_0: Extra inputs" in answers([write], ("write", '{"field_0": "a"}'))[0]
    assert not recwarn.list


def test_a_default_may_be_a_field_with_all_that_it_says():
    def find(
        most: int = Field(3, description="how many", ge=1),
        place: str = Field(alias="town", description="where"),
        near: Annotated[int, Field(description="in km", le=9)] = Field(default_factory=lambda: 2, ge=0),
    ) -> str:
        return f"{most} {place} {near}"

    schema = Toolbox([find]).tools[0]["function"]["parameters"]
    assert schema["properties"]["most"] == {"default": 3, "description": "how many", "minimum": 1, "type": "integer"}
    assert schema["properties"]["place"] == {"description": "where", "type": "string"}
    assert schema["properties"]["near"] == {"description": "in km", "minimum": 0, "maximum": 9, "type": "integer"}
    assert schema["required"] == ["place"]
    assert answers([find], ("find", '{"place": "Arlo"}'), ("find", '{"place": "Arlo", "most": 1, "near": 0}')) == [
        "3 Arlo 2", "1 Arlo 0",
    ]  # fmt: skip
    assert "most: " in answers([find], ("find", '{"place": "Arlo", "most": 0}'))[0]


def test_calls_run_side_by_side_and_answer_in_order():
    both = threading.Barrier(2, timeout=120)
    met = asyncio.Event()

    def slow(number: int) -> int:
        both.wait()  # would wait for ever if the calls ran one behind the other
        return number

    async def waiting(number: int) -> int:
        if number == 1:
            await met.wait()
        met.set()
        return number

    assert answers([slow], ("slow", '{"number": 1}'), ("slow", '{"number": 2}')) == ["1", "2"]
    assert answers([waiting], ("waiting", '{"number": 1}'), ("waiting", '{"number": 2}')) == ["1", "2"]


def test_long_results_are_cut_and_say_so():
    def long() -> str:
        return "x" * 1000

    message = said("", ("long", ""))
    (result,) = asyncio.run(Toolbox([long], longest=100).answer(message["tool_calls"]))
    assert result == {"role": "tool", "tool_call_id": "call_0", "content": "x" * 100 + "... (900 more characters)"}


def test_functions_that_no_model_can_call_are_refused():
    def untyped(a):
        return a

    def starred(*a: int) -> int:
        return 0

    for function in (untyped, starred):
        with pytest.raises(InputError, match="parameter a of the tool"):
            Toolbox([function])
    with pytest.raises(InputError, match="same name"):
        Toolbox([calculator, calculator])


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_calculations_end_with_the_right_number(split):
    env = calculator_environment(split)
    assert_pure(env)
    task = env.task(0, 0)
    numbers = [int(word.strip("?.,:")) for word in task.messages[0]["content"].split() if word.strip("?.,:").isdigit()]
    call = json.dumps({"a": numbers[0], "operation": task.category, "b": numbers[1]})
    seen, reward = play(env, task, said("", ("calculator", call)), said(task.answer))
    assert json.loads(seen[1].messages[0]["content"]) == {"result": int(task.answer)}
    assert seen[2].done and reward.value == 1.0
    assert env.task(0, 0) != calculator_environment("heldout" if split == "train" else "train").task(0, 0)


def test_an_episode_that_the_limit_ends_in_a_call_is_scored_by_its_last_message():
    env = calculator_environment()
    task = env.task(0, 0)
    seen, reward = play(env, task, said("", ("calculator", '{"a": 1, "operation": "plus", "b": 1}')))
    assert not seen[-1].done and reward.value == 0.0 and reward.grade.outcome == "not_attempted"


@pytest.mark.parametrize("hops", [1, 2])
def test_lookups_lead_to_the_answer(hops):
    world = build_world()
    env = lookup_environment(world, hops)
    assert_pure(env)
    task = env.task(1, 5)
    path = task.messages[0]["content"].removeprefix("Look up: what is the ").removesuffix("?").split(" of the ")
    relations, (last, subject) = path[:-1], path[-1].rsplit(" of ", 1)
    said_so_far = []
    for relation in [last, *reversed(relations)]:
        call = said("", ("lookup", json.dumps({"entity": subject, "relation": relation})))
        seen, _ = play(env, task, *said_so_far, call)
        subject = json.loads(seen[-1].messages[0]["content"])["value"]
        said_so_far.append(call)
    assert len(said_so_far) == hops and subject == task.answer
    assert play(env, task, *said_so_far, said(f"It is {subject}."))[1].value == 1.0
    assert play(env, task, said("Nowhere"))[1].value == 0.0
    wrong = play(env, task, said("", ("lookup", '{"entity": "Nobody", "relation": "capital"}')))[0]
    assert "nothing is known of the capital of Nobody" in wrong[-1].messages[0]["content"]


def test_only_practised_facts_can_be_looked_up():
    world = build_world()
    hidden = next(fact for fact in world.facts if not fact.practised)
    env = lookup_environment(world)
    call = json.dumps({"entity": hidden.entity.name, "relation": hidden.relation.noun})
    assert "nothing is known" in play(env, env.task(0, 0), said("", ("lookup", call)))[0][-1].messages[0]["content"]


def test_tools_of_an_episode_may_share_a_state_and_a_judge_sees_everything():
    def tools(task):
        notes = []

        def note(text: str) -> int:
            notes.append(text)
            return len(notes)

        return [note]

    judge = lambda task, conversation: -sum(message["role"] == "tool" for message in conversation)
    env = ToolEnvironment(Sums(), tools, judge=judge)
    task = env.task(0, 0)
    for _ in range(2):  # a new state each time
        notes = [said("", ("note", json.dumps({"text": text}))) for text in "ab"]
        seen, reward = play(env, task, *notes, said("x"))
        assert [o.messages[0]["content"] for o in seen[1:3]] == ["1", "2"] and reward.value == -2.0


def test_other_tools_and_another_judge_are_another_environment():
    def add(a: int, b: int) -> int:
        return a + b

    def rude(task, conversation):
        return -1.0

    def judge(task, conversation):
        return 1.0

    first = judge

    def judge(task, conversation):
        return 0.0

    made = [ToolEnvironment(Sums(), [add], judge=one) for one in (None, first, judge, rude)]
    made += [ToolEnvironment(Sums(), [add, calculator]), ToolEnvironment(Sums(), lambda task: [add])]
    assert made[0].name == f"{Sums().name}/add" and len({environment.name for environment in made}) == len(made)
    assert ToolEnvironment(Sums(), [add], judge=judge).name == made[2].name
    assert ToolEnvironment(Sums(), [add], judge=judge, name="mine").name == "mine"


def test_a_copy_has_the_name_of_its_own_parts_and_keeps_one_that_was_given():
    def add(a: int, b: int) -> int:
        return a + b

    environment = ToolEnvironment(Sums(), [add])
    assert replace(environment, tools=[calculator]).name == f"{Sums().name}/calculator"
    assert (
        replace(environment, judge=bound_judge(1.0)).name == ToolEnvironment(Sums(), [add], judge=bound_judge(1.0)).name
    )
    assert replace(ToolEnvironment(Sums(), [add], name="mine"), tools=[calculator]).name == "mine"


def bound_judge(value):
    return lambda task, conversation: value


class Judge:
    def __call__(self, task, conversation):
        return 1.0


@pytest.mark.parametrize(
    "judge", [Judge(), Judge().__call__, partial(bound_judge(1.0)), bound_judge([1.0]), eval("lambda *_: 1.0")]
)
def test_a_judge_that_its_source_does_not_tell_apart_asks_for_a_name(judge):
    with pytest.raises(ConfigError, match=r"is no plain function .* give the environment a name="):
        ToolEnvironment(Sums(), [calculator], judge=judge)
    assert ToolEnvironment(Sums(), [calculator], judge=judge, name="mine").name == "mine"


def test_what_the_parser_gives_is_what_the_environment_takes():
    env = calculator_environment()
    task = env.task(0, 0)
    tools = env.episode(task).tools
    assert "calculator" in render(CHAT_TEMPLATE, {"messages": task.messages, "tools": tools})
    text = "<tool_call>calculator<arg_key>a</arg_key><arg_value>2</arg_value><arg_key>operation</arg_key>"
    text += "<arg_value>plus</arg_value><arg_key>b</arg_key><arg_value>3</arg_value></tool_call>"
    seen, _ = play(env, task, parse_assistant(text, tools, thinking=False))
    assert seen[-1].messages[0]["content"] == '{"result": 5}'
