"""The journal of a run: what happened, in order, in a file that only grows. The truth from which a killed run goes on.

Each line is `crc32 number {json}`: the checksum covers the rest of the line, the number counts lines from 0. A line is
handed to the system when it is appended, so a killed process loses nothing; `commit` waits until all is on the disk,
which is for power cuts. What a crash tore off is at the end: bad lines there are cut when the journal is opened. A bad
line with a good one behind it is damage, which nobody guesses about; so a line that did not get through whole (the disk
is full) is taken back, and no other may follow it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from glm5.errors import RunError

Record = dict[str, Any]
"""One event; `kind` says which."""


class Journal:
    """Opens or creates the file for appending. One process at a time (`RunDirectory.exclusive`)."""

    def __init__(self, path: Path, replay: Callable[[Record], None] | None = None) -> None:
        """Cuts what a crash tore off. Raises RunError for a journal that is damaged in its middle.

        replay: told every event that there is, in order, in the one pass over the file.
        """
        self.path = path
        self.count = self._whole = 0
        """Lines and bytes that were written."""
        for line in _lines(path):
            if replay is not None:
                replay(_parsed(line))
            self.count, self._whole = self.count + 1, self._whole + len(line)
        self._refusal = ""
        """Why nothing more is taken."""
        new = not path.exists()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.ftruncate(self._file, self._whole)
        if new:
            directory = os.open(path.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)

    def append(self, record: Record) -> None:
        """Adds an event. It outlives the process from here on, the machine from the next `commit`.

        Raises RunError when the disk takes it not or in part, and at every call after that.
        """
        self._check()
        text = f"{self.count} {json.dumps(record, ensure_ascii=False, separators=(',', ':'))}".encode()
        line = b"%08x %b\n" % (zlib.crc32(text), text)
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            self.count, self._whole = self.count + 1, self._whole + len(line)
        except BaseException as error:  # Ctrl-C between two writes as well
            self._refuse(error)
            raise

    def commit(self) -> None:
        """Returns when everything that was appended is on the disk. Raises RunError as `append` does."""
        self._check()
        try:
            os.fsync(self._file)
        except OSError as error:
            self._refuse(error)

    def close(self) -> None:
        """Commits, unless the disk has refused before, and closes."""
        try:
            if not self._refusal:
                self.commit()
        finally:
            os.close(self._file)

    def _check(self) -> None:
        if self._refusal:
            raise RunError(self._refusal)

    def _refuse(self, error: BaseException) -> None:
        """Takes back what is torn; raises RunError for a mistake of the disk."""
        with suppress(OSError):
            os.ftruncate(self._file, self._whole)
        reason = error.strerror if isinstance(error, OSError) else "it was interrupted"
        self._refusal = (
            f"The disk refused to write in {self.path} ({reason}); what was written before is whole. Free some space, "
            "then resume."
        )
        if isinstance(error, OSError):
            raise RunError(self._refusal) from error


def read_journal(path: Path) -> Iterator[Record]:
    """Every whole event, in order; what a crash tore off at the end is left out. Raises RunError as `Journal` does.

    The file may be written while it is read: what was appended after its end was seen is left out.
    """
    return map(_parsed, _lines(path))


def _lines(path: Path) -> Iterator[bytes]:
    """The good lines at the beginning, and then a look at what follows them. Each is read once."""
    if not path.exists():
        return
    count, torn = 0, False
    with open(path, "rb") as file:
        for line in file:
            good = _number(line)
            if torn and good is not None:
                raise RunError(
                    f"{path} is damaged at line {count + 1}, and line {good + 1} behind it is whole; restore the "
                    "file from a copy, or start a new run."
                )
            if not torn and good == count:
                yield line
                count += 1
            elif good is not None:
                raise RunError(
                    f"{path} goes from line {count} to line {good + 1}; restore the file from a copy, or start a "
                    "new run."
                )
            elif not line.endswith(b"\n"):
                return  # the end, or a line that is being written
            else:
                torn = True


def _number(line: bytes) -> int | None:
    """The number of a good line."""
    checksum, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    number = text.partition(b" ")[0]
    return int(number) if number.isdigit() else None


def _parsed(line: bytes) -> Record:
    """The event of a good line."""
    record: Record = json.loads(line.split(b" ", 2)[2])
    return record
