"""Token files: the ids of the whole, whatever happens while they are made or after."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm.data import END_OF_TEXT, cache, files, texts, token_files, tokens
from tinygrad_llm.data.corpora import Corpus
from tinygrad_llm.data.report import SILENT, Silent
from tinygrad_llm.data.texts import Side, open_text
from tinygrad_llm.data.token_files import IDS, INDEX, JOURNAL, read_index, tokens_of
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.data.tokens import in_memory

DOCUMENTS = [
    f"Document {i}: {'some words ' * (i % 23)}中文 {'é' * (i % 7)} 🎉\n" for i in range(300)
]
WHOLE = END_OF_TEXT.join(DOCUMENTS)
BPE = Tokenizer.bpe(DOCUMENTS, 400)
KINDS = {
    "byte": Tokenizer.byte(),
    "char": Tokenizer.char(WHOLE),
    "bpe": BPE,
    "unigram": Tokenizer.unigram(DOCUMENTS, 400),
    "wordpiece": Tokenizer.wordpiece(DOCUMENTS, 200),
}
HERE = Path(__file__).parent


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Everything that counts as large is small: many parts, groups and blocks."""
    patch.setattr(texts, "IN_MEMORY", 1000)
    patch.setattr(files, "_PART", 64)
    patch.setattr(files, "_LONGEST", 512)
    patch.setattr(tokens, "_GROUP", 300)
    patch.setattr(token_files, "_BLOCK", 2000)
    patch.setattr(token_files, "_CHUNK", 100)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> texts.Text:
    make_small(monkeypatch)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "big.txt").write_text(WHOLE, newline="")
    return open_text(tmp_path / "big.txt")


class Heard(Silent):
    def __init__(self):
        self.said: list[str] = []
        self.done: list[tuple[str, int, int]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, what: str, done: int, total: int) -> None:
        self.done.append((what, done, total))


def token_folder() -> Path:
    (folder,) = (p for p in (cache.folder() / "tokens").iterdir() if p.is_dir())
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what is in them ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_whole_text(kind: str, text: texts.Text):
    tokenizer = KINDS[kind]
    found, expected = tokens_of(text, tokenizer), tokenizer.encode(WHOLE)
    assert isinstance(found.ids, np.memmap)
    assert found.ids.dtype == np.uint16
    assert not found.ids.flags.writeable
    assert found.ids.tolist() == expected.tolist()
    memory = in_memory(text, tokenizer)
    assert memory.ids.tolist() == expected.tolist()
    assert memory.ends.tolist() == found.ends.tolist()
    assert np.flatnonzero(expected == tokenizer.eos_id).tolist() == found.ends[:-1].tolist()
    assert found.ends[-1] == len(found)


@given(st.lists(st.sampled_from(["", "a", "b c", "\n", "中 🎉", "word " * 30]), min_size=1))
def test_ends_are_where_documents_end(documents: list[str]):
    found = in_memory(Corpus("it", documents), BPE)
    assert found.ids.tolist() == BPE.encode(END_OF_TEXT.join(documents)).tolist()
    starts = [0, *(found.ends[:-1] + 1)]
    for start, end, document in zip(starts, found.ends, documents, strict=True):
        assert BPE.decode(found.ids[start:end].astype(int)) == document


def test_a_tokenizer_without_the_mark_puts_nothing_between_documents():
    import tokenizers as library

    model = library.models.BPE(vocab={"a": 0, "b": 1}, merges=[])
    tokenizer = Tokenizer(library.Tokenizer(model))
    assert tokenizer.eos_id is None
    found = in_memory(Corpus("it", ["ab", "b"]), tokenizer)
    assert (found.ids.tolist(), found.ends.tolist(), found.marked) == ([0, 1, 1], [2, 3], False)


def test_the_index_counts(text: texts.Text):
    tokens_of(text, BPE)
    index = read_index(token_folder())
    assert index["tokens"] == len(BPE.encode(WHOLE))
    assert index["documents"] == len(DOCUMENTS)
    assert index["bytes"] == len("".join(DOCUMENTS).encode())
    assert (index["text_sha256"], index["tokenizer_sha256"]) == (text.sha256, BPE.sha256)
    assert len(index["blocks"]) > 5


def test_the_file_is_made_once_for_a_text_and_a_tokenizer(text, tmp_path, monkeypatch):
    first = tokens_of(text, BPE)
    built = []
    build = token_files.build
    monkeypatch.setattr(token_files, "build", lambda *a: built.append(a) or build(*a))
    shutil.copy(tmp_path / "big.txt", tmp_path / "copy.txt")
    again = tokens_of(open_text(tmp_path / "copy.txt"), Tokenizer.bpe(DOCUMENTS, 400))
    assert (again.ids.tolist(), built) == (first.ids.tolist(), [])
    tokens_of(text, KINDS["byte"])
    tokens_of(Side(text, 0.5, held_out=True), BPE)
    assert len(built) == 2


def test_a_large_vocabulary_takes_four_bytes(text, monkeypatch):
    monkeypatch.setattr(BPE, "vocab_size", 70_000)
    found = tokens_of(text, BPE)
    assert found.ids.dtype == np.uint32
    assert found.ids.tolist() == BPE.encode(WHOLE).tolist()


def test_progress_goes_up_to_the_whole(text: texts.Text):
    heard = Heard()
    tokens_of(text, BPE, heard)
    what, done, total = zip(*heard.done, strict=True)
    assert set(what) == {f"tokenising {text.name}", f"checking the tokens of {text.name}"}
    last = what.count(what[0]) - 1
    assert list(done[: last + 1]) == sorted(done[: last + 1])
    assert done[last] == total[last] == text.characters


def test_a_character_that_the_tokenizer_does_not_know_is_named_with_its_place(text):
    tokenizer = Tokenizer.char(WHOLE.replace("🎉", ""))
    with pytest.raises(
        ValueError, match=rf"'🎉' .* at position {WHOLE.index('🎉')} is not"
    ) as caught:
        tokens_of(text, tokenizer)
    assert "\n" not in str(caught.value)
    assert not [p for p in (cache.folder() / "tokens").iterdir() if p.is_dir()]
    with pytest.raises(ValueError, match=rf"at position {WHOLE.index('🎉')} is not"):
        in_memory(text, tokenizer)


def test_parts_of_tokens_are_views_with_their_documents():
    found = in_memory(Corpus("it", ["abc", "de", "", "fgh"]), KINDS["byte"])  # abc|de||fgh
    assert found.ends.tolist() == [3, 6, 7, 11]
    part = found.part(2, 9)
    assert part.ids.tolist() == found.ids[2:9].tolist()
    assert np.shares_memory(part.ids, found.ids)
    assert part.ends_of(0, len(part.ends)).tolist() == [1, 4, 5, 7]
    again = part.part(3, 7)
    assert again.ends_of(0, len(again.ends)).tolist() == [1, 2, 4]


# --- what was killed goes on ----------------------------------------------------------------------


@pytest.fixture
def whole(text: texts.Text) -> dict[str, bytes]:
    """What an uninterrupted build leaves."""
    tokens_of(text, BPE)
    expected = content(token_folder())
    shutil.rmtree(cache.folder() / "tokens")
    assert expected.keys() == {"ids", "ends", "index.json"}
    return expected


class Killed(BaseException):
    """Nothing gets to tidy up."""


def interrupt(text: texts.Text, monkeypatch: pytest.MonkeyPatch, after: int) -> Path:
    """A build that stops after so many groups; its folder."""
    encode = tokens.Encoder.encode
    left = [after]

    def dying(self, parts):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return encode(self, parts)

    with monkeypatch.context() as patch:
        patch.setattr(tokens.Encoder, "encode", dying)
        with pytest.raises(Killed):
            tokens_of(text, BPE)
    folder = token_folder()
    assert folder.suffix == ".building"
    return folder


@pytest.mark.parametrize("seed", range(8))
def test_a_build_cut_off_anywhere_goes_on_and_ends_with_the_same_bytes(
    seed: int, text: texts.Text, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    chance = random.Random(seed)
    folder = interrupt(text, monkeypatch, chance.randint(20, 90))
    for name in chance.sample([IDS, "ends", JOURNAL], chance.randint(0, 3)):
        file = folder / name
        data = bytearray(file.read_bytes())
        damage = chance.choice(["cut", "longer", "flip", "gone"])
        if damage == "gone":
            file.unlink()
            continue
        if damage == "cut":
            del data[chance.randrange(len(data)) :]
        elif damage == "longer":
            data += bytes(chance.randrange(256) for _ in range(50))
        else:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
    tokens_of(text, BPE)
    assert content(token_folder()) == whole


def test_what_was_done_is_not_done_again(text, whole, monkeypatch):
    interrupt(text, monkeypatch, 80)
    encoded = []
    encode = tokens.Encoder.encode
    monkeypatch.setattr(
        tokens.Encoder, "encode", lambda self, parts: encoded.append(parts) or encode(self, parts)
    )
    heard = Heard()
    tokens_of(text, BPE, heard)
    assert any("going on with the token file" in said for said in heard.said)
    characters = sum(len(part.text) for parts in encoded for part in parts)
    assert characters < 0.6 * len(WHOLE)
    assert content(token_folder()) == whole


BUILD = """
import sys
sys.path.insert(0, sys.argv[1])
import pytest
import test_token_files as here
from tinygrad_llm.data.texts import open_text
from tinygrad_llm.data.token_files import tokens_of
here.make_small(pytest.MonkeyPatch())
text = open_text(sys.argv[2])
print("ready", flush=True)
tokens_of(text, here.BPE)
"""


def start_build(file: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(HERE), str(file)], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.skipif("sys.platform == 'win32'", reason="no SIGKILL")
def test_sigkill_at_any_moment_loses_nothing(text, whole, tmp_path):
    chance = random.Random(0)
    for _ in range(3):
        process = start_build(tmp_path / "big.txt")
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    tokens_of(text, BPE)
    assert content(token_folder()) == whole


@pytest.mark.skipif("sys.platform == 'win32'", reason="no locks")
def test_two_processes_at_once_make_one_file(text, whole, tmp_path):
    both = [start_build(tmp_path / "big.txt") for _ in range(2)]
    for process in both:
        process.communicate()
        assert process.returncode == 0
    assert content(token_folder()) == whole


@pytest.mark.parametrize("moment", ["before the name", "after the name"])
def test_a_kill_at_the_very_end_costs_nothing(text, whole, monkeypatch, moment):
    replace = os.replace

    def die(source, target):
        if Path(source).suffix == ".building":
            if moment == "after the name":
                replace(source, target)
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(Killed):
            tokens_of(text, BPE)
    monkeypatch.setattr(tokens.Encoder, "encode", None)  # nothing is encoded again
    tokens_of(text, BPE)
    found = content(token_folder())
    if moment == "after the name":
        del found[JOURNAL]  # it does no harm
    assert found == whole


def test_a_side_without_documents_is_an_empty_file(text):
    found = tokens_of(Side(text, 1e-12, held_out=True), BPE)
    assert (len(found), len(found.ends)) == (0, 0)
    assert len(tokens_of(Side(text, 1e-12, held_out=True), BPE)) == 0


def test_without_locks_each_process_builds_its_own(text, whole, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    tokens_of(text, BPE)
    assert content(token_folder()) == whole
    made = token_folder()
    shutil.move(made, made.with_suffix(".aside"))
    build = token_files.build

    def slower(*arguments):
        build(*arguments)
        shutil.move(made.with_suffix(".aside"), made)

    monkeypatch.setattr(token_files, "build", slower)
    assert len(tokens_of(text, BPE)) == len(BPE.encode(WHOLE))
    assert content(token_folder()) == whole


# --- what was damaged is noticed ------------------------------------------------------------------


@pytest.mark.parametrize("name", [IDS, "ends", INDEX])
@pytest.mark.parametrize("damage", ["cut", "longer", "flip", "empty", "gone"])
def test_a_damaged_file_is_made_again_not_trained_on(name, damage, text, whole):
    expected = tokens_of(text, BPE).ids.tolist()
    file = token_folder() / name
    data = bytearray(file.read_bytes())
    chance = random.Random(name + damage)
    if damage == "flip":
        data[chance.randrange(len(data))] ^= 1
    changed = {"cut": data[:-1], "longer": data + b"\0", "flip": data, "empty": b"", "gone": b""}
    file.unlink()
    if damage != "gone":
        file.write_bytes(changed[damage])
    heard = Heard()
    assert tokens_of(text, BPE, heard).ids.tolist() == expected
    assert "is damaged (" in heard.said[0]
    assert "so it is made again" in heard.said[0]
    assert content(token_folder()) == whole


# --- disks ----------------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_keeps_what_is_done(text, whole, monkeypatch):
    commit = token_files._Writer.commit
    left = [4]

    def full(self, encoder):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        commit(self, encoder)

    with monkeypatch.context() as patch:
        patch.setattr(token_files._Writer, "commit", full)
        with pytest.raises(OSError, match=r"cannot be written into .*No space left") as caught:
            tokens_of(text, BPE)
    assert "\n" not in str(caught.value)
    assert cache.VARIABLE in str(caught.value)
    heard = Heard()
    tokens_of(text, BPE, heard)
    assert "going on" in heard.said[0]
    assert content(token_folder()) == whole


def test_where_the_cache_cannot_be_written_a_temporary_folder_serves(text, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    monkeypatch.setattr(cache, "_temporary_folder", tmp_path / "temporary")
    (tmp_path / "temporary").mkdir()
    heard = Heard()
    assert tokens_of(text, BPE, heard).ids.tolist() == BPE.encode(WHOLE).tolist()
    assert "cannot be written" in heard.said[0]
    assert tokens_of(text, BPE, SILENT).ids.tolist() == BPE.encode(WHOLE).tolist()


# --- memory ---------------------------------------------------------------------------------------

TRAIN = """
import resource, sys
import tinygrad_llm.models.gpt
from tinygrad_llm.data import files, texts, token_files, tokenizers, tokens
from tinygrad_llm.tasks.causal import CausalTask

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

files._CHUNK = files._PART = 1 << 14
files._LONGEST = 1 << 16
tokens._GROUP = 1 << 15
tokenizer = tokenizers.Tokenizer.byte()
tokenizer.encode("word " * 40_000)  # what the library needs to encode so much
before = peak()
text = texts.open_text(sys.argv[1])
assert not text.in_memory
task = CausalTask(
    text, tokenizer, context=256, batch_size=64, order=sys.argv[2], documents=sys.argv[3]
)
for _ in range(100):
    task.next_batch()
for _ in task.validation():
    pass
assert 1e6 < task.val_bytes < 2e6
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_neither_the_text_nor_its_ids_are_ever_in_memory(tmp_path):
    """16 MB of text with 32 MB of ids: tokenised in the first run, found there in the second."""
    paragraph = "".join(f"{i * i} and words of the text, {i}.\n" for i in range(2000))
    file = tmp_path / "big.txt"
    with file.open("w") as out:
        for i in range(16 * 10**6 // len(paragraph)):
            out.write(f"{i}\n{paragraph}{END_OF_TEXT}")
    for order, documents in (("random", "packed"), ("shuffled", "separate")):
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, str(file), order, documents],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, cache.VARIABLE: str(tmp_path / "cache")},
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 10, order  # MiB
