"""The sum over all label sequences of a linear-chain CRF, and the best of them.

Dimensions: B batch, T steps, K labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_llm.autograd import Function
from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.ops.convert import as_float, as_tensor, narrowed, widened
from tinygrad_llm.ops.elementwise import where
from tinygrad_llm.ops.recurrent import check_lengths, gradients_by_plain_ops
from tinygrad_llm.ops.softmax import finite_max, logsumexp
from tinygrad_llm.tensor import Tensor


class LogPartition(Function):
    """y = ln Σ over all label sequences of e^score, for emissions x (B, T, K)

    score(k₁ … k_n) = start[k₁] + Σ_t x[t, k_t] + Σ_t transitions[k_{t−1}, k_t] + end[k_n]

    By the forward algorithm: e^α_t[k] is the sum over the beginnings that end with k at step t,
    α_t[k] = x[t, k] + ln Σ_j e^(α_{t−1}[j] + transitions[j, k]). What an α grows by at each step is
    taken off, c_t = ln Σ e^α_t, so that numbers stay small: y = Σ c_t.

    The gradients are probabilities: dx = g P(k_t = k), dtransitions = Σ g P(k_{t−1} = j, k_t = k).
    β goes through the steps backwards, summing over the ends of sequences, and with it

    P(k_t = k) = e^(α_t[k] + β_t[k])
    P(k_{t−1} = j, k_t = k) = e^(α_{t−1}[j] + transitions[j, k] + x[t, k] + β_t[k] − c_t)

    A sequence of no steps gives y = 0. −∞ forbids: such labels and transitions get no gradient.

    Lafferty, McCallum and Pereira, "Conditional random fields", 2001.
    """

    def forward(
        self, x: Array, transitions: Array, start: Array, end: Array, *, lengths: np.ndarray
    ) -> Array:
        self.lengths = lengths
        self.save(x, transitions, start, end)
        y, alphas, growth, last = _forward_walk(x, transitions, start, end, lengths)
        self.keep((alphas, growth, last))
        return narrowed(y, x)

    def backward(self, g: Any, x: Any, transitions: Any, start: Any, end: Any) -> Any:
        if isinstance(g, Tensor):
            return gradients_by_plain_ops(self, self._plain, g, x, transitions, start, end)
        xp, (alphas, growth, last) = namespace(g), self.kept
        counts = xp.asarray(self.lengths)
        steps, moves, weight = widened(x).swapaxes(0, 1), widened(transitions), widened(g)[:, None]
        dx = xp.zeros(x.shape, dtype=steps.dtype)
        dmoves = xp.zeros(moves.shape, dtype=steps.dtype)
        beta = widened(end) - last[:, None]
        for t in reversed(range(len(alphas))):
            real = (counts > t)[:, None]
            share = xp.where(real, weight, steps.dtype.type(0))
            dx[:, t] = share * xp.exp(xp.where(real, alphas[t] + beta, -np.inf))
            if t:
                onwards = moves + (steps[t] + beta - growth[t][:, None])[:, None, :]  # (B, K, K)
                pairs = xp.where(real[:, None], alphas[t - 1][:, :, None] + onwards, -np.inf)
                dmoves += (xp.exp(pairs) * share[:, None]).sum(axis=0)
                beta = xp.where(real, _log_sum_exp(onwards, 2), beta)
        final = dx[xp.arange(len(x)), xp.maximum(counts - 1, 0)] if x.shape[1] else dx[:, :0]
        found = dx, dmoves, dx[:, :1].sum(axis=(0, 1)), final.sum(axis=tuple(range(final.ndim - 1)))
        return tuple([narrowed(d, x) for d in found])

    def _plain(self, x: Tensor, transitions: Tensor, start: Tensor, end: Tensor) -> Tensor:
        return log_partition_reference(x, transitions, start, end, self.lengths)


def _forward_walk(
    x: Array, transitions: Array, start: Array, end: Array, lengths: np.ndarray
) -> tuple[Array, Array, Array, Array]:
    """ln Z (B,); α less its growth (T, B, K); the growth c (T, B), and that of the end (B,)."""
    xp, counts = namespace(x), namespace(x).asarray(lengths)
    steps, moves = widened(x).swapaxes(0, 1), widened(transitions)
    longest = int(lengths.max(initial=0))
    alphas = xp.zeros((longest, len(x), x.shape[2]), dtype=steps.dtype)
    growth = xp.zeros((longest, len(x)), dtype=steps.dtype)
    alpha = xp.broadcast_to(widened(start), (len(x), x.shape[2]))
    for t in range(longest):
        reached = _log_sum_exp(alpha[:, :, None] + moves, 1) if t else alpha
        new = reached + steps[t]
        grown = _log_sum_exp(new, 1)
        new -= _finite(grown)[:, None]
        real = counts > t
        alphas[t] = alpha = xp.where(real[:, None], new, alpha)
        growth[t] = xp.where(real, grown, steps.dtype.type(0))
    last = _log_sum_exp(alpha + widened(end), 1)
    y = xp.where(counts > 0, growth.sum(axis=0) + last, steps.dtype.type(0))
    return y, alphas, _finite(growth), _finite(last)


def _log_sum_exp(x: Array, axis: int) -> Array:
    xp, m = namespace(x), finite_max(x, axis)
    with np.errstate(divide="ignore"):  # ln 0 = −∞: nothing leads here
        return m.squeeze(axis) + xp.log(xp.exp(x - m).sum(axis=axis))


def _finite(x: Array) -> Array:
    """x, but 0 for −∞: there is nothing to take off, and −∞ − −∞ would be NaN."""
    return namespace(x).where(x == -np.inf, x.dtype.type(0), x)


def log_partition_reference(
    x: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: np.ndarray
) -> Tensor:
    """The same in plain ops, without taking off what α grows by: what the op is held against."""
    counts = namespace(x.data).asarray(lengths)
    alpha = start.broadcast_to((x.shape[0], x.shape[2]))
    for t in range(int(lengths.max(initial=0))):
        reached = logsumexp(alpha.unsqueeze(2) + transitions, axis=1) if t else alpha
        alpha = where((counts > t)[:, None], reached + x[:, t], alpha)
    return where(counts > 0, logsumexp(alpha + end, axis=1), 0.0)


def crf_log_partition(
    emissions: Any, transitions: Any, start: Any, end: Any, lengths: Any = None
) -> Tensor:
    """y = ln Σ over all label sequences of e^score (B,); formulas in `LogPartition`.

    Args:
        emissions: (B, T, K), the score of each label at each step
        transitions: (K, K), the score of going from label j (row) to label k (column)
        start, end: (K,), the scores of beginning and of ending with a label
        lengths: (B,) how many steps of each sequence are real, 0 included; None for all
    """
    x, *chain = _floats(emissions, transitions, start, end)
    counts = _check(x, chain, lengths)
    return LogPartition.apply(x, *chain, lengths=counts)


def _floats(*arrays: Any) -> list[Tensor]:
    """All in the dtype of the first."""
    x = as_float(arrays[0])
    return [x, *[as_tensor(a).astype(x.dtype) for a in arrays[1:]]]


def _check(x: Tensor, chain: list[Tensor], lengths: Any) -> np.ndarray:
    """The lengths, after a look at all shapes."""
    labels = x.shape[-1] if x.ndim else 0
    shapes = tuple([a.shape for a in chain])
    if x.ndim != 3 or not labels or shapes != ((labels, labels), (labels,), (labels,)):
        raise ValueError(
            "a CRF takes emissions (B, T, K), transitions (K, K), start and end (K,), got "
            f"{x.shape}, {', '.join(map(str, shapes[:2]))} and {shapes[2]}"
        )
    batch, time, _ = x.shape
    return check_lengths([time] * batch if lengths is None else lengths, batch, time)


def crf_decode(
    emissions: Any, transitions: Any, start: Any, end: Any, lengths: Any = None
) -> list[list[int]]:
    """The label sequence with the highest score of each row, by Viterbi's algorithm.

    Args:
        emissions, transitions, start, end, lengths: as `crf_log_partition`

    Returns:
        For each row its labels, as many as its length. Of equal scores the lower labels win.

    Viterbi, "Error bounds for convolutional codes", 1967.
    """
    x, *chain = _floats(emissions, transitions, start, end)
    lengths = _check(x, chain, lengths)
    xp, counts = namespace(x.data), namespace(x.data).asarray(lengths)
    steps = widened(x.data).swapaxes(0, 1)
    moves, first, last = (widened(a.data) for a in chain)
    longest, stay = int(lengths.max(initial=0)), xp.arange(x.shape[2])
    score = xp.broadcast_to(first, (len(counts), x.shape[2]))
    came_from = xp.empty((longest, *score.shape), dtype=np.int64)
    for t in range(longest):
        real, ways = (counts > t)[:, None], score[:, :, None] + moves
        came_from[t] = xp.where(real, ways.argmax(axis=1), stay)
        reached = ways.max(axis=1) if t else score
        score = xp.where(real, reached + steps[t], score)
    score = score + last
    if bool(((score == -np.inf).all(axis=1) & (counts > 0)).any()):
        raise ValueError("crf_decode(): a row has no label sequence that is not forbidden (−∞)")
    label, rows = score.argmax(axis=1), xp.arange(len(counts))
    path = xp.empty((longest, len(counts)), dtype=np.int64)
    for t in reversed(range(longest)):
        path[t] = label
        label = came_from[t][rows, label]
    return [labels[:n] for labels, n in zip(path.T.tolist(), lengths.tolist(), strict=True)]
