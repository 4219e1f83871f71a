"""`InProcessFleet`: engines in this process. Nothing can die apart from the rest, so there is nothing to supervise.

The plain form of a fleet: what the others must equal, what the deterministic mode steps by hand, and the quickest for
small models on few cores. An engine that fails is not replaced: it shares memory with the learner, of whose state a
mistake says as little, and a run that ends and is resumed loses nothing. Who wants it replaced takes processes.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from glm5.engine import Engine, SamplingParams, TokenDelta, TokenStream
from glm5.engine.grammar import GrammarCompiler
from glm5.engine.sampling_params import StructuredOutputs
from glm5.errors import FleetError
from glm5.rl.fleet.protocol import EngineState, FleetStats
from glm5.rl.fleet.routing import Router
from glm5.text import Tokenizer


class InProcessFleet:
    """See `glm5.rl.fleet.Fleet`. `recompute`: as in `Engine.update_weights`."""

    def __init__(self, engines: Sequence[Engine], *, recompute: bool | None = None) -> None:
        if not engines:
            raise FleetError("A fleet has at least one engine; give some.")
        if len({engine.version for engine in engines}) != 1:
            raise FleetError("The engines have weights of different versions; make them with the same `version`.")
        self.engines = {str(seat): engine for seat, engine in enumerate(engines)}
        self.recompute = recompute
        self._router, self._lock = Router(), threading.Lock()
        self._served: Counter[str] = Counter()
        for name in self.engines:
            self._router.ring.add(name)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """That of the engines."""
        return self.engines["0"].tokenizer

    @property
    def max_model_len(self) -> int:
        """Of the engine with the least room."""
        return min(engine.max_model_len for engine in self.engines.values())

    @property
    def grammars(self) -> Grammars | None:
        """Those of the engines, any of which may be given a request; None without a tokenizer."""
        compilers = [engine.grammars for engine in self.engines.values() if engine.grammars is not None]
        return Grammars(compilers) if len(compilers) == len(self.engines) else None

    @property
    def version(self) -> int:
        """Of the weights that every engine has."""
        return min(engine.version for engine in self.engines.values())

    @property
    def failure(self) -> str | None:
        """See `Fleet.failure`. One engine that failed is enough: nobody else has what it was asked for."""
        kinds = {name: engine.failure for name, engine in self.engines.items() if engine.failure is not None}
        return next((f"Engine {name} has ended by a mistake of its own ({kind})" for name, kind in kinds.items()), None)

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        session_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        said: Sequence[TokenDelta] = (),
    ) -> TokenStream:
        """`Engine.stream` of the session's engine."""
        counts = {name: engine.stats() for name, engine in self.engines.items()}
        loads = {name: stats.running + stats.waiting for name, stats in counts.items()}
        with self._lock:
            name = self._router.choose(session_id, loads)
            self._served[name] += 1
        return self.engines[name].stream(
            prompt_ids, params, session_id=session_id, priority=priority, deadline=deadline, said=said
        )

    async def start(self) -> None:
        """The engines run already."""

    async def publish(self, version: int, state_dict: Mapping[str, Tensor]) -> None:
        """Gives every engine the weights, between two of its steps. Raises `InputError` for what the engines refuse."""
        for engine in self.engines.values():
            engine.update_weights(version, state_dict, recompute=self.recompute)

    async def hand_over(self, version: int, state_dict: Mapping[str, Tensor]) -> None:
        """The engines end with the fleet."""

    async def close(self) -> None:
        """Ends every request and engine."""
        for engine in self.engines.values():
            engine.close()

    def stats(self) -> FleetStats:
        """What each engine does."""
        return FleetStats(
            tuple(
                EngineState(name=name, up=engine.failure is None, version=engine.version,
                            requests=self._served[name], restarts=0, engine=engine.stats())
                for name, engine in self.engines.items()
            )
        )  # fmt: skip


class Grammars:
    """The compilers of several engines as one: a structure is known when each of them has it."""

    def __init__(self, compilers: Sequence[GrammarCompiler]) -> None:
        self.compilers = compilers

    def has(self, outputs: StructuredOutputs) -> bool:
        """See `GrammarCompiler.has`."""
        return all(compiler.has(outputs) for compiler in self.compilers)

    def compile(self, outputs: StructuredOutputs, wanted: Callable[[], bool] = lambda: True) -> None:
        """See `GrammarCompiler.compile`."""
        for compiler in self.compilers:
            compiler.compile(outputs, wanted)
