"""Folders, JSON lines, Parquet, `datasets`: what is read, in which order, and the sentence for what cannot be."""

import gzip
import hashlib
import json
import sys
import types

import pytest

from glm5.data import local_sources
from glm5.data.local_sources import folder, hugging_face, json_lines, parquet
from glm5.data.raw import PIECE, Broken, Raw, cut_text
from glm5.errors import DataError

NAMED = {"name": "x", "licence": "MIT"}


def read(source) -> list[tuple[str, str]]:
    """(name, text) of everything; a broken thing gives its sentence."""
    found = []
    for item in source.read():
        if isinstance(item, Broken):
            found.append((item.name, item.sentence))
        else:
            found.append((item.name, item.text if isinstance(item.text, str) else "".join(item.text)))
    return found


def test_a_folder_is_read_in_order_by_ending(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b/two.md", "a.txt", "c.rst", "skipped.bin", ".git/hidden.txt", ".hidden.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    assert read(folder(tmp_path, **NAMED)) == [
        ("a.txt", "text of a.txt"), ("b/two.md", "text of b/two.md"), ("c.rst", "text of c.rst"),
    ]  # fmt: skip
    assert read(folder(tmp_path / "skipped.bin", **NAMED)) == [("skipped.bin", "text of skipped.bin")]
    assert [name for name, _ in read(folder(tmp_path, **NAMED, suffixes=(".md",)))] == ["b/two.md"]


def test_the_origin_is_hashed_as_it_lies_there(tmp_path):
    data = "r\u00e9sum\u00e9\r\n".encode("latin-1")
    (tmp_path / "a.txt").write_bytes(data)
    (found,) = folder(tmp_path, **NAMED).read()
    assert isinstance(found, Raw) and found.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("caf\u00e9\r\nx".encode(), "caf\u00e9\nx"),
        (b"\xef\xbb\xbfmark", "mark"),
        ("wide".encode("utf-16"), "wide"),
        (b"caf\xe9 au lait", "caf\ufffd au lait"),
        (b"", ""),
    ],
)
def test_encodings(data, text, tmp_path):
    (tmp_path / "a.txt").write_bytes(data)
    assert read(folder(tmp_path, **NAMED)) == [("a.txt", text)]


def test_a_huge_file_is_read_in_pieces(tmp_path):
    text = "line of a huge file\n" * (PIECE // 5)
    (tmp_path / "huge.txt").write_text(text)
    (found,) = (list(item.text) for item in folder(tmp_path, **NAMED).read())
    assert len(found) > 3 and max(map(len, found)) <= PIECE and "".join(found) == text


@pytest.mark.parametrize("limit", [1000, 2000, 7777])
def test_parts_join_to_the_whole_and_end_with_paragraphs(limit):
    text = "\n\n".join(f"Paragraph {i} " + "word " * (i * 7 % 60) for i in range(400)) + "x" * 5000
    parts = list(cut_text(text, limit))
    assert "".join(parts) == text and max(map(len, parts)) <= limit
    assert sum(part.endswith("\n\n") for part in parts) >= len(parts) - 2 - 5000 // limit
    pieces = [text[i : i + 37] for i in range(0, len(text), 37)]
    assert list(cut_text(pieces, limit)) == parts
    assert list(cut_text("", limit)) == []


def lines() -> bytes:
    records = [{"text": "one", "by": "CC0-1.0"}, {"text": "two \u00e9"}, {"text": "half \ud800 pair"}]
    return "\n".join(json.dumps(record) for record in records).encode() + b"\n\n"


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_json_lines_plain_and_compressed(ending, tmp_path):
    data = lines()
    if ending == "jsonl.gz":
        data = gzip.compress(data)
    elif ending == "jsonl.zst":
        zstandard = pytest.importorskip("zstandard")
        data = zstandard.compress(data[:20]) + zstandard.compress(data[20:])  # two frames, cut within a line
    (tmp_path / f"a.{ending}").write_bytes(data)
    source = json_lines(tmp_path, **NAMED, licence_field="by")
    expected = ["one", "two \u00e9", "half ? pair"]
    assert read(source) == [(f"a.{ending}:{i}", text) for i, text in enumerate(expected, 1)]
    assert [item.licence for item in source.read()] == ["CC0-1.0", None, None]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"{oh no", "a.jsonl:2 is not a line of JSON; mend or remove the line."),
        (b'{"text": "\xff"}', "a.jsonl:2 is not a line of JSON"),
        (b"[" * 100_000, "a.jsonl:2 is not a line of JSON"),
        (b"[1]", "a.jsonl:2 is not a JSON object"),
        (b'{"body": "x", "id": 3}', "a.jsonl:2 has no field 'text' (it has 'body', 'id'); name the field."),
        (b'{"text": 3}', "a.jsonl:2 has no text in 'text'"),
        (b"{}", "a.jsonl:2 has no field 'text' (it has none)"),
    ],
)
def test_a_broken_line_is_named(line, sentence, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "also fine"}')
    fine, broken, also = json_lines(tmp_path / "a.jsonl", **NAMED).read()
    assert isinstance(broken, Broken) and sentence in broken.sentence
    assert (fine.text, also.text) == ("fine", "also fine")


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "scrambled"])
def test_a_damaged_archive_is_named_after_what_could_be_read(ending, damage, tmp_path):
    data = b"".join(b'{"text": "%d %s"}\n' % (i, hashlib.sha256(b"%d" % i).hexdigest().encode()) for i in range(30_000))
    if ending == "gz":
        packed = gzip.compress(data)
    else:
        packed = pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)
    middle = len(packed) // 2
    packed = packed[:middle] if damage == "cut" else packed[:middle] + b"\xff" * 400 + packed[middle + 400 :]
    (tmp_path / f"a.jsonl.{ending}").write_bytes(packed)
    found = list(json_lines(tmp_path, **NAMED).read())
    assert isinstance(found[-1], Broken) and "cannot be read to its end" in found[-1].sentence
    assert sum(isinstance(item, Raw) for item in found) > 100 or ending == "zst"


def test_parquet_reads_the_named_columns_only(tmp_path):
    arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"body": [f"text {i}" for i in range(600)] + [None], "by": ["MIT"] * 601, "n": range(601)})
    pq.write_table(table, tmp_path / "b.parquet")
    source = parquet(tmp_path, **NAMED, field="body", licence_field="by")
    found = read(source)
    assert found[:2] == [("b.parquet:0", "text 0"), ("b.parquet:1", "text 1")] and len(found) == 601
    assert "has no text in 'body'" in found[-1][1]
    with pytest.raises(DataError, match=r"has no column 'text' \(it has 'body', 'by', 'n'\)"):
        read(parquet(tmp_path, **NAMED))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not really PAR1")
    assert "cannot be read as Parquet" in read(source)[-1][1]


def test_datasets_are_read_through_the_library(tmp_path, monkeypatch):
    asked = []

    def load_dataset(path, subset, *, split, streaming):
        asked.append((path, subset, split, streaming))
        if split == "none":
            raise ValueError("no such split\nand more")
        return iter([{"text": "one"}, {"other": "two"}])

    fake = types.SimpleNamespace(load_dataset=load_dataset, load_from_disk=lambda path: [{"text": "from disk"}])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert read(hugging_face("some/name", **NAMED, subset="en"))[0] == ("train:0", "one")
    assert asked == [("some/name", "en", "train", True)]
    assert "has no field 'text'" in read(hugging_face("some/name", **NAMED))[1][1]
    with pytest.raises(DataError, match=r"cannot read 'some/name', split 'none' \(no such split\); check both"):
        read(hugging_face("some/name", **NAMED, split="none"))
    (tmp_path / "state.json").write_text("{}")
    assert read(hugging_face(str(tmp_path), **NAMED)) == [("train:0", "from disk")]


def test_the_real_datasets_library_where_installed(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "saved")
    assert read(hugging_face(str(tmp_path / "saved"), **NAMED)) == [("train:0", "one"), ("train:1", "two")]


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    for make in (folder, json_lines, parquet):
        with pytest.raises(DataError, match=r"there is no file or folder .*nowhere; check the path"):
            list(make(tmp_path / "nowhere", **NAMED).read())
        with pytest.raises(DataError, match="holds no file that ends in"):
            list(make(tmp_path, **NAMED).read())
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (broken,) = folder(tmp_path, **NAMED).read()
    assert "gone.txt cannot be read (No such file or directory); mend it or move it away." in broken.sentence
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(DataError, match=r"zstandard is not installed to read .*; pip install zstandard"):
        list(json_lines(tmp_path, **NAMED).read())


def test_reading_stops_with_a_sentence_when_the_disk_fails(monkeypatch):
    def fail(*args):
        raise OSError(5, "Input/output error")

    stream = types.SimpleNamespace(read=fail)
    monkeypatch.setattr(local_sources.io, "TextIOWrapper", lambda *args, **kwargs: stream)
    file = types.SimpleNamespace(name="a.txt", read=lambda n: b"", seek=lambda n: 0)
    with pytest.raises(DataError, match=r"a.txt cannot be read to its end \(Input/output error\)"):
        list(local_sources.decoded(file))
