"""`glm5 data build|inspect|verify`: what they print, what they refuse, and that nothing is half-written."""

import json
from pathlib import Path

import pytest
from toy_corpus import sentences, source

from glm5.cli.main import main
from glm5.data import build as build_module
from glm5.data.build import build_data
from glm5.data.recipe import DataRecipe
from glm5.errors import DataError


def recipe(heldout: int = 100) -> DataRecipe:
    return DataRecipe(vocab_size=400, heldout_per_thousand=heldout)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("build") / "out"
    build_data(out, recipe(), sources=[source()])
    return out


def test_the_same_sources_give_the_same_bytes(built, tmp_path):
    again = build_data(tmp_path / "again", recipe(), sources=[source()])
    for file in sorted(path.relative_to(built) for path in built.rglob("*") if path.is_file()):
        assert (built / file).read_bytes() == (again.directory / file).read_bytes(), file


def test_inspect_describes_and_prints_a_step(built, capsys):
    assert main(["data", "inspect", str(built), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sources"][0]["documents"] == 300
    train = found["datasets"]["train"]
    assert sum(line["documents"] for line in train["lengths"]) == train["documents"] > 200
    assert sum(line["tokens"] for line in train["lengths"]) == train["tokens"] == train["learned_tokens"]

    step = ["data", "inspect", str(built), "--step", "2", "--rows", "2", "--length", "40", "--seed", "5"]
    assert main([*step, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 2 and {part["segment"] for part in rows[0]["spans"]} >= {0, 1}
    assert not rows[0]["spans"][0]["learned"]  # the first token of a row is nobody's target
    assert main(step) == 0
    text = capsys.readouterr().out
    assert "step 2, row 1" in text and "--- document 1 of the row" in text and "[[" in text


def test_verify_names_what_is_broken(built, capsys, tmp_path):
    build_data(tmp_path / "out", recipe(), sources=[source()])
    assert main(["data", "verify", str(tmp_path)]) == 0
    assert "broken" not in capsys.readouterr().out
    shard = tmp_path / "out/train/shard-00000.tokens.npy"
    shard.write_bytes(shard.read_bytes()[:-2] + b"xy")
    (tmp_path / "out/heldout/shard-00000.starts.npy").unlink()
    (tmp_path / "out/tokenizer/tokenizer.json").write_text("{}")
    assert main(["data", "verify", str(tmp_path), "--json"]) == 1
    checked = {
        Path(line["directory"]).name: line["problems"] for line in json.loads(capsys.readouterr().out)["checked"]
    }
    assert "shard-00000.tokens.npy does not match" in checked["train"][0]
    assert "shard-00000.starts.npy is listed in the manifest but missing" in checked["heldout"][0]
    assert "tokenizer.json" in checked["out"][0] and not checked["corpus"]


def test_verify_finds_a_dataset_of_another_corpus(tmp_path):
    for name, seed in (("a", 100), ("b", 200)):
        build_data(tmp_path / name, recipe(seed), sources=[source()])
    (tmp_path / "a/corpus").rename(tmp_path / "a/old")
    (tmp_path / "b/corpus").rename(tmp_path / "a/corpus")
    (tmp_path / "a/tokenizer").rename(tmp_path / "a/old_tokenizer")
    (tmp_path / "b/tokenizer").rename(tmp_path / "a/tokenizer")
    from glm5.data.verify import verify

    found = {finding.directory.name: " ".join(finding.problems) for finding in verify(tmp_path / "a")}
    assert "another corpus" in found["train"] and "another tokenizer" in found["heldout"]


def test_an_interrupted_build_leaves_what_was_there(built, tmp_path, monkeypatch):
    out = tmp_path / "out"
    build_data(out, recipe(), sources=[source()])
    before = (out / "manifest.json").read_bytes()

    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "tokenize_corpus", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_data(out, recipe(50), sources=[source()], overwrite=True)
    assert (out / "manifest.json").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["out"]
    build_data(out, recipe(50), sources=[source()], overwrite=True)
    assert (out / "manifest.json").read_bytes() != before


def test_a_taken_directory_is_refused(built, tmp_path):
    with pytest.raises(DataError, match="replace it with --overwrite"):
        build_data(built, sources=[source()])
    (tmp_path / "mine.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="not a data build"):
            build_data(tmp_path, sources=[source()], overwrite=overwrite)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_build_from_flags(tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    for i, (_, text) in enumerate(sentences(90)):
        (tmp_path / f"notes/{i}.md").write_text(text)
    flags = ["--text", str(tmp_path / "notes"), "--licence", "MIT", "--near-duplicates", "0.95", "--longest", "2000"]
    build = ["data", "build", str(tmp_path / "out"), *flags, "--vocab-size", "400", "--heldout-per-thousand", "150"]
    assert main([*build, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sources"][0]["licence"] == "MIT" and found["sources"][0]["documents"] > 60
    assert main([*build, "--overwrite"]) == 0
    text = capsys.readouterr().out
    assert "notes: " in text and "glm5 data inspect" in text


def test_build_from_a_recipe_with_separate_sources(tmp_path, capsys):
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"{name} {text}"}) for _, text in sentences(80)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = [
        {"kind": "jsonl", "path": str(tmp_path / f"{name}.jsonl"), "weight": w} for name, w in (("a", 3), ("b", 1))
    ]
    recipe = {"sources": sources, "separate": True, "vocab_size": 400, "heldout_per_thousand": 150}
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    out = str(tmp_path / "out")
    assert main(["data", "build", out, "--config", str(tmp_path / "r.json")]) == 0
    capsys.readouterr()
    assert main(["data", "inspect", out, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["datasets"]) == {"train/a", "train/b", "heldout"}
    assert main(["data", "inspect", out, "--step", "1", "--rows", "4", "--length", "30", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert sorted(Path(row["dataset"]).name for row in rows) == ["a", "a", "a", "b"]
    words = [f"{out}/train/a:1", f"{out}/train/b:1", "--rows", "6", "--warmup", "2:10", "--length", "30", "--json"]
    assert main(["data", "inspect", *words, "--step", "5"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert sorted(Path(row["dataset"]).name for row in rows) == ["a", "a", "b", "b"]
    assert all(row["spans"][0]["text"] for row in rows)
    assert main(["data", "verify", out]) == 0
    assert main(["data", "build", out, "--config", str(tmp_path / "r.json"), "--vocab-size", "500"]) == 1
    assert "without options of sources" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["build", "{}/out", "--text", "{}/nowhere"], "there is no file or folder"),
        (["build", "{}/out", "--config", "{}/nowhere"], "cannot be read"),
        (["verify", "{}"], "holds no corpus and no dataset"),
        (["inspect", "{}"], "has no manifest.json"),
        (["inspect", "{}", "--step", "-1"], "no step -1"),
        (["inspect", "{}", "{}"], "name one directory to describe"),
        (["inspect", "{}", "--step", "1"], "give its directory with --tokenizer"),
        (["build", "{}/out", "--tokenizer", "{}"], "no tokenizer.json"),
    ],
    ids=" ".join,
)
def test_user_errors_are_one_sentence(arguments, sentence, tmp_path, capsys):
    assert main(["data", *(part.format(tmp_path) for part in arguments)]) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("subverb", "wrong", "near"), [("build", "--vocab-sise", "--vocab-size"),
                                                        ("inspect", "--stepp", "--step")])  # fmt: skip
def test_a_misspelt_option_is_refused(subverb, wrong, near, capsys):
    with pytest.raises(SystemExit):
        main(["data", subverb, "x", wrong, "3"])
    captured = capsys.readouterr()
    assert near in captured.err + captured.out
