"""LSTM: a memory that is written, kept and read through gates, step by step along the time.

Dimensions: T time, B batch, I inputs, H hidden; N the steps of all sequences together, Σ lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.autograd import Function, grad
from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.ops.convert import as_float, as_tensor, narrowed, widened
from tinygrad_llm.ops.elementwise import sigmoid, tanh, where
from tinygrad_llm.ops.linalg import linear
from tinygrad_llm.ops.shape import chunk, concatenate, copy, stack
from tinygrad_llm.tensor import Tensor


class LSTM(Function):
    """One layer in one direction, over all steps. With z = W x + b + U h′ + b′, cut into four:

    i, f, o = σ(z_i), σ(z_f), σ(z_o);  v = tanh(z_g);  c = f ⊙ c′ + i ⊙ v;  h = o ⊙ tanh(c)

    where h′ and c′ are those of the step before. Backward goes from the last step to the first,
    with ḣ and ċ the gradients that a step gets from its output y = h and from the step after it:

    ċ += ḣ ⊙ o ⊙ (1 − tanh²c)
    ż_i = ċ ⊙ v ⊙ i(1 − i);  ż_f = ċ ⊙ c′ ⊙ f(1 − f);  ż_g = ċ ⊙ i ⊙ (1 − v²)
    ż_o = ḣ ⊙ tanh(c) ⊙ o(1 − o)
    to the step before:  ḣ′ = Uᵀ ż,  ċ′ = ċ ⊙ f
    of all steps at once:  dx = ż W,  dW = żᵀ x,  dU = żᵀ h′,  db = db′ = Σ ż

    Only U h′ has to wait for the step before: W x is one product for all steps, and so are the
    gradients. While the steps run, state and gates lie feature-major, (H, B) and (4H, B): each
    gate is one block of memory, and U @ h is nearly twice as fast in BLAS as h @ Uᵀ.

    A sequence that has ended takes no part in further steps: sorted by length, those that go on
    are the first columns of the state, and the others keep in theirs what they ended with.

    The op has one output, (T + 2, B, H): y of all steps, then the last h and the last c. The gates
    of all steps are kept for backward; the second order computes them again, in plain ops.
    """

    kernel = "lstm"

    def forward(
        self,
        x: Array,
        h0: Array,
        c0: Array,
        w: Array,
        u: Array,
        *biases: Array,
        lengths: np.ndarray | None,
        reverse: bool,
    ) -> Array:
        self._remember(x, h0, c0, w, u, biases, lengths, reverse)
        xp, hidden, steps = namespace(x), u.shape[1], _Steps(x, lengths, reverse)
        multiply, dtype = _product(widened(u), len(h0)), widened(u).dtype
        z_of_x = _matrix(len(w), steps.total, xp, dtype)
        xp.matmul(widened(w), widened(steps.rows_of(x)).T, out=z_of_x)
        if biases:
            z_of_x += (widened(biases[0]) + widened(biases[1]))[:, None]
        h, c = steps.columns_of(h0, dtype), steps.columns_of(c0, dtype)
        y = xp.zeros((x.shape[0] + 2, *h0.shape), dtype=x.dtype)
        rows_of_y = y.reshape(len(y) * y.shape[1], hidden)
        width = steps.total if self.parents else h.shape[1]  # backward needs all steps
        gates = xp.empty(4 * hidden * width, dtype=dtype)
        cells = xp.empty(hidden * width, dtype=dtype)
        before = _matrix(hidden, width, xp, dtype)
        scratch = xp.empty(h.size, dtype=dtype)
        for _, count, here in steps:
            place = here if self.parents else slice(0, count)
            z, h_now, c_now = _block(gates, 4 * hidden, place), h[:, :count], c[:, :count]
            before[:, place] = h_now
            multiply(h_now, z)
            z += z_of_x[:, here]
            _advance(z, h_now, c_now, _block(scratch, hidden, slice(0, count)))
            _block(cells, hidden, place)[...] = c_now
            rows_of_y[steps.places(here)] = h_now.T
        y[-2], y[-1] = steps.batch_of(h), steps.batch_of(c)
        if self.parents:
            self.keep((steps, gates, cells, before))
        return y

    def _remember(
        self,
        x: Array,
        h0: Array,
        c0: Array,
        w: Array,
        u: Array,
        biases: tuple[Array, ...],
        lengths: np.ndarray | None,
        reverse: bool,
    ) -> None:
        self.has_bias, self.lengths, self.reverse = bool(biases), lengths, reverse
        self.save(x, h0, c0, w, u, *biases)

    def backward(self, g: Any, x: Any, h0: Any, c0: Any, w: Any, u: Any, *biases: Any) -> Any:
        if isinstance(g, Tensor):
            return gradients_by_plain_ops(self, self._plain, g, x, h0, c0, w, u, *biases)
        steps, gates, cells, before = self.kept
        xp, hidden, dtype = namespace(g), u.shape[1], before.dtype
        multiply_back = _transposed_product(widened(u), len(h0))
        dh, dc = steps.columns_of(g[-2], dtype), steps.columns_of(g[-1], dtype)
        first, rows_of_g = steps.columns_of(c0, dtype), g.reshape(len(g) * g.shape[1], hidden)
        dz = _matrix(4 * hidden, steps.total, xp, dtype)
        room = xp.empty((2, 4 * hidden * dh.shape[1]), dtype=dtype)
        for earlier, count, here in reversed(steps):
            dz_now, scratch = (_block(r, 4 * hidden, slice(0, count)) for r in room)
            dh_now, dc_now = dh[:, :count], dc[:, :count]
            dh_now += rows_of_g[steps.places(here)].T
            c_before = first if earlier is None else _block(cells, hidden, earlier)
            z, c = _block(gates, 4 * hidden, here), _block(cells, hidden, here)
            _retreat(z, c, c_before[:, :count], dh_now, dc_now, dz_now, scratch)
            dz[:, here] = dz_now
            multiply_back(dz_now, dh_now)
        return self._gradients(steps, dz, before, dh, dc, x, w)

    def _gradients(
        self, steps: _Steps, dz: Array, before: Array, dh: Array, dc: Array, x: Array, w: Array
    ) -> tuple[Array | None, ...]:
        """The gradients of all inputs, from those of z at all steps."""
        dx = dw = du = db = None
        if self.needs(0):
            dx = steps.scattered(narrowed(dz.T @ widened(w), x), x)
        if self.needs(3):
            dw = narrowed(dz @ widened(steps.rows_of(x)), x)
        if self.needs(4):
            du = narrowed(dz @ before.T, x)
        if self.has_bias and (self.needs(5) or self.needs(6)):
            db = narrowed(dz @ namespace(dz).ones(dz.shape[1], dtype=dz.dtype), x)
        dh0, dc0 = (narrowed(steps.batch_of(d), x) for d in (dh, dc))
        return (dx, dh0, dc0, dw, du, *(db, db) * self.has_bias)

    def _plain(self, *inputs: Tensor) -> Tensor:
        y, (h, c) = lstm_reference(*inputs, lengths=self.lengths, reverse=self.reverse)
        return concatenate([y, h.unsqueeze(0), c.unsqueeze(0)])

    def forward_kernel(
        self,
        kernel: Any,
        x: Array,
        h0: Array,
        c0: Array,
        w: Array,
        u: Array,
        *biases: Array,
        lengths: np.ndarray | None,
        reverse: bool,
    ) -> tuple[Array, Any]:
        self._remember(x, h0, c0, w, u, biases, lengths, reverse)
        return kernel.forward(x, h0, c0, w, u, *biases, lengths=lengths, reverse=reverse)

    def backward_kernel(self, kernel: Any, g: Array, *saved: Any) -> Any:
        found = kernel.backward(g, *saved, lengths=self.lengths, reverse=self.reverse)
        return found if self.has_bias else found[:5]


class _Steps:
    """Who takes part in which step: `for earlier, count, here in steps`.

    `here` is where the step lies among the N steps of all sequences, `count` how many sequences
    are in it, `earlier` where the step before lies (None before the first).
    """

    def __init__(self, x: Array, lengths: np.ndarray | None, reverse: bool) -> None:
        time, batch = x.shape[:2]
        self._order = self._index = None  # None: all, as they lie
        counts = np.full(time, batch)
        if lengths is not None or reverse:
            full = np.full(batch, time) if lengths is None else lengths
            order = np.argsort(-full, kind="stable")
            longest_first = full[order]
            step, rank = np.nonzero(longest_first > np.arange(time)[:, None])
            when = longest_first[rank] - 1 - step if reverse else step
            counts = np.bincount(step)
            self._index = namespace(x).asarray(when * batch + order[rank])
            self._order = namespace(x).asarray(order)
        self.total = int(counts.sum())
        ends = np.cumsum(counts)
        self._slices = [slice(int(e - n), int(e)) for e, n in zip(ends, counts, strict=True)]

    def __iter__(self) -> Iterator[tuple[slice | None, int, slice]]:
        earlier = None
        for here in self._slices:
            yield earlier, here.stop - here.start, here
            earlier = here

    def __reversed__(self) -> Iterator[tuple[slice | None, int, slice]]:
        return reversed(list(self))

    def rows_of(self, x: Array) -> Array:
        """(T, B, I) -> (N, I), in the order of the steps."""
        rows = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
        return rows if self._index is None else rows[self._index]

    def places(self, here: slice) -> Any:
        """Where the rows of a step are in an array (T·B, …)."""
        return here if self._index is None else self._index[here]

    def scattered(self, rows: Array, like: Array) -> Array:
        """(N, I) -> (T, B, I), with zeros where no sequence is."""
        if self._index is None:
            return rows.reshape(like.shape)
        whole = namespace(rows).zeros((like.shape[0] * like.shape[1], like.shape[2]), rows.dtype)
        whole[self._index] = rows
        return whole.reshape(like.shape)

    def columns_of(self, state: Array, dtype: Any) -> Array:
        """(B, H) -> (H, B), longest sequence first, in memory of its own."""
        state = state if self._order is None else state[self._order]
        return namespace(state).array(state.T, dtype=dtype, order="C", copy=True)

    def batch_of(self, columns: Array) -> Array:
        """(H, B), longest sequence first -> (B, H)."""
        rows = namespace(columns).empty(columns.shape[::-1], dtype=columns.dtype)
        rows[slice(None) if self._order is None else self._order] = columns.T
        return rows


def _block(memory: Array, height: int, columns: slice) -> Array:
    """Some columns of an array (height, N) which lies in memory one step after the other."""
    found = memory[height * columns.start : height * columns.stop]
    return found.reshape(height, columns.stop - columns.start)


def _matrix(height: int, width: int, xp: Any, dtype: Any) -> Array:
    """An empty matrix for the columns of all steps.

    A few columns apart from the next power of two: of 2¹¹ floats, say, the rows of a step would
    fall on the same few lines of the cache.
    """
    return xp.empty((height, width + 16), dtype=dtype)[:, :width]


def _advance(z: Array, h: Array, c: Array, scratch: Array) -> None:
    """z becomes i, f, v, o; h and c become those of this step. All in place."""
    xp, n = namespace(z), len(h)
    sigmoids = z[: 2 * n], z[3 * n :]
    for part in sigmoids:
        part *= 0.5  # σ(z) = (1 + tanh(z / 2)) / 2
    xp.tanh(z, out=z)
    for part in sigmoids:
        part *= 0.5
        part += 0.5
    i, f, v, o = z[:n], z[n : 2 * n], z[2 * n : 3 * n], z[3 * n :]
    c *= f
    xp.multiply(i, v, out=scratch)
    c += scratch
    xp.tanh(c, out=scratch)
    xp.multiply(o, scratch, out=h)


def _retreat(
    z: Array, c: Array, c_before: Array, dh: Array, dc: Array, dz: Array, scratch: Array
) -> None:
    """dz from dh and dc; dc becomes that of the step before. z holds i, f, v, o."""
    xp, n = namespace(z), len(dh)
    i, f, v, o = z[:n], z[n : 2 * n], z[2 * n : 3 * n], z[3 * n :]
    t = scratch[:n]
    xp.tanh(c, out=t)
    xp.multiply(dh, t, out=dz[3 * n :])
    xp.multiply(t, t, out=t)
    xp.subtract(1.0, t, out=t)
    t *= o
    t *= dh
    dc += t
    xp.multiply(dc, v, out=dz[:n])
    xp.multiply(dc, c_before, out=dz[n : 2 * n])
    xp.multiply(dc, i, out=dz[2 * n : 3 * n])
    xp.multiply(z, z, out=scratch)  # the slopes: σ − σ², and 1 − v²
    for part, value in ((scratch[: 2 * n], z[: 2 * n]), (scratch[3 * n :], o)):
        xp.subtract(value, part, out=part)
    slope = scratch[2 * n : 3 * n]
    xp.subtract(1.0, slope, out=slope)
    dz *= scratch
    dc *= f


Multiply = Callable[[Array, Array], Any]


def _product(u: Array, columns: int) -> Multiply:
    """A function that does out = U h, for h of so many columns or fewer."""
    xp, rows = namespace(u), _rows_at_once(u, len(u), columns)
    if not rows:
        return lambda h, out: xp.matmul(u, h, out=out)
    blocks = u.reshape(len(u) // rows, rows, u.shape[1])
    return lambda h, out: xp.matmul(blocks, h, out=out.reshape(*blocks.shape[:2], h.shape[1]))


def _transposed_product(u: Array, columns: int) -> Multiply:
    """A function that does out = Uᵀ z, for z of so many columns or fewer."""
    xp, hidden = namespace(u), u.shape[1]
    rows = _rows_at_once(u, hidden, columns)
    if not rows:
        back = u.T
        return lambda z, out: xp.matmul(back, z, out=out)
    gates = xp.ascontiguousarray(u.reshape(4, hidden, hidden).swapaxes(1, 2))
    blocks, room = (
        gates.reshape(4, hidden // rows, rows, hidden),
        xp.empty(len(u) * columns, u.dtype),
    )

    def multiply(z: Array, out: Array) -> None:
        """Gate by gate, so that what is multiplied is small in all directions; then the sum."""
        n = z.shape[1]
        parts = room[: len(z) * n].reshape(*blocks.shape[:3], n)
        xp.matmul(blocks, z.reshape(4, 1, hidden, n), out=parts)
        xp.add.reduce(parts.reshape(4, hidden, n), axis=0, out=out)

    return multiply


_SMALL = 10**6


def _rows_at_once(u: Array, height: int, columns: int) -> int:
    """How many rows of U (or of Uᵀ) to multiply at a time; 0: all.

    OpenBLAS packs both factors anew in each product, and U is the same in all. For products of up
    to 10⁶ multiplications it has kernels for AVX-512 that go without: cut into such, a step on one
    thread takes 15 to 50 % less time. (With more threads it is they that one large product gains.)
    """
    if type(u) is not np.ndarray or u.dtype != np.float32 or not _has_avx512():
        return 0
    if height * u.shape[1] * columns <= _SMALL or backend.blas_threads() != 1:
        return 0
    fits = [n for n in (64, 32, 16) if height % n == 0 and n * u.shape[1] * columns <= _SMALL]
    return fits[0] if fits else 0


@functools.cache
def _has_avx512() -> bool:
    extensions = np.show_config(mode="dicts") or {}
    return bool({"AVX512_SKX", "X86_V4"} & set(extensions["SIMD Extensions"].get("found", ())))


def lstm(
    x: Any,
    state: tuple[Any, Any] | None,
    weight_ih: Any,
    weight_hh: Any,
    bias_ih: Any = None,
    bias_hh: Any = None,
    lengths: Any = None,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """y, (h, c): one LSTM layer in one direction over all steps, y_t = h_t; formulas in `LSTM`.

    Args:
        x: (T, B, I), time first
        state: (h, c) before the first step, (B, H) each; None for zeros
        weight_ih: (4H, I), the gates i, f, g, o below one another, as in PyTorch
        weight_hh: (4H, H)
        bias_ih, bias_hh: (4H,) both, or None both
        lengths: (B,) how many steps of each sequence are real; None for all. After its last step a
            sequence gives zeros, and its state stays as it is. A length of 0 is allowed.
        reverse: go from each sequence's last real step to its first

    Returns:
        y (T, B, H) and the state after the last step of each sequence, (B, H) each.

    Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; the forget gate is from Gers,
    Schmidhuber and Cummins, "Learning to Forget", 2000.
    """
    x = as_float(x)
    w, u = as_tensor(weight_ih).astype(x.dtype), as_tensor(weight_hh).astype(x.dtype)
    hidden = u.shape[-1] if u.ndim else 0
    if x.ndim != 3 or u.shape != (4 * hidden, hidden) or w.shape != (4 * hidden, x.shape[2]):
        raise ValueError(
            "lstm() takes x (T, B, I), weight_ih (4H, I) and weight_hh (4H, H), got "
            f"{x.shape}, {w.shape} and {u.shape}"
        )
    h, c = _state(x, state, hidden)
    if (bias_ih is None) != (bias_hh is None):
        raise ValueError("lstm() takes bias_ih and bias_hh, or neither: got one of them")
    biases = [as_tensor(b).astype(x.dtype) for b in (bias_ih, bias_hh) if b is not None]
    if any(b.shape != (4 * hidden,) for b in biases):
        raise ValueError(
            f"lstm() needs biases of shape {(4 * hidden,)}, got "
            f"{' and '.join(str(b.shape) for b in biases)}"
        )
    counts = None if lengths is None else check_lengths(lengths, x.shape[1], x.shape[0])
    out = LSTM.apply(x, h, c, w, u, *biases, lengths=counts, reverse=bool(reverse))
    time = x.shape[0]
    return out[:time], (out[time], out[time + 1])


def _state(x: Tensor, state: tuple[Any, Any] | None, hidden: int) -> tuple[Tensor, Tensor]:
    shape = (x.shape[1], hidden)
    if state is None:
        zeros = Tensor(namespace(x.data).zeros(shape, dtype=x.dtype))
        return zeros, zeros
    h, c = (as_tensor(part).astype(x.dtype) for part in state)
    if h.shape != shape or c.shape != shape:
        raise ValueError(f"lstm() needs h and c of shape {shape}, got {h.shape} and {c.shape}")
    return h, c


def check_lengths(lengths: Any, batch: int, time: int) -> np.ndarray:
    """The lengths of the sequences of a batch as integers on the host, each within 0 … time."""
    data = lengths.data if isinstance(lengths, Tensor) else lengths
    counts = np.asarray(backend.to_device(data, "cpu") if backend.is_array(data) else data)
    if counts.shape != (batch,) or (counts.dtype.kind not in "iu" and counts.size):
        raise ValueError(
            f"lengths must be {(batch,)} integers, got {counts.dtype} of shape {counts.shape}"
        )
    wrong = counts[(counts < 0) | (counts > time)]
    if wrong.size:
        raise ValueError(f"lengths must be from 0 to the {time} steps there are, got {wrong[0]}")
    return counts.astype(np.int64)


def lstm_cell(
    x: Any,
    state: tuple[Any, Any] | None,
    weight_ih: Any,
    weight_hh: Any,
    bias_ih: Any = None,
    bias_hh: Any = None,
) -> tuple[Tensor, Tensor]:
    """h, c after one step of an LSTM: `lstm` with T = 1.

    Args:
        x: (B, I)
        state: (h, c) before the step, (B, H) each; None for zeros
        weight_ih, weight_hh, bias_ih, bias_hh: as `lstm`
    """
    x = as_float(x)
    if x.ndim != 2:
        raise ValueError(f"lstm_cell() takes x (B, I), got {x.shape}")
    return lstm(x.unsqueeze(0), state, weight_ih, weight_hh, bias_ih, bias_hh)[1]


def gradients_by_plain_ops(
    node: Function, function: Callable[..., Tensor], g: Tensor, *inputs: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of an op's inputs as Tensors: of `function`, which is the op in plain ops.

    For the second order of an op that keeps intermediate results, which stand in no graph.
    """
    # Copies: an input may depend on another one, and only the ways through this op count.
    copies = [copy(x) for x in inputs]
    wanted = [x for i, x in enumerate(copies) if node.needs(i)]
    out = function(*copies)
    found: list[Tensor | None] = [None] * len(wanted)
    if out.requires_grad:
        found = list(grad(out, wanted, g, create_graph=True, allow_unused=True))
    rest = iter([x * 0.0 if dx is None else dx for x, dx in zip(wanted, found, strict=True)])
    return tuple([next(rest) if node.needs(i) else None for i in range(len(copies))])


def lstm_reference(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    lengths: np.ndarray | None = None,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The same in plain ops, a step at a time: what the op is held against, and the lesson."""
    time, batch, _ = x.shape
    counts = np.full(batch, time) if lengths is None else lengths
    outputs = [h * 0.0] * time
    for t in reversed(range(time)) if reverse else range(time):
        z = linear(x[t], weight_ih, bias_ih) + linear(h, weight_hh, bias_hh)
        i, f, g, o = chunk(z, 4, axis=1)
        c_new = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h_new = sigmoid(o) * tanh(c_new)
        real = namespace(x.data).asarray(counts > t)[:, None]
        h, c = where(real, h_new, h), where(real, c_new, c)
        outputs[t] = where(real, h_new, 0.0)
    y = stack(outputs) if time else Tensor(x.data.reshape(0, batch, h.shape[1]))
    return y, (h, c)
