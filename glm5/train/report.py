"""The report page of a run: one HTML file that opens from disk, without scripts or outside resources.

Loss curves, held-out bits per byte beside the lines that a model must beat, load of the experts, recall of the indexer,
gradient norms, speed, steps that were left out, samples and configuration. Follows the reader's light or dark setting.
"""

from __future__ import annotations

import html
import json
import statistics
from pathlib import Path
from typing import Any

from glm5.files import replacing
from glm5.train.charts import Points, heat_map, line_chart
from glm5.train.run_directory import RunDirectory

CURVES = (
    ("loss", "total loss"),
    ("lm", "next token"),
    ("mtp", "multi-token prediction"),
    ("indexer_kl", "indexer KL"),
)
MOST_LAYERS, MOST_ROWS = 8, 64
"""Heat maps of a page, and rows of one: of larger models every n-th layer, and means of neighbouring experts."""
STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --paper: #fdfdfb; --faint: #626976; --line: #e3e4e1;
        --c0: #2457d6; --c1: #0e8a5f; --c2: #c2571a; --c3: #8a3fb5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ec; --paper: #16181d; --faint: #9aa2b0; --line: #2d323b;
          --c0: #8aaaff; --c1: #4fcf9f; --c2: #f0955c; --c3: #c58af0; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 46rem; margin: 2.5rem auto 4rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; letter-spacing: -.02em; } h2 { font-size: 1.15rem; margin: 2.75rem 0 .5rem; }
a { color: var(--c0); text-underline-offset: .15em; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
td, th { text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
         overflow-wrap: anywhere; }
td.number, th.number { text-align: right; padding-right: 0; padding-left: 1rem; white-space: nowrap;
                       font-variant-numeric: tabular-nums; }
th { font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: color-mix(in srgb, var(--line) 40%, transparent);
      padding: .75rem 1rem; border-radius: .6rem; font-size: .8125rem; line-height: 1.5; }
summary { cursor: pointer; color: var(--faint); }
figure { margin: 1rem 0 1.5rem; } svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--faint); font-size: 12px; font-variant-numeric: tabular-nums; } .grid { stroke: var(--line); }
.curve { fill: none; stroke-width: 1.5; stroke-linejoin: round; } .heat { fill: var(--c0); }
figcaption, .faint { color: var(--faint); font-size: .875rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.25rem; margin: 0 0 .35rem; font-size: .875rem; font-weight: 550; }
.legend span::before { content: ""; display: inline-block; width: 1.1em; height: .2em; margin-right: .4em;
                       vertical-align: .25em; background: currentColor; border-radius: 1em; }
@media (max-width: 34rem) { svg text { font-size: 20px; } .curve { stroke-width: 2.5; }
                            td.number { white-space: normal; min-width: 5.5rem; } }
"""


def write_report(run_directory: Path) -> Path:
    """Writes `report.html` from what the run directory holds so far, and gives its path."""
    run = RunDirectory.open(run_directory)
    metrics, speed = run.read("metrics"), run.read("speed")
    evaluation_file = run.path / "evaluation.json"
    evaluation = json.loads(evaluation_file.read_text(encoding="utf-8")) if evaluation_file.exists() else {}
    samples = sorted((run.path / "samples").glob("*.txt"))
    stage = run.description["stage"]
    parts = [
        f"<h1>{html.escape(stage)}: {html.escape(run.path.name)}</h1>",
        _summary(metrics, speed),
        "<h2>Loss</h2>",
        loss_figure(metrics),
        _evaluation(evaluation, metrics),
        _recall(evaluation, metrics),
        _experts(metrics),
        "<h2>Gradient norm</h2>",
        line_chart(
            [("model", _points(metrics, "grad_norm")), ("indexers", _points(metrics, "indexer_grad_norm"))],
            label="gradient norm over steps", caption="Before clipping, over steps; logarithmic.", log=True,
        ),
        "<h2>Speed</h2>",
        line_chart(
            [("tokens per second", _points(speed, "tokens_per_second"))],
            label="tokens per second over steps", caption="Tokens per second over steps, of this machine.",
        ),
        _skipped(metrics),
        f"<h2>Samples</h2><p class=faint>{html.escape(samples[-1].name)}</p><pre>"
        f"{html.escape(samples[-1].read_text(encoding='utf-8'))}</pre>" if samples else "",
        configuration(run),
    ]  # fmt: skip
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(stage)} {html.escape(run.path.name)}</title><style>{STYLE}</style><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    path = run.path / "report.html"
    with replacing(path) as file:
        file.write(page.encode())
    return path


def _summary(metrics: list[dict[str, Any]], speed: list[dict[str, Any]]) -> str:
    if not metrics or not speed:
        return "<p>No step has been taken yet.</p>"
    losses = [line["loss"] for line in metrics if line["loss"] is not None] or [float("nan")]
    tokens = sum(line.get("tokens", 0) for line in metrics)
    seconds = sum(line["seconds"] for line in speed)
    middle = statistics.median(line["tokens_per_second"] for line in speed)
    return (
        f"<p>{len(metrics):,} steps, {tokens:,} tokens in {seconds:,.0f} seconds, {middle:,.0f} tokens per second "
        f"(median); loss {losses[0]:.3f} &rarr; {losses[-1]:.3f}.</p>"
    )


def _evaluation(evaluation: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    curve = [(int(step) + 1, value) for step, value in _points(metrics, "heldout_bits_per_byte")]
    if not evaluation and not curve:
        return ""
    rows = [(f"after step {step} (a part of the held-out text)", value) for step, value in curve]
    if evaluation:
        held = evaluation["heldout"]
        rows.append(
            (f"this model, {held['bytes']:,} bytes in rows of {evaluation['row_length']}", held["bits_per_byte"])
        )
        rows += list(evaluation["sanity_lines"].items())
    cells = "".join(f"<tr><td>{html.escape(n)}</td><td class=number>{v:.3f}</td></tr>" for n, v in rows)
    figure = line_chart(
        [("held-out text", curve)], label="bits per byte over steps", caption="Bits per byte over steps."
    )
    return f"<h2>Bits per byte of held-out text</h2>{figure if len(curve) > 1 else ''}<table>{cells}</table>"


def _recall(evaluation: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    """Attention mass of the indexer's selection against that of the true top-k."""
    curve, found = _points(metrics, "indexer_recall"), evaluation.get("indexer_recall")
    if not curve and not found:
        return ""
    caption = "Attention mass of the indexer's selection over that of the true top-k, on held-out text; 1 is perfect."
    figure = line_chart([("mean over the layers", curve)], label="recall of the indexer over steps", caption=caption)
    if not found:
        return f"<h2>Indexer recall</h2>{figure}"
    cells = "".join(
        f"<tr><td>layer {html.escape(layer)}</td><td class=number>{values['mass']:.3f}</td>"
        f"<td class=number>{values['positions']:.3f}</td></tr>"
        for layer, values in found["layers"].items()
    )
    head = "<tr><th></th><th class=number>attention mass</th><th class=number>positions</th></tr>"
    return (
        f"<h2>Indexer recall</h2>{figure if len(curve) > 1 else ''}<p class=faint>Rows of {found['length']:,} tokens, "
        f"top {found['index_topk']}; the true top-k has 1.</p><table>{head}{cells}</table>"
    )


def _experts(metrics: list[dict[str, Any]]) -> str:
    """The busiest expert as a curve, and the load of all experts as one heat map a layer."""
    noted = [line for line in metrics if line.get("expert_load")]
    busiest = _points(metrics, "busiest_expert")
    if not noted or not busiest:
        return ""
    parts = [
        "<h2>Load of the experts</h2>",
        line_chart(
            [("busiest expert", busiest)], label="load of the busiest expert over steps",
            caption="Tokens of the busiest expert of any layer over an even share; 1 is perfect balance.",
        ),
    ]  # fmt: skip
    layers = list(noted[-1]["expert_load"])
    for layer in layers[:: -(-len(layers) // MOST_LAYERS)]:
        lines = [line for line in noted if layer in line["expert_load"] and sum(line["expert_load"][layer])]
        if not lines:
            continue
        shares = []
        for line in lines:
            load = line["expert_load"][layer]
            even = sum(load) / len(load)
            size = -(-len(load) // MOST_ROWS)
            groups = [load[i : i + size] for i in range(0, len(load), size)]
            shares.append([sum(group) / len(group) / even for group in groups])
        rows = list(zip(*shares, strict=True))
        parts.append(
            heat_map(
                rows, [line["step"] for line in lines], most=3.0, label=f"load of the experts of layer {layer}",
                caption=f"Layer {html.escape(layer)}: experts from top to bottom, steps from left to right; full "
                "colour is three times an even share.",
            )
        )  # fmt: skip
    return "".join(parts)


def _skipped(metrics: list[dict[str, Any]]) -> str:
    """The steps that the guards left out."""
    rows = [(line["step"], line["skipped"]) for line in metrics if "skipped" in line]
    if not rows:
        return ""
    cells = "".join(f"<tr><td>step {step}</td><td>{html.escape(why)}</td></tr>" for step, why in rows)
    return f"<h2>Steps that were left out</h2><table>{cells}</table>"


def configuration(run: RunDirectory) -> str:
    """All that the run was made from, folded."""
    text = html.escape(json.dumps(run.description, indent=2))
    return f"<h2>Configuration</h2><details><summary>run.json</summary><pre>{text}</pre></details>"


def _points(lines: list[dict[str, Any]], key: str) -> Points:
    """(step, value) of the lines that have a number under `key`."""
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def loss_figure(metrics: list[dict[str, Any]]) -> str:
    """All loss curves that the metrics hold, on one pair of axes."""
    series = [(label, _points(metrics, key)) for key, label in CURVES]
    return line_chart(series, label="loss over steps", caption="Nats per token over steps.")
