"""Lesson 1: backpropagation by hand.

What you will learn:
- the backward pass of a two-layer network: seven lines, each derived beside the code;
- how to find out whether a derivation is right: nudge a weight and look;
- that with `Tensor` only the forward pass is written, and the numbers are the same.

The problem: points in the plane, on three spiral arms wound into each other. To which arm does a
point belong? Letters in the comments on shapes: N points, H hidden units, C classes (arms).
"""

import numpy as np

from tinygrad_llm import Tensor, no_grad, ops

N, H, C = 300, 16, 3
LEARNING_RATE, STEPS = 1.0, 500
Parameters = dict[str, np.ndarray]


def spirals(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 2) that wind outwards on C arms, and the arm (N,) of each."""
    arm = np.repeat(np.arange(C), N // C)
    radius = np.tile(np.linspace(0.1, 1.0, N // C), C)
    angle = 2 * np.pi * (arm / C + 0.75 * radius) + 0.1 * rng.normal(size=N)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1), arm


def first_parameters(rng: np.random.Generator) -> Parameters:
    return {
        "W1": 2.0 * rng.normal(size=(2, H)),
        "b1": 0.5 * rng.normal(size=H),
        "W2": rng.normal(size=(H, C)) / np.sqrt(H),
        "b2": np.zeros(C),
    }


def forward(w: Parameters, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hidden layer h (N, H) and the probability p (N, C) of each class for each point."""
    a = X @ w["W1"] + w["b1"]  # (N, 2) @ (2, H) + (H,) -> (N, H)
    h = np.tanh(a)  # the bend: without it two layers would be one matrix
    z = h @ w["W2"] + w["b2"]  # (N, H) @ (H, C) + (C,) -> (N, C), a score per class
    e = np.exp(z - z.max(axis=1, keepdims=True))  # the shift cancels in the next line
    return h, e / e.sum(axis=1, keepdims=True)  # softmax: positive, rows sum to 1


def cross_entropy(p: np.ndarray, y: np.ndarray) -> float:
    """L = −1/N Σₙ ln p[n, yₙ]: how surprised the net is, on average, by the right answers."""
    return -np.log(p[np.arange(len(y)), y]).mean()


def backward(w: Parameters, X: np.ndarray, y: np.ndarray) -> Parameters:
    """∂L/∂w for every array of parameters.

    We go through `forward` from its last line to its first. `dz` is short for ∂L/∂z and has z's
    shape. Every line answers: given ∂L/∂(what came out), what is ∂L/∂(what went in)?
    """
    h, p = forward(w, X)
    # L = −1/N Σₙ (z[n, yₙ] − ln Σ_c e^z[n, c]). The first term has the derivative 1 at c = yₙ and
    # 0 elsewhere; the second e^z[n, c] / Σ e^z = p[n, c]. Together: prediction minus truth.
    dz = (p - np.eye(C)[y]) / len(y)  # (N, C); row n of eye[y] is 1 at yₙ and 0 elsewhere
    # z[n, c] = Σ_k h[n, k] W2[k, c] + b2[c]. So W2[k, c] moves z[n, c] by h[n, k], for every n:
    # dW2[k, c] = Σₙ h[n, k] dz[n, c], a matrix product. b2[c] moves z[n, c] by 1, for every n.
    dW2 = h.T @ dz  # (H, N) @ (N, C) -> (H, C)
    db2 = dz.sum(axis=0)  # (N, C) -> (C,)
    # h[n, k] moves z[n, c] by W2[k, c], for every c: dh[n, k] = Σ_c dz[n, c] W2[k, c].
    dh = dz @ w["W2"].T  # (N, C) @ (C, H) -> (N, H)
    # h = tanh(a) element by element, and tanh′(a) = 1 − tanh²(a): no need to have kept a.
    da = dh * (1.0 - h * h)  # (N, H)
    # a = X W1 + b1 has the form of z = h W2 + b2, so its two lines have the form of theirs.
    dW1 = X.T @ da  # (2, N) @ (N, H) -> (2, H)
    db1 = da.sum(axis=0)  # (N, H) -> (H,)
    return {"W1": dW1, "b1": db1, "W2": dW2, "b2": db2}


def nudge(w: Parameters, X: np.ndarray, y: np.ndarray, name: str, index: tuple[int, ...]) -> float:
    """(L(w + ε) − L(w − ε)) / 2ε for one single number: slow, and free of any cleverness."""
    epsilon, losses = 1e-5, []
    for step in (+epsilon, -epsilon):
        moved = {**w, name: w[name].copy()}
        moved[name][index] += step
        losses.append(cross_entropy(forward(moved, X)[1], y))
    return (losses[0] - losses[1]) / (2 * epsilon)


def backward_of_tensors(w: dict[str, Tensor], X: np.ndarray, y: np.ndarray) -> Parameters:
    """∂L/∂w for the same network; only the forward pass is written down."""
    h = (Tensor(X) @ w["W1"] + w["b1"]).tanh()
    loss = ops.cross_entropy(h @ w["W2"] + w["b2"], y)  # softmax and −ln p[n, yₙ] in one op
    for t in w.values():
        t.grad = None  # backward() adds to .grad: what the last call left has to go
    loss.backward()
    return {name: t.grad.numpy() for name, t in w.items() if t.grad is not None}


def picture(w: Parameters, X: np.ndarray, y: np.ndarray) -> str:
    """The plane as the net divides it (. - :), and every second point on it (a b c)."""
    grid = np.mgrid[-1.1:1.1:57j, -1.1:1.1:19j].reshape(2, -1).T  # (57 · 19, 2)
    arms = forward(w, grid)[1].argmax(axis=1)
    canvas = np.array(list(".-:"))[arms].reshape(57, 19).T
    column, row = ((X + 1.1) / 2.2 * (56, 18)).round().astype(int).T
    canvas[row[::2], column[::2]] = np.array(list("abc"))[y[::2]]
    return "\n".join("   " + "".join(line) for line in canvas)


def main() -> None:
    rng = np.random.default_rng(0)
    (X, y), (X_new, y_new) = spirals(rng), spirals(rng)
    w = first_parameters(rng)
    print(f"{N} points on {C} arms; {sum(a.size for a in w.values())} numbers to learn")

    print("\n1. Is the derivation right? One number of each array, nudged by ±0.00001:")
    gradients = backward(w, X, y)
    for name, g in gradients.items():
        index = (1,) * g.ndim
        expected = nudge(w, X, y, name, index)
        print(f"   ∂L/∂{name}{list(index)!s:6}  derived {g[index]:+.9f}  nudged {expected:+.9f}")
        assert abs(g[index] - expected) < 1e-8

    print("\n2. The same network with Tensor, and loss.backward() for the seven lines:")
    # A Tensor takes an array as it is: float64 stays float64, and memory is shared unless copied.
    tensors = {name: Tensor(a.copy(), requires_grad=True) for name, a in w.items()}
    for name, g in backward_of_tensors(tensors, X, y).items():
        difference = np.abs(g - gradients[name]).max()
        print(f"   {name} {g.shape!s:7}  largest difference of the two gradients {difference:.0e}")
        assert difference < 1e-14

    print(f"\n3. {STEPS} steps downhill, w ← w − {LEARNING_RATE} ∂L/∂w, by hand and with Tensor:")
    losses = []
    for step in range(STEPS + 1):
        losses.append(cross_entropy(forward(w, X)[1], y))
        if step in (0, 1, 10, 100, STEPS):
            apart = max(np.abs(w[name] - t.numpy()).max() for name, t in tensors.items())
            print(f"   step {step:3}: loss {losses[-1]:.6f}; the two nets differ by {apart:.0e}")
            assert apart < 1e-9
        gradients, theirs = backward(w, X, y), backward_of_tensors(tensors, X, y)
        with no_grad():  # changing the weights is no part of the network: not to be recorded
            for name in w:
                w[name] -= LEARNING_RATE * gradients[name]
                tensors[name] -= LEARNING_RATE * theirs[name]
    assert losses[-1] < 0.1 * losses[0]

    accuracy = (forward(w, X_new)[1].argmax(axis=1) == y_new).mean()
    print(f"\n4. New points of the same arms: {accuracy:.1%} right (guessing: {1 / C:.1%})")
    assert accuracy > 0.95
    print(picture(w, X_new, y_new))


if __name__ == "__main__":
    main()
