"""What an environment of one's own imports from beside its file: part of what it does, so part of its hash.

Read from the `import` statements, before anything runs, and from those of the files that they lead to. A package counts
with all of its files. Left out: what is installed, what a program imports by a name that it computes, and data files.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from glm5.errors import InputError

ELSEWHERE = sys.stdlib_module_names | {"glm5"}
"""Modules that no neighbour stands for; the run's record says which version of glm5 it is."""


def imported_from_beside(path: Path, content: bytes) -> dict[str, bytes]:
    """The files beside `path` that the program in it imports, by their place there. Raises InputError for a name that
    Python would find somewhere else first."""
    folder = path.resolve().parent
    found: dict[str, bytes] = {}
    waiting, seen = [content], set(ELSEWHERE)
    while waiting:
        for name in set(_imports(waiting.pop())) - seen:
            seen.add(name)
            files = {str(file.relative_to(folder)): file.read_bytes() for file in _files(path, folder, name)}
            found |= files
            waiting += files.values()
    return found


def _imports(content: bytes) -> Iterator[str]:
    """The first parts of the names that a program imports. A mistake in it is told when it runs."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


def _files(path: Path, folder: Path, name: str) -> list[Path]:
    """Those of a module or package of the folder; none where there is none of that name."""
    module, package = folder / f"{name}.py", folder / name
    own = next((file for file in (package / "__init__.py", module) if file.is_file()), None)
    first = PathFinder.find_spec(name, _searched(folder) if own else sys.path)
    if first is not None and first.origin is not None:
        if own is None:
            return []
        raise InputError(
            f"{path} imports {name}, and Python finds {first.origin} before {own}; give the latter another name."
        )
    return [*([module] if module.is_file() else []), *sorted(file for file in package.rglob("*.py") if file.is_file())]


def _searched(folder: Path) -> list[str]:
    """Where Python looks before it looks in the folder, which becomes the last place unless it is one (`OwnFile`)."""
    places = [Path(place).resolve() for place in sys.path]
    return sys.path[: places.index(folder)] if folder in places else sys.path
