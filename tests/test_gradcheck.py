"""Every op's gradient is its derivative; and the check itself notices when one is not."""

import numpy as np
import pytest

import tinygrad_llm as tg
from tinygrad_llm import Tensor
from tinygrad_llm.autograd import Function
from tinygrad_llm.gradcheck import GradcheckError, check_all, check_op, gradcheck, layouts
from tinygrad_llm.ops.elementwise import Binary
from tinygrad_llm.ops.samples import Sample, samples

SAMPLES = samples()


def all_ops(base: type[Function] = Function) -> set[type[Function]]:
    """Every subclass of Function in the package that computes something."""
    found = set()
    for op in base.__subclasses__():
        if op.__module__.startswith("tinygrad_llm.") and "forward" in vars(op):
            found.add(op)
        found |= all_ops(op)
    return found


@pytest.mark.parametrize("op", SAMPLES, ids=lambda op: op.__name__)
def test_the_gradient_is_the_derivative(op: type[Function]) -> None:
    report = check_op(op, SAMPLES[op])
    assert report.ok, report.message
    assert report.first < 1e-6
    assert report.second is not None
    assert report.second < 1e-6


def test_every_op_brings_samples() -> None:
    assert all_ops() == set(SAMPLES)


@pytest.mark.parametrize("op", SAMPLES, ids=lambda op: op.__name__)
def test_every_op_brings_the_cases_that_break_others(op: type[Function]) -> None:
    arrays = [a for sample in SAMPLES[op] for a in sample.arrays]
    assert any(a.size == 0 for a in arrays), "an empty array"
    assert any(a.ndim >= 2 and min(a.shape) > 1 for a in arrays) or op.__name__ == "SetItem"
    if issubclass(op, Binary):
        shapes = [tuple(a.shape for a in s.arrays) for s in SAMPLES[op] if len(s.arrays) == 2]
        assert any(a != b for a, b in shapes), "broadcasting"


@pytest.mark.parametrize("op", SAMPLES, ids=lambda op: op.__name__)
def test_samples_run_the_op_they_are_for(op: type[Function]) -> None:
    def runs_op(sample: Sample) -> bool:
        leaves = [Tensor(a, requires_grad=a.dtype.kind == "f") for a in sample.arrays]
        pending = [sample.function(*leaves).node]
        while pending:
            node = pending.pop()
            if type(node) is op:
                return True
            pending += [p for p in (node.parents if node else ()) if p is not None]
        return False

    ran = [runs_op(sample) or op.__name__ == "PutAt" for sample in SAMPLES[op]]
    assert all(ran)


@pytest.mark.parametrize("op", SAMPLES, ids=lambda op: op.__name__)
def test_gradients_from_a_sum_equal_gradients_from_ones(op: type[Function]) -> None:
    # sum() hands a read-only gradient of stride 0 to the op before it.
    for sample in SAMPLES[op]:
        results = []
        for whole in (True, False):
            inputs = [Tensor(a.copy(), requires_grad=a.dtype.kind == "f") for a in sample.arrays]
            y = sample.function(*inputs)
            if whole:
                y.sum().backward()
            else:
                y.backward(Tensor(np.ones(y.shape)))
            results.append([x.grad for x in inputs])
        for a, b in zip(*results, strict=True):
            if a is not None and b is not None:
                np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", SAMPLES, ids=lambda op: op.__name__)
def test_float32_stays_float32(op: type[Function]) -> None:
    # Forward and backward in float32, to float32's accuracy, with no float64 on the way.
    if op.__name__ == "Cast":  # its samples convert to float64
        return
    for sample in SAMPLES[op]:
        results = []
        for dtype in (np.float64, np.float32):
            inputs = [
                Tensor(a.astype(dtype) if a.dtype.kind == "f" else a, requires_grad=True)
                for a in sample.arrays
            ]
            tg.manual_seed(0)
            y = sample.function(*inputs)
            assert y.dtype == dtype, sample.note
            seen: list[np.dtype] = []
            pending, known = [y.node], set()
            while pending:
                node = pending.pop()
                if node is None or node in known:
                    continue
                known.add(node)
                node.hooks = [lambda g, seen=seen: seen.append(g.dtype)]
                pending += node.parents
            y.sum().backward()
            assert set(seen) <= {np.dtype(dtype)}, sample.note
            results.append([y, *[x.grad for x in inputs]])
        for exact, single in zip(*results, strict=True):
            if exact is not None and single is not None:
                with np.errstate(invalid="ignore"):
                    scale = max(1.0, float(np.abs(exact.numpy()).max(initial=0.0)))
                np.testing.assert_allclose(single.numpy(), exact.numpy(), atol=2e-5 * scale)


@pytest.mark.parametrize("op", SAMPLES, ids=lambda op: op.__name__)
def test_backward_writes_into_nothing_that_others_hold(op: type[Function]) -> None:
    for sample in SAMPLES[op]:
        inputs = [Tensor(a.copy(), requires_grad=a.dtype.kind == "f") for a in sample.arrays]
        y = sample.function(*inputs)
        seed = np.random.default_rng(0).normal(size=y.shape)
        before = [seed.copy(), y.numpy().copy(), *[x.numpy().copy() for x in inputs]]
        y.backward(Tensor(seed), retain_graph=True)
        after = [seed, y.numpy(), *[x.numpy() for x in inputs]]
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=sample.note)
        first = [None if x.grad is None else x.grad.numpy().copy() for x in inputs]
        for x in inputs:
            x.grad = None
        y.backward(Tensor(seed))  # what was saved is as it was
        for a, x in zip(first, inputs, strict=True):
            if a is not None and x.grad is not None:
                np.testing.assert_array_equal(a, x.grad.numpy(), err_msg=sample.note)


# --- the check notices ----------------------------------------------------------------------------


class WrongElement(Function):
    """y = x²        dx = 2 g x, but wrong at (1, 2)"""

    def forward(self, x: np.ndarray) -> np.ndarray:
        self.save(x)
        return x * x

    def backward(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        dx = g * x * 2.0
        if isinstance(dx, np.ndarray):
            dx[1, 2] += 0.01
        return dx


class WrongSecondOrder(Function):
    """y = x³        dx = 3 g x², taken as constant in x"""

    def forward(self, x: np.ndarray) -> np.ndarray:
        self.slope = 3.0 * x * x
        return x * x * x

    def backward(self, g: np.ndarray) -> np.ndarray:
        return g * self.slope


def test_a_wrong_element_is_found_and_named() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3))
    with pytest.raises(
        GradcheckError,
        match=r"square, first order: argument 1 of shape \(2, 3\), index \(1, 2\), got .*expected",
    ):
        gradcheck(lambda w, x: w * WrongElement.apply(x), x + 1.0, x, name="square")


def test_the_message_has_the_numbers() -> None:
    x = np.zeros((2, 3))
    with pytest.raises(GradcheckError) as caught:
        gradcheck(WrongElement.apply, x, order=1)
    message = str(caught.value)
    assert "argument 0 of shape (2, 3), index (1, 2), got 0.01, expected 0," in message
    assert "derivative of the output's element (0, 0)" in message


def test_a_wrong_second_order_is_found() -> None:
    x = np.random.default_rng(0).normal(size=3)
    assert gradcheck(WrongSecondOrder.apply, x, order=1) < 1e-8
    with pytest.raises(GradcheckError, match="second order"):
        gradcheck(WrongSecondOrder.apply, x)


def test_a_wrong_shape_and_a_missing_gradient_are_found() -> None:
    class Flat(Function):
        def forward(self, x: np.ndarray) -> np.ndarray:
            return x.reshape(-1) * 1.0

        def backward(self, g: np.ndarray) -> np.ndarray:
            return g

    with pytest.raises(GradcheckError, match=r"has shape \(6,\), expected \(2, 3\)"):
        gradcheck(Flat.apply, np.ones((2, 3)))
    with pytest.raises(GradcheckError, match=r"index \(0,\), got 3, expected 6.* element \(0,\)"):
        gradcheck(lambda x: x.detach() * x, np.full(2, 3.0), order=1)
    with pytest.raises(GradcheckError, match=r"argument 1 .* got 0, expected"):
        gradcheck(lambda x, w: x * w.detach(), np.full(2, 3.0), np.full(2, 3.0), order=1)


def test_nan_is_no_agreement() -> None:
    class Bad(Function):
        def forward(self, x: np.ndarray) -> np.ndarray:
            return x * 1.0

        def backward(self, g: np.ndarray) -> np.ndarray:
            return g * np.nan

    with pytest.raises(GradcheckError):
        gradcheck(Bad.apply, np.ones(3))


def test_what_cannot_be_checked_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the 1 inputs is of floats"):
        gradcheck(lambda x: x * 2, np.array([1, 2]))
    with pytest.raises(TypeError, match=r"returns a Tensor, got 3\.0"):
        gradcheck(lambda x: x.sum().item(), np.array([1.0, 2.0]))


def test_integers_and_tensors_as_inputs() -> None:
    assert gradcheck(lambda x, i: x[i].tanh(), Tensor([1.0, 2.0, 3.0]), np.array([0, 0, 2])) < 1e-6


def test_reports() -> None:
    reports = list(check_all(["Add", "Softmax"]))
    assert [r.name for r in reports] == ["Add", "Softmax"]
    assert all(r.ok and r.samples > 3 and r.refusal is None for r in reports)
    with pytest.raises(ValueError, match="no op is called Sofmax"):
        list(check_all(["Sofmax"]))
    x = np.random.default_rng(0).normal(size=(2, 3))
    failed = check_op(WrongElement, [Sample("plain", WrongElement.apply, (x,))])
    assert not failed.ok
    assert "index (1, 2)" in failed.message


def test_layouts_have_the_values_and_other_strides() -> None:
    x = np.arange(12.0).reshape(3, 4)
    found = {name: arrays[0] for name, arrays in layouts([x])}
    for array in found.values():
        np.testing.assert_array_equal(array, x)
    assert found["transposed"].strides == (8, 24)
    assert found["strided"].strides == (64, -16)


@pytest.mark.parametrize("op", SAMPLES, ids=lambda op: op.__name__)
def test_one_input_alone_gets_the_gradient_it_gets_with_the_others(op: type[Function]) -> None:
    # Where an input needs no gradient, forward saves less and backward takes other branches.
    for sample in SAMPLES[op]:
        floats = [i for i, a in enumerate(sample.arrays) if a.dtype.kind == "f"]
        together = _gradients_of(sample, set(floats), whole=True)
        for i in floats:
            for how in ({"whole": True}, {"create_graph": True}, {"checkpointed": True}):
                alone = _gradients_of(sample, {i}, **how)
                a, b = alone[i], together[i]
                if a is not None and b is not None:
                    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
                else:
                    assert a is b is None


def _gradients_of(
    sample: Sample,
    wanted: set[int],
    whole: bool = False,
    create_graph: bool = False,
    checkpointed: bool = False,
) -> list[np.ndarray | None]:
    inputs = [Tensor(a, requires_grad=i in wanted) for i, a in enumerate(sample.arrays)]
    y = tg.checkpoint(sample.function, *inputs) if checkpointed else sample.function(*inputs)
    seed = Tensor(np.random.default_rng(0).normal(size=y.shape))
    y.backward(seed, create_graph=create_graph)
    return [None if x.grad is None else x.grad.numpy() for x in inputs]
