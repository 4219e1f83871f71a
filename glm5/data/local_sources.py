"""Text that lies on this machine: folders of files, JSON lines (also .gz and .zst), Parquet, Hugging Face `datasets`.

Every one is read as a stream and in a fixed order. A file or a line that cannot be read is yielded as `Broken`, with
the sentence that a user should see; what becomes of it is the caller's decision. Text that is not UTF-8 is read with
replacement characters, which `glm5.data.cleaning` counts. Left out: HTML and PDF (convert them first), archives.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import importlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from glm5.data.raw import PIECE, Broken, Raw, Reading
from glm5.data.sources import LOCAL, Source
from glm5.errors import DataError
from glm5.files import sha256_of

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".pyi", ".c", ".h", ".cpp", ".js", ".ts", ".go", ".rs", ".java", ".sh")
PARQUET_ROWS = 256
"""Rows that are held at a time."""


def folder(path: Path, *, name: str, licence: str, suffixes: Sequence[str] = TEXT_SUFFIXES) -> Source:
    """Every file under `path` (or the file itself) with one of these endings is a document; hidden ones are not."""

    def read() -> Reading:
        if not path.exists():
            raise DataError(f"there is no file or folder {path}; check the path.")
        if path.is_file():
            files = [path]
        else:
            inside = (file for file in path.rglob("*") if not file.is_dir() and file.suffix in suffixes)
            files = sorted(f for f in inside if not any(p.startswith(".") for p in f.relative_to(path).parts))
        if not files:
            raise DataError(f"{path} holds no file that ends in {', '.join(suffixes)}; name other endings or a folder.")
        for file in files:
            label = file.name if path.is_file() else file.relative_to(path).as_posix()
            try:
                digest = sha256_of(file)
                with open(file, "rb") as opened:
                    yield Raw(label, decoded(opened), digest)
            except OSError as error:
                yield Broken(label, f"{file} cannot be read ({error.strerror}); mend it or move it away.")

    return Source(name, LOCAL, licence, read)


def decoded(file: IO[bytes]) -> Iterator[str]:
    """The text of a binary file in pieces: UTF-16 with its mark, else UTF-8 with U+FFFD for what is none."""
    start = file.read(4)
    file.seek(0)
    utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = io.TextIOWrapper(file, "utf-16" if utf16 else "utf-8-sig", errors="replace")
    try:
        while piece := text.read(PIECE):
            yield piece
    except OSError as error:  # while a caller reads on, so not the caller's `except`
        raise DataError(f"{file.name} cannot be read to its end ({error.strerror}); mend or remove it.") from None


def json_lines(path: Path, *, name: str, licence: str, field: str = "text", licence_field: str | None = None) -> Source:
    """One JSON object a line, its text under `field`. `path`: a file, or a folder of .jsonl, .jsonl.gz, .jsonl.zst."""

    def read() -> Reading:
        for file in files_of(path, (".jsonl", ".jsonl.gz", ".jsonl.zst")):
            try:
                for number, line in enumerate(lines_of(file), 1):
                    if line.strip():
                        yield json_document(line, f"{file.name}:{number}", field, licence_field)
            except (OSError, EOFError, zlib.error) as error:
                yield Broken(file.name, f"{file} cannot be read to its end ({error}); fetch it again or move it away.")

    return Source(name, LOCAL, licence, read)


def lines_of(file: Path) -> Iterator[bytes]:
    """The lines of a file, decompressed where its name says so. Raises OSError, EOFError or zlib.error for damage."""
    if file.suffix == ".zst":
        yield from split_lines(zstandard_pieces(file))
        return
    with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as opened:
        yield from opened


def zstandard_pieces(file: Path) -> Iterator[bytes]:
    """The decompressed bytes of a .zst file; raises OSError for a damaged one, EOFError for one that was cut short."""
    zstandard = library("zstandard", f"to read {file}")
    state, ended = zstandard.ZstdDecompressor().decompressobj(), True
    with open(file, "rb") as opened:
        while piece := opened.read(PIECE):
            while piece:
                try:
                    yield state.decompress(piece)
                except zstandard.ZstdError as error:
                    raise OSError(str(error)) from None
                piece, ended = state.unused_data, state.eof
                if ended:  # a file may hold several frames
                    state = zstandard.ZstdDecompressor().decompressobj()
    if not ended:
        raise EOFError("it ends in the middle")


def split_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Lines, with their ends, of bytes that come in pieces."""
    held: list[bytes] = []
    for piece in pieces:
        for line in io.BytesIO(piece):
            held.append(line)
            if line.endswith(b"\n"):
                yield b"".join(held)
                held.clear()
    if held:
        yield b"".join(held)


def json_document(line: bytes, label: str, field: str, licence_field: str | None) -> Raw | Broken:
    """The document of one line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # bytes that are not UTF-8 are a ValueError too
        return Broken(label, f"{label} is not a line of JSON; mend or remove the line.")
    if not isinstance(record, dict):
        return Broken(label, f"{label} is not a JSON object; mend or remove the line.")
    return record_document(record, label, field, licence_field)


def record_document(record: dict[str, Any], label: str, field: str, licence_field: str | None) -> Raw | Broken:
    """The document of one record with named fields."""
    text = record.get(field)
    if not isinstance(text, str):
        problem = f"no text in {field!r}" if field in record else f"no field {field!r}"
        return Broken(
            label, f"{label} has {problem} (it has {', '.join(map(repr, record)) or 'none'}); name the field."
        )
    text = text.encode("utf-8", "replace").decode()  # JSON may hold half of a surrogate pair
    digest = hashlib.sha256(text.encode()).hexdigest()
    licence = record.get(licence_field) if licence_field else None
    return Raw(label, text, digest, str(licence) if licence else None)


def parquet(path: Path, *, name: str, licence: str, field: str = "text", licence_field: str | None = None) -> Source:
    """One row a document, its text in column `field`; only the named columns are read, a few hundred rows at a time."""

    def read() -> Reading:
        pq = library("pyarrow.parquet", f"to read {path}", install="pyarrow")
        arrow = importlib.import_module("pyarrow")
        for file in files_of(path, (".parquet",)):
            try:
                table = pq.ParquetFile(file)
                names = table.schema_arrow.names
                wanted = [column for column in (field, licence_field) if column]
                for column in wanted:
                    if column not in names:
                        has = ", ".join(map(repr, names))
                        raise DataError(f"{file} has no column {column!r} (it has {has}); name the field.")
                row = 0
                for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=wanted):
                    for record in batch.to_pylist():
                        yield record_document(record, f"{file.name}:{row}", field, licence_field)
                        row += 1
            except (OSError, arrow.ArrowException) as error:
                reason = str(error).splitlines()[0]
                yield Broken(file.name, f"{file} cannot be read as Parquet ({reason}); fetch it again or move it away.")

    return Source(name, LOCAL, licence, read)


def hugging_face(
    path: str, *, name: str, licence: str, field: str = "text", licence_field: str | None = None,
    split: str = "train", subset: str | None = None,
) -> Source:  # fmt: skip
    """A dataset of the `datasets` library: a directory of `save_to_disk`, or anything that `load_dataset` takes.

    Names are streamed. The library decides about network and cache (`HF_HUB_OFFLINE=1` keeps it off the network).
    """

    def read() -> Reading:
        datasets = library("datasets", f"to read {path}")
        try:
            if (Path(path) / "state.json").is_file():
                records: Iterable[Any] = datasets.load_from_disk(path)
            elif (Path(path) / "dataset_dict.json").is_file():
                records = datasets.load_from_disk(path)[split]
            else:
                records = datasets.load_dataset(path, subset, split=split, streaming=True)
            for row, record in enumerate(records):
                yield record_document(record, f"{split}:{row}", field, licence_field)
        except Exception as error:  # the library raises many kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"`datasets` cannot read {path!r}, split {split!r} ({reason}); check both names.") from None

    return Source(name, LOCAL, licence, read)


def files_of(path: Path, endings: Sequence[str]) -> list[Path]:
    """The file itself, or the files of a folder with one of these endings, in the order of their names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"there is no file or folder {path}; check the path.")
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(tuple(endings)))
    if not found:
        raise DataError(f"{path} holds no file that ends in {', '.join(endings)}; give another folder.")
    return found


def library(module: str, purpose: str, install: str | None = None) -> Any:
    """An optional library. Raises DataError that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{install or module} is not installed {purpose}; pip install {install or module}.") from None
