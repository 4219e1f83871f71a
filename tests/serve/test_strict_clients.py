"""Models of pydantic as tools and as formats, nested and in circles, through the `openai` and `anthropic` packages.

The weights are random, so whatever comes back in shape was held there."""

from typing import Annotated, Literal

import anthropic
import openai
import pytest
from live_server import live
from pydantic import BaseModel, Field
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import Engine
from glm5.serve import create_app

USER = [{"role": "user", "content": "?"}]
OFF = {"chat_template_kwargs": {"enable_thinking": False}}
MOST = 600


class Leaf(BaseModel):
    color: Literal["red", "blue"]
    size: Literal[1, 2]


class Tree(BaseModel):
    leaf: Leaf = Field(description="its leaf")
    maybe: Leaf | None = None
    more: Annotated[list[Leaf], Field(max_length=1)]


class Linked(BaseModel):
    on: bool
    next: "Linked | None" = None


@pytest.fixture(scope="module")
def url():
    engine = Engine(speaker_model(positions=4096), speaker_tokenizer())
    with live(create_app(engine, model_name="tiny")) as base:
        yield base
    engine.close()


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)


@pytest.mark.parametrize("model", [Tree, Linked])
@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "f"}}])
def test_openais_chat_parses_its_calls(client, model, choice):
    bias = {str(speaker_tokenizer().token_to_id("<tool_call>")): 6} if choice == "auto" else None
    reply = client.chat.completions.parse(
        model="tiny", messages=USER, tools=[openai.pydantic_function_tool(model, name="f")], tool_choice=choice, seed=1,
        logit_bias=bias, max_tokens=MOST, parallel_tool_calls=False, extra_body=OFF,
    )  # fmt: skip
    (call,) = reply.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, model)


@pytest.mark.parametrize("model", [Tree, Linked])
def test_openais_formats_and_responses_are_parsed(client, model):
    ask = {"model": "tiny", "extra_body": {"seed": 1, **OFF}}
    chat = client.chat.completions.parse(**ask, messages=USER, response_format=model, max_tokens=MOST)
    assert isinstance(chat.choices[0].message.parsed, model)
    answer = client.responses.parse(**ask, input="?", text_format=model, max_output_tokens=MOST)
    assert isinstance(answer.output_parsed, model)
    tools = [openai.pydantic_function_tool(model, name="f")]  # which the package writes flat
    made = client.responses.parse(
        **ask, input="?", tools=tools, tool_choice="required", parallel_tool_calls=False, max_output_tokens=MOST
    )
    assert isinstance(made.output[-1].parsed_arguments, model)


@pytest.mark.parametrize("model", [Tree, Linked])
@pytest.mark.parametrize("kind", ["auto", "any", "tool"])
def test_anthropics_messages_take_the_schema_that_pydantic_writes(url, monkeypatch, model, kind):
    monkeypatch.setattr("glm5.engine.admission.fresh_seed", lambda: 1)  # this API has none
    client = anthropic.Anthropic(base_url=url, api_key="x", max_retries=0)
    tool = {"name": "f", "input_schema": model.model_json_schema(), "strict": True}
    choice = {"type": kind, "disable_parallel_tool_use": True, **({"name": "f"} if kind == "tool" else {})}
    ask = {"model": "tiny", "messages": USER, "max_tokens": MOST}
    reply = client.messages.create(**ask, tools=[tool], tool_choice=choice)
    made = [model.model_validate(block.input) for block in reply.content if block.type == "tool_use"]
    assert made or kind == "auto"
    assert isinstance(client.messages.parse(**ask, output_format=model).parsed_output, model)
