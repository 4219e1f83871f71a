"""`glm5 eval RUN --suite skills --world WORLD`: facts, sums, tool calls, ignorance and endings, with their bars."""

from __future__ import annotations

import json as json_text
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from glm5.data.world_text import open_world
from glm5.engine import Engine
from glm5.errors import InputError
from glm5.evals.skills import SkillsConfig, SkillsResult, evaluate_skills, write_skills


def run(model: Path, world: Path | None, config: SkillsConfig, *, out: Path | None, json: bool) -> int:
    """Prints one line per skill; the status is 1 when a bar is missed."""
    if world is None:
        raise InputError("The skills are asked about a world; give the directory of `glm5 data world` as --world.")
    result, records = evaluate_skills(Engine(model, dtype=torch.float32), open_world(world), config)
    if out is not None:
        write_skills(out, result, records)
    if json:
        print(json_text.dumps(result.to_json()))
    else:
        Console().print(skills_table(result))
    return 0 if result.met else 1


def skills_table(result: SkillsResult) -> Table:
    """One line per skill with its interval, and its bar where there is one."""
    table = Table(title="skills on what was never trained")
    for head in ("", "right", "share", "95% interval", "bar"):
        table.add_column(head, justify="left" if not head else "right")
    for skill in result.skills:
        share = skill.share
        bar = "" if skill.bar is None else f"{skill.bar:.0%} {'met' if skill.met else 'missed'}"
        interval = f"{share.low:.1%} to {share.high:.1%}"
        table.add_row(skill.name, f"{share.correct}/{share.total}", f"{share.value:.1%}", interval, bar)
    table.add_row("facts, best constant answer", "", f"{result.best_constant:.1%}", "", "")
    return table
