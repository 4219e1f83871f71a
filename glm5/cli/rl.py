r"""`glm5 rl`: reinforcement learning from environments, from agents behind a gateway, from recorded use.

    glm5 rl --parent runs/sft --env sums --env gym:chain_sum:max_terms=3@2 --out runs/rl     # asynchronous, DDIS
    glm5 rl --parent runs/sft --env sums --out runs/sync --scheduler.mode sync --learner.loss icepop
    glm5 rl --resume --out runs/rl                                                # all as it was, from where it stopped
    glm5 rl --replay-step 17 --out runs/rl                                        # that step again, without engines
    glm5 rl --parent runs/sft --env sums --out runs/two --executor processes --engines 2
    glm5 rl --parent runs/sft --env sums --out runs/far --executor servers --server http://a:8000 --publish-to weights
    glm5 rl --follow runs/rl                                                      # its live view, from another terminal
    glm5 rl --simulate --like runs/rl                                             # other settings, in virtual time
    glm5 rl --from-gateway --parent runs/sft --out runs/agents                    # agents of others, as they run
    glm5 rl --from-records used --parent runs/sft --out runs/used                 # what glm5 serve --record used kept
    glm5 rl --parent runs/sft --env sums --out runs/exact --deterministic         # every run and resume the same bits
    glm5 rl --parent runs/rl --env sums --env facts --world world --out runs/distilled --learner.advantages none \
        --aids.teacher runs/sft --aids.teacher runs/math sums                     # each environment with its teacher

Environments by name: `glm5.cli.rl_environments`; one of your own is `--env python:FILE.py:NAME`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from glm5.cli import rl_outside, rl_simulate
from glm5.cli.rl_engines import EngineOptions
from glm5.cli.rl_environments import Named
from glm5.cli.rl_outside import held_out_ends, tell_held_out, tell_pages
from glm5.cli.rl_record import Record, check_parent, code_of, environments, in_flags, noted, parse
from glm5.cli.threads import use_threads
from glm5.envs.protocol import UniformGroups
from glm5.errors import InputError
from glm5.rl.config import RLRunConfig
from glm5.rl.gateway.session import ENVIRONMENT
from glm5.rl.learnt import Learnt
from glm5.rl.lockstep import train_in_lockstep
from glm5.rl.orchestrator import train_rl
from glm5.rl.replay import ReplayedStep, replay_step
from glm5.rl.tasks import TaskSource
from glm5.rl.view import watch_run
from glm5.train import RunDirectory
from glm5.train.recorded import RunChanged


@dataclass(frozen=True, kw_only=True)
class RLOptions:
    """What to do, beside the settings of the run."""

    env: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An environment: sums, arithmetic, gym:TASK, calculator, lookup, facts, openenv:URL, gymnasium:ID, verifiers:ID,
    python:FILE:NAME of your own; @2 for twice the share. May be given several times."""
    held_out_env: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An environment, named as for --env, of which held-out tasks are measured on the way (--held-out.every) and never
    learnt from. May be given several times; none, for a resumed run, takes away those that were."""
    out: Path
    """The run directory."""
    world: Path | None = None
    """The world that facts and lookup ask about."""
    resume: bool = False
    """Go on where the run of --out stopped; whatever is not said again is as it was."""
    uniform_groups: UniformGroups | None = None
    """Whether groups whose rewards are all equal are learnt from; left out: as each environment says, and keep where
    there are teachers, who have something to say about those too."""
    deterministic: bool = False
    """Order everything by a clock that counts tokens, with the strict engine: a run, however often it was killed and
    resumed, gives the same weights to the bit. Slower."""
    replay_step: int | None = None
    """Learn from the batch of this step of the run of --out again, from the journal alone, and compare."""
    threads: int | None = None
    """Processor threads; all cores when left out."""
    json: bool = False
    """Print the result as one JSON object."""


@dataclass(frozen=True, kw_only=True)
class FollowOptions:
    """The live view of a run that another process makes, until it is finished."""

    follow: Path
    """The run directory."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Reinforcement learning: rollouts of a model are scored by environments, and it learns from them.

    Other forms, each with a --help of its own: --from-gateway and --from-records learn from agents, --simulate predicts
    a run before it is paid for, --follow RUN shows one that another process makes.
    """

    config: Annotated[RLRunConfig, tyro.conf.arg(name="")]
    run: Annotated[RLOptions, tyro.conf.arg(name="")]
    engines: Annotated[EngineOptions, tyro.conf.arg(name="")]


def run(arguments: Sequence[str]) -> int:
    """Parses the flags and trains."""
    if any(argument.split("=")[0] in ("--simulate", "--like") for argument in arguments):
        return rl_simulate.run(arguments)
    if any(argument.split("=")[0] == "--follow" for argument in arguments):
        watch_run(tyro.cli(FollowOptions, prog="glm5 rl", args=list(arguments)).follow)
        return 0
    record = Record.named(arguments)
    outside = any(argument.split("=")[0] in ("--from-gateway", "--from-records") for argument in arguments)
    outside = outside or (record is not None and record.outside)
    replayed = record is not None and record.replayed
    if outside and not replayed:
        return rl_outside.run(arguments, record)
    flags = parse(Flags, RLOptions, arguments, record)
    use_threads(flags.run.threads)
    check_parent(flags.config, record)
    act = train if flags.run.replay_step is None else again
    try:
        return act(flags, record, arguments)
    except RunChanged as error:
        raise error if record is None else in_flags(error, flags.config, record) from None


def train(flags: Flags, record: Record | None, arguments: Sequence[str]) -> int:
    """A run, or the rest of one."""
    options, engines = flags.run, flags.engines
    learnt = environments(options.env, options.world, arguments, record)
    engines.check(resume=options.resume)
    if options.deterministic and (engines.executor != "local" or engines.publish_to is not None):
        raise InputError("--deterministic runs in one process; leave --executor and --publish-to out.")
    if not learnt:
        raise InputError(nothing_to_learn_from(record))
    held_out = environments(options.held_out_env, options.world, arguments, record, "heldout")
    check_held_out(learnt, held_out)
    config = replace(with_full_names(flags.config, learnt), command=noted(flags, code_of([*learnt, *held_out])))
    console = Console(stderr=options.json)
    play = train_in_lockstep
    if not options.deterministic:
        play = functools.partial(train_rl, make_fleet=engines.fleet(config, options.out), publish_to=engines.mirror)
    done = play(
        config,
        [named.environment for named in learnt],
        options.out,
        held_out=[named.environment for named in held_out],
        sources=sources_of(learnt, options.uniform_groups or ("keep" if config.aids.teachers else None)),
        resume=options.resume,
        console=console,
    )
    summarise(done, console, as_json=options.json)
    return 0


def again(flags: Flags, record: Record | None, arguments: Sequence[str]) -> int:
    """A step once more. Environments have no part in it but that teachers may be named after them."""
    assert record is not None and flags.run.replay_step is not None
    config = flags.config
    if config.aids.teachers != record.config.aids.teachers:
        config = with_full_names(config, environments(flags.run.env, flags.run.world, arguments, record))
    replayed = replay_step(config, flags.run.out, flags.run.replay_step)
    return print_replay(replayed, Console(stderr=flags.run.json), flags.run.json)


def with_full_names(config: RLRunConfig, environments: Sequence[Named]) -> RLRunConfig:
    """Teachers are for environments as the command line calls them."""
    names = {named.short: named.environment.name for named in environments}
    return replace(config, aids=config.aids.renamed(names))


def nothing_to_learn_from(record: Record | None) -> str:
    """A sentence that asks for environments."""
    if record is None:
        return "There is nothing to learn from: give at least one --env, such as --env sums."
    names = record.directory.description["inputs"].get("environments")
    if names == ENVIRONMENT:
        return (
            f"{record.directory.path} learns from agents, and its record does not say from which (it was begun in "
            "Python, or by an older version): give --from-gateway, or --from-records DIR."
        )
    return (
        f"{record.directory.path} learns from {names}, and its record does not say how to make that (it was begun in "
        "Python, or by an older version): give each with --env, or resume it in Python, train_rl(..., resume=True)."
    )


def print_replay(replayed: ReplayedStep, console: Console, as_json: bool) -> int:
    """The numbers of a step then and now; 1 when they differ."""
    names = ("loss", "grad_norm")
    pairs = {name: [replayed.recorded.get(name), replayed.values.get(name)] for name in names}
    if as_json:
        print(json.dumps({"step": replayed.batch.step, "same": replayed.same, "then_and_now": pairs}))
    else:
        for rollout in replayed.batch.rollouts:
            reward = "none" if rollout.reward is None else f"{rollout.reward.value:g}"
            console.print(f"{rollout.id}: reward {reward}, {rollout.num_sampled} tokens", markup=False, soft_wrap=True)
        for name, (then, now) in pairs.items():
            console.print(f"{name}: {then} then, {now} now", markup=False)
        console.print(
            "the same to the bit"
            if replayed.same
            else "NOT the same: the code, the machine or learner.pass_tokens (logits_mib) is another one"
        )
    return 0 if replayed.same else 1


def check_held_out(learnt: Sequence[Named], held_out: Sequence[Named]) -> None:
    """Raises InputError for an environment of one's own that would measure the tasks that are learnt from."""
    names = {named.environment.name for named in learnt}
    for named in held_out:
        if named.code is not None and named.environment.name in names:
            raise InputError(
                f"{named.short} would measure the tasks that it is learnt from: let its function take `split`, which "
                'is "heldout" here, and make other tasks under another name; or name another environment.'
            )


def sources_of(environments: Sequence[Named], uniform_groups: UniformGroups | None) -> list[TaskSource]:
    """How each environment takes part; uniform_groups: None leaves that to the environment."""
    settings = {} if uniform_groups is None else {"uniform_groups": uniform_groups}
    return [TaskSource.of(named.environment, weight=named.weight, **settings) for named in environments]


def summarise(run: RunDirectory, console: Console, *, as_json: bool) -> None:
    """Rewards at the beginning and at the end, and of held-out tasks, where there are any, and where the report is."""
    metrics, held_out, learnt = run.read("metrics"), held_out_ends(run), Learnt.read(run.path)
    rewards = [line["reward"] for line in metrics if line["reward"] is not None]
    fifth = max(1, len(rewards) // 5)
    result: dict[str, Any] = {
        "run": str(run.path),
        "steps": len(metrics),
        "reward_first_fifth": mean(rewards[:fifth]),
        "reward_last_fifth": mean(rewards[-fifth:]),
        "max_staleness": max((line.get("max_staleness", 0) for line in metrics), default=0),
        "held_out": held_out,
        "learnt": learnt.sentence if learnt is not None and learnt.step == len(metrics) else None,
        "model": str(run.model_directory),
    }
    if as_json:
        print(json.dumps(result))
        return
    said = "nothing was learnt from"
    if metrics:
        said = f"no token was older than {result['max_staleness']} versions"
    if rewards:
        first, last = result["reward_first_fifth"], result["reward_last_fifth"]
        said = f"reward {first:.3f} in the first fifth, {last:.3f} in the last; {said}"
    console.print(f"rl: {run.path}, {len(metrics)} steps, {said}", soft_wrap=True, markup=False)
    tell_held_out(held_out, console)
    tell_pages(run, console)


def mean(values: Sequence[float]) -> float | None:
    """None for none."""
    return sum(values) / len(values) if values else None
