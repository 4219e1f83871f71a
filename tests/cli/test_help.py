"""Every flag of every verb says what it is for."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

from glm5.cli import data, rl, rl_flags, rl_outside, rl_simulate, train, train_flags
from glm5.cli.chat import ChatOptions
from glm5.cli.convert import ConvertOptions
from glm5.cli.eval import EvalOptions
from glm5.cli.main import VERBS
from glm5.cli.plan import PlanOptions
from glm5.cli.quickstart import QuickstartOptions
from glm5.cli.report import ReportOptions
from glm5.cli.serve import ServeOptions
from glm5.train.stages import CONFIGS

FORMS: dict[str, tuple[Callable[..., Any], Any]] = {
    "quickstart": (QuickstartOptions, None),
    "plan": (PlanOptions, None),
    **{f"data {name}": (kind, None) for name, kind in data.SUBVERBS.items()},
    **{f"train {name}": (train._options(name, kind), train_flags.REGISTRY) for name, kind in CONFIGS.items()},
    "train": (train.RunOptions, None),
    "train export": (train.ExportOptions, None),
    "rl": (rl.Flags, rl_flags.REGISTRY),
    "rl --from-gateway": (rl_outside.Flags, rl_flags.REGISTRY),
    "rl --simulate": (rl_simulate.SimulateOptions, None),
    "rl --follow": (rl.FollowOptions, None),
    "eval": (EvalOptions, None),
    "serve": (ServeOptions, None),
    "chat": (ChatOptions, None),
    "convert": (ConvertOptions, None),
    "report": (ReportOptions, None),
}
"""What each form of a verb is parsed into, and the registry of its short forms."""
ADDED = re.compile(r"\((default: .*|required|optional|repeatable)\)$")
"""What tyro adds to every help."""
ROOT = Path(__file__).parents[2]
SETTING = re.compile(r"--(?:rollout|scheduler|learner|aids|held-out)\.[a-z.-]*[a-z]")
"""As the docs write them."""


def test_no_verb_is_left_out():
    assert {name.split()[0] for name in FORMS} == set(VERBS)


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of a parser and of the parsers of its choices."""
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for each in action.choices.values():
                yield from actions(each)
        else:
            yield action


def actions_of(form: str) -> Iterator[argparse.Action]:
    """All flags of a form."""
    kind, registry = FORMS[form]
    more = {} if registry is None else {"registry": registry}
    return actions(tyro.extras.get_parser(kind, config=(tyro.conf.AvoidSubcommands,), **more))


@pytest.mark.parametrize("form", FORMS)
def test_every_flag_has_help(form):
    mute = [
        "/".join(action.option_strings) or action.dest
        for action in actions_of(form)
        if not ADDED.sub("", action.help or "").strip()
    ]
    assert not mute, f"no help: {' '.join(mute)}"


def test_settings_of_a_run_that_the_docs_name_are_flags():
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    named = {flag for page in pages for flag in SETTING.findall(page.read_text(encoding="utf-8"))}
    known = {flag for action in actions_of("rl") for flag in action.option_strings}
    assert len(named) > 10 and not named - known
