"""Text to train on: built-in corpora that every Python carries with it, and files of one's own.

For the built-in ones nothing is downloaded. The standard library comes with its source, and the
source with two megabytes of careful English; `pydoc_data/topics.py` holds the language reference
itself. `shakespeare` and URLs are fetched once: see `download`.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import hashlib
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import ClassVar

from tinygrad_llm.data import END_OF_TEXT, download, files
from tinygrad_llm.data.files import Part
from tinygrad_llm.data.report import SILENT, Report


@dataclass(frozen=True)
class Corpus:
    """text = documents[0] + '<|endoftext|>' + documents[1] + '<|endoftext|>' + …

    Every tokenizer of ours reads the mark as one token (`Tokenizer.eos_id`), so
    `tokenizer.encode(corpus.text)` knows where a document ends.
    """

    in_memory: ClassVar[bool] = True

    name: str
    documents: list[str]

    def parts(self) -> Iterator[Part]:
        """The documents in parts, as `files.parts`."""
        return files.parts_of(self.documents)

    @cached_property
    def characters(self) -> int:
        """How many the text has."""
        marks = len(END_OF_TEXT) * max(0, len(self.documents) - 1)
        return sum(map(len, self.documents)) + marks

    @cached_property
    def text(self) -> str:
        """All documents with `<|endoftext|>` between them."""
        return END_OF_TEXT.join(self.documents)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the text in UTF-8: report it with a result, for a built-in corpus depends on
        the version of Python."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def names() -> list[str]:
    """The built-in corpora: what `load` knows."""
    return list(_BUILDERS)


def load(name: str) -> Corpus:
    """The built-in corpus of that name.

    `python-docs` (about 2 MB): the language reference of `pydoc_data.topics`, a document per topic,
    and the docstrings of the standard library, a document per docstring.
    `python-code` (about 9 MB): the source of the standard library, a document per file.

    Both leave out tests, IDLE and what pip installed; the code also leaves out the codec tables of
    `encodings` and the topics. Files that cannot be read are skipped. No document comes twice, and
    they stand in the order of their SHA-256: the same on every system, and well mixed, so that the
    tail held out for validation is a fair sample.

    Raises ValueError for an unknown name, FileNotFoundError where Python came without its source.
    """
    if name not in _BUILDERS:
        raise ValueError(f"no built-in corpus {name!r}{_nearest(name)}; there are {_listed()}")
    documents = _distinct(_BUILDERS[name](Path(sysconfig.get_path("stdlib"))))
    if not documents:
        raise FileNotFoundError(
            f"corpus {name!r} is made from the source of the standard library, and this Python has "
            f"none in {sysconfig.get_path('stdlib')}: train on a text file of your own instead"
        )
    return Corpus(name, documents)


@dataclass(frozen=True)
class Module:
    """A module of the standard library: its name ('json.decoder'), its source and its tree."""

    name: str
    source: str
    tree: ast.Module


def modules() -> Iterator[Module]:
    """The modules that `python-code` takes, in the order of the SHA-256 of their names.

    They are read as they are asked for: one is in memory at a time. Raises FileNotFoundError where
    Python came without its source.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    found = {_dotted(path.relative_to(stdlib)): path for path in _files(stdlib)}
    if not found:
        raise FileNotFoundError(
            f"the built-in data are made from the source of the standard library, and this Python "
            f"has none in {stdlib}: give files of your own instead"
        )
    for name in sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest()):
        source = _read(found[name])
        tree = None if source is None else _parse(source)
        if source is not None and tree is not None:
            yield Module(name, source, tree)


def _dotted(path: Path) -> str:
    """'json/decoder.py' -> 'json.decoder', 'json/__init__.py' -> 'json'"""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def load_text(
    source: str | PathLike[str], *, once: bool = False, report: Report = SILENT
) -> Corpus:
    """The built-in corpus called `source`, or else the documents that `files.documents` finds.

    A text file, a folder, a pattern, a .jsonl file (`web.jsonl:body` for another field than
    `text`) or, with `once`, a pipe or `-` for standard input: `files` says how each is read.
    `shakespeare` and a URL are downloaded the first time: see `download`. `./python-docs` is always
    the file. All of the text is then in memory; `texts.open_text` is for larger ones.

    Raises FileNotFoundError where there is nothing of that name, ValueError where it is not text,
    and for standard input without `once`: a run reads its text again when it is resumed.
    """
    name, place = locate(source, report)
    return load(name) if place is None else read(name, place, once=once)


def locate(
    source: str | PathLike[str], report: Report = SILENT
) -> tuple[str, str | PathLike[str] | None]:
    """(name, where `files` finds it); the second is None for a built-in corpus.

    What is on the network is downloaded unless it is in the cache.
    """
    if isinstance(source, str) and source in _BUILDERS:
        return source, None
    remote = download.find(source) if isinstance(source, str) else None
    if remote is not None:
        return str(source), download.fetch(remote, report)
    return "standard input" if source == files.STANDARD_INPUT else str(source), source


def lasting(source: str) -> str:
    """`source` as it will mean the same in whatever folder a run is resumed."""
    if source in _BUILDERS or download.find(source) is not None:
        return source
    return str(Path(source).expanduser().absolute())


def read(name: str, place: str | PathLike[str], *, once: bool = False) -> Corpus:
    """The documents of files, in memory; raises as `load_text`."""
    with _saying_what_there_is(place):
        return Corpus(name, list(files.documents(place, once=once)))


def paths(place: str | PathLike[str]) -> list[Path]:
    """The files of a source; raises as `load_text` where there are none."""
    with _saying_what_there_is(place):
        return files.paths(place)


@contextlib.contextmanager
def _saying_what_there_is(source: str | PathLike[str]) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}, and no built-in corpus of that name{_nearest(str(source))}; there are "
            f"{_listed()}"
        ) from error


def _nearest(name: str) -> str:
    """', did you mean …?' when the name looks like a misspelt corpus."""
    known = [*_BUILDERS, *([] if "." in name else download.PUBLIC)]  # x.txt is meant as a file
    close = difflib.get_close_matches(name.lower(), known)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _listed() -> str:
    return " and ".join(repr(name) for name in names())


def _distinct(documents: Iterable[str]) -> list[str]:
    """The documents, stripped, each once, none empty, in the order of their SHA-256."""
    by_hash: dict[bytes, str] = {}
    for document in documents:
        text = document.strip()
        try:
            digest = hashlib.sha256(text.encode()).digest()
        except UnicodeEncodeError:  # a docstring may spell a lone surrogate, which no file can hold
            continue
        if text:
            by_hash[digest] = text
    return [by_hash[digest] for digest in sorted(by_hash)]


# --- the standard library -------------------------------------------------------------------------


def _docs(stdlib: Path) -> Iterator[str]:
    yield from _topics(stdlib / "pydoc_data" / "topics.py")
    for source in _code(stdlib):
        tree = _parse(source)
        if tree is not None:
            yield from _docstrings(tree)


def _code(stdlib: Path) -> Iterator[str]:
    for path in _files(stdlib):
        source = _read(path)
        if source is not None:
            yield source


_BUILDERS: dict[str, Callable[[Path], Iterator[str]]] = {"python-docs": _docs, "python-code": _code}

_LEFT_OUT = frozenset({"idlelib", "encodings", "pydoc_data"})


def _files(stdlib: Path) -> Iterator[Path]:
    """Every .py file of a module that belongs to the language, tests left out.

    Asking for the modules by name passes over what lies in the same folder and is not Python's:
    site-packages, a distribution's sitecustomize, the build's own paths in _sysconfigdata.
    """
    for name in sys.stdlib_module_names - _LEFT_OUT:
        module, package = stdlib / f"{name}.py", stdlib / name
        if module.is_file():
            yield module
        for path in package.rglob("*.py"):
            if not {"test", "tests"}.intersection(path.relative_to(package).parts):
                yield path


def _read(path: Path) -> str | None:
    """The source in the encoding it declares; None where it cannot be read."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeError):  # SyntaxError: an unknown coding cookie
        return None


def _parse(source: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old escape such as "\d" is not our reader's trouble
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):  # templates that are not Python; a NUL in the source
            return None


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """The docstrings of the module, its classes and its functions, however deep they stand.

    They stand in statements only: not looking into expressions takes half the time of `ast.walk`.
    """
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring is not None:
                yield docstring
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            todo.extend(getattr(node, block, ()))


def _topics(path: Path) -> Iterator[str]:
    """The values of the literal `topics = {'assert': '…', …}`, read without importing it."""
    source = _read(path) if path.is_file() else None
    tree = _parse(source) if source is not None else None
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value
