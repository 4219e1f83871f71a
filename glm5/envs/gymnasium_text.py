"""Environments of gymnasium by their ids, for models that read and write text.

    gymnasium_environment("FrozenLake-v1", {"is_slippery": False}, actions=("left", "down", "right", "up"))

What an environment can draw in characters ("ansi") is what the model sees, else its observation as Python prints it.
Discrete actions have names or are numbers, and the last one that an answer names is taken; text actions are the answer.
Spaces of other kinds need an `action` of your own (`GymEnvironment`).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glm5.envs.gym import GymEnvironment
from glm5.envs.protocol import EpisodeLimits
from glm5.errors import InputError

COLOURED = re.compile(r"\x1b\[[\d;]*[1-9][\d;]*m(.*?)\x1b\[0m", re.DOTALL)
UNSAID = frozenset(string.ascii_letters + string.digits)
"""The characters of a space of texts that names none: most such environments take sentences all the same."""


def gymnasium_environment(
    name: str, settings: Mapping[str, Any] | None = None, *, actions: Sequence[str] = (), turns: int = 32
) -> GymEnvironment:
    """The environment of an id. settings: those of `gymnasium.make`. Raises `InputError` for what it cannot be."""
    try:
        import gymnasium
    except ImportError:
        raise InputError("gymnasium is not installed; pip install gymnasium.") from None
    given = dict(settings or {})
    try:
        probe = gymnasium.make(name, **given)
        if "ansi" in (probe.metadata.get("render_modes") or ()):
            given.setdefault("render_mode", "ansi")
    except Exception as error:  # what a package registers may raise anything
        raise InputError(f"gymnasium makes no {name!r} with {given}: {error}") from None
    instructions, action = _actions(name, probe.action_space, actions)
    probe.close()
    drawn = given.get("render_mode") == "ansi"
    said = ",".join(f"{key}={value}" for key, value in sorted({**(settings or {}), "turns": turns}.items()))
    return GymEnvironment(
        f"gymnasium/{name}/{said}" + (f",actions={'+'.join(actions)}" if actions else ""),
        lambda: Drawn(gymnasium.make(name, **given)) if drawn else gymnasium.make(name, **given),
        instructions=instructions,
        action=action,
        limits=EpisodeLimits(turns=turns),
    )


class Drawn:
    """An environment whose observations are what it draws."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def reset(self, *, seed: int) -> tuple[str, Any]:
        """As the environment's."""
        _, info = self.inner.reset(seed=seed)
        return self._picture(), info

    def step(self, action: Any) -> tuple[str, Any, bool, bool, Any]:
        """As the environment's."""
        _, reward, terminated, truncated, info = self.inner.step(action)
        return self._picture(), reward, terminated, truncated, info

    def close(self) -> None:
        """As the environment's."""
        self.inner.close()

    def _picture(self) -> str:
        """Without colours; what was coloured stands in brackets."""
        return COLOURED.sub(r"[\1]", str(self.inner.render())).strip("\n")


def _actions(name: str, space: Any, actions: Sequence[str]) -> tuple[str, Callable[[str], Any]]:
    """What is asked of the model, and the action of its answer."""
    kind = type(space).__name__
    if kind == "Text" and not actions:
        return "", lambda text: _allowed(text.strip(), space)
    if kind != "Discrete":
        raise InputError(f"{name} takes actions of the kind {kind}; pass a GymEnvironment with an action in Python.")
    first, count = int(space.start), int(space.n)
    names = tuple(actions) or tuple(map(str, range(first, first + count)))
    numbers = {text.lower(): first + i for i, text in enumerate(names)}
    if not len(numbers) == len(names) == count:
        raise InputError(
            f"{name} takes {count} different actions, and {len(numbers)} are named (in capitals or not): "
            f"{', '.join(names)}."
        )
    # The longest name first: "up left" is not "up".
    pattern = re.compile("|".join(map(_whole, sorted(names, key=len, reverse=True))), re.IGNORECASE)

    def action(text: str) -> int:
        found = pattern.findall(text)
        if not found:
            raise ValueError(f"answer with one of {', '.join(names)}")
        return numbers[found[-1].lower()]

    return f"Answer with one of: {', '.join(names)}.", action


def _whole(name: str) -> str:
    """The expression for a name that is no part of a longer word. It may also be a sign, or begin or end with one."""
    before = r"(?<!\w)" if re.match(r"\w", name) else ""
    after = r"(?!\w)" if re.search(r"\w$", name) else ""
    return before + re.escape(name) + after


def _allowed(text: str, space: Any) -> str:
    """Raises ValueError for what no action of a space of texts is."""
    length = f"{space.min_length} to {space.max_length}"
    if set(space.characters) != UNSAID:
        if not space.contains(text):
            raise ValueError(f"answer with {length} of the characters {''.join(space.characters)}")
    elif not space.min_length <= len(text) <= space.max_length:
        raise ValueError(f"answer with {length} characters")
    return text
