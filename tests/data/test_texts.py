"""Texts: the same in memory and in parts, divided fairly, known again, and never another one."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest

from tinygrad_llm.data import END_OF_TEXT, cache, corpora, files, texts
from tinygrad_llm.data.corpora import Corpus
from tinygrad_llm.data.report import Silent
from tinygrad_llm.data.texts import FileText, Side, alphabet, open_text, sample

DOCUMENTS = [f"Document {i}: {'word ' * (i % 50)}中文 {'é' * (i % 7)} 🎉\n" for i in range(400)]


@pytest.fixture
def big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large, an hour old; parts of 64 characters."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(texts, "IN_MEMORY", 1000)
    monkeypatch.setattr(files, "_PART", 64)
    monkeypatch.setattr(files, "_LONGEST", 256)
    file = tmp_path / "big.txt"
    file.write_text(END_OF_TEXT.join(DOCUMENTS), newline="")
    age(file)
    return file


def age(file: Path) -> None:
    os.utime(file, (1.7e9, 1.7e9))


def read(text: texts.Text) -> list[str]:
    """The documents, put together again."""
    found = [""]
    for part in text.parts():
        found[-1] += part.text
        found += [""] * part.ends
    assert found.pop() == ""
    return found


def test_a_large_text_is_what_it_would_be_in_memory(big: Path):
    text, corpus = open_text(str(big)), corpora.load_text(big)
    assert isinstance(text, FileText)
    assert read(text) == read(corpus) == corpus.documents == DOCUMENTS
    assert (text.sha256, text.characters) == (corpus.sha256, corpus.characters)
    assert corpus.characters == len(corpus.text)
    assert text.sha256 == hashlib.sha256(big.read_bytes()).hexdigest()


def test_a_small_text_is_in_memory(tmp_path: Path):
    (tmp_path / "small.txt").write_text("small")
    assert open_text(tmp_path / "small.txt") == Corpus(str(tmp_path / "small.txt"), ["small"])
    assert not (tmp_path / "cache").exists()
    with pytest.raises(FileNotFoundError, match="and no built-in corpus of that name"):
        open_text(str(tmp_path / "none.txt"))


def test_a_folder_and_jsonl_are_texts_too(big: Path, tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("x" * 2000 + END_OF_TEXT + " ")
    (folder / "b.txt").write_text("y")
    assert read(open_text(str(folder))) == ["x" * 2000, "y"]
    lines = [json.dumps({"body": document}) for document in DOCUMENTS]
    (tmp_path / "web.jsonl").write_text("\n".join(lines))
    assert read(open_text(f"{tmp_path}/web.jsonl:body")) == DOCUMENTS


def test_the_hash_of_a_file_is_remembered_until_the_file_changes(big: Path, monkeypatch):
    first = open_text(big)
    reads = []
    parts = files.parts
    monkeypatch.setattr(files, "parts", lambda source: reads.append(source) or parts(source))
    again = open_text(big)
    assert (again.sha256, again.characters, reads) == (first.sha256, first.characters, [])
    big.write_text("other " * 500)
    assert open_text(big).sha256 != first.sha256
    assert reads == [big]
    open_text(big)  # just written: it might be written once more in the same tick of the clock
    assert reads == [big, big]


def test_a_damaged_note_is_not_believed(big: Path, tmp_path: Path):
    first = open_text(big)
    (note,) = (tmp_path / "cache" / "texts").iterdir()
    for damage in ("", "[]", "{}", '{"sha256": 5, "characters": 5}', "\udcff"):
        note.write_bytes(damage.encode(errors="surrogateescape"))
        assert open_text(big).sha256 == first.sha256


def test_a_text_that_changed_behind_our_back_is_refused_at_its_end(big: Path):
    text = open_text(big)
    content = big.read_bytes()
    big.write_bytes(content.replace(b"Document 7:", b"Document 8:"))
    age(big)  # the same size and time
    trusting = open_text(big)
    assert trusting.sha256 == text.sha256
    with pytest.raises(ValueError, match=r"big\.txt' changed while it was read, or") as caught:
        list(trusting.parts())
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_costs_only_time(big: Path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(big / "no folder"))
    assert read(open_text(big)) == read(open_text(big)) == DOCUMENTS


# --- sides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_every_document_is_on_one_side_and_about_the_fraction_is_held_out(big, fraction):
    for text in (open_text(big), corpora.load_text(big)):
        train = read(Side(text, fraction, held_out=False))
        held_out = read(Side(text, fraction, held_out=True))
        assert not set(train) & set(held_out)
        assert [d for d in DOCUMENTS if d in set(train)] == train
        assert sorted(train + held_out) == sorted(DOCUMENTS)
        assert fraction * 0.5 < len(held_out) / len(DOCUMENTS) < fraction * 1.5


def test_the_side_of_a_document_depends_on_nothing_else():
    documents = [f"{i}" for i in range(100)]
    held_out = read(Side(Corpus("a", documents), 0.3, held_out=True))
    assert read(Side(Corpus("b", documents[::-1]), 0.3, held_out=True)) == held_out[::-1]
    twice = read(Side(Corpus("c", documents * 2), 0.3, held_out=True))
    assert twice == held_out * 2


def test_sides_are_told_apart():
    text = Corpus("a", ["a", "b"])
    hashes = {Side(text, f, held_out=h).sha256 for f in (0.1, 0.2) for h in (True, False)}
    assert len({*hashes, text.sha256}) == 5


# --- what tokenizers are made from ----------------------------------------------------------------


class Heard(Silent):
    def __init__(self):
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_a_sample_is_bounded_spread_evenly_and_the_same_each_time(big: Path):
    text, heard = open_text(big), Heard()
    whole = "".join(DOCUMENTS)
    found = "".join(sample(text, limit=len(whole) // 4, report=heard))
    assert 0.85 * len(whole) / 4 < len(found) < len(whole) / 4 + 300  # marks are not taken
    assert found == "".join(sample(text, limit=len(whole) // 4))
    numbers = [i for i in range(400) if f"Document {i}:" in found]
    quarters = [sum(100 * q <= i < 100 * q + 100 for i in numbers) for q in range(4)]
    assert min(quarters) >= 10
    assert "learns from" in heard.said[0]


def test_a_small_text_is_its_own_sample(big: Path):
    heard = Heard()
    assert "".join(sample(open_text(big), report=heard)) == "".join(DOCUMENTS)
    assert heard.said == []


def test_a_sample_has_only_so_many_different_words(big: Path, monkeypatch: pytest.MonkeyPatch):
    text, heard = open_text(big), Heard()
    monkeypatch.setattr(texts, "WORDS", 300)
    found = "".join(sample(text, report=heard))
    whole = "".join(DOCUMENTS)
    assert whole.startswith(found)
    different = len("".join(set(re.findall(r"\w+", found))).encode())
    assert 300 < different < 340
    assert "of many different words" in heard.said[0]
    assert "".join(sample(corpora.load_text(big))) == whole  # what is in memory is taken as it is


def test_the_alphabet_is_that_of_all_texts():
    assert alphabet(Corpus("a", ["cab", "中"]), Corpus("b", ["d🎉"])) == "abcd中🎉"
