"""SGD against its formulas, written down in float64."""

import itertools

import numpy as np
import pytest

from tinygrad_llm import Tensor, backend
from tinygrad_llm.optim import SGD


def formula(
    theta, gradients, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False,
    maximize=False,
):  # fmt: skip
    """The momentum form that the docstring of SGD states, one line for one."""
    theta, v = theta.copy(), None
    for g in gradients:
        g = (-g if maximize else g) + weight_decay * theta
        v = g if v is None else momentum * v + (1 - dampening) * g
        if momentum == 0:
            direction = g
        else:
            direction = g + momentum * v if nesterov else v
        theta = theta - lr * direction
    return theta


def sutskever(theta, gradients, lr, momentum):
    """v ← μ v − ε ∇f(θ); θ ← θ + v: equations 1 and 2 of Sutskever et al. 2013."""
    theta, v = theta.copy(), np.zeros_like(theta)
    for g in gradients:
        v = momentum * v - lr * g
        theta = theta + v
    return theta


def trajectory(theta, gradients, dtype, **options):
    p = Tensor(theta.astype(dtype), requires_grad=True)
    optimizer = SGD([p], **options)
    for g in gradients:
        p.grad = Tensor(g.astype(dtype))
        optimizer.step()
    return p, optimizer


def problem(shape, steps=60):
    rng = np.random.default_rng(1)
    return rng.normal(size=shape), [rng.normal(size=shape) for _ in range(steps)]


SETTINGS = [
    {
        "lr": 0.05,
        "momentum": mu,
        "dampening": tau,
        "weight_decay": decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    for mu, tau, decay, nesterov, maximize in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (0.0, 0.1), (False, True), (False, True)
    )
    if not nesterov or (mu and not tau)
]


@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("shape", [(), (6, 5), (0,), (130, 131)])
def test_trajectory_is_the_formula(options, shape):
    theta, gradients = problem(shape, steps=12 if np.prod(shape) > 1000 else 60)
    expected = formula(theta, gradients, **options)
    p, _ = trajectory(theta, gradients, np.float64, **options)
    np.testing.assert_allclose(p.data, expected, rtol=1e-12, atol=1e-12)
    p, optimizer = trajectory(theta, gradients, np.float32, **options)
    np.testing.assert_allclose(p.data, expected, rtol=3e-5, atol=3e-5)
    assert p.dtype == np.float32
    assert all(a.dtype == np.float32 for a in optimizer.state[p].values())


def test_with_a_constant_rate_momentum_is_sutskevers():
    theta, gradients = problem((20,))
    p, _ = trajectory(theta, gradients, np.float64, lr=0.03, momentum=0.9)
    expected = sutskever(theta, gradients, lr=0.03, momentum=0.9)
    np.testing.assert_allclose(p.data, expected, rtol=1e-12, atol=1e-12)


def test_nesterov_looks_ahead():
    """PyTorch's form is Nesterov's method seen at y = θ + μ v, where it takes gradients."""
    curvature = np.array([1.0, 10.0])
    theta, velocity, lr, mu = np.array([1.0, 1.0]), np.zeros(2), 0.05, 0.9
    p = Tensor(theta.copy(), requires_grad=True)
    optimizer = SGD([p], lr=lr, momentum=mu, nesterov=True)
    for _ in range(50):
        p.grad = Tensor(curvature * p.data)
        optimizer.step()
        velocity = mu * velocity - lr * curvature * (theta + mu * velocity)
        theta = theta + velocity
        np.testing.assert_allclose(p.data, theta + mu * velocity, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [backend.float16, backend.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_halves_follow_a_float32_master(dtype, momentum):
    theta, gradients = problem((150, 120), steps=10)
    theta = theta.astype(dtype).astype(np.float32)
    gradients = [g.astype(dtype).astype(np.float32) for g in gradients]
    options = {"lr": 1e-3, "momentum": momentum, "weight_decay": 0.1}
    half, optimizer = trajectory(theta, gradients, dtype, **options)
    full, _ = trajectory(theta, gradients, np.float32, **options)
    np.testing.assert_array_equal(optimizer.state[half]["master"], full.data)
    np.testing.assert_array_equal(half.data, full.data.astype(dtype))
    assert all(a.dtype == np.float32 for a in optimizer.state[half].values())


def test_without_momentum_nothing_is_kept():
    _, optimizer = trajectory(np.ones(3), [np.ones(3)], np.float32, lr=0.1)
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr must be at least 0, got -1"),
        ({"momentum": -0.5}, "momentum must be at least 0"),
        ({"weight_decay": -0.5}, "weight_decay must be at least 0"),
        ({"nesterov": True}, "nesterov needs momentum > 0 and dampening 0, got momentum=0.0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening=0.1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SGD([Tensor([1.0], requires_grad=True)], **options)
