"""Environments of one's own for the command line: `--env python:FILE.py:NAME[:setting=value,...]`.

NAME is an environment (docs/environments.md), or a function that makes one of the settings. A function with a parameter
`split` is told "train" or "heldout". The run's record holds the hash of the file: of it alone, not of what it imports.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from glm5.envs import Environment
from glm5.errors import InputError, did_you_mean

KIND = "python:"
PARTS = ("name", "limits", "uniform_groups", "task", "episode")
"""What an environment has."""


def own_environment(file: str, name: str, settings: Mapping[str, Any], split: str) -> Environment:
    """That environment; raises InputError for a file, a name or an object that is none."""
    module = _module(Path(file))
    if not hasattr(module, name):
        names = [known for known in vars(module) if not known.startswith("_")]
        raise InputError(f"{file} has no {name!r}; write {KIND}{file}:NAME.{did_you_mean(name, names)}")
    found = getattr(module, name)
    if inspect.isroutine(found) or inspect.isclass(found):
        told = {"split": split} if "split" in inspect.signature(found).parameters else {}
        found = found(**{**told, **settings})
    elif settings:
        raise InputError(f"{name} of {file} is no function, so it takes no settings; leave them out.")
    missing = [part for part in PARTS if not hasattr(found, part)]
    if missing:
        hint = "; SingleTurn(questions) makes one of questions" if hasattr(found, "score") else ""
        raise InputError(f"{name} of {file} is no environment: it has no {' and no '.join(missing)}{hint}.")
    environment: Environment = found
    return environment


def _module(path: Path) -> ModuleType:
    """The file as a module of its own, anew each time."""
    name = f"glm5_own_{code_of(path)[:16]}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is no Python file; write {KIND}FILE.py:NAME.")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    return module


def code_of(path: Path) -> str:
    """The hash of a file; raises InputError for one that is not there."""
    if not path.is_file():
        raise InputError(f"There is no file {str(path)!r}; an environment of your own is {KIND}FILE.py:NAME.")
    return sha256(path.read_bytes()).hexdigest()


def whole_path(text: str) -> str:
    """An environment as it was asked for, the same from whatever directory the run is resumed."""
    if not text.startswith(KIND):
        return text
    file, colon, rest = text.removeprefix(KIND).partition(":")
    return f"{KIND}{Path(file).resolve()}{colon}{rest}"
