"""The op behind the CRF layer; tests/nn/test_crf.py holds it against all label sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinygrad_llm import Tensor, grad, ops
from tinygrad_llm.ops.crf import log_partition_reference


def _inputs(rng: np.random.Generator, b: int = 3, t: int = 4, k: int = 3) -> Any:
    """emissions, transitions, start, end"""
    shapes = (b, t, k), (k, k), (k,), (k,)
    return [Tensor(rng.normal(size=s), requires_grad=True) for s in shapes]


def test_it_equals_plain_ops_and_so_do_both_orders_of_gradients(rng, close) -> None:
    inputs, lengths = _inputs(rng), np.array([4, 0, 2])
    found = []
    for run in (ops.crf_log_partition, log_partition_reference):
        y = run(*inputs, lengths=lengths)
        first = grad((y * y).sum(), inputs, create_graph=True)
        second = grad((first[0] * first[0]).sum(), inputs[:2])
        found.append([y, *first, *second])
    for got, wanted in zip(*found, strict=True):
        close(got, wanted.numpy(), times=100)


def test_gradients_are_probabilities(rng) -> None:
    inputs = _inputs(rng)
    y = ops.crf_log_partition(*inputs)
    dx, moves, start, end = (d.numpy() for d in grad(y.sum(), inputs))
    np.testing.assert_allclose(dx.sum(axis=2), 1.0)
    np.testing.assert_allclose(moves.sum(), 3 * 3)  # 3 rows of 3 transitions each
    np.testing.assert_allclose(moves.sum(axis=1), dx[:, :-1].sum(axis=(0, 1)))
    np.testing.assert_allclose(moves.sum(axis=0), dx[:, 1:].sum(axis=(0, 1)))
    np.testing.assert_allclose(start, dx[:, 0].sum(axis=0))
    np.testing.assert_allclose(end, dx[:, -1].sum(axis=0))


def test_what_is_forbidden_gets_no_gradient(rng) -> None:
    x, moves, start, end = _inputs(rng)
    moves.data[0, 1] = start.data[2] = end.data[0] = x.data[1, 2, 1] = -np.inf
    y = ops.crf_log_partition(x, moves, start, end)
    assert np.isfinite(y.numpy()).all()
    dx, dmoves, dstart, dend = (d.numpy() for d in grad(y.sum(), [x, moves, start, end]))
    assert dmoves[0, 1] == dstart[2] == dend[0] == dx[1, 2, 1] == 0
    assert all(np.isfinite(d).all() for d in (dx, dmoves, dstart, dend))
    start.data[...] = -np.inf
    y = ops.crf_log_partition(x, moves, start, end)
    assert (y.numpy() == -np.inf).all()
    assert (grad(y.sum(), x)[0].numpy() == 0).all()
    with pytest.raises(ValueError, match="no label sequence that is not forbidden"):
        ops.crf_decode(x, moves, start, end)


def test_padding_is_never_read(rng) -> None:
    x, *chain = _inputs(rng)
    x.data[0, 2:] = x.data[1] = np.nan
    y = ops.crf_log_partition(x, *chain, lengths=[2, 0, 4])
    assert np.isfinite(y.numpy()).all()
    for d in grad(y.sum(), [x, *chain]):
        assert np.isfinite(d.numpy()).all()
    assert [len(row) for row in ops.crf_decode(x, *chain, lengths=[2, 0, 4])] == [2, 0, 4]


def test_of_equal_scores_the_lower_labels_win() -> None:
    zeros = np.zeros((3, 3))
    assert ops.crf_decode(zeros[None], zeros, zeros[0], zeros[0]) == [[0, 0, 0]]


def test_what_does_not_fit_is_refused(rng) -> None:
    x, moves, start, end = _inputs(rng)
    with pytest.raises(ValueError, match=r"emissions \(B, T, K\).*got \(4, 3\)"):
        ops.crf_log_partition(x[0], moves, start, end)
    with pytest.raises(ValueError, match=r"start and end \(K,\), got .*\(2,\)"):
        ops.crf_decode(x, moves, start, end[:2])
    with pytest.raises(ValueError, match="from 0 to the 4 steps there are, got 5"):
        ops.crf_log_partition(x, moves, start, end, [5, 1, 1])
