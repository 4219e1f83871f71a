"""Values of one name are compared, in charts and by `forgetting`, so they mean the same in every session of a run.

By what a run is measured may change when it is resumed; what is measured under a name that has values may not: the
text, the world, how much is read or asked of them, the number of held-out tasks. It stays as the last session had it
that was to be measured by it. What was asked for and never measured, as by a slip of the keyboard, binds nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm5.envs import Environment
from glm5.errors import ConfigError, RunError
from glm5.rl.aids_config import HELDOUT, MEASURED, TASKS, WORLD
from glm5.rl.config import RLRunConfig
from glm5.rl.report import measured
from glm5.train import RunDirectory
from glm5.train.recorded import Difference, first_difference, operational, plain, with_defaults

DECIDING = {HELDOUT: ("documents", "length"), WORLD: ("skills",)}
"""Settings of `aids.retention` on which the values depend, by how the names of inputs begin."""
TEXT, REWARDS = "/bits_per_byte", ("/reward", "/unscored")
"""How the names of values end; those of the skills suite have other ends."""


def tasks_of(environments: Sequence[Environment], tasks: int) -> dict[str, str]:
    """Held-out environments as inputs of a run. Raises ConfigError for two of one name."""
    for name, count in Counter(environment.name for environment in environments).items():
        if count > 1:
            raise ConfigError(f"{count} held-out environments are called {name!r}; leave one out, or rename it.")
    return {f"{TASKS}{environment.name}": f"{tasks} tasks" for environment in environments}


def measures(run_directory: Path, inputs: Iterable[str]) -> frozenset[str]:
    """The names of those inputs, and of the run's own, by which it is measured."""
    recorded = RunDirectory.open(run_directory).description["inputs"] if (run_directory / "run.json").exists() else {}
    return frozenset(name for name in (*inputs, *recorded) if name.startswith(MEASURED))


def check_measures(run: RunDirectory, config: RLRunConfig, inputs: Mapping[str, str]) -> None:
    """Raises RunError for what has the name of another thing by which the run was measured."""
    values, now = measured(run, run.read("metrics")), config.aids.retention
    used = sorted(name for name in inputs if name.startswith(MEASURED) and _has_values(name, values))
    bound = {name: said for name in used if (said := _noted(run, name))}
    numbers = {name: said[name] for name, said in bound.items() if name.startswith(TASKS)}
    if len(set(numbers.values())) > 1:
        raise RunError(_several_numbers(run.path, numbers))
    for name, said in bound.items():
        if said[name] != inputs[name]:
            raise RunError(_other_input(run.path, name, said[name], inputs[name]))
        before = with_defaults(said.get("retention", plain(now)), now)
        change = first_difference(_deciding(name, before), _deciding(name, plain(now)))
        if change is not None:
            raise RunError(_other_setting(run.path, name, change))


def _has_values(name: str, values: Iterable[str]) -> bool:
    """Whether anything was measured by an input. values: the names under which something was."""
    if name.startswith(HELDOUT):
        return name.removeprefix(HELDOUT) + TEXT in values
    if name.startswith(TASKS):
        return any(name.removeprefix(TASKS) + end in values for end in REWARDS)
    return any(not value.endswith((TEXT, *REWARDS)) for value in values)


def _noted(run: RunDirectory, name: str) -> dict[str, Any]:
    """What the last session that had an input says of its measures, side by side; sessions of early versions say
    little."""
    now = run.description
    sessions = [session.get("settings", {}) for session in now["sessions"]]
    noted = [{**operational(now["config"]), **now["inputs"]}, *reversed(sessions)]
    return next((said for said in noted if name in said), {})


def _deciding(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings of `aids.retention`, those on which the values of an input depend."""
    deciding = next((names for start, names in DECIDING.items() if name.startswith(start)), ())
    return {one: settings.get(one) for one in deciding}


def _other_setting(path: Path, name: str, change: Difference) -> str:
    """Why a setting is refused with which an input would be measured otherwise than before."""
    what, instead = f"the text {name.removeprefix(HELDOUT)!r}", "give the text's directory another name"
    if name == WORLD:
        what, instead = "the skills suite", "measure the skills apart from the run (glm5 eval)"
    return (
        f"aids.retention.{change.name} is {change.new}, but was {change.old} when {path} was measured by {what} "
        f"before, and the values would be compared; leave it as it was, or {instead}."
    )


def _several_numbers(path: Path, numbers: Mapping[str, str]) -> str:
    """Why held-out tasks are refused together of which the run has played different numbers."""
    said = " and ".join(f"{number} of {name.removeprefix(TASKS)}" for name, number in numbers.items())
    return (
        f"{path} was measured by {said} before. held_out.tasks is one number for all, and the values would be "
        "compared; give only held-out environments of one number, with that number, or none."
    )


def _other_input(path: Path, name: str, then: str, now: str) -> str:
    """Why an input is refused that has the name of another one."""
    if name == WORLD:
        return (
            f"The world of {path}'s skills suite is another one than before, and the values would be compared; give "
            "the one of before, or none."
        )
    if name.startswith(TASKS):
        return (
            f"held_out.tasks measures {path} by {now} of {name.removeprefix(TASKS)}, but it was measured by {then} "
            "before, and the values would be compared; leave it as it was (held_out.every may be another), or measure "
            "other tasks."
        )
    return (
        f"The held-out text {name.removeprefix(HELDOUT)!r} of {path} is another text than before, and the values would "
        "be compared; give its directory another name."
    )
