"""The simulator of reinforcement learning against real runs: one is measured, the others are predicted from it.

    python -m benchmarks.rl_simulate                             # about five minutes on one core
    taskset -c 0 python -m benchmarks.rl_simulate --steps 60 --out simulated.md

The bundled model answers sums, and the environment takes its time (log-uniform). The reward is the parity of the
answer's length: about half of the groups have different ones and are learnt from, and the rate is too small for
anything to be learnt. What the run in sync mode was like, and a calibration of the engine (tokens per second at 1 to 32
sequences, with the prompts of the task), go into the simulator, which predicts all three modes. Trainer and engine
share the cores of this process, which is part of what is predicted (`shared`, measured: what is left of a thread's
speed while another one computes). Other load on the machine spoils it.

Chance is told apart from the simulator's own mistakes. A run of 60 steps has few groups, and how many of them teach
decides on its speed: `predicted` comes with the deviation that this alone makes, over records drawn anew and runs of as
many steps. `same rollouts` has no such chance: each ticket plays in virtual time what it played in the run, which the
seed decides while the weights stand still.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
import tyro

from benchmarks.measure import machine
from glm5.bundled import bundled_model
from glm5.checkpoint import load_model
from glm5.engine import Engine, SamplingParams
from glm5.envs import Delayed, Environment, Latency, Message, Reward, SingleTurn, Sums, Task, UniformGroups
from glm5.optim import OptimizerConfig
from glm5.rl.admission import Mode, SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.event_log import events_of
from glm5.rl.events import BatchMade, Finished
from glm5.rl.journal import read_journal
from glm5.rl.learner_config import LearnerConfig
from glm5.rl.orchestrator import train_rl
from glm5.rl.records import Rollout, Ticket
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.runner import play
from glm5.rl.session import JOURNAL
from glm5.rl.simulation import EngineSpeed, Measured, Simulation, SimulationConfig, records_of, simulate, spread_of
from glm5.rl.simulation.workload import Play
from glm5.scoring import Grade
from glm5.text import Tokenizer
from glm5.train import RunDirectory

STILL = OptimizerConfig(name="adamw", lr=1e-12, weight_decay=0.0)
"""At a usual rate the parity is learnt within 60 steps, and every group is then uniform."""
MODES: tuple[Mode, ...] = ("sync", "one-step-off", "async")


@dataclass
class Options:
    """Options of the benchmark."""

    steps: int = 20
    warmup: int = 4
    """Steps at the start that are left out."""
    groups: int = 4
    samples: int = 4
    max_running: int = 32
    max_staleness: int = 4
    shortest: float = 0.05
    """Seconds of the environment, at least."""
    longest: float = 4.0
    """At most."""
    seed: int = 0
    batches: int = 1000
    """Of a prediction: so many that its own chance is small."""
    draws: int = 16
    """Records drawn anew for the deviation."""
    out: Path | None = None


class Parity:
    """Sums, with a reward for an answer of an even length."""

    name = "parity"
    uniform_groups: UniformGroups = "drop"

    def task(self, seed: int, index: int) -> Task:
        """A sum."""
        return Sums().task(seed, index)

    def score(self, task: Task, response: Message) -> Reward:
        """1 or 0."""
        even = len(response.get("content") or "") % 2 == 0
        return Reward(float(even), Grade("correct" if even else "incorrect", "the length of the answer"))


@dataclass(frozen=True)
class Figures:
    """Of a run, or of a simulation."""

    steps_per_hour: float
    trainer_idle: float
    sampler_idle: float
    mean_staleness: float

    @classmethod
    def of(cls, it: Simulation) -> Figures:
        """Those of a simulation."""
        return cls(it.steps_per_hour, it.trainer_idle, it.sampler_idle, it.mean_staleness)

    def row(self, measured: Figures, spread: float | None = None) -> str:
        """Cells of the table. spread: of the steps per hour."""
        ratio = f"{self.steps_per_hour / measured.steps_per_hour:.2f}"
        if spread is not None:
            ratio += f" ± {spread / measured.steps_per_hour:.2f}"
        return (
            f"{self.steps_per_hour:.0f} | {ratio} | {self.trainer_idle:.0%} | {self.sampler_idle:.0%} | "
            f"{self.mean_staleness:.2f}"
        )


def settings(options: Options, mode: Mode) -> SchedulerConfig:
    """Of the scheduler, in the real run and in the simulated one."""
    return SchedulerConfig(
        mode=mode, groups_per_batch=options.groups, group_size=options.samples, max_running=options.max_running,
        max_staleness=options.max_staleness,
    )  # fmt: skip


def rollout_config(options: Options) -> RolloutConfig:
    """Of the rollouts, in the real run and in those that are made again."""
    return RolloutConfig(seed=options.seed, max_tokens=16)


def real(options: Options, mode: Mode, environment: Environment, out: Path) -> RunDirectory:
    """A run."""
    config = RLRunConfig(
        parent=bundled_model(), steps=options.steps, rollout=rollout_config(options),
        scheduler=settings(options, mode), learner=LearnerConfig(optimizer=STILL), checkpoint_every=options.steps,
    )  # fmt: skip
    return train_rl(config, [environment], out)


def figures(run: RunDirectory, warmup: int) -> Figures:
    """What the run was like after its first steps."""
    laps = run.read("speed")[warmup:]
    seconds = sum(lap["seconds"] for lap in laps)
    rollouts: dict[str, Rollout] = {}
    ages = Counter[int]()
    for line in read_journal(run.path / JOURNAL):
        for event in events_of(line):
            if isinstance(event, Finished):
                rollouts[event.rollout.id] = event.rollout
            elif isinstance(event, BatchMade) and event.step >= warmup:
                for selection in event.selections:
                    ages.update(rollouts[ticket.id].staleness(event.step) for ticket in selection.tickets)
    idle = [sum(lap[name] * lap["seconds"] for lap in laps) / seconds for name in ("trainer_idle", "sampler_idle")]
    mean = sum(age * n for age, n in ages.items()) / max(1, ages.total())
    return Figures(3600 * len(laps) / seconds, idle[0], idle[1], mean)


class SameRollouts:
    """What each ticket of the run plays: made again without waiting, for weights that stand still."""

    def __init__(self, options: Options, environment: Delayed) -> None:
        self._engine = Engine(
            load_model(bundled_model(), dtype=torch.float32), Tokenizer.from_pretrained(bundled_model())
        )
        self._environment = replace(environment, sleep=self._noted)
        self._config = rollout_config(options)
        self._waits: list[float] = []
        self._known: dict[str, Play] = {}

    async def _noted(self, seconds: float) -> None:
        self._waits.append(seconds)

    def play(self, ticket: Ticket, group: Random, sample: Random) -> Play:
        """No chance is left."""
        if ticket.id not in self._known:
            self._waits.clear()
            rollout = asyncio.run(play(ticket, self._environment, self._engine, self._config, timed=False))
            assert rollout.reward is not None
            tokens = tuple(len(turn.output_ids) for turn in rollout.turns)
            self._known[ticket.id] = Play(tokens, tuple(self._waits), rollout.outcome, rollout.reward.value)
        return self._known[ticket.id]


def engine_speed(environment: Environment, tokens: int) -> tuple[EngineSpeed, float]:
    """Tokens per second by the number of sequences, prompts included, and seconds to take new weights."""
    model = load_model(bundled_model(), dtype=torch.float32)
    tokenizer = Tokenizer.from_pretrained(bundled_model())
    engine = Engine(model, tokenizer)
    params = SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True, seed=0)
    prompts = [tokenizer.apply_chat_template(environment.task(1, i).messages, enable_thinking=False) for i in range(32)]
    points = []
    for count in (1, 2, 4, 8, 16, 32):
        engine.generate(prompts[:count], params)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            engine.generate(prompts[:count], params)
            times.append(time.perf_counter() - started)
        points.append((count, count * tokens / statistics.median(times)))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    times = []
    for version in range(1, 6):
        started = time.perf_counter()
        engine.update_weights(version, state)
        times.append(time.perf_counter() - started)
    return EngineSpeed(points=tuple(points)), statistics.median(times)


def shared_speed() -> float:
    """What is left of this thread's speed while another one computes as well."""

    def work() -> float:
        x = torch.randn(64, 256)
        w = torch.randn(256, 256)
        started = time.perf_counter()
        for _ in range(3000):
            x = torch.tanh(x @ w)
        return time.perf_counter() - started

    work()
    alone = work()
    done = threading.Event()

    def other() -> None:
        while not done.is_set():
            work()

    thread = threading.Thread(target=other)
    thread.start()
    both = work()
    done.set()
    thread.join()
    return min(1.0, alone / both)


def main(options: Options) -> None:
    """Measures, predicts, prints."""
    torch.set_num_threads(1)
    environment = Delayed(SingleTurn(Parity()), Latency(options.shortest, options.longest, options.seed))
    same = {environment.name: SameRollouts(options, environment)}
    with tempfile.TemporaryDirectory() as work:
        runs = {mode: real(options, mode, environment, Path(work) / mode) for mode in MODES}
        records = list(records_of(runs["sync"].path))
        measured = Measured.from_records(records)
        lengths = [sum(play.tokens) for group in measured.workloads[environment.name].groups for play in group]
        speed, swap = engine_speed(environment, max(1, round(statistics.fmean(lengths))))
        given = {"engine": speed, "publish_seconds": swap, "swap_seconds": swap}
        short = SimulationConfig(scheduler=settings(options, "async"), batches=options.steps, warmup=options.warmup,
                                 shared=shared_speed(), seed=options.seed).as_measured(measured, **given)  # fmt: skip
        spreads = spread_of(short, records, draws=options.draws, given=given)  # of the modes, in order
        rows = []
        for mode, spread in zip(MODES, spreads.steps_per_hour, strict=True):
            config = replace(short, scheduler=settings(options, mode))
            found = figures(runs[mode], options.warmup)
            predicted = Figures.of(simulate(replace(config, batches=options.batches)))
            again = Figures.of(simulate(replace(config, workloads=same)))
            print(f"{mode}: predicted {predicted.row(found, spread)}; same rollouts {again.row(found)}", flush=True)
            rows += [f"| {mode} | measured | {found.row(found)} |", f"| | predicted | {predicted.row(found, spread)} |",
                     f"| | same rollouts | {again.row(found)} |"]  # fmt: skip
    points = ", ".join(f"{n}: {rate:.0f}" for n, rate in speed.points)
    text = "\n".join([
        "# The simulator against real runs", "",
        f"`{' '.join(['python -m benchmarks.rl_simulate', *sys.argv[1:]])}`: {machine()}.", "",
        f"{options.groups} groups of {options.samples}, at most {options.max_running} rollouts at once, environment "
        f"{options.shortest:g} to {options.longest:g} s (log-uniform), bound {options.max_staleness} in async mode, "
        f"the first {options.warmup} of {options.steps} steps left out. Measured: answers of "
        f"{statistics.fmean(lengths):.1f} tokens on average; a step takes {1000 * measured.train_seconds:.0f} ms and "
        f"{1000 * measured.train_seconds_per_token:.2f} ms a token; new weights {swap:.3f} s; engine, tokens per "
        f"second by sequences: {points}; speed while both work: {short.shared:.2f}.", "",
        "| mode | | steps per hour | of the measured | trainer idle | sampler idle | mean staleness |",
        "|---|---|---|---|---|---|---|", *rows, ""])  # fmt: skip
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
