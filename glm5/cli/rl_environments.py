"""Environments by name, for the command line: `KIND[:TASK][:setting=value,...][@WEIGHT]`.

    sums                               arithmetic:largest=50,operations=+-
    gym:chain_sum:max_terms=3@2        any task of reasoning-gym with its settings; twice the share of the others
    calculator        lookup        facts            the last two ask about a world: --world DIR (of `glm5 data world`)
    openenv:http://127.0.0.1:8001      an environment server
    gymnasium:FrozenLake-v1:is_slippery=false,actions=left+down+right+up,turns=20
    verifiers:my-taskset:level=3       an installed taskset of verifiers, with its settings
    python:mine.py:capitals            an environment of your own, or a function that makes it (`rl_own.py`)

Values are JSON (`true`, `["+","-"]`) or text. Which split is asked is said by --env and --held-out-env.
Python callers pass objects instead (docs/environments.md).
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import warnings
from collections.abc import Callable
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
CheckCode = Callable[[str, OwnFile], None]
"""Is told an environment of one's own, as the command line names it, and its file, before that is run."""
SIGNS = re.compile(r"""(?<=[\[,\s])(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|.""", re.DOTALL)
"""A text in quotes, where an item of a list begins, or one character."""
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


def settings(text: str, read: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """`a=1,b=x,c=[1,[2,3]]` as a dictionary. Values are JSON where they can be, else what `read` makes of them.

    read: left out, True, False, None and lists are read as Python writes them, and all else is text.
    """
    found: dict[str, Any] = {}
    while text := text.lstrip(","):
        part = text[: _end(text)]
        if "=" not in part:
            raise InputError(f"{part!r} is no setting; write name=value, with commas between.")
        name, _, text = text.partition("=")
        try:
            found[name], text = _value(text, read or _python)
        except (RecursionError, MemoryError):
            raise InputError(f"The value of {name} is nested too deeply to be read; write a simpler one.") from None
    return found


def _value(text: str, read: Callable[[str], Any]) -> tuple[Any, str]:
    """The value at the beginning of a text, and what is behind it."""
    try:
        value, end = json.JSONDecoder().raw_decode(text.strip())
        behind = text.strip()[end:].lstrip()
        if not behind or behind.startswith(","):
            return value, behind
    except ValueError:
        pass  # no JSON
    end = _end(text)
    return read(text[:end]), text[end:]


def _end(text: str) -> int:
    """Where the first setting of a text ends: at a comma that is in no list. A bracket that stays open begins none."""
    depth = 0
    for sign in SIGNS.finditer(text):
        if sign[0] == "," and depth == 0:
            return sign.start()
        depth = max(0, depth + (sign[0] == "[") - (sign[0] == "]"))
    comma = text.find(",")
    return comma if depth and comma >= 0 else len(text)


def _python(word: str) -> Any:
    """`True`, `False`, `None` and lists with Python's quotes, all of which a setting would take for true as texts."""
    stripped = word.strip()
    if not stripped.startswith("[") and stripped not in ("True", "False", "None"):
        return word
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a backslash that means itself
            value = ast.literal_eval(stripped)
        json.dumps(value)
    except (ValueError, SyntaxError, TypeError):  # TypeError: sets of lists, and what no setting can be, such as bytes
        return word
    return value


def _told_from_text(word: str) -> Any:
    """The same for environments, whose names hold their settings. Raises InputError where text would have that name.

    Earlier versions took it for text: a run that was begun with it would be given other tasks under the old name.
    """
    value = _python(word)
    if value is not word and str(value) == word.strip():
        raise InputError(
            f"{word} may be a value or a text: write {json.dumps(value)} for the value, or {json.dumps(word)} for the "
            "text, as which earlier versions read it (a run that they began goes on where --env says the text)."
        )
    return value


def _made(of: str, make: Callable[..., Made], text: str, *fixed: Any, **ours: Any) -> Made:
    """What `make` makes of settings. Raises InputError for one that it does not have.

    fixed, ours: its first arguments, and those by their names, that are not the user's to set.
    """
    given = settings(text, _told_from_text)
    known = [name for name in list(inspect.signature(make).parameters)[len(fixed) :] if name not in ours]
    for name in given:
        if name not in known:
            has = f"It has: {', '.join(known)}." if known else "It has none."
            raise InputError(f"{of} has no setting {name!r}.{did_you_mean(name, known)} {has}")
    return make(*fixed, **ours, **given)


def _gym(rest: str, world: Path | None, split: Split) -> Environment:
    task, _, given = rest.partition(":")
    if not task:
        raise InputError("Which task of reasoning-gym? Write gym:TASK, such as gym:chain_sum.")
    return SingleTurn(ReasoningGym(task, settings(given, _told_from_text), split=split))


def _facts(rest: str, world: Path | None, split: Split) -> Environment:
    return facts_environment(_made("facts", Facts, rest, _world("facts", world), phrasing=split))


def _gymnasium(rest: str, world: Path | None, split: Split) -> Environment:
    name, _, given = rest.partition(":")
    chosen = settings(given, _told_from_text)
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
    chosen = settings(given, _told_from_text)
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
    "sums": lambda rest, world, split: SingleTurn(_made("sums", Sums, rest, split=split)),
    "arithmetic": lambda rest, world, split: SingleTurn(_made("arithmetic", Arithmetic, rest, split=split)),
    "gym": _gym,
    "gymnasium": _gymnasium,
    "calculator": lambda rest, world, split: _made("calculator", calculator_environment, rest, split=split),
    "lookup": lambda rest, world, split: _made("lookup", lookup_environment, rest, _world("lookup", world)),
    "facts": _facts,
    "openenv": _openenv,
    "verifiers": _verifiers,
}
