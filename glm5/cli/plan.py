"""`glm5 plan`: what a model takes, whether it fits, how fast it runs, what a token costs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from glm5.config import PRESETS, ModelConfig
from glm5.config.glm47 import GLM47Config
from glm5.errors import ConfigError, InputError, did_you_mean
from glm5.planner import (
    HostTrainingMemory,
    Serving,
    TrainingMemory,
    TrainingPlan,
    hardware_from,
    host_training_memory,
    plain,
    plan_serving,
    print_formulas,
    print_serving,
    print_training,
    shape_of,
    training_memory,
)

GLM47 = "glm-4.7"


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Plan the serving (or, with --train, the training) of a model on given machines."""

    model: Annotated[str, tyro.conf.Positional] = "glm-5"
    """A preset (glm-5, glm-5.1, glm-5.2, glm-4.7, nano, micro, mini) or a directory with a config.json."""
    dtype: str = "fp8"
    """Weights: bf16, fp8 or int4."""
    cache_dtype: str = "bf16"
    """Cache: bf16 or fp8."""
    context: int = 32_768
    """Tokens per request in the cache, and the length of the prompt for prefill."""
    concurrency: int = 1
    """Requests at a time."""
    hardware: str = "H200x8"
    """Such as H100x8, MI300Xx8, MacStudioM3Ultra, or a .json file with the fields of a device."""
    price_per_device_hour: float | None = None
    """Dollars; the table's assumption when left out."""
    tensor: int = 0
    """Devices per attention replica; 0 chooses the fastest that fits."""
    expert: int = 0
    """Groups of devices over which routed experts are cut; 0 chooses the largest that divides."""
    mtp: bool = True
    """Keep the MTP layer in memory."""
    drafts: int = 0
    """Speculative tokens per step."""
    accept_length: float | None = None
    """Tokens per step on average; needed with --drafts (public servers report 1.6 to 3.5 with 3 drafts)."""
    chunk: int = 8192
    """Prompt tokens per prefill step; smaller ones need less workspace."""
    train: bool = False
    """Plan training memory instead, under --parallel."""
    parallel: TrainingPlan = field(default_factory=TrainingPlan)
    """The parallel plan for --train."""
    explain: bool = False
    """Show the formula and the numbers behind every value."""
    json: bool = False
    """Print one JSON object."""


def run(options: PlanOptions) -> int:
    """Prints the plan. Returns 0 when it fits (or runs from disk), 1 when it does not."""
    config = _config(options.model)
    hardware = hardware_from(options.hardware)
    console = Console()
    if options.train:
        if isinstance(config, GLM47Config):
            raise InputError(f"{GLM47} is described for comparison only; plan training for a GLM-5 preset.")
        result: TrainingMemory | HostTrainingMemory
        if options.parallel.precision == "fp32":
            result = host_training_memory(config, options.parallel, hardware)
        else:
            result = training_memory(config, options.parallel, hardware)
        if options.json:
            print(json.dumps({"model": options.model, "fits": result.fits, **plain(result)}, indent=2))
        elif options.explain:
            print_formulas(result, console)
        else:
            print_training(options.model, result, console)
        return 0 if result.fits else 1

    if options.drafts and options.accept_length is None:
        raise InputError("drafts needs an accept_length: the tokens that a step yields on average, such as 2.5.")
    mtp = options.mtp and config.num_nextn_predict_layers > 0
    serving = Serving(
        dtype=options.dtype, cache_dtype=options.cache_dtype, context=options.context, concurrency=options.concurrency,
        mtp=mtp, drafts=options.drafts, accept_length=options.accept_length or 1.0, chunk=options.chunk,
    )  # fmt: skip
    plan = plan_serving(
        shape_of(config, options.model), serving, hardware, tensor=options.tensor, expert=options.expert,
        price=options.price_per_device_hour,
    )  # fmt: skip
    if options.json:
        fits = {"fits": plan.estimate.memory.fits, "streams": plan.estimate.memory.streams}
        print(json.dumps(fits | plain(plan), indent=2))
    elif options.explain:
        print_formulas(plan, console)
    else:
        print_serving(plan, console)
    return 0 if plan.estimate.runs else 1


def _config(name: str) -> ModelConfig | GLM47Config:
    """A preset, or the config.json of a directory."""
    if name == GLM47:
        return GLM47Config()
    if name in PRESETS:
        return ModelConfig.from_preset(name)
    if Path(name).is_dir() or "/" in name:
        return ModelConfig.from_pretrained(name)
    known = [*PRESETS, GLM47]
    raise ConfigError(
        f"There is no preset or directory {name!r}; known presets: {', '.join(known)}.{did_you_mean(name, known)}"
    )


if __name__ == "__main__":
    raise SystemExit(run(tyro.cli(PlanOptions)))
