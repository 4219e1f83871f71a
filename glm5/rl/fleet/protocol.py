"""`Fleet`: engines as one source of tokens that takes new weights. What the rest of `rl` knows of them.

    fleet = InProcessFleet([engine]) | ProcessFleet(...) | ...
    await fleet.start()
    stream = fleet.stream(prompt_ids, params, session_id=rollout_id, priority=0, deadline=None)
    await fleet.publish(version, state_dict)
    await fleet.close()

A fleet is a `glm5.serve.generation.Source`, so whatever serves or plays over one engine does so over many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from glm5.engine import EngineStats, SamplingParams, TokenDelta
from glm5.serve.generation import TokenSource
from glm5.text import Tokenizer


@dataclass(frozen=True, slots=True)
class EngineState:
    """One engine of a fleet."""

    name: str
    up: bool
    version: int
    requests: int
    """That it was given since the fleet was made."""
    restarts: int
    engine: EngineStats | None
    """As it last said; None before it did, and for servers that do not say."""


@dataclass(frozen=True, slots=True)
class FleetStats:
    """All engines."""

    engines: tuple[EngineState, ...]
    moved: int = 0
    """Requests that went on elsewhere because their engine had died, or failed at them."""
    waiting: int = 0
    """Requests that no engine has now, because those that may take them are away."""

    @property
    def sampled_tokens(self) -> int:
        """Of all engines as they are now."""
        return sum(state.engine.sampled_tokens for state in self.engines if state.engine is not None)


class Fleet(Protocol):
    """Some engines with the same weights. `stream` may be called from any thread, also before others have ended."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """That of the model."""

    @property
    def max_model_len(self) -> int:
        """Prompt and new tokens of one sequence."""

    @property
    def version(self) -> int:
        """The newest weights that every engine has."""

    @property
    def failure(self) -> str | None:
        """Why it cannot go on, whatever is waited for: the beginning of a sentence. None while it can."""

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        session_id: str | None,
        priority: int,
        deadline: float | None,
        said: Sequence[TokenDelta] = (),
    ) -> TokenSource:
        """The tokens of one request, which the death of an engine does not end. See `Engine.stream`."""

    async def start(self) -> None:
        """Returns when every engine is ready, or has failed while another is. Raises `FleetError` when none is."""

    async def publish(self, version: int, state_dict: Mapping[str, Tensor]) -> None:
        """Returns when every engine that lives samples with these weights; their tensors may change afterwards, and
        not before, though the wait be given up: `close` then waits until nobody reads them.

        Raises `InputError` for weights that engines refuse; they then keep the earlier ones.
        """

    async def hand_over(self, version: int, state_dict: Mapping[str, Tensor]) -> None:
        """Leaves the last weights of a run to engines that go on without it. What does not reach them is noted only."""

    async def close(self) -> None:
        """Ends all requests (finish reason "abort") and all engines."""

    def stats(self) -> FleetStats:
        """What each engine does."""
