"""Corpora: nothing lost, nothing twice, the split, the manifest, and what is refused."""

import hashlib
import json

import pytest
from toy_corpus import sentences, source

from glm5.data import build_corpus, open_corpus
from glm5.data.sources import docstrings, installed_sources, king_james_bible, python_reference
from glm5.errors import DataError


def test_every_document_is_in_exactly_one_split(corpus):
    train, heldout = (list(corpus.texts(split)) for split in ("train", "heldout"))
    assert sorted(train + heldout) == sorted(text for _, text in sentences(300))
    assert 0 < len(heldout) < 80
    for document in corpus.documents("heldout"):
        assert hashlib.sha256(document.text.encode()).hexdigest() == document.sha256


def test_duplicates_are_kept_once_and_counted(tmp_path):
    texts = [("a", "one"), ("b", "two"), ("c", "one"), ("d", "   ")]
    corpus = build_corpus(tmp_path / "c", [source("x", texts), source("y", texts)], heldout_per_thousand=500)
    assert sorted([*corpus.texts("train"), *corpus.texts("heldout")]) == ["one", "two"]
    first, second = ({k: v["documents"] for k, v in s["dropped"].items()} for s in corpus.manifest["sources"])
    assert first == {"duplicate": 1, "empty": 1} and second == {"duplicate": 3, "empty": 1}
    assert corpus.manifest["sources"][0]["dropped"]["duplicate"]["examples"] == ["c"]


def test_the_manifest_names_the_origin_and_the_hash(corpus):
    (entry,) = corpus.manifest["sources"]
    digest = hashlib.sha256("".join(text for _, text in sentences(300)).encode()).hexdigest()
    assert entry["sha256"] == digest and entry["licence"] == "CC0-1.0" and entry["documents"] == 300


def test_adding_a_source_moves_no_document_between_splits(tmp_path, corpus):
    more = [source(), source("more", [(str(i), f"another text {i}") for i in range(50)])]
    larger = build_corpus(tmp_path / "c", more, heldout_per_thousand=100)
    assert set(corpus.texts("heldout")) <= set(larger.texts("heldout"))
    assert set(corpus.texts("train")) <= set(larger.texts("train"))


def test_an_absent_package_is_noted(tmp_path):
    corpus = build_corpus(tmp_path / "c", [source(), source("ghost", package="no-such-distribution")])
    assert corpus.manifest["skipped_sources"] == ["ghost"]


def test_a_failed_build_leaves_the_old_corpus(tmp_path):
    old = build_corpus(tmp_path / "c", [source()])
    with pytest.raises(DataError, match="source empty is empty"):
        build_corpus(tmp_path / "c", [source("empty", [])])
    assert open_corpus(tmp_path / "c").manifest == old.manifest
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: (d / "train.jsonl").write_text("x"), "train.jsonl does not match"),
        (lambda d: (d / "heldout.jsonl").unlink(), "heldout.jsonl is listed in the manifest but missing"),
        (lambda d: (d / "manifest.json").unlink(), "no manifest.json"),
        (lambda d: (d / "manifest.json").write_text("{"), "not JSON"),
        (lambda d: (d / "manifest.json").write_text(json.dumps({"kind": "cake"})), "does not describe a corpus"),
    ],
)
def test_damage_is_found_before_use(tmp_path, damage, sentence):
    build_corpus(tmp_path / "c", [source()])
    damage(tmp_path / "c")
    with pytest.raises(DataError, match=sentence):
        open_corpus(tmp_path / "c")


def test_docstrings_are_read_once_under_their_dotted_names(tmp_path):
    long = "Words enough to be kept. " * 8
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text(
        f'"""{long}"""\nclass A:\n    def f(self):\n        """{long} More."""\n'
    )
    (tmp_path / "pkg" / "again.py").write_text(f'"""{long}"""\ndef g():\n    """Short."""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    found = dict(docstrings(tmp_path, prefix=("top",), skip={"tests"}))
    assert list(found) == ["top/pkg"]
    assert found["top/pkg"].startswith("top.pkg\nWords") and "\n\ntop.pkg.A.f\nWords" in found["top/pkg"]


def test_the_default_sources_have_real_text():
    installed = [s.name for s in installed_sources() if s.version()]
    assert installed == ["king-james-bible", "python-reference", "python-library", "numpy", "torch"]
    bible = [text for _, text in king_james_bible()]
    assert bible[0].startswith("In the beginning God created") and sum(map(len, bible)) > 4_000_000
    topics = dict(python_reference())
    assert "for" in topics and sum(map(len, topics.values())) > 200_000
