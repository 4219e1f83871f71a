"""An engine that follows a directory of versions: `glm5 serve --weights-from`."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from glm5.engine import Engine
from glm5.errors import GLM5Error
from glm5.rl.weights.directory import DirectorySubscriber

log = logging.getLogger("glm5.serve")
POLL_SECONDS = 0.5


class Follower:
    """Looks for newer weights in a thread of its own until `close`. What is damaged is logged once and not taken."""

    def __init__(self, engine: Engine, path: str | Path, *, poll_seconds: float = POLL_SECONDS) -> None:
        self._engine, self._subscriber = engine, DirectorySubscriber(path)
        self._stopped, self._poll_seconds = threading.Event(), poll_seconds
        self._thread = threading.Thread(target=self._run, name="glm5-weights", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        complaint = ""
        while not self._stopped.wait(self._poll_seconds):
            try:
                snapshot = self._subscriber.newest()
                if snapshot is not None and snapshot.version > self._engine.version:
                    self._engine.update_weights(snapshot.version, snapshot.tensors)
            except Exception as error:  # nobody would look again without this thread
                if str(error) != complaint:
                    log.warning("weights: %s", error, exc_info=not isinstance(error, GLM5Error | OSError))
                complaint = str(error)

    def close(self) -> None:
        """Looks no more."""
        self._stopped.set()
        self._thread.join()
