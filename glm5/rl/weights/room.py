"""Shared memory that is really there, and that does not outlive its maker for long.

Linux promises more memory than `/dev/shm` has (64 MB in a container, unless told otherwise) and ends the process that
writes to what is not there, without a word. So all of it is asked for first.

The resource tracker of `multiprocessing` removes the memory when its maker dies. Where the tracker was killed too, as
with a whole job, nobody did: the maker holds a lock on the memory as long as it lives, and the next one removes what
nobody holds.
"""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from glm5.errors import WeightsError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

FILES = Path("/dev/shm")
"""Where Linux has it as files; other systems have none, and neither promise."""
PREFIX = "glm5-weights-"
YOUNG_SECONDS = 60.0
"""Since it was written last: its maker may not hold it yet."""


class Room:
    """`memory` of so many bytes. Raises `WeightsError` when there is not as much."""

    def __init__(self, size: int) -> None:
        remove_left_behind()
        self.memory = SharedMemory(create=True, size=size, name=PREFIX + secrets.token_hex(6))
        self._held: int | None = None
        if fcntl is None or not FILES.is_dir():
            return
        try:
            self._held = os.open(FILES / self.memory.name, os.O_RDWR)
            fcntl.flock(self._held, fcntl.LOCK_EX)
            os.posix_fallocate(self._held, 0, size)
        except OSError as error:
            self.memory.close()
            self.remove()
            raise WeightsError(
                f"{FILES} has no room for two versions of the weights, {size / 1e6:,.0f} MB ({error.strerror}); make "
                "it larger (docker: --shm-size), or use one engine in this process."
            ) from None

    def remove(self) -> None:
        """Takes its name away, and what nobody has mapped."""
        with suppress(FileNotFoundError):
            self.memory.unlink()
        if self._held is not None:
            os.close(self._held)
            self._held = None


def remove_left_behind() -> None:
    """Removes the memory of makers that were killed together with whoever would have removed it."""
    for path in FILES.glob(PREFIX + "*") if fcntl is not None else ():
        with suppress(OSError):  # somebody else's, removed meanwhile, or held
            if time.time() - path.stat().st_mtime < YOUNG_SECONDS:
                continue
            file = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(file)
