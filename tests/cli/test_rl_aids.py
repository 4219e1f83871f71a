"""`glm5 rl` with what a learner may have beside its model: a run with each, its resume and a step of it again."""

import json

import pytest
import torch
from speaker import speaker_model, speaker_tokenizer
from toy_corpus import source

import glm5
from glm5.cli.main import main
from glm5.cli.rl_flags import optional, teacher
from glm5.data import build_corpus, tokenize_corpus
from glm5.data.world import build_world
from glm5.data.world_text import write_world
from glm5.rl.adapters import LoRA
from glm5.rl.aids_config import EVERY
from glm5.rl.reference import KL


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Models, data and a world, by name."""
    root = tmp_path_factory.mktemp("places")
    for name, seed in (("parent", 0), ("math", 1), ("words", 2)):
        glm5.save_model(speaker_model(seed, positions=2048), root / name, speaker_tokenizer())
    corpus = build_corpus(root / "corpus", [source()], heldout_per_thousand=100)
    for split in ("train", "heldout"):
        tokenize_corpus(corpus, split, speaker_tokenizer(), root / split)
    write_world(build_world(), root / "world")
    return root


def rl(places, out, *more):
    """The status of a run of two steps."""
    return main([
        "rl", "--parent", f"{places / 'parent'}", "--env", "gym:spell_backward@2", "--env", "sums", "--out", f"{out}",
        "--steps", "2", "--rollout.max-tokens", "4", "--scheduler.groups-per-batch", "2", "--scheduler.group-size", "2",
        "--checkpoint-every", "1", "--uniform-groups", "keep", "--threads", "1", "--json", *map(str, more),
    ])  # fmt: skip


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def all_aids(places):
    return [
        "--learner.advantages", "none", "--aids.teacher", places / "math", "sums",
        "--aids.teacher", places / "words", "gym:spell_backward",
        "--learner.kl", "coefficient=0.1,estimator=k2", "--aids.reference", places / "math",
        "--aids.replay.data", f"{places / 'train'}:2", "--aids.replay.rows", "2", "--aids.replay.length", "16",
        "--aids.retention.heldout", places / "heldout", "--aids.retention.every", "1",
        "--aids.retention.documents", "2", "--aids.retention.length", "16", "--aids.retention.world", places / "world",
        "--aids.retention.skills.facts", "1", "--aids.retention.skills.sums", "1", "--aids.retention.skills.tools", "1",
        "--aids.retention.skills.unknown", "1", "--aids.retention.skills.max-tokens", "2",
    ]  # fmt: skip


def test_all_aids_take_part_and_a_resumed_run_and_a_step_again_have_the_same(places, tmp_path, capsys):
    run, aids = tmp_path / "run", all_aids(places)
    assert rl(places, run, *aids) == 0
    lines = lines_of(run)
    for line in lines:
        assert line["kl"] > 0 and line["replay"] > 0 and line["grad_norm"] > 0
        assert line["retention/heldout/bits_per_byte"] > 0 and "retention/sums, unseen numbers" in line
    recorded = json.loads((run / "run.json").read_text())
    assert recorded["config"]["aids"]["teachers"][0] == {
        "path": str(places / "math"), "environments": ["sums/train/2"],
    }  # fmt: skip
    assert {"reference", "replay", "heldout heldout", "retention world"} < recorded["inputs"].keys()

    capsys.readouterr()
    alone = ["rl", "--out", f"{run}", "--threads", "1", "--json"]
    assert main([*alone, "--replay-step", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["same"] is True
    unfinish(run)
    assert main([*alone, "--resume"]) == 0
    assert lines_of(run) == lines
    unfinish(run)
    assert rl(places, run, *aids[2:8], "--resume") == 0, "teachers are named again by their short names"
    for flag, value in (("--aids.replay.rows", "3"), ("--aids.teacher", f"{places / 'math'}")):
        for how in (["--resume"], ["--replay-step", "1"]):
            assert main([*alone, *how, flag, value]) == 1
            assert f"{flag} is {value}" in capsys.readouterr().err


def unfinish(run):
    """As if it had been killed after the last checkpoint but one."""
    for path in sorted((run / "model").iterdir()):
        path.unlink()
    (run / "model").rmdir()
    last = max((run / "checkpoints").iterdir(), key=lambda path: path.name)
    for path in last.iterdir():
        path.unlink()
    last.rmdir()


@pytest.mark.parametrize("name", ["math", "parent"])
def test_one_teacher_for_all_has_something_to_say_where_it_differs(places, tmp_path, name):
    flags = ["--learner.advantages", "none", "--learner.distillation.coefficient", "2", "--learner.mtp", "frozen"]
    assert rl(places, tmp_path / "run", *flags, "--aids.teacher", places / name, "--learner.reset-optimizer") == 0
    first = lines_of(tmp_path / "run")[0]
    differs = name != "parent"
    assert (abs(first["teacher_kl"]) > 1e-3) == differs and (first["grad_norm"] > 1e-3) == differs


@pytest.mark.parametrize(
    ("flags", "moves"),
    [
        (["--learner.lora", "rank=2,targets=*.o_proj+*.experts"], {"o_proj", "experts"}),
        (["--learner.freeze", "*.experts.*", "*.o_proj.weight"], None),
    ],
)
def test_adapters_and_frozen_parts(places, tmp_path, flags, moves):
    assert (
        rl(places, tmp_path / "run", "--learner.advantages", "reward", "--aids.teacher", places / "math", *flags) == 0
    )
    before, after = (
        glm5.load_model(d, dtype=torch.float32).state_dict() for d in (places / "parent", tmp_path / "run" / "model")
    )
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    special = {name for name in before if ".o_proj." in name or ".experts." in name}
    if moves is not None:
        assert moved and moved <= special and {part for part in moves if any(part in n for n in moved)} == moves
    else:
        assert moved and not moved & special


def test_optional_settings_are_read_from_a_word():
    assert optional(KL, "on") == KL() and optional(KL, "none") is None
    assert optional(KL, "coefficient=0.5,estimator=k1") == KL(coefficient=0.5, estimator="k1")
    assert optional(LoRA, "rank=2,targets=*.o_proj") == LoRA(rank=2, targets=("*.o_proj",))
    assert teacher(["a"]).environments == (EVERY,) and teacher(["a", "b", "c"]).environments == ("b", "c")
    for kind, text, says in ((KL, "estimator=k9", "k1"), (LoRA, "rank=0", "rank"), (KL, "beta=1", "no setting 'beta'")):
        with pytest.raises(ValueError, match=says):
            optional(kind, text)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--aids.teacher", "math", "sum"],
            "no environment of the run: reasoning-gym/spell",
        ),
        (["--aids.teacher", "math", "sums"], "has no teacher"),
        (["--aids.teacher", "math", "--aids.teacher", "words"], "2 teachers"),
        (["--aids.teacher", "nowhere"], "neither a run nor a model"),
        (["--aids.replay.data", "nowhere"], "nowhere"),
        (["--aids.retention.every", "0"], "every is 0"),
        (["--aids.retention.heldout", "heldout", "corpus/../heldout"], "2 held-out datasets"),
        (["--learner.freeze", "*.expertz.*"], "no parameter is called"),
        (["--learner.freeze", "*"], "Nothing is left to learn"),
        (["--learner.freeze", "*.experts.*", "--learner.lora", "on"], "leave freeze out"),
    ],
)
def test_what_is_refused(places, tmp_path, capsys, monkeypatch, flags, says):
    monkeypatch.chdir(places)
    assert rl(places, tmp_path / "run", *flags) == 1
    assert says in capsys.readouterr().err
