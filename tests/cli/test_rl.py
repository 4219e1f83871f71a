"""`glm5 rl`: environments and losses by name, a run, its resume, a step again, and what is refused."""

import json
import re
from pathlib import Path

import pytest
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.cli.main import main
from glm5.cli.rl_environments import named_environment, settings
from glm5.cli.rl_flags import loss, written
from glm5.envs import Reward, Sums
from glm5.errors import InputError
from glm5.rl.losses import DDIS, IcePop
from glm5.rl.simulation import settings_of
from glm5.scoring import Grade


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(speaker_model(), directory, speaker_tokenizer())
    return directory


def flags(parent, out, *more):
    return [
        "rl", "--parent", str(parent), "--env", "gym:spell_backward@2", "--env", "sums", "--out", str(out),
        "--steps", "2",
        "--rollout.max-tokens", "4", "--scheduler.groups-per-batch", "2", "--scheduler.group-size", "2",
        "--threads", "1", "--json", *more,
    ]  # fmt: skip


def test_an_environment_is_named_with_its_settings_and_its_share():
    named = named_environment("gym:chain_sum:max_terms=3,min_terms=2@0.5")
    assert named.weight == 0.5 and "max_terms=3" in named.environment.name
    assert named_environment("sums").weight == 1.0
    assert settings("a=1,b=x,c=0.5") == {"a": 1, "b": "x", "c": 0.5}
    assert settings("""a=["+","-"],b=[],c=x""") == {"a": ["+", "-"], "b": [], "c": "x"}
    assert settings('a=[[1,2],[3,4]],b={"x":[1,2],"y":"],"},c=[u,v],d=1-2,e=,,f="g,h"') == {
        "a": [[1, 2], [3, 4]], "b": {"x": [1, 2], "y": "],"}, "c": "[u,v]", "d": "1-2", "e": "", "f": "g,h",
    }  # fmt: skip
    assert settings("a=False,b=True,c=None,d=['+', '-'],e=false,f=1_0,g=Falser,h=[+]") == {
        "a": False, "b": True, "c": None, "d": ["+", "-"], "e": False, "f": "1_0", "g": "Falser", "h": "[+]",
    }  # fmt: skip
    assert settings("""a=[['a','b'],['c','d']],y=2,z=[[u,v],[w]],q=["]",'],',x's],r=a],s='b""") == {
        "a": [["a", "b"], ["c", "d"]], "y": 2, "z": "[[u,v],[w]]", "q": """["]",'],',x's]""", "r": "a]", "s": "'b",
    }  # fmt: skip
    with pytest.raises(InputError, match=r"'-'. is no setting"):
        settings("a=['+', '-'")
    with pytest.raises(InputError, match="'oops' is no setting"):
        settings("a=[[1,2],[3,4]],oops,b=2")
    assert named_environment("openenv:http://127.0.0.1:8001").environment.name.endswith("8001")


@pytest.mark.filterwarnings("error")
def test_what_python_cannot_read_is_text_or_a_sentence():
    minus = "-" * 5000 + "1"
    for text in ("{{}}", "[{{}}]", minus, "[" * 300, r"'\d'", "[b'x']", "{'x':1}", "[1,{2}]"):
        assert settings(f"a={text}") == {"a": text}
    assert settings(r"a=['\d'],b=1") == {"a": [r"\d"], "b": 1}
    for deep in ("[" * 100_000, f"[{minus}]"):
        with pytest.raises(InputError, match="The value of a is nested too deeply"):
            settings(f"b=1,a={deep}")


def test_a_setting_has_the_name_that_it_had_as_text_only_where_it_is_text():
    """A run that an earlier version began with allow_negation=False has the text, which is true, in its name."""
    text, value = (named_environment(f"gym:chain_sum:allow_negation={it}").environment for it in ('"False"', "false"))
    assert text.name == value.name, "so False without quotes may be either, and is refused below"
    assert "['+','-']" not in named_environment("gym:basic_arithmetic:operators=['+','-']").environment.name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sumz", "sums"),
        ("gym:chain_sun", "chain_sum"),
        ("sums@-1", "more than 0"),
        ("arithmetic:largest", "name=value"),
        ("arithmetic:biggest=3", "no setting 'biggest'.* It has: largest, operations[.]"),
        ("sums:split=heldout", "no setting 'split'.* It has: digits"),
        ("arithmetic:split=foo", "no setting 'split'"),
        ("calculator:split=heldout", "calculator has no setting 'split'. It has none"),
        ("gym:chain_sum:allow_negation=False", 'write false for the value, or "False" for the text'),
        ("gym:basic_arithmetic:operators=['+', '-']", r'write \["\+", "-"\] for the value'),
        ("gymnasium:FrozenLake-v1:is_slippery=False", "write false for the value"),
        ("arithmetic:largst=3", "Did you mean 'largest'"),
        ("sums:digits=few", "setting of the wrong kind"),
        ("gym", "gym:chain_sum"),
        ("facts", "--world"),
        ("openenv:nowhere", "address"),
        ("openenv:http://u:hush@h:1", "user or password"),
    ],
)
def test_a_bad_name_is_refused_in_a_sentence(text, says):
    with pytest.raises(InputError, match=says):
        named_environment(text)


def test_a_loss_is_named_with_its_settings():
    assert loss("ddis") == DDIS() and loss("IcePop:beta=3") == IcePop(beta=3)
    assert written(IcePop(beta=3.0)) == ["icepop:beta=3.0"] and loss(*written(DDIS(epsilon_low=0.2))).epsilon_low == 0.2
    for text, says in (("ddos", "ddis"), ("ddis:epsilon=1", "epsilon_"), ("icepop:beta=0", "beta"),
                       ("GRPO", "advantages grpo"), ("dapo", "normalisation token-mean")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            loss(text)


def test_a_run_its_resume_and_a_step_again(parent, tmp_path, capsys):
    assert main(flags(parent, tmp_path / "run")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 2 and result["run"] == str(tmp_path / "run")
    assert main(flags(parent, tmp_path / "run")) == 1
    assert "resume" in capsys.readouterr().err
    assert main(flags(parent, tmp_path / "run", "--resume")) == 0
    capsys.readouterr()
    assert main(flags(parent, tmp_path / "run", "--replay-step", "1")) == 0
    assert json.loads(capsys.readouterr().out)["same"] is True


def test_a_task_that_is_learnt_is_a_success(parent, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Sums, "score", lambda self, task, response: Reward(1.0, Grade("correct", "said")))
    command = ["rl", "--parent", str(parent), "--env", "sums", "--out", str(tmp_path / "run"), "--rollout.max-tokens",
               "4", "--scheduler.group-size", "2", "--groups-in-vain", "4", "--threads", "1"]  # fmt: skip
    assert main([*command, "--json"]) == 0
    heard = capsys.readouterr()
    said = json.loads(heard.out)["learnt"]
    assert said.startswith("All of the last ") and said.endswith("stopped after step 0 of 20.") and said in heard.err
    assert main(["rl", "--resume", "--out", str(tmp_path / "run"), "--threads", "1"]) == 0
    heard = capsys.readouterr().out
    assert f"run is finished: {said} --steps with more" in heard
    pages = re.search(r"report: (.*); rollouts: (.*)\nmodel: (.*); `glm5 chat", heard)
    assert pages is not None and all(Path(page).exists() for page in pages.groups()), "what is named is there"
    (tmp_path / "run" / "rollouts.html").unlink()
    assert main(["rl", "--resume", "--out", str(tmp_path / "run"), "--threads", "1"]) == 0
    heard = capsys.readouterr().out
    assert f"report: {pages[1]}\nmodel: " in heard and "rollouts:" not in heard


def test_nothing_to_learn_from_is_refused(parent, tmp_path, capsys):
    assert main(["rl", "--parent", str(parent), "--out", str(tmp_path / "none")]) == 1
    assert "--env" in capsys.readouterr().err


def test_engines_in_processes_and_a_simulation_of_the_run(parent, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(flags(parent, run, "--executor", "processes", "--engines", "2")) == 0
    capsys.readouterr()
    assert main(["rl", "--simulate", "--like", str(run), "--bounds", "2", "--batches", "8"]) == 0
    heard = capsys.readouterr()
    assert "rollouts are too short a record to predict from" in heard.err and " ± " in heard.out
    assert main(["rl", "--simulate", "--like", str(run), "--bounds", "2", "--batches", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert any("too short" in warning for warning in found["warnings"])
    assert all(it["steps_per_hour_spread"] > 0 for it in found["simulations"])
    told = settings_of(run)
    scheduler, sources = told.scheduler, told.sources
    assert told.engines == found["settings"]["engine"]["engines"] == 2
    assert (scheduler.groups_per_batch, scheduler.group_size) == (2, 2), "the run's own, not the defaults"
    assert [source.weight for source in sources] == [2.0, 1.0]
    assert [it["mode"] for it in found["simulations"]] == ["sync", "one-step-off", "async"]
    assert all(it["steps_per_hour"] > 0 for it in found["simulations"]) and found["run"]["steps_per_hour"] > 0
    like = ["rl", "--simulate", "--like", str(run), "--bounds", "2", "--batches", "8", "--draws", "0", "--json"]
    slow = ["--engine.points", "1", "0.5", "--train-seconds", "70", "--publish-seconds", "9", "--engine.engines", "1"]
    assert main([*like, *slow]) == 0
    tried = json.loads(capsys.readouterr().out)
    assert tried["settings"]["engine"]["points"] == [[1, 0.5]] and tried["settings"]["engine"]["engines"] == 1
    assert tried["simulations"][-1]["steps_per_hour"] <= 3600 / 79 + 1, "what is given is tried"
    assert main([*like, "--tokens.median", "7"]) == 1
    assert "--tokens is measured by --like" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--engines", "2"], "--executor processes"),
        (["--executor", "servers", "--publish-to", "w", "--server", "http://u:hush@h"], "GLM5_BACKEND_API_KEY"),
        (["--deterministic", "--executor", "processes"], "one process"),
        (["--env", "sums"], "Two environments of the run are called sums"),
    ],
)
def test_what_is_refused_leaves_no_directory_behind(parent, tmp_path, capsys, more, says):
    assert main(flags(parent, tmp_path / "none", *more)) == 1
    assert says in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_a_place_that_takes_no_run_is_refused(parent, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(flags(parent, tmp_path / "file")) == 1
    assert "file cannot be made a run directory (File exists)" in capsys.readouterr().err


def test_draws_that_tell_no_deviation_are_refused(capsys):
    assert main(["rl", "--simulate", "--draws", "1"]) == 1
    assert "--draws is 1; a deviation needs 2 or more" in capsys.readouterr().err


def test_a_bound_below_0_is_refused(capsys):
    assert main(["rl", "--simulate", "--bounds", "4", "-1"]) == 1
    assert "--bounds has -1" in capsys.readouterr().err
