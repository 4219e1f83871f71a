"""`glm5 train STAGE`: one stage of the recipe; and `glm5 train --out RUN ...` for a run that exists.

    glm5 train pretrain --model nano --tokenizer T --train-data D:0.8 L:0.2 --heldout-data H --out runs/pretrain
    glm5 train midtrain --parent runs/pretrain --train-data D --phases 512:4:60 1024:2:60 --loop.steps 120 --out runs/m
    glm5 train --out runs/m --resume                       # the settings are in its run.json
    glm5 train --out runs/m --replay-step 17               # the batch as text, the numbers then and now
    torchrun --nproc-per-node 2 -m glm5 train --out runs/m --resume --parallel.data-shard 2
    glm5 train export runs/m exported --step 120           # a Hugging Face directory of a checkpoint
    glm5 train sft ... --out proofs/sft --verify-resume      # a run, and a killed and resumed one, compared

Flags are the fields of the stage's configuration; a few types have a short form (see `glm5.cli.train_flags`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from glm5.cli.threads import use_threads
from glm5.cli.train_flags import REGISTRY
from glm5.cli.train_proof import print_replay, print_verdict
from glm5.cli.train_record import in_flags
from glm5.errors import RunError
from glm5.parallel import ParallelPlan
from glm5.parallel.mesh import processes, world_rank, world_size
from glm5.train import RunDirectory, RunInterrupted
from glm5.train.export import export_checkpoint
from glm5.train.job import perform
from glm5.train.recorded import RunChanged
from glm5.train.replay import replay_step
from glm5.train.stages import CONFIGS, config_of, job_of, shortened, with_plan
from glm5.train.verify_resume import verify_resume


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What to do, beside the settings of the stage."""

    out: Path
    """The run directory."""
    resume: bool = False
    """Go on where the run stopped; settings that change what it learns must be the same."""
    verify_resume: bool = False
    """Instead of a run, prove in --out that a killed and resumed one equals an uninterrupted one, to the bit."""
    verify_steps: int = 12
    """Steps of the runs of the proof."""
    verify_kills: int = 3
    """How often the second run is killed."""
    verify_seed: int = 0
    """Decides the moments."""
    replay_step: int | None = None
    """Instead of going on, compute this step of the existing run again and print it."""
    parallel: ParallelPlan = field(default_factory=ParallelPlan)
    """How the processes that torchrun started share the work; a resumed run may have another plan."""
    threads: int | None = None
    """Processor threads; all cores when left out."""
    json: bool = False
    """Print the result as one JSON object."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write the model of a checkpoint, at any step that the run still has, as a Hugging Face directory."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run directory."""
    out: Annotated[Path, tyro.conf.Positional]
    """The model directory to write."""
    step: int | None = None
    """The checkpoint's step; the newest when left out."""


def run(arguments: Sequence[str]) -> int:
    """Parses the flags of the stage, or of an existing run, and does what they say."""
    if arguments and arguments[0] == "export":
        return export(arguments[1:])
    if arguments and not arguments[0].startswith("-"):
        options, config = parse_stage(arguments)
    elif arguments and arguments[0] not in ("-h", "--help"):
        options = tyro.cli(RunOptions, prog="glm5 train", args=arguments)
        config = config_of(RunDirectory.open(options.out))
        if not (options.resume or options.verify_resume or options.replay_step is not None):
            raise RunError(f"say what to do with {options.out}: --resume, --replay-step N or --verify-resume.")
        if options.verify_resume:
            options = dataclasses.replace(options, out=options.out.with_name(options.out.name + "-proof"))
    else:
        parse_stage(["--help"])  # prints the stages and exits
        return 0
    use_threads(options.threads)
    console = Console(stderr=options.json)
    if options.replay_step is not None:
        return print_replay(replay_step(options.out, options.replay_step), console, as_json=options.json)
    if options.verify_resume:
        short = shortened(config, options.verify_steps)
        loop = dataclasses.replace(short.loop, checkpoint_every=max(1, short.loop.steps // 4))
        verdict = verify_resume(
            dataclasses.replace(short, loop=loop), options.out, kills=options.verify_kills, seed=options.verify_seed,
            threads=torch.get_num_threads(),
        )  # fmt: skip
        return print_verdict(verdict, console, as_json=options.json)
    with processes():
        done = perform_stage(config, options, console)
        if world_rank() == 0:
            summarise(done, console, as_json=options.json)
    return 0


def perform_stage(config: Any, options: RunOptions, console: Console) -> RunDirectory:
    """The run, or the rest of it; what stops it speaks of the command line."""
    try:
        return perform(job_of(with_plan(config, options.parallel)), options.out, resume=options.resume, console=console)
    except RunChanged as error:
        raise in_flags(error, config) from None
    except RunInterrupted as error:
        if world_size() > 1:  # torchrun and the plan must be said again
            raise
        raise RunInterrupted(error.saved, f"`glm5 train --resume --out {options.out}` goes on.") from None


def export(arguments: Sequence[str]) -> int:
    """`glm5 train export RUN OUT --step N`."""
    options = tyro.cli(ExportOptions, prog="glm5 train export", args=arguments)
    step = export_checkpoint(options.run, options.out, step=options.step)
    Console().print(f"{options.out}: the model of {options.run} before step {step}", soft_wrap=True)
    return 0


def parse_stage(arguments: Sequence[str]) -> tuple[RunOptions, Any]:
    """The run options and the stage's configuration, from the stage's name and its flags."""
    tables: dict[str, Callable[..., Any]] = {name: _options(name, config) for name, config in CONFIGS.items()}
    found = tyro.extras.subcommand_cli_from_dict(
        tables, prog="glm5 train", args=list(arguments), registry=REGISTRY, config=(tyro.conf.AvoidSubcommands,)
    )  # fmt: skip
    return found.run, found.config


def _options(name: str, config: type[Any]) -> type[Any]:
    """Flags of one stage: its configuration and the run options side by side, without prefixes."""
    made = dataclasses.make_dataclass(
        f"{name}_options",
        [
            ("config", Annotated[config, tyro.conf.arg(name="")]),
            ("run", Annotated[RunOptions, tyro.conf.arg(name="")]),
        ],
        frozen=True,
    )
    made.__doc__ = (config.__doc__ or "").strip()
    return made


def summarise(run: RunDirectory, console: Console, *, as_json: bool) -> None:
    """Where the finished run is, and its last numbers."""
    last = run.read("metrics")[-1]
    values = {k: v for k, v in last.items() if isinstance(v, int | float)}
    file = run.path / "evaluation.json"
    heldout = json.loads(file.read_text(encoding="utf-8"))["heldout"]["bits_per_byte"] if file.exists() else None
    result = {"run": str(run.path), "stage": run.description["stage"], "last_step": values, "bits_per_byte": heldout}
    if as_json:
        print(json.dumps(result))
        return
    console.print(f"{result['stage']}: {run.path}, loss {values['loss']:.4f}", soft_wrap=True)
    if heldout is not None:
        console.print(f"held-out text: {heldout:.4f} bits per byte")
    console.print(f"report: {run.path / 'report.html'}", soft_wrap=True)
