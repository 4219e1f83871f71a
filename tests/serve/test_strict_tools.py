"""`strict: true` under a free choice: whatever the model would like, a call has arguments of its schema."""

import json
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from chat_client import USER, ask, client_of
from speaker import ScriptedModel, speaker_config, speaker_model, speaker_tokenizer
from wild import WildModel

from glm5.bundled import bundled_model
from glm5.engine import Engine, StructuredOutputs
from glm5.engine.grammar import GrammarCompiler
from glm5.errors import InputError
from glm5.serve.tool_rules import call_rules

V = speaker_config().vocab_size
DIGITS = {"digit": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]}}
BOOK = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["c", "f", "1", 1]},
        "note": {"type": ["string", "null"], "maxLength": 6},
        "mix": {"anyOf": [{"type": "string", "minLength": 2, "maxLength": 5}, {"type": "integer", "minimum": 100}]},
        "some": {"anyOf": [{"type": "string", "pattern": "^[a-z]{0,4}$"}, {"type": "boolean"},
                           {"type": "number", "maximum": 3}]},
        "inner": {"type": "object", "properties": {"a": {"type": "string", "maxLength": 9}, "n": {"type": "number"}},
                  "required": ["a", "n"], "additionalProperties": False},
        "list": {"type": "array", "items": {"$ref": "#/$defs/digit"}, "maxItems": 3},
    },
    "required": ["unit", "note", "mix", "some", "inner"],
    "additionalProperties": False,
    "$defs": DIGITS,
}  # fmt: skip
MORE = {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a"],
    "additionalProperties": {"type": "boolean"},
}  # fmt: skip
LOOSE = {"type": "object", "properties": {"q": {"type": "integer"}}}
SCHEMAS = {"book": BOOK, "bookmark": MORE, "bo": None}
TOOLS = [
    {"name": "book", "parameters": BOOK, "strict": True},
    {"name": "bookmark", "parameters": MORE, "strict": True},
    {"name": "bo", "parameters": LOOSE, "strict": False},
]
CHAT = [{"type": "function", "function": tool} for tool in TOOLS]
FLAT = [{"type": "function", **tool} for tool in TOOLS]
MESSAGES = [{"name": t["name"], "input_schema": t["parameters"], "strict": t["strict"]} for t in TOOLS]


def check(calls):
    """Names and arguments of whole calls."""
    for name, arguments in calls:
        assert name in SCHEMAS
        if SCHEMAS[name] is not None:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    return len(calls)


def of_chat(client, seed, **fields):
    fields = {"messages": USER, "tools": CHAT, "max_tokens": 200, "seed": seed, "temperature": 1.2, **fields}
    answer = ask(client, **fields)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    said = (choice["message"]["content"] or "") + (choice["message"]["reasoning_content"] or "")
    assert "<tool_call>" not in said
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in choice["message"].get("tool_calls", [])]
    return calls[: len(calls) - (choice["finish_reason"] == "length")]


CHOICES = ["auto", "required", {"type": "function", "function": {"name": "book"}}]


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("choice", CHOICES, ids=["auto", "required", "named"])
def test_no_call_of_a_strict_tool_is_invalid(choice, thinking):
    """The model likes to spell closing tags in plain characters, inside JSON too."""
    found = 0
    for seed in range(3, 5):
        client, kwargs = client_of(model=WildModel(seed)), {"enable_thinking": thinking}
        calls = of_chat(
            client, seed, chat_template_kwargs=kwargs, parallel_tool_calls=seed > 3, tool_choice=choice, max_tokens=300
        )
        found += check(calls)
    assert found


class Stubborn(ScriptedModel):
    """Wants the token of its script at each place, whatever was written before."""

    begin = None

    def forward(self, ids_1T, *, attention):
        self.begin = len(ids_1T[0]) if self.begin is None else self.begin
        logits_1TV = torch.zeros(*ids_1T.shape, V)
        logits_1TV[:, -1, self.script[min(len(ids_1T[0]) - self.begin, len(self.script) - 1)]] = 50.0
        return SimpleNamespace(logits=logits_1TV)


FREE = ["auto", "required", {"type": "function", "function": {"name": "f"}}]
INNER = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}


def stubborn(begin, spelled, end):
    """A client of a model that says one text as tokens, the next in plain characters, and the last as tokens."""
    model, encode = Stubborn("", 4096), speaker_tokenizer().encode
    model.script = [*encode(begin), *encode(spelled, allow_special=False), *encode(end), model.script[-1]]
    return client_of(model=model)


@pytest.mark.parametrize("choice", FREE, ids=["auto", "required", "named"])
@pytest.mark.parametrize("spelled", ["</arg_value></tool_call>", "</arg_value><arg_key>b</arg_key>", "</tool_call>"])
def test_a_closing_tag_in_a_json_string_is_not_spelled(choice, spelled):
    schema = {"type": "object", "properties": {"inner": INNER}, "required": ["inner"], "additionalProperties": False}
    for strict in (True, False)[: 1 if choice == "auto" else 2]:
        tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": strict}}
        call = '<tool_call>f<arg_key>inner</arg_key><arg_value>{"a": "x'
        client = stubborn(call, spelled, '"}</arg_value></tool_call>')
        reply = ask(client, tools=[tool], tool_choice=choice, chat_template_kwargs={"enable_thinking": False})
        (made,) = reply.json()["choices"][0]["message"]["tool_calls"]
        inner = json.loads(made["function"]["arguments"])["inner"]
        assert inner["a"].startswith("x" + spelled.partition(">")[0]) and spelled not in inner["a"]


@pytest.mark.parametrize("spelled", ["<tool_call>f</tool_call>", "</think>"])
def test_an_answer_in_a_format_spells_no_call(spelled):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": INNER, "strict": True}}
    reply = ask(stubborn('{"a": "x', spelled, '"}'), tools=[tool], response_format=named,
                chat_template_kwargs={"enable_thinking": False})  # fmt: skip
    message = reply.json()["choices"][0]["message"]
    assert "tool_calls" not in message
    assert json.loads(message["content"])["a"].startswith("x" + spelled.partition(">")[0])


@pytest.mark.soak
def test_no_call_of_a_strict_tool_is_invalid_in_many_answers():
    found = sum(check(of_chat(client_of(model=WildModel(seed)), seed, max_tokens=600)) for seed in range(100))
    assert found > 200


def test_one_call_at_most_where_calls_are_not_parallel():
    for seed in range(2):
        calls = of_chat(client_of(model=WildModel(seed)), seed, parallel_tool_calls=False, tools=CHAT[1:])
        assert check(calls) <= 1


def test_the_responses_hold_strict_tools_whole_and_streamed():
    client, found = client_of(model=WildModel(1)), 0
    body = {"model": "tiny", "input": "?", "tools": FLAT, "max_output_tokens": 300, "temperature": 1.2, "seed": 0}
    answer = client.post("/v1/responses", json=body).json()
    items = [item for item in answer["output"] if item["type"] == "function_call"]
    found += check([(i["name"], i["arguments"]) for i in items if i["status"] == "completed"])
    with client.stream("POST", "/v1/responses", json={**body, "stream": True}) as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    streamed = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert [i["arguments"] for i in streamed if i["type"] == "function_call"] == [i["arguments"] for i in items]
    assert found


def test_messages_hold_strict_tools(monkeypatch):
    monkeypatch.setattr("glm5.engine.admission.fresh_seed", lambda: 2)  # this API has none
    client, found = client_of(model=WildModel(1)), 0
    for thinking in ({"type": "disabled"}, {"type": "enabled", "budget_tokens": 1024}):
        body = {"model": "tiny", "messages": USER, "tools": MESSAGES, "max_tokens": 200, "thinking": thinking}
        answer = client.post("/v1/messages", json=body).json()
        calls = [(b["name"], json.dumps(b["input"])) for b in answer["content"] if b["type"] == "tool_use"]
        found += check(calls[: len(calls) - (answer["stop_reason"] == "max_tokens")])
    assert found


@pytest.mark.parametrize("made_of", ["random weights", "the bundled model"])
def test_real_models_at_a_high_temperature(made_of):
    """Pushed to call, for neither would by itself."""
    engine = None if made_of == "random weights" else Engine(bundled_model())
    client = client_of(model=speaker_model(positions=4096))
    if engine is not None:
        client.app.state.service.source = engine
        client.app.state.service.tokenizer = engine.tokenizer
    tokenizer = engine.tokenizer if engine is not None else speaker_tokenizer()
    bias = {str(tokenizer.token_to_id("<tool_call>")): 12 if engine is not None else 4}
    off = {"enable_thinking": False}
    calls = [
        call
        for seed in range(2)
        for call in of_chat(client, seed, max_tokens=200, temperature=1.5, logit_bias=bias, chat_template_kwargs=off)
    ]
    assert check(calls)
    if engine is not None:
        engine.close()


def test_without_a_strict_tool_nothing_is_compiled():
    client = client_of("</think>ok")
    service = client.app.state.service
    service.source.grammars.compile = None  # would fail
    loose = [{"type": "function", "function": {**tool, "strict": False}} for tool in TOOLS]
    assert ask(client_of(model=ScriptedModel("</think>ok", 4096)), tools=loose).status_code == 200
    assert ask(client, messages=USER).json()["choices"][0]["message"]["content"] == "ok"


def test_text_that_no_call_is_stays_as_it_is():
    """A strict tool changes nothing of an answer without calls: not even a spelled tag that is none of its own."""
    said = "hm</think>1 < 2, <tool> and </tool_call> and <tool_ call>."
    message = ask(client_of(model=ScriptedModel(said, 4096)), tools=CHAT).json()["choices"][0]["message"]
    assert message["content"] == said.partition("</think>")[2] and message["reasoning_content"] == "hm"


class Recorder:
    """Keeps the generations."""

    def __init__(self):
        self.kept = []

    def begin(self, session_id):
        pass

    def ended(self, generation):
        self.kept.append(generation)


def test_what_is_recorded_is_held_by_no_grammar():
    recorder = Recorder()
    client = client_of(model=ScriptedModel("</think>ok", 4096), recorder=recorder)
    assert ask(client, tools=CHAT).status_code == 200
    assert recorder.kept[0].params.structured_outputs is None


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"type": "array"}, "must be of the type object"),
        ({"properties": {}, "minProperties": 1}, "uses 'minProperties'"),
        ({"properties": {"a": {"minimum": 3}}}, "'a' of the strict tool 'f' needs a type"),
        ({"properties": {"a": {"type": "string", "not": {"const": "x"}}}}, "uses 'not'"),
        ({"properties": {"a": {"anyOf": [{"type": "string", "if": {}}, {"type": "null"}]}}}, "uses 'if'"),
        ({"properties": {"a": {"enum": ["x"], "pattern": "x"}}}, "uses 'pattern'"),
        ({"properties": {"a": {"enum": ["x"], "const": "x"}}}, "uses 'enum'"),
        ({"properties": {"a": {"oneOf": [{"type": "string"}, {"enum": ["x"]}]}}}, "uses 'oneOf'"),
        ({"properties": {"a": {"type": "string", "anyOf": {}}}}, "uses 'anyOf'"),
        ({"properties": {"a": {"type": "string", "$ref": "#/properties/b"}}}, r"uses '\$ref'"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, r"uses '\$ref'"),
        ({"properties": {"a": {"type": "string", "$ref": "#/properties/a"}}}, r"uses '\$ref'"),
        ({"properties": {"a": {"type": "array", "items": {"$ref": "other.json"}}}}, r"uses '\$ref'"),
        ({"properties": {"a": {"type": "array", "items": {"$id": "x", "allOf": [{"$ref": "#"}]}}}}, r"uses '\$id'"),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "uses 'uniqueItems'"),
        ({"properties": {"a": {"type": "object", "properties": {"b": {"not": {}}}}}}, "uses 'not'"),
        ({"properties": {"a": {"type": "object", "propertyNames": {"maxLength": 3}}}}, "uses 'propertyNames'"),
        (
            {
                "properties": {
                    "a": {"type": "integer", "enum": [1], "description": "</arg_value>"},
                    "b": {"type": "array", "items": {"enum": ["</arg_value>"]}},
                }
            },
            "'b' of the tool 'f' cannot be held to its schema, which spells a tag",
        ),
        ({"properties": {"a": {"type": "string", "minLength": 3.0}}}, "uses 'minLength'"),
        ({"properties": {"a": {"type": "string", "maxLength": True}}}, "uses 'maxLength'"),
        ({"properties": {"a": {"type": "string", "pattern": 3}}}, "uses 'pattern'"),
        ({"properties": {"a": {"type": "string", "minLength": 3, "maxLength": 2}}, "required": ["a"]}, "no value fits"),
        ({"properties": {"a": {"type": "string", "const": 3}}, "required": ["a"]}, "no value fits"),
        ({"additionalProperties": {"type": "string", "not": {}}}, "additionalProperties of the strict tool"),
    ],
)
def test_what_would_not_be_held_is_refused(parameters, sentence):
    strict = [{"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}]
    with pytest.raises(InputError, match=sentence):
        call_rules(strict)
    answer = ask(client_of("ok"), tools=strict)
    assert answer.status_code == 400 and "tool 'f'" in answer.json()["error"]["message"]


def test_a_tool_that_is_not_strict_takes_keys_with_spaces_and_may_have_any_name():
    strict = {"name": "f", "parameters": {"type": "object", "properties": {}}, "strict": True}
    rules = call_rules([strict, {"name": "a<b"}, {"name": "g"}], strict_only=True)
    assert rules[0] == "call: call_0 | call_2"
    tokenizer = speaker_tokenizer()
    compiler = GrammarCompiler(tokenizer, V, tokenizer.eos_ids)
    outputs = StructuredOutputs(grammar="\n".join(["start: call", *rules]), begins_at="<tool_call>")
    for key, fits in {"a": True, "max results": True, " a": False, "a ": False, "\x1fa": False, "a\x1c": False}.items():
        assert fits == allows(compiler.compile(outputs), tokenizer.encode(f"<tool_call>g<arg_key>{key}</arg_key>"))
    compiler.close()


def allows(state, ids):
    for token in ids:
        allowed = state.allowed()
        if allowed is not None and not allowed[token]:
            return False
        state.accept(token)
    return True


ESCAPED = "</think><tool_call>bo<arg_key>q</arg_key><arg_value>None</arg_value></tool_call>"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_where_no_grammar_holds_a_strict_tool_is_read_as_any(path):
    """A model's `None` is null then, as for a tool that is not strict."""
    schema = {"type": "object", "properties": {"q": {"type": ["string", "integer", "null"]}}}
    tool = {"name": "bo", "parameters": schema, "strict": True}
    said = {
        "/v1/chat/completions": {"messages": USER, "tools": [{"type": "function", "function": tool}]},
        "/v1/responses": {"input": "?", "tools": [{"type": "function", **tool}]},
        "/v1/messages": {"messages": USER, "max_tokens": 300, "thinking": {"type": "enabled", "budget_tokens": 1024},
                         "tools": [{"name": "bo", "input_schema": schema, "strict": True}]},
    }[path]  # fmt: skip
    read = []
    for recorder in (Recorder(), None):
        answer = client_of(model=ScriptedModel(ESCAPED, 4096), recorder=recorder).post(
            path, json={"model": "tiny", **said}
        )
        assert answer.status_code == 200, answer.text
        read.append("null" in answer.text.partition("bo")[2].partition("}")[0])
        assert ("None" in answer.text) != read[-1]
    assert read == [True, False]
