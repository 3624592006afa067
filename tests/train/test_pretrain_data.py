"""Runs on texts of every kind: large ones, divided in every way, cut by every tokenizer."""

import io
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tinygrad_llm.data import END_OF_TEXT, cache, texts
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train import pretrain
from tinygrad_llm.train.config import ConfigError, DataConfig
from tinygrad_llm.train.log import PlainLog
from tinygrad_llm.train.run import Run
from tinygrad_llm.train.trainer import Interrupted

TEXT = END_OF_TEXT.join(f"{i} and {i} make {2 * i}, 中文 🎉.\n" * (i % 5) for i in range(200))
STEPS = 6


class Quiet(PlainLog):
    """Keeps what is said; calls `at[step]()` when the record of that step comes."""

    def __init__(self, at=None):
        super().__init__(io.StringIO())
        self.at = at or {}
        self.said = []

    def say(self, text):
        self.said.append(text)

    def record(self, record):
        self.at.get(record["step"], lambda: None)()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> configuration.PretrainConfig:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(pretrain.Trainer, "_draw", lambda self: None)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    Path("other.txt").write_text("another text to validate on. " * 20)
    tiny = configuration.preset("tiny")
    return replace(
        tiny,
        data=replace(tiny.data, source="text.txt"),
        train=replace(tiny.train, steps=STEPS, eval_every=3, checkpoint_every=3, mfu=False),
    )


def data(config, **changes):
    return replace(config, data=replace(config.data, **changes))


def train(config, folder, at=None):
    log = Quiet(at)
    ready = pretrain.start(config, folder, log)
    ready.trainer.fit()
    return ready, log


def go_on(folder, **changes):
    run = Run.open(folder)
    config = configuration.load(run.config_file)
    ready = pretrain.resume(run, data(config, **changes), Quiet())
    ready.trainer.fit()
    return ready


def weights(folder):
    checkpoint = Run.open(folder).step_folder(STEPS)
    return (checkpoint / "model.safetensors").read_bytes()


def test_a_text_in_a_token_file_trains_as_one_in_memory(config, tmp_path, monkeypatch):
    train(config, tmp_path / "memory")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(texts, "IN_MEMORY", 1000)
    train(config, tmp_path / "file")
    assert len(list((tmp_path / "cache" / "tokens").glob("*/index.json"))) == 1
    assert weights("memory") == weights("file")


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"order": "sequential"},
        {"order": "shuffled", "documents": "separate"},
        {"order": "random", "documents": "separate", "val_by": "document"},
        {"val_source": "other.txt", "tokenizer": "char"},
    ],
    ids=lambda changes: "-".join(changes.values()),
)
def test_a_stopped_run_goes_on_bit_for_bit(config, tmp_path, monkeypatch, large, changes):
    monkeypatch.setattr(texts, "IN_MEMORY", 1000 if large else 10**6)
    train(data(config, **changes), "whole")
    with pytest.raises(Interrupted):
        train(data(config, **changes), "stopped", {4: lambda: signal.raise_signal(signal.SIGINT)})
    monkeypatch.chdir("/")  # paths in the configuration do not depend on the folder
    go_on(tmp_path / "stopped")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    "changes", [{"order": "sequential"}, {"documents": "separate"}, {"val_by": "document"}]
)
def test_what_is_trained_on_cannot_change_on_the_way(config, changes):
    with pytest.raises(Interrupted):
        train(config, "run", {4: lambda: signal.raise_signal(signal.SIGINT)})
    (key,) = changes
    with pytest.raises(ConfigError, match=rf"with data\.{key} = .* cannot become"):
        go_on("run", **changes)


def test_another_text_to_validate_on(config):
    _, log = train(data(config, val_source="other.txt"), "run")
    assert any(said.startswith("text to validate on: other.txt, 580 char") for said in log.said)
    assert f"tokens: {len(Tokenizer.byte().encode(TEXT)):,} to train on, 580 to" in log.said[3]
    Path("other.txt").write_text("changed. " * 100)
    with pytest.raises(ValueError, match=r"other\.txt' has changed since the run began"):
        train_longer("run")
    with pytest.raises(ConfigError, match="is the text that is trained on"):
        train(data(config, val_source="./text.txt"), "again")


def train_longer(folder):
    run = Run.open(folder)
    config = configuration.load(run.config_file)
    longer = replace(config, train=replace(config.train, steps=2 * STEPS))
    pretrain.resume(run, longer, Quiet())


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_learnt_tokenizers(config, kind):
    ready, _ = train(data(config, tokenizer=kind, vocab_size=300), "run")
    assert ready.tokenizer.kind == kind
    assert ready.tokenizer.vocab_size <= 300
    assert ready.model.config.vocab_size == ready.tokenizer.vocab_size


def test_a_tokenizer_that_is_there(config, tmp_path, monkeypatch):
    Tokenizer.bpe(TEXT, 280).save("tokens")
    first, _ = train(data(config, tokenizer="tokens"), "first")
    assert first.tokenizer.vocab_size == 280
    assert first.config.data.tokenizer == str(tmp_path / "tokens")
    for again in ("tokens/tokenizer.json", "first", "first/checkpoints/best"):
        ready, _ = train(data(config, tokenizer=again), f"run-{len(again)}")
        assert ready.tokenizer.sha256 == first.tokenizer.sha256
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at '.*none/at/all'"):
        train(data(config, tokenizer="none/at/all"), "none")
    Tokenizer.char("0123456789").save("digits")
    with pytest.raises(ValueError, match=r"' ' .* at position \d+ is not among the 10 that"):
        train(data(config, tokenizer="digits"), "none")
    assert not Path("none").exists()


def test_a_home_that_cannot_be_written(config, tmp_path, monkeypatch):
    Path("file").write_text("")
    monkeypatch.setattr(texts, "IN_MEMORY", 1000)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    monkeypatch.setattr(cache, "_temporary_folder", None)
    _, log = train(config, "run")
    assert any("cannot be written (Not a directory)" in said for said in log.said)
    assert Run.open("run").checkpoint() is not None


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("bqe", "one of char, byte, bpe, wordpiece, unigram, or a path, got 'bqe'; did you mean"),
        ("", "or a path, got ''"),
    ],
)
def test_a_tokenizer_that_is_neither_kind_nor_path(word, sentence):
    with pytest.raises(ConfigError, match=sentence):
        DataConfig(tokenizer=word)
