"""The whole chain on a tiny model: every stage runs, an interrupted run goes on to the same bits, pages are whole."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config

from glm5.cli.main import main
from glm5.cli.quickstart import quick_recipe
from glm5.cli.recipe_data import Layout
from glm5.config import PRESETS
from glm5.data.sources import installed_sources
from glm5.errors import ConfigError
from glm5.text import SPECIAL_TOKENS

STEPS = {"pretrain": 4, "midtrain": 3, "dsa1": 2, "dsa2": 2, "sft": 2, "rl": 2}


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
    """Little text and a tiny model, so that the chain takes seconds."""
    sources = tuple(s for s in installed_sources() if s.name in ("python-reference", "numpy"))
    monkeypatch.setattr("glm5.data.corpus.installed_sources", lambda: sources)
    monkeypatch.setattr("glm5.cli.quickstart.CONVERSATIONS", 200)
    config = tiny_config(
        vocab_size=1536, pad_token_id=0, eos_token_id=tuple(SPECIAL_TOKENS.index(t) for t in TURN_ENDS)
    )
    monkeypatch.setitem(PRESETS, "tiny", lambda: config)


TURN_ENDS = ("<|endoftext|>", "<|user|>", "<|observation|>")


def quickstart(out, *more: str) -> int:
    steps = [text for stage, count in STEPS.items() for text in (f"--{stage}-steps", str(count))]
    return main(["quickstart", "--out", str(out), "--preset", "tiny", "--questions", "2", *steps, *more])


def weights(out) -> dict[str, torch.Tensor]:
    """After the last stage whose steps do not hang on who is first in real time."""
    return {k: v for file in sorted((out / "sft/model").glob("*.safetensors")) for k, v in load_file(file).items()}


def test_the_chain_runs_resumes_and_reports(tmp_path, capsys, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert quickstart(whole, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    stages = summary["stages"]
    assert stages["pretrain"]["transformers"]["relative_difference"] < 1e-4
    assert set(stages["pretrain"]["sanity_lines"]) >= {"zlib"}
    assert stages["midtrain"]["needles"]["attention"] == "dense"
    assert 0 < stages["dsa2"]["indexer_recall"]["mass"] <= 1
    assert {skill["name"] for skill in stages["sft"]["skills"]["skills"]} >= {"stops by itself", "sums, unseen numbers"}
    assert summary["rl"]["steps"] == STEPS["rl"]
    assert len(summary["rl"]["rewards"]) == 2 and summary["rl"]["max_staleness"] <= 2
    page = (whole / "report.html").read_text()
    for stage in STEPS:
        assert (whole / stage / "report.html").is_file()
        assert f'href="{stage}/report.html"' in page
    assert page.count("<svg") == len(STEPS)
    assert "http" not in page

    # Ctrl-C inside the pre-training, again inside mid-training, then to the end.
    for count, stage in ((2, "pretrain"), (4, "midtrain")):
        take_a_step_and_interrupt(monkeypatch, count)
        assert quickstart(cut, "--resume") == 130
        error = capsys.readouterr().err
        assert f"of {stage}; all is saved" in error
        assert "--resume" in error
    assert quickstart(cut, "--resume") == 0
    expected, found = weights(whole), weights(cut)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert (whole / "sft/metrics.jsonl").read_bytes() == (cut / "sft/metrics.jsonl").read_bytes()


def take_a_step_and_interrupt(monkeypatch, count: int) -> None:
    """Sends this process the signal of Ctrl-C while training step `count` of any stage runs."""
    seen = []
    clip = torch.nn.utils.clip_grad_norm_

    def interrupting(*arguments, **named):
        seen.append(1)
        if len(seen) == count:
            os.kill(os.getpid(), signal.SIGINT)
        return clip(*arguments, **named)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupting)


def test_a_taken_directory_is_refused(tmp_path, capsys):
    (tmp_path / "something").write_text("kept")
    assert quickstart(tmp_path) == 1
    assert "go on with --resume, or choose another --out" in capsys.readouterr().err
    assert (tmp_path / "something").read_text() == "kept"


def test_needles_over_words_that_no_phase_teaches_are_refused(tmp_path):
    recipe = quick_recipe(tmp_path)
    assert recipe.needles.words == max(phase.words for phase in recipe.data.curriculum)
    for words in (128, None):
        with pytest.raises(ConfigError, match="teaches to look up 32 words only"):
            dataclasses.replace(recipe, needles=dataclasses.replace(recipe.needles, words=words))


def test_the_indexer_is_taught_on_lookups_too(tmp_path):
    recipe = quick_recipe(tmp_path)
    paths = {share.path for share in recipe.stages["dsa1"].train_data if share.weight >= 0.5}
    assert Layout(tmp_path).long(recipe.data.curriculum[-1].name) in paths
