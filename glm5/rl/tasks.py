"""Which task comes next: many environments with a ratio and a speed each, gates, and pools by difficulty.

All choices are functions of the settings, the seed and what happened before; there are no random numbers beside the
first order of a pool. Ratios are kept by stride scheduling (Waldspurger and Weihl, 1995): each name that may be chosen
has a position, the lowest is next, and being chosen moves it on by 1 / weight.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm5.envs.protocol import Environment, UniformGroups
from glm5.errors import ConfigError, did_you_mean
from glm5.rl.records import Ticket
from glm5.train.checks import check_choice, check_counts, check_numbers

WINDOW = 16
"""Groups that the running success of an environment looks back on."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """An environment stays closed until another one is mastered; then it is open for good."""

    environment: str
    """The other one."""
    success: float = 0.8
    """Its running success must have reached this."""
    groups: int = WINDOW
    """After at least so many groups."""

    def __post_init__(self) -> None:
        _check_successes(self, "success")
        check_counts(self, "groups")


@dataclass(frozen=True, kw_only=True)
class Band:
    """An environment that is too easy or too hard for now is drawn less often."""

    low: float = 0.05
    high: float = 0.95
    outside: float = 0.1
    """Its weight is multiplied by this while its running success is outside [low, high]."""

    def __post_init__(self) -> None:
        _check_successes(self, "low", "high")
        check_numbers(self, "outside", above=0)


@dataclass(frozen=True, kw_only=True)
class Pools:
    """A finite set of tasks, 0 to `size` - 1, in pools by the success at each task; the numbers are shares of draws.

    A share of 0 leaves a pool alone until nothing else is left to draw.
    """

    size: int
    unseen: float = 1.0
    easy: float = 0.1
    """Success above `high`."""
    middle: float = 1.0
    hard: float = 0.3
    """Success below `low`."""
    low: float = 0.1
    high: float = 0.9

    def __post_init__(self) -> None:
        check_counts(self, "size")
        check_numbers(self, "unseen", "easy", "middle", "hard")
        _check_successes(self, "low", "high")

    @property
    def shares(self) -> dict[str, float]:
        """By pool."""
        return {"unseen": self.unseen, "middle": self.middle, "hard": self.hard, "easy": self.easy}

    def pool(self, success: float) -> str:
        """Where a task belongs."""
        return "easy" if success > self.high else "hard" if success < self.low else "middle"


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """How an environment takes part in a run."""

    environment: str
    weight: float = 1.0
    """Its share of the groups that are begun, relative to the others."""
    max_running: int | None = None
    """Its rollouts at once: what its sandbox or service bears."""
    uniform_groups: UniformGroups = "drop"
    """Whether groups whose rewards are all equal are learnt from. "keep" for abstention, where an all-wrong group
    is what it is about, and for losses without a group baseline, such as distillation."""
    max_attempts: int | None = None
    """How often a group is begun; None: as the scheduler's settings say."""
    pools: Pools | None = None
    """None: an endless stream of new tasks, in order."""
    gate: Gate | None = None
    band: Band | None = None
    success: float = 0.0
    """A reward above this is a success."""

    def __post_init__(self) -> None:
        check_numbers(self, "weight", above=0)
        check_choice(self, "uniform_groups", "drop", "keep")
        check_counts(self, *(name for name in ("max_running", "max_attempts") if getattr(self, name) is not None))

    @classmethod
    def of(cls, environment: Environment, **settings: Any) -> TaskSource:
        """With the name and the rules that the environment gives."""
        ruled = {"uniform_groups": environment.uniform_groups, "max_attempts": environment.limits.attempts}
        return cls(environment=environment.name, **(ruled | settings))


def _check_successes(config: Gate | Band | Pools, *names: str) -> None:
    """Raises ConfigError unless the fields are shares, and rise: a running success of 80 would never be reached."""
    check_numbers(config, *names)
    values = [getattr(config, name) for name in names]
    if max(values) > 1 or values != sorted(values):
        said = " and ".join(f"{name} is {value!r}" for name, value in zip(names, values, strict=True))
        rising = f", {names[0]} at most {names[1]}" if len(names) > 1 else ""
        raise ConfigError(f"{type(config).__name__}: {said}; a success is a share from 0 to 1{rising}.")


def _check_gates(sources: Mapping[str, TaskSource]) -> None:
    """Raises ConfigError for environments that wait for each other, or for themselves."""
    closed = {name: source.gate.environment for name, source in sources.items() if source.gate}
    while opened := {name for name, other in closed.items() if other not in closed}:
        closed = {name: other for name, other in closed.items() if name not in opened}
    if closed:
        waits = ", ".join(f"{name} for {other}" for name, other in closed.items())
        raise ConfigError(f"These environments would never open: {waits} waits; leave one of them without a gate.")


class Strides:
    """Chooses among names so that the draws of each are proportional to its weight."""

    def __init__(self, positions: Mapping[str, float], now: float = 0.0) -> None:
        self.positions = dict(positions)
        self.now = now
        """The highest position that was drawn from: where those are that always had a place."""

    def next(self, names: Iterable[str]) -> str:
        """The one whose turn it is; the first of equals."""
        return min(names, key=lambda name: self.positions[name])

    def move(self, name: str, weight: float) -> None:
        """It was drawn, at its present weight."""
        self.now = max(self.now, self.positions[name])
        self.positions[name] += 1 / weight

    def join(self, name: str) -> None:
        """It comes late and claims nothing for the time before."""
        self.positions[name] = max(self.positions[name], self.now)

    def state(self) -> dict[str, Any]:
        """Plain JSON: what this is made with."""
        return {"positions": dict(self.positions), "now": self.now}


class TaskPools:
    """The tasks of a finite environment. A task that is being sampled is in no pool, so it is never drawn twice."""

    def __init__(self, config: Pools, seed: int) -> None:
        self.config = config
        order = list(range(config.size))
        random.Random(seed).shuffle(order)
        self.pools: dict[str, list[int]] = {"unseen": order, "middle": [], "hard": [], "easy": []}
        self.success: dict[int, float] = {}
        """The mean of a task's last success and what it was before."""
        self.attempts: dict[int, int] = {}
        """How often the group of a task was begun."""
        self.strides = Strides(dict.fromkeys(self.pools, 0.0))

    def choose(self) -> tuple[int, int] | None:
        """(task, attempt) of the next draw; None while every task is being sampled."""
        full = [name for name, pool in self.pools.items() if pool]
        wanted = [name for name in full if self.config.shares[name]] or full
        if not wanted:
            return None
        task = self.pools[self.strides.next(wanted)][0]
        return task, self.attempts.get(task, 0)

    def take(self, task: int, attempt: int) -> None:
        """The group of a task is begun."""
        self.attempts[task] = attempt + 1
        for name, pool in self.pools.items():
            if pool and pool[0] == task:
                pool.pop(0)
                if share := self.config.shares[name]:
                    self.strides.move(name, share)

    def scored(self, task: int, success: float) -> None:
        """How the group of a task went."""
        self.success[task] = (self.success.get(task, success) + success) / 2

    def returned(self, task: int) -> None:
        """The group is over; the task waits at the end of its pool."""
        name = self.config.pool(self.success[task]) if task in self.success else "unseen"
        if not self.pools[name]:
            self.strides.join(name)
        self.pools[name].append(task)


class TaskStream:
    """The tasks of a run."""

    def __init__(self, sources: Sequence[TaskSource], seed: int = 0) -> None:
        self.sources = {source.environment: source for source in sources}
        if not sources:
            raise ConfigError("A run needs at least one environment.")
        if len(self.sources) < len(sources):
            name = Counter(source.environment for source in sources).most_common(1)[0][0]
            raise ConfigError(f"Two environments of the run are called {name}; give each a name of its own, once.")
        for source in sources:
            if source.gate and source.gate.environment not in self.sources:
                name = source.gate.environment
                raise ConfigError(
                    f"{source.environment} waits for {name!r}, which is not in the run."
                    + did_you_mean(name, self.sources)
                )
        self.pools = {s.environment: TaskPools(s.pools, seed) for s in sources if s.pools}
        self.next_index = {s.environment: 0 for s in sources if not s.pools}
        self.strides = Strides(dict.fromkeys(self.sources, 0.0))
        self.open = {source.environment for source in sources if not source.gate}
        _check_gates(self.sources)
        self.success = dict.fromkeys(self.sources, (0.0, 0))
        """By environment: running success, and groups so far."""

    @property
    def capacity(self) -> int | None:
        """Groups that can surely be under way at once; None without limit."""
        ungated = [self.sources[name] for name in self.sources if not self.sources[name].gate]
        return None if any(s.pools is None for s in ungated) else sum(s.pools.size for s in ungated if s.pools)

    def weight(self, environment: str) -> float:
        """The present one."""
        source, (success, groups) = self.sources[environment], self.success[environment]
        outside = source.band and groups and not source.band.low <= success <= source.band.high
        return source.weight * (source.band.outside if source.band and outside else 1.0)

    def choose(self, environments: Iterable[str]) -> Ticket | None:
        """The group that comes next, of one of `environments`. Changes nothing; None when none has a task."""
        possible: dict[str, Ticket] = {}
        for name in environments:
            if name not in self.open:
                continue
            drawn = self.pools[name].choose() if name in self.pools else (self.next_index[name], 0)
            if drawn:
                possible[name] = Ticket(name, *drawn)
        return possible[self.strides.next(possible)] if possible else None

    def take(self, ticket: Ticket, *, again: bool) -> None:
        """A group is begun: the one that `choose` gave, or (`again`) one that was given up before."""
        name = ticket.environment
        if name in self.pools:
            self.pools[name].take(ticket.task_index, ticket.attempt)
        elif not again:
            self.next_index[name] = ticket.task_index + 1
        if not again:
            self.strides.move(name, self.weight(name))

    def scored(self, ticket: Ticket, rewards: Sequence[float]) -> None:
        """The rewards of a group are known."""
        name = ticket.environment
        success = sum(reward > self.sources[name].success for reward in rewards) / len(rewards)
        running, groups = self.success[name]
        groups += 1
        self.success[name] = running + (success - running) / min(groups, WINDOW), groups
        if name in self.pools:
            self.pools[name].scored(ticket.task_index, success)
        for waiting in self.sources.values():
            gate = waiting.gate
            if gate is None or gate.environment != name or waiting.environment in self.open:
                continue
            if groups >= gate.groups and self.success[name][0] >= gate.success:
                self.strides.join(waiting.environment)
                self.open.add(waiting.environment)

    def returned(self, ticket: Ticket) -> None:
        """The group of a task is over, and is not begun again for now."""
        if ticket.environment in self.pools:
            self.pools[ticket.environment].returned(ticket.task_index)

    def state(self) -> dict[str, Any]:
        """Plain JSON; the settings are not in it."""
        return {
            "next_index": dict(self.next_index),
            "strides": self.strides.state(),
            "open": sorted(self.open),
            "success": {name: list(value) for name, value in self.success.items()},
            "pools": {
                name: {
                    "pools": {key: list(tasks) for key, tasks in pools.pools.items()},
                    "success": [list(pair) for pair in sorted(pools.success.items())],
                    "attempts": [list(pair) for pair in sorted(pools.attempts.items())],
                    "strides": pools.strides.state(),
                }
                for name, pools in self.pools.items()
            },
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to `state`, which was taken of a stream with the same settings."""
        self.next_index = dict(state["next_index"])
        self.strides = Strides(**state["strides"])
        self.open = set(state["open"])
        self.success = {name: (success, groups) for name, (success, groups) in state["success"].items()}
        for name, saved in state["pools"].items():
            pools = self.pools[name]
            pools.pools = {key: list(tasks) for key, tasks in saved["pools"].items()}
            pools.success = dict(saved["success"])
            pools.attempts = dict(saved["attempts"])
            pools.strides = Strides(**saved["strides"])
