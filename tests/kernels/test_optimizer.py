"""The multi-tensor AdamW and the gradient norm against float64 and against optim/."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tinygrad_llm import Tensor, optim
from tinygrad_llm.backend import to_device
from tinygrad_llm.kernels import optimizer

# Blocks that hold a small array whole, and of which a larger one needs several.
SMALL = {"BLOCK": 32, "num_warps": 1}
HALVES = pytest.mark.parametrize("half", [np.float16, "bfloat16"])

# Nothing, one number, less than a block, just a block, one more, several; multiples of 16 or not.
SHAPES = [(0,), (), (1,), (3, 5), (4, 8), (33,), (2, 3, 16), (16,), (5, 13)]


class Step:
    """Parameters with all that a step of AdamW takes, at some point of a training."""

    def __init__(self, array, rng, dtype, shapes=SHAPES, masters=False, place=None, gradient=None):
        place = place or (lambda a: a)

        def arrays(dtype, values=rng.normal):
            return [place(array(values(size=shape), dtype)) for shape in shapes]

        self.parameters = arrays(dtype)
        self.gradients = arrays(gradient or dtype)
        self.first = arrays(np.float32)
        self.second = arrays(np.float32, rng.random)
        self.masters: Any = arrays(np.float32) if masters else None

    def run(self, **options) -> None:
        optimizer.adamw(
            *(self.parameters, self.gradients, self.first, self.second, self.masters), **options
        )


def expected(
    step, wide, *, t, lr, betas=(0.9, 0.999), eps=1e-8, decay: Any = 0.01, share=1.0
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(θ, m, v) of each parameter after the step, in float64."""
    decays = decay if isinstance(decay, list) else [decay] * len(step.parameters)
    weights = step.parameters if step.masters is None else step.masters
    given = [map(wide, arrays) for arrays in (weights, step.gradients, step.first, step.second)]
    found = []
    for theta, g, m, v, own in zip(*given, decays, strict=True):
        m = betas[0] * m + (1 - betas[0]) * share * g
        v = betas[1] * v + (1 - betas[1]) * (share * g) ** 2
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        found.append((theta * (1 - lr * own) - lr * m_hat / (np.sqrt(v_hat) + eps), m, v))
    return found


def check(step, wanted, close) -> None:
    for i, (theta, m, v) in enumerate(wanted):
        close(step.parameters[i], theta)
        close(step.first[i], m)
        close(step.second[i], v)
        if step.masters is not None:
            close(step.masters[i], theta)


@pytest.mark.parametrize("config", [SMALL, None], ids=["small blocks", "the usual blocks"])
def test_the_formula(config, dtype, rng, array, close, wide) -> None:
    step = Step(array, rng, dtype)
    wanted = expected(step, wide, t=3, lr=0.1)
    step.run(step=3, lr=0.1, config=config)
    check(step, wanted, close)


@HALVES
def test_master_weights(half, rng, array, close, wide) -> None:
    """They are what is updated; the parameter is their rounded copy and is not read."""
    dtype = array([0.0], np.float32).astype(half).dtype
    step = Step(array, rng, dtype, masters=True)
    wanted = expected(step, wide, t=7, lr=0.1)
    step.parameters[5][...] = math.nan
    step.run(step=7, lr=0.1, config=SMALL)
    check(step, wanted, close)
    for p, master in zip(step.parameters, step.masters, strict=True):
        np.testing.assert_array_equal(wide(p), wide(master.astype(dtype)))


@HALVES
def test_a_master_weight_keeps_what_its_half_forgets(half, array, wide) -> None:
    one = array([1.0], np.float32)
    parameter, master = one.astype(half), one.copy()
    m, v = [array([0.0], np.float32)], [array([0.0], np.float32)]
    for t in range(1, 5):
        optimizer.adamw([parameter], [one], m, v, [master], step=t, lr=1e-5)
    assert wide(parameter) == 1
    np.testing.assert_allclose(wide(master), 1 - 4e-5, rtol=1e-6)


def test_a_decay_for_each_parameter(rng, array, close, wide) -> None:
    step = Step(array, rng, np.float32)
    decay = [0.1 * i for i in range(len(SHAPES))]
    options = {"lr": 0.5, "betas": (0.8, 0.95), "eps": 1e-3}
    wanted = expected(step, wide, t=1, decay=decay, **options)
    step.run(step=1, weight_decay=decay, config=SMALL, **options)
    check(step, wanted, close)


def test_any_strides(layout, dtype, rng, array, close, wide) -> None:
    """Gradients may be broadcast; what is written must be memory of its own."""
    step = Step(array, rng, dtype, [(4, 3, 5), (6, 7)], place=layout)
    for arrays in (step.parameters, step.first, step.second):
        arrays[:] = [a if all(a.strides) else a.copy() for a in arrays]
    places = [[id(a) for a in of] for of in (step.parameters, step.first, step.second)]
    wanted = expected(step, wide, t=2, lr=0.1)
    step.run(step=2, lr=0.1, config=SMALL)
    check(step, wanted, close)
    assert places == [[id(a) for a in of] for of in (step.parameters, step.first, step.second)]


def test_other_dtypes_for_gradients_and_mixed_ones(rng, array, close, wide) -> None:
    steps = [
        Step(array, rng, np.float32, [(40,), (5,)], gradient=np.float16),
        Step(array, rng, np.float16, [(7,), (3, 16)], gradient=np.float32, masters=True),
        Step(array, rng, np.float16, [(9,)]),
    ]
    wanted = [values for step in steps for values in expected(step, wide, t=2, lr=0.1)]
    masters = [None, None, *steps[1].masters, None]
    names = ("parameters", "gradients", "first", "second")
    lists: Any = [[a for step in steps for a in getattr(step, name)] for name in names]
    lists.append(masters)
    optimizer.adamw(*lists, step=2, lr=0.1, config=SMALL)
    for i, (theta, m, v) in enumerate(wanted):
        close(lists[0][i], theta)
        close(lists[2][i], m)
        close(lists[3][i], v)
        if masters[i] is not None:
            close(masters[i], theta)


def test_a_training_as_optim_has_it(rng, array) -> None:
    """Five steps with clipping, a changing lr and two groups: the numbers of the NumPy path."""
    values = [rng.normal(size=shape).astype(np.float32) for shape in [(7, 5), (5,), (48,)]]
    tensors = [Tensor(v.copy(), requires_grad=True) for v in values]
    groups = [{"params": tensors[:1], "weight_decay": 0.1}, {"params": tensors[1:]}]
    reference = optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    ours, moments = [array(v) for v in values], [[array(0 * v) for v in values] for _ in range(2)]
    for t in range(1, 6):
        gradients = [rng.normal(size=v.shape).astype(np.float32) for v in values]
        for tensor, g in zip(tensors, gradients, strict=True):
            tensor.grad = Tensor(g.copy())
        total = optim.clip_grad_norm_(tensors, 3.0 * t)
        for group in reference.param_groups:
            group["lr"] = 0.1 / t
        reference.step()
        here = [array(g) for g in gradients]
        norm = optimizer.gradient_norm(here, config=SMALL)
        np.testing.assert_allclose(to_device(norm, "cpu"), total, rtol=1e-6)
        options = {"lr": 0.1 / t, "betas": (0.9, 0.95), "weight_decay": [0.1, 0.0, 0.0]}
        optimizer.adamw(
            *(ours, here, *moments), step=t, norm=norm, max_norm=3.0 * t, config=SMALL, **options
        )
    for mine, tensor in zip(ours, tensors, strict=True):
        np.testing.assert_allclose(to_device(mine, "cpu"), tensor.data, rtol=2e-6, atol=1e-7)


# --- norm and clipping ----------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, None], ids=["small blocks", "the usual blocks"])
def test_the_norm(config, dtype, rng, array, wide) -> None:
    gradients = [array(rng.normal(size=shape), dtype) for shape in SHAPES]
    gradients.append(array(rng.normal(size=40), np.float32))
    norm = optimizer.gradient_norm(gradients, scale=-0.5, config=config)
    assert norm.shape == (1,)
    assert norm.dtype == np.float32
    long = np.concatenate([wide(g).reshape(-1) for g in gradients])
    np.testing.assert_allclose(wide(norm), [0.5 * np.linalg.norm(long)], rtol=2e-7)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e25, 1e37])
def test_norms_whose_squares_leave_float32(size, array, wide) -> None:
    gradients = [array([3 * size, 0.0], np.float32), array([4 * size], np.float32)]
    np.testing.assert_allclose(wide(optimizer.gradient_norm(gradients)), [5 * size], rtol=3e-7)


def test_norms_of_nothing(array, wide) -> None:
    assert wide(optimizer.gradient_norm([array(np.ones((0, 3)), np.float32)])) == 0
    with pytest.raises(ValueError, match="at least one gradient"):
        optimizer.gradient_norm([])


def test_more_partial_sums_than_the_last_program_takes_at_once(array, wide, monkeypatch) -> None:
    launched = optimizer.launch

    def fewer(*args, BLOCK, **options):
        launched(*args, BLOCK=min(4, BLOCK), **options)

    monkeypatch.setattr(optimizer, "launch", fewer)
    norm = optimizer.gradient_norm([array(np.ones(36), np.float32)], config={"BLOCK": 4})
    assert wide(norm) == 6


def test_strided_gradients_have_norms(layout, dtype, rng, array, wide) -> None:
    g = layout(array(rng.normal(size=(6, 7)), dtype))
    norm = optimizer.gradient_norm([g], config=SMALL)
    np.testing.assert_allclose(wide(norm), [np.linalg.norm(wide(g))], rtol=2e-7)


@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1e6, None])
def test_clipping(max_norm, dtype, rng, array, close, wide) -> None:
    """To less than the norm, to more, and not at all."""
    step = Step(array, rng, dtype)
    scale = 1 / 8
    norm = optimizer.gradient_norm(step.gradients, scale=scale, config=SMALL)
    share = scale if max_norm is None else scale * min(1, max_norm / (wide(norm)[0] + 1e-6))
    wanted = expected(step, wide, t=4, lr=0.1, share=share)
    step.run(step=4, lr=0.1, scale=scale, max_norm=max_norm, norm=norm, config=SMALL)
    check(step, wanted, close)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_is_written_after_a_bad_gradient(bad, dtype, rng, array, wide) -> None:
    step = Step(array, rng, dtype, masters=dtype != np.float32)
    step.gradients[5][7] = bad
    lists = (step.parameters, step.first, step.second, step.masters or [])
    before = [wide(a).copy() for arrays in lists for a in arrays]
    norm = optimizer.gradient_norm(step.gradients)
    assert not np.isfinite(wide(norm)).any()
    step.run(step=1, lr=0.1, max_norm=1.0, norm=norm, config=SMALL)
    for a, b in zip([a for arrays in lists for a in arrays], before, strict=True):
        np.testing.assert_array_equal(wide(a), b)


# --- one launch -----------------------------------------------------------------------------------


def test_one_launch_for_all_parameters(rng, array, monkeypatch) -> None:
    launches = []
    monkeypatch.setattr(optimizer, "launch", lambda kernel, *a, **k: launches.append(kernel))
    Step(array, rng, np.float32, [(16,)] * 50).run(step=1, lr=0.1)
    assert len(launches) == 1
    Step(array, rng, np.float32, [(16,)] * 50 + [(3,)] * 50).run(step=1, lr=0.1)
    assert len(launches) == 3  # those of odd sizes in one of their own


def test_the_table_is_found_again_and_made_anew(rng, array, close, wide) -> None:
    step = Step(array, rng, np.float32, [(40,), (3, 5)])
    made = optimizer._addresses.cache_info().misses
    for t in (1, 2):
        wanted = expected(step, wide, t=t, lr=0.1)
        step.run(step=t, lr=0.1, config=SMALL)
        check(step, wanted, close)
    assert optimizer._addresses.cache_info().misses == made + 1


def test_other_gradients_make_another_table(rng, array, close, wide) -> None:
    step = Step(array, rng, np.float32, [(40,)])
    step.run(step=1, lr=0.1, config=SMALL)
    step.gradients = [array(rng.normal(size=40), np.float32)]
    wanted = expected(step, wide, t=2, lr=0.1)
    step.run(step=2, lr=0.1, config=SMALL)
    check(step, wanted, close)


def test_addresses_that_16_does_not_divide(rng, array, close, wide) -> None:
    step = Step(array, rng, np.float32, [(33,), (17,)])
    for arrays in (step.parameters, step.gradients, step.first, step.second):
        arrays[:] = [a[1:] for a in arrays]
    wanted = expected(step, wide, t=1, lr=0.1)
    step.run(step=1, lr=0.1, config=SMALL)
    check(step, wanted, close)


def test_numbers_from_memory(rng, array, close, wide) -> None:
    """As a CUDA graph needs them: those of the call are not used."""
    step = Step(array, rng, np.float32)
    wanted = expected(step, wide, t=9, lr=0.3, eps=1e-2)
    numbers = array(optimizer.step_numbers(9, 0.3, eps=1e-2))
    step.run(step=1, lr=100.0, numbers=numbers, config=SMALL)
    check(step, wanted, close)


def test_what_is_refused(rng, array) -> None:
    step = Step(array, rng, np.float32, [(2, 3), (4,)])
    lists: Any = [step.parameters, step.gradients, step.first, step.second]
    with pytest.raises(ValueError, match="steps from 1"):
        step.run(step=0, lr=0.1)
    with pytest.raises(ValueError, match="pass it as norm"):
        step.run(step=1, lr=0.1, max_norm=1.0)
    with pytest.raises(ValueError, match="got 1, 2, 2, 2, 2"):
        optimizer.adamw(step.parameters, step.gradients[:1], *lists[2:], step=1, lr=0.1)
    with pytest.raises(ValueError, match=r"parameter 1 has the shape \(4,\)"):
        optimizer.adamw(lists[0], [step.gradients[0]] * 2, *lists[2:], step=1, lr=0.1)
    halves: Any = [*lists[:2], [a.astype(np.float16) for a in step.first], step.second]
    with pytest.raises(TypeError, match="in float32, got float16"):
        optimizer.adamw(*halves, step=1, lr=0.1)
    with pytest.raises(TypeError, match="got float64"):
        optimizer.gradient_norm([step.gradients[0].astype(np.float64)])
