"""How one request is sampled: the field names and defaults of vLLM's `SamplingParams`, checked when it is made.

What each field does, with its formula and in which order they apply, is in docs/sampling.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

from glm5.engine.checks import LARGEST, as_tuple, check_number, check_whole
from glm5.errors import InputError

MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_SAMPLES = 256
MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_BAD = 128
MAX_BAD_LENGTH = 64
MAX_PENALTY = 2.0
MAX_REPETITION = 100.0
"""And its inverse is the least: in fp32 a factor beyond may be 0 or infinite, and the logits no numbers."""
LEAST_TEMPERED = 0.01
WHOLE = {
    "n": (1, MAX_SAMPLES), "top_k": (-1, None), "max_tokens": (1, None), "min_tokens": (0, None),
    "seed": (0, 2**64 - 1), "experts_from": (0, None), "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}  # fmt: skip
"""Fields that are whole numbers, and their bounds."""
OPTIONAL = {"max_tokens", "seed", "experts_from", "logprobs", "prompt_logprobs"}
"""Of these, the fields that may be None."""
NUMBERS = {
    "temperature": (0.0, LARGEST), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0),
    "repetition_penalty": (1 / MAX_REPETITION, MAX_REPETITION), "presence_penalty": (-MAX_PENALTY, MAX_PENALTY),
    "frequency_penalty": (-MAX_PENALTY, MAX_PENALTY),
}  # fmt: skip
"""Fields that are numbers, and their bounds; `top_p` is above its lower one."""
MAX_GRAMMAR_BYTES = 256 * 1024


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """What the completion must be, word for word: json, regex, choice or grammar, exactly one. Raises `InputError`.

    Whether the schema, expression or grammar can be used is found when the engine takes the request
    (`glm5.engine.grammar`).
    """

    json: str | Mapping[str, Any] | bool | None = None
    """A JSON schema (draft 2020-12) as its text, a mapping or a bool; stored as its text. `{}` is any JSON value."""
    regex: str | None = None
    """A regular expression that the whole completion matches (Rust's syntax, no look-around)."""
    choice: Iterable[str] | None = None
    """The completion is one of these texts; stored as a tuple."""
    grammar: str | None = None
    """A Lark grammar in llguidance's dialect; `start` is its first rule."""
    begins_at: str | None = None
    """With a `grammar`: the added token, such as `<tool_call>`, that is its first symbol. The grammar then holds from
    each such token to its end; before, between and after, the text is free (`glm5.engine.lazy_grammar`)."""
    unspelled: Iterable[str] = ()
    """With a `grammar`: added tokens that none of its texts spells in plain characters (`glm5.engine.spellings`), where
    a reader of the text would take them for the token; stored as a tuple."""

    def __post_init__(self) -> None:
        fields = {"json": self.json, "regex": self.regex, "choice": self.choice, "grammar": self.grammar}
        given = [name for name, value in fields.items() if value is not None]
        if len(given) != 1:
            named = " and ".join(given) or "none"
            raise InputError(f"structured_outputs has {named}; give exactly one of json, regex, choice and grammar.")
        if self.begins_at is not None and (self.grammar is None or not isinstance(self.begins_at, str)):
            raise InputError("structured_outputs.begins_at is the text of a token and belongs to a grammar.")
        object.__setattr__(self, "unspelled", _unspelled(self.unspelled, self.grammar))
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise InputError(f"structured_outputs.{name} is {value!r}; give a text of at least one character.")
        size = len(self.text.encode("utf-8", "surrogatepass"))
        if size > MAX_GRAMMAR_BYTES:
            raise InputError(
                f"structured_outputs.{self.kind} has {size:,} bytes; at most {MAX_GRAMMAR_BYTES:,} are taken."
            )

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None)

    @property
    def text(self) -> str:
        """The field as one text, which with `kind` identifies the grammar."""
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one request; `dataclasses.replace` changes a field (it validates again).

    The order, as in vLLM: structure, `bad_sequences`, `min_tokens`, `logit_bias`, penalties, temperature, `min_p`,
    `top_k`, `top_p`. Raises `InputError`.
    """

    n: int = 1
    """Completions of the same prompt; each draws its own random numbers."""
    temperature: float = 1.0
    """0 takes the likeliest token (the lowest id of equals)."""
    top_p: float = 1.0
    """Keeps the likeliest tokens until their probabilities reach this sum; 1 keeps all."""
    top_k: int = 0
    """Keeps this many of the likeliest tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Drops tokens less likely than this share of the likeliest one."""
    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative ones, of tokens in prompt and output; 0.01 to 100."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that is in the output, -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit once for each time that it is in the output, -2 to 2."""
    logit_bias: Mapping[int, float] | None = None
    """token id -> number from -100 to 100 that is added to its logit; stored as a dict."""
    bad_sequences: Iterable[SequenceOf[int]] = ()
    """Token ids that are not written in a row: the last of them is never sampled behind the others, and one that stands
    alone never. Stored as tuples. (vLLM's `bad_words`, in ids.)"""
    max_tokens: int | None = 16
    """Tokens to sample at most; None: as many as the context limit leaves."""
    min_tokens: int = 0
    """No stop token is sampled, and no stop string looked for, in this many tokens."""
    stop: str | Iterable[str] = ()
    """Strings that end the text; stored as a tuple. They need an engine with a tokenizer."""
    stop_from: str | Iterable[str] = ()
    """Stop strings are looked for from the first of these texts on (`</think>`: not in the reasoning), in which one may
    begin too; stored as a tuple. Empty: from the beginning."""
    stop_token_ids: Iterable[int] = ()
    """Token ids that end the sequence, beside the model's own end-of-turn ids; stored as a tuple."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Goes on after the model's own end-of-turn ids (`stop_token_ids` still stop)."""
    seed: int | None = None
    """Seed of this request; None draws a fresh one, which the output reports."""
    tempered_logprobs: bool = False
    """Report log-probabilities at this `temperature` (0.01 or more) instead of the model's own: those of the
    distribution that is sampled, where nothing is cut off. For learners in the same program."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report at each position. The sampled token's own is always reported."""
    prompt_logprobs: int | None = None
    """Reports the prompt's own tokens too, with this many of the likeliest at each position."""
    experts_from: int | None = None
    """Reports the experts that each sparse layer chose for every token that went through the model, from this position
    on (0: the whole prompt too). None reports nothing."""
    structured_outputs: StructuredOutputs | None = None
    """Structure that the completion must have; it ends when the structure is complete."""

    def __post_init__(self) -> None:
        stop, stop_from = (
            (given,) if isinstance(given, str) else as_tuple(name, given, "strings")
            for name, given in (("stop", self.stop), ("stop_from", self.stop_from))
        )
        given_ids = as_tuple("stop_token_ids", self.stop_token_ids, "token ids")
        stop_token_ids = tuple(check_whole("stop_token_ids entry", token, 0) for token in given_ids)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_from", stop_from)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "bad_sequences", _bad(self.bad_sequences))
        for name, bounds in WHOLE.items():
            if getattr(self, name) is not None or name not in OPTIONAL:
                object.__setattr__(self, name, check_whole(name, getattr(self, name), *bounds))
        check_whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        for name, (low, high) in NUMBERS.items():
            value = check_number(name, getattr(self, name), low, high, above=name == "top_p")
            object.__setattr__(self, name, value)
        if self.tempered_logprobs and self.temperature < LEAST_TEMPERED:
            given = f"{self.temperature:g}; give {LEAST_TEMPERED:g} at least"
            raise InputError(f"tempered_logprobs has no meaning at temperature {given}.")
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutputs):
            raise InputError(
                f"structured_outputs is a {type(self.structured_outputs).__name__}; give a StructuredOutputs."
            )
        if max(map(len, (stop, stop_from, stop_token_ids))) > MAX_STOPS:
            raise InputError(f"stop, stop_from and stop_token_ids hold at most {MAX_STOPS} entries each; give fewer.")
        for name, texts in (("stop", stop), ("stop_from", stop_from)):
            wrong = next((text for text in texts if not isinstance(text, str) or not text), None)
            if wrong is not None:
                raise InputError(f"{name} holds {wrong!r}; each entry must be a text of at least one character.")


def _biases(given: Any) -> dict[int, float] | None:
    """A checked copy of `logit_bias`; None when it changes nothing."""
    if given is None:
        return None
    if not isinstance(given, Mapping) or len(given) > MAX_BIASES:
        what = f"has {len(given):,} entries" if isinstance(given, Mapping) else f"is {given!r}"
        raise InputError(f"logit_bias {what}; give a dict of at most {MAX_BIASES:,} token ids and their biases.")
    biases = {
        check_whole("logit_bias key", token, 0): check_number(f"logit_bias of token {token}", bias, -MAX_BIAS, MAX_BIAS)
        for token, bias in given.items()
    }
    return biases or None


def _bad(given: Any) -> tuple[tuple[int, ...], ...]:
    """A checked copy of `bad_sequences`."""
    found = tuple(
        as_tuple("bad_sequences entry", one, "token ids") for one in as_tuple("bad_sequences", given, "lists")
    )
    if len(found) > MAX_BAD or not all(1 <= len(one) <= MAX_BAD_LENGTH for one in found):
        raise InputError(
            f"bad_sequences holds at most {MAX_BAD} entries of 1 to {MAX_BAD_LENGTH} token ids; give less."
        )
    return tuple(tuple(check_whole("bad_sequences token", token, 0) for token in one) for one in found)


def _schema_text(given: Any) -> str:
    """A JSON schema as text."""
    try:
        schema = json.loads(given) if isinstance(given, str) else given
        if not isinstance(schema, Mapping | bool):
            raise InputError(f"structured_outputs.json is {given!r:.100}; a JSON schema is an object or a boolean.")
        return given if isinstance(given, str) else json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise InputError("structured_outputs.json is nested too deeply; give a flatter schema.") from None
    except (TypeError, ValueError) as error:  # InputError is neither
        raise InputError(f"structured_outputs.json is not JSON ({error}); give a JSON schema.") from None


def _choices(given: Any) -> tuple[str, ...]:
    """The texts of `choice`."""
    choices = as_tuple("structured_outputs.choice", given, "texts")
    wrong = [choice for choice in choices if not isinstance(choice, str) or not choice]
    if wrong or not choices:
        what = f"holds {wrong[0]!r}" if wrong else "is empty"
        raise InputError(f"structured_outputs.choice {what}; give texts of at least one character.")
    return choices


def _unspelled(given: Any, grammar: Any) -> tuple[str, ...]:
    """The tags of `unspelled`."""
    tags = as_tuple("structured_outputs.unspelled", given, "texts")
    if tags and (grammar is None or not all(isinstance(tag, str) for tag in tags)):
        raise InputError("structured_outputs.unspelled has texts of added tokens and belongs to a grammar.")
    return tags
