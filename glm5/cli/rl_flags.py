"""Short forms on the command line for settings of a run that are objects in Python.

--learner.loss ddis | icepop:beta=3 | ...          a loss by its class's name, in any case, with its settings
--learner.kl on | coefficient=0.01,estimator=k2    settings that may be absent; on: present, as they are by default
--learner.lora rank=4,targets=*.o_proj+*.experts   the same; a tuple has + between its items
--aids.teacher PATH [ENVIRONMENT ...]              a teacher and what it teaches; the flag may be given several times
--aids.replay.data PATH[:WEIGHT] ...               datasets with their shares, as for glm5 train
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from glm5.cli.rl_environments import settings
from glm5.cli.train_flags import share
from glm5.data import Share
from glm5.errors import ConfigError, DataError, InputError, did_you_mean
from glm5.rl.adapters import LoRA
from glm5.rl.advantages import Advantages
from glm5.rl.aids_config import EVERY, Teacher
from glm5.rl.concurrency import ConcurrencyConfig
from glm5.rl.losses import AnyLoss
from glm5.rl.reference import KL

REGISTRY = ConstructorRegistry()
LOSSES: dict[str, type[Any]] = {kind.__name__.lower(): kind for kind in get_args(AnyLoss)}
NO_LOSSES = {
    "dapo": " DAPO is --learner.loss ppo --learner.normalisation token-mean --learner.truncated mask here.",
    **{
        name: f" {name} is a kind of advantages here: --learner.advantages {name}, with a loss such as ppo."
        for name in get_args(Advantages)
    },
}
"""What others call a loss."""
OPTIONAL: dict[Any, type[Any]] = {kind | None: kind for kind in (KL, LoRA, ConcurrencyConfig)}
"""Settings that a run has or has not."""


# ---- from words to values -----------------------------------------------------------------------------------------
def loss(text: str) -> Any:
    """A loss from `NAME` or `NAME:setting=value,...`. Raises ValueError, which tyro shows as a sentence."""
    name, _, given = text.partition(":")
    kind = LOSSES.get(name.lower())
    if kind is None:
        hint = NO_LOSSES.get(name.lower(), did_you_mean(name.lower(), LOSSES))
        raise ValueError(f"there is no loss {name!r}.{hint}")
    return made(kind, name, given)


def optional(kind: type[Any], text: str) -> Any:
    """`none`, `on`, or the settings of `kind` as `setting=value,...`. Raises ValueError."""
    if text.lower() == "none":
        return None
    return made(kind, kind.__name__, "" if text.lower() == "on" else text)


def made(kind: type[Any], name: str, given: str) -> Any:
    """An object of settings that are written `setting=value,...`; `name` is what the user calls it."""
    known = [field.name for field in fields(kind)]
    try:
        values = settings(given)
        wrong = next((value for value in values if value not in known), None)
        if wrong is not None:
            raise ValueError(f"{name} has no setting {wrong!r}.{did_you_mean(wrong, known)}")
        for setting, hint in get_type_hints(kind).items():
            if hint == tuple[str, ...] and setting in values:
                values[setting] = tuple(str(values[setting]).split("+"))
        return kind(**values)
    except (ConfigError, InputError) as error:
        raise ValueError(str(error)) from None


def teacher(words: list[str]) -> Teacher:
    """A path, and the environments that it teaches."""
    if not words:
        raise ValueError("a teacher is the path of a model, and the environments that it teaches")
    path, *environments = words
    return Teacher(path=Path(path), environments=tuple(environments) or (EVERY,))


def weighed(text: str) -> Share:
    """A dataset with its share."""
    try:
        return share(text)
    except DataError as error:
        raise ValueError(str(error)) from None


# ---- and back, for the help ---------------------------------------------------------------------------------------
def written(value: Any) -> list[str]:
    """The text of a loss."""
    name, changed = type(value).__name__.lower(), _changed(value)
    return [f"{name}:{changed}" if changed else name]


def written_optional(value: Any) -> list[str]:
    """The text of settings that may be absent."""
    return ["none" if value is None else _changed(value) or "on"]


def teacher_words(value: Teacher) -> list[str]:
    """The text of a teacher."""
    return [str(value.path), *value.environments]


def _changed(value: Any) -> str:
    """The settings that are not as by default."""
    found = []
    for field in fields(value):
        setting = getattr(value, field.name)
        if setting != field.default:
            found.append(f"{field.name}={'+'.join(setting) if isinstance(setting, tuple) else setting}")
    return ",".join(found)


# ---- the rules ----------------------------------------------------------------------------------------------------
def _spec(
    metavar: str,
    read: Callable[[list[str]], Any],
    write: Callable[[Any], list[str]],
    kinds: tuple[type[Any], ...],
    *,
    many: bool = False,
) -> PrimitiveConstructorSpec[Any]:
    """Reads a value from one word, or from all that follow."""
    return PrimitiveConstructorSpec(
        nargs="*" if many else 1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, kinds),
        str_from_instance=write,
    )


def _rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if info.type == AnyLoss:
        names = "{" + ",".join(LOSSES) + "}[:SETTING=VALUE,...]"
        return _spec(names, lambda words: loss(words[0]), written, tuple(LOSSES.values()))
    if info.type in OPTIONAL:
        kind = OPTIONAL[info.type]
        return _spec(
            "none|on|SETTING=VALUE,...", lambda words: optional(kind, words[0]), written_optional, (kind, type(None))
        )
    if info.type is Teacher:
        return _spec("PATH [ENVIRONMENT ...]", teacher, teacher_words, (Teacher,), many=True)
    if info.type is Share:
        return _spec("PATH[:WEIGHT]", lambda words: weighed(words[0]), lambda s: [f"{s.path}:{s.weight}"], (Share,))
    return None


REGISTRY.primitive_rule(_rule)
