"""Learning from outside agents: live, while they are served by the engines that learn, or later from their records.

Both are the orchestrator's asynchronous mode with another player (`rollouts.py`). Live, the engines take new weights
between two tokens, agents or no agents, and a session is as old as its oldest token. From records nothing is sampled:
the weights that recorded are version 0, so batch n learns from sessions that are n versions old, and a run is at most
`max_staleness` + 1 steps long.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from fastapi import FastAPI
from rich.console import Console
from torch import Tensor

from glm5.engine import EngineStats, SamplingParams, TokenDelta
from glm5.envs import Environment
from glm5.envs.protocol import UniformGroups
from glm5.errors import GLM5Error, InputError
from glm5.model import GLM5
from glm5.rl.admission import SchedulerConfig
from glm5.rl.aids import Aids
from glm5.rl.around import AroundSource
from glm5.rl.config import RLRunConfig
from glm5.rl.event_log import events_of
from glm5.rl.executors import MakeFleet, one_engine
from glm5.rl.fleet import Fleet, FleetStats
from glm5.rl.gateway.app import create_gateway
from glm5.rl.gateway.limits import SessionLimits
from glm5.rl.gateway.reading import FinishedSessions, Ready
from glm5.rl.gateway.rollouts import GatewayRollouts, OutsideAgents, places_for, sessions_had
from glm5.rl.gateway.sampling import OwnDistribution
from glm5.rl.gateway.sessions import Sessions
from glm5.rl.gateway.settings import FOREVER, check_followed, outside
from glm5.rl.journal import read_journal
from glm5.rl.meter import Meter, Metered
from glm5.rl.orchestrator import train_rl
from glm5.rl.run_ends import say
from glm5.rl.scheduler import Scheduler
from glm5.rl.session import JOURNAL
from glm5.rl.tasks import TaskSource, TaskStream
from glm5.serve import ApiError, Limits, serve
from glm5.serve.generation import TokenSource
from glm5.serve.http import bind
from glm5.text import Tokenizer
from glm5.threads import in_thread
from glm5.train import RunDirectory
from glm5.train.run_directory import directory_sha256, model_of


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where outside agents find the gateway, and what it accepts."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "glm5"
    """The model's name in the API."""
    api_key: str | None = None
    hosts: tuple[str, ...] | None = None
    """Names that it answers to; None: any."""
    limits: Limits = field(default_factory=Limits)
    sessions: SessionLimits = field(default_factory=SessionLimits)


def train_from_gateway(
    config: RLRunConfig,
    run_directory: Path,
    address: Address,
    *,
    ready: Callable[[str], None] | None = None,
    uniform_groups: UniformGroups = "drop",
    make_fleet: MakeFleet | None = None,
    aids: Aids | None = None,
    held_out: Sequence[Environment] = (),
    publish_to: Path | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> RunDirectory:
    """Serves outside agents and learns from their sessions until `steps` batches are done; gives the finished run.

    ready: told the base URL once requests are taken. uniform_groups: whether groups of equal rewards are learnt from.
    Sessions are kept in the run's folder `sessions`; a resumed run goes on with those that are open. The rest is as in
    `train_rl`.
    """
    settings = outside(config, patience=FOREVER)
    check_followed(config, run_directory, patience=FOREVER, held_out=bool(held_out))
    with bind(address.host, address.port):  # an address that is taken leaves no run behind
        pass
    engines = make_fleet or one_engine(settings, max_num_seqs=address.limits.max_concurrent)
    recorded, size = run_directory / "sessions", settings.scheduler.group_size
    parent, meter = directory_sha256(model_of(config.parent)), Meter()

    def make(model: GLM5, tokenizer: Tokenizer, version: int) -> Fleet:
        sessions = Sessions(recorded, weights=f"trained from {parent}", limits=address.sessions, own_sampling=True)
        rollouts.sessions = sessions
        try:
            return OpenFleet(engines(model, tokenizer, version), sessions, address, config.rollout.seed, meter, ready)
        except BaseException:
            sessions.close()
            raise

    rollouts = GatewayRollouts(FinishedSessions(recorded, size, had=sessions_had(run_directory / JOURNAL)))
    return train_rl(
        settings, [OutsideAgents(uniform_groups)], run_directory, make_fleet=make, aids=aids, held_out=held_out,
        publish_to=publish_to, player=rollouts.play, running=rollouts.running, meter=meter, parent=parent,
        resume=resume, console=console,
    )  # fmt: skip


def train_from_records(
    config: RLRunConfig,
    records: Path,
    run_directory: Path,
    *,
    uniform_groups: UniformGroups = "drop",
    aids: Aids | None = None,
    held_out: Sequence[Environment] = (),
    resume: bool = False,
    console: Console | None = None,
) -> RunDirectory:
    """Learns from the closed sessions of a directory, each at most once, in the order of their closing.

    Only sessions of the parent's own weights are taken (`directory_sha256`). Raises InputError when they give no batch.
    A resumed run has what its journal holds, whatever was deleted since.
    """
    parent, agents = directory_sha256(model_of(config.parent)), OutsideAgents(uniform_groups)
    settings = outside(config, patience=config.patience)
    check_followed(config, run_directory, patience=config.patience, held_out=bool(held_out))
    size = settings.scheduler.group_size
    journal = run_directory / JOURNAL
    had = sessions_had(journal)
    if not had and not (records / "finished").is_dir():
        raise InputError(f"There are no recorded sessions in {records}; record some with glm5 serve --record DIR.")
    finished = FinishedSessions(records, size, parent, had=had)
    groups = list(finished.poll())
    steps = batches_of(settings.scheduler, agents, groups, journal)
    if steps == 0:
        raise InputError(
            f"{records} gives no batch of {settings.scheduler.groups_per_batch} groups of {size} sessions: "
            f"{len(groups)} groups are complete (those with equal rewards teach nothing), {finished.waiting} sessions "
            f"wait for the rest of theirs, {finished.left_out or 'none is left out'}."
        )
    if finished.left_out:
        say(f"{records}: of the closed sessions, {finished.left_out}.", console)
    rollouts = GatewayRollouts(finished, groups)
    return train_rl(
        replace(settings, steps=min(config.steps, steps)), [agents], run_directory, aids=aids, held_out=held_out,
        player=rollouts.play, running=rollouts.running, parent=parent, resume=resume, console=console,
        make_fleet=lambda model, tokenizer, version: NoEngines(tokenizer, version),
    )  # fmt: skip


def batches_of(config: SchedulerConfig, agents: OutsideAgents, groups: Sequence[Ready], journal: Path) -> int:
    """How many batches a run has that was as its journal says, if it was begun, and is given these groups in order."""
    scheduler = Scheduler(config, TaskStream([TaskSource.of(agents)]))
    for record in read_journal(journal):
        for event in events_of(record):
            scheduler.apply(event)
    wanted, waiting = scheduler.restarted(), list(groups)
    scheduler.published(scheduler.step)
    while True:
        wanted += scheduler.admit()
        places = ((ready, tickets) for ready in waiting if (tickets := places_for(ready, wanted)) is not None)
        ready, tickets = next(places, (None, []))
        if ready is not None:
            waiting.remove(ready)
            for rollout, ticket in zip(ready.rollouts, tickets, strict=False):
                wanted.remove(ticket)
                scheduler.finished(replace(rollout, ticket=ticket))
            scheduler.take_events()  # which hold the rollouts
        elif scheduler.next_batch() is not None:
            scheduler.published(scheduler.step)
        else:
            return scheduler.step


class OpenFleet(AroundSource[Fleet]):
    """A fleet that outside agents reach over HTTP from its `start` to its `close`."""

    def __init__(
        self, fleet: Fleet, sessions: Sessions, address: Address, seed: int, meter: Meter,
        ready: Callable[[str], None] | None,
    ) -> None:  # fmt: skip
        super().__init__(fleet)
        self.sessions, self.address, self._tell = sessions, address, ready
        self._door = WhileOpen(fleet)
        source = OwnDistribution(Metered(self._door, meter), seed)
        for session in sessions.going_on():
            for recorded in session.turns:
                source.answered(session.id, recorded.turn.prompt_ids)
        self.app = create_gateway(
            source, sessions, model_name=address.name, limits=address.limits, api_key=address.api_key,
            hosts=address.hosts,
        )  # fmt: skip
        self._doors = ExitStack()
        self.stream = fleet.stream
        self.publish, self.hand_over = fleet.publish, fleet.hand_over

    async def start(self) -> None:
        """Opens when the engines are ready."""
        await self.source.start()
        self._doors.enter_context(served(self.app, self.address, self._tell))

    async def close(self) -> None:
        """Takes no more requests, ends those that run, then the server; open sessions stay open on the disk."""
        self._door.closed = self.app.state.lifecycle.draining = True
        await self.source.close()
        await in_thread(self._doors.close)
        self.sessions.close()


class WhileOpen(AroundSource[Fleet]):
    """A fleet's tokens for agents, who are told to come back when it is about to end: not that they asked wrongly."""

    def __init__(self, source: Fleet) -> None:
        super().__init__(source)
        self.closed = False

    @property
    def stats(self) -> Callable[[], EngineStats]:
        """As a server asks an engine: the sum over those that say; nothing of those that do not."""
        return lambda: summed(self.source.stats(), self.source.version)

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        session_id: str | None,
        priority: int,
        deadline: float | None,
    ) -> TokenSource:
        """The fleet's."""
        try:
            return self.source.stream(prompt_ids, params, session_id=session_id, priority=priority, deadline=deadline)
        except GLM5Error:
            if self.closed:
                raise ApiError(503, "This run is about to end or to stop; ask again when it goes on.") from None
            raise


def summed(stats: FleetStats, version: int) -> EngineStats:
    """What the engines of a fleet do together; `version`: the fleet's."""
    said = [state.engine for state in stats.engines if state.engine is not None]
    names = [one.name for one in fields(EngineStats)]
    return EngineStats(**{name: sum(getattr(engine, name) for engine in said) for name in names} | {"version": version})


class NoEngines:
    """A fleet for runs that sample nothing."""

    def __init__(self, tokenizer: Tokenizer, version: int) -> None:
        self.tokenizer: Tokenizer | None = tokenizer
        self.max_model_len = 0
        self.failure: str | None = None
        self.version = version

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
        """Refused."""
        raise RuntimeError("a run from records samples nothing")

    async def start(self) -> None:
        """Nothing is there."""

    async def publish(self, version: int, state_dict: Mapping[str, Tensor]) -> None:
        """Only the number."""
        self.version = version

    async def hand_over(self, version: int, state_dict: Mapping[str, Tensor]) -> None:
        """To nobody."""

    async def close(self) -> None:
        """Nothing is there."""

    def stats(self) -> FleetStats:
        """Of no engine."""
        return FleetStats(())


@contextmanager
def served(app: FastAPI, address: Address, ready: Callable[[str], None] | None) -> Iterator[None]:
    """The app at its address, in a thread of its own. Running requests end with their fleet; then it ends."""
    bound = threading.Event()
    failed: list[BaseException] = []

    def tell(url: str) -> None:
        if ready is not None:
            ready(url)
        bound.set()

    def run() -> None:
        try:
            serve(app, address.host, address.port, tell)
        except BaseException as error:
            failed.append(error)
        bound.set()

    thread = threading.Thread(target=run, name="gateway", daemon=True)
    thread.start()
    bound.wait()
    if failed:
        raise failed[0]
    try:
        yield
    finally:
        app.state.lifecycle.draining = True
        thread.join()
