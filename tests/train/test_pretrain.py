"""A whole run: training, the checkpoint, and resuming as if nothing had happened."""

import dataclasses
import io
import json
import math
import os
import signal

import pytest

from tinygrad_llm import backend
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.gpt import GPT
from tinygrad_llm.train import checkpoint, files, pretrain
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train.checkpoint import CheckpointError
from tinygrad_llm.train.config import ConfigError
from tinygrad_llm.train.log import PlainLog
from tinygrad_llm.train.run import Run
from tinygrad_llm.train.trainer import Diverged, Interrupted

TEXT = "".join(f"{i} and {i} make {2 * i}.\n" for i in range(400))
STEPS = 8


class Quiet(PlainLog):
    """Keeps what is said; calls `at[step]()` when the record of that step comes."""

    def __init__(self, at=None):
        super().__init__(io.StringIO())
        self.at = at or {}

    def record(self, record):
        super().record(record)
        self.at.get(record["step"], lambda: None)()


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    tiny = configuration.preset("tiny")
    return dataclasses.replace(
        tiny,
        data=dataclasses.replace(tiny.data, source=str(tmp_path / "text.txt")),
        train=dataclasses.replace(tiny.train, steps=STEPS, eval_every=2, checkpoint_every=4),
    )


def train(config, folder, at=None):
    ready = pretrain.start(config, folder, Quiet(at))
    ready.trainer.fit()
    return ready


def go_on(folder, at=None, **changes):
    run = Run.open(folder)
    config = configuration.load(run.config_file)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
    ready = pretrain.resume(run, config, Quiet(at))
    ready.trainer.fit()
    return ready


def what_counts(folder):
    """Weights, optimiser, trainer's state, metrics and samples, without what tells the time."""
    run = Run.open(folder)
    last = run.checkpoint()
    assert last is not None
    state = json.loads((last / "trainer.json").read_text())
    del state["elapsed"]
    records = [
        {
            k: v
            for k, v in r.items()
            if k not in ("elapsed", "tokens_per_second", "hidden_words_per_second", "mfu")
        }
        for r in run.metrics()
    ]
    files_of = ("model.safetensors", "optimizer.safetensors", "config.json", "tokenizer.json")
    return {**{n: (last / n).read_bytes() for n in files_of}, "state": state, "metrics": records}


def test_a_run_leaves_what_it_says(config, tmp_path):
    ready = train(config, tmp_path / "run")
    run = ready.run
    settled = dataclasses.replace(config, train=dataclasses.replace(config.train, processes=1))
    assert configuration.load(run.config_file) == settled  # too little work to be shared
    records = run.metrics()
    assert [r["step"] for r in records] == list(range(STEPS + 1))
    assert [r["step"] for r in records if "val_loss" in r] == [0, 2, 4, 6, 8]
    assert abs(records[0]["val_loss"] - math.log(257)) < 0.5  # it starts from knowing nothing
    assert all({"loss", "lr", "grad_norm", "tokens_per_second"} <= r.keys() for r in records[1:])
    assert sorted(os.listdir(run.checkpoints_folder)) == [
        "best",
        "latest",
        "step-000004",
        "step-000008",
    ]
    assert sorted(os.listdir(run.step_folder(8))) == [
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "run.toml",
        "tokenizer.json",
        "trainer.json",
    ]
    assert run.picture_file.read_bytes().startswith(b"\x89PNG")


def test_the_model_learns(config, tmp_path):
    train_config = dataclasses.replace(config.train, steps=60, lr=1e-2, eval_every=60)
    ready = train(dataclasses.replace(config, train=train_config), tmp_path / "run")
    first, *_, last = ready.run.metrics()
    assert last["val_loss"] < first["val_loss"] - 1.5
    assert last["val_loss"] < last["loss"] + 1.0


def test_the_same_seed_is_the_same_run(config, tmp_path):
    train(config, tmp_path / "a")
    train(config, tmp_path / "b")
    assert what_counts(tmp_path / "a") == what_counts(tmp_path / "b")
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=2))
    train(other, tmp_path / "c")
    a, c = what_counts(tmp_path / "a"), what_counts(tmp_path / "c")
    assert a["model.safetensors"] != c["model.safetensors"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_resumed_run_is_the_run_that_was_not_stopped(config, tmp_path, number, stop):
    assert config.model.dropout > 0
    train(config, tmp_path / "whole")
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"{number.name} after step {stop}; saved") as caught:
        train(config, tmp_path / "stopped", {stop: lambda: signal.raise_signal(number)})
    assert (caught.value.number, caught.value.step) == (number, stop)
    assert signal.getsignal(number) is before
    assert Run.open(tmp_path / "stopped").checkpoint() is not None

    backend.manual_seed(12345)  # another process: nothing of this one's random stream is left
    go_on(tmp_path / "stopped")
    assert what_counts(tmp_path / "stopped") == what_counts(tmp_path / "whole")
    best = [Run.open(tmp_path / name).checkpoint("best") for name in ("stopped", "whole")]
    assert [path.name for path in best if path] == ["step-000008"] * 2


class Killed(BaseException):
    """What SIGKILL is: nothing gets to tidy up (`files` may not catch it either)."""


@pytest.mark.parametrize("where", ["save_training", "replace", "point", "first"])
def test_a_kill_in_the_middle_of_a_save_loses_only_steps(config, tmp_path, monkeypatch, where):
    train(config, tmp_path / "whole")
    run = Run(tmp_path / "killed")

    def kill(*_):
        raise Killed

    def break_the_disk():
        monkeypatch.setattr(files, "remove_unfinished", lambda folder: None)
        if where == "save_training":
            monkeypatch.setattr(checkpoint, "save_training", kill)
        elif where == "replace":
            monkeypatch.setattr(os, "replace", kill)
        else:
            monkeypatch.setattr(files, "point", kill)

    monkeypatch.setattr(pretrain.Trainer, "_draw", lambda self: None)
    at = 3 if where == "first" else 7
    with pytest.raises(Killed):
        train(config, run.folder, {at: break_the_disk})
    monkeypatch.undo()
    expected = {"save_training": 4, "replace": 4, "point": 8, "first": 4}[where]
    assert run.checkpoint() == run.step_folder(expected)
    if where == "point":  # step 8 was whole already: only the link had not been turned
        with pytest.raises(ConfigError, match="has done 8 of 8 steps"):
            go_on(run.folder)
    else:
        go_on(run.folder)
    assert what_counts(run.folder) == what_counts(tmp_path / "whole")
    names = os.listdir(run.checkpoints_folder)
    assert where == "point" or not [n for n in names if n.startswith(".")]


def test_a_run_killed_before_its_first_checkpoint_starts_again(config, tmp_path):
    train(config, tmp_path / "whole")
    ready = pretrain.start(config, tmp_path / "killed", Quiet())
    ready.trainer.train_step()
    ready.run.append({"step": 1, "loss": 1.0})
    ready.run.close()
    go_on(tmp_path / "killed")
    assert what_counts(tmp_path / "killed") == what_counts(tmp_path / "whole")


def test_a_finished_run_can_be_trained_on(config, tmp_path):
    train(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"has done 8 of 8 steps: give a larger --steps"):
        go_on(tmp_path / "run")
    ready = go_on(tmp_path / "run", steps=10, eval_every=5)
    assert [r["step"] for r in ready.run.metrics()] == list(range(11))
    assert configuration.load(ready.run.config_file).train.steps == 10


@pytest.mark.parametrize("change", [{"lr": 0.5}, {"batch_size": 2}, {"seed": 5}])
def test_what_would_make_it_another_run_is_refused(config, tmp_path, change):
    train(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"with train\.{next(iter(change))} = .*cannot become"):
        go_on(tmp_path / "run", steps=10, **change)


def test_another_text_is_refused(config, tmp_path):
    train(config, tmp_path / "run")
    (tmp_path / "text.txt").write_text(TEXT + "5 and 5 make 11.\n")
    with pytest.raises(ValueError, match=r"text\.txt' has changed since the run began"):
        go_on(tmp_path / "run", steps=10)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer.json", b'{"step": 8, '),
        ("trainer.json", b"[]"),
        ("trainer.json", b"{}"),
        ("trainer.json", b"\xff\xfe"),
        ("trainer.json", None),
        ("optimizer.safetensors", b"short"),
        ("optimizer.safetensors", None),
        ("model.safetensors", b"short"),
        ("model.safetensors", None),
        ("config.json", b"{"),
        ("config.json", None),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", None),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(config, tmp_path, name, content):
    train(config, tmp_path / "run")
    file = Run.open(tmp_path / "run").step_folder(8) / name
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        go_on(tmp_path / "run", steps=10)
    assert name in str(caught.value) or "step-000008" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_optimiser_of_another_model_is_refused(config, tmp_path):
    train(config, tmp_path / "run")
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, n_embd=32))
    train(wider, tmp_path / "wide")
    source = tmp_path / "wide" / "checkpoints" / "step-000008" / "optimizer.safetensors"
    target = tmp_path / "run" / "checkpoints" / "step-000008" / "optimizer.safetensors"
    target.write_bytes(source.read_bytes())
    target.with_name("SHA256SUMS").unlink()  # else it is refused as another file
    with pytest.raises(CheckpointError, match="does not fit this AdamW"):
        go_on(tmp_path / "run", steps=10)


def test_a_loss_that_is_no_number_stops_the_run(config, tmp_path, monkeypatch):
    ready = pretrain.start(config, tmp_path / "run", Quiet())
    loss = ready.trainer.task.loss

    def spoilt(model, batch):
        bad = ready.trainer.step == 5 and model.training
        return loss(model, batch) * (math.nan if bad else 1.0)

    monkeypatch.setattr(ready.trainer.task, "loss", spoilt)
    with pytest.raises(Diverged, match=r"the loss is nan .*at step 6.*is .*step-000004;"):
        ready.trainer.fit()
    assert [r["step"] for r in ready.run.metrics()] == [0, 1, 2, 3, 4, 5]
    assert all(math.isfinite(p.numpy().sum()) for p in ready.model.parameters())


def test_best_is_the_checkpoint_with_the_lowest_validation_loss(config, tmp_path, monkeypatch):
    ready = pretrain.start(config, tmp_path / "run", Quiet())
    monkeypatch.setattr(ready.trainer, "evaluate", lambda: abs(ready.trainer.step - 4) + 1.0)
    ready.trainer.fit()
    assert ready.run.checkpoint("best") == ready.run.step_folder(4).resolve()
    assert ready.run.checkpoint("latest") == ready.run.step_folder(8)
    assert ready.trainer.best == {"step": 4, "val_loss": 1.0}


def test_best_survives_a_stop(config, tmp_path, monkeypatch):
    """The later checkpoints are worse: the one before the stop stays the best."""
    at = {5: lambda: signal.raise_signal(signal.SIGINT)}
    losses = iter([9.0, 8.0, 1.0, 2.0, 2.0])  # at steps 0, 2, 4, then 6, 8
    monkeypatch.setattr(pretrain.Trainer, "evaluate", lambda self: next(losses))
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", at)
    best = tmp_path / "run" / "checkpoints" / "best"
    best.unlink()  # as after a kill between the checkpoint and the link
    ready = go_on(tmp_path / "run")
    assert ready.trainer.best == {"step": 4, "val_loss": 1.0}
    assert best.resolve().name == "step-000004"


def test_a_signal_in_the_last_step_changes_nothing(config, tmp_path):
    ready = train(config, tmp_path / "run", {STEPS: lambda: signal.raise_signal(signal.SIGINT)})
    assert ready.run.checkpoint() == ready.run.step_folder(STEPS)


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_gradients_are_clipped_where_asked(config, tmp_path, clip):
    settings = dataclasses.replace(config.train, grad_clip=clip)
    trainer = pretrain.start(
        dataclasses.replace(config, train=settings), tmp_path / "run", Quiet()
    ).trainer
    norm = trainer.train_step()["grad_norm"]  # before clipping
    squares = [
        (p.grad.numpy() ** 2).sum() for p in trainer.model.parameters() if p.grad is not None
    ]
    assert norm > 0.1
    assert math.sqrt(sum(squares)) == pytest.approx(clip or norm, rel=1e-4)


def test_validation_is_the_same_each_time_and_draws_nothing(config, tmp_path):
    trainer = pretrain.start(config, tmp_path / "run", Quiet()).trainer
    before = backend.random.state()
    assert trainer.evaluate() == trainer.evaluate()
    assert backend.random.state() == before


def test_the_batches_are_drawn_apart_from_the_weights(config, tmp_path):
    trainer = pretrain.start(config, tmp_path / "run", Quiet()).trainer
    assert trainer.task.state()["train"]["seed"] != backend.random.state()["seed"]


def test_the_folder_is_made_last(config, tmp_path):
    gone = dataclasses.replace(config, data=dataclasses.replace(config.data, source="no/such.txt"))
    with pytest.raises(FileNotFoundError, match=r"no file 'no/such\.txt'"):
        pretrain.start(gone, tmp_path / "run", Quiet())
    short = dataclasses.replace(config, train=dataclasses.replace(config.train, context=10**6))
    with pytest.raises(ValueError, match="longer text or a shorter context"):
        pretrain.start(short, tmp_path / "run", Quiet())
    prompt = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, tokenizer="char"),
        sample=dataclasses.replace(config.sample, prompt="狐"),
    )
    with pytest.raises(ValueError, match="狐"):
        pretrain.start(prompt, tmp_path / "run", Quiet())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_each_tokenizer_trains_and_samples(config, tmp_path, kind):
    data = dataclasses.replace(config.data, tokenizer=kind, vocab_size=300)
    ready = train(dataclasses.replace(config, data=data), tmp_path / "run")
    assert "".join(ready.sample()) == "".join(ready.sample())
    folder = ready.run.checkpoint()
    assert folder is not None
    again = Tokenizer.from_file(folder)
    assert again.kind == kind
    assert GPT.from_pretrained(folder).config == ready.model.config
    assert ready.model.config.eos_token_id == again.eos_id


def test_resuming_works_from_any_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = dataclasses.replace(config, data=dataclasses.replace(config.data, source="text.txt"))
    train(relative, "run")
    monkeypatch.chdir("/")
    go_on(tmp_path / "run", steps=10)


# --- other architectures --------------------------------------------------------------------------


def of(architecture, config, **train):
    """The tiny preset of the architecture, on the text and with the steps of `config`."""
    tiny = configuration.preset("tiny", architecture)
    steps = {"steps": STEPS, "eval_every": 2, "checkpoint_every": 4} | train
    return dataclasses.replace(
        tiny,
        data=dataclasses.replace(tiny.data, source=config.data.source),
        train=dataclasses.replace(tiny.train, **steps),
    )


@pytest.fixture
def documents(config, tmp_path):
    """`config` with a text of several documents, which BERT's pairs need."""
    texts = ["".join(f"{i + j} and {i} make {2 * i + j}. " for i in range(9)) for j in range(40)]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(texts))
    return config


@pytest.mark.parametrize(("stop", "ema"), [(3, 0.0), (4, 0.9)])
@pytest.mark.parametrize("architecture", ["llama", "bert", "lstm", "t5"])
def test_each_architecture_resumes_bit_for_bit(documents, tmp_path, architecture, stop, ema):
    there = of(architecture, documents, ema=ema)
    train(there, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(there, tmp_path / "stopped", {stop: lambda: signal.raise_signal(signal.SIGINT)})
    backend.manual_seed(12345)
    go_on(tmp_path / "stopped")
    assert what_counts(tmp_path / "stopped") == what_counts(tmp_path / "whole")


def test_a_bert_is_best_by_both_losses_and_says_what_there_is(documents, tmp_path):
    out = io.StringIO()
    ready = pretrain.start(of("bert", documents), tmp_path / "run", PlainLog(out))
    ready.trainer.fit()
    best = min(r["val_loss"] for r in ready.run.metrics() if r["step"] in (4, 8))
    assert ready.trainer.best is not None
    assert ready.trainer.best["val_loss"] == best
    assert "sentences of" in out.getvalue()
    assert "masked accuracy" in out.getvalue()
    assert ready.trainer.samples is None


def test_a_t5_knows_its_sentinels(documents, tmp_path):
    ready = train(of("t5", documents), tmp_path / "run")
    assert ready.tokenizer.token_to_id("<extra_id_0>") is not None
    assert ready.model.config.vocab_size == ready.tokenizer.vocab_size
    last = ready.run.checkpoint()
    assert last is not None
    assert Tokenizer.from_file(last).token_to_id("<extra_id_99>") is not None


def test_another_architecture_is_another_run(documents, tmp_path):
    train(of("lstm", documents), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"model\.architecture = lstm, which cannot become gpt"):
        pretrain.resume(Run.open(tmp_path / "run"), documents, Quiet())
