"""The rotary kernel against float64, and the laws of a rotation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinygrad_llm.kernels import layout as layouts
from tinygrad_llm.kernels import rotary
from tinygrad_llm.ops import rotary_tables

SMALL = {"ROWS": 4, "BLOCK": 4, "num_warps": 1}


def tables(positions: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = rotary_tables(positions, size)
    return cos.numpy(), sin.numpy()


def turned(x, cos, sin, offset=0, sign=1) -> np.ndarray:
    """Hugging Face's formula: x cos + rotate_half(x) sin, with tables repeated for both halves."""
    half = x.shape[-1] // 2
    rows = slice(offset, offset + x.shape[-2])
    cos, sin = (np.concatenate((t[..., rows, :],) * 2, axis=-1) for t in (cos, sin))
    rotated_half = np.concatenate((-x[..., half:], x[..., :half]), axis=-1)
    return x * cos + sign * rotated_half * sin


def check(x, g, cos, sin, config, close, wide, offset=0) -> None:
    y, saved = rotary.forward(x, cos, sin, offset=offset, config=config)
    dx = rotary.backward(g, *saved, offset=offset, config=config)
    for out in (y, dx):
        assert (out.dtype, out.flags.c_contiguous) == (x.dtype, True)
    close(y, turned(wide(x), wide(cos), wide(sin), offset))
    close(dx, turned(wide(g), wide(cos), wide(sin), offset, -1))


def made(array, rng, shape, dtype: Any = np.float32, positions=20) -> tuple[Any, Any, Any, Any]:
    """(x, g, cos, sin)"""
    x, g = (array(rng.normal(size=shape), dtype) for _ in range(2))
    cos, sin = (array(t) for t in tables(positions, shape[-1]))
    return x, g, cos, sin


@pytest.mark.parametrize("offset", [0, 5])
def test_the_formula_and_its_gradient(offset, dtype, rng, array, close, wide) -> None:
    check(*made(array, rng, (2, 3, 7, 12), dtype), SMALL, close, wide, offset)


@pytest.mark.parametrize("half", [1, 3, 4, 5, 11])
def test_neighbours_as_pairs(half, layout, dtype, rng, array, close, wide) -> None:
    """They are halves in another order."""
    x, g, cos, sin = made(array, rng, (2, 5, 2 * half), dtype)
    x, g = layout(x), layout(g)
    order = np.arange(2 * half).reshape(half, 2).T.ravel()
    y, saved = rotary.forward(x, cos, sin, offset=3, interleaved=True, config=SMALL)
    dx = rotary.backward(g, *saved, offset=3, interleaved=True, config=SMALL)
    close(y[..., order], turned(wide(x)[..., order], wide(cos), wide(sin), 3))
    close(dx[..., order], turned(wide(g)[..., order], wide(cos), wide(sin), 3, -1))


@pytest.mark.parametrize("half", [1, 2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_sizes_around_a_tile(rows, half, rng, array, close, wide) -> None:
    check(*made(array, rng, (rows, 2 * half)), SMALL, close, wide)


def test_the_chosen_configuration_serves_any_shape(rng, array, close, wide) -> None:
    for shape in [(1, 2), (2, 3, 2, 5, 6), (2, 2, 20, 128), (3, 10000)]:
        check(*made(array, rng, shape), None, close, wide)


@pytest.mark.parametrize("half", [1, 48, 64, 5000])
def test_the_configurations_for_a_gpu(half, monkeypatch) -> None:
    monkeypatch.setattr(rotary, "INTERPRETED", False)
    for c in rotary._candidates.__wrapped__(4096, half):
        assert all((n & (n - 1)) == 0 for n in c.values())
        assert 4 <= c["ROWS"] * c["BLOCK"] / (32 * c["num_warps"]) <= 16


def test_any_strides(layout, dtype, rng, array, close, wide) -> None:
    x, g, cos, sin = made(array, rng, (4, 3, 10), dtype)
    check(layout(x), layout(g), layout(cos), layout(sin), SMALL, close, wide, offset=2)


def test_heads_beside_each_other_are_not_copied(rng, array, close, wide, monkeypatch) -> None:
    """(B, T, H, D) with its axes swapped, queries and keys as slices of one array."""
    both, _, cos, sin = made(array, rng, (2, 7, 3, 16))
    x, g = (both[..., s].swapaxes(1, 2) for s in (slice(8), slice(8, None)))
    cos, sin = cos[:, :4], sin[:, :4]
    tables = [np.broadcast_to(t[:7], (2, 3, 7, 4)) for t in (cos, sin)]
    (seen, *_), sizes, _ = layouts.as_rows(x[..., :4], x[..., 4:], *tables)
    assert np.shares_memory(seen, both) if rotary.INTERPRETED else True
    assert sizes == (3, 7)
    check(x, g, cos, sin, SMALL, close, wide)


def test_axes_that_cannot_be_merged_are_copied(rng, array, close, wide) -> None:
    big, _, cos, sin = made(array, rng, (3, 4, 3, 4, 3, 10))
    x, g = big[::2, ::2, ::2, ::2, ::2], big[1:, 1:3, 1:, 2:, 1:]
    assert layouts.merge_axes(x.shape, layouts.strides(x), at_most=4) is None
    check(x, g, cos, sin, SMALL, close, wide)


def test_tables_of_their_own_for_each_sequence(rng, array, close, wide) -> None:
    """As rows that begin at different positions need: (B, 1, T, D/2)."""
    x, g, cos, sin = made(array, rng, (2, 3, 5, 8))
    positions = array(np.array([[[0, 1, 2, 3, 4]], [[9, 9, 9, 10, 3]]]))
    cos, sin = cos[positions], sin[positions]
    check(x, g, cos, sin, SMALL, close, wide)


def test_tables_that_lie_differently_in_memory(rng, array, close, wide) -> None:
    x, g, cos, sin = made(array, rng, (2, 5, 8))
    check(x, g, cos, sin.T.copy().T, SMALL, close, wide)
    check(x, g, cos[::-1], sin[::-1], SMALL, close, wide)


def test_tables_of_another_dtype(rng, array, close, wide) -> None:
    x, g, cos, sin = made(array, rng, (5, 8), np.float32)
    check(x, g, cos.astype(np.float16), sin.astype(np.float16), SMALL, close, wide)


def test_steps_of_a_generation_are_the_whole_sequence(rng, array, wide) -> None:
    x, _, cos, sin = made(array, rng, (2, 6, 8))
    whole, _ = rotary.forward(x, cos, sin)
    for t in range(6):
        step, _ = rotary.forward(x[:, t : t + 1], cos, sin, offset=t)
        np.testing.assert_array_equal(wide(step), wide(whole[:, t : t + 1]))


def test_products_depend_on_the_distance_only(rng, array, wide) -> None:
    q, k, cos, sin = made(array, rng, (1, 16))

    def product(t: int, s: int) -> float:
        a, b = (rotary.forward(x, cos, sin, offset=n)[0] for x, n in ((q, t), (k, s)))
        return float((wide(a) * wide(b)).sum())

    assert product(3, 1) == pytest.approx(product(17, 15), abs=1e-5)
    assert product(3, 3) == pytest.approx(product(0, 0), abs=1e-5)
    assert abs(product(3, 1) - product(1, 3)) > 1e-3


def test_backward_undoes_forward(rng, array, close, wide) -> None:
    x, _, cos, sin = made(array, rng, (5, 8))
    y, saved = rotary.forward(x, cos, sin, offset=2)
    close(rotary.backward(y, *saved, offset=2), wide(x))
    np.testing.assert_allclose(np.linalg.norm(wide(y)), np.linalg.norm(wide(x)), rtol=1e-6)


def test_offsets_of_64_bits(rng, array, close, wide, monkeypatch) -> None:
    x, g, cos, sin = made(array, rng, (5, 8))
    monkeypatch.setattr(layouts, "_INT32", 3)
    assert layouts.needs_int64(x)
    check(x.T.copy().T, g, cos, sin, SMALL, close, wide)


def test_empty_arrays(array) -> None:
    cos, sin = (array(t) for t in tables(4, 6))
    for shape, n in [((0, 3, 6), 3), ((2, 0, 6), 3), ((2, 4, 0), 0)]:
        x = array(np.zeros(shape), np.float32)
        y, saved = rotary.forward(x, cos[:, :n], sin[:, :n])
        assert y.shape == rotary.backward(x, *saved).shape == shape


def test_what_is_refused(array) -> None:
    x = array(np.zeros((2, 3, 6)), np.float32)
    cos, sin = (array(t) for t in tables(4, 6))
    with pytest.raises(ValueError, match=r"an even D, got \(2, 3, 5\)"):
        rotary.forward(x[..., :5], cos, sin)
    with pytest.raises(ValueError, match=r"\(…, T, D\) with an even D, got \(6,\)"):
        rotary.forward(x[0, 0], cos, sin)
    with pytest.raises(ValueError, match=r"tables of cos and sin \(…, P, 3\).*got \(4, 2\)"):
        rotary.forward(x, cos[:, :2], sin[:, :2])
    with pytest.raises(ValueError, match=r"got \(4, 3\) and \(3, 3\)"):
        rotary.forward(x, cos, sin[:3])
    with pytest.raises(ValueError, match="positions 2 to 4, but the tables hold 0 to 3"):
        rotary.forward(x, cos, sin, offset=2)
    with pytest.raises(ValueError, match="positions -1 to 1"):
        rotary.forward(x, cos, sin, offset=-1)
    with pytest.raises(ValueError, match=r"broadcast to those of x, \(2,\), got \(3,\)"):
        rotary.forward(x, np.stack([cos] * 3), np.stack([sin] * 3))
    with pytest.raises(TypeError, match="rotary takes float32, float16 or bfloat16 arrays"):
        rotary.forward(x.astype(np.float64), cos, sin)
