"""A whole training run, text to instruct model. The quickstart and `recipes/nano.py` are two sets of its numbers.

    text, world, generators -> tokenizer -> pretrain -> midtrain -> dsa1 -> dsa2 -> sft (-> rl) -> report

Every stage is a run directory below `out` whose parent is the one before. A stage that is whole is not done again, so
any of them can be re-run alone after its directory is removed. Ctrl-C saves; the same call goes on from the exact step.
Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from glm5.checkpoint import load_model
from glm5.cli.recipe_data import DataPlan, Layout, build_all
from glm5.cli.recipe_page import write_page
from glm5.data import open_dataset
from glm5.data.world_text import open_world
from glm5.engine import Engine
from glm5.envs import Environment
from glm5.errors import ConfigError, RunError
from glm5.evals.needles import NeedleConfig, needles_of, write_needles
from glm5.evals.skills import SkillsConfig, evaluate_skills, write_skills
from glm5.files import write_json
from glm5.rl.config import RLRunConfig
from glm5.rl.orchestrator import train_rl
from glm5.text import Tokenizer
from glm5.train import RunDirectory, SFTConfig
from glm5.train.indexer_recall import measure_indexer_recall
from glm5.train.job import perform
from glm5.train.recorded import plain
from glm5.train.stages import AnyConfig, job_of, shortened

COMPARED = "def forward(self, input): returns the sum of all elements in the tensor. " * 8
"""Text on which our logits and those of transformers are compared."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Asynchronous reinforcement learning after the supervised stages."""

    config: RLRunConfig
    environments: Callable[[Layout], Sequence[Environment]]
    """Made when the stage begins: they may ask about what the recipe has built."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All numbers of a run: a Python function of the output directory returns one."""

    preset: str
    data: DataPlan
    stages: dict[str, AnyConfig]
    """Directory name -> configuration, in order; each one's parent is the one before."""
    needles: NeedleConfig
    """Asked after the stages named in `needles_after`, with dense attention before `dsa1` and sparse after it."""
    needles_after: tuple[str, ...] = ("midtrain", "dsa2")
    recall_rows: int = 8
    """Held-out rows on which the indexer's recall is measured."""
    skills: SkillsConfig
    """Asked after every supervised stage."""
    policy: Policy | None = None

    def __post_init__(self) -> None:
        taught = max((phase.words for phase in self.data.curriculum), default=None)
        if taught is not None and (self.needles.words is None or self.needles.words > taught):
            raise ConfigError(
                f"needles.words is {self.needles.words}, but the curriculum teaches to look up {taught} words only; "
                f"set needles.words to {taught}, or add a phase with more words."
            )

    def with_steps(self, steps: dict[str, int]) -> Recipe:
        """The same recipe with other numbers of steps for some stages, `rl` among them."""
        stages = {name: shortened(c, steps[name]) if name in steps else c for name, c in self.stages.items()}
        policy = self.policy
        if policy is not None and "rl" in steps:
            policy = dataclasses.replace(policy, config=dataclasses.replace(policy.config, steps=steps["rl"]))
        return dataclasses.replace(self, stages=stages, policy=policy)


def run_recipe(recipe: Recipe, out: Path, *, resume: bool, console: Console) -> dict[str, Any]:
    """Runs or skips every stage; gives the summary, which is also in `out/summary.json` beside `out/report.html`."""
    if out.exists() and any(out.iterdir()) and not resume:
        raise RunError(f"{out} already holds a run; go on with --resume, or choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    summary = Chain(recipe, out, console).run()
    summary["seconds_of_this_session"] = round(time.perf_counter() - started, 1)
    write_json(out / "summary.json", {"kind": "recipe", **summary})
    write_page(out, summary)
    return summary


class Chain:
    """The stages in order, and what is measured after each."""

    def __init__(self, recipe: Recipe, out: Path, console: Console) -> None:
        self.recipe, self.console, self.layout = recipe, console, Layout(out)

    def run(self) -> dict[str, Any]:
        """Does or skips everything; gives the summary."""
        self.heading("text, world, tokenizer")
        summary: dict[str, Any] = {
            "preset": self.recipe.preset,
            "data": build_all(self.recipe.data, self.layout, self.console),
            "stages": {},
        }
        for name, config in self.recipe.stages.items():
            self.heading(name)
            done = perform(job_of(config), console=self.console, **self.where(name))
            summary["stages"][name] = self.bits_per_byte(done) | self.measured(name)
        if self.recipe.policy is not None:
            summary["rl"] = self.rl(self.recipe.policy)
        return summary

    def heading(self, text: str) -> None:
        self.console.rule(f"[bold]{text}", align="left")

    def where(self, name: str) -> dict[str, Any]:
        """What every stage's call takes: its directory, and whether to go on."""
        path = self.layout.stage(name)
        return {"run_directory": path, "resume": (path / "run.json").exists()}

    # ---- what is measured ---------------------------------------------------------------------------------------
    def bits_per_byte(self, done: RunDirectory) -> dict[str, Any]:
        """The evaluation that the stage itself wrote, shown with its last samples."""
        file = done.path / "evaluation.json"
        if not file.exists():
            return {}
        found = json.loads(file.read_text(encoding="utf-8"))
        length = found["row_length"]
        self.console.print(f"  held-out text: {found['heldout']['bits_per_byte']:.3f} bits per byte, rows of {length}")
        for name, value in found["sanity_lines"].items():
            self.console.print(f"  {name}: {value:.3f}", style="dim")
        samples = sorted((done.path / "samples").glob("*.txt"))
        if samples:
            self.console.print(samples[-1].read_text(encoding="utf-8"), style="italic", markup=False, highlight=False)
        return {
            "bits_per_byte": found["heldout"]["bits_per_byte"],
            "row_length": length,
            "sanity_lines": found["sanity_lines"],
        }

    def measured(self, name: str) -> dict[str, Any]:
        """What the recipe measures after this stage; kept in the stage's directory, so that it is measured once."""
        file = self.layout.stage(name) / "measured.json"
        asked = (self.recipe.needles, self.recipe.needles_after, self.recipe.recall_rows, self.recipe.skills)
        settings = plain(asked)
        if file.exists():
            old: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if old.pop("settings", None) == settings:
                return old
        found: dict[str, Any] = {}
        if name == "pretrain":
            found["transformers"] = self.compare_with_transformers()
        if name in self.recipe.needles_after:
            found["needles"] = self.needles(name)
        if name in ("dsa1", "dsa2"):
            found["indexer_recall"] = self.indexer_recall(name)
        if isinstance(self.recipe.stages[name], SFTConfig):
            found["skills"] = self.skills(name)
        write_json(file, {"settings": settings, **found})
        return found

    def compare_with_transformers(self) -> dict[str, Any] | None:
        """The saved directory, read by our loader and by transformers: largest relative difference of logits."""
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
            from transformers.utils import logging
        except ImportError:
            self.console.print("  transformers is not installed, so the saved model is not compared with it")
            return None
        logging.set_verbosity_error()
        directory = self.layout.model("pretrain")
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        ids = torch.tensor([AutoTokenizer.from_pretrained(directory)(COMPARED).input_ids])
        with torch.no_grad():
            expected = theirs(ids).logits
            ours = load_model(directory, dtype=torch.float32)(ids).logits
        difference = float((ours - expected).abs().max() / expected.abs().max())
        self.console.print(f"  transformers reads it too: logits agree to {difference:.1e} over {ids.numel()} tokens")
        return {"relative_difference": difference, "tokens": ids.numel()}

    def needles(self, name: str) -> dict[str, Any]:
        """Single needles in held-out text, by length."""
        stages = list(self.recipe.stages)
        sparse = "dsa1" in stages and stages.index(name) >= stages.index("dsa1")
        config = dataclasses.replace(self.recipe.needles, attention="sparse" if sparse else "dense")
        result = needles_of(self.layout.model(name), self.layout.heldout, config)
        write_needles(self.layout.stage(name) / "needles", result)
        for length in config.lengths:
            found = f"needles in {length:,} tokens, {config.attention} attention: {result.accuracy(length)}"
            self.console.print(f"  {found}", highlight=False)
        return {"attention": config.attention, "lengths": result.to_json()["lengths"]}

    def indexer_recall(self, name: str) -> dict[str, Any]:
        """Attention mass of the selected keys over that of the true top-k."""
        directory = self.layout.model(name)
        heldout = open_dataset(self.layout.heldout, Tokenizer.from_pretrained(directory))
        model = load_model(directory, dtype=torch.float32)
        found = measure_indexer_recall(model, heldout, rows=self.recipe.recall_rows)
        self.console.print(f"  indexer: {found.mass:.1%} of the attention mass of the true top {found.index_topk} "
                           f"over {found.length} tokens (worst layer {found.worst_mass:.1%})")  # fmt: skip
        return {"length": found.length, "mass": found.mass, "worst_mass": found.worst_mass}

    def skills(self, name: str) -> dict[str, Any]:
        """Facts in wordings never trained on, unseen sums, tool calls, stopping, abstention."""
        engine = Engine(self.layout.model(name), dtype=torch.float32)
        result, records = evaluate_skills(engine, open_world(self.layout.world), self.recipe.skills)
        write_skills(self.layout.stage(name) / "skills", result, records)
        for skill in result.skills:
            bar = "" if skill.bar is None else f"  (bar {skill.bar:.0%}: {'met' if skill.met else 'MISSED'})"
            self.console.print(f"  {skill.name}: {skill.share}{bar}", highlight=False)
        return result.to_json()

    # ---- reinforcement learning -----------------------------------------------------------------------------------
    def rl(self, policy: Policy) -> dict[str, Any]:
        """Rollouts and learning side by side; mean reward in every environment, at the beginning and at the end."""
        environments = policy.environments(self.layout)
        self.heading("rl: " + ", ".join(environment.name for environment in environments))
        done = train_rl(policy.config, environments, console=self.console, **self.where("rl"))
        lines = done.read("metrics")
        part = max(1, len(lines) // 3)
        rewards = {}
        for name in sorted({name for line in lines for name in line["rewards"]}):
            first, last = (mean_of(lines[some], name) for some in (slice(None, part), slice(-part, None)))
            self.console.print(f"  {name}: mean reward {first:.3f} in the first {part} steps, {last:.3f} in the last",
                               highlight=False)  # fmt: skip
            rewards[name] = {"first_third": first, "last_third": last}
        oldest = max((line["max_staleness"] for line in lines), default=0)
        self.console.print(f"  {len(lines)} steps; no token that was learnt from was older than {oldest} versions")
        return {"steps": len(lines), "rewards": rewards, "max_staleness": oldest}


def mean_of(lines: Sequence[dict[str, Any]], environment: str) -> float:
    """Mean reward over the steps in which the environment had one."""
    found = [line["rewards"][environment] for line in lines if environment in line["rewards"]]
    return sum(found) / len(found) if found else 0.0
