"""`glm5 chat`: a conversation in the terminal, with a model in this process or with a running server."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from glm5.bundled import bundled_model
from glm5.cli.chat_input import reader
from glm5.cli.chat_loop import ChatLoop
from glm5.cli.chat_source import ChatSettings, EngineSource, ServerSource, Source
from glm5.cli.engine_options import EngineOptions
from glm5.engine import SamplingDefaults
from glm5.errors import InputError
from glm5.train.run_directory import model_of

KEY_VARIABLE = "GLM5_API_KEY"
BUNDLED_HINT = "It adds (What is 64 + 28?), and knows an invented world; /reset before another question helps it."


@dataclass(frozen=True, kw_only=True)
class ChatOptions(EngineOptions):
    """Chat in the terminal. Thinking is shown dimmed; /help lists the commands; Ctrl-C stops an answer."""

    model: Annotated[Path | None, tyro.conf.Positional] = None
    """A run directory or a Hugging Face model directory; the small model that comes with glm5 when left out."""
    url: str | None = None
    """Talk to a running server of OpenAI's API instead, e.g. http://127.0.0.1:8000. The key, if it wants one, is read
    from the environment variable GLM5_API_KEY."""
    name: str | None = None
    """With --url: which of the served models; the first when left out."""
    system: str | None = None
    """System prompt."""
    thinking: bool = True
    """Let the model think before it answers; --no-thinking for models that were not taught to."""
    temperature: float | None = None
    """0 always takes the likeliest token. When left out: that of the model's generation_config.json, else 1; 0 for the
    bundled model; with --url the server's."""
    top_p: float | None = None
    """Samples from the likeliest tokens that together reach this probability; when left out that of
    generation_config.json, else 0.95; with --url the server's."""
    max_tokens: int | None = None
    """Longest answer, thinking included; as much as the context leaves when left out."""
    seed: int | None = None
    """Makes the conversation repeatable: answer k is sampled with seed + k."""


def run(options: ChatOptions) -> int:
    """Talks until /exit or the end of the input."""
    source, about = open_source(options)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal lacks ends nothing
        sys.stdout.reconfigure(errors="replace")
    console = Console()
    settings = ChatSettings(
        thinking=options.thinking, temperature=options.temperature, top_p=options.top_p,
        max_tokens=options.max_tokens, seed=options.seed,
    )  # fmt: skip
    loop = ChatLoop(source, settings, console, read=lambda: "", system=options.system)
    loop.read = reader(loop.commands)
    loop.note(f"{about} /help lists the commands.")
    return loop.run()


def open_source(options: ChatOptions) -> tuple[Source, str]:
    """What answers, and a sentence about it."""
    if options.url is not None:
        if options.model is not None:
            raise InputError("Give a model directory or --url, not both.")
        given = [f.name for f in fields(EngineOptions) if getattr(options, f.name) != f.default]
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} is for a model in this process; the server has its own.")
        server = ServerSource(options.url, name=options.name, key=os.environ.get(KEY_VARIABLE))
        return server, f"{server.name} at {server.base}."
    if options.name is not None:
        raise InputError("--name chooses a model of a server; it needs --url.")
    bundled = options.model is None
    directory = bundled_model() if options.model is None else model_of(options.model)
    engine = options.engine(directory, max_num_seqs=1)
    name = "the bundled model" if bundled else str(options.model)
    defaults = SamplingDefaults(temperature=0.0) if bundled else SamplingDefaults.from_directory(directory)
    source = EngineSource(engine, name, defaults)
    hint = f" {BUNDLED_HINT}" if bundled else ""
    return source, f"{name}: {engine.config.num_parameters() / 1e6:,.1f}M parameters.{hint}"
