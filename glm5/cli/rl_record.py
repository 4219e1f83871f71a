"""What the record of a run says of its command line, so that `--resume` and `--replay-step` need not say it again.

    glm5 rl --resume --out runs/rl                        # all as it was
    glm5 rl --resume --out runs/rl --steps 200            # what may change; all else is refused by its flag's name

The settings are in `run.json` anyway (`RLRunConfig`). What a command line says beside them, such as how environments
are made and where the engines are, is noted among them as `command`. The flags of a resumed run have these values as
their defaults; what is given is then compared by `RunDirectory.start`, as for a caller in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import tyro
from pydantic import TypeAdapter

from glm5.cli.rl_engines import EngineOptions
from glm5.cli.rl_environments import Named, named_environment
from glm5.cli.rl_flags import REGISTRY, teacher_words, written, written_optional
from glm5.cli.rl_own import WHOLE, OwnFile, whole_path
from glm5.data.corpus import Split
from glm5.errors import InputError, RunError
from glm5.rl.aids_config import Teacher
from glm5.rl.config import RLRunConfig, recorded_config
from glm5.rl.weights.mirror import claimed
from glm5.train import RunDirectory
from glm5.train.recorded import RunChanged, plain

NOW = frozenset({"out", "resume", "replay_step", "threads", "json"})
"""Options of one sitting: they are not recorded."""
OF_PARTS = ("learner.loss", "learner.kl", "learner.lora", "concurrency")
"""Settings of several parts that are one flag."""
INPUTS = {
    "environments": "--env",
    "tasks of": "--env",
    "clock": "--deterministic",
    "teacher of": "--aids.teacher",
    "reference": "--aids.reference",
    "replay": "--aids.replay.data",
    "heldout": "--aids.retention.heldout",
    "retention world": "--aids.retention.world",
}
"""The flags that say what a run reads, by how the names of its inputs begin."""


class Flags(Protocol):
    """Those of `glm5 rl`, with or without environments of our own."""

    @property
    def config(self) -> RLRunConfig: ...
    @property
    def run(self) -> Any: ...
    @property
    def engines(self) -> EngineOptions: ...


AnyFlags = TypeVar("AnyFlags", bound=Flags)


@dataclass(frozen=True, kw_only=True)
class Existing:
    """The flags that say that a run is there already."""

    out: Path | None = None
    resume: bool = False
    replay_step: int | None = None
    loss: Annotated[str | None, tyro.conf.arg(name="learner.loss")] = None
    """Older runs do not note the class of theirs."""


@dataclass(frozen=True)
class Record:
    """A run, with what its command line was."""

    directory: RunDirectory
    config: RLRunConfig
    replayed: bool = False
    """Whether a step of it is replayed: then nobody's episodes are needed."""

    @classmethod
    def named(cls, arguments: Sequence[str]) -> Record | None:
        """That of the run that is to be resumed, or of which a step is to be replayed; None for a new run.

        Raises InputError when it is not said which, and RunError when there is none and nothing to begin one with.
        """
        if {"-h", "--help"} & set(arguments) or not any(
            argument.replace("_", "-").startswith(("--resume", "--replay-step")) for argument in arguments
        ):
            return None
        asked, rest = tyro.cli(Existing, prog="glm5 rl", args=list(arguments), return_unknown_args=True)
        if not asked.resume and asked.replay_step is None:
            return None
        if asked.out is None:
            raise InputError("Say with --out RUN which run is meant.")
        parent = any(argument.split("=")[0] == "--parent" for argument in rest)
        if asked.replay_step is None and parent and not (asked.out / "run.json").exists():
            return None  # the first of many equal calls
        run = RunDirectory.open(asked.out)
        loss = None if asked.loss is None else asked.loss.partition(":")[0]
        return cls(run, recorded_config(run, loss=loss), asked.replay_step is not None)

    @property
    def said(self) -> dict[str, Any]:
        """What the command line said beside the settings; nothing of a run that was begun in Python.

        A run that was resumed in Python since has it in the note of an earlier session.
        """
        return next(iter(self._commands), {})

    @property
    def _commands(self) -> list[dict[str, Any]]:
        """What was said at the beginning and then by each session, the newest first."""
        sessions = [session.get("settings", {}).get("command") for session in self.directory.description["sessions"]]
        return [command for command in [self.config.command, *reversed(sessions)] if command]

    def check_code(self, spec: str, source: OwnFile) -> None:
        """Raises RunError for an environment of one's own whose file no session of the run had.

        spec: the environment as the command line names it, without a weight. A run that no session of this version
        has gone on with notes the hash of the file alone.
        """
        noted = [command.get("code", {}) for command in self._commands]
        known = [codes[whole_path(spec)] for codes in noted if whole_path(spec) in codes]
        whole = [code for code in known if code.startswith(WHOLE)]
        then, now = (whole, source.code) if whole else (known, source.code_alone)
        if then and now not in then:
            raise RunError(
                f"The file of {spec}, or one beside it that it imports, has changed since {self.directory.path} was "
                f"started (the hash is {now[:12]} now, but {then[0][:12]} then); restore it, or say that environment "
                "again to go on with it as it is now."
            )

    @property
    def outside(self) -> bool:
        """Whether its episodes are those of outside agents."""
        return "from_gateway" in self.said.get("run", {})

    def flags(self, kind: Callable[..., AnyFlags], options: type[Any]) -> AnyFlags:
        """As they were. kind, options: the classes of all flags and of those that are no settings."""
        inputs = self.directory.description["inputs"]
        run = {"deterministic": inputs.get("clock") == "deterministic", **self.said.get("run", {})}
        engines = TypeAdapter(EngineOptions).validate_python(self.said.get("engines", {}))
        run = TypeAdapter(options).validate_python({**run, "out": self.directory.path})
        return kind(config=self.config, run=run, engines=engines)


def parse(kind: type[AnyFlags], options: type[Any], arguments: Sequence[str], record: Record | None) -> AnyFlags:
    """The flags of the command line; what a resumed run's does not say is as it was."""
    if record is None:
        return tyro.cli(kind, prog="glm5 rl", args=list(arguments), registry=REGISTRY)
    before = record.flags(kind, options)
    given = _parsed(kind, arguments, before)
    if given.engines.executor != before.engines.executor:  # the others are of the executor that was
        before = _with(kind, before, engines=EngineOptions(publish_to=before.engines.publish_to))
        given = _parsed(kind, arguments, before)
    where = given.engines.publish_to
    said = any(argument.replace("_", "-").startswith("--publish-to") for argument in arguments)
    if given.run.resume and where is not None and not said and not claimed(where, record.directory):
        raise RunError(
            f"{record.directory.path} publishes to {where}, where no weights of it are, seen from here; "
            "say with --publish-to where they are, or where they shall be."
        )
    return given


def _parsed(kind: type[AnyFlags], arguments: Sequence[str], before: AnyFlags) -> AnyFlags:
    """Flags that may be given several times replace what was; as defaults they would be added to."""
    names = [name for name in ("env", "held_out_env") if hasattr(before.run, name)]
    aids = before.config.aids
    bare = _with(
        kind, before, config=replace(before.config, aids=replace(aids, teachers=())),
        run=replace(before.run, **dict.fromkeys(names, ())), engines=replace(before.engines, server=()),
    )  # fmt: skip
    given = tyro.cli(kind, prog="glm5 rl", args=list(arguments), registry=REGISTRY, default=bare)
    config, run, engines = given.config, given.run, given.engines
    kept = {name: getattr(run, name) or getattr(before.run, name) for name in names}
    if kept["held_out_env"] == ("none",):
        kept["held_out_env"] = ()
    return _with(
        kind, given, config=replace(config, aids=replace(config.aids, teachers=config.aids.teachers or aids.teachers)),
        run=replace(run, **kept), engines=replace(engines, server=engines.server or before.engines.server),
    )  # fmt: skip


def _with(kind: Callable[..., AnyFlags], flags: AnyFlags, **changed: Any) -> AnyFlags:
    return kind(**{"config": flags.config, "run": flags.run, "engines": flags.engines, **changed})


def environments(
    texts: Sequence[str], world: Path | None, arguments: Sequence[str], record: Record | None, split: Split = "train"
) -> list[Named]:
    """Those of --env, or of --held-out-env where the split is "heldout".

    The file of one that the arguments do not name again must be as the run had it; else it is not run (RunError).
    """
    flag = "--held-out-env" if split == "heldout" else "--env"
    again = any(argument.partition("=")[0].replace("_", "-") == flag for argument in arguments)
    check = None if again or record is None else record.check_code
    return [named_environment(text, world, split=split, check_code=check) for text in texts]


def code_of(environments: Iterable[Named]) -> dict[str, str]:
    """The hashes of the files of those of one's own, by what the command line names, whatever directory it is in."""
    return {whole_path(named.short): named.code for named in environments if named.code is not None}


def noted(flags: Flags, code: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the run's record shall say of the command line. code: as from `code_of`."""
    run = {name: value for name, value in plain(_resolved(flags.run)).items() if name not in NOW}
    return {"run": run, "engines": plain(_resolved(flags.engines)), **({"code": dict(code)} if code else {})}


def _resolved(options: Any) -> Any:
    """The same paths from whatever directory the run is resumed."""
    paths = {name: getattr(options, name, None) for name in ("world", "from_records", "publish_to")}
    environments = {name: getattr(options, name) for name in ("env", "held_out_env") if hasattr(options, name)}
    return replace(
        options, **{name: path.resolve() for name, path in paths.items() if path is not None},
        **{name: tuple(map(whole_path, texts)) for name, texts in environments.items()},
    )  # fmt: skip


def check_parent(given: RLRunConfig, record: Record | None) -> None:
    """Raises RunError for a parent that is no longer where it was."""
    if record is not None and given.parent == record.config.parent and not given.parent.exists():
        raise RunError(
            f"{record.directory.path} was started from {given.parent}, which is not there, seen from this directory; "
            "say with --parent where it is."
        )


# ---- differences --------------------------------------------------------------------------------------------------
def in_flags(error: RunChanged, given: RLRunConfig, record: Record) -> RunError:
    """The same with the names that the command line has."""
    path, name, old, new = error.path, error.difference.name, error.difference.old, error.difference.new
    if name.startswith("config."):
        name = next((whole for whole in OF_PARTS if name.startswith(f"config.{whole}.")), name.removeprefix("config."))
        flag = "--aids.teacher" if name == "aids.teachers" else "--" + name.replace("_", "-")
        sentence = f"{flag} is {_setting(given, name)}, but {path} was started with {_setting(record.config, name)}"
    elif name == "parent":
        was = "" if record.config.parent == given.parent else f", {record.config.parent},"
        sentence = (
            f"--parent: {given.parent} holds another model (its hash begins with {_short(new)}) than the one that "
            f"{path} was started from{was} did ({_short(old)})"
        )
    elif name.startswith("inputs."):
        name = name.removeprefix("inputs.")
        flag = next((flag for start, flag in INPUTS.items() if name.startswith(start)), "the command line")
        if name.startswith("tasks of") and _uniform(old) != _uniform(new):
            flag = "--uniform-groups"
        sentence = f"{flag}: {name}: {_short(new)} now, but {_short(old)} when {path} was started"
    else:
        return error
    return RunError(f"{sentence}; leave the flag out to go on as it was, or start a new run in another --out.")


def _setting(config: Any, name: str) -> str:
    """A setting as the command line would have it."""
    for part in name.split("."):
        config = getattr(config, part)
    if isinstance(config, tuple):
        words = [
            str(item) for each in config for item in (teacher_words(each) if isinstance(each, Teacher) else [each])
        ]
        return " ".join(words) or "empty"
    if name == "learner.loss":
        return written(config)[0]
    return written_optional(config)[0] if name in OF_PARTS else str(config)


def _short(value: Any) -> str:
    """The beginning of a hash, all of anything else."""
    text = str(value)
    return text[:12] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def _uniform(text: Any) -> list[str]:
    return [word for word in str(text).split(", ") if word.startswith("uniform_groups")]
