"""Files of one's own: what a source means, in which order, and what is no text."""

import io
import itertools
import json
import os
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm.data import END_OF_TEXT, files
from tinygrad_llm.data.files import documents


def read(source: str | Path, *, once: bool = False) -> list[str]:
    return list(documents(source, once=once))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, a fresh one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, content: str | bytes) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def refusal(source: str | Path, kind: type[Exception] = ValueError) -> str:
    """The one sentence with which a source is refused."""
    with pytest.raises(kind) as info:
        read(source, once=True)
    assert "\n" not in str(info.value)
    return str(info.value)


# --- a file ---------------------------------------------------------------------------------------


def test_a_file_is_kept_to_the_letter(here: Path):
    write("own.txt", "\ufeff one\r\n<|endoftext|>\ntwo 中文 🎉<|endoftext|>")
    assert read("own.txt") == [" one\r\n", "\ntwo 中文 🎉", ""]
    assert read(here / "own.txt") == read("own.txt")


@pytest.mark.parametrize("name", ["no suffix", "[old].txt", "a:b.txt", "what?.txt", "x.jsonl:y"])
def test_a_file_of_that_very_name_comes_first(here: Path, name: str):
    write(name, "text")
    assert read(name) == ["text"]


# --- a folder -------------------------------------------------------------------------------------


def test_a_folder_is_read_with_all_below_it_in_order(here: Path):
    write("books/b.txt", "2")
    write("books/a/z.md", "1<|endoftext|>\n<|endoftext|>1a")
    write("books/a.txt", "0")
    write("books/C.TXT", "first")
    write("books/blank.txt", " \n")
    for name in ("d.tex", "e.jsonl", ".hidden.txt", ".git/f.txt", "a/.cache/g.md", "h.txt~"):
        write(f"books/{name}", b"\xff")
    assert read("books") == ["first", "0", "1", "1a", "2"]
    assert read("books/") == read("books")


def test_a_folder_without_text_says_how_to_name_other_files(here: Path):
    write("books/a.jsonl", "{}")
    assert "'books' holds no .txt or .md file; name others by a pattern such as 'books" in refusal(
        "books"
    )
    write("books/a.txt", "")
    assert refusal("books") == "'books' holds no text"


def test_a_file_in_a_folder_that_is_not_text_is_named(here: Path):
    write("books/a.txt", "good")
    write("books/b.txt", b"bad\xff")
    sentence = refusal("books")
    assert str(Path("books", "b.txt")) in sentence
    assert "byte 0xff at position 3" in sentence


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_folder_that_may_not_be_opened_is_not_passed_over(here: Path):
    write("books/a.txt", "one")
    write("books/closed/b.txt", "two")
    Path("books/closed").chmod(0)
    try:
        with pytest.raises(PermissionError):
            read("books")
    finally:
        Path("books/closed").chmod(0o700)


# --- a pattern ------------------------------------------------------------------------------------


def test_a_pattern_takes_the_files_it_matches_in_order(here: Path):
    write("books/b.tex", "2")
    write("books/a/c.tex", "1<|endoftext|> ")
    write("books/.hidden.tex", "no")
    write("books/d.jsonl", '{"text": "3"}\n')
    Path("books/folder.tex").mkdir()
    assert read("books/**/*.tex") == ["1", "2"]
    assert read("books/*.tex") == ["2"]
    assert read("books/[bd].*") == ["2", "3"]


def test_a_pattern_that_matches_no_file(here: Path):
    Path("folder.txt").mkdir()
    for pattern in ("*.txt", "none/**/*.md"):
        assert refusal(pattern, FileNotFoundError) == f"no file matches {pattern!r}"


def test_home_folder_is_understood(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("USERPROFILE", str(here))
    write("own.txt", "mine")
    assert read("~/*.txt") == read("~/own.txt") == read("~") == ["mine"]


# --- JSONL ----------------------------------------------------------------------------------------


def lines(*records: object) -> str:
    return "".join(f"{json.dumps(record)}\n" for record in records)


def test_jsonl_is_a_document_per_line(here: Path):
    texts = ["one\ntwo", "中文 🎉 \u2028 \x85", f"a{END_OF_TEXT}b", " ", "é"]
    write("web.jsonl", "\n" + lines(*({"id": 7, "text": t} for t in texts)) + "\r\n \n")
    expected = ["one\ntwo", "中文 🎉 \u2028 \x85", "a", "b", "é"]
    assert read("web.jsonl") == expected
    write("web.jsonl", json.dumps({"text": "no line end", "more": [1, {}]}, ensure_ascii=False))
    assert read("web.jsonl") == ["no line end"]


def test_another_field_is_named_after_a_colon(here: Path):
    write("a.jsonl", lines({"body": "1", "text": "no", "a:b": "3"}))
    write("b.jsonl", lines({"body": "2"}))
    assert read("a.jsonl:body") == ["1"]
    assert read("a.jsonl:a:b") == ["3"]
    assert read(here / "a.jsonl:body") == ["1"]
    assert read("*.jsonl:body") == ["1", "2"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "is not JSON: Expecting property name enclosed in double quotes at column 2"),
        ("text", "is not JSON: Expecting value at column 1"),
        ('{"text": "a"} {"text": "b"}', "is not JSON: Extra data at column 15"),
        ('"text"', "is a string, expected an object with 'text'"),
        ("[1]", "is a list, expected an object"),
        ("null", "is null, expected an object"),
        ('{"body": "a", "id": 1}', "has no field 'text', it has 'body', 'id'"),
        ("{}", "has no field 'text', it has nothing"),
        ('{"text": null}', "has null in the field 'text', expected a string"),
        ('{"text": 5}', "has a number in the field"),
        ('{"text": true}', "has true or false in the field"),
        ('{"text": {}}', "has an object in the field"),
        ('{"text": "ab\\ud83d"}', "half a character (the lone surrogate U+D83D) in the field"),
        (b'{"text": "\xff"}', "is not UTF-8 text (byte 0xff at position 10)"),
        (b'{"text": "\0"}', "has a NUL byte at position 10"),
        ("[" * 200_000, "is not JSON that can be read"),
        ('{"text": ' + "9" * 5000 + "}", "is not JSON that can be read"),
    ],
    ids=range(17),
)
def test_a_bad_line_is_named_by_its_number(here: Path, line: str | bytes, words: str):
    line = line.encode() if isinstance(line, str) else line
    write("web.jsonl", b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    sentence = refusal("web.jsonl")
    assert sentence.startswith("line 3 of 'web.jsonl' ")
    assert words in sentence
    assert len(sentence) < 300


def test_good_lines_come_before_a_bad_one_is_met(here: Path):
    """Line by line: a file is never in memory as a whole."""
    write("web.jsonl", '{"text": "good"}\nbad\n')
    stream = documents("web.jsonl")
    assert next(stream) == "good"
    with pytest.raises(ValueError, match="line 2"):
        next(stream)


# --- standard input -------------------------------------------------------------------------------


def test_standard_input(monkeypatch: pytest.MonkeyPatch):
    def feed(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))

    feed("one<|endoftext|>中文 🎉\r\n".encode())
    with pytest.raises(ValueError, match="standard input can be read only once"):
        read("-")
    assert read("-", once=True) == ["one", "中文 🎉\r\n"]
    feed(b"")
    assert refusal("-") == "standard input holds no text"
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it where the shell closed it
    assert refusal("-") == "standard input holds no text"
    feed(b"ab\xff")
    assert "standard input is not UTF-8 text (byte 0xff at position 2)" in refusal("-")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_like_standard_input(here: Path):
    os.mkfifo("pipe")
    with pytest.raises(ValueError, match="'pipe' can be read only once"):
        read("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_text("through"))
    writer.start()
    assert read("pipe", once=True) == ["through"]
    writer.join()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="the system has no such device")
def test_a_device_without_end_is_not_read():
    assert refusal("/dev/zero") == "'/dev/zero' is a device or a socket, not a text file"


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "'own.txt' holds no text"),
        (b" \n\t\n", "'own.txt' holds no text"),
        (b"\xef\xbb\xbf", "'own.txt' holds no text"),
        (b"abc\xffdef", "is not UTF-8 text (byte 0xff at position 3): save it as UTF-8 first"),
        (b"\xef\xbb\xbfabc\xff", "(byte 0xff at position 6)"),
        (b"cut \xe4\xb8", "(byte 0xe4 at position 4)"),
        (b"\x89PNG\r\n\x1a\n\0", "(byte 0x89 at position 0), but binary or UTF-16"),
        ("中文".encode() + b"\0\1", "has a NUL byte at position 6, so it is binary or UTF-16"),
        (b"\xef\xbb\xbfa\0", "NUL byte at position 4"),
        ("text".encode("utf-16-le"), "NUL byte at position 1"),
    ],
)
def test_what_is_not_text_is_refused(here: Path, content: bytes, words: str):
    write("own.txt", content)
    sentence = refusal("own.txt")
    assert "'own.txt' " in sentence
    assert words in sentence


@pytest.mark.parametrize("name", ["none.txt", "none/none.txt", "none.jsonl"])
def test_a_missing_file(here: Path, name: str):
    assert refusal(name, FileNotFoundError) == f"no file {name!r}"


def test_a_missing_jsonl_file_is_named_without_its_field(here: Path):
    assert refusal("none.jsonl:body", FileNotFoundError) == "no file 'none.jsonl'"


def test_an_empty_name_is_not_the_present_folder(here: Path):
    write("own.txt", "text")
    assert "got an empty name" in refusal("")


# --- parts ----------------------------------------------------------------------------------------

WORDS = st.lists(
    st.sampled_from(
        ["a", "bc", " ", "\n", "  ", "é", "中", "🎉", END_OF_TEXT, "<|endof", "text|>"]
    ),
    max_size=60,
).map("".join)


def small_parts(patch: pytest.MonkeyPatch, chunk: int, part: int = 8) -> None:
    patch.setattr(files, "_CHUNK", chunk)
    patch.setattr(files, "_PART", part)
    patch.setattr(files, "_LONGEST", 4 * part)


@given(WORDS, st.integers(1, 40))
def test_parts_are_the_documents_and_do_not_depend_on_how_the_file_is_read(text: str, chunk: int):
    with pytest.MonkeyPatch.context() as patch:
        small_parts(patch, chunk)
        data = io.BytesIO(text.encode())
        parts = list(files._of_text(data, "it"))
        assert parts == list(files.parts_of(text.split(END_OF_TEXT)))
    documents = [""]
    for part in parts:
        assert len(part.text) <= 32
        documents[-1] += part.text
        documents += [""] * part.ends
    assert documents == [*text.split(END_OF_TEXT), ""]


@given(WORDS)
def test_a_part_ends_at_a_seam_or_is_as_long_as_may_be(text: str):
    with pytest.MonkeyPatch.context() as patch:
        small_parts(patch, 5)
        parts = list(files.parts_of([text.replace(END_OF_TEXT, "")]))
    for part, following in itertools.pairwise(parts):
        at_seam = following.text[0] in " \n" and not part.text[-1].isspace()
        assert (at_seam and len(part.text) >= 8) or len(part.text) == 32


def test_a_long_document_is_read_in_many_parts(here: Path):
    text = "word " * 200_000
    write("own.txt", text + END_OF_TEXT + "short")
    parts = list(files.parts("own.txt"))
    assert [part.ends for part in parts] == [False] * (len(parts) - 2) + [True, True]
    assert 3 <= len(parts) <= 6
    assert max(len(part.text) for part in parts) < 300_000
    assert documents("own.txt").__next__() == text


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_what_is_wrong_is_at_the_same_position_however_the_file_is_read(
    here: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    write("own.txt", "中文 🎉".encode() + b"\xffabc")
    assert "(byte 0xff at position 11)" in refusal("own.txt")
    write("own.txt", "中文 ab".encode() + b"\0c")
    assert "NUL byte at position 9" in refusal("own.txt")
    write("own.txt", "abc 中".encode()[:-1])
    assert "(byte 0xe4 at position 4)" in refusal("own.txt")


def test_blank_documents_in_parts_are_left_out_of_folders(here: Path, monkeypatch):
    small_parts(monkeypatch, 4)
    write("books/a.txt", "\n" * 100 + END_OF_TEXT + "\n" * 100 + "x" + END_OF_TEXT + " " * 50)
    assert read("books") == ["\n" * 100 + "x"]
    assert read("books/a.txt") == ["\n" * 100, "\n" * 100 + "x", " " * 50]
