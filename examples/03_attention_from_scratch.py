"""Lesson 3: attention from scratch.

What you will learn:
- attention as a loop over queries, then as three matrix products, with heads, and with a mask that
  hides the future; each step gives the numbers of the step before, and of the engine's own op;
- the gradient of softmax, derived, and with it the whole backward pass of attention;
- why the scores are divided by √D, measured; how several query heads share one key and value.

Letters: T positions, D size of a head, H heads; s scores, p weights, g the gradient that arrives.
"""

import math

import numpy as np

from tinygrad_llm import Tensor, ops


def softmax(s: np.ndarray) -> np.ndarray:
    """p = eˢ / Σ eˢ over the last axis: positive numbers that sum to 1."""
    e = np.exp(s - s.max(axis=-1, keepdims=True))  # the shift cancels in the next line
    return e / e.sum(axis=-1, keepdims=True)


def attend_in_loops(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Every position asks (its query), every position offers (its key) and says (its value).

    How well the key fits decides how much of what is said is taken over: a weighted mean.
    """
    y = np.zeros_like(q)  # (T, D)
    for i, query in enumerate(q):
        scores = np.array([query @ key / math.sqrt(len(query)) for key in k])  # (T,)
        for weight, value in zip(softmax(scores), v, strict=True):
            y[i] += weight * value
    return y


def weights(q: np.ndarray, k: np.ndarray, causal: bool = False) -> np.ndarray:
    """p[i, j]: how much position i takes from position j; the same as the inner loop above.

    The products are over the last two axes, so (H, T, D) works as (T, D) does: all heads at once.
    """
    s = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])  # (…, T, D) @ (…, D, T) -> (…, T, T)
    if causal:  # j > i is the future: a score of −∞ becomes a weight of e^−∞ = 0
        future = np.triu(np.ones(s.shape[-2:], dtype=bool), k=1)
        s = np.where(future, -np.inf, s)
    return softmax(s)


def split_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """(T, H · D) -> (H, T, D): each head looks at its own D columns, as if alone."""
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)


def backward(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray) -> list[np.ndarray]:
    """[∂L/∂q, ∂L/∂k, ∂L/∂v] of causal attention, given g = ∂L/∂y; all (…, T, D)."""
    p = weights(q, k, causal=True)
    # y = p v, so as for every matrix product:
    dv = p.swapaxes(-1, -2) @ g
    dp = g @ v.swapaxes(-1, -2)
    # pᵢ = eˢᵢ / Σ eˢ. With i = j the quotient rule gives ∂pᵢ/∂sᵢ = pᵢ − pᵢ², with i ≠ j it gives
    # ∂pᵢ/∂sⱼ = −pᵢ pⱼ. So dsⱼ = Σᵢ dpᵢ ∂pᵢ/∂sⱼ = dpⱼ pⱼ − Σᵢ dpᵢ pᵢ pⱼ = pⱼ (dpⱼ − Σᵢ dpᵢ pᵢ).
    # What lies in the future has pⱼ = 0 and so gets dsⱼ = 0: the mask needs no line of its own.
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
    # s = q kᵀ / √D, a matrix product again.
    ds = ds / math.sqrt(q.shape[-1])
    return [ds @ k, ds.swapaxes(-1, -2) @ q, dv]


def picture(p: np.ndarray, text: str) -> str:
    """A row per query, a column per key; the darker the larger the weight."""
    shades = np.array(list(" .:-=+*#%@"))[(p * 9.99).astype(int)]
    lines = [f"   {letter} |{' '.join(row)}|" for letter, row in zip(text, shades, strict=True)]
    return "\n".join(["      " + " ".join(text), *lines])


def apart(a: object, b: object) -> str:
    """The largest difference, which has to be nothing but rounding."""
    difference = np.abs(np.asarray(a) - np.asarray(b)).max()
    assert difference < 1e-12
    return f"largest difference {difference:.0e}"


def from_loops_to_the_op(rng: np.random.Generator) -> None:
    T, H, D = 6, 4, 8
    q, k, v = (split_heads(rng.normal(size=(T, H * D)), H) for _ in range(3))  # (H, T, D) each
    looped = [attend_in_loops(q[h], k[h], v[h]) for h in range(H)]
    print(f"1. {T} positions, {H} heads of size {D}; the same attention in several ways:")
    print(f"   one head, loops and matrices:      {apart(looped[0], weights(q[0], k[0]) @ v[0])}")
    print(f"   all heads in one product:          {apart(looped, weights(q, k) @ v)}")
    y = weights(q, k, causal=True) @ v
    y_op = ops.scaled_dot_product_attention(q, k, v, is_causal=True)
    print(f"   causal, NumPy and the engine's op: {apart(y, y_op)}")
    k[:, -1], v[:, -1] = 100.0, 100.0
    changed = weights(q, k, causal=True) @ v
    print(f"   last position changed, others:     {apart(y[:, :-1], changed[:, :-1])}")
    # Grouped heads: half as many keys and values to store; query heads 0 and 1 share the first.
    few_k, few_v = k[:2], v[:2]
    repeated = weights(q, few_k.repeat(2, axis=0)) @ few_v.repeat(2, axis=0)
    y_op = ops.scaled_dot_product_attention(q, few_k, few_v)
    print(f"   {H} query heads on 2 key heads:      {apart(repeated, y_op)}")


def gradients(rng: np.random.Generator) -> None:
    q, k, v, g = rng.normal(size=(4, 2, 6, 8))  # each (H, T, D)
    Q, K, V = (Tensor(x, requires_grad=True) for x in (q, k, v))
    ops.scaled_dot_product_attention(Q, K, V, is_causal=True).backward(Tensor(g))
    print("\n2. The derived gradients against those of the op:")
    for name, t, by_hand in zip("qkv", (Q, K, V), backward(q, k, v, g), strict=True):
        print(f"   ∂L/∂{name} {t.shape}: {apart(t.grad, by_hand)}")


def a_picture(rng: np.random.Generator) -> None:
    text = "abracadabra"
    vectors = {letter: rng.normal(size=32) for letter in sorted(set(text))}
    x = np.stack([vectors[letter] for letter in text])  # (T, D): as query and as key the letter
    p = weights(x, x, causal=True)
    print("\n3. Each letter looks back for its like; nothing is right of the diagonal:")
    print(picture(p, text))
    assert (p[np.triu_indices(len(text), k=1)] == 0).all()
    share = np.mean([p[i, [c == text[i] for c in text]].sum() for i in range(len(text))])
    print(f"   {share:.0%} of the weight is on the same letter")
    assert share > 0.8


def why_the_root(rng: np.random.Generator) -> None:
    # q · k is a sum of D products. With entries of variance 1 each product has variance 1, and the
    # sum D. Scores spread that wide make softmax choose one key and ignore the rest; and of the
    # gradient little comes back through it: Σ ∂pᵢ/∂sᵢ = Σ p (1 − p) → 0.
    print("\n4. Scores of 64 keys, raw and divided by √D:")
    for D in (4, 64, 1024):
        raw = rng.normal(size=(200, D)) @ rng.normal(size=(64, D)).T
        for name, s, expected in (("raw", raw, D), ("/ √D", raw / math.sqrt(D), 1)):
            p = softmax(s)
            largest, through = p.max(axis=-1).mean(), (p * (1 - p)).sum(axis=-1).mean()
            print(
                f"   D {D:4}  {name:4}  variance {s.var():7.2f}  largest weight {largest:.2f}  "
                f"Σ p (1 − p) {through:.2f}"
            )
            assert 0.8 < s.var() / expected < 1.2
            assert name == "raw" or through > 0.9


if __name__ == "__main__":
    stream = np.random.default_rng(0)
    for part in (from_loops_to_the_op, gradients, a_picture, why_the_root):
        part(stream)
