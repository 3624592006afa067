"""Adam and AdamW against the papers' algorithms, written down in float64 straight from the page."""

import numpy as np
import pytest

from tinygrad_llm import Tensor, backend
from tinygrad_llm.optim import Adam, AdamW

SHAPES = [(), (7,), (5, 3), (0, 4), (200, 211)]  # the last is more than one block, and a rest


def kingma_ba(theta, gradients, lr, betas, eps, weight_decay=0.0):
    """Algorithm 1 of "Adam: a method for stochastic optimization"; L2 joins the gradient."""
    theta, (beta1, beta2) = theta.copy(), betas
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(gradients, start=1):
        g = g + weight_decay * theta
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        theta = theta - lr * m_hat / (np.sqrt(v_hat) + eps)
    return theta


def loshchilov_hutter(theta, gradients, lr, betas, eps, weight_decay):
    """Algorithm 2 of "Decoupled weight decay regularization", λ = lr · weight_decay, η = 1."""
    theta, (beta1, beta2) = theta.copy(), betas
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        theta = theta - (lr * m_hat / (np.sqrt(v_hat) + eps) + lr * weight_decay * theta)
    return theta


def trajectory(optimizer_class, theta, gradients, dtype, **options):
    p = Tensor(theta.astype(dtype), requires_grad=True)
    optimizer = optimizer_class([p], **options)
    for g in gradients:
        p.grad = Tensor(g.astype(dtype))
        optimizer.step()
    return p, optimizer


def problem(shape, steps=100, seed=0):
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.uniform(-6, 3, steps)  # gradients of very different sizes
    return rng.normal(size=shape), [s * rng.normal(size=shape) for s in scales]


SETTINGS = [
    {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
    {"lr": 1e-1, "betas": (0.0, 0.5), "eps": 1e-3, "weight_decay": 0.5},
    {"lr": 1e-2, "betas": (0.99, 0.0), "eps": 1e-1, "weight_decay": 0.01},
]
ALGORITHMS = [(Adam, kingma_ba), (AdamW, loshchilov_hutter)]


@pytest.mark.parametrize(("optimizer_class", "paper"), ALGORITHMS)
@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_trajectory_is_the_papers_in_float64(optimizer_class, paper, options, shape):
    theta, gradients = problem(shape, steps=30 if np.prod(shape) > 1000 else 100)
    p, _ = trajectory(optimizer_class, theta, gradients, np.float64, **options)
    np.testing.assert_allclose(p.data, paper(theta, gradients, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("optimizer_class", "paper"), ALGORITHMS)
@pytest.mark.parametrize("options", SETTINGS)
def test_trajectory_is_the_papers_in_float32(optimizer_class, paper, options):
    theta, gradients = problem((40, 30))
    p, optimizer = trajectory(optimizer_class, theta, gradients, np.float32, **options)
    assert p.dtype == np.float32
    assert {a.dtype for k, a in optimizer.state[p].items() if k != "step"} == {p.dtype}
    expected = paper(theta, gradients, **options)
    np.testing.assert_allclose(p.data, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_first_step_of_adam_is_lr_in_the_direction_of_the_sign():
    p, _ = trajectory(Adam, np.zeros(3), [np.array([5.0, -1e-3, 0.0])], np.float64, lr=0.1)
    np.testing.assert_allclose(p.data, [-0.1, 0.1, 0.0], rtol=1e-4)


def test_adamw_decays_by_the_same_share_whatever_the_gradient():
    zero, large = np.zeros((1, 4)), np.full((1, 4), 1e3)
    start = np.array([1.0, -2.0, 3.0, 4.0])
    options = {"lr": 0.1, "weight_decay": 0.5}
    still, _ = trajectory(AdamW, start, zero, np.float64, **options)
    np.testing.assert_allclose(still.data, start * 0.95)
    moved, _ = trajectory(AdamW, start, large, np.float64, **options)
    np.testing.assert_allclose(moved.data, start * 0.95 - 0.1)


@pytest.mark.parametrize("dtype", [backend.float16, backend.bfloat16])
@pytest.mark.parametrize("optimizer_class", [Adam, AdamW])
def test_halves_follow_a_float32_master(optimizer_class, dtype):
    theta, gradients = problem((150, 200), steps=20)
    theta = theta.astype(dtype).astype(np.float32)
    gradients = [g.clip(-100, 100).astype(dtype).astype(np.float32) for g in gradients]
    options = {"lr": 1e-4, "weight_decay": 0.1}
    half, optimizer = trajectory(optimizer_class, theta, gradients, dtype, **options)
    full, _ = trajectory(optimizer_class, theta, gradients, np.float32, **options)
    state = optimizer.state[half]
    assert half.dtype == dtype
    assert {a.dtype for k, a in state.items() if k != "step"} == {backend.float32}
    np.testing.assert_array_equal(state["master"], full.data)
    np.testing.assert_array_equal(half.data, full.data.astype(dtype))


def test_updates_below_the_resolution_of_a_half_add_up():
    p, _ = trajectory(Adam, np.ones(4), [np.ones(4)] * 100, backend.bfloat16, lr=1e-4)
    np.testing.assert_allclose(p.data.astype(np.float64), 0.99, atol=2e-3)  # 1e-4 < 2⁻⁹


def test_changing_lr_in_a_group_changes_the_next_step():
    p = Tensor([1.0], requires_grad=True)
    optimizer = AdamW([p], lr=0.1, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 0.0
    p.grad = Tensor([1.0])
    optimizer.step()
    assert p.tolist() == [1.0]


@pytest.mark.parametrize("optimizer_class", [Adam, AdamW])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr must be at least 0, got -0.001"),
        ({"lr": float("nan")}, "lr must be at least 0, got nan"),
        ({"betas": (1.0, 0.999)}, "β₁ must be at least 0 and below 1, got 1.0"),
        ({"betas": (0.9, -0.1)}, "β₂ must be at least 0 and below 1, got -0.1"),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused(optimizer_class, options, message):
    with pytest.raises(ValueError, match=message):
        optimizer_class([Tensor([1.0], requires_grad=True)], **options)


def test_a_learning_rate_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match="lr must be a number, got '1e-3'"):
        AdamW([{"params": Tensor([1.0], requires_grad=True), "lr": "1e-3"}])
