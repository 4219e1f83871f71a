"""The page of a run's rollouts: ONE HTML file that opens from disk, without outside resources.

Groups on the left, filtered by environment, outcome, fate, step, reward and words; the samples of a group side by side,
as conversations or as tokens, coloured by the ratio of trainer and sampler, by log-probability, version or mask.

What the model and the environments said is hostile text. It travels as JSON with every `<` escaped, in gzip chunks as
base64, and becomes text nodes only; the page's policy allows its own script and style by their hashes and nothing else,
and no string can become markup in it (trusted types).
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from glm5.files import replacing
from glm5.rl.seen import TrainerLogprobs
from glm5.rl.view.history import Told
from glm5.rl.view.pieces import body_of, row_of
from glm5.text import Tokenizer

CHUNK = 64
"""Episodes that are unpacked together."""
MOST_TOKENS = 3_000_000
"""Of all paths, context included."""


def write_viewer(
    path: Path,
    rollouts: Sequence[Told],
    tokenizer: Tokenizer,
    *,
    title: str = "rollouts",
    trainer: TrainerLogprobs | None = None,
    most_tokens: int = MOST_TOKENS,
    finished: int | None = None,
) -> None:
    """Writes the page. Of a run with more tokens than `most_tokens` it shows the newest whole groups, and says so.

    trainer: log-probabilities to hold beside the sampler's. finished: how many rollouts there are, if these are a part.
    """
    chosen = newest(rollouts, most_tokens)
    total = max(len(rollouts), finished or 0)
    note = f"{len(chosen):,} episodes" + (
        "" if len(chosen) == total else f", the newest of {total:,}; the journal holds them all"
    )
    rows: list[dict[str, Any]] = []
    chunks: list[str] = []
    for first in range(0, len(chosen), CHUNK):
        part = chosen[first : first + CHUNK]
        rows += [{**row_of(one), "chunk": len(chunks), "place": place} for place, one in enumerate(part)]
        bodies = [body_of(one, tokenizer, (trainer or {}).get(one.rollout.id)) for one in part]
        zipped = gzip.compress(json.dumps(bodies, default=str).encode(), compresslevel=6, mtime=0)
        packed = base64.b64encode(zipped).decode()
        chunks.append(f'<script type="text/plain" id="chunk-{len(chunks)}">{packed}</script>')
    index = {"note": note, "chunks": len(chunks), "ratios": bool(trainer), "rows": rows}
    style, script = _part("viewer.css"), _part("viewer.js")
    fields = {
        "title": html.escape(title),
        "policy": policy(style, script),
        "style": style,
        "script": script,
        "index": json.dumps(index, default=str).replace("<", "\\u003c"),
        "chunks": "\n".join(chunks),
    }
    # In one pass: what is filled in may look like a field.
    page = re.sub(r"\{\{(\w+)\}\}", lambda field: fields[field[1]], _part("viewer.html"))
    with replacing(path) as file:
        file.write(page.encode())


def newest(rollouts: Sequence[Told], most_tokens: int) -> list[Told]:
    """As many of the last groups as have `most_tokens` tokens at most, but at least one group; in order."""
    groups: dict[str, list[Told]] = {}
    for one in rollouts:
        groups.setdefault(one.rollout.ticket.group.id, []).append(one)
    kept: set[str] = set()
    left = most_tokens
    for name, members in reversed(groups.items()):
        left -= sum(one.tokens for one in members)
        if left < 0 and kept:
            break
        kept.add(name)
    chosen = [members for name, members in groups.items() if name in kept]
    return [one for members in chosen for one in sorted(members, key=lambda one: one.rollout.ticket.sample)]


def policy(style: str, script: str) -> str:
    """The Content-Security-Policy: this script, this style, nothing from anywhere."""

    def allowed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {allowed(script)}; style-src {allowed(style)}; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'"
    )


def _part(name: str) -> str:
    return files("glm5.rl.view").joinpath("page", name).read_text(encoding="utf-8")
