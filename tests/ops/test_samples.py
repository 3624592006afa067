"""Laws that hold for every op, tried on the samples of the gradient check."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from tinygrad_llm import Tensor, backend, grad, ops
from tinygrad_llm.ops.convert import Cast
from tinygrad_llm.ops.samples import Sample, samples

ALL = {f"{op.__name__}: {s.note}": (op, s) for op, found in samples().items() for s in found}


def _run(sample: Sample, dtype: type) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """The output, the float inputs, and the gradients with respect to them."""
    inputs = [Tensor(a.astype(dtype) if a.dtype.kind == "f" else a) for a in sample.arrays]
    leaves = [x.requires_grad_() for x in inputs if backend.is_float(x.dtype)]
    y = sample.function(*inputs)
    if not y.requires_grad:
        return y, leaves, [None for _ in leaves]
    start = np.random.default_rng(0).normal(size=y.shape)
    found = grad(y, leaves, Tensor(start, dtype=y.dtype), retain_graph=True, allow_unused=True)
    return y, leaves, list(found)


def _agree(a: Tensor, b: Tensor, precision: float) -> None:
    assert a.shape == b.shape
    got, wanted = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    finite = np.abs(wanted[np.isfinite(wanted)])
    scale = max(1.0, finite.max()) if finite.size else 1.0
    np.testing.assert_allclose(got, wanted, rtol=precision, atol=precision * scale)


@pytest.mark.parametrize("name", ALL)
def test_single_precision_stays_single_and_is_right(name: str) -> None:
    op, sample = ALL[name]
    y, _, gradients = _run(sample, np.float32)
    exact, _, wanted = _run(sample, np.float64)
    if op is not Cast:
        assert y.dtype == np.float32
    _agree(y, exact, 1e-5)
    for g, w in zip(gradients, wanted, strict=True):
        assert (g is None) == (w is None)
        if g is not None and w is not None:
            assert g.dtype == np.float32
            _agree(g, w, 1e-4)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_gradients_are_accumulated_in_float32(dtype: type) -> None:
    """bfloat16 stops counting at 256, float16 at 2048."""
    places = np.zeros(6144, np.int64)
    uses: dict[str, Callable[[Tensor], Tensor]] = {
        "broadcast": lambda x: x.broadcast_to((6144, 1)),
        "added": lambda x: Tensor(np.zeros((6144, 1), dtype)) + x,
        "indexed": lambda x: x[places],
        "embedded": lambda x: ops.embedding(places, x),
    }
    for name, use in uses.items():
        x = Tensor(np.ones((1, 1), dtype), requires_grad=True)
        use(x).sum().backward()
        assert x.grad is not None
        assert float(x.grad.item()) == 6144, name


N = 6000  # terms of a sum: half precision would lose most of them
LONG: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "sum": (lambda x: x.sum(axis=0), ((N, 3),)),
    "mean": (lambda x: x.mean(axis=0), ((N, 3),)),
    "var": (lambda x: ops.var(x, axis=0), ((N, 3),)),
    "cumsum": (lambda x: ops.cumsum(x, axis=0) * 2.0**-6, ((N, 3),)),
    "matmul": (lambda a, b: a @ b * 2.0**-6, ((3, N), (N, 4))),
    "batched": (lambda a, b: a @ b * 2.0**-6, ((2, 3, N), (2, N, 4))),
    "linear": (ops.linear, ((N, 8), (5, 8), (5,))),
    "layer_norm": (ops.layer_norm, ((N, 16), (16,), (16,))),
    "rms_norm": (ops.rms_norm, ((N, 16), (16,))),
    "softmax": (ops.softmax, ((4, N),)),
    "log_softmax": (ops.log_softmax, ((4, N),)),
    "logsumexp": (ops.logsumexp, ((4, N),)),
    "cross_entropy": (lambda x: ops.cross_entropy(x, np.zeros(N, np.int64)), ((N, 7),)),
    "queries": (ops.scaled_dot_product_attention, ((1, 1, N, 8), (1, 1, 3, 8), (1, 1, 3, 8))),
    "keys": (ops.scaled_dot_product_attention, ((1, 1, 3, 8), (1, 1, N, 8), (1, 1, N, 8))),
}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", LONG)
def test_half_precision_adds_up_in_float32(name: str, dtype: type) -> None:
    """Results and gradients of long sums are off by a few roundings, not by thousands."""
    op, shapes = LONG[name]
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    found = []
    start: np.ndarray | None = None
    for wanted in (dtype, np.float64):
        leaves = [Tensor(v.astype(wanted), requires_grad=True) for v in values]
        y = op(*leaves)
        start = rng.normal(size=y.shape).astype(dtype) if start is None else start
        y.backward(Tensor(np.asarray(start).astype(wanted)))
        gradients = [leaf.grad.numpy() for leaf in leaves if leaf.grad is not None]
        found.append([y.numpy(), *gradients])
    step = float(ml_dtypes.finfo(dtype).eps)
    for got, exact in zip(*found, strict=True):
        assert got.dtype == dtype
        assert np.abs(got - exact).max() <= 3 * step * np.abs(exact).max() + 1e-6


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_stays_half_and_is_right(dtype: type) -> None:
    for op, sample in ALL.values():
        y, leaves, _ = _run(sample, dtype)
        exact, _, wanted = _run(sample, np.float64)
        assert op is Cast or y.dtype == dtype
        _agree(y, exact, 0.02 if dtype is np.float16 else 0.15)
        if y.requires_grad:
            start = np.random.default_rng(0).normal(size=y.shape)
            y.backward(Tensor(start, dtype=y.dtype))
        for leaf, w in zip(leaves, wanted, strict=True):
            if leaf.grad is not None and w is not None:
                assert leaf.grad.dtype == dtype
                _agree(leaf.grad, w, 0.02 if dtype is np.float16 else 0.15)


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops that walk through the cache in blocks give what they give on the whole."""
    for _, sample in ALL.values():
        whole, _, wanted = _run(sample, np.float64)
        monkeypatch.setattr(backend, "BLOCK", 5)  # in no relation to any size
        y, _, gradients = _run(sample, np.float64)
        monkeypatch.undo()
        _agree(y, whole, 1e-13)
        for g, w in zip(gradients, wanted, strict=True):
            if g is not None and w is not None:
                _agree(g, w, 1e-12)


def test_gradients_of_any_layout_are_ordinary_inputs() -> None:
    """A backward is right for a gradient that is transposed, reversed or of stride 0."""
    for _, sample in ALL.values():
        y, leaves, _ = _run(sample, np.float64)
        if not y.requires_grad or y.ndim == 0:
            continue
        start = np.random.default_rng(1).normal(size=y.shape)
        backwards = (slice(None, None, -1),) * y.ndim
        row = np.broadcast_to(start[:1], y.shape)
        for layout in (start.T.copy().T, start[backwards].copy()[backwards], row):
            one, other = (
                grad(y, leaves, Tensor(g), retain_graph=True, allow_unused=True)
                for g in (layout, layout.copy())
            )
            for a, b in zip(one, other, strict=True):
                if a is not None:
                    _agree(a, b, 1e-12)


def test_a_backward_does_not_write_into_the_gradient_it_is_given() -> None:
    for _, sample in ALL.values():
        y, leaves, _ = _run(sample, np.float64)
        if y.requires_grad:
            start = np.random.default_rng(1).normal(size=y.shape)
            before, arrays = start.copy(), [x.numpy().copy() for x in leaves]
            y.backward(Tensor(start), retain_graph=True)
            y.backward(Tensor(start))
            np.testing.assert_array_equal(start, before)
            for x, array in zip(leaves, arrays, strict=True):
                np.testing.assert_array_equal(x.numpy(), array)
