"""The journal of a run: what happened, in order, in a file that only grows. The truth from which a killed run goes on.

Each line is `crc32 number {json}`: the checksum covers the rest of the line, the number counts lines from 0. A line is
handed to the system in one write when it is appended, so a killed process loses nothing; `commit` waits until all is on
the disk, which is for power cuts. What a crash tore off is at the end: bad lines there are cut when the journal is
opened. A bad line with a good one behind it is damage, which nobody guesses about.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm5.errors import RunError

Record = dict[str, Any]
"""One event; `kind` says which."""


class Journal:
    """Opens or creates the file for appending. One process at a time (`RunDirectory.exclusive`)."""

    def __init__(self, path: Path) -> None:
        """Cuts what a crash tore off. Raises RunError for a journal that is damaged in its middle."""
        self.path = path
        self.count, whole = _extent(path)
        new = not path.exists()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.ftruncate(self._file, whole)
        if new:
            directory = os.open(path.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)

    def append(self, record: Record) -> None:
        """Adds an event. It outlives the process from here on, the machine from the next `commit`."""
        text = f"{self.count} {json.dumps(record, ensure_ascii=False, separators=(',', ':'))}".encode()
        line = b"%08x %b\n" % (zlib.crc32(text), text)
        written = os.write(self._file, line)
        if written != len(line):
            raise RunError(f"{self.path} took {written} of {len(line)} bytes; free some space, then resume the run.")
        self.count += 1

    def commit(self) -> None:
        """Returns when everything that was appended is on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Commits and closes."""
        self.commit()
        os.close(self._file)


def read_journal(path: Path) -> Iterator[Record]:
    """Every whole event, in order; what a crash tore off at the end is left out. Raises RunError as `Journal` does."""
    count, _ = _extent(path)
    if count:
        with open(path, "rb") as file:
            for number, line in zip(range(count), file, strict=False):
                record = _parsed(line, number)
                if record is None:
                    raise RunError(f"{path} changed while it was read; let the run finish, then read it again.")
                yield record


def _extent(path: Path) -> tuple[int, int]:
    """Number and bytes of the good lines at the beginning, after a look at what follows them."""
    count = whole = 0
    torn = False
    if path.exists():
        with open(path, "rb") as file:
            for line in file:
                good = _number(line)
                if torn and good is not None:
                    raise RunError(
                        f"{path} is damaged at line {count + 1}, and line {good + 1} behind it is whole; restore the "
                        "file from a copy, or start a new run."
                    )
                if not torn and good == count:
                    count, whole = count + 1, whole + len(line)
                elif good is not None:
                    raise RunError(
                        f"{path} goes from line {count} to line {good + 1}; restore the file from a copy, or start a "
                        "new run."
                    )
                else:
                    torn = True
    return count, whole


def _number(line: bytes) -> int | None:
    """The number of a good line."""
    checksum, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    number = text.partition(b" ")[0]
    return int(number) if number.isdigit() else None


def _parsed(line: bytes, number: int) -> Record | None:
    """The event of line `number`."""
    if _number(line) != number:
        return None
    record: Record = json.loads(line.split(b" ", 2)[2])
    return record
