"""`glm5 eval RUN`: scores a model on a suite, arithmetic, needles or skills, and keeps every answer."""

from __future__ import annotations

import json as json_text
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from glm5.cli import eval_needles, eval_skills
from glm5.engine import Engine
from glm5.envs import Arithmetic
from glm5.evals import EvalConfig, EvalResult, evaluate, write_evaluation
from glm5.evals.needles import NeedleConfig
from glm5.evals.skills import SkillsConfig
from glm5.scoring import Accuracy
from glm5.train.run_directory import model_of


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Score a model on questions that it was not trained on."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run directory or a Hugging Face model directory."""
    suite: Literal["arithmetic", "needles", "skills"] = "arithmetic"
    """needles: one sentence to find in a long text. skills: facts of a world, sums, tool calls, ignorance, endings."""
    largest: int = 20
    """Largest number that is asked about."""
    operations: str = "+-*"
    """Any of + - *"""
    out: Path | None = None
    """Directory for result.json and samples.jsonl; nothing is written when left out."""
    config: Annotated[EvalConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=EvalConfig)
    filler: Path | None = None
    """A held-out dataset in which needles are hidden, such as data/heldout of a quickstart."""
    needles: NeedleConfig = field(default_factory=NeedleConfig)
    world: Path | None = None
    """The world that the skills are asked about: a directory of `glm5 data world`."""
    skills: SkillsConfig = field(default_factory=SkillsConfig)
    json: bool = False
    """Print one JSON object."""


def run(options: EvalOptions) -> int:
    """Prints the accuracy with its 95% interval, as a whole and by category."""
    if options.suite == "needles":
        return eval_needles.run(
            model_of(options.model), options.filler, options.needles, out=options.out, json=options.json
        )
    if options.suite == "skills":
        return eval_skills.run(
            model_of(options.model), options.world, options.skills, out=options.out, json=options.json
        )
    engine = Engine(model_of(options.model), dtype=torch.float32)
    env = Arithmetic(split="heldout", largest=options.largest, operations=options.operations)
    result, answers = evaluate(engine, env, options.config)
    if options.out is not None:
        write_evaluation(options.out, result, answers)
    if options.json:
        print(json_text.dumps(result.to_json()))
    else:
        Console().print(result_table(result))
    return 0


def result_table(result: EvalResult) -> Table:
    """Accuracy as a whole and by category."""
    table = Table(title=f"{result.environment}, {result.accuracy.total} tasks that were never trained on")
    for head in ("", "right", "accuracy", "95% interval"):
        table.add_column(head, justify="left" if not head else "right")

    def add(name: str, part: Accuracy) -> None:
        interval = f"{part.low:.1%} to {part.high:.1%}"
        table.add_row(name, f"{part.correct}/{part.total}", f"{part.value:.1%}", interval)

    add("all", result.accuracy)
    for name, part in result.categories.items():
        add(name, part)
    return table
