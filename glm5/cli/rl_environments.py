"""Environments by name, for the command line: `KIND[:TASK][:setting=value,...][@WEIGHT]`.

    sums                               arithmetic:largest=50,operations=+-
    gym:chain_sum:max_terms=3@2        any task of reasoning-gym with its settings; twice the share of the others
    calculator        lookup        facts            the last two ask about a world: --world DIR (of `glm5 data world`)
    openenv:http://127.0.0.1:8001      an environment server
    gymnasium:FrozenLake-v1:is_slippery=false,actions=left+down+right+up,turns=20
    verifiers:my-taskset:level=3       an installed taskset of verifiers, with its settings
    python:mine.py:capitals            an environment of your own, or a function that makes it (`rl_own.py`)

Python callers pass objects instead (docs/environments.md).
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from glm5.cli.rl_own import KIND as OWN
from glm5.cli.rl_own import OwnFile
from glm5.data.corpus import Split
from glm5.data.world import World
from glm5.data.world_text import open_world
from glm5.envs import (
    Arithmetic,
    Environment,
    Facts,
    OpenEnv,
    ReasoningGym,
    SingleTurn,
    Sums,
    calculator_environment,
    facts_environment,
    gymnasium_environment,
    lookup_environment,
    named_taskset,
)
from glm5.errors import InputError, did_you_mean

Made = TypeVar("Made")
Settings = Mapping[str, Any]
CheckCode = Callable[[str, OwnFile], None]
"""Is told an environment of one's own, as the command line names it, and its file, before that is run."""
BETWEEN = re.compile(r",(?![^\[\]]*\])")
"""Commas that are not in a list, where no list is in another."""
SECRET = frozenset({"key", "apikey", "token", "secret", "password"})
"""Last words of the names of settings that are secrets: the run's record shows what the command line says."""


@dataclass(frozen=True)
class Named:
    """An environment as it was asked for."""

    environment: Environment
    weight: float
    short: str
    """Its name on the command line, without the weight."""
    code: str | None = None
    """The hash of the file that it is from, for one of your own."""


def named_environment(
    text: str, world: Path | None = None, *, split: Split = "train", check_code: CheckCode | None = None
) -> Named:
    """The environment of a name; raises InputError that says what is wrong with it.

    split: of the tasks, where the kind has one (lookup and openenv have none; held out, verifiers needs its own).
    """
    spec, _, weight = text.rpartition("@") if _is_weight(text.rpartition("@")[2]) and "@" in text else (text, "", "1")
    kind, _, rest = spec.partition(":")
    if kind not in KINDS and kind != OWN:
        raise InputError(f"There is no environment {kind!r}.{did_you_mean(kind, [*KINDS, OWN])}")
    if float(weight) <= 0:
        raise InputError(f"The weight of {spec} is {weight}; it must be more than 0.")
    if kind == OWN:
        file, _, named = rest.partition(":")
        name, _, given = named.partition(":")
        chosen, source = _open_settings(f"{OWN}:{file}:{name}", given), OwnFile.read(file)
        if check_code is not None:
            check_code(spec, source)
        return Named(source.environment(name, chosen, split), float(weight), spec, source.code)
    try:
        return Named(KINDS[kind](rest, world, split), float(weight), spec)
    except TypeError as error:
        raise InputError(f"{spec} has a setting of the wrong kind: {error}.") from None


def _is_weight(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def settings(text: str) -> dict[str, Any]:
    """`a=1,b=x,c=[1,[2,3]]` as a dictionary; values are JSON where they can be, or as Python writes them, else text."""
    found: dict[str, Any] = {}
    while text := text.lstrip(","):
        part = BETWEEN.split(text, maxsplit=1)[0]
        if "=" not in part:
            raise InputError(f"{part!r} is no setting; write name=value, with commas between.")
        name, _, text = text.partition("=")
        found[name], text = _value(text)
    return found


def _value(text: str) -> tuple[Any, str]:
    """The value at the beginning of a text, and what is behind it."""
    try:
        value, end = json.JSONDecoder().raw_decode(text.strip())
        behind = text.strip()[end:].lstrip()
        if not behind or behind.startswith(","):
            return value, behind
    except ValueError:
        pass  # no JSON
    word, *more = BETWEEN.split(text, maxsplit=1)
    return _python(word), "".join(more)


def _python(word: str) -> Any:
    """`True`, `False`, `None` and lists with Python's quotes, all of which a setting would take for true as texts."""
    try:
        value = ast.literal_eval(word.strip())
    except (ValueError, SyntaxError):
        return word
    return value if value is None or isinstance(value, bool | list) else word


def _made(of: str, make: Callable[..., Made], given: Settings, *fixed: Any, **defaults: Any) -> Made:
    """What `make` makes of the settings. Raises InputError for one that it does not have."""
    known = list(inspect.signature(make).parameters)[len(fixed) :]
    for name in given:
        if name not in known:
            raise InputError(f"{of} has no setting {name!r}.{did_you_mean(name, known)} It has: {', '.join(known)}.")
    return make(*fixed, **{**defaults, **given})


def _gym(rest: str, world: Path | None, split: Split) -> Environment:
    task, _, given = rest.partition(":")
    if not task:
        raise InputError("Which task of reasoning-gym? Write gym:TASK, such as gym:chain_sum.")
    return SingleTurn(ReasoningGym(task, settings(given), split=split))


def _facts(rest: str, world: Path | None, split: Split) -> Environment:
    return facts_environment(_made("facts", Facts, settings(rest), _world("facts", world), phrasing=split))


def _gymnasium(rest: str, world: Path | None, split: Split) -> Environment:
    name, _, given = rest.partition(":")
    chosen = settings(given)
    actions, turns = tuple(filter(None, str(chosen.pop("actions", "")).split("+"))), chosen.pop("turns", 32)
    return gymnasium_environment(name, chosen, actions=actions, turns=turns)


def _verifiers(rest: str, world: Path | None, split: Split) -> Environment:
    name, _, given = rest.partition(":")
    chosen = _open_settings(f"verifiers:{name}", given)
    if split == "heldout" and "split" not in chosen:
        raise InputError(
            f"verifiers:{name} would measure the tasks that it is learnt from: say which split is held out "
            f"(verifiers:{name}:split=test, if it has that setting), or pass tasks in Python, train_rl(held_out=)."
        )
    return named_taskset(name, chosen)


def _open_settings(of: str, given: str) -> dict[str, Any]:
    """The settings of somebody's own code, none of which is a secret."""
    chosen = settings(given)
    for setting in chosen:
        if setting.replace("-", "_").lower().rpartition("_")[2] in SECRET:
            raise InputError(
                f"The setting {setting} of {of} looks like a secret, which run.json would show; let its code read it "
                "from an environment variable, or make the environment in Python (train_rl)."
            )
    return chosen


def _openenv(rest: str, world: Path | None, split: Split) -> Environment:
    if "@" in rest.partition("://")[2].partition("/")[0]:
        raise InputError(
            "An openenv: address has a user or password in it, which the run's record would show; leave it out and let "
            "a proxy on this machine add it, or pass OpenEnv(name, url) in Python with a name that does not have it."
        )
    return OpenEnv(f"openenv/{rest}", rest)


def _world(kind: str, world: Path | None) -> World:
    if world is None:
        raise InputError(f"{kind} asks about a world: give --world DIR, a directory of `glm5 data world`.")
    return open_world(world)


KINDS: dict[str, Callable[[str, Path | None, Split], Environment]] = {
    "sums": lambda rest, world, split: SingleTurn(_made("sums", Sums, settings(rest), split=split)),
    "arithmetic": lambda rest, world, split: SingleTurn(_made("arithmetic", Arithmetic, settings(rest), split=split)),
    "gym": _gym,
    "gymnasium": _gymnasium,
    "calculator": lambda rest, world, split: _made("calculator", calculator_environment, settings(rest), split=split),
    "lookup": lambda rest, world, split: _made("lookup", lookup_environment, settings(rest), _world("lookup", world)),
    "facts": _facts,
    "openenv": _openenv,
    "verifiers": _verifiers,
}
