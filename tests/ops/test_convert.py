from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from tinygrad_llm import Tensor, no_grad, ops


def test_as_tensor_gives_a_tensor_back_itself():
    x = Tensor([1.0], requires_grad=True)
    assert ops.as_tensor(x) is x


def test_as_tensor_of_an_array_shares_its_memory():
    array = np.zeros(3, np.float32)
    ops.as_tensor(array).data[0] = 5
    assert array[0] == 5


def test_as_tensor_gives_scalars_the_dtype_they_meet():
    like = Tensor(np.zeros(1, np.float16))
    for scalar in (1, 1.5, True, np.float64(1.5), np.int64(1)):
        assert ops.as_tensor(scalar, like).dtype == np.float16
    assert ops.as_tensor([1.5], like).dtype == np.float32


@pytest.mark.parametrize(
    ("kind", "to"),
    [("float32", "float64"), ("float64", "float16"), ("float32", "bfloat16"),
     ("bfloat16", "float32"), ("int64", "float32"), ("float32", "int32"), ("bool", "float32"),
     ("float32", "bool"), ("int8", "uint8")],
)  # fmt: skip
def test_astype_equals_numpy(kind, to, layout):
    kinds = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in (kind, to)}
    x = layout(np.array([[0, 1, 2], [3, 4, 5]]).astype(kinds[kind]))
    y = ops.astype(Tensor(x), to)
    assert y.dtype == kinds[to]
    np.testing.assert_array_equal(y.numpy(), x.astype(kinds[to]))


def test_astype_to_its_own_dtype_is_no_op_unless_a_copy_is_asked_for():
    x = Tensor([1.0])
    assert ops.astype(x, np.float32) is x
    y = x.astype("float32", copy=True)
    assert y is not x
    assert not np.shares_memory(x.data, y.data)


def test_a_gradient_passes_between_float_dtypes_and_stops_at_integers():
    x = Tensor([1.0, 2.0], requires_grad=True)
    (x.astype("float64") * 3.0).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == np.float32
    assert x.grad.tolist() == [3.0, 3.0]
    assert not x.astype("int64").requires_grad
    with no_grad():
        assert not x.astype("float64").requires_grad


def test_float_is_float32():
    assert Tensor([1, 2]).float().dtype == np.float32
    assert Tensor(np.zeros(1)).float().dtype == np.float32


def test_an_unknown_dtype_is_refused():
    with pytest.raises(TypeError, match="nonsense"):
        ops.astype([1.0], "nonsense")


def test_to_device():
    x = Tensor([1.0], requires_grad=True)
    assert ops.to_device(x, "cpu") is x
    assert x.to("cpu") is x
    assert x.cpu() is x
    with pytest.raises(ValueError, match=r"'cpu', 'cuda' or 'cuda:N'.*'tpu'"):
        ops.to_device(x, "tpu")
    assert x.to("float64").dtype == np.float64
    assert x.to(np.float16).dtype == np.float16


def test_whole_computations_stay_in_float32():
    """Every Python or NumPy scalar on the way is weak."""
    x = Tensor(np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), requires_grad=True)
    scale, two = 1 / np.sqrt(4), np.float64(2)
    h = ops.layer_norm(x * scale + two, eps=np.float64(1e-5))
    h = ops.gelu(h / np.float64(3)) - np.float64(0.1)
    h = ops.dropout(h, np.float64(0.1))
    h = ops.rms_norm(h, eps=np.float64(1e-6)) ** np.float64(2) + h.norm(np.float64(3))
    h = ops.scaled_dot_product_attention(h, h, h, scale=scale, dropout_p=np.float64(0.1))
    h = ops.clip(h, np.float64(-5), np.float64(5)) + ops.pad(h, 0, np.float64(1))
    h = ops.masked_fill(h, h > two, np.float64(0.5)) + ops.smooth_l1_loss(h, x, np.float64(0.5))
    y = ops.cross_entropy(h, [0, 1, 2], label_smoothing=np.float64(0.1)) * (h.sum() * math.pi)
    assert y.dtype == np.float32
    y.backward()
    assert x.grad is not None
    assert x.grad.dtype == np.float32
