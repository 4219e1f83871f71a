"""A scaling study: loss against compute over a family of sizes, and a prediction of the next one.

    python -m recipes.scaling --out docs/results/scaling          # writes .md and .svg; about 10 minutes of one core
    python -m recipes.scaling --ratio 2                           # ten times the tokens, for a night

Four members of `nano`'s family (widths 32 to 96, every other width in nano's proportions) are pre-trained by the
ordinary stage, each on `ratio` tokens per active weight, with one learning rate. Compute is C = 6 x active weights x
tokens (the output head counts, the input embedding does not). A power law, bits per byte = a C^-b, is fitted by least
squares of the logarithms; it predicts `nano`, which is then trained on its share of tokens and compared. The interval
is that of a new observation of the regression (95%, Student's t with two degrees of freedom, so it is wide).

Left out: an irreducible loss (three parameters need more than four points), a search for each size's best rate.
Kaplan et al. 2020 (arXiv 2001.08361); Hoffmann et al. 2022 (arXiv 2203.15556).
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from glm5.cli.threads import use_threads
from glm5.config import ModelConfig
from glm5.errors import ConfigError
from glm5.files import write_json
from glm5.optim import OptimizerConfig, Schedule
from glm5.train import PretrainConfig, pretrain
from glm5.train.loop import LoopConfig
from recipes.text import quickstart_text

ROWS, LENGTH = 4, 256
SIZES = ((32, 2), (48, 2), (64, 3), (96, 3), (128, 4))
"""(width, layers) of the family; the last is `nano` itself, which is predicted."""
STUDENT_T = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776}
"""97.5% quantiles by degrees of freedom."""


@dataclass
class Options:
    """Options of the study."""

    ratio: float = 0.2
    """Tokens per active weight."""
    rate: float = 8e-3
    """Peak rate of Muon, for every size: its update has the same size whatever the width."""
    sizes: int = len(SIZES)
    """Members of the family, the last of which is predicted."""
    seed: int = 0
    threads: int = 1
    work: Path = Path("runs/scaling")
    """Corpus, tokenizer and one run directory per size; finished runs are not done again."""
    out: Path | None = None
    """Write OUT.md and OUT.svg."""


@dataclass(frozen=True)
class Point:
    """One trained size."""

    width: int
    layers: int
    active: int
    tokens: int
    bits_per_byte: float
    seconds: float
    """Of the processor, for training and evaluation."""

    @property
    def compute(self) -> float:
        """Operations: 6 x active weights x tokens."""
        return 6.0 * self.active * self.tokens


@dataclass(frozen=True)
class PowerLaw:
    """bits per byte = exp(intercept) * compute ** slope, with what its prediction intervals need."""

    intercept: float
    slope: float
    residual: float
    """Standard deviation of the logarithms around the line."""
    centre: float
    width: float
    """Mean of log compute, and the sum of squares around it."""
    points: int

    def predict(self, compute: float) -> tuple[float, float, float]:
        """(lower end, prediction, upper end) of a new observation, 95%."""
        x = math.log(compute)
        middle = self.intercept + self.slope * x
        error = self.residual * math.sqrt(1 + 1 / self.points + (x - self.centre) ** 2 / self.width)
        reach = STUDENT_T.get(self.points - 2, 2.6) * error
        return math.exp(middle - reach), math.exp(middle), math.exp(middle + reach)


def fit(points: Sequence[Point]) -> PowerLaw:
    """Least squares of log bits per byte on log compute; needs at least three points."""
    xs, ys = [math.log(p.compute) for p in points], [math.log(p.bits_per_byte) for p in points]
    centre, mean = sum(xs) / len(xs), sum(ys) / len(ys)
    width = sum((x - centre) ** 2 for x in xs)
    slope = sum((x - centre) * (y - mean) for x, y in zip(xs, ys, strict=True)) / width
    intercept = mean - slope * centre
    squares = sum((y - intercept - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    return PowerLaw(intercept, slope, math.sqrt(squares / (len(xs) - 2)), centre, width, len(xs))


def member(width: int, layers: int) -> ModelConfig:
    """`nano` at another width and depth, in the same proportions; no MTP module."""
    return dataclasses.replace(
        ModelConfig.from_preset("nano"), hidden_size=width, num_hidden_layers=layers, mlp_layer_types=(),
        indexer_types=(), num_attention_heads=max(1, width // 32), num_key_value_heads=0, q_lora_rank=width * 3 // 4,
        kv_lora_rank=width // 2, intermediate_size=3 * width, moe_intermediate_size=width * 3 // 4,
        num_nextn_predict_layers=0,
    )  # fmt: skip


def train_member(width: int, layers: int, options: Options) -> Point:
    """Pre-trains one size (or reads its finished run)."""
    config = member(width, layers)
    active = config.num_parameters(active=True)
    steps = max(4, round(options.ratio * active / (ROWS * LENGTH)))
    directory = options.work / f"width-{width}-steps-{steps}-rate-{options.rate:g}-seed-{options.seed}"
    note = directory / "point.json"
    if not note.exists():
        loop = LoopConfig(
            steps=steps,
            seed=options.seed,
            optimizer=OptimizerConfig(lr=options.rate, embedding_lr_scale=6.0),
            schedule=Schedule(shape="cosine", warmup_steps=min(20, steps // 5), final_fraction=0.1),
            spike_factor=None,
            checkpoint_every=max(steps, 1),
        )
        stage = PretrainConfig(
            model=config, tokenizer=options.work / "tokenizer", train_data=options.work / "train",
            heldout_data=options.work / "heldout", rows=ROWS, length=LENGTH, mtp_weight=0.0, mtp_steps=0, prompts=(),
            loop=loop,
        )  # fmt: skip
        started = time.process_time()
        run = pretrain(stage, directory, resume=(directory / "run.json").exists())
        found = json.loads((run.path / "evaluation.json").read_text(encoding="utf-8"))["heldout"]["bits_per_byte"]
        point = Point(width, layers, active, steps * ROWS * LENGTH, found, time.process_time() - started)
        write_json(note, dataclasses.asdict(point))
    return Point(**json.loads(note.read_text(encoding="utf-8")))


# ---- what is shown --------------------------------------------------------------------------------------------------
def table(points: Sequence[Point], law: PowerLaw) -> str:
    """Markdown: every size, what the law says of it, and the prediction of the last."""
    header = ["width x layers", "active weights", "tokens", "compute", "bits per byte", "the law says", "difference"]
    lines = ["| " + " | ".join(cells) + " |" for cells in ([*header, "CPU s"], ["---"] * 8)]
    for point in points:
        low, middle, high = law.predict(point.compute)
        said = f"{middle:.3f}" if point is not points[-1] else f"**{middle:.3f}** ({low:.3f} to {high:.3f}), predicted"
        lines.append(
            f"| {point.width} x {point.layers} | {point.active:,} | {point.tokens:,} | {point.compute:.2e} | "
            f"{point.bits_per_byte:.3f} | {said} | {point.bits_per_byte / middle - 1:+.1%} | {point.seconds:.0f} |"
        )
    return "\n".join(lines)


def svg(points: Sequence[Point], law: PowerLaw) -> str:
    """The study as a picture with logarithmic axes, without outside resources."""
    wide, tall, edge = 640, 400, 60
    xs = [math.log10(p.compute) for p in points]
    lows, _, highs = zip(*(law.predict(p.compute) for p in points), strict=True)
    ys = [
        math.log10(y)
        for y in (*lows[:-1], *highs[:-1], *(p.bits_per_byte for p in points), law.predict(points[-1].compute)[1])
    ]
    left, right, bottom, top = min(xs) - 0.1, max(xs) + 0.1, min(ys) - 0.01, max(ys) + 0.01

    def at(compute: float, bits: float) -> tuple[float, float]:
        x = edge + (math.log10(compute) - left) / (right - left) * (wide - 2 * edge)
        return x, tall - edge - (math.log10(bits) - bottom) / (top - bottom) * (tall - 2 * edge)

    ends = [at(10**x, law.predict(10**x)[1]) for x in (left, right)]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" font-family="sans-serif" '
             f'font-size="12"><rect width="{wide}" height="{tall}" fill="white"/>',
             f'<path d="M{ends[0][0]:.1f} {ends[0][1]:.1f}L{ends[1][0]:.1f} {ends[1][1]:.1f}" stroke="#888" '
             'stroke-dasharray="5 4"/>',
             f'<path d="M{edge} {edge}V{tall - edge}H{wide - edge}" fill="none" stroke="black"/>']  # fmt: skip
    for point in points:
        x, y = at(point.compute, point.bits_per_byte)
        colour = "#c33" if point is points[-1] else "#246"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/><text x="{x + 8:.1f}" y="{y - 6:.1f}">'
                     f"{point.width} x {point.layers}: {point.bits_per_byte:.3f}</text>")  # fmt: skip
        parts.append(f'<text x="{x:.1f}" y="{tall - edge + 18}" text-anchor="middle">{point.compute:.1e}</text>')
    parts.append(
        f'<text x="{wide / 2}" y="{tall - 12}" text-anchor="middle">compute, 6 x active weights x tokens</text>'
    )
    parts.append(f'<text x="16" y="{edge - 20}">held-out bits per byte; dashed: {math.exp(law.intercept):.3g} x '
                 f"C^{law.slope:.4f}; red: predicted, then trained</text></svg>")  # fmt: skip
    return "\n".join(parts) + "\n"


def study(options: Options) -> tuple[list[Point], PowerLaw]:
    """All sizes, and the law fitted to all but the last."""
    if not 4 <= options.sizes <= len(SIZES):
        raise ConfigError(f"sizes is {options.sizes}; a law needs between 4 and {len(SIZES)}.")
    quickstart_text(options.work)
    points = [train_member(width, layers, options) for width, layers in SIZES[-options.sizes :]]
    return points, fit(points[:-1])


def main() -> None:
    options = tyro.cli(Options)
    use_threads(options.threads)
    points, law = study(options)
    text = table(points, law)
    equation = f"bits per byte = {math.exp(law.intercept):.4g} x C^{law.slope:.4f}"
    print(text, equation, sep="\n\n")
    if options.out is not None:
        options.out.with_suffix(".svg").write_text(svg(points, law), encoding="utf-8")
        command = (
            f"python -m recipes.scaling --ratio {options.ratio:g} --rate {options.rate:g} --sizes {options.sizes} "
            f"--seed {options.seed}"
        )
        picture = f"![loss against compute]({options.out.with_suffix('.svg').name})"
        parts = [
            "# Loss against compute",
            f"`{command}`",
            ABOUT,
            f"Fitted to all but the last: {equation}.",
            text,
            picture,
        ]
        page = "\n\n".join(parts) + "\n"
        options.out.with_suffix(".md").write_text(page, encoding="utf-8")


ABOUT = (
    "Members of `nano`'s family, one seed each, pre-trained by the ordinary stage (dense attention, Muon Split, no\n"
    "MTP). Compute is 6 x active weights x tokens. The last row was not used in the fit: the law predicts it (95%\n"
    "interval of a new observation), then it is trained."
)


if __name__ == "__main__":
    main()
