"""Files and directories that are whole or absent: written beside their place, flushed to the disk, renamed.

A process killed while it writes leaves a `.partial` sibling, which the next write of that name removes. Replacing a
directory takes two renames, because a full directory cannot be renamed over: old one aside, new one in. A kill between
them leaves the old one, whole, under a hidden `.old` name; `restore_directory`, and the next write, give it back.

One process at a time writes a name. A second one takes the place of the first, which then fails and changes nothing;
`locked` is for those who must keep others out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from glm5.errors import RunError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a binary file that takes `path`'s place when the block ends, and leaves nothing behind when it fails."""
    beside = path.with_name(path.name + ".partial")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, all or nothing."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_text(path: Path, text: str) -> None:
    """Writes a text, all or nothing, and makes its directory for the first one."""
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Gives an empty directory to fill; it takes `path`'s place when the block ends without an error.

    What stood there is removed at the very end, and stays when the block or a rename fails. A link stays a link: the
    directory that it points to is replaced.
    """
    path = path.resolve()
    restore_directory(path)
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)  # left where a process was killed after both renames
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    _remove_leftovers(path, beside)
    try:
        beside.mkdir(parents=True)
        yield beside
        put_directory(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def put_directory(beside: Path, path: Path) -> None:
    """Flushes the directory `beside` and gives it the name `path`; what stood there is removed at the very end."""
    for written in [*beside.rglob("*"), beside]:
        if not written.is_symlink():
            _sync(written)
    aside = _aside(path)
    try:
        if path.is_dir():
            os.rename(path, aside)
        os.rename(beside, path)
    except BaseException:
        restore_directory(path)
        raise
    _sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def restore_directory(path: Path) -> None:
    """Gives a directory its name back if its replacement was interrupted between the two renames."""
    path = path.resolve()
    aside = _aside(path)
    if aside.is_dir() and not path.exists():
        os.rename(aside, path)


class Lock:
    """A locked file, until `close`. Children that were forked meanwhile do not keep it, nor do they let it go."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._owner = file, os.getpid()

    def close(self) -> None:
        """Lets go. Again, it does nothing."""
        if fcntl is not None and not self._file.closed and os.getpid() == self._owner:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # closing is not enough where a child has the file open
        self._file.close()


def locked(path: Path, taken: str) -> Lock:
    """Locks the file at `path`, which is made, until what this gives is closed; a killed process lets go.

    Raises RunError(taken) when another process holds it, and OSError where there can be no such file. On systems
    without such locks nobody is kept out.
    """
    file = open(path, "w")  # noqa: SIM115 (the caller closes it)
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise RunError(taken) from None
        raise
    return Lock(file)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _aside(path: Path) -> Path:
    """Where the earlier directory waits during the swap. No process number: whoever comes next must find it."""
    return path.with_name(f".{path.name}.old")


def _remove_leftovers(path: Path, beside: Path) -> None:
    """Removes what killed processes were writing for `path`."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.\d+\.partial")  # not a glob: `m` must spare `.m.fp8.7.partial`
    shutil.rmtree(beside, ignore_errors=True)
    for found in sorted(path.parent.iterdir()) if path.parent.is_dir() else ():
        if pattern.fullmatch(found.name):
            os.rename(found, beside)  # in one step, so that a process still alive cannot swap a half-removed one in
            shutil.rmtree(beside)


def _sync(path: Path) -> None:
    """Flushes a file's data, or a directory's names: a rename is on the disk only when its directory is."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
