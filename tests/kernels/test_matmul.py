"""kernels/matmul.py against NumPy in float64: layouts, batches, epilogues, ways to cut the work."""

import math
from typing import Any

import numpy as np
import pytest

from tinygrad_llm import backend
from tinygrad_llm.backend import namespace
from tinygrad_llm.kernels import matmul as module
from tinygrad_llm.kernels.language import INTERPRETED
from tinygrad_llm.kernels.matmul import backward, forward, matmul

SMALL = {"ROWS": 16, "COLUMNS": 32, "INNER": 16, "GROUP": 2, "num_warps": 4, "num_stages": 2}
SPLIT = {**SMALL, "SPLITS": 3}
PERSISTENT = {**SMALL, "ROWS": 64, "COLUMNS": 64, "INNER": 32, "PERSISTENT": True}
# More than 64 numbers a thread, which are written in two halves.
LARGE = {**SMALL, "ROWS": 128, "COLUMNS": 256, "INNER": 32, "num_warps": 8}

on_descriptors = pytest.mark.skipif(
    not INTERPRETED and module._capability(0) < 90, reason="needs a GPU from sm_90 on"
)


def normal(rng, shape, dtype):
    """Numbers whose products, summed over some dozens, stay near 1."""
    return (0.4 * rng.standard_normal(shape)).astype(dtype)


# --- the product ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, SMALL])
def test_layouts(array, rng, dtype, layout, wide, close, config):
    a = layout(array(normal(rng, (21, 19), dtype)))
    b = layout(array(normal(rng, (19, 35), dtype)))
    close(matmul(a, b, config=config), wide(a) @ wide(b), 2)


@pytest.mark.parametrize("turned", ["", "a", "b", "ab"])
@pytest.mark.parametrize("inner", [32, 24])  # with and without a mask along K
def test_transposed_operands(array, rng, dtype, wide, close, turned, inner):
    a = array(normal(rng, (inner, 18) if "a" in turned else (18, inner), dtype))
    b = array(normal(rng, (16, inner) if "b" in turned else (inner, 16), dtype))
    a, b = a.T if "a" in turned else a, b.T if "b" in turned else b
    close(matmul(a, b, config=SMALL), wide(a) @ wide(b), 2)


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 70, 5), (33, 1, 2), (16, 32, 16), (17, 33, 47), (5, 2, 0)]
)
@pytest.mark.parametrize("config", [None, SMALL, SPLIT, LARGE])
def test_sizes(array, rng, wide, close, m, n, k, config):
    a, b = array(normal(rng, (m, k), np.float32)), array(normal(rng, (k, n), np.float32))
    close(matmul(a, b, config=config), wide(a) @ wide(b), 2)


@pytest.mark.parametrize("shapes", [((0, 3), (3, 4)), ((3, 4), (4, 0)), ((0, 2, 3), (3, 4))])
def test_nothing_to_do(array, shapes):
    a, b = (array(np.ones(shape, np.float32)) for shape in shapes)
    bias = array(np.ones(b.shape[-1], np.float32))
    y, saved = forward(a, b, bias, activation="gelu")
    assert y.shape == (*a.shape[:-1], b.shape[-1])
    da, db, dbias, _ = backward(y, *saved, activation="gelu")
    assert (da.shape, db.shape, dbias.shape) == (a.shape, b.shape, bias.shape)
    assert not db.any()
    assert not dbias.any()


def test_sum_over_nothing_leaves_bias_and_residual(array, close):
    a, b = array(np.ones((3, 0), np.float32)), array(np.ones((0, 4), np.float32))
    bias, residual = array(np.arange(4, dtype=np.float32)), array(np.full((3, 1), 2, np.float32))
    for config in (None, SPLIT):
        y, saved = forward(a, b, bias, residual, activation="relu", config=config)
        close(y, np.broadcast_to(np.arange(4.0) + 2, (3, 4)))
        da, db, dbias, dresidual = backward(y, *saved, activation="relu", config=config)
        assert (da.shape, db.shape) == ((3, 0), (0, 4))
        close(dbias, np.array([0.0, 9, 12, 15]))
        close(dresidual, np.full((3, 1), 14.0))


@pytest.mark.parametrize("group", [1, 2, 8])
def test_grouped_order_makes_every_tile(array, close, group):
    a, b = array(np.ones((80, 16), np.float32)), array(np.ones((16, 96), np.float32))
    close(matmul(a, b, config={**SMALL, "GROUP": group}), np.full((80, 96), 16.0))


@pytest.mark.parametrize("splits", [2, 8])
def test_parts_beyond_the_end_are_empty(array, rng, dtype, wide, close, splits):
    a, b = array(normal(rng, (3, 50), dtype)), array(normal(rng, (50, 40), dtype))
    y = matmul(a, b, config={**SMALL, "SPLITS": splits})
    close(y, wide(a) @ wide(b), 2)
    assert (y == matmul(a, b, config={**SMALL, "SPLITS": splits})).all()


def test_64_bit_offsets(array, rng, dtype, wide, close, monkeypatch):
    monkeypatch.setattr(module, "needs_int64", lambda *arrays: True)
    a, b = array(normal(rng, (33, 20), dtype)), array(normal(rng, (40, 20), dtype)).T
    residual = array(normal(rng, (33, 40), dtype))
    for config in (SMALL, SPLIT):
        y, saved = forward(a, b, b[0].copy(), residual, activation="silu", config=config)
        backward(y, *saved, activation="silu", config=config)
        z = wide(a) @ wide(b) + wide(b[0])
        close(y, z / (1 + np.exp(-z)) + wide(residual), 2)


def test_infinities_stay_in_their_row(array):
    """Programs read rows and columns of others in place of those beyond the end."""
    a, b = np.ones((18, 20), np.float32), np.ones((20, 35), np.float32)
    a[0, 3], a[17, 19], b[2, 34] = np.inf, np.nan, -np.inf
    y = backend.to_device(matmul(array(a), array(b), config=SMALL), "cpu")
    assert np.isinf(y[0, :34]).all()
    assert np.isnan(y[17]).all()
    assert np.isnan(y[0, 34])
    assert (y[1:17, 34] == -np.inf).all()
    assert (y[1:17, :34] == 20).all()


def test_float32_from_halves(array, rng, wide, close):
    """The sum is in float32: an output in float32 has its precision."""
    for dtype in (np.float16, backend.bfloat16):
        a, b = array(normal(rng, (20, 40), dtype)), array(normal(rng, (40, 36), dtype))
        for config in (None, SMALL, SPLIT):
            y = matmul(a, b, dtype=np.float32, config=config)
            assert y.dtype == np.float32
            close(y, wide(a) @ wide(b), 2)


def test_tf32_is_accepted_and_near(array, rng, wide):
    a, b = array(normal(rng, (32, 48), np.float32)), array(normal(rng, (48, 32), np.float32))
    y = wide(matmul(a, b, precision="tf32", config=SMALL))
    np.testing.assert_allclose(y, wide(a) @ wide(b), rtol=0, atol=4e-3)


# --- batches --------------------------------------------------------------------------------------

BATCHES = [
    ((2, 3, 5, 4), (4, 6)),  # rows of one matrix
    ((5, 4), (3, 4, 6)),
    ((2, 1, 5, 4), (3, 4, 6)),
    ((1, 5, 4), (4, 6)),
    ((3, 5, 4), (3, 4, 6)),
    ((1, 1, 5, 4), (2, 1, 4, 6)),
    ((2, 1, 2, 1, 2, 1), (1, 2, 1, 2, 1, 3)),  # four axes that do not merge
]


@pytest.mark.parametrize(("left", "right"), BATCHES)
def test_leading_axes_broadcast(array, rng, wide, close, left, right):
    a, b = array(normal(rng, left, np.float32)), array(normal(rng, right, np.float32))
    expected = wide(a) @ wide(b)
    bias = array(normal(rng, expected.shape[-1], np.float32))
    residual = array(normal(rng, expected.shape[1:], np.float32))
    y, saved = forward(a, b, bias, residual)
    close(y, expected + wide(bias) + wide(residual), 2)
    g = array(normal(rng, expected.shape, np.float32))
    da, db, dbias, dresidual = backward(g, *saved)
    close(da, summed(wide(g) @ wide(b).swapaxes(-1, -2), left), 4)
    close(db, summed(wide(a).swapaxes(-1, -2) @ wide(g), right), 4)
    close(dbias, summed(wide(g), bias.shape), 4)
    close(dresidual, summed(wide(g), residual.shape), 4)


def test_batches_of_any_strides(array, rng, wide, close):
    a = array(normal(rng, (3, 5, 2, 4), np.float32)).transpose(2, 0, 1, 3)
    b = array(normal(rng, (2, 6, 4, 3), np.float32)).transpose(0, 3, 2, 1)
    for config in (None, SMALL, SPLIT):
        close(matmul(a, b, config=config), wide(a) @ wide(b), 2)
    # One matrix for a batch whose rows do not follow evenly: no larger matrix, no copy.
    w = array(normal(rng, (4, 6), np.float32))
    y, saved = forward(a, w)
    close(y, wide(a) @ wide(w), 2)
    g = array(normal(rng, (2, 3, 5, 6), np.float32))
    close(backward(g, *saved)[1], np.einsum("abmk,abmn->kn", wide(a), wide(g)), 4)
    strange = array(normal(rng, (3, 2, 2, 2, 1, 4), np.float32)).transpose(3, 1, 2, 0, 4, 5)
    b = array(normal(rng, (2, 1, 2, 1, 4, 5), np.float32))
    close(matmul(strange, b), wide(strange) @ wide(b), 2)


def summed(g, shape):
    """g summed over the axes along which `shape` was repeated."""
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    return g.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


# --- what follows the product ---------------------------------------------------------------------

cdf = np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))), otypes=[np.float64])


def gate(z):
    return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


FUNCTIONS = {
    None: lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: z * cdf(z),
    "gelu_tanh": lambda z: z * gate(z),
    "silu": lambda z: z * sigmoid(z),
}


def slope(activation, z):
    """By central differences, which are good to 1e-10 in float64."""
    if activation == "relu":
        return (z > 0).astype(float)
    step, f = 1e-5, FUNCTIONS[activation]
    return (f(z + step) - f(z - step)) / (2 * step)


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize(("has_residual", "config"), [(True, None), (False, SPLIT)])
def test_epilogue(array, rng, dtype, wide, close, activation, has_residual, config):
    a, b = array(normal(rng, (20, 24), dtype)), array(3 * normal(rng, (34, 24), dtype)).T
    bias = array(normal(rng, 34, dtype))
    residual = array(normal(rng, (34, 20), dtype)).T if has_residual else None
    options = {"activation": activation, "config": config}
    y, saved = forward(a, b, bias, residual, **options)
    z = wide(a) @ wide(b) + wide(bias)
    expected = FUNCTIONS[activation](z)
    close(y, expected + wide(residual) if residual is not None else expected, 2)
    g = array(normal(rng, (20, 34), dtype))
    if activation == "relu":  # at 0 it jumps: judge it by what the kernel saw
        z = wide(saved[2])
    dz = wide(g) * slope(activation, z)
    da, db, dbias, dresidual = backward(g, *saved, **options)
    close(da, dz @ wide(b).T, 4)
    close(db, wide(a).T @ dz, 4)
    close(dbias, dz.sum(0), 4)
    assert [x.dtype for x in (da, db, dbias)] == [dtype] * 3
    assert dresidual is (g if has_residual else None)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_epilogue_of_a_large_tile(array, rng, wide, close, activation):
    """The right half of a tile is written on its own; here it reaches beyond the last column."""
    assert module._in_halves(LARGE)
    assert not module._in_halves(SMALL)
    a, b = array(normal(rng, (130, 20), np.float32)), array(normal(rng, (20, 190), np.float32))
    bias, residual = array(normal(rng, 190, np.float32)), array(normal(rng, 190, np.float32))
    y, saved = forward(a, b, bias, residual, activation=activation, config=LARGE)
    z = wide(a) @ wide(b) + wide(bias)
    close(y, FUNCTIONS[activation](z) + wide(residual), 2)
    if activation is not None:
        close(saved[2], z, 2)


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (1, 1, 4, 6), (2, 1, 6), (4, 6)])
def test_residuals_broadcast(array, rng, wide, close, shape):
    a, b = array(normal(rng, (3, 2, 4, 5), np.float32)), array(normal(rng, (5, 6), np.float32))
    residual = array(normal(rng, shape, np.float32))
    y, saved = forward(a, b, residual=residual)
    close(y, wide(a) @ wide(b) + wide(residual), 2)
    g = array(normal(rng, y.shape, np.float32))
    needs = (False, False, False, True)
    close(backward(g, *saved, needs=needs)[3], summed(wide(g), shape), 4)


def test_bias_of_any_stride(array, rng, wide, close):
    a, b = array(normal(rng, (4, 5), np.float32)), array(normal(rng, (5, 6), np.float32))
    for bias in (
        array(np.arange(12, dtype=np.float32))[::-2],
        namespace(a).broadcast_to(a[0, 0], 6),
    ):
        y, saved = forward(a, b, bias)
        close(y, wide(a) @ wide(b) + wide(bias), 2)
        close(backward(y, *saved)[2], wide(y).sum(0), 4)


def test_relu_keeps_no_z_of_its_own_and_lets_nan_through(array):
    a, b = np.array([[1, -1, 0, np.nan]], np.float32).T, np.ones((1, 2), np.float32)
    y, saved = forward(array(a), array(b), activation="relu")
    assert saved[2] is y
    assert np.isnan(wide_row := backend.to_device(y, "cpu")[3]).all(), wide_row
    da = backward(array(np.ones((4, 2), np.float32)), *saved, activation="relu")[0]
    assert backend.to_device(da, "cpu")[:, 0].tolist() == [2, 0, 0, 0]


@pytest.mark.parametrize("rows", [100, 1300])  # one chunk of rows, several
def test_sums_over_many_rows(array, rng, dtype, wide, close, rows):
    g = array(normal(rng, (rows, 5), dtype))
    b, bias = array(normal(rng, (2, 5), dtype)), array(np.zeros(5, np.float32))
    a = array(np.ones((rows, 2), dtype))
    _, saved = forward(a, b, bias, activation="silu")
    _, db, dbias, _ = backward(g, *saved, activation="silu")
    dz = wide(g) * slope("silu", wide(a) @ wide(b))
    np.testing.assert_allclose(
        wide(dbias), dz.sum(0), rtol=0, atol=1e-4 if dtype == np.float32 else 0.1
    )
    np.testing.assert_allclose(wide(db), np.stack([dz.sum(0)] * 2), rtol=2e-2, atol=0.15)


@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_gradient_of_another_dtype(array, rng, wide, close, activation):
    """bfloat16 in, float32 out: the gradient that comes is float32, those that go are bfloat16."""
    dtype = backend.bfloat16
    a, b = array(normal(rng, (20, 24), dtype)), array(normal(rng, (24, 18), dtype))
    residual = array(normal(rng, (20, 18), dtype))
    options = {"activation": activation, "dtype": np.float32}
    y, saved = forward(a, b, None, residual, **options)
    z = wide(a) @ wide(b)
    close(y, FUNCTIONS[activation](z) + wide(residual), 2)
    g = array(normal(rng, (20, 18), np.float32))
    da, db, dbias, dresidual = backward(g, *saved, **options)
    dz = wide(g) * slope(activation, z)
    assert dbias is None
    assert da.dtype == db.dtype == dresidual.dtype == dtype
    close(da, dz @ wide(b).T, 2)
    close(db, wide(a).T @ dz, 2)
    close(dresidual, wide(g))


def test_strided_gradients(array, rng, layout, wide, close):
    a, b = array(normal(rng, (6, 7), np.float32)), array(normal(rng, (7, 5), np.float32))
    g = layout(array(normal(rng, (6, 5), np.float32)))
    bias = array(normal(rng, 5, np.float32))
    _, saved = forward(a, b, bias, activation="gelu")
    da, db, dbias, _ = backward(g, *saved, activation="gelu")
    dz = wide(g) * slope("gelu", wide(a) @ wide(b) + wide(bias))
    close(da, dz @ wide(b).T, 4)
    close(db, wide(a).T @ dz, 4)
    close(dbias, dz.sum(0), 4)


# --- what is kept ---------------------------------------------------------------------------------


def test_only_what_is_needed_is_kept_and_computed(array, rng):
    a, b = array(normal(rng, (6, 7), np.float32)), array(normal(rng, (7, 5), np.float32))
    bias, residual = array(normal(rng, 5, np.float32)), array(normal(rng, (6, 5), np.float32))
    all_ = forward(a, b, bias, residual, activation="gelu")
    assert all_[1][0] is a
    assert all_[1][1] is b
    assert all_[1][2] is not None
    full = backward(residual, *all_[1], activation="gelu")
    for i in range(4):
        needs = tuple(j == i for j in range(4))
        y, saved = forward(a, b, bias, residual, activation="gelu", needs=needs)
        assert (y == all_[0]).all()
        kept = [x is not None and 0 not in x.strides for x in saved]
        assert kept == [needs[1], needs[0], i < 3, False, False]
        assert [saved[j].shape for j in (0, 1, 3, 4)] == [x.shape for x in (a, b, bias, residual)]
        found = backward(residual, *saved, activation="gelu", needs=needs)
        assert [x is not None for x in found] == list(needs)
        assert (found[i] == full[i]).all()
    nothing = (False,) * 4
    y, saved = forward(a, b, bias, residual, activation="relu", needs=nothing)
    assert saved[2] is None
    assert backward(residual, *saved, activation="relu", needs=nothing) == (None,) * 4


def test_as_the_ops_do(rng, array, close):
    from tinygrad_llm import Tensor, ops

    x, w = normal(rng, (2, 9, 8), np.float32), normal(rng, (12, 8), np.float32)
    bias, g = normal(rng, 12, np.float32), normal(rng, (2, 9, 12), np.float32)
    tensors = [Tensor(v.astype(np.float64), requires_grad=True) for v in (x, w, bias)]
    expected = ops.gelu(ops.linear(*tensors), approximate="tanh")
    (expected * Tensor(g.astype(np.float64))).sum().backward()
    y, saved = forward(array(x), array(w).T, array(bias), activation="gelu_tanh")
    close(y, expected.data, 2)
    dx, dwt, dbias, _ = backward(array(g), *saved, activation="gelu_tanh")
    for gradient, tensor in zip((dx, dwt.T, dbias), tensors, strict=True):
        assert tensor.grad is not None
        close(gradient, tensor.grad.data, 4)


# --- the persistent variant -----------------------------------------------------------------------


@on_descriptors
@pytest.mark.parametrize("turned", ["", "a", "b", "ab"])
def test_persistent(array, rng, dtype, wide, close, turned):
    """More tiles than programs (there are two in the interpreter), and sizes beside the blocks."""
    a = array(normal(rng, (40, 136) if "a" in turned else (136, 40), dtype))
    b = array(normal(rng, (72, 40) if "b" in turned else (40, 72), dtype))
    a, b = a.T if "a" in turned else a, b.T if "b" in turned else b
    bias, residual = array(normal(rng, 72, dtype)), array(normal(rng, (136, 72), dtype))
    options: dict[str, Any] = {"activation": "silu", "precision": "tf32"}
    y, (*_, z, _, _) = forward(a, b, bias, residual, **options, config=PERSISTENT)
    plain, (*_, plain_z, _, _) = forward(a, b, bias, residual, **options)
    expected = wide(a) @ wide(b) + wide(bias)
    times = 2 if INTERPRETED or dtype != np.float32 else 500
    close(z, expected, times)
    close(y, expected / (1 + np.exp(-expected)) + wide(residual), times)
    close(y, wide(plain), times)
    close(z, wide(plain_z), times)


def test_persistent_wants_what_descriptors_describe(array, rng):
    a, b = array(normal(rng, (16, 16), np.float32)), array(normal(rng, (16, 16), np.float32))
    two = array(normal(rng, (2, 16, 16), np.float32))
    for left, right in (
        (a[:, ::2], b[:8]),  # nothing contiguous
        (a[:, 1:], b[1:]),  # A begins beside a multiple of 16 bytes
        (a[:, :7], b.T[1:8]),  # B does
        (array(normal(rng, (16, 7), np.float32)), b[:7]),  # A's rows do
        (namespace(a).broadcast_to(a[0], (16, 16)), b),  # A's rows are one
        (two, two),
    ):
        plan = module._planned(left, right, None)[-1]
        assert not module._fits_descriptors((left, right), plan)
    plan = module._planned(two, b, None)[-1]  # many matrices A times one B are one product
    assert module._fits_descriptors((two, b), plan)
    with pytest.raises(ValueError, match="persistent matmul takes one matrix each"):
        matmul(a[:, ::2], b[:8], config=PERSISTENT)


# --- which configuration --------------------------------------------------------------------------


@pytest.fixture
def candidates(monkeypatch):
    monkeypatch.setattr(module, "INTERPRETED", False)
    return module._candidates.__wrapped__


@pytest.mark.parametrize("kind", ["half", "tf32", "ieee"])
def test_candidates(candidates, kind):
    square = candidates(4096, 4096, 4096, 1, kind, False)
    assert square[0]["ROWS"] * square[0]["COLUMNS"] >= 128 * 128
    assert all(c["SPLITS"] == 1 and not c["PERSISTENT"] for c in square[:3])
    thin = candidates(1, 768, 8192, 1, kind, False)
    assert thin[0]["ROWS"] == 16
    assert any(c["SPLITS"] > 1 for c in thin[:3])
    assert all(c["SPLITS"] == 1 for c in candidates(64, 64, 64, 512, kind, False))
    described = candidates(4096, 4096, 4096, 1, kind, True)
    assert described[0] == square[0]
    assert sum(c["PERSISTENT"] for c in described) == len(module._PERSISTENT[kind])
    assert not any(c["PERSISTENT"] for c in candidates(64, 64, 4096, 1, kind, True))
    for found in (square, thin, described):
        assert len({tuple(c.items()) for c in found}) == len(found) <= 16


def test_candidates_of_the_interpreter():
    if INTERPRETED:
        (config,) = module._candidates(3, 5000, 70, 1, "ieee", False)
        assert (config["ROWS"], config["COLUMNS"], config["INNER"]) == (16, 512, 128)


# --- errors ---------------------------------------------------------------------------------------


def test_errors(array):
    a, b = array(np.ones((2, 3), np.float32)), array(np.ones((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(4, 3\)"):
        matmul(a, b.T)
    with pytest.raises(ValueError, match="takes"):
        matmul(a[0], b)
    with pytest.raises(TypeError, match="one dtype, got float32 and float16"):
        matmul(a, b.astype(np.float16))
    with pytest.raises(TypeError, match="float64"):
        matmul(a.astype(np.float64), b)
    with pytest.raises(ValueError, match="broadcast"):
        matmul(
            namespace(a).ones((2, 2, 3), dtype=np.float32),
            namespace(a).ones((3, 3, 4), dtype=np.float32),
        )
    with pytest.raises(ValueError, match=r"bias of the shape \(4,\), got \(3,\)"):
        forward(a, b, b[:, 0])
    with pytest.raises(ValueError, match=r"residual that broadcasts to \(2, 4\), got \(2, 3\)"):
        forward(a, b, residual=a)
    with pytest.raises(ValueError, match="'mish'"):
        forward(a, b, activation="mish")
    with pytest.raises(ValueError, match="'exact'"):
        matmul(a, b, precision="exact")
    with pytest.raises(ValueError, match="dtype=float16"):
        matmul(a, b, dtype=np.float16)
    with pytest.raises(ValueError, match=r"gradient of the shape \(2, 4\), got \(2, 3\)"):
        backward(a, a, b)
    with pytest.raises(ValueError, match="got none: say in"):
        backward(a @ b, a, b, activation="gelu")
    with pytest.raises(ValueError, match=r"z of the shape \(2, 4\), got \(3, 4\)"):
        backward(a @ b, a, b, b, activation="gelu")
