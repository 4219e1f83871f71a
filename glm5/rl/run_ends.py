"""How a run begins and ends: its directory with all that fixes the run, and the model and pages that it leaves."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from rich.console import Console

from glm5.checkpoint import load_model, save_model
from glm5.config import ModelConfig
from glm5.envs import Environment
from glm5.errors import ConfigError, RunError
from glm5.files import write_json
from glm5.model import GLM5
from glm5.rl.adapters import check_targets
from glm5.rl.aids import Aids, open_aids
from glm5.rl.comparable import check_measures, measures, tasks_of
from glm5.rl.config import PACE, RLRunConfig
from glm5.rl.held_out import held_out_rewards
from glm5.rl.learnt import Learnt, ended
from glm5.rl.report import REPORT, RETENTION, write_rl_report
from glm5.rl.session import Session, task_stream
from glm5.rl.tasks import TaskSource
from glm5.rl.vain import NothingLearnt
from glm5.text import Tokenizer
from glm5.train import RunDirectory
from glm5.train.run_directory import directory_sha256, exclusive, model_of, step_of

log = logging.getLogger("glm5.rl")


@contextlib.contextmanager
def started_run(
    config: RLRunConfig,
    environments: Sequence[Environment],
    run_directory: Path,
    *,
    sources: Sequence[TaskSource] | None = None,
    aids: Aids | None = None,
    held_out: Sequence[Environment] = (),
    deterministic: bool = False,
    parent: str | None = None,
    resume: bool,
) -> Iterator[RunDirectory]:
    """The run's directory, from which other processes are kept out inside the block.

    parent: the hash of the parent's model, if it was taken already: of large weights it takes minutes.
    What a resumed run may change: `OPERATIONAL` settings, what it is measured by, `PACE` unless deterministic, and
    `steps` at a constant rate.
    """
    names = [environment.name for environment in environments]
    config.aids.check_environments(names)
    model = ModelConfig.from_pretrained(model_of(config.parent))
    if not (resume and (run_directory / "run.json").exists()):  # runs of earlier versions may do as they did
        _check_sources(names, sources)
        replay = bool(config.aids.replay.data) or (aids is not None and aids.replay is not None)
        config.check_learning(
            taught=bool(config.aids.teachers or (aids and aids.teachers)),
            replayed=replay and config.learner.replay_weight > 0,
            drafting=model.num_nextn_predict_layers > 0,
        )
        if config.learner.lora is not None:
            check_targets(GLM5(model, device=torch.device("meta")), config.learner.lora)
    config.rollout.check_vocabulary(model.vocab_size)
    task_stream(environments, sources, config.rollout.seed)  # what it and they refuse leaves no directory behind
    constant = config.learner.schedule.shape == "constant"
    free = frozenset({"steps"} if constant else ()) | (frozenset() if deterministic else PACE)
    measured = tasks_of(held_out, config.held_out.tasks)
    inputs = {"environments": ", ".join(names), **config.aids.inputs(), **measured}
    parent = parent or directory_sha256(model_of(config.parent))
    with exclusive(run_directory):
        over = False
        if resume and (run_directory / "run.json").exists():
            before = RunDirectory.open(run_directory)
            _check_steps(config, before, constant=constant)
            check_measures(before, config, inputs)
            over = before.finished and not _goes_on(before, config)
        try:
            run = RunDirectory.start(
                run_directory,
                stage="rl",
                config=config,
                inputs={
                    **inputs,
                    **_if_known(run_directory, drawn(environments, sources)),
                    **_if_known(run_directory, {"clock": "deterministic" if deterministic else "real"}),
                },
                parent=parent,
                resume=resume,
                may_change=free | measures(run_directory, inputs),
                over=over,
            )
        except OSError as error:
            raise RunError(
                f"{run_directory} cannot be written in ({error.strerror}); mend that (on a full disk, free some "
                "space), then give the same command again."
            ) from error
        yield run


def _check_sources(names: Sequence[str], sources: Sequence[TaskSource] | None) -> None:
    """Raises ConfigError for an environment that no source names."""
    named = {source.environment for source in sources or ()}
    for name in names if sources is not None else ():
        if name not in named:
            raise ConfigError(
                f"No task source names {name}, so none of its tasks would be played; give it one as well "
                "(TaskSource.of), or leave the environment out."
            )


def drawn(environments: Sequence[Environment], sources: Sequence[TaskSource] | None) -> dict[str, str]:
    """How each environment takes part: it changes which tasks come next."""
    found = {}
    for source in sources if sources is not None else [TaskSource.of(environment) for environment in environments]:
        changed = {f.name: getattr(source, f.name) for f in fields(source) if f.name != "environment"}
        plain = TaskSource(environment=source.environment)
        words = [f"{name}={value}" for name, value in changed.items() if value != getattr(plain, name)]
        found[f"tasks of {source.environment}"] = ", ".join(words) or "as by default"
    return found


def _if_known(run_directory: Path, inputs: dict[str, str]) -> dict[str, str]:
    """Those that the run has recorded, all for a new one: runs did not always record them, and any may be theirs."""
    if not (run_directory / "run.json").exists():
        return inputs
    recorded = RunDirectory.open(run_directory).description["inputs"]
    return {name: value for name, value in inputs.items() if name in recorded}


def _goes_on(run: RunDirectory, config: RLRunConfig) -> bool:
    """Whether a run that is finished is to have more steps."""
    return len(run.read("metrics")) < config.steps and not ended(run.path, config.steps)


def _check_steps(config: RLRunConfig, run: RunDirectory, *, constant: bool) -> None:
    """Says why a run whose rate falls keeps its number of steps, and that steps are not taken back."""
    before = run.description["config"].get("steps")
    if not constant and before not in (None, config.steps):
        raise RunError(
            f"{run.path} was started for {before} steps with a {config.learner.schedule.shape} rate, which falls "
            f"over just these: with {config.steps} every step would have had another rate. Start a new run with "
            f"{run.path} as its parent; a run with a constant rate (--learner.schedule.shape constant) can be "
            "made longer."
        )
    done = len(run.read("metrics"))
    if config.steps < done:
        raise RunError(
            f"{run.path} has made {done} steps already, and --steps {config.steps} asks for fewer; give {done} to end "
            "it where it stands, more to go on, or start a new run."
        )


def reopened(run: RunDirectory, config: RLRunConfig, console: Console | None = None) -> bool:
    """Whether there is something left to do; a finished run that is to have more steps goes on, another one says so.

    A run that was killed after its model was saved and before its pages were gets these now.
    """
    done = len(run.read("metrics"))
    learnt = Learnt.read(run.path)
    if run.finished and _goes_on(run, config):
        for page in (RETENTION, REPORT):  # they tell of the model that is put aside
            (run.path / page).unlink(missing_ok=True)
        run.reopen()
    if run.finished and not (run.path / REPORT).exists():
        write_rl_report(run.path)
    if run.finished:
        how = f"it has made all of its {done} steps." if learnt is None or done > learnt.step else learnt.sentence
        more = "--steps with more lets it go on."
        if config.learner.schedule.shape != "constant":
            more = f"Its rate has no steps beyond them; to go on, start a new run with {run.path} as its parent."
        say(f"{run.path} is finished: {how} {more}", console)
        return False
    saved = step_of(run.checkpoints()[-1]) if run.checkpoints() else 0
    if saved < done:
        say(f"{run.path}: steps {saved + 1} to {done} are learnt from again, from the journal.", console)
    return True


def say(sentence: str, console: Console | None) -> None:
    """On the console, by default that of errors."""
    (console or Console(stderr=True)).print(sentence, markup=False, highlight=False, soft_wrap=True)


def how_to_go_on(config: RLRunConfig, run: RunDirectory) -> str:
    """A sentence for a run that was stopped. One that was begun in Python, by a recipe perhaps, is resumed there."""
    if config.command is None:
        return "Run the same command with --resume to go on."
    return f"`glm5 rl --resume --out {run.path}` goes on."


def open_session(
    config: RLRunConfig,
    environments: Sequence[Environment],
    run: RunDirectory,
    tokenizer: Tokenizer,
    *,
    sources: Sequence[TaskSource] | None,
    aids: Aids | None,
    held_out: Sequence[Environment],
    timed: bool = True,
    elsewhere: bool = False,
) -> Session:
    """The run in this process, brought back to where it was. timed: whether time limits of held-out episodes count.

    elsewhere: whether others play the episodes.
    """
    attention = config.learner.attention
    opened = open_aids(config.aids, tokenizer, attention=attention, given=aids)
    if held_out:
        rewards = held_out_rewards(held_out, tokenizer, config.held_out, config.rollout, attention, timed=timed)
        opened = replace(opened, rewards=rewards)
    model = load_model(model_of(config.parent), dtype=torch.float32)
    return Session(config, environments, run, model, sources, opened, elsewhere=elsewhere)


def check_end(session: Session) -> None:
    """Raises `NothingLearnt` where a run ends, saved, that met too much in vain or has learnt from nothing at all."""
    nothing = session.scheduler.accounts.metrics()["trained"] == 0
    config, version = session.config, session.version
    if session.vain.all_right or not (nothing or (session.vain.full and version < config.steps)):
        return
    model = ""
    if config.learner.schedule.shape == "constant" and 0 < version < config.steps:
        model = f" With {version} for its steps it is finished as it stands, and can be the parent of another run."
    said = session.vain.in_vain(session.failure, elsewhere=session.elsewhere)
    raise NothingLearnt(
        f"{said} All is saved in {session.run.path} after step {version} of "
        f"{config.steps}. {how_to_go_on(config, session.run)}{model}"
    )


def save_end(session: Session, tokenizer: Tokenizer) -> None:
    """The model of a run that is at its end."""
    if session.version < session.config.steps:
        Learnt.of(session.vain, session.version, session.config.steps).write(session.run.path)
    save_model(session.learner.whole_model().eval(), session.run.model_directory, tokenizer)


def finish_run(session: Session, console: Console | None = None) -> None:
    """The pages, behind the model: whatever is wrong with them, what was learnt is there."""
    session.journal.close()
    if session.version < session.config.steps:
        say(Learnt.of(session.vain, session.version, session.config.steps).sentence, console)
    try:
        values = session.learner.measured(None)
        if values:
            write_json(session.run.path / RETENTION, {"version": session.learner.version, **values})
        write_rl_report(session.run.path)
    except Exception:
        log.exception("The model is in %s, but the report could not be written.", session.run.model_directory)
