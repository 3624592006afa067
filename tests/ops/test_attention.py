from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import Tensor, backend, grad, manual_seed, ops
from tinygrad_llm.ops import attention

INF = math.inf


def _naive(q, k, v, mask=None, causal=False, scale=None, lengths=None):
    """Attention by its definition: a loop over batch, heads and queries; float64."""
    batch, heads, t, d = q.shape
    shared, s = k.shape[1], k.shape[2]
    scale = 1 / math.sqrt(d) if scale is None else scale
    y = np.zeros((batch, heads, t, v.shape[-1]))
    mask = None if mask is None else np.broadcast_to(mask, (batch, heads, t, s))
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h * shared // heads], v[b, h * shared // heads]
            for i in range(t):
                seen = []
                for j in range(s):
                    hidden = (
                        (causal and j > s - t + i)
                        or (lengths is not None and j >= lengths[b])
                        or (mask is not None and mask.dtype == bool and not mask[b, h, i, j])
                    )
                    bias = mask[b, h, i, j] if mask is not None and mask.dtype != bool else 0.0
                    if not hidden and bias != -INF:
                        seen.append((j, scale * float(q[b, h, i] @ keys[j]) + bias))
                if seen:
                    top = max(score for _, score in seen)
                    weights = [math.exp(score - top) for _, score in seen]
                    total = sum(weights)
                    for (j, _), w in zip(seen, weights, strict=True):
                        y[b, h, i] += w / total * values[j]
    return y


def _qkv(rng, b=2, h=2, t=3, s=3, d=4, e=5, shared=None, dtype: Any = np.float64):
    shared = h if shared is None else shared
    shapes = ((b, h, t, d), (b, shared, s, d), (b, shared, s, e))
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def _wide(arrays):
    return [a.astype(np.float64) for a in arrays]


@pytest.fixture(params=[(128, 65536), (2, 3), (1, 1)], ids=["whole", "pieces", "single rows"])
def pieces(request, monkeypatch):
    """The queries worked on at a time, and the scores: how the op cuts its work must not show."""
    monkeypatch.setattr(attention, "_ROWS", request.param[0])
    monkeypatch.setattr(attention, "_ROOM", request.param[1])


# --- against the definition -----------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("t", "s"), [(3, 3), (1, 4), (2, 5), (5, 2), (1, 1), (4, 1)])
def test_attention_is_its_definition(pieces, t, s, causal, layout, dtype, rng, close):
    q, k, v = (layout(a) for a in _qkv(rng, t=t, s=s, dtype=dtype))
    y = ops.scaled_dot_product_attention(Tensor(q), Tensor(k), Tensor(v), is_causal=causal)
    assert y.dtype == dtype
    close(y, _naive(*_wide((q, k, v)), causal=causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 2, 3, 4), (1, 1, 3, 4), (2, 1, 1, 4), (3, 4), (1, 4), (2, 3, 1), ()]
)
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_masks_are_broadcast(pieces, kind, shape, causal, layout, rng, close):
    q, k, v = _qkv(rng, s=4)
    mask = layout(rng.random(shape) > 0.4 if kind == "boolean" else rng.normal(size=shape))
    want = _naive(q, k, v, mask, causal)
    for m in (mask, Tensor(mask)):
        close(ops.scaled_dot_product_attention(q, k, v, m, is_causal=causal), want)


def test_lengths_hide_padding(pieces, layout, rng, close):
    q, k, v = _qkv(rng, b=4, s=5)
    lengths = layout(np.array([5, 3, 1, 0]))
    for given_lengths in (lengths, Tensor(lengths), lengths.tolist()):
        y = ops.scaled_dot_product_attention(q, k, v, lengths=given_lengths)
        close(y, _naive(q, k, v, lengths=lengths))
    mask = rng.random((4, 1, 3, 5)) > 0.3
    y = ops.scaled_dot_product_attention(q, k, v, mask, is_causal=True, lengths=lengths)
    close(y, _naive(q, k, v, mask, True, lengths=lengths))


@pytest.mark.parametrize(("heads", "shared"), [(4, 2), (4, 1), (3, 3), (6, 2)])
def test_grouped_heads_share_keys_and_values(pieces, heads, shared, layout, rng, close):
    q, k, v = (layout(a) for a in _qkv(rng, h=heads, shared=shared, t=2, s=4))
    lengths = np.array([2, 4])
    close(ops.scaled_dot_product_attention(q, k, v), _naive(q, k, v))
    for shape in ((2, heads, 2, 4), (heads, 2, 4), (2, 1, 2, 4), (2, 4)):
        boolean, bias = rng.random(shape) > 0.3, rng.normal(size=shape)
        for mask in (boolean, bias):
            y = ops.scaled_dot_product_attention(
                q, k, v, mask, is_causal=True, lengths=lengths, scale=0.7
            )
            close(y, _naive(q, k, v, mask, True, 0.7, lengths))


def test_any_leading_axes(pieces, rng, close):
    q, k, v = _qkv(rng)
    want = _naive(q, k, v)
    close(ops.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0]), want[0, 0])
    close(ops.scaled_dot_product_attention(q[0], k[0], v[0]), want[0])
    five: Any = [a.reshape(1, 2, *a.shape[1:]) for a in (q, k, v)]
    close(ops.scaled_dot_product_attention(*five), want[None])
    y = ops.scaled_dot_product_attention(*[a[:, 0] for a in (q, k, v)], lengths=[1, 2])
    close(y, _naive(q, k, v, lengths=[1, 2])[:, 0])


@given(
    st.integers(0, 4), st.integers(0, 4), st.integers(1, 3), st.integers(1, 2), st.booleans(),
    st.sampled_from([1, 2, 128]), st.sampled_from([1, 4, 65536]),
)  # fmt: skip
def test_any_sizes_in_any_pieces(t, s, d, group, causal, rows, room):
    rng = np.random.default_rng(0)
    q, k, v = _qkv(rng, t=t, s=s, d=d, h=2 * group, shared=2)
    leaves: Any = [Tensor(a, requires_grad=True) for a in (q, k, v)]
    plain: Any = [
        Tensor(np.repeat(a, q.shape[1] // a.shape[1], 1), requires_grad=True) for a in (q, k, v)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_ROWS", rows)
        patch.setattr(attention, "_ROOM", room)
        y = ops.scaled_dot_product_attention(*leaves, is_causal=causal)
        found = grad((y * y).sum(), leaves)
    np.testing.assert_allclose(y.numpy(), _naive(q, k, v, causal=causal), atol=1e-12)
    z = ops.attention_reference(*plain, is_causal=causal)
    for g, wanted, a in zip(found, grad((z * z).sum(), plain), (q, k, v), strict=True):
        copies = wanted.numpy().reshape(2, a.shape[1], q.shape[1] // a.shape[1], *a.shape[2:])
        np.testing.assert_allclose(g.numpy(), copies.sum(2), atol=1e-12)


def test_heads_of_no_size_take_the_mean_of_the_values(rng, close):
    q, k, v = _qkv(rng, d=0)
    y = ops.scaled_dot_product_attention(q, k, v)
    close(y, np.broadcast_to(v.mean(2, keepdims=True), y.shape))


@pytest.mark.parametrize("masking", ["none", "causal", "boolean", "additive"])
def test_the_fused_op_equals_the_reference_also_in_its_gradients(pieces, masking, rng, close):
    arrays = _qkv(rng, t=3, s=4)
    mask = {
        "boolean": Tensor(rng.random((3, 4)) > 0.3),
        "additive": Tensor(rng.normal(size=(3, 4))),
    }
    options: dict[str, Any] = {"is_causal": masking == "causal", "attn_mask": mask.get(masking)}
    found = []
    for function in (ops.scaled_dot_product_attention, ops.attention_reference):
        leaves: Any = [Tensor(a, requires_grad=True) for a in arrays]
        y = function(*leaves, **options)
        found.append((y, *grad((y * y).sum(), leaves)))
    for fused, plain in zip(*found, strict=True):
        close(fused, plain.numpy())


def test_dropout_is_that_of_the_reference_from_the_same_seed(pieces, rng, close):
    arrays = _qkv(rng)
    results = []
    for function in (ops.scaled_dot_product_attention, ops.attention_reference):
        manual_seed(5)
        leaves: Any = [Tensor(a, requires_grad=True) for a in arrays]
        y = function(*leaves, dropout_p=0.5)
        results.append((y, *grad(y.sum(), leaves), backend.random.state()))
    *fused, fused_state = results[0]
    *plain, plain_state = results[1]
    assert fused_state == plain_state
    for a, b in zip(fused, plain, strict=True):
        close(a, b.numpy())


def test_dropout_preserves_the_mean(rng):
    q, k, v = _qkv(rng, b=1, h=1, t=2000, s=8, d=2)
    manual_seed(1)
    y = ops.scaled_dot_product_attention(q, k, np.ones_like(v), dropout_p=0.25)
    assert abs(y.numpy().mean() - 1) < 0.02
    assert (y.numpy() != 1).any()


def test_grouped_heads_are_dropped_as_if_they_were_repeated(pieces, rng, close):
    q, k, v = _qkv(rng, h=4, shared=2)
    manual_seed(2)
    grouped = ops.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    manual_seed(2)
    repeated = ops.scaled_dot_product_attention(
        q, np.repeat(k, 2, 1), np.repeat(v, 2, 1), dropout_p=0.5
    )
    close(grouped, repeated.numpy())


# --- rows that see nothing ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": np.array([[True, True], [False, False]])},
        {"attn_mask": np.array([[0.0, 0.0], [-INF, -INF]])},
        {"attn_mask": np.array([[True, False], [False, True]]), "is_causal": True, "lengths": [1]},
    ],
    ids=["boolean", "additive", "together"],
)
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_query_that_sees_nothing_gives_zeros_and_zero_gradients(
    pieces, options, create_graph, rng
):
    q, k, v = (Tensor(a, requires_grad=True) for a in _qkv(rng, b=1, t=2, s=2))
    y = ops.scaled_dot_product_attention(q, k, v, **options)
    assert (y.numpy()[..., 1, :] == 0).all()
    assert (y.numpy()[..., 0, :] != 0).all()
    (y * y + y).sum().backward(create_graph=create_graph)
    for leaf in (q, k, v):
        assert leaf.grad is not None
        assert np.isfinite(leaf.grad.numpy()).all()
    assert q.grad is not None
    assert (q.grad.numpy()[..., 1, :] == 0).all()


def test_causal_with_more_queries_than_keys_hides_the_first(pieces, rng):
    q, k, v = _qkv(rng, t=4, s=2)
    y = ops.scaled_dot_product_attention(q, k, v, is_causal=True).numpy()
    assert (y[..., :2, :] == 0).all()
    np.testing.assert_allclose(y[..., 2, :], v[..., 0, :])


def test_extreme_scores_stay_finite(dtype):
    q = Tensor(np.array([[1e4, 0], [-1e4, 0]], dtype), requires_grad=True)
    v = np.array([[1, 2], [3, 4]], dtype)
    y = ops.scaled_dot_product_attention(q, q, v)
    np.testing.assert_allclose(y.numpy(), v, rtol=1e-6 if dtype == np.float32 else 1e-15)
    y.sum().backward()
    assert q.grad is not None
    assert np.isfinite(q.grad.numpy()).all()


@pytest.mark.parametrize("length", [1.0, 10.0, 100.0, 1e4, 1e6])
def test_scores_far_below_what_the_lengths_allow(length, dtype, rng):
    """Long queries and keys, nearly at right angles: nothing may vanish for fear of overflow."""
    q, k, v = _qkv(rng, t=5, s=7, dtype=dtype)
    q, k = q / np.abs(q).max(), k / np.abs(k).max()
    q[..., 0], k[..., 0] = length, 0.0
    q[..., 1], k[..., 1] = 0.0, length
    y = ops.scaled_dot_product_attention(q, k, v, scale=1.0)
    np.testing.assert_allclose(
        y.numpy(), _naive(*_wide((q, k, v)), scale=1.0), rtol=2e-4 if dtype == np.float32 else 1e-9
    )


# --- dtypes and refusals --------------------------------------------------------------------------


def test_half_precision_is_kept(half, rng):
    q, k, v = _qkv(rng, t=4, s=64, dtype=half)
    y = ops.scaled_dot_product_attention(q, k, v, np.zeros((4, 64), np.float32), is_causal=True)
    assert y.dtype == half
    want = _naive(*_wide((q, k, v)), causal=True)
    np.testing.assert_allclose(y.numpy().astype(float), want, atol=0.03)


def test_scalars_and_masks_of_float64_do_not_widen(rng):
    q, k, v = _qkv(rng, dtype=np.float32)
    y = ops.scaled_dot_product_attention(
        q, k, v, np.zeros((3, 3)), np.float64(0.1), scale=1 / np.sqrt(4)
    )
    assert y.dtype == np.float32


def test_what_does_not_fit_is_refused():
    def call(q=(2, 4, 3, 4), k=(2, 4, 5, 4), v=(2, 4, 5, 6), **options):
        ops.scaled_dot_product_attention(np.ones(q), np.ones(k), np.ones(v), **options)

    shapes = r"query \(.*\), key \(.*\), value \(.*\)"
    with pytest.raises(ValueError, match="equal rank ≥ 2, got " + shapes):
        call(q=(3, 4))
    with pytest.raises(ValueError, match="equal rank ≥ 2"):
        call(q=(4,), k=(4,), v=(4,))
    with pytest.raises(ValueError, match="same head size, got " + shapes):
        call(k=(2, 4, 5, 3))
    with pytest.raises(ValueError, match="same batch, heads and length, got " + shapes):
        call(v=(2, 4, 4, 6))
    with pytest.raises(ValueError, match="heads must divide the query's, got " + shapes):
        call(k=(2, 3, 5, 4), v=(2, 3, 5, 6))
    with pytest.raises(ValueError, match="batch must agree"):
        call(k=(1, 4, 5, 4), v=(1, 4, 5, 6))
    with pytest.raises(ValueError, match=r"attn_mask \(3, 4\).*scores \(2, 4, 3, 5\)"):
        call(attn_mask=np.ones((3, 4), bool))
    with pytest.raises(ValueError, match="attn_mask"):
        call(attn_mask=np.ones((1, 2, 4, 3, 5), bool))
    with pytest.raises(TypeError, match=r"boolean \(True = attend\) or float, got int64"):
        call(attn_mask=np.ones((3, 5), int))
    with pytest.raises(ValueError, match=r"lengths must be \(2,\) integers, got int64.*\(3,\)"):
        call(lengths=[1, 2, 3])
    with pytest.raises(ValueError, match=r"integers, got float64"):
        call(lengths=np.ones(2))
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\)"):
            call(dropout_p=p)
    wide = np.ones((2, 2))
    with pytest.raises(TypeError, match="one dtype, got float32, float64"):
        ops.scaled_dot_product_attention(np.ones((2, 2), np.float32), wide, wide)


def test_a_mask_overwritten_before_backward_is_not_used(rng):
    q, k, v = (Tensor(a, requires_grad=True) for a in _qkv(rng))
    bias = Tensor(np.zeros((3, 3)))
    y = ops.scaled_dot_product_attention(q, k, v, bias).sum()
    bias += 1.0
    with pytest.raises(RuntimeError, match="has overwritten"):
        y.backward()


@pytest.mark.parametrize("spread", [0.0, 30.0, 200.0, 1e4])
def test_rows_far_below_the_others_keep_their_weights(spread: float) -> None:
    """The largest score of a whole piece stands in for each row's, unless a row would vanish."""
    rng = np.random.default_rng(0)
    q, k, v = (Tensor(rng.normal(size=(2, 3, 8, 4)).astype(np.float32)) for _ in range(3))
    q.requires_grad = True
    level = Tensor(np.linspace(0.0, -spread, 8, dtype=np.float32)[:, None] * np.ones((8, 8), "f"))
    plain = ops.scaled_dot_product_attention(q, k, v)
    moved = ops.scaled_dot_product_attention(q, k, v, attn_mask=level)  # the same for a whole row
    tolerance = 1e-6 + 1e-6 * spread
    np.testing.assert_allclose(moved.numpy(), plain.numpy(), atol=tolerance, rtol=tolerance)
    (a,), (b,) = grad(plain.sum(), q), grad(moved.sum(), q)
    np.testing.assert_allclose(b.numpy(), a.numpy(), atol=tolerance, rtol=tolerance)
