"""`glm5 chat`: a conversation in the terminal. Ctrl-C stops an answer, /exit ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from glm5.engine import Engine, SamplingParams
from glm5.errors import GLM5Error, InputError
from glm5.text import AssistantStream, Tokenizer
from glm5.train.run_directory import model_of

HELP = "/exit ends, /new forgets the conversation, Ctrl-C stops an answer."


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Chat with a model in the terminal. Thinking is shown dimmed."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run directory or a Hugging Face model directory."""
    system: str | None = None
    """System prompt."""
    thinking: bool = True
    """Let the model think before it answers; --no-thinking for models that were not taught to."""
    temperature: float = 1.0
    """0 always takes the likeliest token."""
    top_p: float = 0.95
    """Samples from the likeliest tokens that together reach this probability."""
    max_tokens: int | None = None
    """Longest answer, thinking included; as much as the context leaves when left out."""
    seed: int | None = None
    """Makes the conversation repeatable: answer k is sampled with seed + k."""


def run(options: ChatOptions) -> int:
    """Talks until /exit or the end of the input."""
    engine = Engine(model_of(options.model))
    if engine.tokenizer is None:
        raise InputError("A conversation needs a tokenizer; give a model directory that holds tokenizer.json.")
    console = Console()
    console.print(
        f"{options.model}: {engine.config.num_parameters() / 1e6:,.1f}M parameters. {HELP}",
        style="dim",
        highlight=False,
    )
    return converse(engine, options, console, read=lambda: console.input("[bold]> [/bold]"))


def converse(engine: Engine, options: ChatOptions, console: Console, read: Callable[[], str]) -> int:
    """The loop: `read` gives the user's lines and raises `EOFError` at the end."""
    opening = [{"role": "system", "content": options.system}] if options.system else []
    messages: list[dict[str, Any]] = list(opening)
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return 0
        if line == "/exit":
            return 0
        if line == "/new":
            messages = list(opening)
        elif line.startswith("/"):
            console.print(HELP, style="dim", highlight=False)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                messages = [*asked, _answer(engine, asked, options, console)]
            except GLM5Error as error:  # too long, mostly: the conversation stays as it was
                console.print(str(error), style="red", markup=False, highlight=False)


def _answer(engine: Engine, messages: list[dict[str, Any]], options: ChatOptions, console: Console) -> dict[str, Any]:
    """Streams one answer to the console and returns it as a message; Ctrl-C keeps what was said so far."""
    assert isinstance(engine.tokenizer, Tokenizer)
    prompt = engine.tokenizer.apply_chat_template(messages, enable_thinking=options.thinking, escape_special=True)
    turn = sum(message["role"] == "user" for message in messages) - 1
    params = SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        max_tokens=options.max_tokens,
        seed=None if options.seed is None else options.seed + turn,
    )
    parser = AssistantStream(thinking=options.thinking, seed=f"turn {turn}")
    thinking = False
    tokens = engine.stream(prompt, params)
    try:
        for token in tokens:
            deltas = parser.feed(token.text)
            for delta in [*deltas, *(parser.close() if token.finish_reason else [])]:
                thought = delta.get("reasoning_content")
                if thinking and not thought:
                    console.print("\n")
                thinking = bool(thought)
                console.print(
                    thought or _shown(delta), end="", style="dim" if thought else None, markup=False, highlight=False
                )
            console.file.flush()
        console.print()
    except KeyboardInterrupt:
        tokens.close()
        console.print("\n[stopped]", style="dim", markup=False)
    return parser.finish()


def _shown(delta: dict[str, Any]) -> str:
    """A delta as text: what is said, or the call as it is written."""
    if "tool_calls" in delta:
        return "".join(
            f"{call['function'].get('name', '')}{call['function'].get('arguments', '')}" for call in delta["tool_calls"]
        )
    return delta.get("content") or ""
