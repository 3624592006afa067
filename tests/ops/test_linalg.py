from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinygrad_llm import Tensor, grad, ops

RANKS = [((3,), (3,)), ((3,), (3, 2)), ((2, 3), (3,)), ((2, 3), (3, 4)), ((3,), (2, 3, 4)),
         ((2, 4, 3), (3,)), ((2, 4, 3), (3, 5)), ((4, 3), (2, 3, 5)), ((2, 4, 3), (2, 3, 5)),
         ((2, 1, 4, 3), (5, 3, 2)), ((1, 2, 4, 3), (3, 1, 3, 2)), ((2, 5, 4, 3), (3, 2)),
         ((0, 3), (3, 2)), ((2, 0), (0, 3)), ((2, 3), (3, 0)), ((0,), (0,)), ((0, 2, 3), (3, 2)),
         ((2, 3, 0), (0, 4)), ((2, 3, 4), (4, 0)), ((2, 0, 3), (2, 3, 0))]  # fmt: skip


@pytest.mark.parametrize(("left", "right"), RANKS)
def test_matmul_equals_numpy_for_every_rank(left, right, layout, dtype, rng, close):
    a = layout(rng.normal(size=left).astype(dtype))
    b = layout(rng.normal(size=right).astype(dtype))
    y = ops.matmul(Tensor(a), Tensor(b))
    assert y.dtype == dtype
    close(y, a.astype(np.float64) @ b.astype(np.float64))


@pytest.mark.parametrize(("left", "right"), RANKS)
def test_the_gradients_of_matmul_have_their_shapes_also_when_empty(left, right):
    a, b = (Tensor(np.ones(s), requires_grad=True) for s in (left, right))
    y = a @ b
    y.sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    ones = np.ones(y.shape)
    np.testing.assert_array_equal(a.grad.numpy(), _gradient(ones, left, right, 0))
    np.testing.assert_array_equal(b.grad.numpy(), _gradient(ones, left, right, 1))
    for g in grad((a @ b).sum(), (a, b), create_graph=True):
        assert g.shape in (left, right)


def _gradient(g, left, right, which):
    """∂Σ(A B) for A = B = 1: how many products each element takes part in."""
    shape = (left, right)[which]
    size = int(np.prod(shape))
    products = g.size * left[-1]  # shared evenly, by symmetry
    return np.full(shape, products / size if size else 0.0)


@pytest.mark.parametrize("kind", ["int8", "int64", "bool", "uint8"])
def test_matmul_of_integers_equals_numpy(kind):
    a = np.array([[1, 0], [1, 1]], dtype=kind)
    y = ops.matmul(a, a)
    assert y.dtype == np.dtype(kind)
    np.testing.assert_array_equal(y.numpy(), a @ a)


def test_half_precision_is_kept_and_accumulated_in_float32(half, rng, close):
    a, b = rng.uniform(size=(3, 2000)).astype(half), rng.uniform(size=(2000, 2)).astype(half)
    want = a.astype(np.float64) @ b.astype(np.float64)
    for y in (ops.matmul(a, b), ops.linear(a, b.T), ops.einsum("ij,jk->ik", a, b)):
        assert y.dtype == half
        close(y, want)
    assert ops.linear(a, b.T, np.ones(2, half)).dtype == half


def test_matmul_promotes():
    a, b = np.ones((2, 2), np.float32), np.ones((2, 2), np.float64)
    assert ops.matmul(a, b).dtype == np.float64
    assert ops.matmul(a, np.ones((2, 2), np.int64)).dtype == np.float32
    assert (Tensor(a) @ Tensor(a.astype(np.float16))).dtype == np.float32
    assert ops.matmul([[1, 2]], [[3], [4]]).tolist() == [[11]]


def test_matmul_refuses_what_does_not_fit():
    ones = np.ones
    with pytest.raises(ValueError, match=r"last axis of \(2, 3\).*second last.*\(2, 3\)"):
        ops.matmul(ones((2, 3)), ones((2, 3)))
    with pytest.raises(ValueError, match=r"last axis of \(2, 3\).*only.*\(2,\)"):
        ops.matmul(ones((2, 3)), ones(2))
    with pytest.raises(ValueError, match="at least one dimension"):
        ops.matmul(ones((2, 3)), 2.0)
    with pytest.raises(ValueError, match=r"\(2,2,3\).*\(3,3,2\)"):
        ops.matmul(ones((2, 2, 3)), ones((3, 3, 2)))


# --- linear ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3), (0, 3), (2, 0, 3)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_its_formula(shape, with_bias, layout, dtype, rng, close):
    x, w, b = (layout(rng.normal(size=s).astype(dtype)) for s in (shape, (5, 3), (5,)))
    y = ops.linear(x, w, b if with_bias else None)
    assert y.dtype == dtype
    want = x.astype(np.float64) @ w.astype(np.float64).T
    close(y, want + b if with_bias else want)


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 4), (3, 0), (0, 0)])
def test_linear_of_no_features(inputs, outputs):
    x, w, b = (
        Tensor(np.ones(s), requires_grad=True) for s in ((2, 5, inputs), (outputs, inputs), outputs)
    )
    y = ops.linear(x, w, b)
    np.testing.assert_array_equal(y.numpy(), np.ones((2, 5, outputs)))
    y.sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    assert b.grad is not None
    assert x.grad.shape == x.shape
    assert w.grad.shape == w.shape
    assert b.grad.tolist() == [10.0] * outputs


def test_linear_takes_lists_and_integers():
    y = ops.linear([1, 2], [[1, 0], [1, 1]], [10, 20])
    assert y.dtype == np.float32
    assert y.tolist() == [11.0, 23.0]


def test_linear_refuses_what_does_not_fit():
    w = np.ones((5, 3))
    with pytest.raises(ValueError, match=r"\(…, in\).*\(2, 4\) and \(5, 3\)"):
        ops.linear(np.ones((2, 4)), w)
    with pytest.raises(ValueError, match=r"\(out, in\).*\(3,\)"):
        ops.linear(np.ones((2, 3)), np.ones(3))
    with pytest.raises(ValueError, match=r"bias of shape \(5,\), got \(3,\)"):
        ops.linear(np.ones((2, 3)), w, np.ones(3))
    with pytest.raises(ValueError, match=r"\(…, in\)"):
        ops.linear(1.0, w)


# --- einsum ---------------------------------------------------------------------------------------

# "ij,jk->ik: 23 34" is of shapes (2, 3) and (3, 4); "-" is a scalar.
EINSUMS = [
    "ij,jk->ik: 23 34", "ij,jk: 23 34", "ij,kj->ki: 23 43", "ba,cb: 32 43", "i,i->: 3 3",
    "i,i: 3 3", "i,j->ij: 2 3", "i,j: 2 3", "i,j->ji: 2 3", "i,j->: 2 3", "ij,ij->ij: 23 23",
    "ij,ij->i: 23 23", "ij,ji->: 23 32", "bij,bjk->bik: 234 245", "bthd,bshd->bhts: 2324 2524",
    "bhts,bshd->bthd: 2235 2524", "ij->ji: 23", "ij: 23", "ji: 23", "ij->: 23", "ij->j: 23",
    "i->i: 3", "ii->i: 33", "ii: 33", "ii->: 33", "iij->ij: 223", "iji->j: 232", "iii->i: 222",
    "iijj->ij: 2233", "ijij->ij: 2323", "ii,i->i: 33 3", "ii,jj->ij: 22 33", "iji,jk->ik: 232 34",
    "...ij,...jk->...ik: 2534 2542", "...ij,...jk->...ik: 534 2542", "...ij,...jk->...ik: 34 242",
    "...ij,...jk: 234 42", "...,...: 23 3", "i...->...i: 234", "...i->...: 23", "...: 23",
    "i...,i...->...: 23 23", "...ii->...i: 233", "a...,...a->a...: 23 32", "...a,b->...ab: 23 4",
    "ij,ij->ij: 13 23", "ij,jk->ik: 21 34", "ij,ij->: 21 23", "i,i->i: 1 4",
    "...i,...i->...: 213 143", "bij,bjk->bik: 134 245", ",: - -", ",->: - -", "i,->i: 3 -",
    ",ij: - 23", ": -", "->: -", "ij,jk,kl->il: 23 34 45", "i,ij,j->: 2 23 3",
    "ij,ik,il->jkl: 23 24 22", "i,i,i->i: 3 3 3", "i,j,k->kji: 2 3 4", "ij,jk,ki->: 23 34 42",
    "bi,oij,bj->bo: 23 435 25", "a,ab,abc->abc: 2 23 234", "ij,k,il->jl: 23 4 25",
    "i,ij,j->ij: 1 23 1", "a,b,c,d->abcd: 2 2 2 2", "Ab,bC->AC: 23 34", "aB,Bc: 23 34",
    "zZ,Zy->zy: 23 34", " i j , j k -> i k : 23 34", "ij,jk->ik: 03 34", "ij,jk->ik: 20 04",
    "ij->j: 03", "ii->i: 00", "...->...: 20",
]  # fmt: skip


@pytest.mark.parametrize("case", EINSUMS)
def test_einsum_equals_numpy(case, layout, rng, close):
    subscripts, shapes = case.split(": ")
    sizes = [[int(n) for n in shape.strip("-")] for shape in shapes.split()]
    operands = [layout(rng.normal(size=s)) for s in sizes]
    y = ops.einsum(subscripts, *[Tensor(x) for x in operands])
    close(y, np.einsum(subscripts, *operands))


@given(st.data())
def test_random_einsums_equal_numpy(data):
    letters = "ijkl"
    sizes = {c: data.draw(st.integers(0, 3), label=c) for c in letters}
    terms = data.draw(st.lists(st.text(letters, max_size=3), min_size=1, max_size=3))
    known = sorted(set("".join(terms)))
    out = "".join(data.draw(st.permutations(known))[: data.draw(st.integers(0, len(known)))])
    subscripts = ",".join(terms) + ("->" + out if data.draw(st.booleans()) else "")
    rng = np.random.default_rng(0)
    operands = [rng.integers(-4, 5, size=[sizes[c] for c in t]).astype(float) for t in terms]
    want = np.einsum(subscripts, *operands)
    y = ops.einsum(subscripts, *operands)
    assert y.shape == want.shape
    np.testing.assert_allclose(y.numpy(), want, atol=1e-9)


def test_einsum_promotes_and_takes_integers():
    assert ops.einsum("i,i->", [1, 2], [3, 4]).item() == 11
    assert ops.einsum("i,i->i", np.ones(2, np.float32), np.ones(2)).dtype == np.float64
    assert ops.einsum("i,i->i", np.ones(2, np.float32), [2, 3]).dtype == np.float32


@pytest.mark.parametrize(
    ("subscripts", "shapes", "message"),
    [
        ("ij,jk->ik", [(2, 3)], "names 2 operands, got 1"),
        ("ij->ij", [(2, 3), (2, 3)], "names 1 operands, got 2"),
        ("ij,jk->ik", [(2, 3), (4, 5)], "'j' is 3 and also 4"),
        ("ii->i", [(2, 3)], "'i' is 2 and also 3"),
        ("ii->i", [(1, 3)], "'i' is 1 and also 3"),
        ("ijk->i", [(2, 3)], r"'ijk' does not fit shape \(2, 3\)"),
        ("i->i", [(2, 3)], r"'i' does not fit shape \(2, 3\)"),
        ("ijk...->i", [(2, 3)], "does not fit shape"),
        ("ij->ik", [(2, 3)], "output letter"),
        ("ij->ii", [(2, 3)], "output letter"),
        ("i1->i", [(2, 3)], "subscripts are letters"),
        ("i.j->i", [(2, 3)], "'i.j'|letters"),
        ("ij->i.", [(2, 3)], "output letter|letters"),
        ("......->", [(2, 3)], "'......'"),
        ("ij>k", [(2, 3, 4, 5)], "subscripts are letters"),
        ("i-j", [(2, 3, 4)], "subscripts are letters"),
        ("ij->k->i", [(2, 3)], "subscripts are letters"),
    ],
)
def test_einsum_refuses_what_it_does_not_understand(subscripts, shapes, message):
    with pytest.raises(ValueError, match=message) as error:
        ops.einsum(subscripts, *[np.ones(s) for s in shapes])
    assert "einsum(" in str(error.value)


@given(hnp.arrays(ml_dtypes.bfloat16, (3, 3), elements=st.integers(-3, 3)))
def test_bfloat16_products_are_those_of_the_numbers(x):
    wide = x.astype(np.float64)
    np.testing.assert_array_equal(ops.matmul(x, x).numpy().astype(np.float64), wide @ wide)
