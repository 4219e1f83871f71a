"""The page of a quickstart: what every stage reached, with links to the stages' own pages. Opens from disk."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from glm5.files import replacing
from glm5.rl.report import reward_figure
from glm5.train import RunDirectory
from glm5.train.report import STYLE, loss_figure


def write_page(out: Path, summary: dict[str, Any]) -> Path:
    """Writes `out/report.html` from the summary and the run directories; gives its path."""
    pretraining = RunDirectory.open(out / "pretrain").read("metrics")
    rewards = RunDirectory.open(out / "rl").read("metrics")
    parts = [
        f"<h1>glm5 quickstart: {html.escape(summary['preset'])}, {summary['parameters']:,} weights</h1>",
        "<h2>Text</h2>",
        _table([(f"{s['name']} ({s['package']} {s['version']}, {s['licence']})", f"{s['bytes'] / 1e6:.2f} MB")
                for s in summary["corpus"]["sources"]]),
        '<h2><a href="pretrain/report.html">Pre-training</a></h2>',
        loss_figure(pretraining),
        _table(_bits_per_byte("this model", summary["pretrain"]) + _parity(summary["transformers"])),
        '<h2><a href="dsa/report.html">Sparse attention: the indexer learns</a></h2>',
        _table(_bits_per_byte("sparse attention, indexer trained", summary["dsa"])),
        '<h2><a href="sft/report.html">Supervised fine-tuning</a></h2>',
        _table(_accuracies(summary["evaluation_after_sft"])),
        '<h2><a href="rl/report.html">Policy gradients</a></h2>',
        reward_figure(rewards),
        _table(_accuracies(summary["evaluation_after_rl"])),
        f"<p class=faint>{summary['seconds_of_this_session']:,} seconds in the last session.</p>",
    ]  # fmt: skip
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>glm5 quickstart</title><style>{STYLE}</style><body>" + "\n".join(parts) + "</body></html>\n"
    )
    path = out / "report.html"
    with replacing(path) as file:
        file.write(page.encode())
    return path


def _table(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{html.escape(name)}</td><td class=number>{value}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _bits_per_byte(name: str, found: dict[str, Any]) -> list[tuple[str, str]]:
    values = {f"{name}, bits per byte of held-out text": found["bits_per_byte"], **found["sanity_lines"]}
    return [(label, f"{value:.3f}") for label, value in values.items()]


def _parity(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    label = f"largest relative difference to transformers' logits over {found['tokens']} tokens"
    return [(label, f"{found['relative_difference']:.1e}")]


def _accuracies(found: dict[str, dict[str, float]]) -> list[tuple[str, str]]:
    names = {"train": "problems of the training split", "heldout": "problems never trained on"}
    return [
        (f"{names[split]}, right answers", f"{part['accuracy']:.1%} ({part['low']:.1%} to {part['high']:.1%})")
        for split, part in found.items()
    ]
