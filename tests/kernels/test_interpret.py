"""That the mended interpreter computes what a GPU would, and refuses what it cannot."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from tinygrad_llm import backend
from tinygrad_llm.kernels.language import INTERPRETED, libdevice, tl, triton
from tinygrad_llm.kernels.launch import launch

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels run on a GPU here")

BFLOAT16 = ml_dtypes.bfloat16


@triton.jit
def _twice_plus(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(x + i, mask=i < n, other=1.0), tl.load(y + i, mask=i < n, other=1.0)
    tl.store(out + i, (a + a + b).to(out.dtype.element_ty), mask=i < n)


@triton.jit
def _sum_in_a_loop(x, out, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out, tl.sum(total, 0))


@triton.jit
def _product(a, b, c, K: tl.constexpr):
    i, k = tl.arange(0, 16), tl.arange(0, K)
    left = tl.load(a + i[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * 16 + i[None, :])
    tl.store(c + i[:, None] * 16 + i[None, :], tl.dot(left, right))


@triton.jit
def _functions(x, out, n, WHICH: tl.constexpr):
    i = tl.arange(0, 8)
    a = tl.load(x + i)
    if WHICH == "tanh":
        a = libdevice.tanh(a)
    elif WHICH == "expm1":
        a = libdevice.log1p(libdevice.expm1(a))
    elif WHICH == "missing":
        a = libdevice.j0(a)
    elif WHICH == "max":
        a = tl.zeros_like(a) + tl.max(a, 0)
    tl.store(out + i, a)


@triton.jit
def _atomic(x, out):
    tl.atomic_add(out, tl.load(x))


@triton.jit
def _random(out, seed, offset):
    i = tl.arange(0, 4)
    a, b, c, d = tl.philox(seed, offset + i, i * 0, i * 0, i * 0)
    for_each = out + 4 * i
    tl.store(for_each, a)
    tl.store(for_each + 1, b)
    tl.store(for_each + 2, c)
    tl.store(for_each + 3, d)


@triton.jit
def _through_an_address(addresses, n, BLOCK: tl.constexpr):
    x = tl.load(addresses + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, mask=i < n) + 1.0, mask=i < n)


@triton.jit
def _described(x, out, m, n, step, BLOCK: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [m, n], [n, step], [BLOCK, BLOCK])
    target = tl.make_tensor_descriptor(out, [m, n], [n, step], [BLOCK, BLOCK])
    i, j = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    target.store([i, j], source.load([i, j]))


def test_bfloat16_is_numbers_rounded_to_nearest_even(rng) -> None:
    x, y = (rng.normal(size=100).astype(BFLOAT16) for _ in range(2))
    out = np.zeros(100, BFLOAT16)
    launch(_twice_plus, 4, x, y, out, 100, BLOCK=32)
    doubled = (x.astype(np.float32) * 2).astype(BFLOAT16)
    np.testing.assert_array_equal(out, doubled + y)

    # Halfway between two bfloat16 numbers: to the even one, which truncation would miss.
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 3 * 2**-8, 3.4e38, np.inf], np.float32)
    out = np.zeros(5, BFLOAT16)
    launch(_twice_plus, 1, ties / 2, np.zeros(5, np.float32), out, 5, BLOCK=8)
    np.testing.assert_array_equal(out, ties.astype(BFLOAT16))
    assert float(out[1]) == 1 + 2**-6


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
def test_products_of_halves_are_added_in_float32(dtype, rng) -> None:
    a, b = (rng.normal(size=s).astype(dtype) * 8 for s in ((16, 32), (32, 16)))
    c = np.zeros((16, 16), np.float32)
    launch(_product, 1, a, b, c, K=32)
    want = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(c, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_tensor_descriptors_end_where_their_arrays_do(dtype, rng) -> None:
    x = rng.normal(size=(20, 24)).astype(dtype)
    out = np.zeros_like(x)
    launch(_described, (2, 2), x, out, 20, 24, 1, BLOCK=16)
    np.testing.assert_array_equal(out, x)


def test_a_loop_bound_may_be_an_argument(rng) -> None:
    x, out = rng.normal(size=37).astype(np.float32), np.zeros(1, np.float32)
    for n in (0, 1, 16, 37):
        launch(_sum_in_a_loop, 1, x, out, n, BLOCK=16)
        np.testing.assert_allclose(out[0], x[:n].sum(), rtol=1e-5, atol=1e-6)


def test_libdevice(rng) -> None:
    x, out = rng.normal(size=8).astype(np.float32), np.zeros(8, np.float32)
    launch(_functions, 1, x, out, 8, WHICH="tanh")
    np.testing.assert_allclose(out, np.tanh(x), rtol=1e-6)
    launch(_functions, 1, x, out, 8, WHICH="expm1")
    np.testing.assert_allclose(out, x, rtol=1e-5, atol=1e-6)
    with pytest.raises(NotImplementedError, match=r"no libdevice\.j0"):
        launch(_functions, 1, x, out, 8, WHICH="missing")
    half = x.astype(np.float16)
    with pytest.raises(TypeError, match=r"tanh takes float32 or float64, got fp16"):
        launch(_functions, 1, half, half, 8, WHICH="tanh")


def test_a_maximum_passes_over_nan_without_a_warning() -> None:
    x, out = np.full(8, np.nan, np.float32), np.zeros(8, np.float32)
    launch(_functions, 1, x, out, 8, WHICH="max")
    assert np.isnan(out).all()
    x[3] = -math.inf
    launch(_functions, 1, x, out, 8, WHICH="max")
    assert (out == -math.inf).all()


def test_random_numbers_are_those_of_the_backend() -> None:
    out = np.zeros(16, np.uint32)
    for seed in (0, 1234, 2**40 + 5):
        launch(_random, 1, out, seed, 100)
        np.testing.assert_array_equal(out, backend.philox(seed, 100, 16))


def test_what_would_be_wrong_is_refused() -> None:
    half = np.ones(1, BFLOAT16)
    with pytest.raises(NotImplementedError, match="no bfloat16 atomics"):
        launch(_atomic, 1, half, half.copy())
    x = np.ones((16, 16), np.float32)
    with pytest.raises(Exception, match="K >= 16"):
        launch(_product, 1, x, x.copy(), x.copy(), K=8)


def test_memory_outside_of_the_arrays_is_not_touched() -> None:
    whole = np.arange(64, dtype=np.float32)
    x, y, out = whole[8:16], np.ones(8, np.float32), np.zeros(8, np.float32)
    launch(_twice_plus, 1, x, y, out, 8, BLOCK=16)
    np.testing.assert_array_equal(out, 2 * x + 1)
    with pytest.raises(IndexError, match=r"program \(0, 0, 0\) reads 1 of 9 elements outside"):
        launch(_twice_plus, 1, x, y, out, 9, BLOCK=16)
    with pytest.raises(IndexError, match=r"program \(1, 0, 0\) writes 2 of 4 elements outside"):
        launch(_twice_plus, 3, whole, whole, out[:6], 60, BLOCK=4)
    fixed = np.broadcast_to(np.float32(0), (8,))
    with pytest.raises(IndexError, match="outside of the writeable arrays"):
        launch(_twice_plus, 1, x, y, fixed, 8, BLOCK=8)


def test_arrays_reached_through_addresses_are_named() -> None:
    arrays = [np.zeros(5, np.float32), np.zeros(5, np.float32)]
    addresses = np.array([a.ctypes.data for a in arrays], np.int64)
    launch(_through_an_address, 2, addresses, 5, reaches=arrays, BLOCK=8)
    np.testing.assert_array_equal(arrays, np.ones((2, 5)))
    with pytest.raises(IndexError):
        launch(_through_an_address, 2, addresses, 5, BLOCK=8)


def test_what_cannot_be_launched_is_refused_in_a_sentence() -> None:
    x = np.zeros(8, np.float32)
    launch(_twice_plus, 0, x, x, x, 8, BLOCK=8)  # no program
    with pytest.raises(TypeError, match="takes NumPy arrays, ints, floats, bools and None, got li"):
        launch(_twice_plus, 1, [1.0], x, x, 8, BLOCK=8)
    with pytest.raises(TypeError, match=r"twice_plus\(\) takes x, y, out, n, BLOCK: got 3"):
        launch(_twice_plus, 1, x, x, x, BLOCK=8)
    with pytest.raises(TypeError, match=r"was given the float BLOCK=8\.0 as a constant"):
        launch(_twice_plus, 1, x, x, x, 8, BLOCK=8.0)
    with pytest.raises(ValueError, match=r"a grid is 0 to .* got \(1, -1, 1\)"):
        launch(_twice_plus, (1, -1), x, x, x, 8, BLOCK=8)
    with pytest.raises(ValueError, match="a grid is 0 to"):
        launch(_twice_plus, (1, 1, 2**16), x, x, x, 8, BLOCK=8)
    np.testing.assert_array_equal(x, 0)
