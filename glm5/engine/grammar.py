"""Structured output: which tokens a JSON schema, regular expression, choice or Lark grammar allows next.

The work is done by llguidance (an Earley parser over bytes with a lexer of derivatives; docs/syntax.md of that project
describes its dialect of Lark). A `GrammarCompiler` belongs to an engine and its tokenizer; a compiled grammar is kept,
and each completion gets a `GrammarState` of its own, whose mask of allowed tokens the sampler lays over the logits.

**Special tokens in Lark.** Every added token of the tokenizer is a terminal of its own, written as it looks:
`<think>`, `</think>`, `<tool_call>`, `</tool_call>`, `<arg_key>`, `</arg_key>`, `<arg_value>`, `</arg_value>`,
`<|user|>`. Texts and expressions never match them (a JSON string may spell `</arg_value>` in plain characters, unless
`unspelled` names it: `glm5.engine.spellings`). A GLM call of one tool, in thinking mode, is

    start: /[^<]*/ </think> call
    call: <tool_call> "get_weather" city days </tool_call>
    city: <arg_key> "city" </arg_key> <arg_value> /[^<]+/ </arg_value>
    days: <arg_key> "days" </arg_key> <arg_value> %json {"type": "integer", "minimum": 1} </arg_value>

String arguments are bare text in GLM's format, every other type is JSON (`%json SCHEMA` inside a rule). `call+` allows
parallel calls, `"a" | "b"` a choice of tools, and texts in quotes are written as JSON strings (`json.dumps`).

**Ends.** A completion ends as soon as its structure is complete and could not go on (`complete`). Where it could go on,
the end-of-turn tokens are allowed beside the tokens that go on, even with `ignore_eos`.

**White space** in JSON is what Python's `json.dumps` writes on one line: one space behind a comma and a colon, or none
(`JSON_SPACING`), so that no model spends its tokens on it. Keys come in the order of the schema. A `%json` in a grammar
of the caller's own has any white space, unless its schema says otherwise (`"x-guidance": {"whitespace_flexible":
false}`).

**Hostile grammars** are bounded in size, in llguidance's own fuel for compiling and for each step, and, because a
compilation cannot be interrupted and deep recursion would end the process, each new grammar is compiled by
`grammar_probe` first, a process that may be lost. Compiling takes milliseconds, at worst `PROBE_SECONDS`: servers call
it outside their event loop.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import llguidance

from glm5.engine.grammar_probe import LIMITS, AbandonedError, GrammarProbe, NotStartedError, Vocabulary
from glm5.engine.grammar_state import GrammarState, one_line
from glm5.engine.lazy_grammar import LazyGrammar
from glm5.engine.panics import panics_refused
from glm5.engine.sampling_params import StructuredOutputs
from glm5.engine.spellings import GuardedGrammar, Spellings
from glm5.errors import InputError, UnavailableError
from glm5.text import Tokenizer, token_bytes

T = TypeVar("T")
KEPT = 128
"""Compiled grammars that a compiler keeps, the latest used; and as many refusals."""
REFUSED_SECONDS = 300.0
"""How long a refusal holds without a new try: the machine may have been too busy for the grammar."""
JSON_SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""llguidance's options; the separators are expressions."""


class GrammarCompiler:
    """Compiles the structured outputs of one engine. Thread-safe; `close` ends its process.

    `vocab_size` is the model's, which may be larger than the tokenizer's: tokens beyond are never allowed. `eos_ids`
    may end a completion whose structure is satisfied. New grammars are compiled one after the other; who asks for one
    that is kept does not wait for them.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int]) -> None:
        self._vocab_size = vocab_size
        self._eos_ids = sorted(eos_ids) or list(tokenizer.eos_ids)
        self._text, self._backend = tokenizer, tokenizer.backend
        self._lock = threading.Lock()
        """Of what is kept, for moments."""
        self._compiling = threading.Lock()
        """Of the probe and the tokenizer, for seconds at worst."""
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._probe: GrammarProbe | None = None
        self._kept: OrderedDict[tuple[str, str], llguidance.LLMatcher] = OrderedDict()
        self._refused: OrderedDict[tuple[str, str], tuple[float, str]] = OrderedDict()
        """Until when, by `time.monotonic`, and why."""
        self._spellings: Spellings | None = None

    def compile(
        self, outputs: StructuredOutputs, wanted: Callable[[], bool] = lambda: True
    ) -> GrammarState | GuardedGrammar | LazyGrammar:
        """The beginning of a structure. Raises InputError with llguidance's reason for one that cannot be used.

        A refusal is kept too, for a while: who asks again does not hold up the others again. Raises UnavailableError
        when the process that tries grammars does not start, and AbandonedError soon after it is not `wanted` any more.
        """
        matcher = self._found(outputs)
        if matcher is None:
            with self._compiling:
                matcher = self._found(outputs)  # somebody else may have asked for the same
                if matcher is None:
                    if not wanted():
                        raise AbandonedError
                    try:
                        matcher = self._compiled(outputs, wanted)
                    except InputError as error:
                        self._keep(self._refused, outputs, (time.monotonic() + REFUSED_SECONDS, str(error)))
                        raise
                    self._keep(self._kept, outputs, matcher)
        tags = tuple(outputs.unspelled)

        @panics_refused("structured_outputs cannot be used")
        def fresh() -> GrammarState | GuardedGrammar:
            state = GrammarState(matcher.deep_copy(), self._vocab_size)
            return GuardedGrammar(state, self._spelled(tags), tags) if tags else state

        if outputs.begins_at is None:
            return fresh()
        begin = self._backend.token_to_id(outputs.begins_at)
        if begin is None or not fresh().allowed()[begin]:
            raise InputError(
                f"structured_outputs.begins_at is {outputs.begins_at!r}; name the added token that begins the grammar."
            )
        return LazyGrammar((begin, outputs.begins_at), fresh, self._vocab_size, self._spelled(()))

    def _spelled(self, tags: Iterable[str]) -> Spellings:
        """The spellings of added tokens. Raises InputError for one that is none."""
        with self._lock:
            if self._spellings is None:
                self._spellings = Spellings(self._backend)
        for tag in tags:
            if not self._spellings.known(tag):
                raise InputError(f"structured_outputs.unspelled has {tag!r}, which is no added token; leave it out.")
        return self._spellings

    def has(self, outputs: StructuredOutputs) -> bool:
        """Whether `compile` would find this structure, or its refusal, among the kept ones, at once."""
        try:
            return self._found(outputs) is not None
        except InputError:
            return True

    def close(self) -> None:
        """Ends the process that tries grammars; the next new grammar starts another."""
        with self._compiling:
            if self._probe is not None:
                self._probe.close()
            self._probe = None

    def _found(self, outputs: StructuredOutputs) -> llguidance.LLMatcher | None:
        """The kept one, if there is. Raises InputError for one that was refused lately."""
        key = outputs.kind, outputs.text
        with self._lock:
            until, reason = self._refused.get(key, (0.0, ""))
            if time.monotonic() < until:
                raise InputError(reason)
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, where: OrderedDict[tuple[str, str], T], outputs: StructuredOutputs, found: T) -> None:
        with self._lock:
            where[outputs.kind, outputs.text] = found
            where.move_to_end((outputs.kind, outputs.text))
            while len(where) > KEPT:
                where.popitem(last=False)

    @panics_refused("structured_outputs cannot be used")
    def _compiled(self, outputs: StructuredOutputs, wanted: Callable[[], bool]) -> llguidance.LLMatcher:
        named = f"structured_outputs.{outputs.kind}"
        try:
            grammar = _grammar(outputs)
        except ValueError as error:  # a schema that is JSON and yet none, or text that is not Unicode
            raise InputError(f"{named} cannot be used: {one_line(str(error))}.") from None
        if self._tokenizer is None or self._probe is None:
            vocabulary = vocabulary_of(self._text, self._vocab_size, self._eos_ids)
            self._tokenizer, self._probe = vocabulary.tokenizer(), GrammarProbe(vocabulary)
        try:
            reason = self._probe.error(grammar, wanted)
        except NotStartedError as error:
            raise UnavailableError(
                f"Structures cannot be compiled now: the process that tries them {error}; ask again in a while."
            ) from None
        if reason:
            raise InputError(f"{named} cannot be used: {one_line(reason)}.")
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise InputError(f"{named} cannot be used: {one_line(matcher.get_error())}.")
        return matcher


def _grammar(outputs: StructuredOutputs) -> str:
    """llguidance's own form of a structure."""
    if outputs.kind == "json":
        return llguidance.LLMatcher.grammar_from_json_schema(outputs.text, overrides=JSON_SPACING)
    if outputs.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(outputs.text)
    if outputs.kind == "choice":
        choices = outputs.choice if isinstance(outputs.choice, tuple) else ()
        return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, choices)))
    return llguidance.LLMatcher.grammar_from_lark(outputs.text)


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int, eos_ids: list[int]) -> Vocabulary:
    """The tokenizer's, for a model of so many tokens. GLM's tags of reasoning and calls are not marked as special."""
    state = json.loads(tokenizer.backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = True
    added = tokenizer.backend.get_added_tokens_decoder()
    tokens = [added[i].content.encode() if i in added else token_bytes(tokenizer, i) for i in range(vocab_size)]
    return Vocabulary(
        tokenizer_json=json.dumps(state),
        tokens=[(token or f"<[{i}]>".encode()).decode("latin-1") for i, token in enumerate(tokens)],
        special_ids=[i for i, token in enumerate(tokens) if i in added or not token],
        eos_ids=eos_ids,
    )
