"""`glm5 train`: stages from flags, resume and replay from the run directory, the proof, and what it refuses.

Beside the other tests of training, because it needs their tiny model and corpus.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import StopAt, pretrain_config

from glm5.cli.main import main
from glm5.cli.train_flags import data, phase, share, warmup
from glm5.cli.train_record import in_flags
from glm5.data import BatchWarmup, Share
from glm5.train import Phase, RunDirectory, pretrain
from glm5.train.midtrain import Phases
from glm5.train.recorded import RunChanged
from glm5.train.verify_resume import Verdict, state_sha256


@pytest.fixture
def flags(tiny, tmp_path, straight):
    """Flags of a short mid-training run."""
    root, _ = tiny
    return [
        "midtrain", "--parent", str(straight.path), "--train-data", f"{root / 'train'}:3", f"{root / 'heldout'}:1",
        "--heldout-data", str(root / "heldout"), "--heldout-documents", "2", "--phases", "32:2:2", "48:2:2",
        "--mtp-steps", "1", "--loop.steps", "4", "--loop.checkpoint-every", "2", "--out", str(tmp_path / "run"),
    ]  # fmt: skip


def test_a_stage_from_flags_and_its_result(flags, tmp_path, capsys):
    assert main(["train", *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["stage"] == "midtrain" and result["last_step"]["step"] == 3 and result["bits_per_byte"] > 1
    config = RunDirectory.open(tmp_path / "run").description["config"]
    assert [share["weight"] for share in config["train_data"]] == [3.0, 1.0]
    assert [(phase["length"], phase["rows"], phase["steps"]) for phase in config["phases"]] == [(32, 2, 2), (48, 2, 2)]


def test_pretrain_from_flags(tiny, tmp_path):
    root, config = tiny
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape/config.json").write_text(json.dumps(config.to_dict()))
    arguments = [
        "--model", str(tmp_path / "shape"), "--tokenizer", str(root / "tokenizer"), "--train-data", str(root / "train"),
        "--heldout-data", str(root / "heldout"), "--rows", "4", "--length", "32", "--warmup", "2:2",
        "--loop.steps", "3", "--out", str(tmp_path / "run"), "--loop.optimizer.lr", "1e-3",
    ]  # fmt: skip
    assert main(["train", "pretrain", *arguments]) == 0
    run = RunDirectory.open(tmp_path / "run")
    assert [line["tokens"] for line in run.read("metrics")] == [64, 64, 128]
    assert run.description["config"]["loop"]["optimizer"]["lr"] == 1e-3


def test_resume_and_replay_need_no_flags(flags, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        StopAt(patch, 2, Phases)
        assert main(["train", *flags]) == 130
    out = str(tmp_path / "run")
    assert f"all is saved in {out}. `glm5 train --resume --out {out}` goes on." in capsys.readouterr().err
    assert main(["train", "--resume", "--out", out]) == 0
    capsys.readouterr()
    assert main(["train", "--out", out, "--replay-step", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] and found["restored"] == 3 and len(found["texts"]) == 2
    assert found["values"]["loss"] == found["recorded"]["loss"]
    assert main(["train", "--out", out, "--replay-step", "0"]) == 0
    assert "Equal to metrics.jsonl, to the bit." in capsys.readouterr().out


def test_a_replay_that_differs_says_so(flags, tmp_path, capsys):
    assert main(["train", *flags]) == 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[1]["loss"] += 1e-6
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["train", "--out", str(tmp_path / "run"), "--replay-step", "1"]) == 1
    assert "NOT equal to metrics.jsonl" in capsys.readouterr().out


def test_the_proof_in_short(flags, tmp_path, capsys):
    """Two kills; `make soak` and docs/results/kill_resume.md have the long form."""
    assert main(["train", *flags, "--verify-resume", "--verify-steps", "4", "--verify-kills", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] and len(found["kills"]) == 2 and not all(kill["finished"] for kill in found["kills"])
    assert {"metrics.jsonl", "evaluation.json", "last checkpoint: weights"} <= found["whole"].keys()
    assert any(name.startswith("model/model-") for name in found["whole"])


def test_a_difference_is_found():
    a, b = ({"w": torch.tensor([1.0, value])} for value in (2.0, 2.0000002))
    assert state_sha256(a) != state_sha256(b) == state_sha256({"w": torch.tensor([1.0, 2.0000002])})
    assert state_sha256({"w": torch.zeros(2)}) != state_sha256({"w": torch.zeros(1, 2)})
    verdict = Verdict((), {"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"})
    assert not verdict.equal and verdict.differences == ("b", "c")


def test_short_forms():
    assert share("a/b:0.3") == Share(path=Path("a/b"), weight=0.3)
    assert share("C:data").weight == 1.0
    assert data(["x"]) == Path("x") and len(data(["x", "y:2"])) == 2
    assert phase("512:4:60") == Phase(length=512, rows=4, steps=60)
    assert warmup("2:10") == BatchWarmup(start=2, steps=10) and warmup("2:10:4").multiple == 4
    for wrong in ("512:4", "512:4:x"):
        with pytest.raises(ValueError, match="whole numbers"):
            phase(wrong)


def test_refusals(flags, tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path)]) == 1
    assert "has no run.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "pretrian", "--out", "x"])
    assert "pretrain" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", *flags, "--rope-thetta", "3"])
    assert "--rope-theta" in capsys.readouterr().err
    assert main(["train", *flags]) == 0
    assert main(["train", "--out", str(tmp_path / "run")]) == 1
    assert "say what to do" in capsys.readouterr().err
    assert main(["train", "--out", str(tmp_path / "run"), "--replay-step", "4"]) == 1
    assert "has the steps 0 to 3; step 4 is none of them" in capsys.readouterr().err


def test_a_difference_is_refused_by_the_name_of_its_flag(flags, tiny, straight, tmp_path, capsys):
    root, out, parent = tiny[0], tmp_path / "run", tmp_path / "parent"
    shutil.copytree(straight.model_directory, parent)
    flags = [*flags, "--parent", str(parent)]
    assert main(["train", *flags]) == 0
    before = (out / "run.json").read_bytes()
    first, other = root / "train", root / "heldout"
    for more, says in (
        (["--mtp-steps", "2"], f"--mtp-steps is 2, but {out} was started with 1; "),
        (["--loop.optimizer.betas", "0.8", "0.9"], "--loop.optimizer.betas is 0.8 0.9, but "),
        (["--phases", "32:2:2", "48:1:2"], f"--phases is 32:2:2 48:1:2, but {out} was started with 32:2:2 48:2:2; "),
        (["--train-data", f"{first}:1", f"{other}:1"],
         f" is {first}:1.0 {other}:1.0, but {out} was started with {first}:3.0"),
        (["--train-data", str(first)], f"--train-data is {first}, but {out} was started with {first}:3.0 {other}:"),
        (["--parent", str(straight.path), "--loop.steps", "3", "--phases", "32:2:1", "48:2:2"],
         f"--loop.steps is 3, but {out} was started with 4 and has made 4 already; "),
        (["--heldout-data", str(first)], f"--heldout-data is {first} (its hash begins with "),
    ):  # fmt: skip
        assert main(["train", *flags, *more, "--resume"]) == 1
        said = capsys.readouterr().err
        assert says in said, said
        assert f"`glm5 train --resume --out {out}` goes on as it was, or start a new run in another --out." in said
    sft = ["--parent", str(parent), "--train-data", str(root / "chat"), "--out", str(out), "--resume"]
    assert main(["train", "sft", *sft]) == 1
    assert f"{out} is a run of midtrain, not of sft; start this one in another --out." in capsys.readouterr().err
    (parent / "more.txt").write_text("more")
    for arguments in (flags, ["--out", str(out)]):
        assert main(["train", *arguments, "--resume"]) == 1
        assert f"--parent: what {parent} holds has changed since {out} was started" in capsys.readouterr().err
    assert (out / "run.json").read_bytes() == before
    (parent / "more.txt").unlink()
    assert main(["train", *flags, "--prompts", "river", "--loop.checkpoint-every", "3", "--resume"]) == 0


def test_a_setting_of_several_parts_is_one_flag(tiny, straight):
    config = pretrain_config(tiny)
    other = dataclasses.replace(config.model, rms_norm_eps=0.5)
    for changed, says in (
        (
            dataclasses.replace(config, warmup=BatchWarmup(start=1, steps=2)),
            "--warmup is 1:2, but {} was started with None",
        ),
        (dataclasses.replace(config, model=other), "--model is a model with a rms_norm_eps of 0.5, but {}"),
    ):
        with pytest.raises(RunChanged) as refused:
            pretrain(changed, straight.path, resume=True)
        assert str(in_flags(refused.value, changed)).startswith(says.format(straight.path))
