"""Writing with a trained model: one token after the other, each drawn from what the model expects.

ids ← ids + [k],   k ~ softmax(logits(ids)[-1] / temperature)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.autograd import no_grad
from tinygrad_llm.tensor import Tensor

if TYPE_CHECKING:
    from tinygrad_llm.models.gpt import GPT


def generate(
    model: GPT,
    ids: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    stream: backend.RandomStream | None = None,
    eos_id: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` token ids that go on from `ids`, each as soon as it is known.

    The model sees the last `n_positions` of them. `stream` (the default one unless given) makes
    the choices: the same seed, the same text. Ends after `eos_id`, which is yielded too. Dropout is
    off while a token is computed. Raises ValueError for an empty prompt, ids out of the vocabulary
    or options out of range.
    """
    config = model.config
    ids = [int(i) for i in ids]
    if not ids:
        raise ValueError("generation needs at least one token to go on from, got none")
    if not all(0 <= i < config.vocab_size for i in ids):
        raise ValueError(f"token ids must be from 0 to {config.vocab_size - 1}, got {ids}")
    _check_options(temperature, top_k, top_p)
    stream = backend.random if stream is None else stream
    greedy = greedy or temperature == 0
    return _tokens(model, ids, max_new_tokens, temperature, top_k, top_p, greedy, stream, eos_id)


def _check_options(temperature: float, top_k: int, top_p: float) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or more, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def _tokens(
    model: GPT,
    ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    greedy: bool,
    stream: backend.RandomStream,
    eos_id: int | None,
) -> Iterator[int]:
    for _ in range(max_new_tokens):
        logits = _next_logits(model, ids[-model.config.n_positions :])  # (V,)
        if greedy:
            token = int(logits.argmax())
        else:
            token = sample(logits, temperature, top_k, top_p, stream)
        yield token
        if token == eos_id:
            return
        ids.append(token)


def _next_logits(model: GPT, ids: list[int]) -> np.ndarray:
    """logits(ids)[-1] as float64 on the CPU; the model is left in the mode it was in."""
    device = next(iter(model.parameters())).device
    training = model.training
    model.eval()
    try:
        with no_grad():
            logits = model(Tensor(np.array([ids], dtype=np.int64)).to(device))  # (1, T, V)
    finally:
        model.train(training)
    return logits[0, -1].numpy().astype(np.float64)


def sample(
    logits: np.ndarray,
    temperature: float,
    top_k: int,
    top_p: float,
    stream: backend.RandomStream,
) -> int:
    """k with probability softmax(logits / temperature)[k], among those that top_k and top_p leave.

    top_k leaves the k likeliest tokens; top_p the fewest likeliest ones that together have at least
    that probability (Holtzman et al., "The curious case of neural text degeneration", 2020).

    logits: (V,) float64. One number is drawn from `stream` for a token: k is the first one at which
    the cumulative probability, from the likeliest down, exceeds it.
    """
    order = np.argsort(-logits, kind="stable")  # the likeliest first
    if top_k:
        order = order[:top_k]
    p = np.exp((logits[order] - logits[order[0]]) / temperature)
    cumulative = np.cumsum(p / p.sum())
    if top_p < 1:
        cumulative = cumulative[: 1 + int(np.searchsorted(cumulative, top_p))]
    u = float(stream.uniform((), np.float64)) * cumulative[-1]
    return int(order[np.searchsorted(cumulative, u, side="right")])


# --- from text to text ----------------------------------------------------------------------------


class Codec(Protocol):
    """What is needed of a tokenizer: `data.tokenizers.Tokenizer`, or whatever answers to it."""

    eos_id: int | None

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def write(
    model: GPT,
    tokenizer: Codec,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_at_end: bool = True,
) -> Iterator[str]:
    """Yield the text with which the model goes on from `prompt`, piece by piece.

    An empty prompt begins a document. `stop_at_end` ends with the document that the model ends;
    otherwise it goes on to the next, after `<|endoftext|>`. The options are `generate`'s.
    """
    prompt_tokens = prompt_ids(tokenizer, prompt)
    new_tokens = generate(
        model,
        prompt_tokens,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stream=backend.RandomStream(seed),
        eos_id=tokenizer.eos_id if stop_at_end else None,
    )
    shown = (token for token in new_tokens if not (stop_at_end and token == tokenizer.eos_id))
    return stream_text(tokenizer, prompt_tokens, shown)


def prompt_ids(tokenizer: Codec, prompt: str) -> list[int]:
    """The ids of the prompt; of an empty one the mark that stands before every document."""
    if prompt:
        return tokenizer.encode(prompt).tolist()
    if tokenizer.eos_id is None:
        raise ValueError("the prompt is empty, and this tokenizer has no token to begin with")
    return [tokenizer.eos_id]


def stream_text(tokenizer: Codec, prompt: Sequence[int], ids: Iterable[int]) -> Iterator[str]:
    """decode(prompt + ids) less the prompt's own text, piece by piece.

    A byte-level tokenizer may cut a character, '你' in three: its bytes come together, when it is
    whole. Each time only the tokens since the last but one piece are decoded, so that a long text
    costs no more per token than a short one.
    """
    window = list(prompt)  # tokens whose text is out already, then those still waiting
    out = len(window)
    for token in ids:
        window.append(token)
        before, after = tokenizer.decode(window[:out]), tokenizer.decode(window)
        if after.endswith("\ufffd"):  # the beginning of a character
            continue
        yield after[len(before) :]
        window, out = window[out:], len(window) - out
    if out < len(window):
        yield tokenizer.decode(window)[len(tokenizer.decode(window[:out])) :]
