"""Training on Triton's kernels is training on the reference: losses, gradients, weights."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import tinygrad_llm as tg
from tinygrad_llm import Tensor, backend, dispatch, optim
from tinygrad_llm.autograd import Function
from tinygrad_llm.models.gpt import GPT, GPTConfig, KVCache

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
    # What OpenBLAS may say of finite matrices: see test_dispatch.py.
    pytest.mark.filterwarnings("ignore:invalid value encountered in matmul"),
]

# Sizes that no block divides, and a vocabulary larger than any other size.
SIZES = GPTConfig(
    vocab_size=61,
    n_positions=12,
    n_embd=24,
    n_layer=2,
    n_head=3,
    resid_pdrop=0.1,
    embd_pdrop=0.1,
    attn_pdrop=0.1,
)

# What has no kernel of its own: views, sums of two, and the loss divided by its number of tokens.
PLAIN = {"Add", "Reshape", "Transpose", "GetItem", "Sum", "Multiply", "Scale"}


@dataclass
class Trained:
    """What a run leaves behind, on the CPU."""

    losses: list[float]
    gradients: dict[str, np.ndarray]  # of the first step
    weights: dict[str, np.ndarray]
    moments: list[np.ndarray]  # of AdamW
    random: dict[str, int]
    kernels: set[str]  # 'Linear on matmul', or 'Add', which has none


def train(kernels: str, dtype: Any = tg.float32, steps: int = 2) -> Trained:
    device = "cuda" if dispatch._home() == "gpu" else "cpu"
    tg.manual_seed(0)
    model = GPT(SIZES).to(device).to(dtype)
    # ε above rounding errors: the gradient of the keys' bias is 0 but for these (softmax does not
    # see what all scores of a row have in common), and Adam would make full steps of them.
    optimizer = optim.AdamW(optim.decay_groups(model, 0.1), lr=1e-2, eps=1e-4)
    rng = np.random.default_rng(0)
    x, y = (Tensor(rng.integers(0, SIZES.vocab_size, (3, 11))).to(device) for _ in range(2))
    losses, gradients, ran = [], {}, set()
    with tg.use_kernels(kernels):
        for step in range(steps):
            optimizer.zero_grad()
            loss = model.loss(x, y)
            ran |= {ran_on(node) for node in nodes_of(loss)}
            loss.backward()
            if step == 0:
                gradients = {n: host(p.grad) for n, p in model.named_parameters()}
            optimizer.step()
            losses.append(loss.item())
    weights = {n: host(p) for n, p in model.named_parameters()}
    moments = [
        backend.to_device(state[name], "cpu")
        for state in optimizer.state_dict()["state"].values()
        for name in ("exp_avg", "exp_avg_sq")
    ]
    return Trained(losses, gradients, weights, moments, backend.random.state(), ran)


def host(x: Tensor | None) -> np.ndarray:
    assert x is not None
    return x.detach().to("cpu").numpy().astype(np.float64)


def nodes_of(y: Tensor) -> list[Function]:
    nodes: list[Any] = [y.node]
    seen = set(nodes)
    for node in nodes:
        fresh = {p for p in node.parents if p is not None} - seen
        seen |= fresh
        nodes += fresh
    return [node for node in nodes if isinstance(node, Function)]


def ran_on(node: Function) -> str:
    kernel = getattr(node.kept, "kernel", None)
    op = type(node).__name__
    return op if kernel is None else f"{op} on {kernel.__name__.rpartition('.')[2]}"


@pytest.fixture(scope="module")
def reference() -> Trained:
    return train("reference")


@pytest.fixture(scope="module")
def on_triton() -> Trained:
    return train("triton")


def test_every_op_that_has_a_kernel_ran_on_it(reference: Trained, on_triton: Trained) -> None:
    assert not any(" on " in name for name in reference.kernels)
    assert {name for name in on_triton.kernels if " on " not in name} <= PLAIN
    assert {name for name in on_triton.kernels if " on " in name} == {
        "Attention on attention",
        "Dropout on dropout",
        "Embedding on embedding",
        "GeluTanh on activation",
        "LayerNorm on layer_norm",
        "LinearCrossEntropy on cross_entropy",
        "Linear on matmul",
    }


def test_the_losses_are_the_same(reference: Trained, on_triton: Trained) -> None:
    np.testing.assert_allclose(on_triton.losses, reference.losses, rtol=2e-6)
    assert reference.losses[-1] < reference.losses[0]


def test_every_gradient_is_the_same(reference: Trained, on_triton: Trained) -> None:
    assert on_triton.gradients.keys() == reference.gradients.keys()
    for name, expected in reference.gradients.items():
        scale = np.abs(expected).max()
        assert scale > 0, name
        np.testing.assert_allclose(
            on_triton.gradients[name], expected, rtol=1e-4, atol=5e-6 * scale, err_msg=name
        )


def test_the_updated_weights_are_the_same(reference: Trained, on_triton: Trained) -> None:
    for name, expected in reference.weights.items():
        np.testing.assert_allclose(
            on_triton.weights[name], expected, rtol=1e-4, atol=2e-5, err_msg=name
        )


def test_the_moments_of_adamw_are_the_same(reference: Trained, on_triton: Trained) -> None:
    for got, expected in zip(on_triton.moments, reference.moments, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_the_same_random_numbers_are_used(reference: Trained, on_triton: Trained) -> None:
    assert on_triton.random == reference.random
    assert on_triton.random["offset"] > 0


def test_the_same_seed_gives_the_same_bits(on_triton: Trained) -> None:
    again = train("triton", steps=1)
    assert again.losses[0] == on_triton.losses[0]
    for name, g in again.gradients.items():
        np.testing.assert_array_equal(g, on_triton.gradients[name], err_msg=name)


def test_the_next_token_is_the_same() -> None:
    """Without gradients, and with a cache: the second call asks with one query for six keys."""
    device = "cuda" if dispatch._home() == "gpu" else "cpu"
    tg.manual_seed(0)
    model = GPT(SIZES).eval().to(device)
    ids = Tensor(np.random.default_rng(0).integers(0, SIZES.vocab_size, (2, 6))).to(device)
    found = []
    for kernels in ("reference", "triton"):
        with tg.use_kernels(kernels), tg.no_grad():
            cache = KVCache(SIZES)
            found.append([host(model(part, cache)) for part in (ids[:, :5], ids[:, 5:])])
    for got, expected in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_trains_alike(reference: Trained, on_triton: Trained) -> None:
    """Rounding errors of 1/256, where float32 has 1/16777216."""
    half = train("triton", tg.bfloat16, steps=1)
    assert half.kernels == on_triton.kernels
    np.testing.assert_allclose(half.losses, reference.losses[:1], rtol=0.01)
    for name, expected in reference.gradients.items():
        error = np.linalg.norm(half.gradients[name] - expected) / np.linalg.norm(expected)
        assert error < 0.05, name
