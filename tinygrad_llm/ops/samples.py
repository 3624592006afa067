"""Inputs on which each op's gradient is checked: every op must have some, a test sees to it.

Ordinary values, broadcasting, empty arrays, zero dimensions, and values at the edge of what the op
accepts, but never on a kink, where there is no derivative to compare with. Each sample is checked
in three memory layouts (see `gradcheck.layouts`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.autograd import Function
from tinygrad_llm.ops import activations, convert, elementwise, indexing, linalg, reduce, shape
from tinygrad_llm.ops.attention import Attention, scaled_dot_product_attention
from tinygrad_llm.ops.crf import LogPartition
from tinygrad_llm.ops.dropout import Dropout
from tinygrad_llm.ops.embedding import AddRows, Embedding, embedding
from tinygrad_llm.ops.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from tinygrad_llm.ops.norm import LayerNorm, RMSNorm, layer_norm, rms_norm
from tinygrad_llm.ops.quantize import QuantizedLinear, quantize, quantized_linear
from tinygrad_llm.ops.recurrent import LSTM
from tinygrad_llm.ops.rotary import Rotary, rotary_embedding, rotary_tables
from tinygrad_llm.ops.softmax import (
    BinaryCrossEntropy,
    CrossEntropy,
    LogSoftmax,
    LogSumExp,
    Softmax,
    binary_cross_entropy,
    cross_entropy,
    log_softmax,
    logsumexp,
    softmax,
)
from tinygrad_llm.tensor import Tensor


@dataclass(frozen=True)
class Sample:
    """One call of an op: function(*arrays); the float arrays are differentiated."""

    note: str
    function: Callable[..., Tensor]
    arrays: tuple[np.ndarray, ...]


Samples = dict[type[Function], list[Sample]]


def samples() -> Samples:
    """The samples of every op, by class."""
    rng = np.random.default_rng(0)
    found: Samples = {}
    for family in (
        _arithmetic,
        _unary,
        _piecewise,
        _reductions,
        _shapes,
        _indexing,
        _products,
        _softmaxes,
        _norms,
        _lookups,
        _attention,
        _positions,
        _quantized,
        _recurrent,
    ):
        found |= family(_Maker(rng))
    return found


class _Maker:
    """Makes samples from shapes."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape)

    def positive(self, *shape: int) -> np.ndarray:
        return self.rng.uniform(0.2, 2.0, size=shape)

    def off_zero(self, *shape: int) -> np.ndarray:
        """Away from the kink at 0 by more than the steps of the check."""
        x = self.normal(*shape)
        return x + np.copysign(0.1, x)

    def distinct(self, *shape: int) -> np.ndarray:
        """No two elements closer than the steps of the check: maxima are unique."""
        n = int(np.prod(shape))
        return (self.rng.permutation(n).reshape(shape) - n / 2) * 0.3 + 0.05

    def unary(
        self, function: Callable[..., Tensor], make: Callable[..., np.ndarray] | None = None
    ) -> list[Sample]:
        make = make or self.normal
        return [
            Sample("ordinary", function, (make(3, 4),)),
            Sample("three axes", function, (make(2, 1, 3),)),
            Sample("scalar", function, (make(),)),
            Sample("empty", function, (make(0, 3),)),
        ]

    def binary(
        self,
        function: Callable[..., Tensor],
        left: Callable[..., np.ndarray],
        right: Callable[..., np.ndarray],
    ) -> list[Sample]:
        shapes = {
            "ordinary": ((3, 4), (3, 4)),
            "broadcast rows": ((3, 4), (4,)),
            "broadcast both": ((3, 1, 2), (4, 1)),
            "with a scalar": ((2, 3), ()),
            "scalars": ((), ()),
            "empty": ((0, 3), (3,)),
            "emptied by broadcasting": ((1, 3), (0, 3)),
        }
        return [Sample(note, function, (left(*a), right(*b))) for note, (a, b) in shapes.items()]


def _arithmetic(make: _Maker) -> Samples:
    normal, positive, off = make.normal, make.positive, make.off_zero
    power = [
        Sample(f"n = {n}", lambda x, n=n: x**n, (positive(2, 3),))
        for n in (0, 2, 3, 4, -1, 0.5, -1.5)
    ]
    power += [
        Sample("negative base", lambda x: x**3, (normal(2, 3),)),
        Sample("at zero", lambda x: x**2, (np.zeros((2, 2)),)),
        Sample("empty", lambda x: x**2, (normal(0, 2),)),
    ]
    return {
        elementwise.Add: make.binary(elementwise.add, normal, normal),
        elementwise.Subtract: make.binary(elementwise.subtract, normal, normal),
        elementwise.Multiply: [
            *make.binary(elementwise.multiply, normal, normal),
            Sample("with itself", lambda x: x * x, (normal(3),)),
        ],
        elementwise.Divide: make.binary(elementwise.divide, normal, off),
        elementwise.Power: make.binary(elementwise.power, positive, normal),
        elementwise.PowerScalar: power,
        elementwise.Negative: make.unary(elementwise.negative),
    }


def _unary(make: _Maker) -> Samples:
    wide = np.array([-30.0, -9.0, -4.5, -0.47, 0.0, 1e-8, 0.46, 3.9, 6.5, 30.0])
    near_minus_one = lambda *s: make.positive(*s) - 1.0  # noqa: E731
    e = elementwise

    def smooth(function: Callable[..., Tensor]) -> list[Sample]:
        return [*make.unary(function), Sample("wide range", function, (wide.copy(),))]

    return {
        e.Exp: [*make.unary(e.exp), Sample("underflow", e.exp, (np.array([-800.0, -30.0]),))],
        e.Log: make.unary(e.log, make.positive),
        e.Log1p: make.unary(e.log1p, near_minus_one),
        e.Sqrt: make.unary(e.sqrt, make.positive),
        e.Rsqrt: make.unary(e.rsqrt, make.positive),
        e.Tanh: smooth(e.tanh),
        e.Sigmoid: smooth(e.sigmoid),
        e.Sin: smooth(e.sin),
        e.Cos: smooth(e.cos),
        e.Erf: smooth(e.erf),
        activations.Gelu: smooth(activations.gelu),
        activations.GeluTanh: smooth(lambda x: activations.gelu(x, "tanh")),
        activations.Silu: smooth(activations.silu),
        activations.SwiGLU: [
            Sample("ordinary", activations.swiglu, _two(make, (3, 4), (3, 4))),
            Sample("wide range", activations.swiglu, (wide.copy(), make.normal(10))),
            Sample(
                "two halves",
                lambda x: activations.swiglu(*shape.chunk(x, 2, -1)),
                (make.normal(2, 3, 4),),
            ),
            Sample("with itself", lambda x: activations.swiglu(x, x), (make.normal(3),)),
            Sample("scalars", activations.swiglu, _two(make, (), ())),
            Sample("empty", activations.swiglu, _two(make, (0, 3), (0, 3))),
        ],
        activations.Softplus: smooth(activations.softplus),
    }


def _piecewise(make: _Maker) -> Samples:
    e = elementwise
    mask = np.array([[True, False, True, False], [False] * 4, [True] * 4])
    below = lambda *s: make.distinct(*s) - 100.0  # noqa: E731
    extremum = [
        *make.binary(e.maximum, make.distinct, below),
        *make.binary(e.minimum, make.distinct, below),
        Sample("mixed", e.maximum, (make.distinct(3, 4), make.distinct(3, 4) + 0.1)),
        Sample("mixed, broadcast", e.minimum, (make.distinct(3, 4), make.distinct(4) + 0.1)),
    ]
    return {
        e.Abs: make.unary(e.abs, make.off_zero),
        activations.Relu: make.unary(activations.relu, make.off_zero),
        e.Extremum: extremum,
        e.Clip: make.unary(lambda x: e.clip(x, -1.0, 0.025), make.distinct)
        + make.unary(lambda x: e.clip(x, min=0.0), make.off_zero)
        + make.unary(lambda x: e.clip(x, max=0.0), make.off_zero),
        e.Where: [
            Sample("ordinary", lambda a, b: e.where(mask, a, b), _two(make, (3, 4), (3, 4))),
            Sample("broadcast", lambda a, b: e.where(mask, a, b), _two(make, (4,), (3, 1))),
            Sample(
                "condition repeated", lambda a, b: e.where(mask[0], a, b), _two(make, (2, 4), ())
            ),
            Sample("empty", lambda a, b: e.where(mask[:0], a, b), _two(make, (0, 4), (4,))),
        ],
        e.MaskedFill: [
            Sample("ordinary", lambda x: e.masked_fill(x, mask, 7.0), (make.normal(3, 4),)),
            Sample("mask repeated", lambda x: e.masked_fill(x, mask[0], 7.0), (make.normal(2, 4),)),
            Sample("empty", lambda x: e.masked_fill(x, mask[:0], 7.0), (make.normal(0, 4),)),
        ],
    }


def _two(make: _Maker, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    return make.normal(*a), make.normal(*b)


def _reductions(make: _Maker) -> Samples:
    r = reduce

    def over_axes(
        function: Callable[..., Tensor],
        values: Callable[..., np.ndarray],
        empty: tuple[int, ...] | None = (0, 3),
        axes: tuple[Any, ...] = (None, 0, -1, (0, 2)),
    ) -> list[Sample]:
        found = [
            Sample(
                f"axis {axis}, keepdims {keep}",
                lambda x, axis=axis, keep=keep: function(x, axis=axis, keepdims=keep),
                (values(2, 3, 4),),
            )
            for axis in axes
            for keep in (False, True)
        ]
        found.append(Sample("one element", lambda x: function(x, axis=0), (values(1, 2),)))
        if empty is not None:
            found.append(Sample("empty", lambda x: function(x, axis=1), (values(*empty),)))
        return found

    def with_ddof(function: Callable[..., Tensor]) -> list[Sample]:
        one = lambda x: function(x, axis=1, ddof=1)  # noqa: E731
        found = [s for s in over_axes(function, make.normal) if s.note != "one element"]
        return [*found, Sample("ddof 1", one, (make.normal(2, 4),))]

    nonzero = make.off_zero
    with_zeros = np.array([[0.0, 2.0, -1.5], [0.0, 0.0, 3.0], [1.0, 2.0, 0.5]])
    return {
        r.Sum: over_axes(r.sum, make.normal, empty=(2, 0)),
        r.Mean: over_axes(r.mean, make.normal),
        r.Var: with_ddof(r.var),
        r.Std: with_ddof(r.std),
        r.Amax: over_axes(r.max, make.distinct) + over_axes(r.min, make.distinct),
        r.Prod: [
            *over_axes(r.prod, nonzero, empty=(2, 0)),
            Sample("with zeros", lambda x: r.prod(x, axis=1), (with_zeros,)),
            Sample("with zeros, all axes", r.prod, (with_zeros,)),
        ],
        r.Norm: over_axes(r.norm, nonzero),
        r.Cumsum: [
            Sample("last axis", r.cumsum, (make.normal(3, 4),)),
            Sample("first axis", lambda x: r.cumsum(x, axis=0), (make.normal(3, 4),)),
            Sample("empty", r.cumsum, (make.normal(2, 0),)),
        ],
    }


def _shapes(make: _Maker) -> Samples:
    s, normal = shape, make.normal
    join = lambda *xs: s.concatenate(xs, axis=1)  # noqa: E731
    return {
        s.Reshape: [
            Sample("ordinary", lambda x: x.reshape(4, -1), (normal(2, 3, 2),)),
            Sample("to a scalar", lambda x: x.reshape(()), (normal(1, 1),)),
            Sample("empty", lambda x: x.reshape(3, 0), (normal(0, 3),)),
        ],
        s.Transpose: [
            Sample("permuted", lambda x: x.transpose(2, 0, 1), (normal(2, 3, 4),)),
            Sample("swapped", lambda x: x.swapaxes(0, -1), (normal(2, 3, 4),)),
            Sample("scalar", lambda x: x.T, (normal(),)),
            Sample("empty", lambda x: x.T, (normal(0, 3),)),
        ],
        s.BroadcastTo: [
            Sample("new axes", lambda x: x.broadcast_to((2, 3, 4)), (normal(3, 1),)),
            Sample("another axis", lambda x: x.broadcast_to((2, 3, 4)), (normal(3, 4),)),
            Sample("from a scalar", lambda x: x.broadcast_to((2, 3)), (normal(),)),
            Sample("to nothing", lambda x: x.broadcast_to((0, 3)), (normal(1, 3),)),
            Sample("empty", lambda x: x.broadcast_to((2, 0, 3)), (normal(0, 1),)),
        ],
        s.Concatenate: [
            Sample("three", join, (normal(2, 1), normal(2, 3), normal(2, 2))),
            Sample("with an empty one", join, (normal(2, 0), normal(2, 3))),
            Sample("stacked", lambda a, b: s.stack((a, b), 1), (normal(2, 3), normal(2, 3))),
        ],
        s.Pad: [
            Sample("uneven", lambda x: s.pad(x, ((1, 0), (2, 3)), 0.5), (normal(2, 3),)),
            Sample("empty", lambda x: s.pad(x, 1), (normal(0, 2),)),
        ],
        s.Flip: [*make.unary(s.flip), Sample("one axis", lambda x: s.flip(x, 1), (normal(2, 3),))],
        s.Roll: [
            Sample("one axis", lambda x: s.roll(x, 2, 1), (normal(2, 3),)),
            Sample("two axes", lambda x: s.roll(x, (1, -2), (0, 1)), (normal(3, 4),)),
            Sample("flattened", lambda x: s.roll(x, 5), (normal(3, 4),)),
            Sample("empty", lambda x: s.roll(x, 1, 0), (normal(0, 4),)),
        ],
        s.Triangle: [
            Sample("lower", lambda x: s.tril(x, -1), (normal(4, 3),)),
            Sample("upper, batched", lambda x: s.triu(x, 1), (normal(2, 3, 4),)),
            Sample("empty", s.tril, (normal(0, 3),)),
        ],
        s.Copy: make.unary(s.copy),
        convert.Cast: make.unary(lambda x: convert.astype(x, backend.float64, copy=True)),
        convert.ToDevice: make.unary(lambda x: convert.ToDevice.apply(x, device="cpu")),
    }


def _indexing(make: _Maker) -> Samples:
    i, normal = indexing, make.normal
    rows, columns = np.array([2, 0, 2, -1]), np.array([[0], [1], [1], [3]])
    mask = np.array([[True, False, False, True], [False] * 4, [True, True, False, False]])
    indices: dict[str, Any] = {
        "slice": np.s_[1:, ::2],
        "backwards": np.s_[::-1, 1],
        "integer": 1,
        "new axis": np.s_[None, ..., 0],
        "integers, repeated": rows,
        "boolean": mask,
        "mixed": np.s_[rows, 1:3],
        "broadcast integers": (rows, columns),
        "nothing": np.s_[3:],
        "no integers": np.zeros(0, np.int64),
    }
    get = [
        Sample(note, lambda x, k=k: i.getitem(x, k), (normal(3, 4),)) for note, k in indices.items()
    ]
    get.append(Sample("empty", lambda x: x[:, 1:], (normal(0, 3),)))
    put_in = lambda x, v: i.setitem(x, np.s_[1:, ::2], v)  # noqa: E731
    twice = lambda x, v: i.setitem(x, np.array([0, 2, 0]), v)  # noqa: E731
    at = np.array([[0, 1], [0, 0]])
    return {
        i.GetItem: get,
        i.SetItem: [
            Sample("slice", put_in, (normal(3, 4), normal(2, 2))),
            Sample("broadcast", put_in, (normal(3, 4), normal(2, 1))),
            Sample("an element twice", twice, (normal(3, 2), normal(3, 2))),
            Sample("boolean", lambda x, v: i.setitem(x, mask, v), (normal(3, 4), normal(4))),
            Sample("empty", put_in, (normal(1, 4), normal(0, 2))),
        ],
        i.PutAt: [
            Sample("scatter", lambda x, s: i.scatter_add(x, 1, at, s), _two(make, (2, 3), (2, 2))),
            Sample("gather", lambda x: i.gather(x, 0, at), (normal(2, 3),)),
            Sample("empty", lambda s: i.PutAt.apply(s, shape=(3,), index=rows[:0]), (normal(0),)),
        ],
    }


def _products(make: _Maker) -> Samples:
    shapes = {
        "matrices": ((3, 4), (4, 2)),
        "vectors": ((4,), (4,)),
        "vector, matrix": ((4,), (4, 2)),
        "matrix, vector": ((3, 4), (4,)),
        "batch": ((2, 3, 4), (2, 4, 2)),
        "batch, one matrix": ((2, 2, 3, 4), (4, 2)),
        "one matrix, batch": ((3, 4), (2, 4, 2)),
        "broadcast batches": ((2, 1, 3, 4), (3, 4, 2)),
        "no inner": ((3, 0), (0, 2)),
        "no rows": ((0, 4), (4, 2)),
    }
    no_bias = lambda x, w: linalg.linear(x, w)  # noqa: E731
    return {
        linalg.MatMul: [
            Sample(note, linalg.matmul, _two(make, a, b)) for note, (a, b) in shapes.items()
        ],
        linalg.Linear: [
            Sample("rows", linalg.linear, (*_two(make, (3, 4), (2, 4)), make.normal(2))),
            Sample("batch", linalg.linear, (*_two(make, (2, 3, 4), (2, 4)), make.normal(2))),
            Sample("one vector", linalg.linear, (*_two(make, (4,), (2, 4)), make.normal(2))),
            Sample("no bias", no_bias, _two(make, (3, 4), (2, 4))),
            Sample("empty", linalg.linear, (*_two(make, (0, 4), (2, 4)), make.normal(2))),
        ],
    }


def _quantized(make: _Maker) -> Samples:
    def frozen(n: int, k: int, **options: Any) -> Callable[..., Tensor]:
        size, w = options.get("group_size"), quantize(make.normal(n, k), **options)
        return lambda x, b=None: quantized_linear(x, *w, b, group_size=size)

    bits4 = {"bits": 4, "group_size": 16}
    return {
        QuantizedLinear: [
            Sample("8 bits", frozen(3, 4), (make.normal(2, 4), make.normal(3))),
            Sample("4 bits", frozen(3, 37, **bits4), (make.normal(2, 2, 37),)),
            Sample("zero points", frozen(3, 20, symmetric=False, **bits4),
                   (make.normal(2, 20), make.normal(3))),
            Sample("one vector", frozen(3, 4), (make.normal(4),)),
            Sample("no rows", frozen(3, 4), (make.normal(0, 4), make.normal(3))),
            Sample("no columns", frozen(3, 0), (make.normal(2, 0), make.normal(3))),
        ],
    }  # fmt: skip


def _softmaxes(make: _Maker) -> Samples:
    normal = make.normal
    hidden = np.array([[1.0, -np.inf, 0.5], [-np.inf] * 3, [2.0, 1.0, -np.inf]])
    seen = np.isfinite(hidden)

    def masked(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # −∞ cannot be differentiated numerically: masked in, and masked out of what can be −∞.
        def call(x: Tensor) -> Tensor:
            return function(elementwise.masked_fill(x, ~seen, -np.inf))

        return call

    def along(function: Callable[..., Tensor]) -> list[Sample]:
        return [
            Sample("last axis", function, (normal(3, 4),)),
            Sample("first axis", lambda x: function(x, axis=0), (normal(3, 4),)),
            Sample("middle axis", lambda x: function(x, axis=1), (normal(2, 3, 2),)),
            Sample("far apart", function, (normal(2, 4) * 20,)),
            Sample("empty", function, (normal(0, 4),)),
        ]

    labels, some = np.array([2, 0, 1, 1]), np.array([2, -100, 1, -100])
    weight = np.array([0.5, 1.0, 2.0])
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "summed": {"reduction": "sum"},
        "each": {"reduction": "none"},
        "ignored": {"target": some},
        "weights": {"weight": weight},
        "smoothed": {"label_smoothing": 0.2},
        "all together": {"target": some, "weight": weight, "label_smoothing": 0.1},
        "all ignored": {"target": np.full(4, -100)},
    }
    ce = [
        Sample(
            note,
            lambda x, o=o: cross_entropy(x, **({"target": labels} | o)),  # pyright: ignore
            (normal(4, 3),),
        )
        for note, o in options.items()
    ]
    ce.append(Sample("empty", lambda x: cross_entropy(x, labels[:0]), (normal(0, 3),)))

    def last_layer(target: np.ndarray = labels, **options: Any) -> Callable[..., Tensor]:
        return lambda x, w, b=None: linear_cross_entropy(x, w, target, b, chunk=3, **options)

    of_all = {"weight": weight, "label_smoothing": 0.1}
    linear_ce = [
        Sample("plain", last_layer(), _two(make, (4, 2), (3, 2))),
        Sample("bias", last_layer(), (*_two(make, (4, 2), (3, 2)), normal(3))),
        Sample("summed", last_layer(reduction="sum"), _two(make, (4, 2), (3, 2))),
        Sample(
            "all together", last_layer(some, **of_all), (*_two(make, (4, 2), (3, 2)), normal(3))
        ),
        Sample("three axes", last_layer(labels.reshape(2, 2)), _two(make, (2, 2, 2), (3, 2))),
        Sample("all ignored", last_layer(np.full(4, -100)), _two(make, (4, 2), (3, 2))),
        Sample("empty", last_layer(labels[:0]), _two(make, (0, 2), (3, 2))),
    ]
    keep_seen = lambda x: elementwise.masked_fill(log_softmax(x), ~seen, 0.0)  # noqa: E731
    finite_rows = np.array([0, 2])
    return {
        Softmax: [*along(softmax), Sample("masked", masked(softmax), (normal(3, 3),))],
        LogSoftmax: [
            *along(log_softmax),
            Sample("masked", lambda x: masked(keep_seen)(x)[finite_rows], (normal(3, 3),)),
        ],
        LogSumExp: [
            *along(logsumexp),
            Sample("all axes", lambda x: logsumexp(x, axis=None), (normal(2, 3),)),
            Sample("two axes", lambda x: logsumexp(x, (0, 2), True), (normal(2, 3, 2),)),
            Sample("masked", lambda x: masked(logsumexp)(x)[finite_rows], (normal(3, 3),)),
        ],
        CrossEntropy: ce,
        LinearCrossEntropy: linear_ce,
        BinaryCrossEntropy: [
            Sample("ordinary", binary_cross_entropy, (make.positive(3, 4) / 2.5, normal(3, 4))),
            Sample("empty", lambda p, z: binary_cross_entropy(p, z, reduction="sum"),
                   (make.positive(0, 4), normal(0, 4))),
        ],
    }  # fmt: skip


def _norms(make: _Maker) -> Samples:
    normal = make.normal
    w, b = make.positive(4), normal(4)
    return {
        LayerNorm: [
            Sample("ordinary", layer_norm, (normal(3, 4), w, b)),
            Sample("three axes", layer_norm, (normal(2, 3, 4), w, b)),
            Sample("no bias", lambda x, w: layer_norm(x, w), (normal(3, 4), w)),
            Sample("no weight", lambda x, b: layer_norm(x, None, b), (normal(3, 4), b)),
            Sample("neither", layer_norm, (normal(3, 4),)),
            Sample("two axes", lambda x, w: layer_norm(x, w), (normal(2, 2, 3), normal(2, 3))),
            Sample("equal elements", lambda x, w: layer_norm(x, w, eps=0.1), (np.ones((2, 4)), w)),
            Sample("empty", layer_norm, (normal(0, 4), w, b)),
        ],
        RMSNorm: [
            Sample("ordinary", rms_norm, (normal(3, 4), w)),
            Sample("no weight", rms_norm, (normal(2, 3, 4),)),
            Sample("zeros", lambda x, w: rms_norm(x, w, eps=0.1), (np.zeros((2, 4)), w)),
            Sample("empty", rms_norm, (normal(0, 4), w)),
        ],
    }  # fmt: skip


def _lookups(make: _Maker) -> Samples:
    ids = np.array([[0, 2, 2], [4, 0, 2]])
    drop = lambda x: Dropout.apply(x, p=0.4, seed=3, offset=7)  # noqa: E731
    look = lambda w: embedding(ids, w)  # noqa: E731
    add = lambda x: AddRows.apply(x, ids=ids.reshape(-1), shape=(5, 3))  # noqa: E731
    return {
        Embedding: [
            Sample("repeated ids", look, (make.normal(5, 3),)),
            Sample("padding unused", lambda w: embedding(ids, w, 3), (make.normal(5, 3),)),
            Sample("no ids", lambda w: embedding(ids[:0], w), (make.normal(5, 3),)),
            Sample("no columns", look, (make.normal(5, 0),)),
        ],
        AddRows: [
            Sample("repeated ids", add, (make.normal(6, 3),)),
            Sample("empty", lambda x: AddRows.apply(x, ids=ids[0, :0], shape=(5, 3)),
                   (make.normal(0, 3),)),
        ],
        Dropout: make.unary(drop),
    }  # fmt: skip


def _attention(make: _Maker) -> Samples:
    def qkv(
        batch: tuple[int, ...] = (2, 2),
        t: int = 3,
        s: int = 3,
        d: int = 4,
        shared: int | None = None,
    ) -> tuple[np.ndarray, ...]:
        kv = batch if shared is None else (*batch[:-1], shared)
        return make.normal(*batch, t, d), make.normal(*kv, s, d), make.normal(*kv, s, 2)

    def attend(**options: Any) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            if mask is not None:
                return scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
            return scaled_dot_product_attention(q, k, v, **options)

        return call

    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = backend.random.state()
        backend.random.load_state({"seed": 5, "offset": 0})
        try:
            return scaled_dot_product_attention(q, k, v, dropout_p=0.3)
        finally:
            backend.random.load_state(state)

    boolean = np.array([[True, False, True], [False] * 3, [True] * 3])
    return {
        Attention: [
            Sample("plain", attend(), qkv()),
            Sample("causal", attend(is_causal=True), qkv()),
            Sample("causal, fewer queries", attend(is_causal=True), qkv(t=2, s=4)),
            Sample("causal, more queries", attend(is_causal=True), qkv(t=4, s=2)),
            Sample("boolean mask, a row hidden", attend(attn_mask=boolean), qkv()),
            Sample("additive mask", attend(), (*qkv(), make.normal(2, 2, 3, 3))),
            Sample("additive mask, repeated", attend(), (*qkv(), make.normal(1, 3, 3))),
            Sample("lengths", attend(lengths=np.array([2, 0])), qkv()),
            Sample("grouped heads", attend(is_causal=True), qkv(batch=(2, 4), shared=2)),
            Sample("grouped heads, biased", attend(),
                   (*qkv(batch=(2, 4), shared=2), make.normal(4, 3, 3))),
            Sample("dropout", dropped, qkv()),
            Sample("no heads axis", attend(), qkv(batch=())),
            Sample("no queries", attend(), qkv(t=0)),
            Sample("no keys", attend(), qkv(s=0)),
            Sample("no batch", attend(), qkv(batch=(0, 2))),
        ],
    }  # fmt: skip


def _positions(make: _Maker) -> Samples:
    cos, sin = rotary_tables(7, 4, base=3.0, dtype=backend.float64)
    own = cos.data[np.array([[0, 1, 2], [6, 6, 5]])][:, None]  # a table for each of two texts

    def turn(**options: Any) -> Callable[..., Tensor]:
        return lambda x: rotary_embedding(x, cos, sin, **options)

    return {
        Rotary: [
            Sample("ordinary", turn(), (make.normal(3, 4),)),
            Sample("later", turn(offset=4), (make.normal(2, 2, 3, 4),)),
            Sample("interleaved", turn(offset=1, interleaved=True), (make.normal(2, 3, 4),)),
            Sample("a table for each text", lambda x: rotary_embedding(x, own, own),
                   (make.normal(2, 2, 3, 4),)),
            Sample("a single pair", lambda x: rotary_embedding(x, cos[:, :1], sin[:, :1]),
                   (make.normal(3, 2),)),
            Sample("empty", turn(), (make.normal(2, 0, 4),)),
        ],
    }  # fmt: skip


def _recurrent(make: _Maker) -> Samples:
    def layer(t: int = 3, b: int = 2, i: int = 3, h: int = 2, bias: bool = True) -> Any:
        state = make.normal(b, h), make.normal(b, h)
        biases = (make.normal(4 * h), make.normal(4 * h)) * bias
        return make.normal(t, b, i), *state, make.normal(4 * h, i), make.normal(4 * h, h), *biases

    def run(lengths: Any = None, reverse: bool = False) -> Callable[..., Tensor]:
        counts = None if lengths is None else np.array(lengths, np.int64)
        return lambda *arrays: LSTM.apply(*arrays, lengths=counts, reverse=reverse)

    def chain(b: int, t: int, k: int) -> tuple[np.ndarray, ...]:
        return make.normal(b, t, k), make.normal(k, k), make.normal(k), make.normal(k)

    def partition(*lengths: int) -> Callable[..., Tensor]:
        counts = np.array(lengths, np.int64)
        return lambda *arrays: LogPartition.apply(*arrays, lengths=counts)

    return {
        LSTM: [
            Sample("ordinary", run(), layer()),
            Sample("reverse", run(reverse=True), layer()),
            Sample("lengths", run((1, 3, 0, 2)), layer(b=4)),
            Sample("lengths, reverse", run((2, 0, 3), reverse=True), layer(b=3)),
            Sample("no bias", run(), layer(bias=False)),
            Sample("one step", run(), layer(t=1, h=3)),
            Sample("no steps", run(), layer(t=0)),
            Sample("no batch", run(), layer(b=0)),
        ],
        LogPartition: [
            Sample("ordinary", partition(3, 3), chain(2, 3, 4)),
            Sample("lengths", partition(1, 4, 0, 2), chain(4, 4, 3)),
            Sample("one label", partition(3), chain(1, 3, 1)),
            Sample("one step", partition(1, 1), chain(2, 1, 3)),
            Sample("no steps", partition(0, 0), chain(2, 0, 3)),
            Sample("no batch", partition(), chain(0, 2, 3)),
        ],
    }
