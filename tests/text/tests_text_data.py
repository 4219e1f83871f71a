"""Strategies that the tests of this room share: texts full of special tokens and their fragments, and messages."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from glm5.text import SPECIAL_TOKENS, TERMINATORS

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "units": {"type": ["string", "null"]},
                    "options": {"type": "object"},
                    "tags": {"type": "array", "items": {"type": "string"}},
                    "exact": {"type": "boolean"},
                    "height": {"type": "number"},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "ping"}},
]

_FRAGMENTS = [*SPECIAL_TOKENS, *(token[:4] for token in SPECIAL_TOKENS), "<", ">", "|>", "\\n", "\n", " ", '"', "\\"]


def awkward_text(min_size: int = 0) -> st.SearchStrategy[str]:
    """Text that mixes special tokens, beginnings of them, any Unicode and plain words."""
    characters = st.characters(exclude_categories=("Cs", "Cn"))
    part = st.one_of(
        st.sampled_from(_FRAGMENTS), st.text(characters, max_size=4), st.sampled_from(["Paris", " the", "7"])
    )
    return st.lists(part, min_size=min_size, max_size=12).map("".join)


def splits(text: str) -> st.SearchStrategy[list[str]]:
    """The text cut into pieces anywhere."""
    cuts = st.lists(st.integers(0, len(text)), max_size=12).map(sorted)
    return cuts.map(lambda at: [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)])


_CLEAN = st.text(st.characters(exclude_categories=("Cs", "Cn"), exclude_characters="<"), max_size=12)
_WORD = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
_SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), _CLEAN)
_JSON = st.recursive(
    _SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORD, inner, max_size=3), max_leaves=6
)
_ARGUMENTS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "city": _CLEAN,
        "days": st.integers(),
        "units": st.none() | _CLEAN.filter(lambda text: text.strip() != "null"),
        "options": st.dictionaries(_WORD, _JSON, max_size=3),
        "tags": st.lists(_CLEAN, max_size=3),
        "exact": st.booleans(),
        "height": st.floats(allow_nan=False, allow_infinity=False),
    },
)


def assistant_messages() -> st.SearchStrategy[dict[str, Any]]:
    """Messages as a model may mean them: reasoning, content, calls of known tools with arguments of the right types."""
    calls = st.lists(st.tuples(st.just("get_weather"), _ARGUMENTS) | st.just(("ping", {})), max_size=3)
    return st.builds(
        lambda reasoning, content, called: {
            "role": "assistant",
            "reasoning_content": reasoning,
            "content": content.strip() or None,
            "tool_calls": [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in called],
        },
        _CLEAN,
        _CLEAN,
        calls,
    )


assert set(TERMINATORS) <= set(_FRAGMENTS)
