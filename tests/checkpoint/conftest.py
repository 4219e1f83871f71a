"""Directories that several tests read; copy them before changing them."""

from pathlib import Path

import pytest
import torch
from tiny_checkpoint import build_model

import glm5


@pytest.fixture(scope="session")
def model() -> glm5.GLM5:
    return build_model()


@pytest.fixture(scope="session")
def saved(model: glm5.GLM5, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in fp32 shards of at most 60 kB. Copy it before changing it."""
    directory = tmp_path_factory.mktemp("saved") / "tiny"
    glm5.save_model(model, directory, max_shard_bytes=60_000)
    return directory


@pytest.fixture(scope="session")
def saved_fp8(model: glm5.GLM5, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in FP8 blocks, the rest in bf16."""
    directory = tmp_path_factory.mktemp("saved") / "tiny-fp8"
    glm5.save_model(model, directory, dtype=torch.bfloat16, quantization="fp8", max_shard_bytes=30_000)
    return directory
