"""A whole training step of a GPT on the CPU, beside PyTorch's: forward, backward, clip, AdamW.

Each implementation runs in a process of its own, with the same weights, the same batch and the
same number of threads; the processes take turns in short bursts, so that what else the machine
does falls on all alike. PyTorch is treated well: fused AdamW, scaled_dot_product_attention, and
glibc told to keep freed memory, as our own process does.

    python benchmarks/train_step.py [--sizes S M] [--bursts 8] [--compile] [--jax] [--save]

`gemm` is the floor: the matrix products of one step alone, through NumPy; `products` says what
share of a step that floor is.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from worker import Worker, in_turns, serve

# S a classroom model, M a small GPT, L GPT-2 124M.
SIZES: dict[str, dict[str, int]] = {
    "S": {"n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 64, "vocab": 512, "batch": 16},
    "M": {"n_layer": 6, "n_embd": 384, "n_head": 6, "n_positions": 256, "vocab": 2048, "batch": 8},
    "L": {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 512, "vocab": 50257,
          "batch": 1},
}  # fmt: skip
STEPS = {"S": 8, "M": 2, "L": 1}  # in a burst
RESULTS = Path(__file__).parent / "results"

Step = Callable[[], float]


def batch(size: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(1).integers(
        0, size["vocab"], (size["batch"], size["n_positions"] + 1)
    )
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def our_model(size: dict[str, int]) -> Any:
    import tinygrad_llm as tg
    from tinygrad_llm.models.gpt import GPT, GPTConfig

    tg.manual_seed(0)
    config = GPTConfig(
        vocab_size=size["vocab"],
        n_positions=size["n_positions"],
        n_embd=size["n_embd"],
        n_layer=size["n_layer"],
        n_head=size["n_head"],
    )
    return GPT(config)


def ours(size: dict[str, int]) -> Step:
    from tinygrad_llm import optim

    model, (x, y) = our_model(size), batch(size)
    optimizer = optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def step() -> float:
        optimizer.zero_grad()
        loss = model.loss(x, y)
        loss.backward()
        optim.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def ours_together(size: dict[str, int]) -> Step:
    """The same on as many processes as there are cores, as `tinygrad-llm pretrain` trains."""
    from tinygrad_llm import backend, no_grad, optim
    from tinygrad_llm.train.parallel import Part, Team, cut

    model, whole = our_model(size), batch(size)
    optimizer = optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def gradient(parts: Sequence[Part]) -> float:
        total = 0.0
        for part in parts:
            loss = model.loss(*part.batch) * part.weight
            loss.backward()
            total += loss.item()
        return total

    def evaluate(part: tuple[np.ndarray, np.ndarray]) -> float:
        with no_grad():
            return model.loss(*part).item()

    team = Team(model.parameters(), optimizer, gradient, evaluate, min(threads(), size["batch"]))
    team.start()

    def step() -> float:
        parts = cut([whole], team.count, lambda part: part[1].size, backend.random)
        loss, _ = team.gradient(parts, max_norm=1.0)
        team.step()
        return loss

    return step


def pytorch(size: dict[str, int], compiled: bool = False) -> Step:
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(threads())
    weights = {
        name: torch.nn.Parameter(torch.from_numpy(tensor.numpy().copy()))
        for name, tensor in our_model(size).state_dict().items()
        if name != "lm_head.weight"  # tied to wte
    }
    x, y = (torch.from_numpy(a) for a in batch(size))
    heads, width = size["n_head"], size["n_embd"]

    def norm(h: Any, name: str) -> Any:
        return F.layer_norm(h, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(h: Any, name: str) -> Any:
        return F.linear(h, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def forward() -> Any:
        wte = weights["transformer.wte.weight"]
        h = F.embedding(x, wte) + weights["transformer.wpe.weight"][: x.shape[1]]
        for i in range(size["n_layer"]):
            block = f"transformer.h.{i}"
            qkv = linear(norm(h, f"{block}.ln_1"), f"{block}.attn.c_attn")
            q, k, v = qkv.view(*x.shape, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            h = h + linear(a.reshape(h.shape), f"{block}.attn.c_proj")
            a = F.gelu(linear(norm(h, f"{block}.ln_2"), f"{block}.mlp.c_fc"), approximate="tanh")
            h = h + linear(a, f"{block}.mlp.c_proj")
        logits = F.linear(norm(h, "transformer.ln_f"), wte)
        return F.cross_entropy(logits.view(-1, size["vocab"]), y.view(-1))

    loss_of = torch.compile(forward) if compiled else forward
    optimizer = torch.optim.AdamW(
        weights.values(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def jax(size: dict[str, int]) -> Step:
    """The whole step as one function for XLA."""
    import jax
    import jax.numpy as jnp

    x, y = batch(size)
    heads, width = size["n_head"], size["n_embd"]
    weights = {
        name: jnp.asarray(tensor.numpy())
        for name, tensor in our_model(size).state_dict().items()
        if name != "lm_head.weight"
    }

    def norm(w: Any, h: Any, name: str) -> Any:
        h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-5)
        return h * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(w: Any, h: Any, name: str) -> Any:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def loss_of(w: Any) -> Any:
        wte = w["transformer.wte.weight"]
        h = wte[x] + w["transformer.wpe.weight"][: x.shape[1]]
        for i in range(size["n_layer"]):
            block = f"transformer.h.{i}"
            qkv = linear(w, norm(w, h, f"{block}.ln_1"), f"{block}.attn.c_attn")
            q, k, v = jnp.moveaxis(qkv.reshape(*x.shape, 3, heads, width // heads), 2, 0)
            a = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            h = h + linear(w, a.reshape(h.shape), f"{block}.attn.c_proj")
            a = jax.nn.gelu(linear(w, norm(w, h, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
            h = h + linear(w, a, f"{block}.mlp.c_proj")
        logp = jax.nn.log_softmax(norm(w, h, "transformer.ln_f") @ wte.T)
        return -jnp.take_along_axis(logp, y[..., None], -1).mean()

    def update(w: Any, m: Any, v: Any, t: Any) -> Any:
        loss, g = jax.value_and_grad(loss_of)(w)
        length = jnp.sqrt(sum((a * a).sum() for a in jax.tree.leaves(g)))
        g = jax.tree.map(lambda a: a * jnp.minimum(1.0, 1.0 / (length + 1e-6)), g)
        m = jax.tree.map(lambda m, a: 0.9 * m + 0.1 * a, m, g)
        v = jax.tree.map(lambda v, a: 0.95 * v + 0.05 * a * a, v, g)

        def moved(w: Any, m: Any, v: Any) -> Any:
            change = (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.95**t)) + 1e-8)
            return w * (1 - 3e-4 * 0.1) - 3e-4 * change

        return jax.tree.map(moved, w, m, v), m, v, t + 1, loss

    compiled = jax.jit(update, donate_argnums=(0, 1, 2))
    zeros = [jax.tree.map(jnp.zeros_like, weights) for _ in range(2)]
    state = [weights, *zeros, jnp.float32(1)]

    def step() -> float:
        *state[:], loss = compiled(*state)
        return float(loss)

    return step


def gemm(size: dict[str, int]) -> Step:
    """The products of a step and nothing else, into memory that is there already."""
    n, c, v = size["batch"] * size["n_positions"], size["n_embd"], size["vocab"]
    rng = np.random.default_rng(0)
    layers = [(c, 3 * c), (c, c), (c, 4 * c), (4 * c, c)] * size["n_layer"] + [(c, v)]
    products = []
    for inner, outer in set(layers):
        a, b, d = (
            rng.normal(size=shape).astype(np.float32)
            for shape in ((n, inner), (outer, inner), (n, outer))
        )
        count = layers.count((inner, outer))
        products += [(a, b.T, np.empty_like(d)), (d, b, np.empty_like(a))] * count
        products += [(d.T, a, np.empty_like(b))] * count
    t, h = size["n_positions"], size["n_head"]
    q = rng.normal(size=(size["batch"], h, t, c // h)).astype(np.float32)
    scores, out = np.empty((size["batch"], h, t, t), np.float32), np.empty_like(q)
    # Causal attention needs half of the scores: 2 products forward, 4 backward.
    products += [(q, q.swapaxes(-1, -2), scores)] * size["n_layer"]
    products += [(scores, q, out)] * (2 * size["n_layer"])

    def step() -> float:
        for a, b, into in products:
            np.matmul(a, b, out=into)
        return 0.0

    return step


TOGETHER = "ours, a process per core"
IMPLEMENTATIONS: dict[str, Callable[[dict[str, int]], Step]] = {
    "gemm": gemm,
    "ours": ours,
    TOGETHER: ours_together,
    "torch": pytorch,
    "torch.compile": lambda size: pytorch(size, compiled=True),
    "jax": jax,
}


def threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- one process per implementation ---------------------------------------------------------------


def work(name: str, size: str) -> None:
    """Serve bursts: seconds per step, last loss, peak memory."""
    step = IMPLEMENTATIONS[name](SIZES[size])
    for _ in range(2):  # warm up: threads, memory, compilation
        step()

    def burst() -> dict[str, float]:
        loss, start = 0.0, time.perf_counter()
        for _ in range(STEPS[size]):
            loss = step()
        seconds = (time.perf_counter() - start) / STEPS[size]
        return {"seconds": seconds, "loss": loss, "peak_mib": peak_mib()}

    serve(burst)


def peak_mib() -> float:
    """Of this process and those it has forked; what they share is counted in each."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for child in multiprocessing.active_children():
        status = Path(f"/proc/{child.pid}/status").read_text(encoding="ascii", errors="replace")
        peak += int(status.partition("VmHWM:")[2].split()[0])
    return peak / 1024


def measure(size: str, names: list[str], bursts: int) -> dict[str, list[dict[str, float]]]:
    """All bursts of each implementation, taken in turns."""
    workers = [Worker(__file__, name, "--worker", name, "--sizes", size) for name in names]
    return in_turns(workers, bursts)


def table(size: str, found: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a row per implementation; the ratio is the median of the ratios turn by turn."""
    against = found.get("torch")
    lines = [
        f"| {size} | ms per step | spread | against torch | products | peak MiB | last loss |",
        "|---|---|---|---|---|---|---|",
    ]
    floor = statistics.median([run["seconds"] for run in found["gemm"]])
    for name, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        low, middle, high = statistics.quantiles(seconds, n=4)
        ratio = "" if against is None else f"{_ratio(runs, against):.2f}"
        loss = "" if name == "gemm" else f"{runs[-1]['loss']:.5f}"
        lines.append(
            f"| {name} | {middle * 1e3:.1f} | {low * 1e3:.1f}–{high * 1e3:.1f} | {ratio} | "
            f"{floor / middle:.0%} | {max(run['peak_mib'] for run in runs):.0f} | {loss} |"
        )
    return "\n".join(lines)


def _ratio(runs: list[dict[str, float]], against: list[dict[str, float]]) -> float:
    pairs = zip(runs, against, strict=True)
    return statistics.median([a["seconds"] / b["seconds"] for a, b in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["S", "M"])
    parser.add_argument("--bursts", type=int, default=8, help="turns per implementation")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--jax", action="store_true", help="JAX too")
    parser.add_argument("--save", action="store_true", help="write into benchmarks/results/")
    parser.add_argument("--worker", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.sizes[0])
        return
    names = ["gemm", "ours", TOGETHER]
    if _has_torch():
        names += ["torch"] + ["torch.compile"] * arguments.compile
    names += ["jax"] * arguments.jax
    from machine import environment

    about = ", ".join(f"{key} {value}" for key, value in environment().items())
    print(f"{about}, {threads()} threads")
    parts = []
    for size in arguments.sizes:
        # One row cannot be shared among processes: there BLAS has all cores.
        fit = [name for name in names if name != TOGETHER or SIZES[size]["batch"] > 1]
        parts.append(table(size, measure(size, fit, arguments.bursts)))
        print(f"\n{parts[-1]}", flush=True)
    if arguments.save:
        command = f"`{Path(__file__).name} --sizes {' '.join(arguments.sizes)}`"
        text = "\n\n".join(["# A training step on the CPU", f"{command}: {about}", *parts])
        (RESULTS / "train_step.md").write_text(text + "\n", encoding="utf-8")


def _has_torch() -> bool:
    try:
        import torch  # for its version in the title; the workers import their own
    except ImportError:
        return False
    return bool(torch.__version__)


if __name__ == "__main__":
    main()
