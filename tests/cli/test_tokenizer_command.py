"""`tinygrad-llm tokenizer`: every kind from text to a folder and back, and its refusals."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tinygrad_llm.cli import main
from tinygrad_llm.cli import tokenizer as command
from tinygrad_llm.data.tokenizers import Tokenizer

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
SENTENCES = "".join(
    f"Once upon a time {i} Füchse jumped, naïvely, over {i} 狐狸 🎉.\n" for i in range(9)
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A book, a folder and two JSONL files in the present folder, which is a fresh one."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(SENTENCES, encoding="utf-8")
    Path("web").mkdir()
    for name in "ab":
        lines = (json.dumps({"body": f"{name}: {line}"}) for line in SENTENCES.splitlines())
        Path(f"web/{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def run(capsys, *arguments):
    assert main(["tokenizer", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert not CONTROL.search(captured.out)
    return captured.out


def train(*arguments, out="out"):
    return ["train", "--data", "book.txt", "--out", out, *arguments]


def refusal(capsys, *arguments):
    assert main(["tokenizer", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("tinygrad-llm: ")
    assert err.count("\n") == 1
    return err


# --- train ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "vocab_size"),
    [("byte", 257), ("char", None), ("bpe", 280), ("wordpiece", 100), ("unigram", 280)],
)
def test_every_kind_is_trained_saved_and_shown(kind, vocab_size, capsys):
    size = ["--vocab-size", str(vocab_size)] if vocab_size else []
    out = run(capsys, *train("--kind", kind, *size, out="deep/new folder"))
    tokenizer = Tokenizer.from_file("deep/new folder")
    assert tokenizer.kind == kind
    assert f"tokenizer: {kind}, vocabulary {tokenizer.vocab_size}" in out
    if vocab_size:
        assert tokenizer.vocab_size <= vocab_size
    if kind != "wordpiece":
        assert tokenizer.decode(tokenizer.encode(SENTENCES)) == SENTENCES
    assert "text: book.txt, " in out
    assert Path("deep/new folder/vocab.txt").exists() == (kind == "wordpiece")

    shown = re.findall(r"^show: +(.*)$", out, flags=re.MULTILINE)
    done = subprocess.run(shlex.split(shown[0]), capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "characters per token: " in done.stdout


def test_the_vocabulary_is_the_same_from_every_form_of_the_text(capsys, monkeypatch):
    Path("books/deep").mkdir(parents=True)
    Path("books/deep/a.txt").write_text(SENTENCES, encoding="utf-8")
    Path("book.jsonl").write_text(json.dumps({"text": SENTENCES}))
    Path("b.jsonl").write_text(json.dumps({"b": SENTENCES}))
    files = []
    for i, source in enumerate(["book.txt", "books", "books/**/*.t?t", "book.jsonl", "b.jsonl:b"]):
        run(capsys, "train", "--data", source, "--vocab-size", "300", "--out", f"out{i}")
        files.append(Path(f"out{i}/tokenizer.json").read_bytes())
    assert len(set(files)) == 1

    started = [sys.executable, "-m", "tinygrad_llm", "tokenizer", "train", "--data", "-"]
    done = subprocess.run(
        [*started, "--vocab-size", "300", "--out", "piped"],
        input=SENTENCES.encode(),
        capture_output=True,
        check=True,
    )
    assert b"text: standard input, " in done.stdout
    assert Path("piped/tokenizer.json").read_bytes() == files[0]


def test_several_jsonl_files_and_a_field(capsys):
    out = run(capsys, "train", "--data", "web/*.jsonl:body", "--kind", "unigram", "--out", "out")
    assert "documents: 18," in out
    assert "(8,192 asked for: the text gives no more)" in out


def test_capital_letters_of_wordpiece(capsys):
    for cased, out in ((["--cased"], "cased"), ([], "uncased")):
        run(capsys, *train("--kind", "wordpiece", *cased, out=out))
    assert Tokenizer.from_file("cased").token_to_id("Once") is not None
    assert Tokenizer.from_file("uncased").token_to_id("Once") is None
    assert Tokenizer.from_file("uncased").token_to_id("once") is not None


def test_a_folder_that_is_there_is_not_touched(capsys):
    run(capsys, *train("--kind", "byte"))
    before = Path("out/tokenizer.json").read_bytes()
    assert "out is there already: delete it, or name another --out" in refusal(capsys, *train())
    assert Path("out/tokenizer.json").read_bytes() == before
    assert "book.txt is there already" in refusal(capsys, *train(out="book.txt"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "tokenizer what? Expected train or show, got nothing"),
        (["trian"], "got 'trian' (did you mean 'train'?)"),
        (["train"], "--data"),
        (["train", "--data", "book.txt"], "--out"),
        (train("--kind", "bqe"), "'bqe'"),
        (train("--vocab-size", "many"), "--vocab-size"),
        (train("--vocab-size", "256"), "at least 257 for byte-level BPE"),
        (train("--kind", "unigram", "--vocab-size", "257"), "at least 258 for Unigram"),
        (train("--kind", "wordpiece", "--vocab-size", "-1"), "for WordPiece on this text"),
        (train("--cased"), "--cased is for --kind wordpiece; bpe keeps capital letters anyway"),
        (train("--data", "none.txt"), "no file 'none.txt', and no built-in corpus of that name"),
        (train("--data", "none/*"), "no file matches 'none/*'"),
        (train("--data", "web"), "the folder 'web' holds no .txt or .md file"),
        (train("--data", "web/a.jsonl"), "line 1 of 'web/a.jsonl' has no field 'text'"),
        (train("--data", "bad.txt"), "byte 0xff at position 3"),
        (train("--data", "nul.txt"), "NUL byte at position 3"),
        (train("--data", "empty.txt"), "'empty.txt' holds no text"),
        (train("--data", ""), "got an empty name"),
        (train("--data", "python-doc"), "did you mean 'python-docs'?"),
        (["show", "--text", "a"], "--model is missing"),
        (["show", "--model", "none", "--text", "a"], "no tokenizer at 'none'"),
        (["show", "--model", "web", "--text", "a"], "no tokenizer at 'web/tokenizer.json'"),
    ],
    ids=" ".join,
)
def test_bad_input_gets_one_sentence_and_leaves_nothing(arguments, words, here, capsys):
    Path("bad.txt").write_bytes(b"abc\xff")
    Path("nul.txt").write_bytes(b"abc\0")
    Path("empty.txt").write_bytes(b"")
    before = sorted(here.iterdir())
    assert words in refusal(capsys, *arguments)
    assert sorted(here.iterdir()) == before


# --- show -----------------------------------------------------------------------------------------


def test_show_lists_every_piece_and_id(capsys):
    Tokenizer.byte().save("bytes")
    out = run(capsys, "show", "--model", "bytes", "--text", "a\n\x1b中'")
    rows = re.findall(r"^ +(\d+)  (.*)$", out, flags=re.MULTILINE)
    expected = ["'a'", r"'\n'", r"'\x1b'", r"'\xe4'", r"'\xb8'", r"'\xad'", '"\'"']
    assert [piece for _, piece in rows] == expected
    assert [int(i) for i, _ in rows] == [*"a\n\x1b中'".encode()]
    assert "tokens: 7, characters: 5, characters per token: 0.71" in out


def test_show_of_no_text(capsys):
    Tokenizer.byte().save("bytes")
    out = run(capsys, "show", "--model", "bytes", "--text", "")
    assert "tokens: 0, characters: 0, characters per token: 0.00" in out


def test_show_refuses_what_the_tokenizer_cannot_cut(capsys):
    Tokenizer.char("abc").save("chars")
    show = ["show", "--model", "chars", "--text"]
    assert "the character 'x' (U+0078) at position 1" in refusal(capsys, *show, "ax")
    assert "lone surrogate" in refusal(capsys, *show, "a\udcff")
    Path("chars/tokenizer.json").write_text("{")
    assert "is not a readable tokenizer.json" in refusal(capsys, *show, "a")


def test_show_takes_berts_vocabulary_a_run_and_a_checkpoint(capsys):
    Path("bert").mkdir()
    Path("bert/vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\n##s\n")
    out = run(capsys, "show", "--model", "bert", "--text", "Hellos [MASK]")
    assert re.findall(r"^ +(\d+)  ", out, flags=re.MULTILINE) == ["5", "6", "4"]
    assert "'##s'" in out

    training = ["pretrain", "gpt", "--preset", "tiny", "--data", "book.txt", "--tokenizer", "byte"]
    assert main([*training, "--steps", "1", "--max-new-tokens", "0", "--run", "run"]) == 0
    capsys.readouterr()
    shown = [
        run(capsys, "show", "--model", model, "--text", "Once")
        for model in ("run", "run/checkpoints/step-000001")
    ]
    assert shown[0] == shown[1]
    assert "tokens: 4, " in shown[0]


# --- help, and what pretraining makes of the same sources -----------------------------------------


def test_help(capsys):
    assert "tokenizer train|show" in run(capsys, "--help")
    for name, text in (("train", command.TRAIN_HELP), ("show", command.SHOW_HELP)):
        with pytest.raises(SystemExit) as stopped:
            main(["tokenizer", name, "--help"])
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        assert f"\n  tinygrad-llm tokenizer {name} " in out
        assert text.splitlines()[-1] in out


def test_the_examples_of_the_help_run(monkeypatch):
    """As pasted into a shell, in the order they stand; runs/book is a folder with a tokenizer."""
    Tokenizer.bpe(SENTENCES, 300).save("runs/book")
    program = f"{shlex.quote(sys.executable)} -m tinygrad_llm"
    examples = re.findall(
        r"^  (.*tinygrad-llm tokenizer .*)$", command.TRAIN_HELP + command.SHOW_HELP, re.MULTILINE
    )
    assert len(examples) == 5
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    for example in examples:
        line = example.replace("tinygrad-llm", program)
        done = subprocess.run(line, shell=True, capture_output=True, encoding="utf-8", check=True)
        assert done.stderr == ""
    assert {"book-tokens", "web-tokens", "words"} <= {path.name for path in Path().iterdir()}


def test_pretraining_takes_the_new_sources_and_resumes(capsys, monkeypatch):
    training = ["pretrain", "gpt", "--preset", "tiny", "--steps", "2", "--max-new-tokens", "0"]
    for i, source in enumerate(["web/a.jsonl:body", "web/*.jsonl:body"]):
        assert main([*training, "--data", source, "--run", f"run{i}"]) == 0
        Path("elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir("elsewhere")
        assert main(["pretrain", "gpt", "--resume", f"../run{i}", "--steps", "3"]) == 0
        monkeypatch.chdir("..")
    capsys.readouterr()
    assert main([*training, "--data", "-", "--run", "none"]) == 2
    assert "standard input can be read only once" in capsys.readouterr().err
    assert not Path("none").exists()
