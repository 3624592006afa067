"""Corpora: what is taken, what is left out, and one sentence for what cannot be read."""

import hashlib
import inspect
import io
import json
import sys
import sysconfig
from pathlib import Path

import pytest

from tinygrad_llm.data import END_OF_TEXT, corpora


@pytest.fixture(scope="module", params=corpora.names())
def corpus(request: pytest.FixtureRequest) -> corpora.Corpus:
    return corpora.load(request.param)


@pytest.fixture
def stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that Python believes to hold its standard library."""
    real = sysconfig.get_path

    def get_path(name: str, *args, **kwargs):
        return str(tmp_path / "lib") if name == "stdlib" else real(name, *args, **kwargs)

    monkeypatch.setattr(sysconfig, "get_path", get_path)
    return tmp_path / "lib"


def write(folder: Path, **files: str | bytes) -> None:
    """write(lib, json__decoder="…") writes lib/json/decoder.py."""
    for name, content in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


# --- on this machine's own standard library -------------------------------------------------------


def test_built_in_corpus_is_whole_and_honest(corpus: corpora.Corpus):
    assert len(corpus.text) > 500_000
    assert len(corpus.documents) > 100
    assert corpus.text.split(END_OF_TEXT) == corpus.documents
    assert corpus.sha256 == hashlib.sha256(corpus.text.encode("utf-8")).hexdigest()


def test_documents_are_distinct_stripped_and_not_empty(corpus: corpora.Corpus):
    assert len(set(corpus.documents)) == len(corpus.documents)
    assert all(document and document == document.strip() for document in corpus.documents)


def test_documents_stand_in_the_order_of_their_hash(corpus: corpora.Corpus):
    hashes = [hashlib.sha256(document.encode()).digest() for document in corpus.documents]
    assert hashes == sorted(hashes)


def test_python_docs_has_reference_and_docstrings_without_importing_them():
    before = set(sys.modules)
    documents = corpora.load("python-docs").documents
    assert set(sys.modules) == before
    assert inspect.cleandoc(json.dumps.__doc__ or "").strip() in documents
    topics = pytest.importorskip("pydoc_data.topics").topics
    assert topics["assert"].strip() in documents


# --- on a standard library made for the test ------------------------------------------------------


DEEP = '''
"""Module."""
if True:
    class A:
        """Class.

        Indented.
        """
        async def f(self):
            """Coroutine."""
try:
    pass
except E:
    def g():
        """Fallback."""
match x:
    case 1:
        def h():
            """Case."""
'''


def test_docstrings_of_every_depth_once_each(stdlib: Path):
    write(stdlib, json=DEEP, csv='"""Module."""\ndef f():\n    "One line."\n\nf("not one")\n')
    documents = corpora.load("python-docs").documents
    expected = ["Module.", "Class.\n\nIndented.", "Coroutine.", "Fallback.", "Case.", "One line."]
    assert sorted(documents) == sorted(expected)


def test_topics_are_read_as_a_literal(stdlib: Path):
    write(
        stdlib, pydoc_data__topics="# made by Sphinx\ntopics = {'assert': 'A\\n*\\n', 'if': 'I'}\n"
    )
    assert sorted(corpora.load("python-docs").documents) == ["A\n*", "I"]


def test_what_is_not_the_languages_own_is_left_out(stdlib: Path):
    write(
        stdlib,
        json__decoder="decoder = 1",
        json__test__test_decoder="left = 1",
        unittest__tests__a="left = 2",
        test__regrtest="left = 3",
        idlelib__run="left = 4",
        encodings__cp037="left = 5",
        sitecustomize="left = 7",
        _sysconfigdata__linux_x="left = 8",
    )
    write(stdlib / "site-packages", json="left = 6", numpy__core="left = 9")
    assert corpora.load("python-code").documents == ["decoder = 1"]


def test_files_that_cannot_be_read_are_skipped(stdlib: Path):
    write(
        stdlib,
        json='"""Whole."""',
        csv=b'"""not UTF-8: \xff"""',
        ast=b'# coding: no-such-codec\n"""Unknown coding."""',
        abc='# coding: latin-1\n"""Gruß."""'.encode("latin-1"),
        cmd='"""Not Python."""\nclass:',
        bdb='"""A NUL."""\0',
        bz2='"""A lone surrogate: \\ud800"""',
        cmath='"""An invalid escape: \\d"""',
        dis="",
    )
    documents = corpora.load("python-docs").documents
    assert sorted(documents) == sorted(["Whole.", "Gruß.", "An invalid escape: \\d"])


def test_result_does_not_depend_on_the_order_of_the_files(
    stdlib: Path, monkeypatch: pytest.MonkeyPatch
):
    write(
        stdlib, **{name: f"{name} = 1" for name in ("json", "csv", "ast", "abc", "re__x", "re__y")}
    )
    once = corpora.load("python-code")
    files = corpora._files
    monkeypatch.setattr(corpora, "_files", lambda lib: reversed(list(files(lib))))
    again = corpora.load("python-code")
    assert once.documents == again.documents
    assert len(once.documents) == 6
    assert once.sha256 == again.sha256


@pytest.mark.parametrize("name", corpora.names())
@pytest.mark.parametrize("folder_exists", [True, False])
def test_python_without_source_gives_one_sentence(stdlib: Path, name: str, folder_exists: bool):
    if folder_exists:
        stdlib.mkdir()
        (stdlib / "json.pyc").write_bytes(b"\0")
    with pytest.raises(FileNotFoundError, match=f"corpus '{name}' is made from the source") as info:
        corpora.load(name)
    assert "\n" not in str(info.value)


# --- files of one's own ---------------------------------------------------------------------------


def test_load_text_takes_a_name_or_a_path(stdlib: Path, tmp_path: Path):
    write(stdlib, json="x = 1")
    assert corpora.load_text("python-code") == corpora.load("python-code")
    file = tmp_path / "own.txt"
    file.write_bytes("Ein Text,\r\nzwei Zeilen. 中文 🎉\n".encode())
    for source in (str(file), file):
        corpus = corpora.load_text(source)
        assert corpus.text == "Ein Text,\r\nzwei Zeilen. 中文 🎉\n"
        assert corpus.documents == [corpus.text]
        assert corpus.name == str(file)
        assert corpus.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_path_wins_over_a_name_when_it_is_written_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "python-docs").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert corpora.load_text("./python-docs").text == "mine"
    assert corpora.load_text(Path("python-docs")).text == "mine"


def test_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "own.txt").write_text("mine")
    assert corpora.load_text("~/own.txt").text == "mine"


def test_marks_in_a_file_separate_documents_and_stay_in_its_text(tmp_path: Path):
    file = tmp_path / "own.txt"
    file.write_text("one\n<|endoftext|>\ntwo<|endoftext|>", newline="")
    corpus = corpora.load_text(file)
    assert corpus.documents == ["one\n", "\ntwo", ""]
    assert corpus.text == "one\n<|endoftext|>\ntwo<|endoftext|>"


def test_byte_order_mark_is_not_text(tmp_path: Path):
    file = tmp_path / "own.txt"
    file.write_bytes(b"\xef\xbb\xbftext")
    assert corpora.load_text(file).text == "text"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "holds no text"),
        (b" \n\t\n", "holds no text"),
        (b"abc\xffdef", r"not UTF-8 text \(byte 0xff at position 3\)"),
        ("text".encode("utf-16"), r"not UTF-8 text \(byte 0x.. at position 0\)"),
        (b"cut \xe4\xb8", r"not UTF-8 text \(byte 0xe4 at position 4\)"),
    ],
)
def test_what_is_not_text_is_refused(tmp_path: Path, content: bytes, sentence: str):
    file = tmp_path / "own.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as info:
        corpora.load_text(file)
    assert "own.txt" in str(info.value)


def test_what_files_reads_becomes_a_corpus(tmp_path: Path):
    (tmp_path / "b.txt").write_text("two<|endoftext|>three")
    (tmp_path / "a.md").write_text("one")
    corpus = corpora.load_text(str(tmp_path))
    assert corpus == corpora.Corpus(str(tmp_path), ["one", "two", "three"])
    (tmp_path / "web.jsonl").write_text('{"body": "four"}\n{"body": "five"}\n')
    assert corpora.load_text(f"{tmp_path}/web.jsonl:body").text == "four<|endoftext|>five"


def test_standard_input_is_read_only_where_once_will_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("中文\n".encode())))
    with pytest.raises(ValueError, match=r"standard input can be read only once, .* resumed"):
        corpora.load_text("-")
    assert corpora.load_text("-", once=True) == corpora.Corpus("standard input", ["中文\n"])


@pytest.mark.parametrize("misspelt", ["python-doc", "pyton-docs", "PYTHON-DOCS", "python_docs"])
def test_a_misspelt_corpus_is_recognised(misspelt: str):
    with pytest.raises(FileNotFoundError, match=r"did you mean 'python-docs'\?"):
        corpora.load_text(misspelt)
    with pytest.raises(ValueError, match=r"did you mean 'python-docs'\?"):
        corpora.load(misspelt)


def test_a_missing_file_is_not_taken_for_a_misspelt_corpus():
    with pytest.raises(FileNotFoundError, match=r"no file 'shakespeare\.txt'") as info:
        corpora.load_text("shakespeare.txt")
    assert "did you mean" not in str(info.value)
