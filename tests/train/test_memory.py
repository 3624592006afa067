"""What memory a run takes, and what it says when there is not enough: tests/fake_cupy.py."""

import dataclasses
import gc
import io

import numpy as np
import pytest

from tinygrad_llm import Tensor, backend, ops, optim
from tinygrad_llm.ops.elementwise import Exp
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train import memory, pretrain
from tinygrad_llm.train.log import PlainLog
from tinygrad_llm.train.trainer import OutOfMemory, Trainer


class CUDARuntimeError(RuntimeError):
    """CuPy's, by its name."""


def test_what_is_a_shortage():
    assert memory.is_shortage(MemoryError())
    assert memory.is_shortage(CUDARuntimeError("cudaErrorMemoryAllocation: out of memory"))
    assert not memory.is_shortage(CUDARuntimeError("cudaErrorIllegalAddress"))
    assert not memory.is_shortage(RuntimeError("OUT_OF_MEMORY"))


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2e6, "2.0 MB"), (8.04e10, "80.4 GB")],
)
def test_sizes_in_words(count, words):
    assert memory.readable(count) == words


# --- who asked, who has it ------------------------------------------------------------------------


def failed(compute):
    with pytest.raises(MemoryError) as caught:
        compute()
    return caught.value


def test_an_op_that_numpy_has_no_memory_for_is_named_with_its_shapes():
    x = Tensor(np.ones((1, 1), np.float32), requires_grad=True)

    def compute():
        y = x.exp()
        return ops.broadcast_to(y, (2**22, 2**22)) * 2.0

    found = memory.look_at(failed(compute), [x], None)
    assert found.asked == 4 * 2**44
    assert "Unable to allocate 64.0 TiB" in str(found)
    assert " in Multiply of float32(4194304, 4194304), float32()" in str(found)
    alive = {what: n for what, n, _ in found.alive}
    assert alive["parameters"] == 4
    assert alive["saved activations"] >= 4


def test_a_backward_is_named_too(monkeypatch):
    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    y = ops.exp(x).sum()

    def refuse(self, *arrays):
        raise MemoryError

    monkeypatch.setattr(Exp, "backward", refuse)
    found = memory.look_at(failed(y.backward), [x], None)
    assert (found.op, found.asked) == ("the backward of Exp", None)
    assert str(found).startswith("the backward of Exp; the machine has ")
    assert "; alive were parameters 12 bytes" in str(found)


def test_the_optimisers_step_is_named(monkeypatch):
    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    optimizer = optim.AdamW([x])
    (x * x).sum().backward()
    optimizer.step()

    def refuse(*args, **kwargs):
        raise MemoryError("Unable to allocate 3 bytes")

    monkeypatch.setattr(np, "multiply", refuse)
    error = failed(optimizer.step)
    monkeypatch.undo()
    found = memory.look_at(error, [x], optimizer)
    assert found.op == "the optimiser's step"
    alive = {what: n for what, n, _ in found.alive}
    assert (alive["parameters"], alive["gradients"], alive["the optimiser's state"]) == (12, 12, 24)


def test_views_of_one_memory_count_once():
    gc.collect()
    x = Tensor(np.ones((100, 100), np.float32), requires_grad=True)
    y = x.reshape(10_000).exp()
    z = y[:5000] * y[5000:]
    found = memory.look_at(MemoryError(), [x, x], None)
    alive = {what: (n, more) for what, n, more in found.alive}
    assert alive["parameters"] == (40_000, "")
    assert alive["saved activations"][0] == 40_000  # y, for the product and for itself
    assert z.shape == (5000,)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)
    (tmp_path / "text.txt").write_text("".join(f"{i} and {i} make {2 * i}.\n" for i in range(400)))
    tiny = configuration.preset("tiny")
    train = dataclasses.replace(tiny.train, steps=3, mfu=False, device="cuda", batch_size=256)
    data = dataclasses.replace(tiny.data, source=str(tmp_path / "text.txt"))
    return dataclasses.replace(tiny, data=data, train=train)


def sized(config, batch_size):
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=batch_size, eval_batches=1)
    )


LIMIT = 20_000_000


def test_a_gpu_without_memory_says_which_batch_would_fit_and_that_one_fits(
    config, tmp_path, fake_cupy
):
    fake_cupy._default_pool.set_limit(LIMIT)
    ready = pretrain.start(sized(config, 4096), tmp_path / "run", PlainLog(io.StringIO()))
    with pytest.raises(OutOfMemory) as caught:
        ready.trainer.fit()
    said = str(caught.value)
    assert "there is not enough memory to go on after step 0 with batch_size 4096" in said
    assert " asked for " in said
    assert "the GPU has 8.6 GB; alive were parameters 30.7 kB, saved activations " in said
    assert "or in a new run --dtype bfloat16" in said
    _, _, guess = said.partition("measured with few rows, a batch of about ")
    fits = int(guess.removesuffix(" fits"))
    assert 32 < fits < 4096
    del ready, caught
    gc.collect()

    def goes(batch_size):
        folder = tmp_path / str(batch_size)
        pretrain.start(sized(config, batch_size), folder, PlainLog(io.StringIO())).trainer.fit()

    goes(fits)
    gc.collect()
    with pytest.raises(OutOfMemory):
        goes(2 * fits)


def test_not_even_one_row(config, tmp_path, fake_cupy):
    ready = pretrain.start(config, tmp_path / "run", PlainLog(io.StringIO()))
    fake_cupy._default_pool.set_limit(fake_cupy._default_pool.used + 20_000)
    with pytest.raises(OutOfMemory, match=r"few rows, not even a batch of 1 fits$"):
        ready.trainer.fit()


def test_the_peak_of_a_block_on_a_gpu(fake_cupy):
    cupy = backend.cupy()
    before = cupy.zeros(1000)
    with memory.peak_of("cuda") as found:
        a = cupy.zeros(100_000, dtype=np.uint8)
        del a
        cupy.zeros(50_000, dtype=np.uint8)
        del before
    assert found.bytes == -(-100_000 // 512) * 512


def test_the_peak_of_a_block_on_the_cpu():
    with memory.peak_of("cpu") as found:
        a = np.zeros(1_000_000, np.uint8)
        del a
        np.zeros(500_000, np.uint8)
    assert 1_000_000 <= found.bytes < 1_400_000
