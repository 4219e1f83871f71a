"""The page of a whole run: what every stage reached, with links to the stages' own pages. Opens from disk."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from glm5.files import replacing
from glm5.rl.report import reward_figure
from glm5.train import RunDirectory
from glm5.train.report import STYLE, loss_figure

Rows = list[tuple[str, str]]


def write_page(out: Path, summary: dict[str, Any]) -> Path:
    """Writes `out/report.html` from the summary and the run directories; gives its path."""
    sources = [
        (f"{s['name']} ({s['package']} {s['version']}, {s['licence']})", f"{s['bytes'] / 1e6:.2f} MB")
        for s in summary["data"]["sources"]
    ]
    sizes = [(name, f"{size['tokens']:,} tokens") for name, size in summary["data"]["sizes"].items()]
    parts = [f"<h1>glm5: {html.escape(summary['preset'])}</h1>", "<h2>Text</h2>", _table(sources), _table(sizes)]
    for name, found in summary["stages"].items():
        parts.append(f'<h2><a href="{html.escape(name)}/report.html">{html.escape(name)}</a></h2>')
        parts.append(loss_figure(RunDirectory.open(out / name).read("metrics")))
        parts.append(_table(stage_rows(found)))
    if "rl" in summary:
        parts.append('<h2><a href="rl/report.html">rl</a></h2>')
        parts.append(reward_figure(RunDirectory.open(out / "rl").read("metrics")))
    parts.append(f"<p class=faint>{summary['seconds_of_this_session']:,} seconds in the last session.</p>")
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>glm5 {html.escape(summary['preset'])}</title><style>{STYLE}</style><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    path = out / "report.html"
    with replacing(path) as file:
        file.write(page.encode())
    return path


def stage_rows(found: dict[str, Any]) -> Rows:
    """What was measured after one stage, as lines of a table."""
    rows: Rows = []
    if "bits_per_byte" in found:
        rows.append((f"bits per byte of held-out text, rows of {found['row_length']}", f"{found['bits_per_byte']:.3f}"))
        rows += [(name, f"{value:.3f}") for name, value in found["sanity_lines"].items()]
    if found.get("transformers"):
        parity = found["transformers"]
        label = f"largest relative difference to transformers' logits over {parity['tokens']} tokens"
        rows.append((label, f"{parity['relative_difference']:.1e}"))
    if "needles" in found:
        attention = found["needles"]["attention"]
        for length, part in found["needles"]["lengths"].items():
            rows.append((f"needles in {int(length):,} tokens, {attention} attention", _share(part)))
    if "indexer_recall" in found:
        recall = found["indexer_recall"]
        rows.append((f"attention mass of the true top-k that the indexer finds, {recall['length']} tokens",
                     f"{recall['mass']:.1%}"))  # fmt: skip
    for skill in found.get("skills", {}).get("skills", []):
        bar = "" if skill["bar"] is None else f", asked for {skill['bar']:.0%}"
        rows.append((skill["name"] + bar, _share(skill)))
    return rows


def _share(part: dict[str, Any]) -> str:
    if part["value"] is None:
        return "not asked"
    return f"{part['value']:.1%} ({part['low']:.1%} to {part['high']:.1%})"


def _table(rows: Rows) -> str:
    cells = "".join(f"<tr><td>{html.escape(name)}</td><td class=number>{value}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"
