"""What `gpu.py` compares: our kernels, cuBLAS, and PyTorch, flash-attn, Liger where installed.

`cases(part, timer, small)` yields (name, function that builds the case), the most telling first,
for what does not fit into the time is left out from the end. `small` makes sizes that Triton's
interpreter runs in moments.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
from gpu_measure import LIBRARY, OURS, Case, Run, Timer, to_torch

from tinygrad_llm import backend

Named = Iterator[tuple[str, Callable[[], Case]]]

# Of the largest number of a result; rounding of the dtype, and sums in another order.
TOLERANCE = {"float32": 1e-4, "tf32": 5e-3, "float16": 1e-2, "bfloat16": 4e-2}


def cases(part: str, timer: Timer, small: bool) -> Named:
    return PARTS[part](timer, small)


# --- arrays ---------------------------------------------------------------------------------------


@functools.cache
def _pool(xp: Any) -> Any:
    """Normal numbers; a prime count of them, so that rows of a matrix do not repeat each other."""
    return xp.asarray(np.random.default_rng(0).standard_normal(4194301, dtype=np.float32))


def normal(timer: Timer, shape: tuple[int, ...], dtype: str, shift: int = 0) -> Any:
    """Random data: power, and with it the clock of a GPU, depends on the bits that flip."""
    pool, first = _pool(timer.xp), 7919 * shift
    last = first + int(np.prod(shape))
    repeated = timer.xp.tile(pool, -(-last // pool.size))[first:last]
    return repeated.reshape(shape).astype(backend.as_dtype(dtype))


def _torch(timer: Timer) -> ModuleType | None:
    """PyTorch, where it is installed and sees the GPU; never in a dry run."""
    if timer.xp is np or importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    with contextlib.suppress(ImportError, AttributeError):
        # Compiled backwards may be asked for again: their inputs stay.
        from torch._functorch import config

        config.donated_buffer = False  # pyright: ignore
    return torch


# --- ceilings -------------------------------------------------------------------------------------


def ceilings(timer: Timer, small: bool) -> Named:
    """Copy bandwidth by a device-to-device copy and by a kernel; the rate of cuBLAS in bfloat16."""
    xp = timer.xp

    def copy() -> Case:
        source = xp.ones(2**12 if small else 2**28, dtype=xp.float32)
        target = xp.empty_like(source)
        runs: dict[str, Run] = {
            "copy": lambda: xp.copyto(target, source),
            "copy kernel": lambda: xp.negative(source, out=target),
        }
        return Case(2 * source.nbytes, "GB/s", runs, None)

    def product() -> Case:
        n = 64 if small else 8192
        a, b = (normal(timer, (n, n), "bfloat16", shift) for shift in (0, 1))
        return Case(2 * n**3, "TFLOP/s", {LIBRARY: lambda: a @ b}, None)

    yield "copy bandwidth", copy
    yield "matrix rate bfloat16", product


# --- matrix products ------------------------------------------------------------------------------


def matmul(timer: Timer, small: bool) -> Named:
    """y = A B, n × n each."""
    sizes = (32,) if small else (4096, 8192, 2048, 1024)
    for n in sizes:
        for kind in ("bfloat16", "float16", "tf32", "float32"):
            yield f"{kind} {n}³", functools.partial(_product, timer, kind, n)


def _product(timer: Timer, kind: str, n: int) -> Case:
    from tinygrad_llm.kernels import matmul

    dtype = "float32" if kind == "tf32" else kind
    precision = "tf32" if kind == "tf32" else "ieee"
    a, b = (normal(timer, (n, n), dtype, shift) for shift in (0, 1))
    runs: dict[str, Run] = {OURS: lambda: matmul.matmul(a, b, precision=precision)}
    with_tf32 = _cupy_tf32(timer) if kind == "tf32" else contextlib.nullcontext
    if with_tf32 is not None:

        def library() -> Any:
            with with_tf32():
                return a @ b

        runs[LIBRARY] = library
    torch = _torch(timer)
    if torch is not None:
        ta, tb = to_torch(a), to_torch(b)

        def rival() -> Any:
            torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
            return ta @ tb

        runs["torch"] = rival
    return Case(2 * n**3, "TFLOP/s", runs, TOLERANCE[kind])


def _cupy_tf32(timer: Timer) -> Callable[[], Any] | None:
    """A context in which CuPy's float32 products are tf32; None where this CuPy has no such switch.

    Its public switch, CUPY_TF32=1, is read once in a process.
    """
    if timer.xp is np:
        return contextlib.nullcontext
    from cupy._core import _routines_linalg as linalg

    kinds = [getattr(linalg, f"COMPUTE_TYPE_{name}", None) for name in ("DEFAULT", "TF32")]
    if None in kinds or not hasattr(linalg, "set_compute_type"):
        return None

    @contextlib.contextmanager
    def tf32() -> Iterator[None]:
        linalg.set_compute_type(np.float32, kinds[1])
        try:
            yield
        finally:
            linalg.set_compute_type(np.float32, kinds[0])

    return tf32


# --- attention ------------------------------------------------------------------------------------


def attention(timer: Timer, small: bool) -> Named:
    """Causal, 16 Ki tokens of 2048 channels, as FlashAttention's papers measure it."""
    for length in (16,) if small else (4096, 16384, 1024, 8192, 2048):
        for head in (16,) if small else (128, 64):
            for backward in (False, True):
                way = "backward" if backward else "forward"
                build = functools.partial(_attention, timer, length, head, backward, small)
                yield f"{way} head {head} length {length}", build


def _attention(timer: Timer, length: int, head: int, backward: bool, small: bool) -> Case:
    from tinygrad_llm.kernels import attention

    tokens, channels = (length, head) if small else (16384, 2048)
    shape = (tokens // length, channels // head, length, head)
    q, k, v, g = (normal(timer, shape, "bfloat16", shift) for shift in range(4))
    # Two products forward and five backward, of which causality leaves a half.
    flops = (5 if backward else 2) * 2 * tokens * length * channels / 2
    runs: dict[str, Run] = {OURS: lambda: attention.forward(q, k, v, causal=True)[0]}
    if backward:
        saved = attention.forward(q, k, v, causal=True)[1]
        runs[OURS] = lambda: attention.backward(g, *saved, causal=True)[:3]
    if _torch(timer) is not None:
        runs.update(_torch_attention([to_torch(x) for x in (q, k, v)], to_torch(g), backward))
    return Case(flops, "TFLOP/s", runs, TOLERANCE["bfloat16"])


def _torch_attention(inputs: list[Any], g: Any, backward: bool) -> dict[str, Run]:
    """torch SDPA as it chooses, its FlashAttention-2 and cuDNN's; and flash-attn, 2 and 3."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    found: dict[str, Callable[..., Any]] = {"torch SDPA": sdpa}
    for label, name in (("torch flash", "FLASH_ATTENTION"), ("torch cuDNN", "CUDNN_ATTENTION")):
        if hasattr(SDPBackend, name):
            found[label] = functools.partial(_sdpa_of, sdpa_kernel, getattr(SDPBackend, name), sdpa)
    for label, module in (("flash-attn", "flash_attn"), ("flash-attn 3", "flash_attn_interface")):
        if importlib.util.find_spec(module) is not None:
            found[label] = functools.partial(_flash_attn, module)
    return {label: _eager(forward, tuple(inputs), g, backward) for label, forward in found.items()}


def _sdpa_of(choose: Any, which: Any, sdpa: Any, q: Any, k: Any, v: Any) -> Any:
    with choose(which):
        return sdpa(q, k, v)


def _flash_attn(module: str, q: Any, k: Any, v: Any) -> Any:
    """Its arrays are (B, T, H, D) in shape; views do, as in models that use it."""
    function = importlib.import_module(module).flash_attn_func
    y = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
    return (y[0] if isinstance(y, tuple) else y).transpose(1, 2)


# --- what memory bounds ---------------------------------------------------------------------------


def softmax(timer: Timer, small: bool) -> Named:
    """Forward reads x and writes y; backward reads g and y and writes dx."""
    shapes = ((4, 40),) if small else ((16384, 4096), (65536, 1024), (8192, 50304))
    for shape in shapes:
        for backward in (False, True):
            way = "backward" if backward else "forward"
            yield f"{way} {shape}", functools.partial(_softmax, timer, shape, backward)


def _softmax(timer: Timer, shape: tuple[int, int], backward: bool) -> Case:
    from tinygrad_llm.kernels import softmax

    x, g = (normal(timer, shape, "bfloat16", shift) for shift in (0, 1))
    runs: dict[str, Run] = {OURS: lambda: softmax.forward(x)[0]}
    if backward:
        y = softmax.forward(x)[1][0]
        runs[OURS] = lambda: softmax.backward(g, y)
    torch = _torch(timer)
    if torch is not None:

        def plain(x: Any) -> Any:
            return torch.softmax(x, dim=-1)

        runs.update(_plain_and_compiled(torch, plain, (to_torch(x),), to_torch(g), backward))
        liger = _liger("softmax", "LigerSoftmaxFunction")
        if liger is not None:
            runs["Liger"] = _eager(liger.apply, (to_torch(x),), to_torch(g), backward)
    return Case((3 if backward else 2) * x.nbytes, "GB/s", runs, TOLERANCE["bfloat16"])


def layer_norm(timer: Timer, small: bool) -> Named:
    """Forward reads x and writes y; backward reads g and x and writes dx."""
    shapes = ((4, 40),) if small else ((16384, 4096), (65536, 768), (16384, 1024))
    for shape in shapes:
        for backward in (False, True):
            way = "backward" if backward else "forward"
            yield f"{way} {shape}", functools.partial(_layer_norm, timer, shape, backward)


def _layer_norm(timer: Timer, shape: tuple[int, int], backward: bool) -> Case:
    from tinygrad_llm.kernels import layer_norm

    x, g = (normal(timer, shape, "bfloat16", shift) for shift in (0, 1))
    w, b = (normal(timer, shape[1:], "bfloat16", shift) for shift in (2, 3))
    runs: dict[str, Run] = {OURS: lambda: layer_norm.forward(x, w, b)[0]}
    if backward:
        saved = layer_norm.forward(x, w, b)[1]
        runs[OURS] = lambda: layer_norm.backward(g, *saved)
    torch = _torch(timer)
    if torch is not None:
        inputs = tuple(to_torch(a) for a in (x, w, b))

        def plain(x: Any, w: Any, b: Any) -> Any:
            return torch.nn.functional.layer_norm(x, w.shape, w, b)

        runs.update(_plain_and_compiled(torch, plain, inputs, to_torch(g), backward))
        liger = _liger("layer_norm", "LigerLayerNormFunction")
        if liger is not None:
            apply = functools.partial(_with, liger.apply, 1e-5)
            runs["Liger"] = _eager(apply, inputs, to_torch(g), backward)
    return Case((3 if backward else 2) * x.nbytes, "GB/s", runs, TOLERANCE["bfloat16"])


def cross_entropy(timer: Timer, small: bool) -> Named:
    """Forward reads the logits; backward reads them again and writes as much."""
    shapes = ((4, 40),) if small else ((8192, 50304), (16384, 32000))
    for shape in shapes:
        for backward in (False, True):
            way = "both ways" if backward else "forward"
            yield f"{way} {shape}", functools.partial(_cross_entropy, timer, shape, backward)


def _cross_entropy(timer: Timer, shape: tuple[int, int], both: bool) -> Case:
    """Forward and backward together, for Liger computes the gradient in its forward."""
    from tinygrad_llm.kernels import cross_entropy

    xp, (rows, columns) = timer.xp, shape
    x = normal(timer, shape, "bfloat16")
    target = xp.asarray(np.random.default_rng(0).integers(0, columns, rows))
    counted = xp.ones(rows, dtype=bool)
    g = xp.ones(rows, dtype=x.dtype)

    def ours() -> Any:
        y, saved = cross_entropy.forward(x, target, counted)
        return cross_entropy.backward(g, *saved) if both else y

    runs: dict[str, Run] = {OURS: ours}
    torch = _torch(timer)
    if torch is not None:
        tx, tt, tg = to_torch(x), to_torch(target), to_torch(g)
        leaf = tx.clone().requires_grad_(both)

        def plain(x: Any) -> Any:
            return torch.nn.functional.cross_entropy(x, tt, reduction="none")

        def through(loss: Callable[[Any], Any], leaf: Any, g: Any) -> Run:
            return lambda: torch.autograd.grad(loss(leaf), leaf, g)[0] if both else loss(leaf)

        runs["torch"] = through(plain, leaf, tg)
        runs["torch.compile"] = through(torch.compile(plain, dynamic=False), leaf, tg)
        liger = _liger("cross_entropy", "LigerCrossEntropyFunction") if both else None
        if liger is not None:
            # It writes the gradient over its logits: they are its own, and the last to compare.
            own = tx.clone().requires_grad_()

            def in_place(x: Any) -> Any:
                found = liger.apply(x, tt, None)  # no class weights
                return found[0] if isinstance(found, tuple) else found

            runs["Liger"] = through(in_place, own, None)
    return Case((3 if both else 1) * x.nbytes, "GB/s", runs, TOLERANCE["bfloat16"])


def adamw(timer: Timer, small: bool) -> Named:
    """All parameters of GPT-2 124M: 28 bytes each, with or without a float32 master copy."""
    shapes = [(7, 5), (33,)] if small else _gpt2_shapes()
    for kind in ("float32", "bfloat16 with masters"):
        yield kind, functools.partial(_adamw, timer, shapes, kind)


def _gpt2_shapes() -> list[tuple[int, ...]]:
    c = 768
    block = [(c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,), (c,), (c,)]
    block += [(4 * c, c), (4 * c,), (c, 4 * c), (c,)]
    return [(50304, c), (1024, c), *block * 12, (c,), (c,)]


def _adamw(timer: Timer, shapes: list[tuple[int, ...]], kind: str) -> Case:
    from tinygrad_llm.kernels import optimizer

    xp, dtype = timer.xp, kind.split()[0]
    parameters = [normal(timer, shape, dtype, i) for i, shape in enumerate(shapes)]
    gradients = [normal(timer, shape, dtype, i + 1) for i, shape in enumerate(shapes)]
    first, second = ([xp.zeros(shape, dtype=xp.float32) for shape in shapes] for _ in range(2))
    masters = [p.astype(xp.float32) for p in parameters] if dtype != "float32" else None
    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    runs: dict[str, Run] = {
        OURS: lambda: optimizer.adamw(
            parameters, gradients, first, second, masters, step=10, **options
        )
    }
    torch = _torch(timer)
    if torch is not None and masters is None:
        theirs = [torch.nn.Parameter(to_torch(p).clone()) for p in parameters]
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = to_torch(g)
        runs["torch fused"] = torch.optim.AdamW(theirs, fused=True, **options).step
    count = sum(int(np.prod(shape)) for shape in shapes)
    return Case(28 * count, "GB/s", runs, None)


# --- PyTorch's ways -------------------------------------------------------------------------------


def _plain_and_compiled(
    torch: ModuleType, function: Callable[..., Any], inputs: tuple[Any, ...], g: Any, backward: bool
) -> dict[str, Run]:
    return {
        "torch": _eager(function, inputs, g, backward),
        "torch.compile": _eager(torch.compile(function, dynamic=False), inputs, g, backward),
    }


def _eager(function: Callable[..., Any], inputs: tuple[Any, ...], g: Any, backward: bool) -> Run:
    """One run of its forward, or of its backward alone."""
    if not backward:
        return lambda: function(*inputs)
    grad = importlib.import_module("torch").autograd.grad
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    graph: list[Any] = []  # made in the first run, so that a refusal is this rival's alone

    def run() -> Any:
        if not graph:
            graph.append(function(*leaves))
        return grad(graph[0], leaves, g, retain_graph=True)

    return run


def _with(function: Callable[..., Any], last: Any, *arguments: Any) -> Any:
    return function(*arguments, last)


def _liger(module: str, name: str) -> Any:
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    try:
        return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name, None)
    except ImportError:
        return None  # a Liger that does not have it


PARTS: dict[str, Callable[[Timer, bool], Named]] = {
    "ceilings": ceilings,
    "matmul": matmul,
    "attention": attention,
    "softmax": softmax,
    "layer_norm": layer_norm,
    "cross_entropy": cross_entropy,
    "adamw": adamw,
}
