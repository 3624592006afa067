"""Lesson 2: the graph, and the walk back through it.

What you will learn:
- what a Tensor remembers, that `backward()` is one loop over it, and how to differentiate twice;
- what is saved for the way back, when that memory is freed, and what overwriting it does;
- how to write an op of your own, how to check it, and how to trade time for memory.
"""

import gc
import weakref
from typing import Any

import numpy as np

from tinygrad_llm import Function, Tensor, checkpoint, grad, manual_seed, no_grad, ops, randn
from tinygrad_llm.gradcheck import GradcheckError, gradcheck


def latest_first(y: Tensor) -> list[Any]:
    """The nodes that y was computed from, in such an order that each comes after all its users."""
    nodes: list[Any] = [y.node]
    for node in nodes:  # the list grows while it is read
        nodes += {*node.parents} - {None, *nodes}  # None: a constant, no gradient goes there
    return sorted(nodes, key=lambda node: node.tick, reverse=True)  # tick: when it was made


def walk(y: Tensor) -> dict[Any, np.ndarray]:
    """{leaf: ∂y/∂leaf}, by the chain rule, one node at a time."""
    pending: dict[Any, np.ndarray] = {y.node: np.ones_like(y.data)}  # ∂y/∂(output of the node)
    for node in latest_first(y):
        if node.parents:  # at a leaf, which has none, the gradient has arrived: it stays
            gradients = node.backward(pending.pop(node), *node.saved)
            gradients = gradients if type(gradients) is tuple else (gradients,)
            for parent, g in zip(node.parents, gradients, strict=True):
                if parent is not None:  # what is used in several places gets a gradient from each
                    pending[parent] = pending[parent] + g if parent in pending else g
    return pending


def graph_and_walk() -> None:
    print("1. loss = Σ (h² + x) with h = tanh(x ⊙ w): its nodes, latest first, and its gradients")
    x, w = (Tensor(values, requires_grad=True) for values in ([1.0, 2.0], [0.5, -0.3]))
    h = (x * w).tanh()
    loss = (h * h + x).sum()
    names = {node: f"{i} {type(node).__name__}" for i, node in enumerate(latest_first(loss))}
    names |= {x.node: "x", w.node: "w"}
    for node, name in names.items():
        print(f"   {name:10}  made from  {' and '.join(names[p] for p in node.parents) or '-'}")
    walked = walk(loss)
    loss.backward()
    for leaf in (x, w):
        print(f"   {names[leaf.node]}: ours {walked[leaf.node]}, backward()'s {leaf.grad}")
        assert np.array_equal(walked[leaf.node], np.asarray(leaf.grad))
    print("\n2. With create_graph=True the walk is recorded, so that its result has a graph, too:")
    x = Tensor(2.0, requires_grad=True)
    y = x**4
    for order, expected in enumerate((32, 48, 48, 24), start=1):
        (y,) = grad(y, x, create_graph=True)
        print(f"   derivative {order} of x⁴ at 2: {y.item()}; its node: {y.node}")
        assert y.item() == expected


def refusal(action: Any) -> str:
    """What the engine says when it refuses to do this."""
    try:
        action()
    except (RuntimeError, GradcheckError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("this should have been refused")


def memory_on_the_way() -> None:
    print("\n3. Memory, with Python's garbage collector switched off:")
    gc.disable()
    x = Tensor([-1.0, 0.0, 1.0], requires_grad=True)
    doubled = x * 2.0
    y = doubled.tanh()
    loss = y.sum()
    before, after, node = weakref.ref(doubled.data), weakref.ref(y.data), weakref.ref(y.node)
    del doubled, y  # we let go of both; does the graph hold them?
    assert (before() is None, after() is None) == (True, False)
    print("   tanh′ = 1 − tanh²: Tanh saved its output, and its input is freed already")
    loss.backward()
    assert after() is None
    print("   backward() has used the output of tanh: freed too")
    print(f"   once more? {refusal(loss.backward)}")
    del loss
    assert node() is None
    print("   after `del loss` the nodes are gone as well: counting references was enough")
    gc.enable()
    y = x.exp()  # (eˣ)′ = eˣ, so Exp saves its output; every write in place is noted
    with no_grad():
        y *= 10.0
    print(f"   eˣ overwritten? {refusal(y.sum().backward)}")


class Softsign(Function):
    """y = x / (1 + |x|)        dx = g / (1 + |x|)²"""

    def forward(self, x: Any) -> Any:
        self.save(x)
        return x / (1.0 + abs(x))

    def backward(self, g: Any, x: Any) -> Any:
        return g / (1.0 + abs(x)) ** 2  # of arrays, or of Tensors when the walk is recorded


class Forgetful(Softsign):
    def backward(self, g: Any, x: Any) -> Any:
        return 1.0 / (1.0 + abs(x)) ** 2  # where is the g of the chain rule?


def an_op_of_our_own() -> None:
    print("\n4. An op of our own, held against central differences, first and second order:")
    x = Tensor([[-2.0, -0.5], [0.1, 3.0]], requires_grad=True)
    print(f"   Softsign: worst relative error {gradcheck(Softsign.apply, x):.0e}")
    right, wrong = (grad(op.apply(x).sum(), x)[0].tolist() for op in (Softsign, Forgetful))
    assert right == wrong
    print("   Forgetful: the gradient of its sum is the same, for there g is 1 everywhere; but")
    print(f"   {refusal(lambda: gradcheck(Forgetful.apply, x, name='Forgetful'))}")


def time_for_memory() -> None:
    print("\n5. checkpoint() keeps nothing of a function, and runs it again on the way back:")
    layers = [randn(64, 64, requires_grad=True) for _ in range(12)]
    x, calls, results = randn(256, 64), [], []

    def deep(h: Tensor) -> Tensor:
        calls.append(1)
        for w in layers:
            h = ops.dropout((h @ w / 8.0).tanh(), p=0.1)
        return h

    for function in (deep, lambda h: checkpoint(deep, h)):
        calls.clear()
        manual_seed(1)  # the same dropout both times
        loss = (function(x) ** 2).mean()
        saved = [a for node in latest_first(loss) for a in getattr(node, "saved", ())]
        size = sum({id(a): a.nbytes for a in saved if isinstance(a, np.ndarray)}.values())
        results.append((size, [g.tolist() for g in grad(loss, layers)]))
        print(f"   {size // 1024:4} KiB saved on the way there, {len(calls)} call(s) of deep()")
    (everything, gradients), (little, gradients_again) = results
    assert little < everything / 10
    assert gradients_again == gradients
    print("   The gradients agree to the last bit, so the dropout was the same as well.")


if __name__ == "__main__":
    for part in (graph_and_walk, memory_on_the_way, an_op_of_our_own, time_for_memory):
        part()
