"""A rollout as the viewer's page takes it: one short row for the list, and a body with every turn and token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from glm5.rl.codec import branches_to_json
from glm5.rl.records import Branch, Rollout, Trajectory, Turn
from glm5.rl.view.history import Told
from glm5.text import Detokenizer, Tokenizer

SHORT = 200
"""Characters of a question in the list."""


def row_of(one: Told) -> dict[str, Any]:
    """What the list and its filters need."""
    rollout = one.rollout
    ticket, versions = rollout.ticket, list(rollout.versions)
    return {
        "id": rollout.id,
        "group": ticket.group.id.rsplit("/", 1)[0],
        "environment": ticket.environment,
        "sample": ticket.sample,
        "category": rollout.task.category,
        "question": _question(one)[:SHORT],
        "outcome": rollout.outcome,
        "reward": None if rollout.reward is None else rollout.reward.value,
        "fate": one.fate,
        "because": one.because,
        "step": one.step,
        "weight": one.weight,
        "tokens": rollout.num_sampled,
        "turns": len(rollout.turns),
        "versions": [min(versions), max(versions)] if versions else None,
    }


def body_of(one: Told, tokenizer: Tokenizer, trainer: Sequence[Sequence[float]] | None) -> dict[str, Any]:
    """Messages, turns and the tokens of every path."""
    rollout = one.rollout
    paths = [
        path_of(trajectory, tokenizer, None if trainer is None else trainer[number])
        for number, trajectory in enumerate(rollout.trajectories)
    ]
    return {
        "branches": branches_to_json(rollout.branches or [_only_branch(rollout)]),
        "answer": rollout.task.answer,
        "reason": rollout.reward.reason if rollout.reward else "",
        "failure": rollout.failure,
        "seconds": round(rollout.seconds, 3),
        "tool_seconds": round(rollout.tool_seconds, 3),
        "turns": [_turn(turn) for turn in rollout.turns],
        "paths": paths,
    }


def _only_branch(rollout: Rollout) -> Branch:
    """The conversation whose answers are the turns, one after the other."""
    numbers = iter(range(len(rollout.turns)))
    turns = [next(numbers, None) if message["role"] == "assistant" else None for message in rollout.messages]
    return Branch(rollout.messages, tuple(turns))


def path_of(trajectory: Trajectory, tokenizer: Tokenizer, trainer: Sequence[float] | None) -> list[Any]:
    """The path in parts: context as a text, sampled tokens with all that is known of them."""
    detokenizer = Detokenizer(tokenizer)
    texts = [detokenizer.feed(token) for token in trajectory.token_ids]
    parts: list[Any] = []
    known = iter(trainer) if trainer is not None else None
    for sampled, places in groupby(range(len(texts)), key=lambda i: trajectory.sampled[i]):
        these = list(places)
        if not sampled:
            parts.append("".join(texts[i] for i in these))
            continue
        versions = groupby(trajectory.versions[i] for i in these)
        part: dict[str, Any] = {
            "text": [texts[i] for i in these],
            "logprobs": [_rounded(trajectory.logprobs[i], exact=known is not None) for i in these],
            "versions": [[version, len(list(run))] for version, run in versions],
        }
        if known is not None:
            part["trainer"] = [_rounded(next(known), exact=True) for _ in these]
        parts.append(part)
    return parts


def _turn(turn: Turn) -> dict[str, Any]:
    return {
        "prompt": len(turn.prompt_ids),
        "cached": turn.cached_tokens,
        "output": len(turn.output_ids),
        "finish": turn.finish_reason,
        "seconds": round(turn.seconds, 3),
    }


def _question(one: Told) -> str:
    asked = [message for message in (*one.rollout.messages, *one.rollout.task.messages) if message["role"] == "user"]
    return str(asked[0].get("content") or "") if asked else ""


def _rounded(value: float, *, exact: bool) -> float:
    """Nine digits tell all float32 numbers apart; four are enough for a colour."""
    return float(f"{value:.9g}" if exact else f"{value:.4g}")
