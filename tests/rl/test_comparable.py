"""What a run has measured under a name keeps its meaning when the run is resumed, and what may change does."""

import json
from pathlib import Path

import pytest
from held_texts import text_of
from lockstep_runs import chat
from scripted import Chat
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.errors import ConfigError, RunError
from glm5.evals.skills import SkillsConfig
from glm5.files import write_json
from glm5.rl.aids_config import AidsConfig, Measured
from glm5.rl.config import RLRunConfig
from glm5.rl.held_out import HeldOut
from glm5.rl.run_ends import started_run
from glm5.train import RunDirectory


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    return text_of(tmp_path_factory.mktemp("text"), "fox")


@pytest.fixture
def resumed(tmp_path, monkeypatch):
    """Begins or resumes the run `tmp_path / "run"`, measures by this unless it is stopped before; its description."""
    monkeypatch.setattr("glm5.rl.aids_config.open_world", lambda path: None)
    monkeypatch.setattr("glm5.rl.aids_config.world_sha256", lambda path: path.name)
    glm5.save_model(speaker_model(), tmp_path / "parent", speaker_tokenizer())

    def resume(*, tasks=64, every=10, held_out=(), stopped=False, **measured):
        config = RLRunConfig(
            parent=tmp_path / "parent", aids=AidsConfig(retention=Measured(**measured)),
            held_out=HeldOut(tasks=tasks, every=every),
        )  # fmt: skip
        named = [Chat() for _ in held_out]
        for environment, name in zip(named, held_out, strict=True):
            environment.name = name
        with started_run(config, [chat()], tmp_path / "run", held_out=named, resume=True) as run:
            texts = [f"retention/{path.name}/bits_per_byte" for path in measured.get("heldout", ())]
            skills = ["retention/sums, unseen numbers"] if "world" in measured else []
            values = [*texts, *skills, *(f"retention/{name}/reward" for name in held_out)]
            if not stopped:
                run.append("metrics", {"step": len(run.read("metrics")), **dict.fromkeys(values, 0.5)})
            return run.description

    return resume


def test_another_text_or_world_under_the_name_of_one_is_refused(heldout, resumed, tmp_path):
    """Their values would be compared, also where the run was not measured in between."""
    run = tmp_path / "run"
    resumed(heldout=(heldout.directory,), world=Path("one"))
    other = text_of(tmp_path / "other", "hare").directory
    assert other.name == heldout.directory.name
    for _ in range(2):
        before = (run / "run.json").read_bytes()
        with pytest.raises(RunError, match=r"'heldout' of .* is another text than before.* its directory another name"):
            resumed(heldout=(other,))
        with pytest.raises(RunError, match=r"world of .* is another one than before"):
            resumed(world=Path("two"))
        assert (run / "run.json").read_bytes() == before
        resumed()
    named = other.rename(tmp_path / "hares")
    assert {"heldout heldout", "heldout hares"} < resumed(heldout=(heldout.directory, named))["inputs"].keys()


def test_how_much_is_read_of_a_text_stays_while_it_has_its_name(heldout, resumed, tmp_path):
    resumed(heldout=(heldout.directory,), documents=5)
    resumed(documents=7)  # of nothing
    for change in ({"documents": 12}, {"documents": None}, {"documents": 5, "length": 64}):
        before = (tmp_path / "run" / "run.json").read_bytes()
        with pytest.raises(
            RunError, match=r"(documents is \w+, but was 5|length is 64, but was 256) .* the text 'held"
        ):
            resumed(heldout=(heldout.directory,), **change)
        assert (tmp_path / "run" / "run.json").read_bytes() == before
    resumed(heldout=(heldout.directory,), documents=5, every=3)
    resumed(heldout=(text_of(tmp_path / "more", "hare").directory.rename(tmp_path / "hares"),), documents=12)


def test_how_much_the_skills_suite_asks_stays(resumed):
    resumed(world=Path("one"), skills=SkillsConfig(sums=3))
    with pytest.raises(RunError, match=r"retention.skills.sums is 4, but was 3 when .* by the skills suite before"):
        resumed(world=Path("one"), skills=SkillsConfig(sums=4))
    resumed(skills=SkillsConfig(sums=4))


def test_the_number_of_held_out_tasks_stays_while_they_have_their_name(resumed):
    noted = resumed(held_out=("kept", "left"), tasks=4)["inputs"]
    assert noted["held-out tasks of kept"] == noted["held-out tasks of left"] == "4 tasks"
    with pytest.raises(RunError, match=r"by 9 tasks of kept, but it was measured by 4 tasks before"):
        resumed(held_out=("kept",), tasks=9)
    assert "held-out tasks of left" not in resumed(held_out=("kept",), tasks=4, every=2)["inputs"]
    resumed(held_out=("other",), tasks=9)
    with pytest.raises(RunError, match=r"by 9 tasks of left"):
        resumed(held_out=("left",), tasks=9)


def test_a_run_that_noted_none_of_it_may_be_measured_by_anything(heldout, resumed, tmp_path):
    """As one of an early version."""
    noted = resumed(heldout=(heldout.directory,), held_out=("kept",))
    del (
        noted["config"]["aids"]["retention"],
        noted["inputs"]["held-out tasks of kept"],
        noted["sessions"][0]["settings"],
    )
    write_json(tmp_path / "run" / "run.json", noted)
    assert len(resumed(heldout=(heldout.directory,), held_out=("kept",), documents=3, tasks=3)["sessions"]) == 2


def test_what_the_last_session_had_always_passes(heldout, resumed, tmp_path):
    """Earlier versions let a session read another number of documents."""
    first = resumed(heldout=(heldout.directory,), documents=12)
    second = json.loads(json.dumps(first))
    for noted in (second["config"]["aids"]["retention"], second["sessions"][0]["settings"]["retention"]):
        noted["documents"] = 50
    second["sessions"] = first["sessions"] + second["sessions"]
    write_json(tmp_path / "run" / "run.json", second)
    resumed(heldout=(heldout.directory,), documents=50)
    resumed(documents=3)
    with pytest.raises(RunError, match="documents is 12, but was 50"):
        resumed(heldout=(heldout.directory,), documents=12)
    resumed(heldout=(heldout.directory,), documents=50)


def test_a_setting_that_came_after_the_run_began_was_as_by_default(heldout, resumed, tmp_path):
    noted = resumed(heldout=(heldout.directory,), world=Path("one"))
    retention = [noted["config"]["aids"]["retention"], *(one["settings"]["retention"] for one in noted["sessions"])]
    for one in retention:
        del one["length"], one["skills"]["thinking_facts"]
    write_json(tmp_path / "run" / "run.json", noted)
    with pytest.raises(RunError, match=r"retention.length is 64, but was 256"):
        resumed(heldout=(heldout.directory,), length=64)
    with pytest.raises(RunError, match=r"skills.thinking_facts is True, but was False"):
        resumed(world=Path("one"), skills=SkillsConfig(thinking_facts=True))
    resumed(heldout=(heldout.directory,), world=Path("one"))


def test_what_was_asked_for_and_not_measured_binds_nobody(heldout, resumed, tmp_path):
    more = {"heldout": (heldout.directory,), "world": Path("one"), "held_out": ("kept",)}
    resumed(**more, tasks=6400, documents=1, skills=SkillsConfig(sums=9), stopped=True)
    resumed(**(more | {"world": Path("two")}), tasks=64, documents=5, stopped=True)
    resumed(**more, tasks=4, documents=7)
    for other in ({"tasks": 64}, {"documents": 5}, {"world": Path("two")}, {"skills": SkillsConfig(sums=9)}):
        with pytest.raises(RunError, match="before, and the values would be compared"):
            resumed(**({**more, "tasks": 4, "documents": 7} | other))
    unscored = {"step": 1, "retention/away/unscored": 1.0}
    resumed(held_out=("away",), tasks=3, stopped=True)
    RunDirectory.open(tmp_path / "run").append("metrics", unscored)
    with pytest.raises(RunError, match="by 4 tasks of away, but it was measured by 3 tasks"):
        resumed(held_out=("away",), tasks=4)


def test_what_was_measured_of_the_finished_model_alone_binds_too(resumed, tmp_path):
    resumed()
    resumed(held_out=("late",), tasks=4, stopped=True)
    write_json(tmp_path / "run" / "retention.json", {"version": 1, "retention/late/reward": 0.5})
    with pytest.raises(RunError, match="by 9 tasks of late"):
        resumed(held_out=("late",), tasks=9)


def test_tasks_of_which_different_numbers_were_played_are_not_measured_together(resumed):
    resumed(held_out=("a",), tasks=4)
    resumed(held_out=("b",), tasks=9)
    for tasks in (4, 9):
        with pytest.raises(RunError, match=r"measured by 4 tasks of a and 9 tasks of b before.* only .* of one number"):
            resumed(held_out=("a", "b"), tasks=tasks)
    resumed(held_out=("a", "new"), tasks=4)
    resumed(held_out=("b",), tasks=9)


def test_two_held_out_environments_of_one_name_are_refused(resumed, tmp_path):
    with pytest.raises(ConfigError, match="2 held-out environments are called 'kept'"):
        resumed(held_out=("kept", "other", "kept"))
    assert not (tmp_path / "run").exists()
