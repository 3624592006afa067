"""The attention kernels against float64, on both sides of every branch."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tinygrad_llm import Tensor, backend, ops
from tinygrad_llm.kernels import attention
from tinygrad_llm.kernels.language import INTERPRETED
from tinygrad_llm.ops.dropout import keep_mask

INF = math.inf

# Several tiles of queries and blocks of keys, the last of which are not full.
SMALL = {"BLOCK_T": 16, "BLOCK_S": 16}
WIDE = {"BLOCK_T": 16, "BLOCK_S": 128}  # all keys in one


def reference(q, k, v, bias=None, hidden=None, lengths=None, slopes=None, **options):
    """(y, P, P̃) by the formula, in float64, for (B, H, T, D) arrays."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    t, s = q.shape[2], k.shape[2]
    scale, p = options.get("scale"), options.get("p", 0.0)
    x = q @ k.swapaxes(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    away = np.arange(t)[:, None] + (s - t) - np.arange(s)
    if bias is not None:
        x = x + bias
    if slopes is not None:
        x = x - slopes[:, None, None] * abs(away)
    unseen = np.zeros(x.shape, dtype=bool) if hidden is None else hidden | np.zeros(x.shape, bool)
    if options.get("causal"):
        unseen |= away < 0
    if options.get("window") is not None:
        unseen |= abs(away) >= options["window"]
    if lengths is not None:
        unseen |= np.arange(s) >= lengths[:, None, None, None]
    x = np.where(unseen, -INF, x)
    m = x.max(-1, keepdims=True, initial=-INF)
    weights = np.exp(x - np.where(m == -INF, 0, m))
    total = weights.sum(-1, keepdims=True)
    weights /= np.where(total == 0, 1, total)
    seed, offset = options.get("draw", (0, 0))
    kept = keep_mask(x.shape, p, seed, offset, np) / (1 - p)
    return weights * kept @ v, weights, weights * kept


def gradients(g, q, k, v, *masks, **options):
    """(dq, dk, dv, dS) by the formula."""
    group = q.shape[1] // k.shape[1]
    y, weights, dropped = reference(q, k, v, *masks, **options)
    scale = options.get("scale")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    wide_k, wide_v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    p = options.get("p", 0.0)
    seed, offset = options.get("draw", (0, 0))
    kept = keep_mask(weights.shape, p, seed, offset, np) / (1 - p)
    dp = g @ wide_v.swapaxes(2, 3) * kept
    ds = weights * (dp - (g * y).sum(-1, keepdims=True))

    def summed(x):  # over the heads of a group
        return x.reshape(k.shape[0], k.shape[1], group, *x.shape[2:]).sum(2)

    dk = summed(ds.swapaxes(2, 3) @ q) * scale
    return ds @ wide_k * scale, dk, summed(dropped.swapaxes(2, 3) @ g), ds


def sum_to(x, shape):
    axes = tuple(
        i for i, n in enumerate((*(1,) * (x.ndim - len(shape)), *shape)) if n != x.shape[i]
    )
    return x.sum(axes, keepdims=True).reshape(shape)


@pytest.fixture
def make(array, rng):
    """make(B, H, H′, T, S, D, E) -> (q, k, v, g)"""

    def arrays(b, h, shared, t, s, d, e, dtype=np.float32):
        shapes = ((b, h, t, d), (b, shared, s, d), (b, shared, s, e), (b, h, t, e))
        return [array(rng.standard_normal(shape), dtype) for shape in shapes]

    return arrays


@pytest.fixture
def check(close, wide):
    """Forward and backward of the kernels against the formula."""

    def run(q, k, v, g, bias=None, hidden=None, lengths=None, slopes=None, times=1, **options):
        config = options.pop("config", SMALL)
        forward_config = options.pop("forward_config", config)
        masks = (bias, hidden, lengths, slopes)
        y, saved = attention.forward(q, k, v, *masks, config=forward_config, **options)
        wants = {"bias_gradient": bias is not None}
        *found, dbias = attention.backward(g, *saved, config=config, **wants, **options)
        numbers = [
            None if x is None else backend.to_device(x, "cpu")
            if x.dtype.kind in "biu" else wide(x) for x in masks
        ]  # fmt: skip
        inputs = [wide(x) for x in (q, k, v)]
        options.pop("precision", None)
        expected, _, _ = reference(*inputs, *numbers, **options)
        *wanted, ds = gradients(wide(g), *inputs, *numbers, **options)
        assert y.dtype == q.dtype
        close(y, expected, times)
        for dx, x, w in zip(found, (q, k, v), wanted, strict=True):
            assert dx.dtype == x.dtype
            close(dx, w, 4 * times)
        if bias is None:
            assert dbias is None
        else:
            assert dbias is not None
            assert dbias.dtype == bias.dtype
            close(dbias, sum_to(ds, bias.shape), 4 * times)
        return y

    return run


@pytest.mark.parametrize(("t", "s"), [(17, 17), (17, 40), (33, 17), (1, 18), (18, 1)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_queries_and_keys_of_any_number(make, check, t, s, causal):
    check(*make(1, 1, 1, t, s, 16, 16), causal=causal)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 9, "causal": True},
        {"window": 9},
        {"scale": -0.25, "causal": True},
        {"precision": "tf32"},  # which the interpreter computes exactly
        {"p": 0.3, "draw": (2**63 + 12345, 2**32 - 9), "causal": True},
        {"p": 0.9999999999, "draw": (3, 1)},
    ],
    ids=str,
)
def test_options(make, check, options):
    if options.get("precision") == "tf32" and not INTERPRETED:
        options = {**options, "times": 1000}
    check(*make(1, 1, 1, 18, 36, 16, 16), **options)


def test_a_window_that_ends_with_a_block(make, check):
    check(*make(1, 1, 1, 34, 34, 16, 16), window=18)  # query 15 sees key 32


@pytest.mark.parametrize("s", [36, 37])  # four words of a counter are four neighbours, or not
def test_dropout_draws_the_words_of_the_stream(make, check, s):
    options = {"p": 0.5, "draw": (99, 7)}
    check(*make(1, 2, 1, 9, s, 16, 16), **options)


@pytest.mark.parametrize("offset", [0, 1, 2**33 + 5])
def test_the_words_may_begin_at_a_place_in_memory(make, array, wide, offset):
    """Which a captured graph reads at each replay, instead of a number that it repeats."""
    q, k, v, g = make(1, 1, 1, 9, 36, 16, 16)
    bias, found = array(np.zeros((9, 36), np.float32)), []
    for start in (offset, array(np.array([offset]))):
        options = {"p": 0.5, "draw": (99, start), "config": SMALL}
        y, saved = attention.forward(q, k, v, bias, **options)
        found.append([y, *attention.backward(g, *saved, bias_gradient=True, **options)])
    for by_number, in_memory in zip(*found, strict=True):
        np.testing.assert_array_equal(wide(in_memory), wide(by_number))


def test_what_a_model_launches_gives_what_the_op_gives(make, wide, close):
    """The kernel's own configuration, and the same dropout mask as the op's."""
    q, k, v, g = make(1, 4, 2, 40, 40, 24, 24)
    backend.manual_seed(5)
    q0, k0, v0 = [Tensor(wide(x), requires_grad=True) for x in (q, k, v)]
    expected = ops.scaled_dot_product_attention(q0, k0, v0, dropout_p=0.2, is_causal=True)
    expected.backward(Tensor(wide(g)))
    options = {"causal": True, "p": 0.2, "draw": (5, 0)}
    y, saved = attention.forward(q, k, v, **options)
    close(y, expected.data)
    for dx, x in zip(attention.backward(g, *saved, **options)[:3], (q0, k0, v0), strict=True):
        assert x.grad is not None
        close(dx, x.grad.data, times=4)


def test_dtypes(make, check, dtype):
    check(*make(1, 1, 1, 21, 36, 32, 32, dtype), causal=True, p=0.25, times=2)


def test_layouts(make, check, layout):
    q, k, v, g = make(2, 1, 1, 5, 18, 16, 16)
    q, k, v, g = layout(q), layout(k), layout(v), layout(g)
    check(q, k, v, g, causal=True)


@pytest.mark.parametrize(("d", "e"), [(1, 3), (16, 33), (80, 64), (5, 256)])
def test_heads_of_any_size(make, check, d, e):
    check(*make(1, 1, 1, 17, 17, d, e), causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(30, 9, 0), (99, 16, -3)], ids=str)
def test_padding(make, check, array, lengths, causal):
    y = check(*make(3, 1, 1, 3, 31, 16, 16), lengths=array(lengths, np.int64), causal=causal)
    empty = [b for b, n in enumerate(lengths) if n <= 0]
    assert not y[empty].any()


def test_grouped_heads_share_a_tile(make, check, array):
    q, k, v, g = make(2, 6, 2, 5, 18, 16, 16)  # 3 heads of 5 queries: 15 of a tile's 16 rows
    slopes = array([0.5, 0.25, 0.125, 1, 2, 0.0], np.float32)
    check(q, k, v, g, lengths=array([18, 9]), slopes=slopes, causal=True)


def test_groups_whose_heads_straddle_tiles(make, check, array, rng):
    q, k, v, g = make(1, 3, 1, 7, 20, 16, 16)
    hidden = array(rng.random((3, 7, 20)) < 0.4)
    check(q, k, v, g, hidden=hidden, window=11, p=0.2, draw=(1, 1))


@pytest.mark.parametrize(
    "shape", [(2, 2, 17, 20), (1, 2, 5, 20), (2, 1, 1, 20), (2, 17, 1), (1,)], ids=str
)
def test_a_bias_and_its_gradient(make, check, array, rng, shape):
    t = 17 if 17 in shape else 5
    q, k, v, g = make(2, 2, 1, t, 20, 16, 16)
    check(q, k, v, g, bias=array(rng.standard_normal(shape), np.float32), causal=len(shape) == 4)


def test_a_bias_among_all_others(make, check, array, rng):
    q, k, v, g = make(2, 2, 1, 9, 20, 16, 16)
    bias = array(rng.standard_normal((2, 9, 20)), np.float32)
    bias[:, :, 3] = -INF
    bias[:, 4] = -INF  # a query that sees nothing
    slopes, lengths = array([0.5, 0.1], np.float32), array([20, 7], np.int32)
    hidden = array(rng.random((9, 20)) < 0.3)
    options = {"p": 0.25, "draw": (8, 3), "causal": True, "window": 15}
    y = check(q, k, v, g, bias, hidden, lengths, slopes, **options)
    assert not y[:, :, 4].any()


@pytest.mark.parametrize("config", [None, {"BLOCK_T": 4, "BLOCK_R": 8}], ids=["one", "blocks"])
def test_a_bias_by_distance(make, check, close, wide, array, rng, config):
    q, k, v, g = make(1, 2, 2, 17, 18, 16, 16)
    table = array(rng.standard_normal((2, 34)), np.float32)
    bias = attention.relative_bias(table, 17)
    index = np.arange(18) - np.arange(17)[:, None] + 16
    assert (wide(bias) == wide(table)[:, index]).all()
    if config is None:
        check(q, k, v, g, bias=bias)
    dbias = array(rng.standard_normal((2, 17, 18)), np.float32)
    expected = np.zeros((2, 34))
    for t in range(17):
        expected[:, 16 - t : 34 - t] += wide(dbias)[:, t]
    close(attention.relative_gradient(dbias, config), expected, times=4)


def test_a_table_of_too_few_distances(array):
    for queries in (0, 5):
        with pytest.raises(ValueError, match="T \\+ S − 1 numbers"):
            attention.relative_bias(array(np.zeros((2, 4)), np.float32), queries)


@pytest.mark.parametrize("shape", [(4, 20), (2, 1, 1, 20), (1, 2, 4, 1)], ids=str)
def test_a_mask(make, check, array, rng, shape):
    hidden = array(rng.random(shape) < 0.5)
    hidden[..., 0, :] = True
    y = check(*make(2, 2, 2, 4, 20, 16, 16), hidden=hidden)
    assert not y[:, :, 0].any()


def test_where_all_is_hidden_all_is_zero(make, array):
    q, k, v, g = make(1, 1, 1, 17, 18, 16, 16)
    for hidden in ({"hidden": array(np.ones((1, 1), bool))}, {"lengths": array([0])}):
        y, saved = attention.forward(q, k, v, **hidden, config=SMALL)
        found = attention.backward(g, *saved, config=SMALL)
        assert not any(x.any() for x in (y, *found[:3]))


def test_large_scores(make, check):
    q, k, v, g = make(1, 1, 1, 17, 40, 16, 16)
    check(q * 100, k * 10, v, g, times=2000)  # scores of a thousand, whose roundings are seen


@pytest.mark.parametrize(
    ("heads", "shared", "t", "splits"), [(4, 1, 1, 3), (2, 2, 3, 2), (4, 2, 1, 7)]
)
def test_decoding_splits_the_keys(make, check, array, heads, shared, t, splits):
    q, k, v, g = make(1, heads, shared, t, 90, 16, 12)
    options = {"causal": True, "lengths": array([80]), "p": 0.2, "draw": (4, 4)}
    check(q, k, v, g, config=WIDE, forward_config={**SMALL, "SPLITS": splits}, **options)


def test_splits_that_see_nothing(make, check, array):
    q, k, v, g = make(2, 1, 1, 2, 64, 16, 16)
    config = {**SMALL, "SPLITS": 4}
    check(
        q,
        k,
        v,
        g,
        lengths=array([0, 64]),
        window=5,
        causal=True,
        config=WIDE,
        forward_config=config,
    )
    check(q, k, v, g, hidden=array(np.ones((2, 64), bool)), config=WIDE, forward_config=config)


def test_offsets_of_64_bits(make, check, array, rng, monkeypatch):
    monkeypatch.setattr(attention, "needs_int64", lambda *_: True)
    q, k, v, g = make(1, 2, 1, 18, 20, 16, 16)
    bias, slopes = array(rng.standard_normal((18, 20)), np.float32), array([1.0, 0.5], np.float32)
    hidden, lengths = array(rng.random((18, 20)) < 0.2), array([19])
    check(q, k, v, g, bias, hidden, lengths, slopes, causal=True, p=0.1)


@pytest.mark.parametrize(
    ("b", "h", "shared", "t", "s", "d", "e"),
    [
        (0, 2, 2, 3, 3, 4, 4),
        (2, 0, 0, 3, 3, 4, 4),
        (1, 2, 1, 0, 3, 4, 4),
        (1, 2, 1, 3, 0, 4, 4),
        (1, 1, 1, 3, 3, 0, 4),
        (1, 1, 1, 3, 3, 4, 0),
    ],
)
def test_sizes_of_zero(make, b, h, shared, t, s, d, e, wide):
    q, k, v, g = make(b, h, shared, t, s, d, e)
    y, saved = attention.forward(q, k, v, causal=True)
    assert y.shape == g.shape
    dq, dk, dv, _ = attention.backward(g, *saved, causal=True)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    if d and e:
        assert not any(x.any() for x in (y, dq, dk, dv))
    if not d:
        np.testing.assert_allclose(wide(y[0, 0, 2]), wide(v).mean((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_ranks(make, check, close, wide, array, rng, rank):
    q, k, v, g = make(4, 2, 1, 5, 6, 16, 16) if rank > 2 else make(1, 1, 1, 5, 6, 16, 16)
    bias = array(rng.standard_normal((5, 6)), np.float32)
    if rank == 3:
        q, k, v, g = [x[0] for x in (q, k, v, g)]
    elif rank == 2:
        q, k, v, g = [x[0, 0] for x in (q, k, v, g)]
    else:
        q, k, v, g = [x.reshape(2, 2, *x.shape[1:]) for x in (q, k, v, g)]
    y, saved = attention.forward(q, k, v, bias, causal=True)
    found = attention.backward(g, *saved, causal=True, bias_gradient=True)
    q, k, v, g = [wide(x).reshape((-1, *(1, 1, *x.shape)[-3:])) for x in (q, k, v, g)]
    close(y, reference(q, k, v, wide(bias), causal=True)[0].reshape(y.shape))
    *wanted, ds = gradients(g, q, k, v, wide(bias), causal=True)
    for dx, w in zip(found, [*wanted, sum_to(ds, bias.shape)], strict=True):
        assert dx is not None
        close(dx, w.reshape(dx.shape), times=4)


def test_lengths_that_differ_within_a_tile(make, close, wide, array):
    """Without a batch, the first axis is that of the heads: 3 of 5 queries share a tile."""
    q, k, v, g = [x[0] for x in make(1, 6, 2, 5, 20, 16, 16)]
    lengths = np.array([20, 3, 0, 17, 16, 5])
    y, saved = attention.forward(q, k, v, lengths=array(lengths), config=SMALL)
    found = attention.backward(g, *saved, config=SMALL)[:3]
    hidden = np.arange(20) >= lengths[:, None, None]
    q, k, v, g = [wide(x)[None] for x in (q, k, v, g)]
    close(y[None], reference(q, k, v, hidden=hidden)[0])
    for dx, w in zip(found, gradients(g, q, k, v, None, hidden), strict=False):
        close(dx[None], w, times=4)


def test_leading_axes_in_an_order_of_their_own(make, close, wide, array, rng):
    """Three of them, over which no two axes can walk: copies."""
    q, k, v, g = make(4, 2, 2, 5, 6, 16, 16)
    q, k, v, g = [x.reshape(2, 2, *x.shape[1:]).swapaxes(0, 1) for x in (q, k, v, g)]
    bias = array(rng.standard_normal((2, 1, 2, 5, 6)), np.float32)
    k = k.copy()
    y, saved = attention.forward(q, k, v, bias)
    *found, dbias = attention.backward(g, *saved, bias_gradient=True)
    q, k, v, g = [wide(x).reshape(4, *x.shape[2:]) for x in (q, k, v, g)]
    bias4 = np.repeat(wide(bias)[:, 0], 2, 0)
    close(y, reference(q, k, v, bias4)[0].reshape(y.shape))
    *wanted, ds = gradients(g, q, k, v, bias4)
    for dx, w in zip(found, wanted, strict=True):
        close(dx, w.reshape(dx.shape), times=4)
    assert dbias is not None
    close(dbias, ds.reshape(2, 2, *ds.shape[1:]).sum(1, keepdims=True), times=4)


def test_results_lie_in_memory_as_their_inputs(make):
    """(B, T, H, D), as a linear layer gives it: what follows needs no copy."""
    q, k, v, g = [x.swapaxes(1, 2).copy().swapaxes(1, 2) for x in make(2, 2, 2, 5, 5, 16, 16)]
    y, saved = attention.forward(q, k, v)
    found = attention.backward(g, *saved)
    assert all(x.swapaxes(1, 2).flags.c_contiguous for x in (y, *found[:3]))


def test_two_runs_give_the_same_bits(make):
    q, k, v, g = make(1, 2, 1, 20, 20, 16, 16)
    runs = []
    for _ in range(2):
        y, saved = attention.forward(q, k, v, causal=True)
        runs.append([y, *attention.backward(g, *saved, causal=True)[:3]])
    assert all((a == b).all() for a, b in zip(*runs, strict=True))


def test_the_tuned_configurations():
    """Splits where programs are few, small tiles where queries are."""
    training = attention._forward_candidates("half", (96, 1024, 1024, 64, 64))
    assert {c["SPLITS"] for c in training} == {1}
    decoding = attention._forward_candidates("half", (12, 1, 8192, 64, 64))
    assert {c["BLOCK_T"] for c in decoding} == {16}
    assert {c["SPLITS"] for c in decoding} == {1, 22}
    for products in ("half", "tf32", "ieee"):
        for d in (1, 64, 65, 128, 200, 256):
            shape = (1, 40, 300, d, 3)
            assert attention._forward_candidates(products, shape)
            assert attention._key_candidates(products, shape)
            assert attention._query_candidates(products, shape)


def test_what_does_not_fit_is_refused(make, array):
    q, k, v, g = make(2, 4, 2, 3, 5, 16, 16)

    def refused(kind, words, *inputs, **options):
        with pytest.raises(kind, match=words):
            attention.forward(*inputs, **options)

    refused(TypeError, "float64", q.astype(np.float64), k, v)
    refused(TypeError, "one dtype", q.astype(np.float16), k, v)
    refused(ValueError, "equal rank", q, k[0], v)
    refused(ValueError, r"k \(…, S, D\)", q, k[..., :3], v)
    refused(ValueError, r"k \(…, S, D\)", q, k, v[:, :, :3])
    refused(ValueError, "must divide", q[:, :3], k, v)
    refused(ValueError, "must divide", q[:1], k, v)
    refused(ValueError, "at most 256", *make(1, 1, 1, 2, 2, 257, 1)[:3])
    refused(ValueError, "a bias that broadcasts", q, k, v, array(np.zeros((3, 4)), np.float32))
    refused(ValueError, "a mask that broadcasts", q, k, v, hidden=array(np.zeros((3, 4), bool)))
    refused(TypeError, "boolean", q, k, v, hidden=array(np.zeros((3, 5)), np.float32))
    refused(ValueError, r"\(2,\) integers", q, k, v, lengths=array([1.0, 2.0]))
    refused(ValueError, r"\(2,\) integers", q, k, v, lengths=array([1, 2, 3]))
    refused(ValueError, "one number a head", q, k, v, slopes=array([1.0], np.float32))
    refused(ValueError, "window", q, k, v, window=0)
    refused(ValueError, "0 ≤ p < 1", q, k, v, p=1.0)
    refused(ValueError, "ieee, tf32", q, k, v, precision="fp8")
    _, saved = attention.forward(q, k, v)
    with pytest.raises(ValueError, match="gradient of the shape"):
        attention.backward(g[:, :1], *saved)
    with pytest.raises(ValueError, match="no bias"):
        attention.backward(g, *saved, bias_gradient=True)
