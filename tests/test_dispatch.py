"""Which kernel runs an op: the switch, the table, the choice that a node keeps."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tinygrad_llm as tg
from tinygrad_llm import Tensor, backend, dispatch, ops
from tinygrad_llm.autograd import Function, mark_written
from tinygrad_llm.ops.samples import Sample, samples

# In one process of twenty, NumPy's OpenBLAS on an Intel processor says so of small matrices that
# are all finite, and of which the product is right. Values are compared here: NaN would be seen.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    assert dispatch.setting == "auto"


@pytest.fixture
def device() -> str:
    """Where kernels run in this process."""
    return "cuda" if dispatch._home() == "gpu" else "cpu"


def leaf(shape: tuple[int, ...], device: str = "cpu") -> Tensor:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return Tensor(values).to(device).detach().requires_grad_()


def kernel_of(y: Tensor) -> ModuleType | None:
    """The kernel file that the node of y keeps."""
    return getattr(node_of(y).kept, "kernel", None)


def node_of(y: Tensor) -> Function:
    assert isinstance(y.node, Function)
    return y.node


class OnGpu(SimpleNamespace):
    """As much of a CuPy array as `select` looks at."""

    def __init__(self, dtype: Any, *shape: int) -> None:
        super().__init__(dtype=np.dtype(dtype), shape=shape, ndim=len(shape))


# --- the switch -----------------------------------------------------------------------------------


def test_the_setting_holds_until_it_is_changed() -> None:
    for name in dispatch.SETTINGS:
        tg.use_kernels(name)
        assert dispatch.setting == name
    tg.use_kernels("auto")


def test_a_block_ends_with_what_was_before() -> None:
    with tg.use_kernels("reference"):
        with tg.use_kernels("triton"):
            assert dispatch.setting == "triton"
        assert dispatch.setting == "reference"
        with pytest.raises(ZeroDivisionError), tg.use_kernels("cublas"):
            raise ZeroDivisionError
        assert dispatch.setting == "reference"


def test_one_object_can_be_entered_again() -> None:
    with tg.use_kernels("reference") as _:
        pass
    block = tg.use_kernels("reference")
    with block:
        pass
    assert dispatch.setting == "auto"
    with tg.use_kernels("triton"):
        with block, block:
            assert dispatch.setting == "reference"
        assert dispatch.setting == "triton"


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="'auto', 'reference', 'triton', 'cublas', got 'cuda'"):
        tg.use_kernels("cuda")


def test_the_setting_is_the_processes() -> None:
    import threading

    seen = []
    with tg.use_kernels("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.setting))
        thread.start()
        thread.join()
    assert seen == ["reference"]


# --- the choice -----------------------------------------------------------------------------------


def test_numpy_arrays_run_on_the_reference_and_load_nothing() -> None:
    code = """
import sys
import tinygrad_llm as tg
x = tg.randn(2, 3).requires_grad_()
with tg.use_kernels("reference"):
    tg.ops.softmax(x).sum().backward()
tg.ops.softmax(x).sum().backward()
print(*sorted({"triton", "tinygrad_llm.kernels.mode"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("setting", ["auto", "triton", "cublas"])
def test_arrays_on_a_gpu_run_on_triton(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_home", lambda: "gpu")
    monkeypatch.setattr(dispatch, "_load", lambda module: ModuleType(module))
    with tg.use_kernels(setting):
        choice = dispatch.select("softmax", [OnGpu(np.float16, 3, 4)], {"axis": -1})
    assert choice.kernel == "triton"
    assert choice.module is not None
    assert choice.module.__name__ == "softmax"


def test_what_no_kernel_takes_runs_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_home", lambda: "gpu")
    choice = dispatch.select("softmax", [OnGpu(np.float64, 3, 4)], {})
    assert (choice.kernel, choice.module) == ("reference", None)
    assert choice.why == "the kernel needs: float32, float16 or bfloat16"
    with tg.use_kernels("reference"):
        assert dispatch.select("softmax", [OnGpu(np.float32, 3)], {}).kernel == "reference"


@pytest.mark.parametrize(
    ("op", "shapes", "why"),
    [
        ("softmax", [()], "an axis to go along"),
        ("cross_entropy", [(4, 0)], "at least one class"),
        ("attention", [(2, 5, 300), (2, 5, 300), (2, 5, 8)], "heads of at most 256"),
        ("attention", [(2, 5, 8), (2, 5, 8), (2, 5, 300)], "heads of at most 256"),
        ("attention", [(2, 3, 2, 5, 8)] * 3, "at most two leading axes, besides groups of heads"),
        ("attention", [(2, 3, 2, 5, 8), (2, 3, 1, 5, 8), (2, 3, 1, 5, 8)], ""),
    ],
)
def test_conditions(
    op: str, shapes: list[tuple[int, ...]], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_home", lambda: "gpu")
    monkeypatch.setattr(dispatch, "_load", lambda module: ModuleType(module))
    choice = dispatch.select(op, [OnGpu(np.float32, *shape) for shape in shapes], {})
    assert choice.kernel == ("reference" if why else "triton")
    assert choice.why.endswith(why or "takes it")


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_home", lambda: "")
    x = [OnGpu(np.float32, 3, 4)]
    assert dispatch.select("softmax", x, {}).kernel == "reference"
    with tg.use_kernels("triton"), pytest.raises(RuntimeError, match="Triton is not installed"):
        dispatch.select("softmax", x, {})


def test_arrays_that_kernels_cannot_reach_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with tg.use_kernels("triton"):
        monkeypatch.setattr(dispatch, "_home", lambda: "gpu")
        with pytest.raises(RuntimeError, match="TINYGRAD_LLM_KERNELS=interpret") as caught:
            ops.softmax(leaf((2, 3)))
        assert caught.value.__notes__ == ["in Softmax of float32(2, 3)"]
        monkeypatch.setattr(dispatch, "_home", lambda: "interpret")
        with pytest.raises(RuntimeError, match="TINYGRAD_LLM_KERNELS=gpu"):
            dispatch.select("softmax", [OnGpu(np.float32, 3)], {})


# --- Triton or cuBLAS -----------------------------------------------------------------------------


class Tuning(ModuleType):
    """A `kernels/tune.py` in which one library is known to be the faster, or nothing is known."""

    def __init__(self, faster: str | None) -> None:
        super().__init__("tune")
        self.faster, self.on = faster, True
        self.asked: list[tuple[Any, ...]] = []

    @contextlib.contextmanager
    def tuning(self, on: bool) -> Iterator[None]:
        before, self.on = self.on, on
        yield
        self.on = before

    def choose(
        self, kernel: Any, candidates: Any, sample: Any, sizes: Any, run: Any, **also: Any
    ) -> Any:
        self.asked.append((self.on, kernel.fn.__name__, sizes, also))
        return candidates[0] if self.faster is None else {"library": self.faster}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], Tuning]:
    """gpu(faster): kernels are for a GPU, where `faster` was found so by a measurement."""

    def set_up(faster: str | None) -> Tuning:
        tune, matmul = Tuning(faster), ModuleType("matmul")
        vars(matmul)["matmul"] = lambda a, b: None
        monkeypatch.setattr(dispatch, "_home", lambda: "gpu")
        monkeypatch.setattr(dispatch, "_load", lambda name: tune if name == "tune" else matmul)
        monkeypatch.setattr(dispatch, "_faster", {})
        return tune

    return set_up


X, W = OnGpu(np.float32, 2, 5, 3), OnGpu(np.float32, 7, 3)
HALVES = [OnGpu(backend.bfloat16, 2, 5, 3), OnGpu(backend.bfloat16, 2, 3, 7)]


def test_matrix_products_run_on_cublas(gpu: Callable[..., Tuning]) -> None:
    tune = gpu(None)
    for _ in range(2):
        choice = dispatch.select("linear", [X, W], {})
        assert (choice.kernel, choice.module) == ("cublas", None)
    assert len(tune.asked) == 1  # the answer is remembered
    on, _, sizes, also = tune.asked[0]
    assert not on  # nothing is measured on the way
    assert (sizes, also) == ((1, 10, 7, 3), {"op": "linear"})
    with tg.use_kernels("triton"):
        assert dispatch.select("linear", [X, W], {}).kernel == "triton"


def test_matrix_products_run_on_what_was_measured_to_be_faster(gpu: Callable[..., Tuning]) -> None:
    tune = gpu("triton")
    assert dispatch.select("linear", [X, W], {}).kernel == "triton"
    with tg.use_kernels("cublas"):
        assert dispatch.select("linear", [X, W], {}).kernel == "cublas"
    tune.faster = "cublas"
    assert dispatch.select("linear", [X, W], {}).kernel == "triton"
    assert dispatch.measure("linear", X, W) == "cublas"  # measured anew
    assert tune.asked[-1][0]
    assert dispatch.select("linear", [X, W], {}).kernel == "cublas"
    dispatch.measure("matmul", X, OnGpu(np.float32, 3, 7))
    assert tune.asked[-1][2] == (2, 5, 7, 3)
    with pytest.raises(ValueError, match="takes linear or matmul, got 'softmax'"):
        dispatch.measure("softmax", X, W)


def test_products_that_cupy_lacks_run_on_triton(gpu: Callable[..., Tuning]) -> None:
    tune = gpu(None)
    assert dispatch.select("matmul", HALVES, {}).kernel == "triton"
    assert not tune.asked
    flat = [OnGpu(backend.bfloat16, 5, 3), OnGpu(backend.bfloat16, 3, 7)]
    assert dispatch.select("matmul", flat, {}).kernel == "cublas"
    with (
        tg.use_kernels("cublas"),
        pytest.raises(RuntimeError, match="no batched product of bfloat16"),
    ):
        dispatch.select("matmul", HALVES, {})


def test_cublas_refuses_numpy_arrays() -> None:
    with tg.use_kernels("cublas"):
        with pytest.raises(RuntimeError, match="works on a GPU's memory"):
            ops.matmul(leaf((2, 3)), leaf((3, 2)))
        assert kernel_of(ops.softmax(leaf((2, 3)))) is None


# --- the node keeps it ----------------------------------------------------------------------------


@needs_triton
def test_the_backward_runs_on_the_kernel_of_the_forward(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinygrad_llm.kernels import softmax

    calls = []
    original = softmax.backward
    monkeypatch.setattr(
        softmax, "backward", lambda *a, **kw: calls.append("kernel") or original(*a, **kw)
    )
    x = leaf((3, 5), device)
    with tg.use_kernels("triton"):
        y = ops.softmax(x)
    assert kernel_of(y) is softmax
    with tg.use_kernels("reference"):
        (y * y).sum().backward()
        assert calls == ["kernel"]
        y = ops.softmax(x)
    assert kernel_of(y) is None
    with tg.use_kernels("triton"):
        (y * y).sum().backward()
    assert calls == ["kernel"]


@needs_triton
@pytest.mark.parametrize("half", ["forward", "backward"])
def test_a_kernel_that_fails_raises(
    half: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinygrad_llm.kernels import softmax

    def broken(*args: Any, **options: Any) -> Any:
        raise FloatingPointError("out of registers")

    monkeypatch.setattr(softmax, half, broken)
    with tg.use_kernels("triton"), pytest.raises(FloatingPointError, match="out of registers"):
        ops.softmax(leaf((3, 5), device)).sum().backward()


@needs_triton
def test_what_was_saved_goes_with_the_backward(device: str) -> None:
    x = leaf((3, 5), device)
    with tg.use_kernels("triton"):
        y = ops.softmax(x)
    array, loss = weakref.ref(y.data), (y * 2.0).sum()
    node = node_of(y)
    del y
    assert array() is not None
    loss.backward()
    gc.collect()  # Triton's interpreter leaves cycles behind
    assert array() is None
    assert node.kept is None
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("kernels", ["reference", pytest.param("triton", marks=needs_triton)])
def test_what_was_saved_is_gone_when_the_next_node_runs(kernels: str, device: str) -> None:
    seen = []

    class Probe(Function):
        """y = x"""

        def forward(self, x: Any) -> Any:
            return x

        def backward(self, g: Any) -> Any:
            gc.collect()
            seen.append(array())
            return g

    with tg.use_kernels(kernels):
        y = ops.softmax(Probe.apply(leaf((3, 5), device)))
        array, loss = weakref.ref(y.data), y.sum()
    del y
    loss.backward()
    assert seen == [None]


def test_arrays_that_are_not_numpys_are_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def select(*call: Any) -> dispatch.Choice:
        asked.append(call)
        return dispatch.Choice("reference", None, "")

    class Same(Function):
        """y = x"""

        kernel = "softmax"

        def forward(self, x: Any, axis: int) -> Any:
            return x

    monkeypatch.setattr(dispatch, "select", select)
    x = leaf((2, 3))
    Same.apply(x, axis=0)
    assert not asked
    x.data = array = OnGpu(np.float32, 2, 3)
    Same.apply(x, axis=0)
    assert asked == [("softmax", [array], {"axis": 0})]


@needs_triton
def test_an_overwritten_array_is_noticed(device: str) -> None:
    with tg.use_kernels("triton"):
        y = ops.softmax(leaf((3, 5), device))
    z = y.sum()
    y.data[0] = 0.0
    mark_written(y.data, "the test")
    with pytest.raises(RuntimeError, match="which the test has overwritten"):
        z.backward()


@needs_triton
def test_a_checkpointed_call_runs_again_on_either(device: str) -> None:
    """What the second run saved is read by the kernel of the second run."""
    gradients = []
    for first, second in (("reference", "triton"), ("triton", "reference")):
        x = leaf((3, 5), device)
        with tg.use_kernels(first):
            y = tg.checkpoint(lambda x: ops.softmax(x * 2.0) * x, x)
        with tg.use_kernels(second):
            y.sum().backward()
        assert x.grad is not None
        gradients.append(x.grad.numpy())
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


# --- the table ------------------------------------------------------------------------------------

OPS = {op.kernel: op for op in samples() if op.kernel}
NO_OPS = {"gradient_norm", "adamw"}  # rows that optim asks for


def test_table_and_ops_know_each_other() -> None:
    assert {rule.op for rule in dispatch.TABLE} == set(OPS) | NO_OPS
    folder = Path(dispatch.__file__).parent / "kernels"
    for rule in dispatch.TABLE:
        assert (folder / f"{rule.module}.py").is_file()
    for op in OPS.values():
        assert op.forward_kernel is not Function.forward_kernel
        assert op.backward_kernel is not Function.backward_kernel


def test_the_table_as_text() -> None:
    text = dispatch.table()
    assert text == dispatch.explain()
    for rule in dispatch.TABLE:
        assert f"kernels/{rule.module}.py" in text
    assert "use_kernels('auto'); kernels: " in text


def test_explain_says_what_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x = leaf((2, 3))
    assert dispatch.explain("softmax", x, axis=-1) == (
        "softmax of float32(2, 3) on cpu with use_kernels('auto'): reference "
        "(NumPy arrays: kernels are for the GPU)"
    )
    monkeypatch.setattr(dispatch, "_home", lambda: "gpu")
    with tg.use_kernels("triton"):
        assert "float64(2, 3) on cpu with use_kernels('triton'): reference (the kernel needs: " in (
            dispatch.explain("softmax", np.zeros((2, 3)))
        )
        assert ": refused. use_kernels('triton'): kernels run on the GPU" in (
            dispatch.explain("softmax", x)
        )
    with pytest.raises(ValueError, match=r"softmax.*got 'softmacks' and 1 arrays"):
        dispatch.explain("softmacks", x)


# --- every op on its kernel -----------------------------------------------------------------------

CASES = {
    f"{op.__name__}: {sample.note}": (op, sample)
    for op, found in samples().items()
    if op.kernel
    for sample in found
}


ON_THE_REFERENCE: set[str] = set()  # samples that a condition of the table keeps away


def run(
    sample: Sample, kernels: str, dtype: Any, device: str
) -> tuple[list[np.ndarray], list[ModuleType | None]]:
    """The output and its gradients in float64, and the kernels that the graph's nodes keep."""
    tg.manual_seed(0)
    with tg.use_kernels(kernels):
        inputs = [Tensor(a.astype(dtype) if a.dtype.kind == "f" else a) for a in sample.arrays]
        inputs = [x.to(device) for x in inputs]
        leaves = [x.detach().requires_grad_() for x in inputs if backend.is_float(x.dtype)]
        of_leaf = iter(leaves)
        y = sample.function(*[next(of_leaf) if backend.is_float(x.dtype) else x for x in inputs])
        kept = [getattr(node.kept, "kernel", None) for node in nodes_of(y) if node.kernel]
        found = [y]
        if y.requires_grad:
            start = Tensor(np.random.default_rng(0).normal(size=y.shape).astype(dtype)).to(device)
            gradients = tg.grad(y, leaves, start, allow_unused=True)
            found += [g for g in gradients if g is not None]
    return [x.to("cpu").numpy().astype(np.float64) for x in found], kept


def nodes_of(y: Tensor) -> list[Function]:
    nodes: list[Any] = [y.node] if y.node else []
    for node in nodes:
        nodes += [p for p in node.parents if p is not None and p not in nodes]
    return [node for node in nodes if isinstance(node, Function)]


@needs_triton
@pytest.mark.parametrize("name", OPS)
def test_kernels_give_half_precision_too(name: str, device: str) -> None:
    sample = samples()[OPS[name]][0]
    arrays = [
        a.astype(np.float16).astype(a.dtype) if a.dtype.kind == "f" else a for a in sample.arrays
    ]
    rounded = Sample(sample.note, sample.function, tuple(arrays))
    expected, _ = run(rounded, "reference", np.float32, device)
    got, _ = run(rounded, "triton", np.float16, device)
    for a, b in zip(got, expected, strict=True):
        finite = np.abs(b[np.isfinite(b)])
        scale = max(1.0, finite.max()) if finite.size else 1.0
        np.testing.assert_allclose(a, b, rtol=0.01, atol=0.01 * scale)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_kernels_give_what_the_reference_gives(name: str, device: str) -> None:
    op, sample = CASES[name]
    expected, none = run(sample, "reference", np.float32, device)
    got, kept = run(sample, "triton", np.float32, device)
    assert not any(none)
    file = {rule.op: rule.module for rule in dispatch.TABLE}[op.kernel]
    if name not in ON_THE_REFERENCE:
        assert f"tinygrad_llm.kernels.{file}" in [k.__name__ for k in kept if k is not None]
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@needs_triton
def test_the_padding_row_of_an_embedding_gets_no_gradient(device: str) -> None:
    w = leaf((4, 3), device)
    with tg.use_kernels("triton"):
        y = ops.embedding(Tensor(np.array([1, 2, 1])).to(device), w, padding_idx=1)
    assert kernel_of(y) is not None
    y.sum().backward()
    assert w.grad is not None
    np.testing.assert_array_equal(w.grad.to("cpu").numpy()[:, 0], [0, 0, 1, 0])


# One of each op; attention also with what its second order has to find again.
TWICE = {
    name: sample
    for i, (name, (op, sample)) in enumerate(CASES.items())
    if op not in [earlier for earlier, _ in list(CASES.values())[:i]]
    or name in ("Attention: additive mask", "Attention: dropout")
}


@needs_triton
@pytest.mark.parametrize("name", TWICE)
def test_second_order_is_the_references(name: str, device: str) -> None:
    sample = TWICE[name]
    found = []
    for kernels in ("reference", "triton"):
        tg.manual_seed(0)
        with tg.use_kernels(kernels):
            leaves = [
                Tensor(a.astype(np.float32)).to(device).detach().requires_grad_()
                for a in sample.arrays
                if a.dtype.kind == "f"
            ]
            of_leaf = iter(leaves)
            y = sample.function(
                *[
                    next(of_leaf) if a.dtype.kind == "f" else Tensor(a).to(device)
                    for a in sample.arrays
                ]
            )
            first = tg.grad((y * y).sum(), leaves, create_graph=True)
            second = tg.grad([(g * g).sum() for g in first], leaves)
            found.append([x.to("cpu").numpy() for x in (*first, *second)])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
