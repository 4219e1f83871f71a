"""Short forms on the command line for settings of a run that are objects in Python.

--learner.loss ddis | icepop:beta=3 | ...          a loss by its class's name, in any case, with its settings
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from glm5.cli.rl_environments import settings
from glm5.errors import ConfigError, InputError, did_you_mean
from glm5.rl.losses import AnyLoss

REGISTRY = ConstructorRegistry()
LOSSES: dict[str, type[Any]] = {kind.__name__.lower(): kind for kind in get_args(AnyLoss)}


def loss(text: str) -> Any:
    """A loss from `NAME` or `NAME:setting=value,...`. Raises ValueError, which tyro shows as a sentence."""
    name, _, given = text.partition(":")
    kind = LOSSES.get(name.lower())
    if kind is None:
        raise ValueError(f"there is no loss {name!r}.{did_you_mean(name.lower(), LOSSES)}")
    known = [field.name for field in fields(kind)]
    try:
        values = settings(given)
        wrong = next((value for value in values if value not in known), None)
        if wrong is not None:
            raise ValueError(f"{name} has no setting {wrong!r}.{did_you_mean(wrong, known)}")
        return kind(**values)
    except (ConfigError, InputError) as error:
        raise ValueError(str(error)) from None


def written(value: Any) -> list[str]:
    """The text of a loss, for the help."""
    name = type(value).__name__.lower()
    changed = [
        f"{field.name}={getattr(value, field.name)}"
        for field in fields(value)
        if getattr(value, field.name) != field.default
    ]
    return [f"{name}:{','.join(changed)}" if changed else name]


def _rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if info.type != AnyLoss:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(LOSSES) + "}[:SETTING=VALUE,...]",
        instance_from_str=lambda words: loss(words[0]),
        is_instance=lambda value: isinstance(value, tuple(LOSSES.values())),
        str_from_instance=written,
    )


REGISTRY.primitive_rule(_rule)
