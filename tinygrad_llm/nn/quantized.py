"""Linear layers with weights of 8 or 4 bits, and a whole model made of them."""

from __future__ import annotations

from collections import Counter
from typing import Any, Self, TypeVar

from tinygrad_llm import ops
from tinygrad_llm.nn import init
from tinygrad_llm.nn.linear import Linear
from tinygrad_llm.nn.module import Module, Parameter
from tinygrad_llm.tensor import Tensor

Model = TypeVar("Model", bound=Module)


class QuantizedLinear(Module):
    """y = x Ŵᵀ + b, with a frozen Ŵ of whole numbers times scales: see `ops.quantize`

    It is made from a Linear, by `from_linear` or, in a whole model, `quantize_`; one made by its
    sizes waits for `load_state_dict`, and Ŵ is 0. A gradient goes through to x, and to the bias.

    Args:
        in_features, out_features, bias: those of the Linear.
        bits: 8 or 4.
        group_size: how many neighbours of a row share a scale: a power of two of at least 16, or
            None for the whole row.
        symmetric: False, with 4 bits: with zero points.

    Shapes: x (…, in_features) -> (…, out_features)

    Attributes:
        packed, scales, zeros: buffers, the `ops.Quantized` of Ŵ. `to(dtype)` converts the scales,
            too: convert a model first, then quantise it.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        nothing = ops.zeros((out_features, in_features))
        self._hold(ops.quantize(nothing, bits, group_size, symmetric))
        self.bias = Parameter.empty(out_features) if bias else None
        if self.bias is not None:
            init.zeros_(self.bias)

    def _hold(self, weights: ops.Quantized) -> None:
        for name, tensor in weights._asdict().items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_linear(
        cls,
        linear: Linear,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool = True,
    ) -> Self:
        """That Linear with its weight rounded, on its device; the bias is the same Parameter."""
        new = cls.__new__(cls)
        Module.__init__(new)
        new.in_features, new.out_features = linear.in_features, linear.out_features
        new.bits, new.group_size, new.symmetric = bits, group_size, symmetric
        new._hold(ops.quantize(linear.weight.detach(), bits, group_size, symmetric))
        new.bias, new.training = linear.bias, linear.training
        return new

    def forward(self, x: Any) -> Tensor:
        return ops.quantized_linear(
            x, self.packed, self.scales, self.zeros, self.bias, self.group_size
        )

    def dequantize(self) -> Tensor:
        """Ŵ (out_features, in_features) in float32"""
        return ops.dequantize(
            self.packed, self.scales, self.zeros, self.in_features, self.group_size
        )

    def extra_repr(self) -> str:
        groups = "" if self.group_size is None else f", group_size={self.group_size}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}{groups}"
            + ("" if self.symmetric else ", symmetric=False")
        )


def quantize_(
    model: Model,
    bits: int = 8,
    group_size: int | None = 64,
    skip: tuple[str, ...] = ("lm_head",),
    symmetric: bool = True,
) -> Model:
    """Replace every Linear in the model by a QuantizedLinear, in place; returns the model

        model = nn.quantize_(GPT.from_pretrained(folder), bits=4)

    With 8 bits each row has one scale. A Linear whose weight some other module holds, too, such as
    an output layer tied to the embedding, stays as it is: the numbers are needed anyway. So do
    subclasses of Linear. To load a quantised state, quantise the model alike and then load.

    Args:
        bits: 8 or 4.
        group_size: of 4 bits: how many neighbours of a row share a scale, or None for the row.
        skip: names to leave alone: "lm_head", "transformer.h.0" or "c_proj" stand for what has
            them in its path.
        symmetric: False, with 4 bits: with zero points.

    Raises:
        ValueError: there is no Linear to replace, or an option that `ops.quantize` refuses.
    """
    holders = Counter(id(p) for m in model.modules() for _, p in m.named_parameters(recurse=False))
    places = [
        (parent, name, child)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if type(child) is Linear
        and holders[id(child.weight)] == 1
        and not _is_skipped(f"{path}.{name}", skip)
    ]
    if not places:
        raise ValueError(
            f"quantize_() found no Linear in this {type(model).__name__} that is not skipped or "
            "tied; a Linear by itself is replaced with QuantizedLinear.from_linear()"
        )
    made: dict[int, QuantizedLinear] = {}  # a Linear in two places stays one
    for _, _, child in places:
        if id(child) not in made:
            size = group_size if bits == 4 else None
            made[id(child)] = QuantizedLinear.from_linear(child, bits, size, symmetric)
            made[id(child)]._hooks = child._hooks
    for parent, name, child in places:  # only now, so that an error leaves the model whole
        setattr(parent, name, made[id(child)])
    return model


def _is_skipped(path: str, skip: tuple[str, ...]) -> bool:
    return any(f".{name}." in f".{path}." for name in skip)
