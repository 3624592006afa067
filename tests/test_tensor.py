from __future__ import annotations

import copy
import math
import pickle
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinygrad_llm import Tensor, from_dlpack, no_grad, ops

KINDS = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
         "float16", "bfloat16", "float32", "float64"]  # fmt: skip


def _leaf(*values: float) -> Tensor:
    return Tensor(np.array(values), requires_grad=True)


# --- made from ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "dtype"),
    [(1.5, "float32"), (2, "int64"), (True, "bool"), ([1.0, 2], "float32"), ([1, 2], "int64"),
     ([True, False], "bool"), ([[1.0], [2.0]], "float32"), ((1, (2.0)), "float32"), ([], "float32"),
     ([[], []], "float32"), (np.float64(1.5), "float64"), (np.float16(1.5), "float16"),
     (np.int32(3), "int32"), (np.bool_(True), "bool"), ([np.float32(1), 2.0], "float32")],
)  # fmt: skip
def test_lists_and_scalars_take_the_default_dtypes(data, dtype):
    x = Tensor(data)
    assert x.dtype == np.dtype(dtype)
    assert type(x.data) is np.ndarray
    np.testing.assert_array_equal(x.numpy(), np.asarray(data))
    assert not x.requires_grad
    assert x.is_leaf
    assert x.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_array_is_taken_as_it_is(kind):
    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
    for array in (np.ones((2, 3), dtype), np.ones((3, 2), dtype).T, np.ones((), dtype)):
        x = Tensor(array)
        assert x.data is array
        assert x.dtype == dtype
        assert (x.shape, x.ndim, x.size, x.device) == (array.shape, array.ndim, array.size, "cpu")


def test_a_dtype_converts():
    assert Tensor([1, 2], dtype="float16").dtype == np.float16
    assert Tensor([1.5], dtype="bfloat16").dtype == ml_dtypes.bfloat16
    assert Tensor(np.ones(2), dtype=np.float32).dtype == np.float32
    assert Tensor([1.7, -1.7], dtype=np.int64).tolist() == [1, -1]
    array = np.ones(2, np.float32)
    assert Tensor(array, dtype="float32").data is array


def test_another_tensor_gives_its_values_without_its_graph():
    x = _leaf(1.0, 2.0)
    for y in (Tensor(x), Tensor(x * 2)):
        assert not y.requires_grad
    assert Tensor(x).data is x.data


def test_nested_lists_may_hold_tensors_and_arrays():
    x = Tensor([Tensor([1.0, 2.0]), [3.0, Tensor(4.0)], np.array([5.0, 6.0])])
    assert x.tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    assert Tensor([Tensor(1), Tensor(2)]).dtype == np.int64


def test_subclasses_of_array_become_plain_arrays_on_the_same_memory(tmp_path):
    mapped = np.memmap(tmp_path / "numbers", dtype=np.float32, mode="w+", shape=(4,))
    x = Tensor(mapped)
    assert type(x.data) is np.ndarray
    mapped[1] = 7
    assert x.tolist() == [0.0, 7.0, 0.0, 0.0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's own: matrix is not recommended
        assert (Tensor(np.matrix([[1.0, 2.0]])) * Tensor([[3.0], [4.0]])).shape == (2, 2)


def test_foreign_byte_order_becomes_native():
    x = Tensor(np.array([1.5, 2.5], ">f4"), requires_grad=True)
    assert x.dtype == np.float32
    assert x.dtype.isnative
    assert x.tolist() == [1.5, 2.5]
    assert Tensor(np.array([1, 2], ">i8")).dtype == np.int64


@pytest.mark.parametrize(
    "wrong",
    ["text", ["a", "b"], np.array(["a"]), 1j, [1j], np.array([1j]), None, [None], {1, 2}, object(),
     np.array([None]), np.array(["2020-01-01"], "M8[D]"), np.array([1], "m8[s]"), 2**70,
     np.zeros(2, [("a", int)]), np.zeros(2, "V4"), np.zeros(2, np.longdouble), b"bytes",
     np.timedelta64(1, "s"), np.zeros(2, ml_dtypes.float8_e4m3fn), (i for i in range(3)), Tensor],
)  # fmt: skip
def test_what_is_no_number_is_refused(wrong):
    with pytest.raises(TypeError, match=r"made from numbers.*got"):
        Tensor(wrong)


@pytest.mark.parametrize(
    "ragged", [[[1, 2], [3]], [[1.0], 2.0], [[[1], [2]], [[3]]], [np.zeros(2), np.zeros(3)]]
)
def test_ragged_lists_are_refused(ragged):
    with pytest.raises(ValueError, match="nested lists of equal lengths"):
        Tensor(ragged)


def test_a_device_is_checked():
    assert Tensor([1.0], device="cpu").device == "cpu"
    with pytest.raises(ValueError, match="'tpu'"):
        Tensor([1.0], device="tpu")


# --- leaving --------------------------------------------------------------------------------------


def test_numpy_shares_memory_and_is_read_only_where_a_write_would_go_unnoticed():
    x = Tensor([1.0, 2.0])
    x.numpy()[0] = 5
    assert x.tolist() == [5.0, 2.0]
    y = _leaf(1.0)
    assert np.shares_memory(y.numpy(), y.data)
    for array in (y.numpy(), (y * 2).numpy(), np.asarray(y)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 5
    assert y.data.flags.writeable


def test_array_protocol():
    x = Tensor([1.5, 2.5])
    assert np.shares_memory(np.asarray(x), x.data)
    assert not np.shares_memory(np.array(x), x.data)
    assert np.asarray(x, dtype=np.float64).dtype == np.float64
    assert np.array(x, copy=False).base is not None
    with pytest.raises(ValueError, match="copy"):
        np.array(x, dtype=np.int64, copy=False)
    np.testing.assert_array_equal(x, [1.5, 2.5])


def test_python_numbers_and_lists():
    assert Tensor(2.5).item() == 2.5
    assert type(Tensor([[3]]).item()) is int
    assert type(Tensor(np.ones((), ml_dtypes.bfloat16)).item()) is float
    assert Tensor([[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]
    assert Tensor(1.5).tolist() == 1.5
    assert float(Tensor([2])) == 2.0
    assert int(Tensor(2.7)) == 2
    with pytest.raises(ValueError, match=r"exactly one element, got shape \(2,\)"):
        Tensor([1, 2]).item()
    with pytest.raises(ValueError, match="exactly one element"):
        float(Tensor([]))


def test_truth():
    assert Tensor([1.0])
    assert not Tensor(0)
    assert bool(Tensor([[True]])) is True
    for x in (Tensor([1, 2]), Tensor([])):
        with pytest.raises(ValueError, match=r"\(\d,\) is ambiguous.*any\(\) or .all\(\)"):
            bool(x)
    assert Tensor([0, 1]).any()
    assert not Tensor([0, 1]).all()
    assert Tensor([[0, 1], [1, 1]]).all(axis=1).tolist() == [False, True]
    assert Tensor([[0, 1], [0, 0]]).any(axis=0, keepdims=True).tolist() == [[False, True]]
    assert Tensor([True]).all().dtype == np.bool_


def test_an_integer_tensor_is_an_index():
    assert [10, 20, 30][Tensor(1)] == 20
    assert list(range(Tensor([3]))) == [0, 1, 2]
    with pytest.raises(TypeError, match="only integer tensors can be an index, got float32"):
        [1, 2][Tensor(1.0)]


def test_length_iteration_and_unpacking():
    x = Tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    assert len(x) == 2
    a, b = x
    assert isinstance(a, Tensor)
    (a * 2 + b).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[2.0, 2.0], [1.0, 1.0]]
    assert list(Tensor(np.zeros((0, 3)))) == []
    for use in (len, list):
        with pytest.raises(TypeError, match="zero dimensions"):
            use(Tensor(1.0))


def test_tensors_are_keys_by_identity():
    x, y = Tensor([1.0]), Tensor([1.0])
    assert len({x: 1, y: 2}) == 2
    assert {x: 1}[x] == 1


# --- NumPy meets tensors --------------------------------------------------------------------------


def test_numpy_functions_of_tensors_are_recorded():
    x = _leaf(1.0, 4.0)
    array = np.array([2.0, 3.0])
    results = {
        "exp": (np.exp(x), np.exp(x.numpy())),
        "add": (np.add(array, x), array + x.numpy()),
        "power": (np.power(x, 2), x.numpy() ** 2),
        "negative": (np.negative(x), -x.numpy()),
        "absolute": (np.abs(x), x.numpy()),
        "maximum": (np.maximum(x, array), np.maximum(x.numpy(), array)),
        "matmul": (np.matmul(array, x), array @ x.numpy()),
        "array first": (array * x, array * x.numpy()),
        "array @": (array @ x, array @ x.numpy()),
        "array /": (array / x, array / x.numpy()),
        "array -": (array - x, array - x.numpy()),
        "array **": (array**x, array ** x.numpy()),
        "scalar first": (np.float64(3) * x, 3 * x.numpy()),
        "zero-dimensional array": (np.array(3.0) - x, 3 - x.numpy()),
    }
    for y, expected in results.values():
        assert isinstance(y, Tensor)
        assert y.requires_grad
        np.testing.assert_allclose(y.numpy(), expected)
    compared = array > x
    assert isinstance(compared, Tensor)
    assert compared.tolist() == [True, False]


def test_numpy_scalars_do_not_widen():
    x = Tensor([1.0, 2.0])
    for y in (np.float64(2) * x, x * np.float64(2), np.sqrt(2.0) + x, x ** np.float64(0.5)):
        assert y.dtype == np.float32


def test_numpy_functions_that_cannot_be_recorded_say_so():
    x = Tensor([1.0, 2.0])
    with pytest.raises(TypeError, match=r"np.cbrt cannot be applied to a Tensor"):
        np.cbrt(x)  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(TypeError, match=r"np.add cannot.*tensor.numpy\(\)"):
        np.add.reduce(x)  # pyright: ignore[reportArgumentType, reportCallIssue]
    array = np.zeros(2)
    with pytest.raises(TypeError, match=r"np.add cannot"):
        array += x  # pyright: ignore[reportAssignmentType]
    with pytest.raises(TypeError, match=r"np.add cannot"):
        np.add(array, array, out=x)  # pyright: ignore[reportCallIssue, reportArgumentType]


@given(hnp.arrays(st.sampled_from(["float32", "float64", "int64", "int8", "uint8", "bool"]),
                  hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)))  # fmt: skip
def test_dlpack_carries_the_memory_both_ways(array):
    x = from_dlpack(array)
    assert isinstance(x, Tensor)
    np.testing.assert_array_equal(x.numpy(), array)
    assert x.dtype == array.dtype
    back = np.from_dlpack(x)
    np.testing.assert_array_equal(back, array)
    again = from_dlpack(x)
    assert again.shape == array.shape
    if array.size:
        assert np.shares_memory(x.data, array)
        assert np.shares_memory(back, array)
        assert np.shares_memory(again.data, array)


def test_dlpack_of_strided_arrays():
    array = np.arange(12.0).reshape(3, 4)[::2, ::-1]
    np.testing.assert_array_equal(from_dlpack(array).numpy(), array)
    np.testing.assert_array_equal(np.from_dlpack(Tensor(array).T), array.T)


def test_dlpack_carries_no_gradient():
    x = _leaf(1.0)
    with pytest.raises(RuntimeError, match=r"export tensor.detach\(\)"):
        np.from_dlpack(x)
    assert np.from_dlpack(x.detach()).tolist() == [1.0]


# --- shown ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (Tensor(1.5), "Tensor(1.5)"),
        (Tensor([1, 2]), "Tensor([1, 2])"),
        (Tensor([1.0, 2.5]), "Tensor([1. , 2.5])"),
        (Tensor([True]), "Tensor([ True])"),
        (Tensor([[1, 2], [3, 4]]), "Tensor([[1, 2],\n        [3, 4]])"),
        (Tensor(np.ones(1)), "Tensor([1.], dtype=float64)"),
        (Tensor(np.ones(1, ml_dtypes.bfloat16)), "Tensor([1], dtype=bfloat16)"),
        (Tensor(np.ones(1, np.int32)), "Tensor([1], dtype=int32)"),
        (Tensor([math.nan, math.inf]), "Tensor([nan, inf])"),
        (Tensor([]), "Tensor([], shape=(0,))"),
        (Tensor(np.zeros((2, 0), np.float32)), "Tensor([], shape=(2, 0))"),
        (Tensor([1.0], requires_grad=True), "Tensor([1.], requires_grad=True)"),
        (ops.zeros(300), "Tensor([0., 0., 0., ..., 0., 0., 0.], shape=(300,))"),
    ],
)
def test_repr(tensor, text):
    assert repr(tensor) == text


def test_the_repr_of_a_result_names_its_op():
    assert repr(_leaf(1.0) * 2).startswith("Tensor([2.], dtype=float64, node=<Multiply")


# --- copied, not pickled --------------------------------------------------------------------------


def test_a_deep_copy_of_a_leaf_is_a_leaf_of_its_own():
    x = _leaf(1.0, 2.0)
    (x * 3).sum().backward()
    twin = copy.deepcopy({"a": x, "b": x})
    y = twin["a"]
    assert y is twin["b"]
    assert y.requires_grad
    assert y.is_leaf
    assert not np.shares_memory(y.data, x.data)
    assert y.grad is not None
    assert x.grad is not None
    assert y.grad.tolist() == [3.0, 3.0]
    assert not np.shares_memory(y.grad.data, x.grad.data)
    (y * 2).sum().backward()
    assert y.grad.tolist() == [5.0, 5.0]
    assert x.grad.tolist() == [3.0, 3.0]
    assert not copy.deepcopy(Tensor([1])).requires_grad


def test_a_deep_copy_of_a_result_is_refused():
    with pytest.raises(RuntimeError, match=r"only leaves.*detach\(\)"):
        copy.deepcopy(_leaf(1.0) * 2)


def test_pickling_is_refused():
    with pytest.raises(TypeError, match=r"not pickled.*safetensors"):
        pickle.dumps(Tensor([1.0]))


# --- requires_grad --------------------------------------------------------------------------------


def test_requires_grad_is_for_floats_and_settable_on_leaves():
    x = Tensor([1.0])
    assert x.requires_grad_() is x
    assert x.requires_grad
    x.requires_grad = True
    x.requires_grad = False
    assert not x.requires_grad
    for kind in ("float16", "bfloat16", "float64"):
        assert Tensor([1.0], dtype=kind, requires_grad=True).requires_grad
    for data in ([1], [True]):
        with pytest.raises(TypeError, match="only float tensors can require a gradient, got"):
            Tensor(data, requires_grad=True)
        with pytest.raises(TypeError, match="only float tensors"):
            Tensor(data).requires_grad = True
    y = _leaf(1.0) * 2
    assert not y.is_leaf
    with pytest.raises(RuntimeError, match=r"only on leaves; use detach\(\)"):
        y.requires_grad = False


def test_detach_shares_memory_outside_the_graph():
    y = _leaf(1.0, 2.0) * 2
    z = y.detach()
    assert np.shares_memory(z.data, y.data)
    assert not z.requires_grad
    assert z.is_leaf


def test_hooks_need_a_gradient():
    with pytest.raises(RuntimeError, match="a hook needs a tensor that requires a gradient"):
        Tensor([1.0]).register_hook(lambda g: None)
    x = _leaf(1.0)
    seen = []
    remove = x.register_hook(lambda g: seen.append(g.tolist()))
    (x * 2).sum().backward()
    remove()
    remove()
    (x * 2).sum().backward()
    assert seen == [[2.0]]


def test_retain_grad_fills_the_gradient_of_a_result():
    x = _leaf(1.0, 2.0)
    y = x * 2
    y.retain_grad()
    (y * y).sum().backward()
    assert y.grad is not None
    assert y.grad.tolist() == [4.0, 8.0]
    x.retain_grad()  # a leaf keeps it anyway
    assert x.grad is not None
    assert x.grad.tolist() == [8.0, 16.0]


# --- writing in place -----------------------------------------------------------------------------


def _add(x, y):
    x += y


def _subtract(x, y):
    x -= y


def _multiply(x, y):
    x *= y


def _divide(x, y):
    x /= y


def _set(x, y):
    x[...] = y


WRITES = {
    "+=": (_add, lambda x, y: x + y, 1.0, 1.0),
    "-=": (_subtract, lambda x, y: x - y, 1.0, -1.0),
    "*=": (_multiply, lambda x, y: x * y, 4.0, 3.0),
    "/=": (_divide, lambda x, y: x / y, 0.25, -3.0 / 16),
    "[...] =": (_set, lambda x, y: y, 0.0, 1.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_an_unrecorded_write_goes_into_the_same_memory(name):
    write, formula, *_ = WRITES[name]
    for other in (4.0, np.full(2, 4.0), Tensor([4.0, 4.0])):
        array = np.array([1.0, 3.0])
        x, view = Tensor(array), Tensor(array)[:1]
        write(x, other)
        assert x.data is array
        np.testing.assert_allclose(array, formula(np.array([1.0, 3.0]), 4.0))
        assert view.item() == array[0]
    leaf = _leaf(1.0, 3.0)
    with no_grad():
        write(leaf, 4.0)
    np.testing.assert_allclose(leaf.numpy(), formula(np.array([1.0, 3.0]), 4.0))
    assert leaf.is_leaf
    assert leaf.requires_grad


@pytest.mark.parametrize("name", WRITES)
def test_a_recorded_write_has_the_gradients_of_the_formula(name):
    write, formula, left, right = WRITES[name]
    x, y = _leaf(3.0), _leaf(4.0)
    h = x * 1
    before = h
    write(h, y)
    assert h is before
    np.testing.assert_allclose(h.numpy(), formula(np.array([3.0]), np.array([4.0])))
    h.sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert x.grad.tolist() == [left]
    assert y.grad.tolist() == [right]
    assert x.tolist() == [3.0]


@pytest.mark.parametrize("name", WRITES)
def test_what_was_no_part_of_the_graph_becomes_one(name):
    write, _, _, right = WRITES[name]
    y = _leaf(4.0)
    h = ops.full((1,), 3.0, dtype="float64")
    write(h, y)
    assert h.requires_grad
    h.sum().backward()
    assert y.grad is not None
    assert y.grad.tolist() == [right]


def test_writes_at_an_index_are_recorded_one_after_another():
    x = _leaf(1.0, 2.0, 3.0)
    h = ops.zeros(3, dtype="float64")
    for i in range(3):
        h[i] = x[i] * (i + 1)
    h[0] = 7.0
    (h * h).sum().backward()
    assert h.tolist() == [7.0, 4.0, 9.0]
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 16.0, 54.0]


@pytest.mark.parametrize("make", [
    lambda x: ops.linear(x, np.ones((2, 2))),
    lambda x: (x @ np.ones((2, 2))).reshape(4),
    lambda x: (x * 2).T,
    lambda x: ops.layer_norm(x, np.ones(2)),
    lambda x: ops.cross_entropy(x, [0, 1], reduction="none"),
    lambda x: ops.concatenate([x, x])[1:],
])  # fmt: skip
def test_a_result_that_nobody_else_holds_may_be_written_though_an_op_reshaped_it(make):
    x = Tensor(np.array([[1.0, 2.0], [3.0, 5.0]]), requires_grad=True)
    expected, y = make(x) + 1.0, make(x)
    y += 1.0
    np.testing.assert_array_equal(y.numpy(), expected.numpy())
    expected.sum().backward()
    wanted, x.grad = x.grad, None
    y.sum().backward()
    assert wanted is not None
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy(), wanted.numpy())


@pytest.mark.parametrize("name", WRITES)
def test_a_leaf_that_requires_a_gradient_is_not_overwritten(name):
    x = _leaf(1.0)
    with pytest.raises(RuntimeError, match=r"leaf that requires a gradient.*no_grad\(\)"):
        WRITES[name][0](x, 4.0)
    assert x.tolist() == [1.0]


HOLDERS = {
    "a slice": lambda h: h[:1],
    "a reshape": lambda h: h.reshape(2, 1),
    "a detached twin": lambda h: h.detach(),
    "an array": lambda h: h.numpy(),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("name", WRITES)
def test_a_recorded_write_under_a_view_is_refused(name, holder):
    write = WRITES[name][0]
    h = _leaf(1.0, 2.0) * 1
    held = HOLDERS[holder](h)
    with pytest.raises(RuntimeError, match="a view, or an op that saved it"):
        write(h, 4.0)
    if isinstance(held, Tensor) and held.requires_grad:
        with pytest.raises(RuntimeError, match="holds the same memory"):
            write(held, 4.0)
    assert h.tolist() == [1.0, 2.0]
    del held
    write(h, 4.0)
    assert h.tolist() != [1.0, 2.0]


@pytest.mark.parametrize("name", WRITES)
def test_a_recorded_write_into_an_array_of_the_caller_is_refused(name):
    array = np.ones(2)
    with pytest.raises(RuntimeError, match="holds the same memory"):
        WRITES[name][0](Tensor(array), _leaf(1.0, 2.0))
    assert array.tolist() == [1.0, 1.0]


def test_a_recorded_write_into_what_an_op_saved_is_refused():
    y = ops.exp(_leaf(1.0))
    with pytest.raises(RuntimeError, match="an op that saved it"):
        y += 1.0


def test_a_write_must_fit():
    x = Tensor([1.0, 2.0])
    with pytest.raises(ValueError, match=r"shape \(2, 2\) and dtype float32.*x = x \+ y"):
        x += np.ones((2, 2), np.float32)
    with pytest.raises(ValueError, match=r"dtype float64.*\(2,\) and float32.*x = x \* y"):
        x *= np.ones(2)
    whole = Tensor([1, 2])
    for write, sign in ((_divide, "/"), (_add, r"\+")):
        with pytest.raises(ValueError, match=f"dtype float32.*int64; write x = x {sign} y"):
            write(whole, 0.5)
    whole += 1
    assert whole.tolist() == [2, 3]
    with pytest.raises(ValueError, match="read-only"):
        _add(ops.broadcast_to(Tensor(1.0), (3,)), 1.0)


def test_values_are_copied_in():
    x = Tensor(np.zeros((2, 2), np.float32))
    array = x.data
    assert x.copy_(Tensor([[1.0, 2.0], [3.0, 4.0]])) is x
    assert x.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert x.copy_(np.array([5.0, 6.0])).tolist() == [[5.0, 6.0]] * 2
    assert x.fill_(3).tolist() == [[3.0, 3.0]] * 2
    assert x.zero_().tolist() == [[0.0, 0.0]] * 2
    assert x.data is array
    assert x.dtype == np.float32
    with pytest.raises(ValueError, match="broadcast"):
        x.copy_([1.0, 2.0, 3.0])


def test_copying_in_is_never_recorded():
    x, y = _leaf(1.0), _leaf(2.0)
    for write in (lambda: x.copy_(3.0), lambda: x.fill_(3.0), lambda: x.zero_(),
                  lambda: Tensor([1.0]).copy_(y), lambda: (x * 1).copy_(3.0)):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"is not recorded.*no_grad\(\), or on a detach\(\)"):
            write()
    with no_grad():
        x.copy_(y)
    assert x.tolist() == [2.0]
    x.detach().fill_(5.0)
    assert x.tolist() == [5.0]


# --- methods are the functions --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("exp", ()), ("log", ()), ("sqrt", ()), ("rsqrt", ()), ("tanh", ()), ("sigmoid", ()),
        ("erf", ()), ("relu", ()), ("abs", ()), ("clip", (1.0, 2.0)), ("clip", (None, 2.0)),
        ("masked_fill", (np.array([True, False, True]), 0.5)), ("copy", ()),
        ("sum", (0, True)), ("mean", (1,)), ("var", (0, 1)), ("std", (1, 0, True)), ("max", (0,)),
        ("min", (1, True)), ("prod", (0,)), ("argmax", (1,)), ("argmin", (0, True)),
        ("cumsum", (0,)), ("logsumexp", (0,)), ("norm", (1, 0)), ("softmax", (0,)),
        ("log_softmax", (0,)), ("reshape", ((3, 2),)), ("flatten", (0, 1)), ("transpose", ()),
        ("swapaxes", (0, 1)), ("broadcast_to", ((2, 2, 3),)), ("expand", ((2, -1, -1),)),
        ("squeeze", ()), ("split", ([1],)), ("chunk", (2,)), ("flip", (1,)), ("roll", (1, 1)),
        ("tril", (1,)), ("triu", (-1,)),
    ],
)  # fmt: skip
def test_a_method_is_the_function_of_its_name(method, arguments):
    x = Tensor([[0.5, 1.5, 2.5], [3.0, 0.25, 1.0]])
    got, wanted = getattr(x, method)(*arguments), getattr(ops, method)(x, *arguments)
    if not isinstance(got, list):
        got, wanted = [got], [wanted]
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.numpy(), b.numpy())


# --- NumPy's functions on Tensors -----------------------------------------------------------------


def test_numpy_functions_that_are_ops_are_recorded() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    y = np.concatenate([x, np.where(np.array([True, False]), x, 0.0)])
    assert isinstance(y, Tensor)
    np.sum(np.square(y)).backward()
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy(), [4.0, 4.0])


def test_other_numpy_functions_work_on_values_but_never_lose_a_gradient() -> None:
    x = Tensor([1.0, 2.0])
    assert np.allclose(x, [1.0, 2.0])
    assert np.median(x) == 1.5
    with pytest.raises(TypeError, match=r"np\.median is not recorded"):
        np.median(x.requires_grad_())


def test_none_is_equal_to_no_tensor() -> None:
    x = Tensor([1.0])
    assert (x == None) is False  # noqa: E711
    assert (x != None) is True  # noqa: E711
