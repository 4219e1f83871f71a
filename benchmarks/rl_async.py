"""Speed of reinforcement learning: our asynchronous mode, our synchronous mode, TRL's GRPOTrainer; one run, in turns.

    python -m benchmarks.rl_async --out docs/results/rl_async.md          # needs trl: pip install 'glm5[peers]'
    python -m benchmarks.rl_async --parts latency                         # ours alone, without trl
    python -m benchmarks.rl_async --quick

`compute`: a task of two terms and an answer of two tokens, nothing to wait for. All sides train the same directory on
the same questions: 8 questions x 8 samples, full fine-tuning in fp32, the same rate, clip bounds and loss, one thread.
Judged: optimiser steps per second of processor time against TRL (bar: 1.2x). The gain of the model's code is ours sync
over TRL, that of the scheduler ours async over ours sync.

`latency`: counting aloud (`CountingAloud`): a log-normal number of turns, and behind each the environment takes 50 to
500 ms. Judged: seconds by the clock until the reward (mean over the seeds and the last ten batches) has gone half of
the way from the first batches of the synchronous runs to their last, async against sync (bar: 2x); near the end the
curve is flat and the first crossing a matter of noise. Idle shares are of the same runs.

Every run is a process of its own, seeds are the outer loop, sides take turns. Times are of the run without loading.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.measure import machine
from benchmarks.rl_peer import PeerRun, run_peer
from benchmarks.rl_tasks import TASKS, AloudTask, CountingAloud, environment, warmed
from glm5.envs import Delayed, Environment, SingleTurn
from glm5.optim import OptimizerConfig
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.learner_config import LearnerConfig
from glm5.rl.losses import DDIS, IcePop
from glm5.rl.orchestrator import train_rl
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.tasks import TaskSource

Part = Literal["compute", "latency"]
COMPUTE_TASK = "chain_sum"
WINDOW = 10


@dataclass
class Options:
    """Options of the benchmark."""

    parts: tuple[Part, ...] = ("compute", "latency")
    peer: bool = True
    """Run TRL beside ours."""
    seeds: int = 5
    steps: int = 20
    """Of every compute run."""
    latency_steps: int = 120
    """Of every latency run."""
    rate: float = 1e-4
    latency_rate: float = 3e-5
    staleness: int = 4
    goals: tuple[float, ...] = (0.5, 0.8)
    """Parts of the way from the first to the last batches of sync; the first is judged, where the curve is steep."""
    threads: int = 1
    quick: bool = False
    work: Path = Path("runs/rl_async")
    out: Path | None = None


@dataclass(frozen=True, kw_only=True)
class OwnRun:
    """One run of ours, as it is sent to its process."""

    part: Part
    mode: Literal["sync", "async"]
    parent: str
    out: str
    steps: int
    rate: float
    staleness: int
    seed: int
    threads: int
    questions: int = 8
    samples: int = 8


@dataclass(frozen=True)
class Result:
    """Of any side. `clock`: seconds by the clock when each step was done."""

    rewards: list[float]
    clock: list[float]
    wall_seconds: float
    cpu_seconds: float
    idle: dict[str, float]

    def smooth(self) -> list[float]:
        """Mean of the last batches, from the step on at which there are so many."""
        return [statistics.fmean(self.rewards[end - WINDOW : end]) for end in range(WINDOW, len(self.rewards) + 1)]

    def seconds_to(self, reward: float) -> float | None:
        """Until the mean of the last batches reached `reward`; None if never."""
        reached = (step for step, mean in enumerate(self.smooth(), WINDOW) if mean >= reward)
        step = next(reached, None)
        return None if step is None else self.clock[step - 1]


def own(run: OwnRun) -> Result:
    """Runs it in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.rl_async", "--own", json.dumps(asdict(run))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the run ended with {done.returncode}: {done.stderr[-2000:]}")
    return Result(**json.loads(done.stdout.strip().splitlines()[-1]))


def train(run: OwnRun) -> Result:
    """In this process."""
    torch.set_num_threads(run.threads)
    env: Environment = SingleTurn(environment(TASKS[COMPUTE_TASK]))
    if run.part == "latency":
        env = Delayed(CountingAloud())
    config = RLRunConfig(
        parent=Path(run.parent),
        steps=run.steps,
        rollout=RolloutConfig(seed=run.seed, max_tokens=16 if run.part == "compute" else 8),
        scheduler=SchedulerConfig(
            mode=run.mode, groups_per_batch=run.questions, group_size=run.samples, max_staleness=run.staleness,
            max_running=2 * run.questions * run.samples,
        ),
        learner=LearnerConfig(
            loss=IcePop() if run.mode == "sync" else DDIS(),
            mtp="frozen",  # TRL's side has none
            optimizer=OptimizerConfig(name="adamw", lr=run.rate, betas=(0.9, 0.98), weight_decay=0.0),
        ),
        checkpoint_every=run.steps,
    )  # fmt: skip
    wall, cpu = time.perf_counter(), processor()
    # As in TRL, groups whose rewards are all equal stay: every step has the same work, and a solved task does not stop.
    source = TaskSource.of(env, uniform_groups="keep")
    done = train_rl(config, [env], Path(run.out), sources=[source])
    wall, cpu = time.perf_counter() - wall, processor() - cpu
    speed = done.read("speed")
    clock, total = [], 0.0
    for line in speed:
        total += line["seconds"]
        clock.append(total)
    rewards: list[float] = []
    for line in done.read("metrics"):  # a batch that was ready with the one before came with no new reward
        rewards.append(rewards[-1] if line["reward"] is None else line["reward"])
    idle: dict[str, float] = {
        name: statistics.fmean(line[name] for line in speed)
        for name in ("trainer_idle", "sampler_idle")
        if name in speed[0]
    }
    return Result(rewards, clock, wall, cpu, idle)


def processor() -> float:
    """Seconds of processor time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def spread(values: list[float]) -> str:
    """Median with extremes."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def compute(options: Options) -> str:
    """Steps per second of processor time."""
    parent = str(warmed(TASKS[COMPUTE_TASK], options.work))
    rates: dict[str, list[float]] = {n: [] for n in ("ours async", "ours sync", *(["TRL"] if options.peer else []))}
    walls: dict[str, list[float]] = {name: [] for name in rates}
    rewards: dict[str, list[float]] = {name: [] for name in rates}
    for seed in range(options.seeds):
        for name in rates:
            if name == "TRL":
                peer = run_peer(
                    PeerRun(
                        model=parent, task=COMPUTE_TASK, steps=options.steps, prompts=8, group_size=8, max_tokens=16,
                        rate=options.rate, seed=seed, threads=options.threads,
                    )
                )  # fmt: skip
                found = Result(peer.rewards, [], peer.wall_seconds, peer.cpu_seconds, {})
            else:
                found = own(own_run("compute", name, parent, seed, options))
            rates[name].append(options.steps / found.cpu_seconds)
            walls[name].append(options.steps / found.wall_seconds)
            rewards[name].append(statistics.fmean(found.rewards[-WINDOW:]))
            print(f"compute {name} seed {seed}: {found.cpu_seconds:.1f} s of processor, {found.wall_seconds:.1f} s",
                  flush=True)  # fmt: skip
    rows = [f"| side | steps per CPU second | steps per second | reward, last {WINDOW} batches |", "|---|---|---|---|"]
    rows += [f"| {n} | {spread(rates[n])} | {spread(walls[n])} | {spread(rewards[n])} |" for n in rates]
    pairs: list[tuple[str, str, str, float | None]] = [("ours async", "ours sync", "the scheduler", None)]
    if options.peer:
        pairs += [("ours sync", "TRL", "the model's code", None), ("ours async", "TRL", "both", 1.2)]
    for first, second, what, bar in pairs:
        ratio = [a / b for a, b in zip(rates[first], rates[second], strict=True)]
        verdict = "" if bar is None else f", bar {bar:g}: {'met' if statistics.median(ratio) >= bar else 'MISSED'}"
        rows.append(f"\nGain of {what}: {first} over {second}, seed by seed: **{spread(ratio)}**{verdict}.")
    return "## Compute-bound\n\n" + "\n".join(rows)


def own_run(part: Part, name: str, parent: str, seed: int, options: Options) -> OwnRun:
    """A run of ours with a directory that is not there yet."""
    steps, rate = (options.steps, options.rate) if part == "compute" else (options.latency_steps, options.latency_rate)
    mode: Literal["sync", "async"] = "async" if name.endswith("async") else "sync"
    out = options.work / f"{part}-{mode}-{seed}-{time.time_ns()}"
    return OwnRun(
        part=part, mode=mode, parent=parent, out=str(out), steps=steps, rate=rate, staleness=options.staleness,
        seed=seed, threads=options.threads, **({} if part == "compute" else {"questions": 4, "samples": 4}),
    )  # fmt: skip


def latency(options: Options) -> str:
    """Seconds to the same reward."""
    parent = str(warmed(AloudTask(), options.work))
    found: dict[str, list[Result]] = {"ours async": [], "ours sync": []}
    for seed in range(options.seeds):
        for name, results in found.items():
            results.append(own(own_run("latency", name, parent, seed, options)))
            last = results[-1]
            print(
                f"latency {name} seed {seed}: {last.wall_seconds:.1f} s, reward {last.rewards[0]:.2f} -> "
                f"{statistics.fmean(last.rewards[-WINDOW:]):.2f}, idle {last.idle}",
                flush=True,
            )
    rows = [f"| side | seconds per batch | reward, first and last {WINDOW} batches | trainer idle | sampler idle |",
            "|---" * 5 + "|"]  # fmt: skip
    for name, runs in found.items():
        per = spread([run.clock[-1] / len(run.clock) for run in runs])
        ends = [spread([statistics.fmean(run.rewards[part]) for run in runs])
                for part in (slice(None, WINDOW), slice(-WINDOW, None))]  # fmt: skip
        idle = [spread([run.idle.get(key, float("nan")) for run in runs]) for key in ("trainer_idle", "sampler_idle")]
        rows.append(f"| {name} | {per} | {', '.join(ends)} | {' | '.join(idle)} |")
    means = {name: mean_of(runs) for name, runs in found.items()}
    low, *_, high = means["ours sync"].smooth()
    rows += [
        "",
        "Seconds to the same reward, by the mean over the seeds; behind it seed by seed (seeds that reached it):",
        "",
        "| part of the way of sync | reward | ours async | ours sync | async over sync |",
        "|---" * 5 + "|",
    ]
    for goal in options.goals:
        target = low + goal * (high - low)
        own_seconds = {name: run.seconds_to(target) for name, run in means.items()}
        cells = [seconds_cell(own_seconds[name], [run.seconds_to(target) for run in runs])
                 for name, runs in found.items()]  # fmt: skip
        first, second = own_seconds.values()
        ratio = ""
        if first is not None and second is not None:
            ratio = f"**{second / first:.2f}**"
            if goal == options.goals[0]:
                ratio += f", bar 2: {'met' if second / first >= 2 else 'MISSED'}"
        rows.append(f"| {goal:.0%} | {target:.3f} | {' | '.join(cells)} | {ratio} |")
    return "## Long tails and slow tools\n\n" + "\n".join(rows)


def mean_of(runs: list[Result]) -> Result:
    """Rewards and times of every step, averaged over the runs."""
    rewards, clock = (
        [statistics.fmean(step) for step in zip(*(getattr(run, part) for run in runs), strict=True)]
        for part in ("rewards", "clock")
    )
    return Result(rewards, clock, clock[-1], 0.0, {})


def seconds_cell(mean: float | None, each: list[float | None]) -> str:
    """Of the mean over the seeds, and of the seeds themselves."""
    reached = [seconds for seconds in each if seconds is not None]
    whole = "never" if mean is None else f"{mean:.1f}"
    return f"{whole} ({spread(reached)}; {len(reached)} of {len(each)})" if reached else whole


def main(options: Options) -> None:
    """Prints what was asked for."""
    if options.quick:
        options = dataclasses.replace(options, seeds=1, steps=2, latency_steps=6)
    tables = [compute(options) if part == "compute" else latency(options) for part in options.parts]
    here = machine()
    head = (
        f"`python -m benchmarks.rl_async --parts {' '.join(options.parts)} --seeds {options.seeds} --steps "
        f"{options.steps} --latency-steps {options.latency_steps} --staleness {options.staleness}`,\ncommit "
        f"{here['commit']}, {here['cpu']}, PyTorch {here['torch']}, {options.threads} thread(s). Median (least "
        "to most) over the seeds."
    )
    text = "\n\n".join(["# Speed of reinforcement learning", head, *tables])
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--own"]:
        print(json.dumps(asdict(train(OwnRun(**json.loads(sys.argv[2]))))))
    else:
        main(tyro.cli(Options))
