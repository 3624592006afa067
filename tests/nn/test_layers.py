"""Linear, Embedding, norms, Dropout, activations: each against its formula in NumPy."""

import math

import numpy as np
import pytest

from tinygrad_llm import Tensor, backend, nn

rng = np.random.default_rng(0)


def array(*shape):
    return rng.standard_normal(shape).astype(np.float32)


# --- linear and embedding -------------------------------------------------------------------------


def test_linear_is_x_times_w_transposed_plus_b():
    layer = nn.Linear(3, 2)
    x = array(4, 5, 3)
    assert layer.bias is not None
    expected = x @ layer.weight.numpy().T + layer.bias.numpy()
    np.testing.assert_allclose(layer(x).numpy(), expected, rtol=1e-6, atol=1e-6)
    bare = nn.Linear(3, 2, bias=False)
    assert bare.bias is None
    assert list(bare.state_dict()) == ["weight"]
    np.testing.assert_allclose(bare(x).numpy(), x @ bare.weight.numpy().T, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"linear\(\) takes x"):
        layer(array(4, 2))


def test_identity():
    x = Tensor([1.0])
    assert nn.Identity()(x) is x


def test_embedding_looks_rows_up_and_pads_with_a_fixed_zero_row():
    table = nn.Embedding(5, 3, padding_idx=-1)
    assert table.padding_idx == 4
    assert table.weight.numpy()[4].tolist() == [0.0, 0.0, 0.0]
    assert (table.weight.numpy()[:4] != 0).any(axis=1).all()
    ids = np.array([[0, 4], [4, 2]])
    y = table(ids)
    np.testing.assert_array_equal(y.numpy(), table.weight.numpy()[ids])
    y.sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.numpy().sum(axis=1).tolist() == [3.0, 0.0, 3.0, 0.0, 0.0]
    assert repr(table) == "Embedding(5, 3, padding_idx=4)"
    with pytest.raises(ValueError, match="padding_idx 5 is outside the 5 embeddings"):
        nn.Embedding(5, 3, padding_idx=5)
    with pytest.raises(IndexError, match="id 7 is outside"):
        table([7])


# --- norms ----------------------------------------------------------------------------------------


def layer_norm(x, axes, eps):
    mean = x.mean(axis=axes, keepdims=True)
    return (x - mean) / np.sqrt(x.var(axis=axes, keepdims=True) + eps)


@pytest.mark.parametrize("shape", [5, (5,), (3, 5)])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_over_the_last_axes(shape, affine):
    norm = nn.LayerNorm(shape, eps=1e-3, elementwise_affine=affine)
    x = array(2, 3, 5)
    axes = (-1,) if shape in (5, (5,)) else (-2, -1)
    expected = layer_norm(x, axes, 1e-3)
    if affine:
        assert norm.weight is not None
        assert norm.bias is not None
        assert norm.weight.numpy().min() == norm.weight.numpy().max() == 1
        assert not norm.bias.numpy().any()
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        expected = expected * norm.weight.numpy() + norm.bias.numpy()
    else:
        assert norm.state_dict() == {}
    np.testing.assert_allclose(norm(x).numpy(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="got"):
        norm(array(2, 4))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [5, (3, 5)])
def test_rms_norm(shape, affine):
    norm = nn.RMSNorm(shape, eps=1e-3, elementwise_affine=affine)
    x = array(2, 3, 5)
    axes = -1 if shape == 5 else (-2, -1)
    expected = x / np.sqrt((x * x).mean(axis=axes, keepdims=True) + 1e-3)
    if affine:
        assert norm.weight is not None
        nn.init.normal_(norm.weight)
        expected = expected * norm.weight.numpy()
    np.testing.assert_allclose(norm(x).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_layer_norm_without_bias_and_the_empty_shape():
    assert list(nn.LayerNorm(3, bias=False).state_dict()) == ["weight"]
    with pytest.raises(ValueError, match="at least one size"):
        nn.LayerNorm(())
    assert repr(nn.LayerNorm(3)) == "LayerNorm((3,), eps=1e-05, elementwise_affine=True)"


# --- dropout --------------------------------------------------------------------------------------


def test_dropout_scales_what_it_keeps_and_is_off_in_eval():
    backend.manual_seed(0)
    layer = nn.Dropout(0.25)
    x = Tensor(np.ones(10_000, dtype=np.float32))
    y = layer(x).numpy()
    assert set(np.unique(y).tolist()) == {0.0, np.float32(1 / 0.75)}
    assert abs((y == 0).mean() - 0.25) < 0.02
    assert layer.eval()(x) is x
    assert nn.Dropout(0.0)(x) is x
    with pytest.raises(ValueError, match="below 1, got 1"):
        nn.Dropout(1.0)


# --- activations ----------------------------------------------------------------------------------

X = np.linspace(-3, 3, 13).astype(np.float32).reshape(1, 13)
normal_cdf = np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))
FORMULAS = {
    nn.ReLU(): np.maximum(X, 0),
    nn.GELU(): X * normal_cdf(X),
    nn.GELU("tanh"): 0.5 * X * (1 + np.tanh(math.sqrt(2 / math.pi) * (X + 0.044715 * X**3))),
    nn.SiLU(): X / (1 + np.exp(-X)),
    nn.Tanh(): np.tanh(X),
    nn.Sigmoid(): 1 / (1 + np.exp(-X)),
    nn.Softplus(): np.log1p(np.exp(X)),
    nn.Softplus(beta=2.0): np.log1p(np.exp(2 * X)) / 2,
    nn.Softmax(): np.exp(X) / np.exp(X).sum(),
    nn.Softmax(dim=0): np.ones_like(X),
    nn.LogSoftmax(dim=1): X - np.log(np.exp(X).sum()),
}


@pytest.mark.parametrize("module", FORMULAS, ids=repr)
def test_activations(module):
    np.testing.assert_allclose(module(X).numpy(), FORMULAS[module], rtol=2e-5, atol=2e-6)


def test_activations_by_name():
    assert nn.activation("gelu_new")(X).tolist() == nn.GELU("tanh")(X).tolist()
    for name in nn.ACTIVATIONS:
        assert nn.activation(name)(X).shape == X.shape
    with pytest.raises(ValueError, match=r"an activation is one of relu, .*got 'mish'"):
        nn.activation("mish")
    with pytest.raises(ValueError, match="approximate is"):
        nn.GELU("yes")
    with pytest.raises(ValueError, match="beta > 0"):
        nn.Softplus(0.0)
