"""How new weights reach servers that somebody else runs.

* `Polled`: the fleet publishes a directory of versions and `glm5 serve --weights-from DIRECTORY` looks there. Tokens
  carry the version that the server says.
* `Reloaded`: SGLang's `/update_weights_from_disk` with a model directory. It does not say which weights made a token,
  so requests are interrupted before the reload and go on after it: every token's version is certain.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import httpx
import torch
from torch import Tensor

from glm5.checkpoint import save_model
from glm5.config import ModelConfig
from glm5.errors import FleetError
from glm5.model import GLM5
from glm5.rl.weights import DirectoryPublisher
from glm5.rl.weights.directory import MODEL_PREFIX, versions
from glm5.text import Tokenizer

ASK_SECONDS = 0.25
"""Between two questions for a server's version."""


class WeightDelivery(Protocol):
    """How weights reach a server."""

    interrupts: bool
    """Whether requests stop before and go on after, because the server does not say which weights made a token."""

    def snapshot(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes a version."""

    async def arrive(self, client: httpx.AsyncClient, version: int) -> int:
        """Returns the server's version, at least this one, once it has it. Raises `FleetError`."""


class Polled:
    """A directory of versions that `glm5 serve --weights-from` polls."""

    interrupts = False

    def __init__(self, publisher: DirectoryPublisher) -> None:
        self.publisher = publisher

    def snapshot(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Publishes it there."""
        self.publisher.publish(version, tensors)

    async def arrive(self, client: httpx.AsyncClient, version: int) -> int:
        """Asks the server for its version until it is there; the fleet's time limit ends the wait."""
        while True:
            models = (await client.get("/v1/models")).raise_for_status().json()
            has = models["data"][0].get("weight_version")
            if has is None:
                raise FleetError(f"The server at {client.base_url} names no weight_version: it is no `glm5 serve`.")
            if has >= version:
                return has
            await asyncio.sleep(ASK_SECONDS)


class Reloaded:
    """Model directories below `path`, which the servers can read too; the newest two are kept."""

    interrupts = True

    def __init__(self, path: str | Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self.path, self.tokenizer = Path(path).resolve(), tokenizer
        with torch.device("meta"):
            self._model = GLM5(config)
        self._written = [self._directory(version) for version in versions(self.path, MODEL_PREFIX)]
        """Also those of before the run was resumed."""

    def snapshot(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes a model directory."""
        directory = self._directory(version)
        save_model(self._model, directory, self.tokenizer, state=tensors)
        *older, last = [*(written for written in self._written if written != directory), directory]
        for old in older[:-1]:
            shutil.rmtree(old, ignore_errors=True)
        self._written = [*older[-1:], last]

    async def arrive(self, client: httpx.AsyncClient, version: int) -> int:
        """Tells the server to read it."""
        body = {"model_path": str(self._directory(version))}
        reply = await client.post("/update_weights_from_disk", json=body)
        if reply.status_code != 200 or not reply.json().get("success", True):
            raise FleetError(f"The server at {client.base_url} refuses weights version {version}: {reply.text[:300]}")
        return version

    def _directory(self, version: int) -> Path:
        return self.path / f"{MODEL_PREFIX}{version:08d}"
