"""The loop: accumulation, limits, the average, what is kept, what is said when it fails."""

import dataclasses
import errno
import io
import itertools
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from tinygrad_llm import backend, ops
from tinygrad_llm.data.loader import IGNORE_INDEX
from tinygrad_llm.models.gpt import GPT, GPTConfig
from tinygrad_llm.optim import SGD, LRScheduler
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train import files, plot, pretrain
from tinygrad_llm.train.checkpoint import CheckpointError
from tinygrad_llm.train.config import ConfigError, TrainConfig
from tinygrad_llm.train.log import PlainLog
from tinygrad_llm.train.run import Run
from tinygrad_llm.train.trainer import Diverged, Interrupted, NotSaved, OutOfMemory, Trainer

TEXT = "".join(f"{i} and {i} make {2 * i}.\n" for i in range(400))


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    tiny = configuration.preset("tiny")
    return dataclasses.replace(
        tiny,
        data=dataclasses.replace(tiny.data, source=str(tmp_path / "text.txt")),
        train=dataclasses.replace(tiny.train, steps=8, eval_every=2, checkpoint_every=2),
    )


def changed(config, **train):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


class Watched(PlainLog):
    """Calls `at[step]()` when the record of that step comes."""

    def __init__(self, at):
        super().__init__(io.StringIO())
        self.at = at or {}

    def record(self, record):
        super().record(record)
        self.at.get(record["step"], lambda: None)()


def begin(config, folder, at=None):
    """A run that is ready."""
    return pretrain.start(config, folder, Watched(at))


def train(config, folder, at=None):
    ready = begin(config, folder, at)
    ready.trainer.fit()
    return ready


def go_on(folder, **changes):
    run = Run.open(folder)
    settings = changed(configuration.load(run.config_file), **changes)
    ready = pretrain.resume(run, settings, PlainLog(io.StringIO()))
    ready.trainer.fit()
    return ready


def whole(folder):
    """Every byte of the last checkpoint, without the time it took."""
    last = Run.open(folder).checkpoint()
    assert last is not None
    found = {str(p.relative_to(last)): p.read_bytes() for p in last.rglob("*") if p.is_file()}
    state = json.loads(found.pop("trainer.json"))
    del found["SHA256SUMS"], state["elapsed"]
    return found, state


# --- accumulation ---------------------------------------------------------------------------------


class Pieces:
    """A task with given batches, of which only steps are asked."""

    def __init__(self, batches):
        self.batches = itertools.cycle(batches)

    def next_batch(self):
        return next(self.batches)

    def size(self, batch):
        return int((batch[1] != IGNORE_INDEX).sum())

    def loss(self, model, batch):
        return model.loss(*batch, ignore_index=IGNORE_INDEX)

    def validation(self):
        return []

    def save(self, folder):
        pass

    def state(self):
        return {}

    def load_state(self, state):
        pass


def one_step(model, batches, tmp_path):
    """The record of one step over the batches, and its gradients."""
    optimizer = SGD(model.parameters(), lr=0.0)
    config = TrainConfig(accumulate=len(batches), grad_clip=0.0)
    schedule = LRScheduler(optimizer, lambda step: 1.0)
    run = Run(tmp_path / "run")
    trainer = Trainer(
        model, optimizer, schedule, Pieces(batches), config, run, PlainLog(io.StringIO())
    )
    record = trainer.train_step()
    return record, [p.grad.numpy().copy() for p in model.parameters()], trainer.tokens


@pytest.mark.parametrize("targets", [(10, 10, 10), (30, 1, 7), (0, 3, 12), (5,)])
def test_the_gradient_of_the_pieces_is_that_of_the_one_big_batch(targets, tmp_path):
    """Also when they have different numbers of targets: float64 leaves only the rounding."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 11, (2 * len(targets), 16))
    y = rng.integers(0, 11, x.shape)
    pieces = []
    for i, n in enumerate(targets):
        rows = slice(2 * i, 2 * i + 2)
        y[rows].reshape(-1)[n:] = IGNORE_INDEX
        pieces.append((x[rows], y[rows]))
    backend.manual_seed(1)
    size = GPTConfig(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    model = GPT(size).to("float64")
    record, gradients, tokens = one_step(model, pieces, tmp_path)
    expected, one_gradients, one_tokens = one_step(model, [(x, y)], tmp_path)
    assert tokens == one_tokens == sum(targets)
    assert record["loss"] == pytest.approx(expected["loss"], rel=1e-14)
    assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-13)
    for ours, theirs in zip(gradients, one_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-15 * max(1, np.abs(theirs).max()))


def test_a_run_that_accumulates_resumes_bit_for_bit(config, tmp_path):
    config = changed(config, accumulate=3, batch_size=2)
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", {5: lambda: signal.raise_signal(signal.SIGTERM)})
    go_on(tmp_path / "cut")
    assert whole(tmp_path / "cut") == whole(tmp_path / "whole")
    assert whole(tmp_path / "cut")[1]["tokens"] == 8 * 3 * 2 * 16


# --- limits ---------------------------------------------------------------------------------------


def test_a_token_budget_ends_the_run_validated_and_saved(config, tmp_path):
    tokens = 4 * 16  # in a step
    ready = train(changed(config, max_tokens=2 * tokens + 1), tmp_path / "run")
    assert ready.trainer.end is not None
    assert ready.trainer.end.flag == "--max-tokens"
    assert ready.run.checkpoint() == ready.run.step_folder(3)
    assert "val_loss" in ready.run.metrics()[-1]
    with pytest.raises(ConfigError, match=r"seen 192 tokens.*give a larger --max-tokens"):
        go_on(tmp_path / "run")
    assert go_on(tmp_path / "run", max_tokens=0).trainer.step == 8


def test_a_time_budget_counts_all_processes(config, tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("tinygrad_llm.train.trainer.time.monotonic", lambda: next(clock))
    ready = train(changed(config, max_seconds=9.5), tmp_path / "run")
    assert 0 < ready.trainer.step < 8
    assert ready.run.checkpoint() == ready.run.step_folder(ready.trainer.step)
    with pytest.raises(ConfigError, match="give a larger --max-seconds"):
        go_on(tmp_path / "run")


def test_early_stopping_also_across_a_stop(config, tmp_path, monkeypatch):
    config = changed(config, patience=2, steps=20, checkpoint_every=20)
    losses = {0: 5.0, 2: 3.0, 4: 3.5, 6: 3.0}
    monkeypatch.setattr(Trainer, "evaluate", lambda self: losses[self.step])
    ready = train(config, tmp_path / "whole")
    assert ready.trainer.step == 6
    assert ready.run.checkpoint("best") == ready.run.step_folder(2).resolve()  # saved as the best
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", {5: lambda: signal.raise_signal(signal.SIGINT)})
    assert go_on(tmp_path / "cut").trainer.step == 6
    assert whole(tmp_path / "cut") == whole(tmp_path / "whole")
    with pytest.raises(ConfigError, match=r"2 validations without a better loss than 3\.0000"):
        go_on(tmp_path / "cut")


# --- one batch ------------------------------------------------------------------------------------


def test_overfitting_one_batch_brings_its_loss_to_nearly_0(config, tmp_path):
    config = dataclasses.replace(
        config, model=configuration.ModelConfig(n_layer=1, n_head=2, n_embd=32)
    )
    config = changed(
        config,
        overfit_one_batch=True,
        **{"steps": 150, "lr": 1e-2, "eval_every": 150, "checkpoint_every": 50, "batch_size": 2},
    )
    ready = train(config, tmp_path / "whole")
    last = ready.run.metrics()[-1]
    assert last["loss"] < 0.1
    assert last["val_loss"] == pytest.approx(last["loss"], rel=0.2)  # the same batch
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", {70: lambda: signal.raise_signal(signal.SIGINT)})
    go_on(tmp_path / "cut")
    assert whole(tmp_path / "cut") == whole(tmp_path / "whole")


# --- the average of the weights -------------------------------------------------------------------


def test_the_average_is_evaluated_saved_beside_and_resumed(config, tmp_path):
    config = changed(config, ema=0.9)
    ready = train(config, tmp_path / "whole")
    assert all("val_loss_ema" in r for r in ready.run.metrics() if "val_loss" in r)
    folder = ready.run.step_folder(8)
    average, weights = GPT.from_pretrained(folder / "ema"), GPT.from_pretrained(folder)
    assert not np.array_equal(average.lm_head.weight.numpy(), weights.lm_head.weight.numpy())
    assert (folder / "ema" / "tokenizer.json").is_file()
    trainer = ready.trainer
    assert trainer.average is not None
    for p, mean in zip(average.parameters(), trainer.average.arrays, strict=True):
        np.testing.assert_array_equal(p.numpy(), mean)
    last = ready.run.metrics()[-1]
    with trainer.average.in_place():
        assert trainer.evaluate() == last["val_loss_ema"]
    assert trainer.evaluate() == last["val_loss"] != last["val_loss_ema"]
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", {5: lambda: signal.raise_signal(signal.SIGTERM)})
    go_on(tmp_path / "cut")
    assert whole(tmp_path / "cut") == whole(tmp_path / "whole")


def test_the_average_does_not_touch_the_training(config, tmp_path):
    train(config, tmp_path / "without")
    train(changed(config, ema=0.9), tmp_path / "with")
    with_, without = (whole(tmp_path / name)[0] for name in ("with", "without"))
    assert with_["model.safetensors"] == without["model.safetensors"]


def test_a_checkpoint_without_its_average_is_refused(config, tmp_path):
    train(changed(config, ema=0.9), tmp_path / "run")
    (tmp_path / "run/checkpoints/step-000008/ema/model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="ema"):
        go_on(tmp_path / "run", steps=10)


# --- what is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "left"), [(0, [2, 4, 6, 8]), (1, [4, 8]), (2, [4, 6, 8]), (9, [2, 4, 6, 8])]
)
def test_the_newest_and_the_best_checkpoints_are_kept(config, tmp_path, monkeypatch, keep, left):
    monkeypatch.setattr(Trainer, "evaluate", lambda self: abs(self.step - 4) + 1.0)
    run = train(changed(config, keep_last=keep), tmp_path / "run").run
    found = sorted(p.name for p in run.checkpoints_folder.glob("step-*"))
    assert found == [f"step-{n:06d}" for n in left]
    assert run.checkpoint("best") == run.step_folder(4).resolve()
    assert [p.name for p in run.checkpoints_folder.iterdir() if p.name.startswith(".")] == []


def test_a_best_that_was_deleted_by_hand_is_forgotten(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "evaluate", lambda self: abs(self.step - 4) + 1.0)
    run = train(config, tmp_path / "run").run
    files.remove_folder(run.step_folder(4))
    ready = go_on(tmp_path / "run", steps=10)
    assert ready.trainer.best == {"step": 10, "val_loss": 7.0}
    assert run.checkpoint("best") == run.step_folder(10).resolve()


# --- failures -------------------------------------------------------------------------------------


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["fsync", "save_file", "append", "point", "mkdir"])
def test_a_full_disk_leaves_the_last_whole_checkpoint(config, tmp_path, monkeypatch, where):
    train(config, tmp_path / "whole")

    def fill_the_disk():
        if where == "fsync":
            monkeypatch.setattr(os, "fsync", no_room)
        elif where == "save_file":
            monkeypatch.setattr("tinygrad_llm.models.pretrained.save_file", no_room)
        elif where == "append":
            monkeypatch.setattr(Run, "append", no_room)
        elif where == "point":
            monkeypatch.setattr(files, "point", no_room)
        else:
            monkeypatch.setattr(Path, "mkdir", no_room)

    with pytest.raises(NotSaved) as caught:
        train(config, tmp_path / "full", {5: fill_the_disk})
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)
    run, sentence = Run.open(tmp_path / "full"), str(caught.value)
    assert "No space left on device" in sentence
    assert "\n" not in sentence
    last = run.step_folder(6 if where == "point" else 4)  # the link is turned after the rename
    assert f"the last good checkpoint is {last}" in sentence
    assert run.checkpoint() == last
    assert not list(run.checkpoints_folder.glob(".unfinished*"))
    go_on(run.folder)
    assert whole(run.folder) == whole(tmp_path / "whole")


def test_a_write_that_safetensors_cannot_finish(config, tmp_path, monkeypatch):
    """It has an exception of its own, here from a real limit on the size of a file."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))

    try:
        with pytest.raises(NotSaved, match=r"step-000004: put that right"):
            train(config, tmp_path / "run", {5: limit})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    go_on(tmp_path / "run")


def no_memory(*_, **__):
    raise MemoryError("none is left")


@pytest.mark.parametrize(
    ("failing", "why"), [(no_room, "No space left on device"), (no_memory, "none is left")]
)
def test_a_picture_that_cannot_be_drawn_is_a_line(config, tmp_path, monkeypatch, failing, why):
    monkeypatch.undo()
    monkeypatch.setattr(plot, "draw_loss", failing)
    out = io.StringIO()
    pretrain.start(config, tmp_path / "run", PlainLog(out)).trainer.fit()
    assert out.getvalue().endswith(f"loss.png was not drawn: {why}\n")


def test_a_loss_that_is_no_number_names_the_op(config, tmp_path, monkeypatch):
    ready = begin(config, tmp_path / "run")
    loss, seen = ready.trainer.task.loss, []

    def spoilt(model, batch):
        value = loss(model, batch)
        if ready.trainer.step == 5 and model.training:
            seen.append(value.item())
            value = ops.log(value - value)
        return value

    monkeypatch.setattr(ready.trainer.task, "loss", spoilt)
    with (
        np.errstate(divide="ignore"),
        pytest.raises(Diverged, match=r"at step 6: Log made infinity in 1 of 1 .*, so training"),
    ):
        ready.trainer.fit()
    assert len(seen) == 2
    assert seen[0] == seen[1]  # the same batch, the same dropout
    assert all(math.isfinite(p.numpy().sum()) for p in ready.model.parameters())


def test_two_runs_never_share_a_folder(config, tmp_path):
    ready = begin(config, tmp_path / "run")
    with pytest.raises(OSError, match=rf"in use by another process \(pid {os.getpid()}\)"):
        go_on(tmp_path / "run")
    ready.trainer.fit()
    assert go_on(tmp_path / "run", steps=9).trainer.step == 9
    Run.open(tmp_path / "run").hold()


@pytest.mark.parametrize("key", ["data", "random", "limits", "tokens", "schedule"])
def test_a_state_with_a_part_missing_is_a_damaged_checkpoint(config, tmp_path, key):
    train(config, tmp_path / "run")
    path = tmp_path / "run/checkpoints/step-000008/trainer.json"
    state = json.loads(path.read_text())
    del state[key]
    path.write_text(json.dumps(state))
    path.with_name("SHA256SUMS").unlink()  # else it is refused as another file
    with pytest.raises(CheckpointError, match=rf"trainer\.json is damaged .*{key}"):
        go_on(tmp_path / "run", steps=10)


def test_nan_is_never_the_best(config, tmp_path):
    ready = train(config, tmp_path / "run")
    trainer = ready.trainer
    trainer.best = None
    for step, loss in ((100, math.nan), (101, 2.0), (102, 3.0)):
        trainer.step = step
        trainer.save({"step": step, "val_loss": loss})
    assert trainer.best == {"step": 101, "val_loss": 2.0}


class Scored(Pieces):
    """A task that says how good the model is by a number of its own."""

    score = "val_f1"

    def __init__(self, batches, found):
        super().__init__(batches)
        self.found = iter(found)

    def evaluate(self, model):
        return {"val_loss": 9.0, "val_f1": next(self.found), "val_precision": 0.5}

    def remark(self, found):
        return "half of it" if found["val_f1"] == 0.5 else None


def test_a_task_with_a_score_of_its_own_decides_what_is_best(tmp_path):
    model = GPT(GPTConfig(vocab_size=11, n_positions=4, n_embd=8, n_layer=1, n_head=2))
    batch = (np.zeros((2, 4), dtype=np.int64), np.ones((2, 4), dtype=np.int64))
    optimizer = SGD(model.parameters(), lr=0.0)
    config = TrainConfig(
        steps=9, eval_every=1, checkpoint_every=9, patience=2, ema=0.5, processes=1
    )
    task = Scored([batch], [0.1, 0.1, 0.5, 0.4, 0.7, 0.6, 0.7, 0.8, 0.6, 0.9])
    run = Run.new(tmp_path / "run")
    run.begin("")
    out = io.StringIO()
    schedule = LRScheduler(optimizer, lambda step: 1.0)
    trainer = Trainer(model, optimizer, schedule, task, config, run, PlainLog(out))
    trainer.fit()
    # Every second number is that of the average: it is recorded, and decides nothing.
    records = [r for r in Run.open(tmp_path / "run").metrics() if "val_f1" in r]
    assert [r["val_f1"] for r in records] == [0.1, 0.5, 0.7, 0.7, 0.6]
    assert [r["val_f1_ema"] for r in records] == [0.1, 0.4, 0.6, 0.8, 0.9]
    assert trainer.best == {"step": 2, "val_loss": 9.0, "val_f1": 0.7}
    assert trainer.end is not None
    assert trainer.end.reason == "had 2 validations without a better f1 than 0.7000"
    assert out.getvalue().count("half of it") == 1


def test_weights_that_a_step_has_spoilt_are_not_saved(config, tmp_path, monkeypatch):
    real = Trainer.evaluate

    def evaluate(self):
        return math.nan if self.step == 6 else real(self)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    with pytest.raises(Diverged, match=r"validation loss is nan after step 6.*step-000004;"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run/checkpoints/step-000006").exists()


def test_latest_names_a_checkpoint_again_after_the_newest_was_deleted(config, tmp_path):
    run = train(config, tmp_path / "run").run
    newest = run.checkpoint()
    assert newest is not None
    files.remove_folder(newest)
    begun = go_on(run.folder)  # from the one before, to the same end
    latest, wanted = files.pointed(run.checkpoints_folder / "latest"), begun.run.checkpoint()
    assert latest is not None
    assert wanted is not None
    assert latest == wanted.resolve()


# --- rates, memory, texts on the way, speed -------------------------------------------------------


def sampled(config, every, tokens=5):
    return dataclasses.replace(
        config, sample=dataclasses.replace(config.sample, every=every, every_max_new_tokens=tokens)
    )


def trained(folder):
    """`whole` without the copy of the configuration: what training has made."""
    found, state = whole(folder)
    return {name: content for name, content in found.items() if name != "run.toml"}, state


def said(ready):
    """What the log of a run holds."""
    return ready.trainer.log.out.getvalue()


def texts(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_rates_by_group_also_across_a_stop(config, tmp_path, number):
    factors = {"wte": 0.1, "h.0.attn": 2.0, "wpe": 0.0}
    begun = begin(config, tmp_path / "plain")
    start = [p.numpy().copy() for p in begun.model.parameters()]
    begun.run.close()
    config = changed(config, lr_groups=factors, weight_decay=0.1)
    ready = train(config, tmp_path / "whole")
    rates = {group["name"]: group["lr"] for group in ready.trainer.optimizer.param_groups}
    base = rates["decay"]
    assert rates["decay × 0.1"] == pytest.approx(0.1 * base)
    assert rates["no_decay × 2"] == pytest.approx(2 * base)
    record, names = ready.run.metrics()[1], dict(ready.model.named_parameters())
    assert record["lr"] == pytest.approx(config.train.lr / (config.train.warmup + 1))  # the base
    wpe = list(names).index("transformer.wpe.weight")
    np.testing.assert_array_equal(names["transformer.wpe.weight"].numpy(), start[wpe])
    wte = names["transformer.wte.weight"].numpy()
    assert (wte != start[list(names).index("transformer.wte.weight")]).any()

    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", {5: lambda: signal.raise_signal(number)})
    with pytest.raises(ConfigError, match=r"lr_groups = .*cannot become \{\}"):
        go_on(tmp_path / "cut", lr_groups={})
    go_on(tmp_path / "cut")
    assert whole(tmp_path / "cut") == whole(tmp_path / "whole")


def test_a_rate_for_nothing_is_refused_before_the_folder_is_made(config, tmp_path):
    with pytest.raises(ValueError, match=r"'h\.1' matches no parameter; the nearest is 'h\.0'"):
        begin(changed(config, lr_groups={"h.1": 0.5}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_checkpointing_trains_the_same_weights_also_when_it_comes_on_the_way(config, tmp_path):
    assert config.model.dropout > 0
    train(config, tmp_path / "kept")
    ready = train(changed(config, gradient_checkpointing=True), tmp_path / "again")
    assert ready.model.is_gradient_checkpointing
    assert trained(tmp_path / "again") == trained(tmp_path / "kept")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", {5: lambda: signal.raise_signal(signal.SIGINT)})
    assert go_on(tmp_path / "cut", gradient_checkpointing=True).model.is_gradient_checkpointing
    assert trained(tmp_path / "cut") == trained(tmp_path / "kept")


def test_texts_on_the_way_do_not_touch_the_training(config, tmp_path):
    train(config, tmp_path / "without")
    ready = train(sampled(config, 3), tmp_path / "with")
    assert trained(tmp_path / "with") == trained(tmp_path / "without")
    found = texts(tmp_path / "with")
    assert [text["step"] for text in found] == [3, 6]
    assert all(text["text"] for text in found)
    assert f"step 6 writes: {found[1]['text']!r}" in said(ready)
    assert not (tmp_path / "without" / "samples.jsonl").exists()


def test_a_resumed_run_writes_the_texts_of_the_whole_one(config, tmp_path):
    config = changed(sampled(config, 1), checkpoint_every=4)
    train(config, tmp_path / "whole")

    def fail():
        raise KeyboardInterrupt  # between two checkpoints, nothing is saved

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", {7: fail})
    assert [text["step"] for text in texts(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
    go_on(tmp_path / "cut")
    assert texts(tmp_path / "cut") == texts(tmp_path / "whole")
    assert [text["step"] for text in texts(tmp_path / "cut")] == list(range(1, 9))
    assert whole(tmp_path / "cut") == whole(tmp_path / "whole")


def test_a_run_that_begins_anew_forgets_its_texts(config, tmp_path):
    ready = begin(sampled(config, 2), tmp_path / "run")
    assert ready.trainer.samples is not None
    ready.trainer.samples.take(2)
    ready.run.close()
    go_on(tmp_path / "run")
    assert [text["step"] for text in texts(tmp_path / "run")] == [2, 4, 6, 8]


def test_a_text_that_cannot_be_written_on_a_full_disk(config, tmp_path, monkeypatch):
    ready = begin(sampled(config, 3), tmp_path / "run")
    monkeypatch.setattr(ready.trainer.samples, "take", no_room)
    with pytest.raises(NotSaved, match=r"No space left .* after step 3; .*step-000002"):
        ready.trainer.fit()


def test_weights_that_write_nothing_are_said_to(config, tmp_path, monkeypatch):
    def spoilt():
        raise FloatingPointError("the model's logits are not numbers")

    ready = begin(sampled(config, 3), tmp_path / "run")
    monkeypatch.setattr(ready.trainer.samples, "write", spoilt)
    ready.trainer.fit()
    assert "no sample after step 3: the model's logits" in said(ready)


def test_utilisation_is_recorded_shown_and_can_be_left_out(config, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "measured_peak", lambda device: 1e9)
    ready = train(config, tmp_path / "with")
    flops = ready.model.flops_per_token(config.train.context)
    for record in ready.run.metrics()[1:]:
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * flops / 1e9)
    assert "peak: 1 GFLOP/s (measured, float32)" in said(ready)
    assert "· MFU " in said(ready)
    ready = train(changed(config, mfu=False), tmp_path / "without")
    assert not any("mfu" in record for record in ready.run.metrics())
    assert "MFU" not in said(ready)
    assert trained(tmp_path / "with") == trained(tmp_path / "without")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_too_little_memory_is_one_sentence_and_the_checkpoint_stays(
    config, tmp_path, monkeypatch, checkpointing
):
    config = changed(config, gradient_checkpointing=checkpointing)
    train(config, tmp_path / "whole")
    ready = begin(config, tmp_path / "run")
    loss = ready.trainer.task.loss

    def large(model, batch):
        value = loss(model, batch)
        if ready.trainer.step == 5:
            np.empty(2**60, np.uint8)  # raises MemoryError
        return value

    monkeypatch.setattr(ready.trainer.task, "loss", large)
    with pytest.raises(OutOfMemory) as caught:
        ready.trainer.fit()
    sentence = str(caught.value)
    for words in (
        "not enough memory to go on after step 5 with batch_size 4 and context 16 (Unable to",
        f"the last good checkpoint is {ready.run.step_folder(4)};",
        "a smaller --batch-size (with --accumulate for the same update) or --context",
    ):
        assert words in sentence
    assert ("--gradient-checkpointing" in sentence) == (not checkpointing)
    assert "\n" not in sentence
    go_on(tmp_path / "run", gradient_checkpointing=True)
    assert trained(tmp_path / "run") == trained(tmp_path / "whole")
