"""glm5: the whole GLM-5 system in readable PyTorch.

The names below are the public API; they are imported on first use, so that `import glm5` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from glm5.errors import GLM5Error

if TYPE_CHECKING:
    from glm5.checkpoint import load_model, save_model
    from glm5.config import ModelConfig
    from glm5.engine import Engine, SamplingParams, follow
    from glm5.model import GLM5
    from glm5.parallel import InferencePlan
    from glm5.text import AssistantStream, Tokenizer, parse_assistant

_HOMES = {
    "AssistantStream": "glm5.text",
    "Engine": "glm5.engine",
    "GLM5": "glm5.model",
    "InferencePlan": "glm5.parallel",
    "ModelConfig": "glm5.config",
    "SamplingParams": "glm5.engine",
    "Tokenizer": "glm5.text",
    "follow": "glm5.engine",
    "load_model": "glm5.checkpoint",
    "parse_assistant": "glm5.text",
    "save_model": "glm5.checkpoint",
}

__version__ = "0.1.0"
__all__ = ["AssistantStream", "Engine", "GLM5", "GLM5Error", "InferencePlan", "ModelConfig", "SamplingParams",
           "Tokenizer", "follow", "load_model", "parse_assistant", "save_model"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'glm5' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
