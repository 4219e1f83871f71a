"""Short forms on the command line for settings that are objects in Python.

--model nano | a directory with a config.json        --train-data PATH[:WEIGHT] ...
--phases LENGTH:ROWS:STEPS ...                        --warmup START:STEPS[:MULTIPLE]
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from glm5.config import PRESETS, ModelConfig
from glm5.data import BatchWarmup, Share
from glm5.train.job import Data
from glm5.train.midtrain import Phase

REGISTRY = ConstructorRegistry()


def model(text: str) -> ModelConfig:
    """A preset's name, or a directory with a config.json."""
    if text in PRESETS or not Path(text).exists():
        return ModelConfig.from_preset(text)
    return ModelConfig.from_pretrained(text)


def share(text: str) -> Share:
    """`PATH` or `PATH:WEIGHT`."""
    found = re.fullmatch(r"(.+):([0-9.eE+-]+)", text)
    return Share(path=Path(found[1]), weight=float(found[2])) if found else Share(path=Path(text))


def data(texts: list[str]) -> Data:
    """One path without a weight stays a path, as a Python caller would write it."""
    shares = tuple(map(share, texts))
    return shares[0].path if len(shares) == 1 else shares


def phase(text: str) -> Phase:
    """`LENGTH:ROWS:STEPS`."""
    length, rows, steps = _numbers(text, 3, 3)
    return Phase(length=length, rows=rows, steps=steps)


def warmup(text: str) -> BatchWarmup:
    """`START:STEPS` or `START:STEPS:MULTIPLE`."""
    start, steps, *multiple = _numbers(text, 2, 3)
    return BatchWarmup(start=start, steps=steps, multiple=multiple[0] if multiple else None)


def _numbers(text: str, least: int, most: int) -> list[int]:
    parts = text.split(":")
    if not least <= len(parts) <= most or not all(part.isdigit() for part in parts):
        raise ValueError(f"{text!r} must be {least} to {most} whole numbers with ':' between them")
    return [int(part) for part in parts]


def _rule(
    fits: Callable[[Any], bool],
    metavar: str,
    read: Callable[[list[str]], Any],
    write: Callable[[Any], list[str]],
    *,
    many: bool = False,
) -> None:
    """Reads values of the types that fit from one word, or from several."""

    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if not fits(info.type):
            return None
        return PrimitiveConstructorSpec(
            nargs="*" if many else 1,
            metavar=metavar,
            instance_from_str=read,
            is_instance=lambda value: True,
            str_from_instance=write,
        )

    REGISTRY.primitive_rule(rule)


def write_data(value: Any) -> list[str]:
    """The words of `data`."""
    return [str(value)] if isinstance(value, Path) else [f"{s.path}:{s.weight}" for s in value]


def write_phases(value: Any) -> list[str]:
    """The words of `phase`."""
    return [f"{p.length}:{p.rows}:{p.steps}" for p in value]


def write_warmup(value: Any) -> list[str]:
    """The word of `warmup`."""
    if value is None:
        return ["None"]
    return [":".join(str(n) for n in (value.start, value.steps, value.multiple) if n is not None)]


def _is_phases(kind: Any) -> bool:
    """tyro narrows a tuple of any length to that of its default."""
    return get_origin(kind) is tuple and set(get_args(kind)) <= {Phase, Ellipsis} and Phase in get_args(kind)


_rule(lambda kind: kind is ModelConfig, "PRESET|DIR", lambda words: model(words[0]), lambda value: ["given"])
_rule(lambda kind: kind == Data, "PATH[:WEIGHT]", data, write_data, many=True)
_rule(
    _is_phases,
    "LENGTH:ROWS:STEPS",
    lambda words: tuple(map(phase, words)),
    write_phases,
    many=True,
)
_rule(lambda kind: kind == BatchWarmup | None, "START:STEPS[:MULTIPLE]", lambda words: warmup(words[0]), write_warmup)
