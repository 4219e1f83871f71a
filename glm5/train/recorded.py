"""A configuration as `run.json` records it, and in what another one differs from it: a resumed run must not.

Runs outlive the code that began them. What was not recorded then is no difference: a setting that came later counts as
its default, the class of a part as the one it is compared with.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from glm5.config import ModelConfig
from glm5.errors import RunError

IDENTIFIED = frozenset({"parent", "tokenizer", "train_data", "heldout_data", "path", "reference", "heldout", "world"})
"""Settings that are places; `inputs` and the run's `parent` hold the hashes of what was there."""
OPERATIONAL = frozenset(
    {
        "checkpoint_activations",
        "checkpoint_every",
        "command",
        "episode_seconds",
        "evaluate_every",
        "groups_in_vain",
        "held_out",
        "keep_best",
        "keep_checkpoints",
        "keep_logprobs",
        "logits_mib",
        "on_spike",
        "on_trouble",
        "outage_seconds",
        "parallel",
        "pass_tokens",
        "patience",
        "prompts",
        "report_every",
        "retention",
        "save_in_background",
        "spike_factor",
        "step_seconds",
        "watch",
    }
)
"""Settings that watch over a run without changing what a healthy step learns: a resumed run may change them. Those of
its memory and its processes change how sums round: a step that did not fit must not be the end of its run."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first value in which a plan differs from another."""

    name: str
    """Where it is, with dots between the names: config.learner.clip_norm, inputs.replay, parent."""
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name} ({self.old!r}, now {self.new!r})"


class RunChanged(RunError):
    """A run is to go on with other settings or inputs than it was started with."""

    def __init__(self, path: Path, difference: Difference) -> None:
        super().__init__(f"{path} was started with another {difference}; leave it unchanged, or start a new run.")
        self.path, self.difference = path, difference

    def __reduce__(self) -> tuple[Any, ...]:
        """What the first of many processes says, all raise."""
        return RunChanged, (self.path, self.difference)


def plain(value: Any) -> Any:
    """A configuration as JSON values. A part that could be of several classes, as a loss, says of which it is."""
    if isinstance(value, ModelConfig):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        several, found = of_several_classes(type(value)), dict[str, Any]()
        for field in dataclasses.fields(value):
            part = getattr(value, field.name)
            said = {"class": type(part).__name__} if field.name in several and part else None
            found[field.name] = plain(part) if said is None else said | plain(part)
        return found
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def of_several_classes(config: type) -> set[str]:
    """The fields of a configuration that are parts of one of several classes."""
    types = get_type_hints(config)
    return {name for name in types if sum(map(dataclasses.is_dataclass, get_args(types[name]))) > 1}


def with_defaults(recorded: Any, config: Any) -> Any:
    """A recorded configuration, with the settings that came later as they are by default.

    Which of several classes a part is of was not always recorded: it then counts as of that of `config`.
    """
    if isinstance(config, ModelConfig) or not (isinstance(recorded, dict) and dataclasses.is_dataclass(config)):
        return recorded
    several, found = of_several_classes(type(config)), dict(recorded)
    for field in dataclasses.fields(config):
        part = getattr(config, field.name)
        if field.name in recorded:
            found[field.name] = with_defaults(recorded[field.name], part)
        elif field.default is not dataclasses.MISSING:
            part = field.default
            found[field.name] = plain(part)
        elif field.default_factory is not dataclasses.MISSING:
            part = field.default_factory()
            found[field.name] = plain(part)
        if field.name in several and part and isinstance(found.get(field.name), dict):
            found[field.name] = {"class": type(part).__name__} | found[field.name]
    return found


def operational(values: dict[str, Any], free: frozenset[str] = OPERATIONAL) -> dict[str, Any]:
    """The settings of a nested configuration that a resumed run may change, side by side."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in free:
            found[name] = value
        elif isinstance(value, dict):
            found |= operational(value, free)
    return found


def without_paths(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan without the places of its inputs: their contents are compared by hash, so a tree may be moved."""

    def is_place(value: Any) -> bool:
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))

    def stripped(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: stripped(v) for k, v in value.items() if not (k in IDENTIFIED and is_place(v))}
        return [stripped(item) for item in value] if isinstance(value, list) else value

    return {**plan, "config": stripped(plan["config"])}


def first_difference(old: Any, new: Any, name: str = "", *, free: frozenset[str] = OPERATIONAL) -> Difference | None:
    """The first value but those of `free` in which nested dictionaries differ, or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted((old.keys() | new.keys()) - free):
            found = first_difference(old.get(key), new.get(key), f"{name}.{key}" if name else key, free=free)
            if found is not None:
                return found
        return None
    return None if old == new else Difference(name, old, new)
