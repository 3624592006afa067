"""Batches on their way to a GPU that copies only when it must: tests/fake_cupy.py."""

import dataclasses
import io
import json
from typing import Any, NamedTuple

import numpy as np
import pytest

from tinygrad_llm import backend
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train import pretrain
from tinygrad_llm.train.log import PlainLog
from tinygrad_llm.train.run import Run
from tinygrad_llm.train.trainer import Interrupted, Trainer
from tinygrad_llm.train.transfer import UploadedTask, Uploader, with_arrays

pytestmark = pytest.mark.usefixtures("fake_cupy")


# --- one batch ------------------------------------------------------------------------------------


def numbered(n):
    return [np.full((4, 5), n), np.full(3, n, np.float32), np.full((2, 0), n)]


def test_arrays_are_there_once_they_were_waited_for():
    uploader = Uploader("cuda")
    found = uploader.upload(numbered(7))
    assert not (found.arrays[0].host == 7).all()  # the copy is still to come
    for array, expected in zip(found.wait(), numbered(7), strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array.get(), expected)


def test_memory_of_the_host_is_not_used_again_before_it_was_copied():
    uploader = Uploader("cuda:0")
    batches = [uploader.upload(numbered(n)) for n in range(6)]
    assert len(uploader._staging) == 2
    for n, batch in enumerate(batches):
        assert all((array.get() == n).all() for array in batch.wait())


def test_a_larger_batch_gets_larger_memory():
    uploader = Uploader("cuda")
    sizes = [10, 20_000, 30, 50_000, 50_000]
    batches = [uploader.upload([np.arange(n)]) for n in sizes]
    for n, batch in zip(sizes, batches, strict=True):
        np.testing.assert_array_equal(batch.wait()[0].get(), np.arange(n))


def test_a_copy_waits_for_whoever_had_the_memory_before(fake_cupy, monkeypatch):
    """Its first wait is for an event of the computing stream, recorded when the memory came."""
    waited, wait = [], fake_cupy.Stream.wait_event
    monkeypatch.setattr(
        fake_cupy.Stream, "wait_event", lambda self, e: (waited.append((self, e)), wait(self, e))
    )
    uploader = Uploader("cuda")
    uploader.upload([np.arange(3)])
    ((stream, event),) = waited
    assert stream is uploader.stream
    assert event.stream is fake_cupy.get_current_stream()


def test_an_array_that_nobody_waits_for_outlives_its_copy():
    uploader = Uploader("cuda")
    uploader.upload([np.arange(3)])
    (under_way,) = uploader._under_way
    uploader.stream.synchronize()
    uploader.upload([np.arange(3)])
    assert under_way not in uploader._under_way


def test_views_and_odd_strides_are_copied_as_they_are_seen():
    values = np.arange(24).reshape(4, 6)[::2, ::-3]
    (array,) = Uploader("cuda").upload([values]).wait()
    np.testing.assert_array_equal(array.get(), values)


# --- the batches of a task ------------------------------------------------------------------------


class Counting:
    """A task whose n-th batch is full of n, and whose model is nothing."""

    def __init__(self, draws=False):
        self.n, self.draws = 0, draws

    def next_batch(self):
        self.n += 1
        if self.draws:
            backend.random.words(4)
        return {"x": np.full(3, self.n), "y": (np.full(2, -self.n),)}

    def loss(self, model, batch):
        return float(batch["x"].get()[0]), float(batch["y"][0].get()[0])

    def validation(self):
        return [{"x": np.full(3, 10 * n), "y": (np.zeros(1),)} for n in range(3)]

    def size(self, batch):
        return len(batch["x"])

    def state(self):
        return {"n": self.n}

    def load_state(self, state):
        self.n = state["n"]


class Pair(NamedTuple):
    x: Any
    y: Any


def test_the_arrays_of_a_batch_are_found_in_whatever_it_is():
    batch = {"x": np.arange(6).reshape(3, 2), "y": [Pair(np.arange(3), "name"), 7]}
    found = with_arrays(batch, lambda array: array[:2])
    np.testing.assert_array_equal(found["x"], [[0, 1], [2, 3]])
    pair, seven = found["y"]
    assert isinstance(pair, Pair)
    np.testing.assert_array_equal(pair.x, [0, 1])
    assert (pair.y, seven) == ("name", 7)


def sending(task: Any) -> Any:
    return UploadedTask(task, "cuda")


def test_the_next_batch_is_drawn_during_a_step_and_not_counted_as_used():
    inner = Counting()
    task = sending(inner)
    for n in range(1, 5):
        batch = task.next_batch()
        assert task.state() == {"n": n}
        assert task.size(batch) == 3
        assert task.loss(None, batch) == (n, -n)
        assert inner.n == n + 1  # sent already
        assert task.state() == {"n": n}
    task.load_state({"n": 7})
    assert task.loss(None, task.next_batch()) == (8, -8)


def test_the_batches_of_an_accumulated_step_come_in_their_order():
    task = sending(Counting())
    for step in range(3):
        batches = [task.next_batch() for _ in range(2)]
        assert [task.loss(None, b)[0] for b in batches] == [2 * step + 1, 2 * step + 2]
        assert task.state() == {"n": 2 * step + 2}


def test_a_batch_that_is_looked_at_twice_draws_one_ahead():
    inner = Counting()
    task = sending(inner)
    batch = task.next_batch()
    assert task.loss(None, batch) == task.loss(None, batch)
    assert inner.n == 2


def test_a_task_that_draws_from_the_models_random_stream_is_not_drawn_ahead():
    inner = Counting(draws=True)
    task = sending(inner)
    backend.manual_seed(0)
    for n in range(1, 4):
        task.loss(None, task.next_batch())
        assert (inner.n, backend.random.offset) == (n, n)


def test_validation_batches_are_all_there_and_draw_nothing():
    inner = Counting()
    task = sending(inner)
    assert [task.loss(None, b)[0] for b in task.validation()] == [0, 10, 20]
    assert inner.n == 0


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)
    (tmp_path / "text.txt").write_text("".join(f"{i} and {i} make {2 * i}.\n" for i in range(400)))
    tiny = configuration.preset("tiny")
    train = dataclasses.replace(
        tiny.train, steps=6, eval_every=2, checkpoint_every=2, mfu=False, device="cuda"
    )
    data = dataclasses.replace(tiny.data, source=str(tmp_path / "text.txt"))
    model = dataclasses.replace(tiny.model, dropout=0.1)
    return dataclasses.replace(tiny, data=data, train=train, model=model)


def run(config, folder):
    out = io.StringIO()
    ready = pretrain.start(config, folder, PlainLog(out))
    ready.trainer.fit()
    return ready, out.getvalue()


def saved(folder):
    last = Run.open(folder).checkpoint()
    assert last is not None
    found = {p.name: p.read_bytes() for p in last.iterdir() if p.name != "SHA256SUMS"}
    state = json.loads(found.pop("trainer.json"))
    del state["elapsed"]
    return found, state


def test_a_run_that_was_stopped_goes_on_bit_for_bit(config, tmp_path):
    whole, _ = run(config, tmp_path / "whole")
    ready = pretrain.start(config, tmp_path / "cut", PlainLog(io.StringIO()))
    step = ready.trainer.train_step

    def stopping():
        record = step()
        if record["step"] == 3:
            ready.trainer._signal = 15
        return record

    ready.trainer.train_step = stopping
    with pytest.raises(Interrupted):
        ready.trainer.fit()
    again = Run.open(tmp_path / "cut")
    resumed = pretrain.resume(again, configuration.load(again.config_file), PlainLog(io.StringIO()))
    resumed.trainer.fit()
    assert saved(tmp_path / "cut") == saved(tmp_path / "whole")
    assert whole.trainer.task.state() == resumed.trainer.task.state()


def test_the_losses_and_the_place_in_the_data_are_those_of_the_cpu(config, tmp_path):
    on_gpu, _ = run(config, tmp_path / "gpu")
    on_cpu = dataclasses.replace(config.train, device="cpu", processes=1)
    reference, _ = run(dataclasses.replace(config, train=on_cpu), tmp_path / "cpu")
    for got, expected in zip(on_gpu.run.metrics(), reference.run.metrics(), strict=True):
        for name in ("loss", "val_loss"):
            assert (name in got) == (name in expected)
            assert got.get(name, 0.0) == pytest.approx(expected.get(name, 0.0), rel=1e-6)
    (_, gpu), (_, cpu) = saved(tmp_path / "gpu"), saved(tmp_path / "cpu")
    assert (gpu["data"], gpu["random"]) == (cpu["data"], cpu["random"])


def test_memory_is_recorded_at_each_step_and_told(config, tmp_path, fake_cupy):
    ready, out = run(config, tmp_path / "run")
    records = [r for r in ready.run.metrics() if r["step"]]
    assert all(0 < r["memory_used"] <= r["memory"] for r in records)
    peaks = [r["memory"] for r in records]
    assert peaks == sorted(peaks)
    assert peaks[-1] <= fake_cupy._default_pool.total
    lines = out.splitlines()
    assert any(line.startswith("step 6/6") and line.endswith((" MB", " kB")) for line in lines)
    assert lines[-1].startswith("memory: ")
    assert "of the GPU's 8.6 GB at most" in lines[-1]
