"""Values of one name are compared, in charts and by `forgetting`, so they mean the same in every session of a run.

By what a run is measured may change when it is resumed; what is measured under a name that it has used may not: the
text, the world, how much is read or asked of them, the number of held-out tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm5.envs import Environment
from glm5.errors import ConfigError, RunError
from glm5.rl.aids_config import HELDOUT, MEASURED, TASKS, WORLD
from glm5.rl.config import RLRunConfig
from glm5.train import RunDirectory
from glm5.train.recorded import Difference, first_difference, operational, plain

DECIDING = {HELDOUT: ("documents", "length"), WORLD: ("skills",)}
"""Settings of `aids.retention` on which the values depend, by how the names of inputs begin."""


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
    """Raises RunError for what has the name of another thing by which the run was measured in any of its sessions."""
    settings = plain(config.aids.retention)
    for known in _noted(run):
        for name in sorted(name for name in known.keys() & inputs.keys() if name.startswith(MEASURED)):
            if known[name] != inputs[name]:
                raise RunError(_other_input(run.path, name, known[name], inputs[name]))
            change = first_difference(_deciding(name, known.get("retention", settings)), _deciding(name, settings))
            if change is not None:
                raise RunError(_other_setting(run.path, name, change))


def _noted(run: RunDirectory) -> Iterator[dict[str, Any]]:
    """What the sessions of a run say of their measures, side by side; sessions of early versions say little."""
    now = run.description
    yield {**operational(now["config"]), **now["inputs"]}
    for session in now["sessions"]:
        yield session.get("settings", {})


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
