"""Rendering a Jinja chat template in a sandbox.

The same environment that `transformers` and the common servers give a template: immutable sandbox, trimmed blocks, loop
controls, `tojson` that keeps Unicode, `raise_exception`, `strftime_now`. Templates come from model directories, so
they are untrusted: they can compute text and nothing else. The `generation` tag of training templates is read and has
no effect here; `glm5.text.training` finds the supervised tokens itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glm5.errors import TextError

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
"""This project's own template: GLM-5.1's form, GLM-5.2's when `reasoning_effort` is given."""


EFFORTS = ("low", "high", "max")
"""What `reasoning_effort` may be."""


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text of a conversation. Raises `TextError` when the template is broken or refuses the messages."""
    try:
        return _compile(template).render(**variables)
    except jinja2.TemplateError as error:
        raise TextError(f"the chat template cannot render this conversation: {error}") from None
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RecursionError) as error:
        raise TextError(f"the chat template failed on this conversation: {type(error).__name__}: {error}") from error


@lru_cache(maxsize=8)
def takes_effort(template: str) -> bool:
    """Whether a template says the `reasoning_effort` to its model; this project's own does it for GLM-5.2 alone."""
    try:
        named = jinja2.meta.find_undeclared_variables(_environment().parse(template))
    except jinja2.TemplateError:
        return False  # `render` says what is wrong with it
    return template != CHAT_TEMPLATE and "reasoning_effort" in named


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` renders what is inside."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
