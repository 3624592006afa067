"""First values: the right distribution, from the right stream, in place."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import Tensor, backend
from tinygrad_llm.nn import Embedding, Linear, Parameter, init

N = 40_000  # samples: a mean is then within 0.02 σ of its value, four standard errors


def check(x, mean, std):
    assert abs(x.mean() - mean) < 0.02 * std + 1e-7
    assert abs(x.std() / std - 1) < 0.02


def weight(shape=(200, 200)):
    return Parameter(np.zeros(shape, dtype=np.float32))


def stream():
    return backend.RandomStream(11)


def test_constants():
    p = weight((2, 2))
    assert init.ones_(p) is p
    assert p.tolist() == [[1, 1], [1, 1]]
    assert init.zeros_(p).tolist() == [[0, 0], [0, 0]]
    assert init.constant_(p, 2.5).tolist() == [[2.5, 2.5], [2.5, 2.5]]
    assert p.requires_grad


def test_normal_and_uniform():
    check(init.normal_(weight(), 3.0, 0.5, stream()).numpy(), 3.0, 0.5)
    x = init.uniform_(weight(), -1.0, 3.0, stream()).numpy()
    check(x, 1.0, 4.0 / math.sqrt(12))
    assert x.min() >= -1.0
    assert x.max() <= 3.0


def test_xavier_by_hand():
    p = weight((300, 100))
    bound = 2.0 * math.sqrt(6.0 / 400)
    x = init.xavier_uniform_(p, gain=2.0, stream=stream()).numpy()
    assert np.abs(x).max() <= bound
    check(x, 0.0, bound / math.sqrt(3))
    check(init.xavier_normal_(p, stream=stream()).numpy(), 0.0, math.sqrt(2.0 / 400))


@pytest.mark.parametrize(("mode", "fan"), [("fan_in", 100), ("fan_out", 300)])
def test_kaiming_by_hand(mode, fan):
    p = weight((300, 100))
    bound = math.sqrt(6.0 / fan)  # ReLU: gain √2
    x = init.kaiming_uniform_(p, mode=mode, nonlinearity="relu", stream=stream()).numpy()
    assert np.abs(x).max() <= bound
    check(x, 0.0, bound / math.sqrt(3))
    x = init.kaiming_normal_(p, mode=mode, nonlinearity="linear", stream=stream()).numpy()
    check(x, 0.0, 1.0 / math.sqrt(fan))


def test_kaiming_with_slope_root_five_is_one_over_root_fan_in():
    x = init.kaiming_uniform_(weight((50, 400)), a=math.sqrt(5), stream=stream()).numpy()
    assert 0.99 / 20 < np.abs(x).max() <= 1 / 20


def test_a_receptive_field_counts_in_the_fans():
    x = init.kaiming_uniform_(weight((64, 3, 5, 5)), nonlinearity="linear", stream=stream())
    assert 0.99 < np.abs(x.numpy()).max() / math.sqrt(3.0 / 75) <= 1.0


def test_gains():
    assert init.calculate_gain("tanh") == 5 / 3
    assert init.calculate_gain("leaky_relu", 2.0) == pytest.approx(math.sqrt(2 / 5))
    with pytest.raises(ValueError, match=r"nonlinearity is one of linear, .*got 'swish'"):
        init.calculate_gain("swish")


def test_trunc_normal_is_the_normal_within_its_bounds():
    x = init.trunc_normal_(weight(), 1.0, 2.0, -1.0, 3.0, stream()).numpy()
    assert x.min() >= -1.0
    assert x.max() <= 3.0
    # N(0, 1) cut at ±1 has variance 1 − 2φ(1) / (2Φ(1) − 1)
    density = math.exp(-0.5) / math.sqrt(2 * math.pi)
    check(x, 1.0, 2.0 * math.sqrt(1 - 2 * density / math.erf(1 / math.sqrt(2))))


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="1 % of the distribution"):
        init.trunc_normal_(weight(), 0.0, 1.0, 5.0, 6.0)
    with pytest.raises(ValueError, match="std ≥ 0"):
        init.normal_(weight(), std=-1.0)
    with pytest.raises(ValueError, match="a ≤ b"):
        init.uniform_(weight(), 1.0, 0.0)
    with pytest.raises(ValueError, match="two or more axes"):
        init.xavier_uniform_(weight((3,)))
    with pytest.raises(ValueError, match="mode is"):
        init.kaiming_uniform_(weight(), mode="fan")


def test_the_seed_decides_and_a_stream_of_ones_own_leaves_the_default_alone():
    backend.manual_seed(3)
    first = init.normal_(weight((4, 4))).numpy().copy()
    backend.manual_seed(3)
    np.testing.assert_array_equal(first, init.normal_(weight((4, 4))).numpy())
    before = backend.random.state()
    init.normal_(weight((4, 4)), stream=stream())
    assert backend.random.state() == before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_float_dtype(dtype):
    x = init.normal_(Parameter(np.zeros((100, 100)), dtype=dtype), stream=stream())
    assert x.dtype == backend.as_dtype(dtype)
    assert abs(x.numpy().astype(np.float64).std() - 1) < 0.05


def test_a_large_tensor_is_drawn_in_pieces_that_differ():
    p = Parameter(np.zeros((3, init._PIECE // 2), dtype=np.float32))
    x = init.uniform_(p, stream=stream()).numpy().reshape(-1)
    first, second = x[: x.size // 3], x[2 * x.size // 3 :]
    assert (first == second).mean() < 1e-3


def test_skip_init_draws_nothing():
    before = backend.random.state()
    with init.skip_init():
        layer, table = Linear(3, 3), Embedding(4, 2, padding_idx=0)
        init.ones_(layer.weight)
    assert backend.random.state() == before
    assert layer.weight.shape == (3, 3)
    assert table.weight.shape == (4, 2)
    init.ones_(layer.weight)
    assert (layer.weight.numpy() == 1).all()


def test_linear_starts_as_pytorchs_does():
    backend.manual_seed(0)
    layer = Linear(400, 100)
    assert layer.bias is not None
    for p in (layer.weight, layer.bias):
        assert 0.9 / 20 < np.abs(p.numpy()).max() <= 1 / 20
    check(layer.weight.numpy(), 0.0, 1 / (20 * math.sqrt(3)))


@given(
    st.floats(-100, 100),
    st.floats(0, 100),
    st.integers(0, 2**32),
    st.sampled_from(["float32", "float64"]),
)
def test_uniform_stays_within_its_bounds(a, width, seed, dtype):
    tensor = Tensor(np.zeros(50), dtype=dtype)
    x = init.uniform_(tensor, a, a + width, backend.RandomStream(seed)).numpy()
    slack = 1e-5 * (abs(a) + width)  # of rounding a and b themselves
    assert x.min() >= a - slack
    assert x.max() <= a + width + slack


def test_nothing_to_draw():
    assert init.normal_(weight((0, 3))).shape == (0, 3)
    assert Linear(0, 2).weight.shape == (2, 0)
