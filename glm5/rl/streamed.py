"""A turn while its tokens come: what was told of it, what is new, and all of it at the end."""

from __future__ import annotations

import time
from dataclasses import replace

from glm5.engine import ExpertChoices, TokenDelta
from glm5.engine.choices import joined
from glm5.rl.records import Turn


class StreamedTurn:
    """One turn. Each token is looked at once, however often there is a report."""

    def __init__(self, begun: Turn, started: float) -> None:
        self.prompt_ids, self.started = begun.prompt_ids, started
        self.ids, self.logprobs, self.versions = list(begun.output_ids), list(begun.logprobs), list(begun.versions)
        self.experts = [begun.experts]
        self._told, self._told_experts = len(self.ids), begun.experts
        """Tokens that were told of; the newest experts that were."""

    def add(self, delta: TokenDelta) -> int:
        """Gives the tokens that it has now."""
        self.ids.append(delta.token_id)
        self.logprobs.append(delta.logprob)
        self.versions.append(delta.version)
        self.experts.append(delta.experts)
        return len(self.ids)

    def news(self, reason: str) -> tuple[int, Turn]:
        """What was not told of yet, and the token that it begins with."""
        first, self._told = self._told, len(self.ids)
        experts = joined(self.experts[len(self.experts) - (self._told - first) :])
        if experts is not None and self._told_experts is not None:
            experts = experts.part(self._told_experts.end)
        self._told_experts = experts or self._told_experts
        return first, self._part(first, reason, experts)

    def turn(self, reason: str, cached_tokens: int) -> Turn:
        """All of it."""
        return replace(self._part(0, reason, joined(self.experts)), cached_tokens=cached_tokens)

    def _part(self, first: int, reason: str, experts: ExpertChoices | None) -> Turn:
        parts = (tuple(self.ids[first:]), tuple(self.logprobs[first:]), tuple(self.versions[first:]))
        return Turn(self.prompt_ids, *parts, reason, time.perf_counter() - self.started, experts=experts)
