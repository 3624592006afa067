"""Training in bfloat16 and float16: masters, the loss scale, checkpoints; numbers that are late."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import itertools
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import tinygrad_llm as tg
from tinygrad_llm import Tensor, backend, ops
from tinygrad_llm.models.gpt import GPT
from tinygrad_llm.optim import SGD, AdamW
from tinygrad_llm.storage import Damaged
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train import pretrain, utilisation
from tinygrad_llm.train.config import ConfigError, PretrainConfig, TrainConfig
from tinygrad_llm.train.gradient import Gradient
from tinygrad_llm.train.log import PlainLog
from tinygrad_llm.train.precision import HalfWeights, LossScaler
from tinygrad_llm.train.readback import Late
from tinygrad_llm.train.run import Run
from tinygrad_llm.train.trainer import Diverged, Interrupted, Trainer

TEXT = "".join(f"{i} and {i} make {2 * i}.\n" for i in range(400))
HALVES = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
# What OpenBLAS may say of finite matrices: see test_dispatch.py.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    (tmp_path / "text.txt").write_text(TEXT)
    tiny = configuration.preset("tiny")
    train = {"steps": 8, "eval_every": 2, "checkpoint_every": 2, "mfu": False}
    return dataclasses.replace(
        tiny,
        data=dataclasses.replace(tiny.data, source=str(tmp_path / "text.txt")),
        train=dataclasses.replace(tiny.train, **train),
    )


def changed(config: PretrainConfig, **train: Any) -> PretrainConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


class Watched(PlainLog):
    """Calls `at[step]()` when the record of that step comes."""

    def __init__(self, at: Any = None) -> None:
        super().__init__(io.StringIO())
        self.at = at or {}

    def record(self, record: Any) -> None:
        super().record(record)
        self.at.get(record["step"], lambda: None)()


def begin(config: PretrainConfig, folder: Path, at: Any = None) -> pretrain.Pretraining:
    return pretrain.start(config, folder, Watched(at))


def train(config: PretrainConfig, folder: Path, at: Any = None) -> pretrain.Pretraining:
    ready = begin(config, folder, at)
    ready.trainer.fit()
    return ready


def go_on(folder: Path, **changes: Any) -> pretrain.Pretraining:
    run = Run.open(folder)
    settings = changed(configuration.load(run.config_file), **changes)
    ready = pretrain.resume(run, settings, Watched())
    ready.trainer.fit()
    return ready


def whole(folder: Path) -> tuple[dict[str, bytes], Any, Any]:
    """Every byte of the last checkpoint and all records, without the time they took."""
    run = Run.open(folder)
    last = run.checkpoint()
    assert last is not None
    found = {str(p.relative_to(last)): p.read_bytes() for p in last.rglob("*") if p.is_file()}
    state = json.loads(found.pop("trainer.json"))
    for name in [name for name in found if name.endswith("SHA256SUMS")]:
        del found[name]
    del state["elapsed"]
    timing = ("elapsed", "tokens_per_second")
    records = [{k: v for k, v in r.items() if k not in timing} for r in run.metrics()]
    return found, state, records


def weights_of(ready: pretrain.Pretraining) -> list[np.ndarray]:
    return [p.data.copy() for p in ready.model.parameters()]


# --- the loss scale -------------------------------------------------------------------------------


def test_the_scale_halves_after_a_bad_step_and_doubles_after_many_good_ones() -> None:
    scaler = LossScaler()
    assert scaler.scale == 65536.0
    for _ in range(1999):
        scaler.update(True)
    assert scaler.scale == 65536.0
    scaler.update(True)
    assert (scaler.scale, scaler.good_steps) == (131072.0, 0)
    for _ in range(1999):
        scaler.update(True)
    scaler.update(False)  # they count anew
    assert (scaler.scale, scaler.good_steps, scaler.skipped) == (65536.0, 0, 1)
    for _ in range(1999):
        scaler.update(True)
    assert scaler.scale == 65536.0


def test_a_scale_too_small_to_blame_precision() -> None:
    scaler = LossScaler()
    for _ in range(30):
        scaler.update(False)
        assert not scaler.exhausted
    scaler.update(False)
    assert scaler.exhausted
    assert scaler.skipped == 31


def test_the_scale_stays_a_number() -> None:
    scaler = LossScaler()
    scaler.GROWTH_INTERVAL = 1
    for _ in range(300):
        scaler.update(True)
    assert scaler.scale == 2.0**126


def test_the_state_of_a_scaler() -> None:
    scaler, again = LossScaler(), LossScaler()
    for good in (True, False, True, True):
        scaler.update(good)
    again.load_state(json.loads(json.dumps(scaler.state())))
    assert again.state() == scaler.state() == {"scale": 32768.0, "good_steps": 2, "skipped": 1}
    state = scaler.state()
    for wrong in (0.0, -1.0, 3.0, math.inf, math.nan, "1", 2):
        with pytest.raises(Damaged, match="no loss scaler can be in the state"):
            again.load_state({**state, "scale": wrong})
    for key in ("good_steps", "skipped"):
        with pytest.raises(Damaged, match="no loss scaler"):
            again.load_state({**state, key: -1})
    assert again.state() == state


# --- the masters ----------------------------------------------------------------------------------


@HALVES
def test_masters_are_what_the_weights_were(dtype: str) -> None:
    exact = np.array([1.0001, 2.0, 3.3333], np.float32)
    p, other = (Tensor(exact.copy(), requires_grad=True) for _ in range(2))
    optimizer = SGD([p], lr=1.0)
    half = HalfWeights([p, other], optimizer, dtype)
    assert p.dtype == other.dtype == backend.as_dtype(dtype)
    assert list(optimizer.state) == [p]
    np.testing.assert_array_equal(optimizer.state[p]["master"], exact)
    memory = p.data
    with half.masters_in_place():
        np.testing.assert_array_equal(p.data, exact)
        np.testing.assert_array_equal(other.data, exact)
    assert p.data is memory
    p.grad = Tensor(np.full(3, 2.0**-14, np.float32)).astype(dtype)
    optimizer.step()  # less than the distance to the next number in half
    with half.masters_in_place():
        np.testing.assert_array_equal(p.data, exact - np.float32(2.0**-14))
    np.testing.assert_array_equal(p.data, (exact - np.float32(2.0**-14)).astype(p.dtype))


@HALVES
def test_masters_outlive_a_state_without_them(dtype: str) -> None:
    p = Tensor(np.array([1.0001], np.float32), requires_grad=True)
    optimizer = AdamW([p])
    half = HalfWeights([p], optimizer, dtype)
    p.grad = Tensor(np.ones(1, np.float32)).astype(dtype)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"] = {0: {k: v for k, v in state["state"][0].items() if k != "master"}}
    master = half.masters[0].copy()
    optimizer.load_state_dict(state)
    half.give_masters()
    optimizer.step()
    assert optimizer.state[p]["master"] is half.masters[0]
    assert not np.array_equal(half.masters[0], master)


# --- whole runs -----------------------------------------------------------------------------------


@HALVES
def test_half_precision_learns_as_float32_does(
    config: PretrainConfig, dtype: str, tmp_path: Path
) -> None:
    config = changed(config, steps=40, lr=1e-2, eval_every=40, checkpoint_every=40)
    wide = train(config, tmp_path / "float32").run.metrics()
    ready = train(changed(config, dtype=dtype), tmp_path / "half")
    half = ready.run.metrics()
    assert half[-1]["val_loss"] < half[0]["val_loss"] - 1.0
    for ours, theirs in zip(half, wide, strict=True):
        for key in ("loss", "val_loss"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=0.02)
    assert half[1]["grad_norm"] == pytest.approx(wide[1]["grad_norm"], rel=0.02)
    assert all(p.dtype == backend.as_dtype(dtype) for p in ready.model.parameters())
    assert "".join(ready.sample())
    said = ready.trainer.log.out.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert f"{dtype} on the CPU is slower than float32: NumPy has no matrix products" in said


@needs_triton
@HALVES
def test_half_precision_learns_through_the_kernels(
    config: PretrainConfig, dtype: str, tmp_path: Path
) -> None:
    config = changed(config, steps=3, eval_batches=1, lr=1e-2, eval_every=3, checkpoint_every=3)
    wide = train(config, tmp_path / "float32").run.metrics()
    with tg.use_kernels("triton"):
        half = train(changed(config, dtype=dtype), tmp_path / "half").run.metrics()
    for ours, theirs in zip(half[1:], wide[1:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.03)
    assert half[-1]["loss"] < half[1]["loss"]


@HALVES
def test_a_checkpoint_holds_the_masters_in_float32(
    config: PretrainConfig, dtype: str, tmp_path: Path
) -> None:
    ready = train(changed(config, dtype=dtype, ema=0.9), tmp_path / "run")
    folder, half = ready.run.step_folder(8), ready.trainer.half
    assert half is not None
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"
    opened = GPT.from_pretrained(folder)
    for p, q, master in zip(
        opened.parameters(), ready.model.parameters(), half.masters, strict=True
    ):
        np.testing.assert_array_equal(p.numpy(), master)
        np.testing.assert_array_equal(q.data, master.astype(q.dtype))
        assert not np.array_equal(p.numpy(), q.data.astype(np.float32))
    saved = load_file(folder / "optimizer.safetensors")
    assert {name.partition(".")[2] for name in saved} == {"exp_avg", "exp_avg_sq"}
    average = GPT.from_pretrained(folder / "ema")
    assert ready.trainer.average is not None
    for p, mean in zip(average.parameters(), ready.trainer.average.arrays, strict=True):
        assert p.dtype == np.float32
        np.testing.assert_array_equal(p.numpy(), mean)


@HALVES
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_half_precision_resumes_bit_for_bit(
    config: PretrainConfig, dtype: str, number: int, tmp_path: Path, monkeypatch: Any
) -> None:
    """Also where the scale falls and grows on the way."""
    monkeypatch.setattr(LossScaler, "FIRST", 2.0**30)
    monkeypatch.setattr(LossScaler, "GROWTH_INTERVAL", 2)
    config = changed(config, dtype=dtype, ema=0.9, steps=20, checkpoint_every=20)
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", {17: lambda: signal.raise_signal(number)})
    go_on(tmp_path / "cut")
    assert whole(tmp_path / "cut") == whole(tmp_path / "whole")
    if dtype == "float16":
        records = whole(tmp_path / "whole")[2]
        scales = [r["loss_scale"] for r in records[1:]]
        steps = [b / a for a, b in itertools.pairwise(scales)]
        assert {0.5, 1.0, 2.0} == set(steps)
        assert whole(tmp_path / "cut")[1]["loss_scale"]["skipped"] == sum(
            r["skipped"] for r in records[1:]
        )


def test_another_dtype_is_another_run(config: PretrainConfig, tmp_path: Path) -> None:
    train(changed(config, dtype="bf16"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"train\.dtype = bfloat16, which cannot become float16"):
        go_on(tmp_path / "run", dtype="fp16", steps=10)


def test_a_checkpoint_without_its_scale_is_refused(config: PretrainConfig, tmp_path: Path) -> None:
    train(changed(config, dtype="fp16"), tmp_path / "run")
    path = tmp_path / "run/checkpoints/step-000008/trainer.json"
    state = json.loads(path.read_text())
    path.with_name("SHA256SUMS").unlink()
    for wrong, why in ((None, "loss_scale"), ({"scale": 3.0}, "good_steps")):
        state.pop("loss_scale") if wrong is None else state.update(loss_scale=wrong)
        path.write_text(json.dumps(state))
        with pytest.raises(ValueError, match=rf"trainer\.json is damaged .*{why}"):
            go_on(tmp_path / "run", steps=10)
    state["loss_scale"] = {"scale": 3.0, "good_steps": 0, "skipped": 0}
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"no loss scaler can be in .* delete the folder"):
        go_on(tmp_path / "run", steps=10)


def test_several_processes_are_refused(config: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"several processes train float32 .* got one in bfloat16"):
        begin(changed(config, dtype="bfloat16", processes=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@HALVES
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_the_gradients_of_many_parts_add_up_in_float32(
    config: PretrainConfig, dtype: str, kernels: str, tmp_path: Path
) -> None:
    if kernels == "triton":
        pytest.importorskip("triton")
    config = changed(config, dtype=dtype, accumulate=3, batch_size=2)
    with tg.use_kernels(kernels):
        trainer = begin(config, tmp_path / "run").trainer
        parts = trainer._make_step.parts([trainer.task.next_batch() for _ in range(3)])
        random, sums = backend.random.state(), [0.0] * len(list(trainer.model.parameters()))
        for part in parts:
            trainer.optimizer.zero_grad()
            trainer.gradient([part])
            for i, p in enumerate(trainer.model.parameters()):
                assert p.grad is not None
                assert p.grad.dtype == backend.as_dtype(dtype)
                sums[i] = sums[i] + p.grad.data.astype(np.float64)
        trainer.optimizer.zero_grad()
        backend.random.load_state(random)
        trainer.gradient(parts)
        step = float(ml_dtypes.finfo(dtype).eps)
        for p, total in zip(trainer.model.parameters(), sums, strict=True):
            assert p.grad is not None
            assert p.grad.dtype == np.float32
            # A parameter that is used twice, as the embedding is, adds up its uses, too.
            np.testing.assert_allclose(p.grad.data, total, rtol=0, atol=step * np.abs(total).max())
        norm = trainer.optimizer.step_clipped(1.0, wait=True)
        assert math.isfinite(norm)
    trainer.run.close()


def test_the_average_is_judged_as_the_weights_are(config: PretrainConfig, tmp_path: Path) -> None:
    """Rounded to half precision, and not changed by that."""
    ready = train(changed(config, dtype="bf16", ema=0.9), tmp_path / "run")
    average = ready.trainer.average
    assert average is not None
    before = [mean.copy() for mean in average.arrays]
    with average.in_place(rounded=True):
        for p, mean in zip(ready.model.parameters(), before, strict=True):
            np.testing.assert_array_equal(p.data, mean.astype(backend.bfloat16))
        assert ready.trainer.evaluate() == ready.run.metrics()[-1]["val_loss_ema"]
    for mean, old in zip(average.arrays, before, strict=True):
        np.testing.assert_array_equal(mean, old)
    assert ready.trainer.evaluate() == ready.run.metrics()[-1]["val_loss"]


@pytest.mark.parametrize(
    ("dtype", "device", "asked"),
    [
        ("float32", "cuda:0", {}),
        ("bfloat16", "cuda:0", {"dtype": "bfloat16"}),
        ("float16", "cuda:0", {"dtype": "float16"}),
        ("bfloat16", "cpu", {}),  # where its products are float32's
    ],
)
def test_the_peak_is_that_of_the_dtype(
    dtype: str, device: str, asked: dict[str, str], monkeypatch: Any
) -> None:
    calls: list[Any] = []

    def peak(device: str, **options: Any) -> float:
        calls.append((device, options))
        return 1e9

    monkeypatch.setattr(pretrain, "measured_peak", peak)
    model: Any = SimpleNamespace(
        flops_per_token=lambda context: 10, parameters=lambda: [SimpleNamespace(device=device)]
    )
    log = Watched()
    pretrain._utilisation(TrainConfig(dtype=dtype), model, log)
    assert calls == [(device, asked)]
    assert f"(measured, {asked.get('dtype', 'float32')})" in log.out.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@HALVES
def test_a_product_in_half_precision_is_timed(dtype: str) -> None:
    times = utilisation._product(8, "cpu", repeat=2, dtype=dtype)
    assert len(times) == 2
    assert all(seconds > 0 for seconds in times)


# --- overflow -------------------------------------------------------------------------------------


def test_an_overflow_skips_the_step_and_halves_the_scale(
    config: PretrainConfig, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(LossScaler, "FIRST", 2.0**40)
    ready = begin(changed(config, dtype="float16"), tmp_path / "run")
    trainer, before = ready.trainer, weights_of(ready)
    with np.errstate(over="ignore", invalid="ignore"):
        record = trainer.train_step()
    assert (record["skipped"], record["loss_scale"]) == (True, 2.0**40)
    assert "grad_norm" not in record
    assert math.isfinite(record["loss"])  # which nothing is wrong with
    assert trainer.step == 1
    for p, old in zip(ready.model.parameters(), before, strict=True):
        np.testing.assert_array_equal(p.data, old)
        assert trainer.optimizer.state[p].keys() == {"master"}
    trainer.fit()
    records = ready.run.metrics()
    assert [r["loss_scale"] for r in records] == [2.0 ** (39 - i) for i in range(len(records))]
    assert all(r["skipped"] == ("grad_norm" not in r) for r in records)


def test_the_scaled_gradient_is_clipped_as_the_bare_one(
    config: PretrainConfig, tmp_path: Path
) -> None:
    found = []
    for name, scale in (("a", 256.0), ("b", 1024.0)):
        ready = begin(changed(config, dtype="float16", grad_clip=0.1), tmp_path / name)
        trainer = ready.trainer
        assert trainer.scaler is not None
        trainer.scaler.scale = scale
        record = trainer.train_step()
        assert record["grad_norm"] > 0.1
        moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
        assert math.hypot(*[np.linalg.norm(m) for m in moments]) == pytest.approx(0.01, rel=1e-3)
        found.append((record["grad_norm"], moments))
        ready.run.close()
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0.01, atol=1e-6)


def test_a_scale_that_does_not_help_ends_the_run(
    config: PretrainConfig, tmp_path: Path, monkeypatch: Any
) -> None:
    config = changed(config, dtype="float16", steps=100)
    ready = begin(config, tmp_path / "run")
    loss = ready.trainer.task.loss

    def spoilt(model: Any, batch: Any) -> Tensor:
        value = loss(model, batch)
        return ops.log(value - value) if ready.trainer.step >= 4 and model.training else value

    monkeypatch.setattr(ready.trainer.task, "loss", spoilt)
    with (
        np.errstate(divide="ignore"),
        pytest.raises(
            Diverged,
            match=r"at step 35: Log made infinity .*, also with a loss scale of 6\.1\d+e-05, so",
        ),
    ):
        ready.trainer.fit()
    assert len(ready.run.metrics()) == 35
    assert ready.run.checkpoint() == ready.run.step_folder(34)
    for p, q in zip(
        GPT.from_pretrained(ready.run.step_folder(34)).parameters(),
        GPT.from_pretrained(ready.run.step_folder(4)).parameters(),
        strict=True,
    ):
        np.testing.assert_array_equal(p.numpy(), q.numpy())


# --- what a GPU tells late ------------------------------------------------------------------------


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses stay arrays, as on a GPU; with the kernels, so do norms."""
    real = Gradient.__call__
    monkeypatch.setattr(
        Gradient, "__call__", lambda self, parts: np.asarray(real(self, parts), np.float32)
    )


@needs_triton
def test_numbers_that_come_late_are_the_same_run(
    config: PretrainConfig, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = changed(
        config, dtype="bfloat16", steps=5, eval_every=3, checkpoint_every=4, eval_batches=1
    )
    config = dataclasses.replace(
        config, sample=dataclasses.replace(config.sample, every=2, every_max_new_tokens=2)
    )
    with tg.use_kernels("triton"):
        train(config, tmp_path / "at once")
        request.getfixturevalue("late")
        ready = begin(config, tmp_path / "late")
        first = ready.trainer.train_step()
        assert first["loss"] is None  # nobody has waited
        ready.trainer._settle()
        assert first["loss"] == pytest.approx(math.log(257), rel=0.1)
        ready.run.close()
        train(config, tmp_path / "run")
    found, expected = whole(tmp_path / "run"), whole(tmp_path / "at once")
    for ours, theirs in zip(found[2], expected[2], strict=True):  # in order, none missing
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=1e-6)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert found[0][name] == expected[0][name]


@needs_triton
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_late_and_no_number_spoils_nothing(
    config: PretrainConfig, tmp_path: Path, monkeypatch: Any, where: str, late: None
) -> None:
    """It is noticed a step later, with the weights as they were, and said to be of its own step."""
    config = changed(config, dtype="bfloat16", steps=6, eval_every=6, checkpoint_every=6)
    ready = begin(config, tmp_path / "run")
    loss, before, calls = ready.trainer.task.loss, [], []

    def spoilt(model: Any, batch: Any) -> Tensor:
        value = loss(model, batch)
        if model.training:
            calls.append(ready.trainer.step)
        # The third step; and again when the fourth's gradient is there and it is asked which op.
        if model.training and len(calls) in (3, 5):
            if len(calls) == 3:
                before.extend(weights_of(ready))
            zero = value - value
            value = ops.log(zero) if where == "loss" else value + ops.sqrt(zero)
        return value

    monkeypatch.setattr(ready.trainer.task, "loss", spoilt)
    op = "Log made infinity" if where == "loss" else "the backward of .* made "
    with (
        tg.use_kernels("triton"),
        np.errstate(divide="ignore"),
        pytest.raises(Diverged, match=rf"at step 3: {op}"),
    ):
        ready.trainer.fit()
    assert calls == [0, 1, 2, 3, 3]
    assert [r["step"] for r in ready.run.metrics()] == [0, 1, 2]
    for p, old in zip(ready.model.parameters(), before, strict=True):
        np.testing.assert_array_equal(p.data, old)


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_run_on_a_gpu_is_that_of_the_cpu(
    config: PretrainConfig, dtype: str, tmp_path: Path, monkeypatch: Any, fake_cupy: Any
) -> None:
    """A stand-in for one, on which kernels run in the interpreter."""
    config = changed(config, dtype=dtype, steps=2, eval_every=2, checkpoint_every=2, eval_batches=1)
    with tg.use_kernels("triton"):
        train(changed(config, device="cpu"), tmp_path / "cpu")
    fake_cupy.install_kernels(monkeypatch)
    waited = []
    monkeypatch.setattr(
        Late, "read", lambda self, read=Late.read: waited.append(self.record["step"]) or read(self)
    )
    ready = train(changed(config, device="cuda"), tmp_path / "gpu")
    assert next(iter(ready.model.parameters())).device == "cuda:0"
    assert waited == [1, 2]
    found, expected = whole(tmp_path / "gpu"), whole(tmp_path / "cpu")
    for ours, theirs in zip(found[2], expected[2], strict=True):
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-3), key


# --- the configuration ----------------------------------------------------------------------------


def test_the_names_of_dtypes(tmp_path: Path) -> None:
    for written, meant in (("bf16", "bfloat16"), ("fp16", "float16"), ("float32", "float32")):
        assert TrainConfig(dtype=written).dtype == meant
        (tmp_path / "c.toml").write_text(f'[train]\ndtype = "{written}"\n')
        assert configuration.load(tmp_path / "c.toml").train.dtype == meant
    with pytest.raises(ConfigError, match=r"float32, bfloat16, float16, got 'half'"):
        TrainConfig(dtype="half")
    assert 'dtype = "bfloat16"' in configuration.dumps(
        PretrainConfig(train=TrainConfig(dtype="bf16"))
    )
