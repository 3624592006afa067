from __future__ import annotations

import itertools
import os
import subprocess
import sys
import types
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import Tensor, backend, ops

FLOATS = ["float16", "bfloat16", "float32", "float64"]
INTEGERS = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"]


# --- Philox ---------------------------------------------------------------------------------------


def _philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as the paper has it, on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (b >> 32) ^ c[1] ^ k[0],
            b & 0xFFFFFFFF,
            (a >> 32) ^ c[3] ^ k[1],
            a & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_written_out_philox_gives_the_known_answers_of_random123(counter, key, words):
    assert [f"{w:08x}" for w in _philox4x32(counter, key)] == words.split()


def test_philox_gives_the_known_answer_at_zero():
    words = backend.philox(0, 0, 4)
    assert words.dtype == np.uint32
    assert [f"{w:08x}" for w in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1) | st.sampled_from([2**32 - 1, 2**32, 2**64 - 1]),
    st.integers(0, 9),
)
def test_philox_equals_the_written_out_one(seed, offset, count):
    expected: list[int] = []
    for i in range(-(-count // 4)):
        at = (offset + i) % 2**64
        key = [seed & 0xFFFFFFFF, seed >> 32]
        expected += _philox4x32([at & 0xFFFFFFFF, at >> 32, 0, 0], key)
    assert backend.philox(seed, offset, count).tolist() == expected[:count]


@pytest.mark.parametrize("offset", [0, 2**32 - 5000, 2**40 + 3])
def test_blocks_and_offsets_do_not_show(offset):
    """Any part of the sequence is what it is in the whole, across the borders of blocks."""
    whole = backend.philox(7, offset, 40_000)
    for start, count in ((0, 5), (8191 * 4, 12), (8192 * 4, 4), (9000 * 4, 3999)):
        part = backend.philox(7, offset + start // 4, count)
        np.testing.assert_array_equal(part, whole[start : start + count])


# --- the stream -----------------------------------------------------------------------------------


def test_a_stream_steps_over_what_it_gave():
    stream = backend.RandomStream(3)
    first, second = stream.words(6), stream.words(4)
    whole = backend.philox(3, 0, 12)
    int_like: Any = np.int64(1)
    np.testing.assert_array_equal(first, whole[:6])
    np.testing.assert_array_equal(second, whole[8:12])  # a draw starts at a whole counter
    assert stream.state() == {"seed": 3, "offset": 3}
    assert stream.reserve(5) == (3, 3)
    assert stream.offset == 5
    stream.reserve(int_like)
    assert type(stream.offset) is int  # a checkpoint writes it as JSON


def test_a_stream_goes_on_from_its_state():
    stream = backend.RandomStream(2**64 - 1)
    stream.uniform(10)
    state = stream.state()
    drawn = [stream.uniform(3), stream.normal(3), stream.integers(0, 9, 3), stream.permutation(5)]
    other = backend.RandomStream()
    other.load_state(state)
    again = [other.uniform(3), other.normal(3), other.integers(0, 9, 3), other.permutation(5)]
    for a, b in zip(drawn, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_manual_seed_starts_the_default_stream_anew():
    backend.manual_seed(5)
    first = backend.random.words(4)
    backend.manual_seed(5)
    np.testing.assert_array_equal(backend.random.words(4), first)
    backend.manual_seed(6)
    assert (backend.random.words(4) != first).any()


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_has_64_bits(seed):
    for make in (backend.RandomStream, backend.manual_seed):
        with pytest.raises(ValueError, match=f"0 to 2⁶⁴ − 1, got {seed}"):
            make(seed)
    with pytest.raises(ValueError, match="got -1"):
        backend.RandomStream().load_state({"seed": -1, "offset": 0})


@pytest.mark.parametrize("dtype", FLOATS)
def test_uniform_numbers_fill_the_interval_without_its_end(dtype):
    u = backend.RandomStream(1).uniform(50_000, dtype)
    assert u.dtype == backend.as_dtype(dtype)
    u = u.astype(np.float64)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(u.var() - 1 / 12) < 0.005
    counts = np.histogram(u, bins=16, range=(0, 1))[0]
    assert (np.abs(counts - 3125) < 300).all()


def test_the_largest_word_is_below_one_in_every_dtype(monkeypatch):
    top = np.uint32(0xFFFFFFFF)
    monkeypatch.setattr(backend.RandomStream, "words", lambda self, n, xp: xp.full(n, top))
    for dtype in FLOATS:
        assert float(backend.RandomStream().uniform((), dtype)) < 1


def test_uniform_numbers_are_multiples_of_the_last_bit():
    u = backend.RandomStream(1).uniform(1000)
    np.testing.assert_array_equal(u * 2**24, np.floor(u * 2**24))
    words = backend.philox(1, 0, 1000)
    np.testing.assert_array_equal(u, ((words >> 8) * 2.0**-24).astype(np.float32))
    wide = backend.RandomStream(1).uniform(500, "float64")
    pairs = words.astype(np.uint64).reshape(-1, 2)
    np.testing.assert_array_equal(wide, ((pairs[:, 0] << 21) | (pairs[:, 1] >> 11)) * 2.0**-53)


@pytest.mark.parametrize("dtype", FLOATS)
def test_normal_numbers_have_the_moments(dtype):
    z = backend.RandomStream(2).normal(100_001, dtype)
    assert z.dtype == backend.as_dtype(dtype)
    z = z.astype(np.float64)
    assert np.isfinite(z).all()
    assert abs(z.mean()) < 0.02
    assert abs(z.var() - 1) < 0.02
    assert abs((z**3).mean()) < 0.05
    assert abs((z**4).mean() - 3) < 0.1
    halves = z[:50_000], z[50_001:]  # both numbers of a pair share their radius, not more
    assert abs(np.corrcoef(*halves)[0, 1]) < 0.02


def test_integers_are_in_range_and_even():
    k = backend.RandomStream(3).integers(-2, 5, 70_000)
    assert k.dtype == np.int64
    assert (np.abs(np.bincount(k + 2, minlength=7) - 10_000) < 500).all()
    assert backend.RandomStream(3).integers(4, 5, (2, 2)).tolist() == [[4, 4], [4, 4]]
    wide = backend.RandomStream(3).integers(-(2**62), 2**62, 1000)
    assert wide.min() < -(2**61)
    assert wide.max() > 2**61
    for low, high in ((3, 3), (3, 2)):
        with pytest.raises(ValueError, match=f"low={low}, high={high}"):
            backend.RandomStream().integers(low, high)


@given(st.integers(0, 300), st.integers(0, 2**64 - 1))
def test_a_permutation_is_one(n, seed):
    p = backend.RandomStream(seed).permutation(n)
    assert p.dtype == np.int64
    np.testing.assert_array_equal(np.sort(p), np.arange(n))


def test_permutations_differ():
    stream = backend.RandomStream(0)
    found = {tuple(stream.permutation(3)) for _ in range(100)}
    assert found == set(itertools.permutations(range(3)))


@pytest.mark.parametrize("size", [(), 3, (2, 3), (0,), [2], np.int64(3), (np.int64(2), 1)])
def test_shapes_of_draws(size):
    wanted = tuple(np.atleast_1d(np.asarray(size, dtype=int)))
    stream = backend.RandomStream(0)
    for drawn in (stream.uniform(size), stream.normal(size), stream.integers(0, 5, size)):
        assert np.asarray(drawn).shape == wanted


# --- dtypes ---------------------------------------------------------------------------------------


def test_promotion_is_pytorchs():
    table = {
        ("float32", "float64"): "float64",
        ("float16", "float32"): "float32",
        ("bfloat16", "float32"): "float32",
        ("bfloat16", "float64"): "float64",
        ("float16", "bfloat16"): "float32",
        ("int64", "float16"): "float16",
        ("int64", "float32"): "float32",
        ("int32", "bfloat16"): "bfloat16",
        ("bool", "float16"): "float16",
        ("uint8", "int8"): "int16",
        ("uint8", "int64"): "int64",
        ("uint32", "int32"): "int64",
        ("bool", "int8"): "int8",
        ("bool", "uint8"): "uint8",
    }
    for (a, b), expected in table.items():
        for pair in ((a, b), (b, a)):
            assert backend.promote(*map(backend.as_dtype, pair)) == backend.as_dtype(expected)


names = st.sampled_from(FLOATS + INTEGERS)


@given(names, names, names)
def test_promotion_is_a_join(a, b, c):
    a, b, c = map(backend.as_dtype, (a, b, c))
    both = backend.promote(a, b)
    assert both == backend.promote(b, a)
    assert backend.promote(a, a) == a
    assert backend.promote(both, a) == both
    assert backend.is_float(both) == (backend.is_float(a) or backend.is_float(b))
    if backend.float64 not in (a, b, c):
        assert backend.promote(both, c) != backend.float64


def test_no_dtype_holds_uint64_and_signed_integers():
    with pytest.raises(TypeError, match=r"uint64 and int8.*astype"):
        backend.promote(np.dtype(np.uint64), backend.int8)


def test_dtypes_by_name_and_by_type():
    assert backend.as_dtype("bfloat16") == np.dtype(ml_dtypes.bfloat16)
    assert backend.as_dtype("bool") == np.bool_
    assert backend.as_dtype(np.float32) == backend.float32
    assert backend.as_dtype(float) == backend.float64
    for name in FLOATS:
        assert backend.is_float(backend.as_dtype(name))
    for name in INTEGERS:
        assert not backend.is_float(backend.as_dtype(name))
    assert not backend.is_float(np.dtype(np.complex64))


def test_the_default_dtype_is_a_float():
    assert backend.default_dtype() == np.float32
    backend.set_default_dtype("bfloat16")
    try:
        assert Tensor(1.5).dtype == backend.bfloat16
        assert ops.zeros(1).dtype == backend.bfloat16
        assert backend.RandomStream().uniform(2).dtype == backend.bfloat16
    finally:
        backend.set_default_dtype(np.float32)
    for wrong in ("int64", np.complex64):
        with pytest.raises(TypeError, match="must be a float dtype, got"):
            backend.set_default_dtype(wrong)
    assert backend.default_dtype() == np.float32


# --- arrays and devices ---------------------------------------------------------------------------


def test_the_namespace_of_arrays_and_tensors():
    assert backend.namespace(np.zeros(1)) is np
    assert backend.namespace(Tensor([1.0])) is ops
    assert backend.is_array(np.zeros(1))
    assert not backend.is_array(np.float32(1))
    assert not backend.is_array(Tensor([1.0]))
    assert not backend.is_array([1.0])


def test_devices():
    array = np.zeros(2)
    assert backend.device_of(array) == "cpu"
    assert backend.to_device(array, "cpu") is array
    assert backend.device_namespace("cpu") is np
    for wrong in ("tpu", "cpu:0", "cuda:x", "cuda:-1", "cuda:", "", "cudax"):
        for use in (lambda d: backend.to_device(array, d), backend.device_namespace):
            with pytest.raises(ValueError, match="'cpu', 'cuda' or 'cuda:N', got"):
                use(wrong)


def test_without_cupy_the_gpu_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    for use in (
        lambda: Tensor([1.0], device="cuda"),
        lambda: Tensor([1.0]).to("cuda:1"),
        lambda: Tensor([1.0]).cuda(),
        lambda: ops.zeros(1, device="cuda"),
    ):
        with pytest.raises(RuntimeError, match=r"pip install 'tinygrad-llm\[cuda13\]'"):
            use()


def test_memory_tuning_can_be_switched_off():
    code = "from tinygrad_llm import backend; print(backend.memory_is_kept)"
    environment = os.environ | {"TINYGRAD_LLM_MALLOC": "system"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"


# --- BLAS -----------------------------------------------------------------------------------------


def test_the_threads_of_blas_can_be_set_and_put_back():
    before = backend.blas_threads()
    if before is None:
        pytest.skip("NumPy has another BLAS here")
    a = np.ones((200, 200))
    try:
        assert backend.set_blas_threads(1) == before
        assert backend.blas_threads() == 1
        assert (a @ a == 200).all()
        assert backend.set_blas_threads(2) == 1
        assert backend.blas_threads() == 2
        assert (a @ a == 200).all()
    finally:
        backend.set_blas_threads(before)
    assert backend.blas_threads() == before


def test_another_blas_keeps_its_threads(monkeypatch):
    monkeypatch.setattr(backend, "_openblas", lambda: None)
    assert backend.blas_threads() is None
    assert backend.set_blas_threads(1) is None


def test_an_array_of_cupy_has_its_namespace(monkeypatch):
    """cupy.ndarray has no __array_namespace__ of its own."""
    cupy = types.ModuleType("cupy")
    array = type("ndarray", (), {"__module__": "cupy"})()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert backend.namespace(array) is cupy
    assert backend.is_array(array)
