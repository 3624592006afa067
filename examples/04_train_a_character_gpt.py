"""Lesson 4: train a character GPT.

What you will learn:
- what a language model predicts, what its loss means, and which numbers to compare it with;
- the whole training loop: batch, loss, backward, clip, step, schedule;
- how a model writes: predict, draw, append, again.

The text comes with Python: the language reference and the docstrings of the standard library.
Letters: B windows in a batch, T characters in a window, V different characters.
"""

import math
import textwrap

import numpy as np

from tinygrad_llm import Tensor, manual_seed, no_grad, ops
from tinygrad_llm.data import corpora
from tinygrad_llm.models.gpt import GPT, GPTConfig
from tinygrad_llm.optim import AdamW, LRScheduler, clip_grad_norm_, decay_groups
from tinygrad_llm.optim.schedules import Cosine, Warmup

B, T = 32, 32
STEPS, WARMUP = 400, 40


def read_text() -> str:
    """Half a million characters of English with one blank between words, all of it in ASCII."""
    documents = corpora.load("python-docs").documents
    words = " ".join(documents)[:600_000].encode("ascii", "ignore").decode().split()
    return " ".join(words)[:500_000]


def baselines(train: np.ndarray, held_out: np.ndarray, V: int) -> dict[str, float]:
    """−mean ln p(character), in nats, for three ways to guess that need no network."""
    count = 1.0 + np.bincount(train, minlength=V)  # the 1: never say that something is impossible
    pairs = np.full((V, V), 0.1)
    np.add.at(pairs, (train[:-1], train[1:]), 1.0)  # pairs[i, j]: how often j came after i
    after = pairs / pairs.sum(axis=1, keepdims=True)
    return {
        "all characters alike": math.log(V),
        "by their frequency": -np.log(count[held_out] / count.sum()).mean(),
        "by the character before": -np.log(after[held_out[:-1], held_out[1:]]).mean(),
    }


def loss_of(model: GPT, windows: np.ndarray) -> Tensor:
    """−mean ln p(next character | those before it in its window), for windows (B, T + 1).

    One window asks T questions at once: what follows the first character, what follows the first
    two, … Causal attention (lesson 3) sees to it that no answer can look at what it is asked for.
    """
    x, y = windows[:, :-1], windows[:, 1:]  # y[b, t] follows x[b, t]
    return ops.cross_entropy(model(x), y)  # (B, T, V) scores against (B, T) characters


def evaluate(model: GPT, ids: np.ndarray) -> float:
    """The loss on fixed windows of a text, without recording a graph."""
    starts = np.linspace(0, len(ids) - T - 1, 200).astype(int)
    with no_grad():
        return loss_of(model, ids[starts[:, None] + np.arange(T + 1)]).item()


def train_model(model: GPT, train: np.ndarray, held_out: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    # Weight decay for matrices; biases and the gains of LayerNorm are spared.
    optimizer = AdamW(decay_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.95))
    # The learning rate climbs during the warm-up, then falls to a tenth along half a cosine.
    scheduler = LRScheduler(optimizer, Warmup(WARMUP, Cosine(STEPS - WARMUP, end=0.1)))
    recent = []
    for step in range(1, STEPS + 1):
        starts = rng.integers(0, len(train) - T, size=(B, 1))
        loss = loss_of(model, train[starts + np.arange(T + 1)])  # (B, 1) + (T + 1,) -> windows
        optimizer.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), max_norm=1.0)  # of all gradients as one vector
        optimizer.step()
        scheduler.step()
        recent.append((loss.item(), norm))
        if step % 80 == 0:
            mean_loss, longest = np.mean(recent, axis=0)[0], np.max(recent, axis=0)[1]
            print(
                f"   step {step}: loss {mean_loss:.2f} in training, {evaluate(model, held_out):.2f}"
                f" on held-out text; gradients up to {longest:.2f} long"
            )
            recent.clear()


def write(model: GPT, alphabet: str, start: str, length: int, temperature: float = 0.7) -> str:
    """`start` and `length` characters more, each drawn from what the model expects next."""
    rng, text = np.random.default_rng(2), start
    for _ in range(length):
        ids = [alphabet.index(c) for c in text[-T:]]  # a window is all that it can see
        with no_grad():
            scores = model([ids])[0, -1]  # (1, T, V) -> (V,): what follows the last character
            p = ops.softmax(scores / temperature)  # below 1: the likely becomes likelier
        cumulative = p.numpy().cumsum()
        text += alphabet[np.searchsorted(cumulative, rng.random() * cumulative[-1])]
    return text


def real_words(sample: str, text: str) -> float:
    """The share of the sample's words that the text has, too."""
    known, words = set(text.split()), sample.split()[1:-1]  # the first was given, the last is cut
    return sum(word in known for word in words) / len(words)


def main() -> None:
    text = read_text()
    alphabet = "".join(sorted(set(text)))  # the tokenizer: a character's id is its place in here
    place = {c: i for i, c in enumerate(alphabet)}
    train, held_out = np.split(np.array([place[c] for c in text]), [int(0.9 * len(text))])

    manual_seed(0)
    model = GPT(
        GPTConfig(
            vocab_size=len(alphabet),
            n_positions=T,
            n_embd=64,
            n_layer=1,
            n_head=4,
            initializer_range=0.08,  # weights ~ N(0, 0.08²); GPT-2, twelve times as wide, has 0.02
        )
    )
    size = sum(p.size for p in model.parameters())
    print(f"1. {len(text):,} characters, {len(alphabet)} different; a GPT of {size:,} parameters")
    losses = baselines(train, held_out, len(alphabet))
    losses["GPT, untrained"] = evaluate(model, held_out)
    before = write(model, alphabet, "The ", 300)
    print(f"\n2. {STEPS} steps of {B} windows of {T} characters:")
    train_model(model, train, held_out)
    losses["GPT, trained"] = evaluate(model, held_out)
    after = write(model, alphabet, "The ", 300)

    print("\n3. Loss on held-out text, and e^loss: as hard as guessing among so many equals")
    for name, loss in losses.items():
        print(f"   {name:24} {loss:.2f}  {math.exp(loss):5.1f}")
    # Below the last baseline it must be using more than the one character before.
    assert losses["GPT, trained"] < losses["by the character before"] - 0.2

    print("\n4. What it writes, and how many of these words the text has, too:")
    for name, sample in (("before", before), ("after", after)):
        print(f"   {name} training, {real_words(sample, text):.0%}:")
        print(textwrap.fill(sample, 96, initial_indent=" " * 6, subsequent_indent=" " * 6))
    assert real_words(after, text) > real_words(before, text) + 0.2


if __name__ == "__main__":
    main()
