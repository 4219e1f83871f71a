"""`glm5 rl --from-gateway` and `--from-records`: learning from agents that other people run.

    glm5 rl --from-gateway --parent runs/sft --out runs/agents --port 8000      # serves them and learns
    glm5 rl --from-gateway --parent runs/sft --out runs/agents --executor processes --engines 2
    glm5 rl --from-records used --parent runs/sft --out runs/used               # what glm5 serve --record used has kept

Environments, deterministic mode and replay of a step belong to `glm5 rl` without these flags.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from glm5.cli.rl_engines import EngineOptions
from glm5.cli.rl_record import Record, check_parent, code_of, environments, in_flags, noted, parse
from glm5.cli.threads import use_threads
from glm5.envs.protocol import UniformGroups
from glm5.errors import InputError
from glm5.rl.config import RLRunConfig
from glm5.rl.gateway import Address, train_from_gateway, train_from_records
from glm5.rl.report import REPORT, measured
from glm5.rl.view.of_run import ROLLOUTS
from glm5.serve import is_loopback
from glm5.serve.auth import check_key
from glm5.serve.host_check import OWN_NAMES
from glm5.train import RunDirectory
from glm5.train.recorded import RunChanged

KEY_VARIABLE = "GLM5_API_KEY"


@dataclass(frozen=True, kw_only=True)
class OutsideOptions:
    """Where the episodes come from, and where the run goes."""

    from_gateway: bool = False
    """Serve agents and learn from their sessions while they run."""
    from_records: Path | None = None
    """Learn from the sessions that glm5 serve --record kept in this directory."""
    out: Path
    """The run directory."""
    host: str = "127.0.0.1"
    """Address of the gateway. The default is reachable from this machine only; the key is GLM5_API_KEY."""
    allow_host: tuple[str, ...] = ()
    """More names that agents may use; on a loopback address without a key only the machine's own are answered."""
    port: int = 8000
    """Port of the gateway; 0 takes a free one, which is printed."""
    name: str = "glm5"
    """The model's name in the API."""
    held_out_env: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An environment, named as for `glm5 rl --env`, whose held-out tasks are measured on the way."""
    world: Path | None = None
    """The world that facts and lookup ask about."""
    uniform_groups: UniformGroups = "drop"
    """Whether groups whose rewards are all equal are learnt from: keep, where that is what must be seen."""
    resume: bool = False
    """Go on where the run of --out stopped, with the sessions that are open; whatever is not said again is as it
    was."""
    threads: int | None = None
    """Processor threads; all cores when left out."""
    json: bool = False
    """Print the result as one JSON object."""

    def address(self) -> Address:
        """Where agents find the gateway. Raises `InputError` for a key that no header carries."""
        key = os.environ.get(KEY_VARIABLE) or None
        closed = key is None and is_loopback(self.host)
        hosts = (*OWN_NAMES, self.host, *self.allow_host) if closed else None
        if key is not None:
            check_key(key)
        return Address(host=self.host, port=self.port, name=self.name, api_key=key, hosts=hosts)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Reinforcement learning from agents that other people run: live behind a gateway, or from recorded use."""

    config: Annotated[RLRunConfig, tyro.conf.arg(name="")]
    run: Annotated[OutsideOptions, tyro.conf.arg(name="")]
    engines: Annotated[EngineOptions, tyro.conf.arg(name="")]


def run(arguments: Sequence[str], record: Record | None) -> int:
    """Parses the flags and trains."""
    flags = parse(Flags, OutsideOptions, arguments, record)
    check_parent(flags.config, record)
    try:
        return train(flags, record, arguments)
    except RunChanged as error:
        raise error if record is None else in_flags(error, flags.config, record) from None


def train(flags: Flags, record: Record | None, arguments: Sequence[str]) -> int:
    """A run, or the rest of one."""
    options, console = flags.run, Console(stderr=flags.run.json)
    if options.from_gateway == (options.from_records is not None):
        raise InputError("Episodes come either from a gateway or from records; give one of --from-gateway, "
                         "--from-records DIR.")  # fmt: skip
    engines = flags.engines
    engines.check(resume=options.resume)
    use_threads(options.threads)
    held_out = environments(options.held_out_env, options.world, arguments, record, "heldout")
    config = replace(flags.config, command=noted(flags, code_of(held_out)))
    common: dict[str, Any] = {
        "uniform_groups": options.uniform_groups,
        "held_out": [named.environment for named in held_out],
        "resume": options.resume,
        "console": console,
    }
    if options.from_records is not None:
        if engines != EngineOptions():
            raise InputError("A run from records samples nothing; leave out what says who samples.")
        done = train_from_records(config, options.from_records, options.out, **common)
    else:
        address = options.address()
        if address.api_key is None and not is_loopback(options.host):
            print(f"Warning: everybody who reaches {options.host} may use and teach this model; set {KEY_VARIABLE} to "
                  "require a key.", file=sys.stderr, flush=True)  # fmt: skip
        where = sys.stderr if options.json else sys.stdout
        ready = lambda url: print(
            f"Agents: {url}/s/SESSION/v1 (OpenAI), {url}/s/SESSION (Anthropic)", file=where, flush=True
        )
        make = engines.fleet(config, options.out, max_num_seqs=address.limits.max_concurrent)
        done = train_from_gateway(
            config, options.out, address, ready=ready, make_fleet=make, publish_to=engines.mirror, **common
        )  # fmt: skip
    summarise(done, console, as_json=options.json)
    return 0


def summarise(run: RunDirectory, console: Console, *, as_json: bool) -> None:
    """Rewards of what was learnt from and held out, at the beginning and at the end, and where the model is."""
    lines, held_out = run.read("metrics"), held_out_ends(run)
    rewards = [line["trained_reward"] for line in lines if "trained_reward" in line]
    dropped = sum((Counter(line["dropped"]) for line in lines), Counter[str]())
    fifth = max(1, len(rewards) // 5)
    result = {
        "run": str(run.path),
        "steps": len(lines),
        "reward_first_fifth": sum(rewards[:fifth]) / fifth,
        "reward_last_fifth": sum(rewards[-fifth:]) / fifth,
        "trained": sum(line["trained"] for line in lines),
        "trained_tokens": sum(line["trained_tokens"] for line in lines),
        "dropped": dict(sorted(dropped.items())),
        "held_out": held_out,
        "model": str(run.model_directory),
    }
    if as_json:
        print(json.dumps(result))
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
    console.print(
        f"rl: {run.path}, {len(lines)} steps, reward of what was learnt from: {result['reward_first_fifth']:.3f} in "
        f"the first fifth, {result['reward_last_fifth']:.3f} in the last; {result['trained']} sessions with "
        f"{result['trained_tokens']:,} tokens were learnt from, dropped: "
        f"{reasons}",
        soft_wrap=True,
    )
    tell_held_out(held_out, console)
    tell_pages(run, console)


def held_out_ends(run: RunDirectory) -> dict[str, list[tuple[float, float]]]:
    """What was measured on the way, by name: first and last, each a version and its value."""
    return {name: [points[0], points[-1]] for name, points in measured(run, run.read("metrics")).items()}


def tell_held_out(ends: Mapping[str, Sequence[tuple[float, float]]], console: Console) -> None:
    """Rewards of held-out tasks, where there are any."""
    for name, points in ends.items():
        if name.endswith("/reward"):
            values = ", ".join(f"{value:.3f} at version {version}" for version, value in points)
            console.print(f"held out: {name} {values}", soft_wrap=True, markup=False)


def tell_pages(run: RunDirectory, console: Console) -> None:
    """What there is to look at, and how the model is used. A page may be absent: its error is no error of the run."""
    pages = {"report": run.path / REPORT, "rollouts": run.path / ROLLOUTS}
    there = "; ".join(f"{name}: {page}" for name, page in pages.items() if page.exists())
    for line in (
        *([there] if there else []),
        f"model: {run.model_directory}; `glm5 chat {run.path}` talks to it, `glm5 serve {run.path}` serves it",
    ):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
