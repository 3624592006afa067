"""Which kernel runs an op: one table, one function that reads it, one switch.

An op names its row (`Function.kernel = "softmax"`). When it runs, `select` picks once, by device,
dtype and shape, and the node keeps the choice, so that its backward runs on the same kernel. The
optimisers ask for their rows by name, at every step.

        use_kernels(…)      NumPy arrays                       CuPy arrays
        "auto" (default)    reference                          Triton; matrix products by cuBLAS,
                                                               except where `measure` found better
        "reference"         reference                          reference: the same formulas, in CuPy
        "triton"            Triton's interpreter (for tests)   Triton, matrix products included
        "cublas"            matrix products are refused        as "auto", cuBLAS for every product

The reference is the op's own `forward` and `backward`. It also runs what no kernel takes (float64,
say): `explain` tells for each call what would run and why, `table` lists the conditions. A kernel
that fails raises; nothing falls back. Derivatives of derivatives (`create_graph=True`) follow the
reference formulas, whatever ran the forward; the ops in those are chosen like any others.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.backend import Array

Arrays = Sequence[Array]
Options = Mapping[str, Any]

# --- the switch -----------------------------------------------------------------------------------

SETTINGS = ("auto", "reference", "triton", "cublas")

setting = "auto"
forced = False  # does the setting concern NumPy arrays? Ops ask this first: it must cost nothing.


class use_kernels:
    """use_kernels("triton"): from here on, or `with use_kernels("triton"):` for a block.

    One setting for the process, as the default dtype is, so that threads of one training run
    compute alike. A block ends with what was set before it; two threads should not open blocks of
    different settings at a time. What was recorded keeps its kernels: a backward may come later.

    Args:
        name: 'auto', 'reference', 'triton' or 'cublas': see the top of `dispatch.py`.
    """

    def __init__(self, name: str) -> None:
        if name not in SETTINGS:
            raise ValueError(f"use_kernels() takes {', '.join(map(repr, SETTINGS))}, got {name!r}")
        self.name = name
        self._before = [setting]  # a stack: one object may be entered again while it is open
        self._set_already = True
        _set(name)

    def __enter__(self) -> None:
        if not self._set_already:
            self._before.append(setting)
        self._set_already = False
        _set(self.name)

    def __exit__(self, *error: object) -> None:
        _set(self._before.pop())


def _set(name: str) -> None:
    global setting, forced
    setting, forced = name, name in ("triton", "cublas")


# --- the table ------------------------------------------------------------------------------------


class Condition(NamedTuple):
    """What a kernel needs of a call, in words and as a test of its arrays and options."""

    words: str
    holds: Callable[[Arrays, Options], bool]


class Rule(NamedTuple):
    """A row: the op runs on `kernels/<module>.py`, where all conditions hold."""

    op: str
    module: str
    conditions: tuple[Condition, ...]


class Choice(NamedTuple):
    """What runs an op: 'triton', 'cublas' or 'reference', and why.

    `module` is the kernel file to call; None where the op's own formulas run (for 'cublas' too:
    on CuPy arrays their `@` is cuBLAS).
    """

    kernel: str
    module: ModuleType | None
    why: str


_FLOATS = {backend.float32, backend.float16, backend.bfloat16}

FLOATS = Condition(
    "float32, float16 or bfloat16",
    lambda arrays, options: all(a.dtype in _FLOATS for a in arrays),
)
AXIS = Condition("an axis to go along", lambda arrays, options: arrays[0].ndim > 0)
CLASSES = Condition("at least one class", lambda arrays, options: arrays[0].shape[-1] > 0)
ROWS = Condition("at least one class", lambda arrays, options: arrays[1].shape[0] > 0)
HEADS = Condition(
    "heads of at most 256",
    lambda arrays, options: max(arrays[0].shape[-1], arrays[2].shape[-1]) <= 256,
)
BATCH = Condition(
    "at most two leading axes, besides groups of heads",
    lambda arrays, options: sum(n > 1 for n in arrays[1].shape[:-2]) <= 2,
)
DECOUPLED = Condition(
    "weight decay beside the gradient, or none",
    lambda arrays, options: options.get("decoupled", True) or not options["weight_decay"],
)

TABLE: tuple[Rule, ...] = (
    Rule("softmax", "softmax", (FLOATS, AXIS)),
    Rule("log_softmax", "softmax", (FLOATS, AXIS)),
    Rule("dropout", "dropout", (FLOATS,)),
    Rule("cross_entropy", "cross_entropy", (FLOATS, CLASSES)),
    Rule("linear_cross_entropy", "cross_entropy", (FLOATS, ROWS)),
    Rule("embedding", "embedding", (FLOATS,)),
    Rule("relu", "activation", (FLOATS,)),
    Rule("gelu", "activation", (FLOATS,)),
    Rule("gelu_tanh", "activation", (FLOATS,)),
    Rule("silu", "activation", (FLOATS,)),
    Rule("swiglu", "activation", (FLOATS,)),
    Rule("rotary", "rotary", (FLOATS,)),
    Rule("quantized_linear", "quantize", (FLOATS,)),
    Rule("layer_norm", "layer_norm", (FLOATS,)),
    Rule("rms_norm", "layer_norm", (FLOATS,)),
    Rule("attention", "attention", (FLOATS, HEADS, BATCH)),
    Rule("matmul", "matmul", (FLOATS,)),
    Rule("linear", "matmul", (FLOATS,)),
    Rule("lstm", "lstm", (FLOATS,)),
    Rule("gradient_norm", "optimizer", (FLOATS,)),
    Rule("adamw", "optimizer", (FLOATS, DECOUPLED)),
)

_RULES = {rule.op: rule for rule in TABLE}
PRODUCTS = frozenset({"matmul", "linear"})  # what cuBLAS does, too


# --- the choice -----------------------------------------------------------------------------------


def select(op: str, arrays: Arrays, options: Options) -> Choice:
    """What runs this call of the op; called once, in its forward.

    Raises:
        RuntimeError: the setting asks for kernels that cannot run on these arrays here.
        KeyError: no row of the table has this name.
    """
    rule, on_cpu = _RULES[op], isinstance(arrays[0], np.ndarray)
    if setting == "reference":
        return Choice("reference", None, "use_kernels('reference')")
    if on_cpu and not forced:
        return Choice("reference", None, "NumPy arrays: kernels are for the GPU")
    if on_cpu and setting == "cublas":
        if op in PRODUCTS:
            raise RuntimeError(
                "use_kernels('cublas') on NumPy arrays: cuBLAS works on a GPU's memory; move the "
                "model and its inputs with to('cuda'), or use_kernels('auto')"
            )
        return Choice("reference", None, "NumPy arrays: kernels are for the GPU")
    failed = next((c for c in rule.conditions if not c.holds(arrays, options)), None)
    if failed is not None:
        return Choice("reference", None, f"the kernel needs: {failed.words}")
    unusable = _unusable(on_cpu)
    if unusable and setting == "triton":
        raise RuntimeError(f"use_kernels('triton'): {unusable}")
    if op in PRODUCTS and not on_cpu and _prefers_cublas(op, arrays, unusable):
        return Choice("cublas", None, "what CuPy multiplies matrices with")
    if unusable:
        return Choice("reference", None, unusable)
    return Choice("triton", _load(rule.module), f"kernels/{rule.module}.py takes it")


def _unusable(on_cpu: bool) -> str:
    """Why no Triton kernel can run on such arrays in this process; empty where it can."""
    where = _home()
    if where == "":
        return "Triton is not installed: pip install 'tinygrad-llm[cuda13]' (or [cuda12])"
    if on_cpu and where == "gpu":
        return (
            "kernels run on the GPU in this process, but these are NumPy arrays; set "
            "TINYGRAD_LLM_KERNELS=interpret to run kernels on the CPU"
        )
    if not on_cpu and where == "interpret":
        return (
            "kernels run in the interpreter in this process, on NumPy arrays, but these are "
            "CuPy's; set TINYGRAD_LLM_KERNELS=gpu"
        )
    return ""


@functools.cache
def _home() -> str:
    """Where this process runs Triton's kernels: 'gpu' or 'interpret'; '' without Triton."""
    from tinygrad_llm.kernels import mode

    return mode.choose().name if importlib.util.find_spec("triton") is not None else ""


@functools.cache
def _load(module: str) -> ModuleType:
    return importlib.import_module(f"tinygrad_llm.kernels.{module}")


# --- Triton or cuBLAS -----------------------------------------------------------------------------


def _prefers_cublas(op: str, arrays: Arrays, unusable: str) -> bool:
    """For a product of CuPy arrays: cuBLAS, unless the setting or a measurement says otherwise.

    CuPy has no batched product of bfloat16 matrices (14.2 takes their bits for integers).
    """
    batched = op == "matmul" and max(a.ndim for a in arrays) > 2
    lacking = batched and arrays[0].dtype == backend.bfloat16
    if setting == "triton":
        return False
    if setting == "cublas" and lacking:
        raise RuntimeError(
            "use_kernels('cublas'): CuPy has no batched product of bfloat16 matrices; "
            "use_kernels('auto') runs it on kernels/matmul.py"
        )
    if setting == "cublas" or unusable:
        return True
    return not lacking and _faster_library(op, arrays[0], arrays[1]) == "cublas"


_faster: dict[tuple[Any, ...], str] = {}  # by op, dtype, and sizes rounded up to powers of two


def _faster_library(op: str, a: Array, b: Array) -> str:
    """'cublas', or 'triton' where `measure` found that; nothing is measured here."""
    sizes, key = _sizes(op, a.dtype, a.shape, b.shape)
    found = _faster.get(key)
    if found is None:
        with _load("tune").tuning(False):
            found = _faster[key] = _compare(op, a, b, sizes)
    return found


def measure(op: str, a: Array, b: Array) -> str:
    """'cublas' or 'triton': which is faster here for products of about these sizes.

    `measure("linear", x, w)` times both on this GPU and keeps the result with the kernels' own
    tuning (`kernels/tune.py`); "auto" goes by it from then on. It may take minutes, for the kernel
    is tuned first; so it is never done on the way.

    Args:
        op: 'linear' or 'matmul'.
        a, b: CuPy arrays as the op gets them.
    """
    if op not in PRODUCTS:
        raise ValueError(f"measure() takes {' or '.join(sorted(PRODUCTS))}, got {op!r}")
    sizes, key = _sizes(op, a.dtype, a.shape, b.shape)
    _faster[key] = _compare(op, a, b, sizes)
    return _faster[key]


@functools.lru_cache(4096)
def _sizes(
    op: str, dtype: np.dtype, a: tuple[int, ...], b: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """(batch, rows, columns, inner) of a product, and its key in `_faster`."""
    if op == "linear":
        sizes = (1, math.prod(a[:-1]), b[0], a[-1])
    else:
        sizes = (math.prod(np.broadcast_shapes(a[:-2], b[:-2])), a[-2], b[-1], a[-1])
    return sizes, (op, dtype, *[max(n - 1, 0).bit_length() for n in sizes])


def _compare(op: str, a: Array, b: Array, sizes: tuple[int, ...]) -> str:
    kernel, tune = _load("matmul"), _load("tune")

    def run(config: dict[str, Any]) -> None:
        x, y = (a, b) if op == "matmul" else (a.reshape(-1, a.shape[-1]), b.T)
        _ = kernel.matmul(x, y) if config["library"] == "triton" else x @ y

    libraries = ({"library": "cublas"}, {"library": "triton"})
    return tune.choose(_named(kernel.matmul), libraries, a, sizes, run, op=op)["library"]


@functools.cache
def _named(function: Callable[..., Any]) -> Any:
    """A function in the dress of a `triton.jit` function: `tune` wants to know its file."""
    return SimpleNamespace(fn=function)


# --- in words -------------------------------------------------------------------------------------


def explain(op: str = "", *arrays: Any, **options: Any) -> str:
    """What would run this call of the op, and why: `print(explain("softmax", x, axis=-1))`.

    Args:
        op: a row of the table; without one, the answer is `table()`.
        arrays: what the op would get: Tensors or arrays.
        options: its options.
    """
    if not op:
        return table()
    if op not in _RULES or not arrays:
        raise ValueError(
            f"explain() takes one of {', '.join(_RULES)}, and the arrays of a call; got {op!r} "
            f"and {len(arrays)} arrays"
        )
    raw = [a if backend.is_array(a) else a.data for a in arrays]
    described = ", ".join(f"{a.dtype}{a.shape}" for a in raw)
    call = f"{op} of {described} on {backend.device_of(raw[0])} with use_kernels({setting!r})"
    try:
        kernel, _, why = select(op, raw, options)
    except RuntimeError as error:
        return f"{call}: refused. {error}"
    return f"{call}: {kernel} ({why})"


def table() -> str:
    """The rows of the table as text, and what holds in this process."""
    from tinygrad_llm.kernels import mode

    rows = [("op", "kernel", "takes")]
    for op, module, conditions in TABLE:
        library = " or cuBLAS" if op in PRODUCTS else ""
        words = "; ".join(c.words for c in conditions)
        rows.append((op, f"kernels/{module}.py{library}", words))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{op:<{widths[0]}}  {kernel:<{widths[1]}}  {takes}" for op, kernel, takes in rows]
    lines += ["", f"use_kernels({setting!r}); kernels: {mode.describe()}"]
    return "\n".join(lines)
