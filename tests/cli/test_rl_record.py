"""A run is resumed, and a step of it replayed, by its directory alone; what is said again must be what it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.cli.main import main
from glm5.cli.rl import Flags, RLOptions, nothing_to_learn_from
from glm5.cli.rl_engines import EngineOptions
from glm5.cli.rl_environments import named_environment
from glm5.cli.rl_record import Record, noted, parse
from glm5.data import Share
from glm5.errors import RunError
from glm5.rl.adapters import LoRA
from glm5.rl.aids_config import AidsConfig, Measured, ReplayData, Teacher
from glm5.rl.config import RLRunConfig, recorded_config
from glm5.rl.learner_config import LearnerConfig
from glm5.rl.losses import CISPO, DDIS, IcePop, Reinforce
from glm5.rl.orchestrator import train_rl
from glm5.rl.reference import KL
from glm5.rl.simulation import settings_of
from glm5.train import RunDirectory
from glm5.train.run_directory import exclusive


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    root = tmp_path_factory.mktemp("parents")
    for name, seed in (("parent", 0), ("other", 1)):
        glm5.save_model(speaker_model(seed), root / name, speaker_tokenizer())
    return root


def begin(parents, out, *more):
    return main([
        "rl", "--parent", f"{parents / 'parent'}", "--env", "gym:spell_backward@2", "--env", "sums", "--out", f"{out}",
        "--steps", "2", "--rollout.max-tokens", "4", "--scheduler.groups-per-batch", "2", "--scheduler.group-size", "2",
        "--uniform-groups", "keep", "--threads", "1", "--json", *map(str, more),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def made(parents, tmp_path_factory):
    """A run of two steps. Tests that go on with it leave it at two or more."""
    out = tmp_path_factory.mktemp("made") / "run"
    assert begin(parents, out, "--learner.loss", "icepop:beta=3", "--held-out-env", "sums", "--held-out.tasks", 2) == 0
    return out


def steps_of(run):
    return len((run / "metrics.jsonl").read_text().splitlines())


def test_a_run_goes_on_and_a_step_is_replayed_by_its_directory_alone(made, capsys):
    assert main(["rl", "--resume", "--out", str(made), "--steps", "3", "--json", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3 == steps_of(made)
    config = json.loads((made / "run.json").read_text())["config"]
    assert config["learner"]["loss"]["class"] == "IcePop" and config["command"]["run"]["env"][0].endswith("@2")
    assert "retention/sums/heldout/2/reward" in (made / "metrics.jsonl").read_text()
    for step in ("1", "2"):
        assert main(["rl", "--replay-step", step, "--out", str(made), "--json", "--threads", "1"]) == 0
        assert json.loads(capsys.readouterr().out)["same"] is True


def test_what_is_said_again_may_be_the_same_or_what_may_change(made, parents, capsys):
    for flags in (
        ["--parent", str(parents / "parent"), "--learner.loss", "icepop:beta=3.0"],
        ["--env", "gym:spell_backward@2.0", "--env", "sums@1"],
        ["--checkpoint-every", "3", "--patience", "60", "--held-out.every", "5"],
        ["--rollout.outage-seconds", "9", "--rollout.step-seconds", "9", "--rollout.episode-seconds", "9"],
        ["--aids.retention.every", "5", "--aids.retention.documents", "3"],
    ):
        assert main(["rl", "--resume", "--out", str(made), "--json", *flags]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--learner.loss", "icepop"], ["--learner.loss is icepop,", "with icepop:beta=3.0"]),
        (["--learner.loss", "ddis"], ["--learner.loss is ddis,", "with icepop:beta=3.0"]),
        (["--learner.kl", "on"], ["--learner.kl is on,", "with none"]),
        (["--learner.optimizer.lr", "0.5"], ["--learner.optimizer.lr is 0.5", "with 0.0001"]),
        (["--rollout.max-tokens", "5"], ["--rollout.max-tokens is 5", "with 4"]),
        (["--scheduler.mode", "sync"], ["--scheduler.mode is sync", "with async"]),
        (["--parent", "{}/other"], ["--parent: ", "/other holds another model", "/parent, did"]),
        (["--aids.teacher", "{}/other"], ["--aids.teacher is ", "/other *, but", "with empty"]),
        (["--aids.reference", "{}/other"], ["--aids.reference"]),
    ],
)
@pytest.mark.parametrize("how", ["--resume", "--replay-step=1"])
def test_a_difference_is_refused_by_the_name_of_its_flag(made, parents, capsys, flags, says, how):
    before = (made / "run.json").read_bytes()
    assert main(["rl", how, "--out", str(made), *(flag.format(parents) for flag in flags)]) == 1
    said = capsys.readouterr().err
    assert all(words in said for words in [*says, str(made), "leave the flag out", "another --out"]), said
    assert (made / "run.json").read_bytes() == before


def test_what_another_process_trains_is_not_touched(made, parents, capsys):
    before = (made / "run.json").read_bytes()
    with exclusive(made):
        for steps in ("1", "99"):
            assert main(["rl", "--resume", "--out", str(made), "--patience", "61", "--steps", steps]) == 1
            assert "is being trained by another process" in capsys.readouterr().err
        assert (made / "run.json").read_bytes() == before
    new = made.with_name("new")
    for how in ([], ["--deterministic"]):
        with exclusive(new):
            assert begin(parents, new, *how) == 1
            assert "is being trained by another process" in capsys.readouterr().err
            assert [file.name for file in new.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--env", "sums"], "--env: environments: sums/train/2 now, but reasoning-gym/"),
        (["--env", "sums", "--env", "gym:spell_backward"], "--env: environments: sums/train/2, reasoning-gym/"),
        (["--uniform-groups", "drop"], "--uniform-groups: tasks of"),
        (["--deterministic"], "--deterministic: clock: deterministic now, but real"),
    ],
)
def test_how_episodes_come_about_is_compared_too(made, capsys, flags, says):
    assert main(["rl", "--resume", "--out", str(made), *flags]) == 1
    assert says in capsys.readouterr().err


def test_steps_are_not_taken_back_and_a_finished_run_says_that_it_is(made, capsys):
    done = steps_of(made)
    assert main(["rl", "--resume", "--out", str(made), "--steps", "1"]) == 1
    assert f"has made {done} steps already, and --steps 1 asks for fewer" in capsys.readouterr().err
    assert main(["rl", "--resume", "--out", str(made), "--json"]) == 0
    heard = capsys.readouterr()
    assert f"is finished: it has made all of its {done} steps" in heard.err
    assert json.loads(heard.out)["steps"] == done


def test_a_run_that_is_not_there_is_asked_for(tmp_path, parents, made, capsys):
    (tmp_path / "empty").mkdir()
    pretraining = {"kind": "run", "stage": "pretrain", "config": {}, "inputs": {}, "sessions": []}
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "run.json").write_text(json.dumps(pretraining))
    for arguments, says in (
        (["--resume"], "Say with --out RUN"),
        (["--resume", "--out", f"{tmp_path / 'empty'}"], "empty has no run.json"),
        (["--replay-step", "1", "--out", f"{tmp_path / 'none'}"], "none has no run.json"),
        (["--resume", "--out", f"{tmp_path / 'pretrain'}"], "is a run of 'pretrain', not of rl"),
        (["--replay-step", "99", "--out", f"{made}"], "holds no batch of step 99"),
    ):
        assert main(["rl", *arguments]) == 1
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("parent", [["--parent", "p"], ["--parent=p"]])
def test_the_first_of_many_equal_calls_begins_a_run(tmp_path, parent):
    assert Record.named(["--resume", "--out", f"{tmp_path / 'none'}", *parent]) is None


def test_a_run_whose_environments_were_made_in_python_asks_for_them(parents, tmp_path, capsys):
    settings = {"steps": 1, "rollout": {"max_tokens": 4}, "scheduler": {"groups_per_batch": 2, "group_size": 2}}
    config = recorded_config(described({"parent": str(parents / "parent"), **settings}))
    environment = replace(named_environment("sums").environment, uniform_groups="keep")
    train_rl(config, [environment], tmp_path / "run")
    assert main(["rl", "--resume", "--out", str(tmp_path / "run"), "--steps", "2"]) == 1
    assert "learns from sums/train/2, and its record does not say how to make that" in capsys.readouterr().err
    more = ["--env", "sums", "--uniform-groups", "keep"]
    assert main(["rl", "--resume", "--out", str(tmp_path / "run"), "--steps", "2", *more]) == 0
    assert main(["rl", "--resume", "--out", str(tmp_path / "run"), "--steps", "3"]) == 0
    train_rl(replace(config, steps=4), [environment], tmp_path / "run", resume=True)
    assert main(["rl", "--resume", "--out", str(tmp_path / "run"), "--steps", "5"]) == 0
    assert steps_of(tmp_path / "run") == 5


def described(config, **more):
    """A run as its description has it."""
    return RunDirectory(Path("run"), {"stage": "rl", "config": config, "inputs": {}, "sessions": [], **more})


def test_a_loss_whose_class_was_not_noted_is_no_guess(tmp_path, capsys):
    description = {"kind": "run", "stage": "rl", "inputs": {}, "sessions": []}
    narrow = {"epsilon_low": 0.2, "epsilon_high": 0.28}
    old = {"parent": "p", "scheduler": {"group_size": 3}, "learner": {"loss": narrow}}
    (tmp_path / "run.json").write_text(json.dumps({**description, "config": old}))
    assert main(["rl", "--resume", "--out", str(tmp_path)]) == 1
    assert "does not note of which class its loss is: DDIS or CISPO has" in capsys.readouterr().err
    for said, kind in (("--learner.loss=ddis", DDIS), ("--learner.loss=CISPO:epsilon_low=0.2", CISPO)):
        assert Record.named(["--resume", "--out", str(tmp_path), said]).config.learner.loss == kind(**narrow)
    assert settings_of(tmp_path).scheduler.group_size == 3, "a simulation has no loss"
    assert recorded_config(described({"parent": "p", "learner": {"loss": {}}})).learner.loss == Reinforce()


def test_older_runs_of_agents_ask_for_agents_and_held_out_environments_are_taken_away():
    values = {"parent": "p", "command": {"run": {"env": ["sums"], "held_out_env": ["sums"]}}}
    run = described(values)
    run.description["inputs"]["environments"] = "gateway"
    record = Record(run, recorded_config(run))
    assert "give --from-gateway, or --from-records DIR" in nothing_to_learn_from(record)
    assert parse(Flags, RLOptions, ["--resume"], record).run.held_out_env == ("sums",)
    assert parse(Flags, RLOptions, ["--resume", "--held-out-env", "none"], record).run.held_out_env == ()


def test_every_setting_comes_back_from_the_record():
    from glm5.train.recorded import plain

    config = RLRunConfig(
        parent=Path("p"), watch=("trackio",),
        learner=LearnerConfig(loss=IcePop(beta=3.0), kl=KL(estimator="k2"), lora=LoRA(rank=2), advantages="reward"),
        aids=AidsConfig(
            teachers=(Teacher(path=Path("t"), environments=("a", "b")),), reference=Path("r"),
            replay=ReplayData(data=(Share(path=Path("x"), weight=2.0),)), retention=Measured(heldout=(Path("h"),)),
        ),
    )  # fmt: skip
    engines = EngineOptions(executor="servers", server=("http://a", "http://b"), publish_to=Path("w"))
    flags = Flags(config=config, run=RLOptions(out=Path("run"), env=("sums",), world=Path("w")), engines=engines)
    values = json.loads(json.dumps(plain(replace(config, command=noted(flags)))))
    record = Record(described(values), recorded_config(described(values)))
    there = Path("w").resolve()  # wherever it is resumed from
    with pytest.raises(RunError, match=r"no weights of it are, .* --publish-to"):
        parse(Flags, RLOptions, ["--resume"], record)
    back = parse(Flags, RLOptions, ["--resume", "--publish-to", str(there)], record)
    assert back.run == replace(flags.run, resume=True, world=there)
    assert back.engines == replace(engines, publish_to=there)
    assert replace(back.config, command=None) == config
    other = "--env a --env b --executor processes --engines 2 --aids.teacher q s"
    given = parse(Flags, RLOptions, other.split(), record)
    assert given.run.env == ("a", "b") and given.run.world == there
    assert given.engines == EngineOptions(executor="processes", engines=2, publish_to=there)
    assert given.config.aids.teachers == (Teacher(path=Path("q"), environments=("s",)),)
    del values["learner"]["loss"]["class"]  # as an older version wrote it
    assert recorded_config(described(values)).learner.loss == IcePop(beta=3.0)  # no other has these settings
    values["learner"]["loss"]["class"] = "Later"
    with pytest.raises(RunError, match="'Later', which this version does not know"):
        recorded_config(described(values))
    with pytest.raises(RunError, match=r"has a scheduler.group_size that cannot be read"):
        recorded_config(described({"parent": "p", "scheduler": {"group_size": "many"}}))
