"""Why `glm5 train STAGE ... --resume` does not go on with a run that was started otherwise, by the names of flags."""

from __future__ import annotations

from typing import Any

from glm5.cli.train_flags import write_data, write_phases, write_warmup
from glm5.data import BatchWarmup, Share
from glm5.errors import RunError
from glm5.train import Phase, RunDirectory
from glm5.train.recorded import RunChanged
from glm5.train.stages import CONFIGS, AnyConfig, config_of

OF_PARTS = ("phases", "train_data", "warmup")
"""Settings of several parts that are one flag."""


def in_flags(error: RunChanged, now: AnyConfig) -> RunError:
    """The same with the names and values that the command line has, and what to do."""
    path, name, old, new = error.path, error.difference.name, error.difference.old, error.difference.new
    run = RunDirectory.open(path)
    stage = run.description["stage"]
    if CONFIGS.get(stage) is not type(now):
        asked = next(name for name, kind in CONFIGS.items() if kind is type(now))
        return RunError(f"{path} is a run of {stage}, not of {asked}; start this one in another --out.")
    kind, _, setting = name.partition(".")
    setting = next((whole for whole in OF_PARTS if setting.startswith(f"{whole}.")), setting or kind)
    flag = "--" + setting.replace("_", "-")
    if setting.startswith("model."):
        model_setting = setting.removeprefix("model.")
        was, given = f"one of {old!r}", f"a model with a {model_setting} of {new!r}"
        flag = "--model"
    elif " of phase " in setting:
        return error
    else:
        was, given = _written(config_of(run), setting), _written(now, setting)
    if kind in ("inputs", "parent"):
        if was == given:
            return RunError(
                f"{flag}: what {given} holds has changed since {path} was started (its hash begins with {_short(new)}, "
                f"then {_short(old)}); put back what was there, or start a new run in another --out."
            )
        was, given = f"{was} ({_short(old)})", f"{given} (its hash begins with {_short(new)})"
    if setting == "loop.steps" and new < (done := len(run.read("metrics"))):
        was = f"{was} and has made {done} already"
    return RunError(
        f"{flag} is {given}, but {path} was started with {was}; `glm5 train --resume --out {path}` goes on as it was, "
        "or start a new run in another --out."
    )


def _written(config: AnyConfig, setting: str) -> str:
    """A setting as the command line would have it."""
    value: Any = config
    for part in setting.split("."):
        value = getattr(value, part)
    if isinstance(value, BatchWarmup):
        return " ".join(write_warmup(value))
    if isinstance(value, tuple) and value and isinstance(value[0], Share | Phase):
        return " ".join(write_data(value) if isinstance(value[0], Share) else write_phases(value))
    return " ".join(map(str, value)) or "empty" if isinstance(value, tuple) else str(value)


def _short(value: Any) -> str:
    """The beginning of a hash; nothing has none."""
    return str(value)[:12]
