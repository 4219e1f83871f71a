"""`glm5 serve`: an OpenAI-compatible server over one model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from glm5.engine import Engine
from glm5.serve import Limits, create_app, serve
from glm5.train.run_directory import model_of


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Serve a model over HTTP: /v1/chat/completions, /v1/models, /health."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run directory or a Hugging Face model directory."""
    host: str = "127.0.0.1"
    """Address to listen on. The default is reachable from this machine only; there is no password."""
    port: int = 8000
    """Port to listen on; 0 takes a free one, which is printed."""
    name: str = "glm5"
    """The model's name in the API."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights and the cache."""
    max_model_len: int | None = None
    """Longest prompt and answer together, in tokens; the model's own limit when left out."""
    max_concurrent: int = Limits.max_concurrent
    """Requests at once; one more is answered with 429."""
    max_body_bytes: int = Limits.max_body_bytes
    """Largest request body; a larger one is answered with 413."""


def run(options: ServeOptions) -> int:
    """Serves until Ctrl-C or SIGTERM. Prints the address once requests can be sent."""
    engine = Engine(model_of(options.model), dtype=getattr(torch, options.dtype), max_model_len=options.max_model_len)
    limits = Limits(max_concurrent=options.max_concurrent, max_body_bytes=options.max_body_bytes)
    app = create_app(engine, model_name=options.name, limits=limits)
    serve(app, options.host, options.port, ready=lambda url: print(f"Serving {options.name} at {url}/v1", flush=True))
    return 0
