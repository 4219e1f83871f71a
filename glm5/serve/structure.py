"""What an answer must look like, as one Lark grammar for the engine (`SamplingParams.structured_outputs`).

    start: [reasoning </think>] (answer | call+)

`answer` is the JSON of a `response_format`; `call` is one of the tools in GLM's format (`glm5.serve.tool_rules`). The
tags are the tokenizer's own special tokens, which no text matches. A reasoning that stands before a structure is given
at most so many tokens: a model that never closes it would never answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llguidance import regex_to_lark

from glm5.engine import SamplingParams, StructuredOutputs
from glm5.errors import InputError
from glm5.serve.json_schemas import json_terminal
from glm5.serve.strict_tools import is_strict
from glm5.serve.tool_rules import CLOSING, call_rules
from glm5.text import Tokenizer

Calls = Literal["none", "one", "many"]

FORMAT = "The schema of the answer's format"
REASONING = r"/(?s:.*)/ & ~/(?s:.*)(<\/think>|<tool_call>)(?s:.*)/"
"""Any text but the tags that would end it, spelled in plain characters."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What an answer may be: `answer` (a JSON schema), calls of `tools`, or either when both are given; or `whole`:
    what vLLM's field says (behind a reasoning no `grammar`)."""

    answer: Mapping[str, Any] | bool | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    calls: Calls = "none"
    whole: StructuredOutputs | None = None

    def outputs(self, *, thinking: bool, reasoning_tokens: int) -> StructuredOutputs | None:
        """The grammar, or None when nothing is asked for. `thinking`: the prompt ended in `<think>`, and so many tokens
        of it at most. Raises `InputError` for tools that cannot be forced and schemas that cannot be written."""
        if self.whole is not None and not thinking:
            return self.whole
        if self.whole is None and self.answer is None and self.calls == "none":
            return None
        rules: list[str] = []
        bodies: list[str] = []
        unspelled: list[str] = []
        if self.answer is not None:
            bodies.append("answer")
            unspelled.append("</think>")  # which a reader drops
            rules.append(f"answer: {json_terminal(self.answer, self.answer, FORMAT)}")
        if self.whole is not None:
            bodies.append("answer")
            rules.append(f"answer: {_behind_reasoning(self.whole)}")
        if self.calls != "none":
            bodies.append("call+" if self.calls == "many" else "call")
            rules += call_rules(self.tools)
            unspelled += CLOSING if len(bodies) == 1 else (*CLOSING, "<tool_call>")
        head = "reasoning </think> " if thinking else ""
        if thinking:
            rules += [f"reasoning[max_tokens={max(1, reasoning_tokens)}]: REASONING", f"REASONING: {REASONING}"]
        grammar = "\n".join([f"start: {head}({' | '.join(bodies)})", *rules])
        return StructuredOutputs(grammar=grammar, unspelled=unspelled)


def _behind_reasoning(outputs: StructuredOutputs) -> str:
    """The right side of a rule for a JSON schema, an expression or some texts."""
    if outputs.json is not None:
        schema = json.loads(outputs.text)
        return json_terminal(schema, schema, "The schema of structured_outputs.json")
    if outputs.regex is not None:
        return f"/{regex_to_lark(outputs.regex, '')}/"
    return " | ".join(json.dumps(text, ensure_ascii=False) for text in outputs.choice or ())


def with_calls_as_allowed(
    params: SamplingParams, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]], *, parallel: bool, thinking: bool,
    exact: bool, grammars: bool,
) -> SamplingParams:  # fmt: skip
    """The settings under the tools that the prompt shows: where there are none no call begins, where one is strict a
    grammar holds every call, and where one call is allowed and no grammar of the whole holds it, its end ends the turn.
    Where the prompt begins a reasoning, stop strings are looked for behind it: what they end is the answer.

    exact: what is sampled is recorded as the model's own, so nothing is forbidden; the parser takes the tag for text.
    grammars: whether the source has any. Raises `InputError` for strict tools that cannot be held.
    """
    if thinking:
        params = replace(params, stop_from=("</think>", "<tool_call>") if tools else ("</think>",))
    if not tools:
        begin = (tokenizer.token_to_id("<tool_call>"),)
        return params if exact else replace(params, bad_sequences=(*params.bad_sequences, begin))
    if params.structured_outputs is not None:
        return params
    if grammars and not exact and any(map(is_strict, tools)):
        grammar = "\n".join(["start: call", *call_rules(tools, strict_only=True)])
        params = replace(
            params, structured_outputs=StructuredOutputs(grammar=grammar, begins_at="<tool_call>", unspelled=CLOSING)
        )
    if parallel:
        return params
    return replace(params, stop_token_ids=(*params.stop_token_ids, tokenizer.token_to_id("</tool_call>")))


def as_held(tools: Sequence[Mapping[str, Any]], outputs: StructuredOutputs | None) -> list[Mapping[str, Any]]:
    """The tools for the reader of their calls. What the rules for calls have held it takes to the letter, as it does
    where a tool is `strict`: every call, or of a grammar that begins in the middle those of strict tools."""
    held = outputs is not None and set(CLOSING) <= set(outputs.unspelled)
    every = held and outputs is not None and outputs.begins_at is None
    marked = lambda function: {**function, "strict": every or (held and is_strict(function))}
    return [{**tool, "function": marked(tool["function"])} if "function" in tool else marked(tool) for tool in tools]


def reasoning_share(prompt_tokens: int, max_tokens: int | None, max_model_len: int) -> int:
    """Tokens that the reasoning before a structure may take: half of what the request may sample."""
    return (max_tokens or max(2, max_model_len - prompt_tokens)) // 2


def answer_schema(response_format: Mapping[str, Any] | None) -> Mapping[str, Any] | bool | None:
    """The JSON schema that a `response_format` (or the `text.format` of responses) asks for; None for plain text.

    Raises `InputError` for a format that is not known.
    """
    kind = (response_format or {}).get("type", "text")
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        named = response_format.get("json_schema", response_format)
        schema = named.get("schema") if isinstance(named, Mapping) else None
        if not isinstance(schema, Mapping | bool):
            raise InputError("A json_schema format needs its schema: {'name': ..., 'schema': {...}}.")
        json.dumps(schema)
        return schema
    raise InputError(f"The response format {kind!r} is not known; use text, json_object or json_schema.")
