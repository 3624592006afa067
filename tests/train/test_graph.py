"""A step as a CUDA graph: the same bits as without, or a refusal. On tests/fake_cupy.py, in whose
captures nothing is computed and nothing may wait, with the kernels in Triton's interpreter."""

import dataclasses
import gc
import importlib.util
import io
import json
from typing import Any

import numpy as np
import pytest

import tinygrad_llm as tg
from tinygrad_llm import backend
from tinygrad_llm.kernels import mode, optimizer
from tinygrad_llm.ops.dropout import keep_mask
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train import graph, pretrain
from tinygrad_llm.train.config import ConfigError
from tinygrad_llm.train.log import PlainLog
from tinygrad_llm.train.run import Run
from tinygrad_llm.train.trainer import Diverged, Interrupted, OutOfMemory, Trainer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or mode.choose().name != "interpret",
    reason="the kernels run in Triton's interpreter here",
)


@pytest.fixture(autouse=True)
def kernels(fake_cupy, monkeypatch):
    fake_cupy.install_kernels(monkeypatch)
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)


@pytest.fixture
def config(tmp_path):
    """Dropout, a warm-up of the rate, decay for some: all that changes from step to step."""
    (tmp_path / "text.txt").write_text("".join(f"{i} and {i} make {2 * i}.\n" for i in range(400)))
    tiny = configuration.preset("tiny")
    train = dataclasses.replace(
        tiny.train, steps=5, warmup=3, eval_every=9, checkpoint_every=9, batch_size=1, context=8,
        device="cuda", eval_batches=1, mfu=False, lr=1e-2,
    )  # fmt: skip
    data = dataclasses.replace(tiny.data, source=str(tmp_path / "text.txt"))
    model = dataclasses.replace(tiny.model, dropout=0.1, n_layer=1, n_head=1)
    return dataclasses.replace(tiny, data=data, train=train, model=model)


def begin(config, folder, **train) -> Any:
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
    return pretrain.start(config, folder, PlainLog(io.StringIO()))


def train(config, folder, **options):
    """What a run leaves behind: its losses and norms, and its last checkpoint."""
    ready = begin(config, folder, **options)
    with tg.use_kernels("triton"):
        ready.trainer.fit()
    return ready, left_behind(folder)


_launched: list[Any] = []  # so that it is computed once


def launched(config, folder):
    """The same without a graph."""
    if not _launched:
        _launched.append(train(config, folder / "launched")[1])
    return _launched[0]


def left_behind(folder):
    run = Run.open(folder)
    metrics = [[r.get(k) for k in ("step", "loss", "grad_norm", "lr")] for r in run.metrics()]
    last = run.checkpoint()
    assert last is not None
    files = {p.name: p.read_bytes() for p in last.iterdir() if p.name.endswith(".safetensors")}
    state = json.loads((last / "trainer.json").read_text())
    del state["elapsed"]
    return metrics, files, state


def test_a_replayed_step_is_the_step_bit_for_bit(config, tmp_path):
    expected = launched(config, tmp_path)
    ready, found = train(config, tmp_path / "replayed", cuda_graph=True)
    assert found == expected
    assert all(r[1] is not None for r in found[0][1:])
    (one,) = ready.trainer.graph._graphs.values()
    assert one.rehearsed == graph.REHEARSALS
    assert one.recorded is not None
    assert len(one.recorded.graph.work) > 50
    assert one.recorded.pool in ready.trainer.memory.pools
    assert len(one.drawn) == 4  # after the embeddings, of the weights, and of two residuals


def test_a_step_without_a_graph_asks_the_gpu_for_two_numbers_only(
    config, tmp_path, fake_cupy, monkeypatch
):
    """Its loss and its norm, in one copy that is begun before and waited for later."""
    ready = begin(config, tmp_path / "run")
    asked, get = [], fake_cupy.ndarray.get

    def noted(self, *args, **kwargs):
        asked.append((self.shape, kwargs.get("blocking", True)))
        return get(self, *args, **kwargs)

    with tg.use_kernels("triton"):
        ready.trainer.train_step()
        monkeypatch.setattr(fake_cupy.ndarray, "get", noted)
        ready.trainer.train_step()
    assert asked == [((2,), False)]
    ready.trainer.run.close()


def test_accumulation_and_checkpointed_blocks_are_captured_too(config, tmp_path):
    options = {"accumulate": 2, "gradient_checkpointing": True, "steps": 3}
    _, expected = train(config, tmp_path / "launched", **options)
    _, found = train(config, tmp_path / "replayed", cuda_graph=True, **options)
    assert found == expected


def test_a_run_that_goes_on_with_a_graph_is_the_same_run(config, tmp_path):
    expected = launched(config, tmp_path)
    ready = begin(config, tmp_path / "cut", cuda_graph=True)
    step = ready.trainer.train_step

    def stopping():
        record = step()
        if record["step"] == 4:
            ready.trainer._signal = 15
        return record

    ready.trainer.train_step = stopping
    with tg.use_kernels("triton"):
        with pytest.raises(Interrupted):
            ready.trainer.fit()
        run = Run.open(tmp_path / "cut")
        log = PlainLog(io.StringIO())
        pretrain.resume(run, configuration.load(run.config_file), log).trainer.fit()
    assert left_behind(tmp_path / "cut") == expected


def test_rates_that_part_are_captured_anew(config, tmp_path):
    """At a rate of 0 the groups share a launch; afterwards theirs differ."""

    def run(folder, **options):
        ready = begin(config, folder, lr_groups={"wte": 0.5}, **options)
        groups = ready.trainer.optimizer.param_groups
        lrs = [group["lr"] for group in groups]
        step, records = ready.trainer.train_step, []
        with tg.use_kernels("triton"):
            for n in range(4):
                for group, lr in zip(groups, lrs, strict=True):
                    group["lr"] = lr if n > 2 else 0.0
                records.append(step())
            ready.trainer._settle()
        ready.trainer.run.close()
        return ready, [p.data.get() for p in ready.model.parameters()]

    _, expected = run(tmp_path / "launched")
    ready, found = run(tmp_path / "replayed", cuda_graph=True)
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert len(ready.trainer.memory.pools) == 2  # the old graph's is not counted any more


def test_a_graph_for_each_shape_and_no_more_than_a_few(config, tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "KINDS", 1)

    def run(folder, **options):
        ready = begin(config, folder, steps=4, **options)
        inner = ready.trainer.task.task
        draw = inner.next_batch
        inner.next_batch = lambda: [
            a[:, : 5 if inner.train.state()["offset"] == 3 else 8] for a in draw()
        ]
        with tg.use_kernels("triton"):
            ready.trainer.fit()
        return ready, left_behind(folder)

    _, expected = run(tmp_path / "launched")
    ready, found = run(tmp_path / "replayed", cuda_graph=True)
    assert found == expected
    (one,) = ready.trainer.graph._graphs.values()
    assert one.recorded is not None


def test_an_id_that_is_in_no_table_is_refused_before_the_replay(config, tmp_path):
    ready = begin(config, tmp_path / "run", cuda_graph=True)
    task = ready.trainer.task.task
    draw = task.next_batch

    def spoilt():
        x, y = draw()
        x[0, 3] += 1000 * (ready.trainer.step >= 3)
        return x, y

    task.next_batch = spoilt
    with pytest.raises(IndexError, match=r"id 1\d\d\d is outside the table's rows 0 to 256"):
        ready.trainer.fit()
    assert ready.trainer.step == 4  # the fifth was not launched


def test_a_loss_that_is_no_number_ends_the_run_and_spoils_no_weights(config, tmp_path):
    ready = begin(config, tmp_path / "run", cuda_graph=True, lr=0.0, min_lr=0.0)
    wpe = ready.model.transformer.wpe.weight

    def spoil(record):
        if record["step"] == 4:
            wpe.data[...] = np.inf

    ready.trainer.log.record = spoil
    with pytest.raises(Diverged, match="the loss is nan and its gradient has norm nan at step"):
        ready.trainer.fit()
    others = [p for p in ready.model.parameters() if p is not wpe]
    assert all(np.isfinite(p.data.get()).all() for p in others)


def test_a_step_that_waits_for_the_gpu_is_refused_in_a_sentence(config, tmp_path):
    ready = begin(config, tmp_path / "run", cuda_graph=True)
    inner = ready.trainer.task.task
    loss = inner.loss

    def waiting(model, batch):
        found = loss(model, batch)
        return found * (1.0 if found.item() > 0 else 2.0)

    inner.loss = waiting
    with pytest.raises(graph.GraphError) as caught:
        ready.trainer.fit()
    assert str(caught.value).startswith("this step cannot be captured as a CUDA graph (")
    assert str(caught.value).endswith("train it without --cuda-graph")
    assert not backend.is_capturing()
    assert ready.trainer.optimizer.numbers is None
    assert type(backend.random) is backend.RandomStream
    assert len(ready.trainer.memory.pools) == 1


@pytest.mark.parametrize("draw", ["words", "mask"])
def test_random_numbers_that_a_replay_would_repeat_are_refused(config, tmp_path, draw):
    ready = begin(config, tmp_path / "run", cuda_graph=True)
    inner = ready.trainer.task.task
    loss = inner.loss

    def drawing(model, batch):
        if model.training and draw == "words":
            backend.random.uniform(3)
        elif model.training:
            seed, offset = backend.random.reserve(3)
            keep_mask((3,), 0.5, seed, offset, backend.cupy())
        return loss(model, batch)

    inner.loss = drawing
    with pytest.raises(graph.GraphError, match=r"train it without --cuda-graph$"):
        ready.trainer.fit()


def test_a_capture_without_memory_says_so_and_lets_the_graph_go(config, tmp_path, fake_cupy):
    ready = begin(config, tmp_path / "run", cuda_graph=True)
    malloc = fake_cupy.MemoryPool.malloc

    def refuse(self, size):
        if self is not fake_cupy._default_pool:
            raise fake_cupy.OutOfMemoryError(size, 0)
        return malloc(self, size)

    fake_cupy.MemoryPool.malloc = refuse
    try:
        with pytest.raises(OutOfMemory, match=r"asked for .* alive were parameters"):
            ready.trainer.fit()
    finally:
        fake_cupy.MemoryPool.malloc = malloc
    assert (ready.trainer.graph, ready.trainer.step) == (None, 2)


def test_the_graph_reads_nothing_that_was_freed(config, tmp_path, monkeypatch):
    """The stand-in's graph looks at what it reads; here its pool is lost."""
    ready = begin(config, tmp_path / "run", cuda_graph=True)
    capture = graph._Graph.capture

    def losing(self, compute, pools):
        capture(self, compute, pools)
        pools.pop().captured.clear()

    monkeypatch.setattr(graph._Graph, "capture", losing)
    with pytest.raises(AssertionError, match="reads memory that was freed after its capture"):
        ready.trainer.fit()


@pytest.mark.parametrize("also", ["tables of a kernel", "nothing else"])
def test_what_a_model_has_cached_and_forgets_stays_for_the_graph(
    config, tmp_path, monkeypatch, also
):
    """Rotary tables, which a longer text makes anew; and AdamW's, of which a few are cached."""
    model = configuration.preset("tiny", "llama").model
    model = dataclasses.replace(model, n_layer=1, n_head=1, n_embd=16)
    config = dataclasses.replace(config, model=model)

    def run(folder, **options):
        ready = begin(config, folder, **options)
        step = ready.trainer.train_step

        def forgetting():
            record = step()
            if record["step"] == graph.REHEARSALS + 1:  # it was captured
                ready.model.model.rotations.tables.clear()
                if also != "nothing else":
                    optimizer._blocks.cache_clear()
                    optimizer._addresses.cache_clear()
                gc.collect()
            return record

        ready.trainer.train_step = forgetting
        with tg.use_kernels("triton"):
            ready.trainer.fit()
        return left_behind(folder)

    assert run(tmp_path / "replayed", cuda_graph=True) == run(tmp_path / "launched")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"device": "cpu", "processes": 1}, "this run is on the CPU"),
        ({"dtype": "float16"}, "no loss scaling, which float16 needs"),
    ],
)
def test_what_cannot_be_a_graph_is_refused_before_the_run(config, tmp_path, options, why):
    with pytest.raises(ConfigError, match=why):
        begin(config, tmp_path / "run", cuda_graph=True, **options)
    assert not (tmp_path / "run" / "config.toml").exists()


def test_bfloat16_with_master_weights(config, tmp_path):
    options = {"dtype": "bfloat16", "steps": 3}
    _, expected = train(config, tmp_path / "launched", **options)
    _, found = train(config, tmp_path / "replayed", cuda_graph=True, **options)
    assert found == expected
