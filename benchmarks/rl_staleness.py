"""Does learning survive old samples? Synchronous training, DDIS and naive PPO at the same staleness, three tasks.

    python -m benchmarks.rl_staleness --out docs/results/rl_staleness.md        # 45 runs; an hour of one core
    python -m benchmarks.rl_staleness --quick                                   # does it run

A small replica of AReaL's table (arXiv 2505.24298, blog v0.3, table 3). Every arm starts from the same warmed `nano`
(`benchmarks.rl_tasks`) and learns from the same number of batches of the same size at the same rate:

- `sync`: sampled from exactly the weights that learn (IcePop, the report's synchronous objective);
- `ddis`: asynchronous with at most `--staleness` versions, GLM-5's direct double-sided importance sampling;
- `naive`: the same with PPO's clip around the sampler's policy, no correction.

The tasks begin where a policy has to move far, for bounds around an old policy cost little where it stays near: of
`WORDS`, which the study runs, it knows the answers but says most in words; of `RARE` it knows few. `HALF` are the same
tasks as `WORDS`, known in part, where naive PPO loses little or nothing.

In the asynchronous arms the sampler is always ahead, so with groups of one reward kept every batch is as old as the
bound allows. With `--uniform-groups drop` the arm that drops more is the younger one, unless `--publish-every 9` (for a
staleness of 8) lets both learn from ages 0 to 8 in turn. Printed are the mean and the largest age, and "held", the
share of tokens outside the loss's bounds.

The judged number is the mean reward of the finished model, sampled at temperature 1 on the same `--questions` of the
task. `ddis` reaches `sync` when its mean lies within one standard deviation of sync's seeds, or above; `naive` does
worse when its seed-by-seed difference to `ddis` lies two standard errors below 0. A run that meets nothing to learn
from any more (its task is learnt, or its policy sure) is judged as it stands, and named. Finished runs stay below
--work and are not done again.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.measure import machine
from benchmarks.rl_tasks import ONE_DIGIT, TASKS, GymTask, environment, warmed
from glm5.checkpoint import load_model, save_model
from glm5.engine import Engine, SamplingParams
from glm5.envs import SingleTurn, UniformGroups
from glm5.files import write_json
from glm5.optim import OptimizerConfig, Schedule
from glm5.rl.admission import Mode, SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.learnt import Learnt
from glm5.rl.losses import DDIS, PPO, AnyLoss, IcePop
from glm5.rl.orchestrator import train_rl
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.vain import NothingLearnt
from glm5.text import Tokenizer, parse_assistant
from glm5.train import RunDirectory

EVALUATION_SEED = 5_000_001
HALF = {
    "chain_sum": TASKS["chain_sum"],
    "gcd": GymTask("gcd", {"min_value": 1, "max_value": 20}),
    "count_bits": GymTask("count_bits", {"min_n": 1, "max_n": 64}),
}
"""The study's, half known when it begins."""
RARE = {
    "count_bits_rare": GymTask("count_bits", {"min_n": 1, "max_n": 64}, warm_steps=15),
    "products_rare": GymTask("products", ONE_DIGIT, warm_steps=7),
    "prime_factorization_rare": GymTask("prime_factorization", {"min_value": 2, "max_value": 50}, warm_steps=15),
}
"""Few questions, of which a warm-up as short as this leaves most unknown."""
WORDS = {
    "count_bits_words": replace(HALF["count_bits"], in_words=0.9),
    "gcd_words": replace(HALF["gcd"], in_words=0.9),
    "chain_sum_words": replace(HALF["chain_sum"], in_words=0.9, warm_steps=160),
}
"""The same, but nine of ten answers of the warm-up are in words, which are wrong: a policy has to move far, and can."""
ALL = HALF | RARE | WORDS
RATES = {"count_bits_words": 3e-5, "gcd_words": 3e-5, "chain_sum_words": 5e-5}
"""Of the tasks of `WORDS`, at which the right kind of answer grows by about half within eight versions."""
ARMS = ("sync", "ddis", "naive")


@dataclass
class Options:
    """Options of the study."""

    tasks: tuple[str, ...] = tuple(WORDS)
    arms: tuple[str, ...] = ARMS
    seeds: int = 5
    first_seed: int = 0
    """For trials with seeds that the study does not use."""
    steps: int = 128
    updates: int = 1
    """Optimiser steps a batch, each over its share of the samples; AReaL takes four."""
    staleness: int = 8
    publish_every: int = 1
    """Batches between two publications of the asynchronous arms."""
    prompts: int = 8
    group_size: int = 8
    uniform_groups: UniformGroups = "keep"
    """Kept, groups with one reward teach nothing, but sampling never holds learning up: every batch is as old as the
    bound allows."""
    questions: int = 128
    samples: int = 32
    """Of each question, for the judgement."""
    rate: float | None = None
    """None: that of the task (`RATES`). Falls to a twentieth over the run, so that the last samples are as old in
    versions, but not in policy."""
    beta: float = 0.9
    """First moment of AdamW; old gradients are a momentum of their own."""
    entropy: float = 0.0
    """Coefficient of the bonus on entropy, without which fast learning may end with all groups alike."""
    ddis: tuple[float, float] = (0.5, 1.0)
    """Bounds of the DDIS arm."""
    threads: int = 1
    quick: bool = False
    """Two steps of one seed: a check that all of it runs."""
    work: Path = Path("runs/rl_staleness")
    out: Path | None = None
    """Write the table and the curves there as Markdown."""


def loss_of(arm: str, options: Options) -> tuple[Mode, AnyLoss]:
    """How an arm samples and learns."""
    match arm:
        case "sync":
            return "sync", IcePop()
        case "ddis":
            return "async", DDIS(epsilon_low=options.ddis[0], epsilon_high=options.ddis[1])
        case "naive":
            return "async", PPO(against="sampler")
    raise ValueError(f"{arm!r} is no arm; use {', '.join(ARMS)}.")


def config_of(arm: str, parent: Path, seed: int, rate: float, options: Options) -> RLRunConfig:
    """One run."""
    mode, loss = loss_of(arm, options)
    return RLRunConfig(
        parent=parent,
        steps=options.steps,
        rollout=RolloutConfig(seed=seed, max_tokens=8),
        scheduler=SchedulerConfig(
            mode=mode, groups_per_batch=options.prompts, group_size=options.group_size, refill=True,
            max_staleness=options.staleness, max_running=4 * options.prompts * options.group_size,
            publish_every=options.publish_every if mode == "async" else 1,
        ),
        learner=LearnerConfig(
            loss=loss,
            updates=options.updates,
            mtp="frozen",  # drafts learn beside the policy, never for it
            entropy=options.entropy,
            optimizer=OptimizerConfig(name="adamw", lr=rate, betas=(options.beta, 0.98), weight_decay=0.0),
            schedule=Schedule(shape="linear", warmup_steps=4, final_fraction=0.05),
        ),
        checkpoint_every=options.steps,
    )  # fmt: skip


def done(task: str, arm: str, seed: int, options: Options) -> dict[str, Any]:
    """The result of a run: found, or made."""
    o, rate = options, options.rate or RATES.get(task, 1e-4)
    settings = (
        f"{o.steps}x{o.updates}-{o.staleness}-{o.publish_every}-{rate:g}-{o.prompts}x{o.group_size}"
        f"-{o.uniform_groups}-{o.beta:g}-{o.entropy:g}-{o.questions}x{o.samples}"
    )
    if arm == "ddis":
        settings += f"-{o.ddis[0]:g}-{o.ddis[1]:g}"
    path = options.work / f"{task}-{arm}-{seed}-{settings}"
    file = path.with_suffix(path.suffix + ".json")
    if not file.exists():
        parent = warmed(ALL[task], options.work)
        model, end = finished(config_of(arm, parent, seed, rate, options), ALL[task], options.uniform_groups, path)
        lines = RunDirectory.open(path).read("metrics")
        write_json(
            file,
            {
                "rewards": [line["reward"] for line in lines if line["reward"] is not None],
                "last": sampled_reward(model, task, options.questions, options.samples),
                "first": sampled_reward(parent, task, options.questions, options.samples),
                "held": mean([line.get("masked", 0.0) + line.get("clipped", 0.0) for line in lines]),
                "age": mean([line["mean_staleness"] for line in lines]),
                "oldest": max((line["max_staleness"] for line in lines), default=0),
                "steps": len(lines),
                "end": end,
            },
        )
        shutil.rmtree(path)  # a run holds its journal and its models
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def finished(config: RLRunConfig, task: GymTask, uniform: UniformGroups, path: Path) -> tuple[Path, str]:
    """The model that a run has made, and how it ended. One that meets nothing to learn from any more ends as it stands:
    a policy that is sure of its answers is a result of the arm, as a task that is learnt is."""
    environments = [SingleTurn(environment(task), uniform_groups=uniform)]
    resume = (path / "run.json").exists()
    try:
        run = train_rl(config, environments, path, resume=resume)
    except NothingLearnt as error:
        learner = Learner(load_model(config.parent, dtype=torch.float32), config.learner, steps=config.steps)
        learner.load(RunDirectory.open(path))
        save_model(learner.whole_model().eval(), path / "stands", Tokenizer.from_pretrained(config.parent))
        return path / "stands", str(error)
    learnt = Learnt.read(path)
    return run.model_directory, "" if learnt is None else learnt.sentence


def mean(values: list[float]) -> float:
    """0 for none."""
    return statistics.fmean(values) if values else 0.0


def sampled_reward(model: Path, task: str, questions: int, samples: int) -> float:
    """Mean reward of the samples to each of the questions, which are the same for every model."""
    asked = environment(ALL[task])
    tasks = [asked.task(EVALUATION_SEED, index) for index in range(questions)]
    engine = Engine(model)
    assert engine.tokenizer is not None
    prompts = [
        engine.tokenizer.apply_chat_template(t.messages, enable_thinking=False, escape_special=True) for t in tasks
    ]
    outputs = engine.generate(prompts, SamplingParams(n=samples, temperature=1.0, max_tokens=8, seed=EVALUATION_SEED))
    return statistics.fmean(
        asked.score(question, parse_assistant(completion.text, thinking=False)).value
        for question, output in zip(tasks, outputs, strict=True)
        for completion in output.outputs
    )


def early(result: dict[str, Any]) -> str:
    """Where and why a run ended before its last step."""
    return f", step {result['steps']}: {result['end']}" if result.get("end") else ""


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


def verdict(task: dict[str, list[dict[str, Any]]]) -> str:
    """Whether DDIS reaches synchronous training, and naive PPO does worse than DDIS."""
    if not {"sync", "ddis", "naive"} <= task.keys():
        return ""
    last = {arm: [run["last"] for run in runs] for arm, runs in task.items()}
    mean = {arm: statistics.fmean(values) for arm, values in last.items()}
    room = statistics.stdev(last["sync"]) if len(last["sync"]) > 1 else 0.0
    reached = "met" if mean["ddis"] >= mean["sync"] - room else "MISSED"
    difference = [naive - ddis for naive, ddis in zip(last["naive"], last["ddis"], strict=True)]
    error = statistics.stdev(difference) / len(difference) ** 0.5 if len(difference) > 1 else math.inf
    worse = "met" if statistics.fmean(difference) < -2 * error else "MISSED"
    return f"ddis reaches sync: {reached}; naive does worse, seed by seed less ddis {spread(difference)}: {worse}"


def curves(results: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Mean reward over the seeds in tenths of the run."""
    rows = ["| task, arm | " + " | ".join(f"{10 * i}%" for i in range(1, 11)) + " |", "|---" * 11 + "|"]
    for task, arms in results.items():
        for arm, runs in arms.items():
            cells = []
            for part in range(10):
                values = [
                    value
                    for run in runs
                    for value in run["rewards"][
                        len(run["rewards"]) * part // 10 : len(run["rewards"]) * (part + 1) // 10
                    ]
                ]
                cells.append(f"{statistics.fmean(values):.3f}" if values else "")
            rows.append(f"| {task}, {arm} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main(options: Options) -> None:
    """Seeds are the outer loop, so an interrupted study still compares all arms."""
    if options.quick:
        options = replace(options, seeds=1, steps=2, prompts=2, group_size=4, publish_every=1, samples=2)
    torch.set_num_threads(options.threads)
    results: dict[str, dict[str, list[dict[str, Any]]]] = {t: {a: [] for a in options.arms} for t in options.tasks}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for task in options.tasks:
            for arm in options.arms:
                results[task][arm].append(done(task, arm, seed, options))
                newest = results[task][arm][-1]
                print(
                    f"{task} {arm} seed {seed}: {newest['first']:.3f} -> {newest['last']:.3f}, "
                    f"age {newest['age']:.1f}, held {newest['held']:.2f}{early(newest)}",
                    flush=True,
                )
    rows = ["| task | arm | reward before | reward after | mean age | oldest | held |", "|---" * 7 + "|"]
    for task, arms in results.items():
        for arm, runs in arms.items():
            first, last, age, held = (spread([run[key] for run in runs]) for key in ("first", "last", "age", "held"))
            oldest = max(run["oldest"] for run in runs)
            rows.append(f"| {task} | {arm} | {first} | {last} | {age} | {oldest} | {held} |")
    ends = [
        f"- {task} {arm} seed {options.first_seed + number}{early(run)}"
        for task, arms in results.items()
        for arm, runs in arms.items()
        for number, run in enumerate(runs)
        if early(run)
    ]
    verdicts = "\n".join(f"- {task}: {verdict(arms)}" for task, arms in results.items())
    here, rate = machine(), "" if options.rate is None else f" --rate {options.rate:g}"
    text = "\n\n".join(
        [
            "# Learning from old samples",
            f"`python -m benchmarks.rl_staleness --seeds {options.seeds} --steps {options.steps} --staleness "
            f"{options.staleness} --publish-every {options.publish_every}{rate} --prompts "
            f"{options.prompts} --group-size {options.group_size} --updates {options.updates} --entropy "
            f"{options.entropy:g} --ddis {options.ddis[0]:g} {options.ddis[1]:g} --questions {options.questions} "
            f"--samples {options.samples} --uniform-groups {options.uniform_groups} "
            f"--beta {options.beta:g}`,\ncommit {here['commit']}, "
            f"{here['cpu']}, PyTorch {here['torch']}; {options.prompts} questions x {options.group_size} samples a "
            "batch. Mean ± standard deviation over the seeds; ages in weight versions.",
            "\n".join(rows),
            verdicts,
            *(["Runs that ended before their last step, judged as they stood:", "\n".join(ends)] if ends else []),
            "Mean reward of the rollouts over all seeds, by tenths of the run (asynchronous ones were sampled some "
            "versions earlier):",
            curves(results),
        ]
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
