"""Environments of one's own for the command line: `--env python:FILE.py:NAME[:setting=value,...]`.

NAME is an environment (docs/environments.md), or a function that makes one of the settings. A function with a parameter
`split` is told "train" or "heldout". The file is read once: the bytes of it that run are those whose hash the run's
record holds. What it imports may lie in its folder and is part of the hash (`rl_own_imports.py`), but Python reads it
again to import it.
"""

from __future__ import annotations

import inspect
import linecache
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from glm5.cli.rl_own_imports import imported_from_beside
from glm5.envs import Environment
from glm5.errors import InputError, did_you_mean

KIND = "python"
PARTS = ("name", "limits", "uniform_groups", "task", "episode")
"""What an environment has."""
WHOLE = "2:"
"""How hashes begin that hold what the file imports from beside it. Earlier versions noted that of the file alone."""


@dataclass(frozen=True)
class OwnFile:
    """A file of somebody's own as it was when it was read."""

    path: Path
    content: bytes
    beside: Mapping[str, bytes]
    """Files of its folder that it imports."""

    @classmethod
    def read(cls, file: str) -> OwnFile:
        """Raises InputError for one that is not there, and as `imported_from_beside`."""
        path = Path(file)
        if not path.is_file():
            raise InputError(f"There is no file {file!r}; an environment of your own is {KIND}:FILE.py:NAME.")
        content = path.read_bytes()
        return cls(path, content, imported_from_beside(path, content))

    @property
    def code(self) -> str:
        """Its hash, with what it imports from beside it, as runs note it."""
        whole = sha256(self.content)
        for place, content in sorted(self.beside.items()):
            whole.update(f"{place} {sha256(content).hexdigest()}".encode())
        return WHOLE + whole.hexdigest()

    @property
    def code_alone(self) -> str:
        """Its hash as earlier versions noted it."""
        return sha256(self.content).hexdigest()

    def environment(self, name: str, settings: Mapping[str, Any], split: str) -> Environment:
        """What the file calls `name`; raises InputError for a name or an object that is no environment."""
        module = self._run()
        if not hasattr(module, name):
            names = [known for known in vars(module) if not known.startswith("_")]
            raise InputError(f"{self.path} has no {name!r}; write {KIND}:{self.path}:NAME.{did_you_mean(name, names)}")
        found = getattr(module, name)
        if inspect.isroutine(found) or inspect.isclass(found):
            with _told(f"{name} of {self.path} made no environment"):
                told = {"split": split} if "split" in inspect.signature(found).parameters else {}
                found = found(**{**told, **settings})
        elif settings:
            raise InputError(f"{name} of {self.path} is no function, so it takes no settings; leave them out.")
        missing = [part for part in PARTS if not hasattr(found, part)]
        if missing:
            hint = "; SingleTurn(questions) makes one of questions" if hasattr(found, "score") else ""
            raise InputError(f"{name} of {self.path} is no environment: it has no {' and no '.join(missing)}{hint}.")
        environment: Environment = found
        return environment

    def _run(self) -> ModuleType:
        """The content as a module of its own, anew each time, without a cache of what it was compiled to."""
        path = self.path.resolve()
        module = ModuleType(f"glm5_own_{self.code[-16:]}")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module  # dataclasses look there
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))  # last, so that nothing that is installed is hidden by a neighbour
        with _told(f"{self.path} cannot be read"):
            program = compile(self.content, str(path), "exec", dont_inherit=True)
            lines = [line.decode("utf-8", "replace") for line in self.content.splitlines(keepends=True)]
            linecache.cache[str(path)] = (len(self.content), None, lines, str(path))  # for inspect, and tracebacks
            exec(program, vars(module))
        return module


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Whatever goes wrong in somebody's own code as an InputError; `sys.exit()` in it does not end this program."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise InputError(f"{what}: {type(error).__name__}: {error}") from error


def whole_path(text: str) -> str:
    """An environment as it was asked for, the same from whatever directory the run is resumed."""
    if not text.startswith(f"{KIND}:"):
        return text
    file, colon, rest = text.removeprefix(f"{KIND}:").partition(":")
    return f"{KIND}:{Path(file).resolve()}{colon}{rest}"
