"""LSTM layers.

Dimensions: T time, B batch, I inputs, H hidden, L layers, D directions (1 or 2).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from tinygrad_llm import ops
from tinygrad_llm.nn import init
from tinygrad_llm.nn.dropout import check_probability
from tinygrad_llm.nn.module import Module, Parameter
from tinygrad_llm.ops.convert import as_float, as_tensor
from tinygrad_llm.tensor import Tensor

State = tuple[Tensor, Tensor]


class LSTM(Module):
    """h_t = o ⊙ tanh(c_t),  c_t = f ⊙ c_{t−1} + i ⊙ tanh(W_g x_t + U_g h_{t−1} + b_g)

    with the gates i, f, o = σ(W x_t + U h_{t−1} + b). Arguments, names and layout of the weights
    are PyTorch's, so state dicts go both ways: `weight_ih_l0` (4H, I), `weight_hh_l0` (4H, H),
    `bias_ih_l0` and `bias_hh_l0` (4H,), the gates i, f, g, o below one another; `…_l1` for the
    second layer, which reads the output of the first; `…_reverse` for the second direction. All
    begin uniform in ±1/√H.

        y, (h, c) = LSTM(8, 16, num_layers=2, batch_first=True)(x)          x (B, T, 8)

    Args:
        input_size: I
        hidden_size: H
        num_layers: L, one on top of the other
        bias: whether the gates have biases
        batch_first: x and y are (B, T, …) instead of (T, B, …); states are (L·D, B, H) either way
        dropout: probability of dropping an output of any layer but the last, in training
        bidirectional: a second LSTM goes through each sequence backwards; y holds both, side by
            side
        proj_size: only 0: there are no projections here

    Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
    ) -> None:
        super().__init__()
        if input_size < 1 or hidden_size < 1 or num_layers < 1:
            raise ValueError(
                "input_size, hidden_size and num_layers must be at least 1, got "
                f"{input_size}, {hidden_size} and {num_layers}"
            )
        if proj_size:
            raise ValueError(
                f"proj_size must be 0, got {proj_size}: project the output with a Linear instead"
            )
        if dropout and num_layers == 1:
            warnings.warn(
                f"dropout={dropout} acts between layers, and num_layers=1: it does nothing",
                UserWarning,
                stacklevel=2,
            )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.bidirectional = bias, batch_first, bidirectional
        self.dropout, self.proj_size = check_probability(dropout), 0
        for layer in range(num_layers):
            inputs = hidden_size * self._directions if layer else input_size
            for suffix in self._suffixes(layer):
                _make_weights(self, inputs, hidden_size, bias, suffix)
        self.reset_parameters()

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _suffixes(self, layer: int) -> tuple[str, ...]:
        return (f"_l{layer}", f"_l{layer}_reverse")[: self._directions]

    def reset_parameters(self) -> None:
        """Draw all weights and biases anew."""
        _reset(self, self.hidden_size)

    def flatten_parameters(self) -> None:
        """Nothing to do here: for programs that were written for PyTorch."""

    def forward(self, x: Any, hx: Any = None, lengths: Any = None) -> tuple[Tensor, State]:
        """y, (h, c)

        Args:
            x: (T, B, I), with `batch_first` (B, T, I); or (T, I), one sequence
            hx: (h, c) before the first step, (L·D, B, H) each, (L·D, H) for one sequence; layer by
                layer, forward before reverse. None for zeros.
            lengths: (B,) how many steps of each sequence are real, 0 included; None for all.
                Padding gives zeros and changes no state, and the reverse direction begins at a
                sequence's last real step: what PyTorch does with a packed sequence.

        Returns:
            y like x with D·H features: h of the last layer at each step, and (h, c) like hx, after
            each sequence's last step.
        """
        x = as_float(x)
        single = x.ndim == 2
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size:
            raise ValueError(f"LSTM needs x {self._wanted()}, or (T, I), got {x.shape}")
        if single:
            x = x.unsqueeze(1)
        elif self.batch_first:
            x = x.swapaxes(0, 1)
        y, (h, c) = self._layers(x, self._first_state(x, hx, single), lengths)
        if single:
            return y.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return (y.swapaxes(0, 1) if self.batch_first else y), (h, c)

    def _wanted(self) -> str:
        return f"{'(B, T' if self.batch_first else '(T, B'}, I) with I = {self.input_size}"

    def _first_state(self, x: Tensor, hx: Any, single: bool) -> State | None:
        """hx as two Tensors (L·D, B, H)."""
        if hx is None:
            return None
        h, c = (as_tensor(part) for part in hx)
        shape = (self.num_layers * self._directions, x.shape[1], self.hidden_size)
        wanted = (shape[0], shape[2]) if single else shape
        if h.shape != wanted or c.shape != wanted:
            raise ValueError(f"LSTM needs h and c of shape {wanted}, got {h.shape} and {c.shape}")
        return h.reshape(shape), c.reshape(shape)

    def _layers(self, x: Tensor, state: State | None, lengths: Any) -> tuple[Tensor, State]:
        last_h: list[Tensor] = []
        last_c: list[Tensor] = []
        for layer in range(self.num_layers):
            if layer:
                x = ops.dropout(x, self.dropout, self.training)
            outputs = []
            for suffix in self._suffixes(layer):
                n, reverse = len(last_h), suffix.endswith("_reverse")
                first = None if state is None else (state[0][n], state[1][n])
                y, (h, c) = ops.lstm(x, first, *_weights(self, suffix), lengths, reverse)
                outputs.append(y)
                last_h.append(h)
                last_c.append(c)
            x = outputs[0] if len(outputs) == 1 else ops.concatenate(outputs, axis=-1)
        return x, (ops.stack(last_h), ops.stack(last_c))

    def extra_repr(self) -> str:
        options = {
            "num_layers": (self.num_layers, 1),
            "bias": (self.bias, True),
            "batch_first": (self.batch_first, False),
            "dropout": (self.dropout, 0.0),
            "bidirectional": (self.bidirectional, False),
        }
        said = [f"{name}={value}" for name, (value, usual) in options.items() if value != usual]
        return ", ".join([str(self.input_size), str(self.hidden_size), *said])


class LSTMCell(Module):
    """h′, c′ = one step of an LSTM from h, c: for loops of one's own.

    Weights `weight_ih` (4H, I), `weight_hh` (4H, H), `bias_ih`, `bias_hh` (4H,), as in PyTorch.

    Args:
        input_size: I
        hidden_size: H
        bias: whether the gates have biases
    """

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        if input_size < 1 or hidden_size < 1:
            raise ValueError(
                f"input_size and hidden_size must be at least 1, got {input_size} and {hidden_size}"
            )
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        _make_weights(self, input_size, hidden_size, bias, "")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights and biases anew."""
        _reset(self, self.hidden_size)

    def forward(self, x: Any, hx: Any = None) -> State:
        """h, c after the step.

        Args:
            x: (B, I), or (I,)
            hx: (h, c) before the step, (B, H) each, or (H,); None for zeros
        """
        x = as_float(x)
        if x.ndim not in (1, 2) or x.shape[-1] != self.input_size:
            raise ValueError(f"LSTMCell needs x (B, {self.input_size}) or (I,), got {x.shape}")
        if x.ndim == 2:
            return ops.lstm_cell(x, hx, *_weights(self, ""))
        state = None if hx is None else tuple([as_tensor(part).unsqueeze(0) for part in hx])
        h, c = ops.lstm_cell(x.unsqueeze(0), state, *_weights(self, ""))  # pyright: ignore
        return h.squeeze(0), c.squeeze(0)

    def extra_repr(self) -> str:
        bias = "" if self.bias else ", bias=False"
        return f"{self.input_size}, {self.hidden_size}{bias}"


def _make_weights(module: Module, inputs: int, hidden: int, bias: bool, suffix: str) -> None:
    setattr(module, f"weight_ih{suffix}", Parameter.empty(4 * hidden, inputs))
    setattr(module, f"weight_hh{suffix}", Parameter.empty(4 * hidden, hidden))
    if bias:
        setattr(module, f"bias_ih{suffix}", Parameter.empty(4 * hidden))
        setattr(module, f"bias_hh{suffix}", Parameter.empty(4 * hidden))


def _weights(module: Module, suffix: str) -> tuple[Any, Any, Any, Any]:
    """weight_ih, weight_hh, bias_ih, bias_hh of one layer in one direction; None without bias."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ih, hh, b_ih, b_hh = (getattr(module, name + suffix, None) for name in names)
    return ih, hh, b_ih, b_hh


def _reset(module: Module, hidden: int) -> None:
    bound = 1.0 / math.sqrt(hidden)
    for parameter in module.parameters():
        init.uniform_(parameter, -bound, bound)
