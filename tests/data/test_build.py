"""Builds from recipes: every kind of source into one corpus, datasets by source, and a sentence for what goes wrong."""

import errno
import json
import re

import numpy as np
import pytest
from toy_corpus import sentences

import glm5.files
from glm5.data import Loader, build_corpus, open_dataset, open_mixture, write_dataset
from glm5.data.build import build_data, shares_of
from glm5.data.preparation import Preparation
from glm5.data.recipe import DataRecipe, SourceSpec, read_recipe
from glm5.data.shards import TokenDocument
from glm5.errors import DataError
from glm5.text import Tokenizer


@pytest.fixture
def folder(tmp_path):
    """A folder of sources of every kind that needs no library, with some duplicates between them."""
    root = tmp_path / "in"
    (root / "notes").mkdir(parents=True)
    texts = [text for _, text in sentences(120)]
    for i, text in enumerate(texts[:40]):
        (root / f"notes/{i:03}.md").write_text(text)
    lines = [json.dumps({"body": text, "id": i}) + "\n" for i, text in enumerate(texts[30:])]
    (root / "mail.jsonl").write_text("".join(lines))
    return root


def recipe(folder, **settings) -> DataRecipe:
    sources = (
        SourceSpec(kind="text", path=str(folder / "notes"), licence="MIT"),
        SourceSpec(kind="jsonl", path=str(folder / "mail.jsonl"), field="body", licence="CC0-1.0"),
    )
    return DataRecipe(sources=sources, heldout_per_thousand=150, vocab_size=400, **settings)


def test_sources_become_one_corpus_with_origins(folder, tmp_path):
    built = build_data(tmp_path / "out", recipe(folder))
    notes, mail = built.manifest["sources"]
    assert (notes["name"], notes["documents"], notes["version"]) == ("notes", 40, "local")
    assert (mail["name"], mail["documents"]) == ("mail", 80)
    assert mail["dropped"] == {"duplicate": {"documents": 10, "examples": [f"mail.jsonl:{i}" for i in (1, 2, 3)]}}
    lines = [json.loads(line) for line in (tmp_path / "out/corpus/train.jsonl").read_text().splitlines()]
    assert {(line["source"], line["licence"]) for line in lines} == {("notes", "MIT"), ("mail", "CC0-1.0")}
    assert all(len(line["origin_sha256"]) == 64 for line in lines)
    assert str(tmp_path) not in json.dumps(built.manifest) + json.dumps(lines)  # no paths of this machine


def test_the_place_of_the_sources_does_not_change_the_bytes(folder, tmp_path):
    build_data(tmp_path / "a", recipe(folder, preparation=Preparation(near_duplicates=0.9)))
    moved = folder.rename(tmp_path / "elsewhere")
    build_data(tmp_path / "b", recipe(moved, preparation=Preparation(near_duplicates=0.9)))
    for file in [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_separate_sources_become_shares(folder, tmp_path):
    spec = recipe(folder, separate=True)
    weighted = [SourceSpec(**{**vars(s), "weight": w}) for s, w in zip(spec.sources, (3.0, 1.0), strict=True)]
    build_data(tmp_path / "even", spec)
    build_data(tmp_path / "out", DataRecipe(**{**vars(spec), "sources": tuple(weighted)}))
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out/tokenizer")
    shares = shares_of(tmp_path / "out")
    assert [(share.path.name, share.weight) for share in shares] == [("notes", 3.0), ("mail", 1.0)]
    loader = Loader(open_mixture(shares, tokenizer), rows=4, length=16, seed=0)
    assert np.bincount([k for k, _ in loader.plan(5)]).tolist() == [3, 1]
    even = shares_of(tmp_path / "even")
    assert [s.weight for s in even] == [open_dataset(s.path).manifest["tokens"] for s in even]
    both = build_data(tmp_path / "one", recipe(folder)).manifest["datasets"]
    assert sum(s.weight for s in even) == both["train"]["tokens"]
    assert [share.path.name for share in shares_of(tmp_path / "one")] == ["train"]


def test_a_recipe_file_is_the_same_recipe(folder, tmp_path):
    file = tmp_path / "recipe.json"
    sources = [{"kind": "text", "path": "notes", "suffixes": [".md"]}, {"kind": "installed", "filtered": False}]
    file.write_text(json.dumps({"sources": sources, "preparation": {"languages": ["en"], "limits": {"min_words": 9}}}))
    found = read_recipe(file)
    assert found.sources[0] == SourceSpec(kind="text", path="notes", suffixes=(".md",))
    assert found.preparation.languages == ("en",) and found.preparation.limits.min_words == 9
    assert len(found.named_sources()) == 6


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object of DataRecipe's fields"),
        ('{"sorces": []}', "has no field 'sorces'. Did you mean 'sources'?"),
        ('{"sources": [{"kind": "text", "pth": "x"}]}', "sources has no field 'pth'. Did you mean 'path'?"),
        ('{"preparation": {"limits": {"min_word": 1}}}', "has no field 'min_word'. Did you mean 'min_words'?"),
        ('{"sources": [{"kind": "csv", "path": "x"}]}', "sources.0.kind: Input should be"),
        ('{"vocab_size": "many"}', "vocab_size: Input should be a valid integer"),
        ('{"sources": [{"kind": "text"}]}', "needs a path"),
        ('{"sources": []}', "name at least one"),
        ('{"sources": [{"kind": "text", "path": "a/x"}, {"kind": "text", "path": "b/x"}]}', "are called 'x'"),
        ('{"sources": [{"kind": "text", "path": "a", "weight": 2}]}', "build with separate"),
        (
            '{"separate": true,"sources": [{"kind": "text", "path": "a", "weight": 2},{"kind": "text", "path": "b"}]}',
            "source 'b' has no weight and others have",
        ),
        ('{"heldout_per_thousand": 0}', "give a number from 1 to 999"),
        ('{"preparation": {"longest": 3}}', "give 1,000 or more"),
    ],
)
def test_a_wrong_recipe_is_refused(value, sentence, tmp_path):
    (tmp_path / "r.json").write_text(value)
    with pytest.raises(DataError, match=re.escape(sentence)):
        read_recipe(tmp_path / "r.json").named_sources()


def text_files(root, texts):
    root.mkdir()
    for i, text in enumerate(texts):
        (root / f"{i}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ([], "holds no file that ends in .txt"),
        ([""] * 5, r"leave no train documents \(dropped: 5 empty\)"),
        (["the same text"] * 30, r"leave no heldout documents \(dropped: 29 duplicate\)|leave no train documents"),
        ([b"\x00\x01binary"] * 3, r"dropped: 3 binary"),
        ([b"\xe9\xe8\xe7 \xe6"] * 2, r"dropped: 2 not_utf8"),
    ],
    ids=["no files", "zero length", "duplicates only", "binary", "not UTF-8"],
)
def test_sources_without_text_leave_the_old_build_alone(texts, sentence, folder, tmp_path):
    out = tmp_path / "out"
    before = build_data(out, recipe(folder)).manifest
    text_files(tmp_path / "bad", texts)
    bad = DataRecipe(sources=(SourceSpec(kind="text", path=str(tmp_path / "bad")),))
    with pytest.raises(DataError, match=sentence):
        build_data(out, bad, overwrite=True)
    assert json.loads((out / "manifest.json").read_text()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "in", "out"]


def test_zero_length_and_huge_documents_beside_good_ones(folder, tmp_path):
    (folder / "notes/empty.txt").write_text("")
    paragraphs = (" ".join(f"w{i * j % 9973}" for j in range(50)) for i in range(1, 600))
    (folder / "notes/huge.txt").write_text("\n\n".join(paragraphs))
    built = build_data(tmp_path / "out", recipe(folder, preparation=Preparation(longest=20_000)))
    notes = built.manifest["sources"][0]
    assert notes["dropped"] == {"empty": {"documents": 1, "examples": ["empty.txt"]}}
    assert notes["cut"] == 1 and notes["documents"] == 40 + 9


@pytest.mark.parametrize("write_number", [1, 4, 9])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(write_number, folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    before = build_data(out, recipe(folder)).manifest
    real, calls = glm5.files.os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) == write_number:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(glm5.files.os, "fsync", fsync)
        with pytest.raises(DataError, match=rf"the disk is full, so {out} was not written; nothing of it is left"):
            build_data(out, recipe(folder), overwrite=True)
    assert json.loads((out / "manifest.json").read_text()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    build_data(out, recipe(folder), overwrite=True)


def test_a_full_disk_while_a_dataset_is_written(tokenizer, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("glm5.data.shards.np.save", full)
    with pytest.raises(DataError, match="the disk is full"):
        write_dataset(tmp_path / "d", [TokenDocument([1, 2, 3], 3)], tokenizer)
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_a_document(tmp_path):
    """A file of 8 MB becomes a corpus in less than its size, however many copies a part needs."""
    import tracemalloc

    block = "".join(f"{i:06d}" + "long" * 60 + "\n" for i in range(1000)) + "\n"
    with open(tmp_path / "huge.txt", "w") as file:
        for i in range(32):
            file.write(block.replace("long", f"log{i}"))
    size = (tmp_path / "huge.txt").stat().st_size
    (tmp_path / "small.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for _, t in sentences(80)))
    files = {"text": tmp_path / "huge.txt", "jsonl": tmp_path / "small.jsonl"}
    sources = [s for kind, path in files.items() for s in SourceSpec(kind=kind, path=str(path)).sources()]
    tracemalloc.start()
    made = build_corpus(tmp_path / "c", sources, preparation=Preparation(longest=200_000), heldout_per_thousand=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.manifest["sources"][0]["bytes"] > 0.95 * size > 7e6
    assert peak < size, peak / size
