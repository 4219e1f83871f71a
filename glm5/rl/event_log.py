"""The scheduler's events and the tokens of unfinished rollouts in the journal, and the way back.

What one call of the scheduler brought about is one line, so a crash never splits it; the line is written before
anything is done about it. Tokens of rollouts that still run are written as they are reported, each once. A line holds
the tick at which it was written; without a logical clock that is always 0.

| kind | what the line holds |
|---|---|
| events | `events` of the scheduler, a finished rollout as `codec.py` writes it |
| progress | `pieces`: of a rollout's turn, the tokens since its last piece |
| tick | the same for all rollouts: the tick is over |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glm5.engine import ExpertChoices
from glm5.engine.choices import joined
from glm5.rl.codec import (
    experts_from_json,
    experts_to_json,
    rollout_from_json,
    rollout_to_json,
    shared_tokens,
    ticket_from_json,
    ticket_to_json,
)
from glm5.rl.events import EVENTS, Cancelled, Event, Finished
from glm5.rl.journal import Journal, Record
from glm5.rl.kept import KeptTurns, last_tokens
from glm5.rl.records import Ticket, Turn
from glm5.rl.runner import OPEN


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a turn since the last piece of it; the first one also holds the prompt and replaces what was there.

    Of the prompt it holds what the turn before (prompt and output) does not begin with: turns repeat each other.
    """

    ticket: Ticket
    number: int
    """Of the turn."""
    first: int
    """Of the tokens, counted in the turn."""
    turn: Turn
    """Only these tokens; the prompt is empty unless `first` is 0, and begins behind the `shared` tokens."""
    shared: int = 0
    """Tokens of the prompt that are those of the turn before."""


class Unfinished:
    """What is known of rollouts that run: their turns so far, the last of which may be open."""

    def __init__(self) -> None:
        self._turns: dict[str, list[_Said]] = {}
        """By the id of the rollout."""

    def add(self, piece: Piece) -> None:
        """A piece from the journal, or from `news`."""
        turns = self._turns.setdefault(piece.ticket.id, [])
        if not piece.first:
            turns[piece.number :] = [_Said(piece.shared, piece.turn.prompt_ids)]
        turns[piece.number].add(piece.turn)

    def news(self, ticket: Ticket, number: int, first: int, turn: Turn) -> Piece:
        """What a report (`runner.Progress`) adds to what is known."""
        shared = 0 if first else shared_tokens(_said(self._turns.get(ticket.id, [])[:number]), turn.prompt_ids)
        return Piece(ticket, number, first, replace(turn, prompt_ids=() if first else turn.prompt_ids[shared:]), shared)

    def turns(self, ticket: Ticket) -> KeptTurns:
        """Of a rollout, as they are now, for whoever goes on with it."""
        return KeptTurns((said.shared, said.turn()) for said in self._turns.get(ticket.id, ()))

    def first_version(self, ticket: Ticket) -> int | None:
        """The weights that made a rollout's first token; None before there is one."""
        turns = self._turns.get(ticket.id)
        return turns[0].versions[0] if turns and turns[0].versions else None

    def forget(self, events: Iterable[Event]) -> None:
        """Drops those that finished or were called off."""
        for event in events:
            if isinstance(event, Finished):
                self._turns.pop(event.rollout.id, None)
            elif isinstance(event, Cancelled):
                self._turns.pop(event.ticket.id, None)


class _Said:
    """A turn that grows: a report costs its own tokens, not those before it. Its prompt begins with the `shared` first
    tokens of the turn before."""

    def __init__(self, shared: int, prompt_ids: tuple[int, ...]) -> None:
        """prompt_ids: the rest."""
        self.shared, self.prompt_ids, self.finish_reason = shared, prompt_ids, OPEN
        self.output_ids, self.logprobs, self.versions = list[int](), list[float](), list[int]()
        self.experts: list[ExpertChoices | None] = []

    def add(self, news: Turn) -> None:
        """The tokens that follow."""
        self.output_ids += news.output_ids
        self.logprobs += news.logprobs
        self.versions += news.versions
        self.experts.append(news.experts)
        self.finish_reason = news.finish_reason

    def turn(self) -> Turn:
        """As it is now, with the rest of its prompt."""
        parts = (tuple(self.output_ids), tuple(self.logprobs), tuple(self.versions))
        return Turn(self.prompt_ids, *parts, self.finish_reason, experts=joined(self.experts))


def _said(turns: Sequence[_Said]) -> tuple[int, ...]:
    """All tokens of the last turn; none without turns."""
    return last_tokens((said.shared, (*said.prompt_ids, *said.output_ids)) for said in reversed(turns))


def write_events(journal: Journal, events: Sequence[Event], tick: int) -> None:
    """One line for what one call of the scheduler brought about."""
    if events:
        journal.append({"kind": "events", "tick": tick, "events": [_event_to_json(event) for event in events]})


def write_pieces(journal: Journal, kind: str, pieces: Sequence[Piece], tick: int) -> None:
    """One line, `progress` or `tick`."""
    journal.append({"kind": kind, "tick": tick, "pieces": [_piece_to_json(piece) for piece in pieces]})


def events_of(record: Record) -> list[Event]:
    """Of a line with events; none of another."""
    return [_event_from_json(value) for value in record.get("events", ())]


def pieces_of(record: Record) -> list[Piece]:
    """Of a line with tokens; none of another."""
    return [_piece_from_json(value) for value in record.get("pieces", ())]


def _event_to_json(event: Event) -> Any:
    if isinstance(event, Finished):
        return {"kind": event.kind, "rollout": rollout_to_json(event.rollout)}
    return EVENTS.dump_python(event, mode="json")


def _event_from_json(value: Any) -> Event:
    if value["kind"] == "finished":
        return Finished(rollout_from_json(value["rollout"]))
    return EVENTS.validate_python(value)


def _piece_to_json(piece: Piece) -> Any:
    turn = piece.turn
    value = {
        "ticket": ticket_to_json(piece.ticket),
        "turn": piece.number,
        "first": piece.first,
        "output": turn.output_ids,
        "logprobs": turn.logprobs,
        "versions": turn.versions,
        "finish": turn.finish_reason,
    }
    if turn.experts is not None:
        value["experts"] = experts_to_json(turn.experts)
    return value if piece.first else {**value, "shared": piece.shared, "prompt": turn.prompt_ids}


def _piece_from_json(value: Any) -> Piece:
    parts = (tuple(value.get("prompt", ())), tuple(value["output"]), tuple(value["logprobs"]), tuple(value["versions"]))
    turn = Turn(*parts, value["finish"], experts=experts_from_json(value.get("experts")))
    return Piece(ticket_from_json(value["ticket"]), value["turn"], value["first"], turn, value.get("shared", 0))
