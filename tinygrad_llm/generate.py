"""Writing with a trained model: one token after the other, each drawn from what the model expects.

ids ← ids + [k],   k ~ softmax(logits(ids)[-1] / temperature)

    generate(model, ids, n)                  the tokens of one text, each as soon as it is known
    samples(model, ids, config, streams=…)   several texts at once, drawn
    beam_search(model, ids, config)          the likeliest texts, searched for
    write, write_many                        the same from text to text

Dimensions: B texts that are written at once, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.autograd import no_grad
from tinygrad_llm.models.gpt import KVCache
from tinygrad_llm.tensor import Tensor

if TYPE_CHECKING:
    from tinygrad_llm.models.gpt import GPT


@dataclass(frozen=True)
class GenerationConfig:
    """How to go on from a prompt: Hugging Face's names, and what each does there.

    A token is drawn thus: repetition_penalty changes the logits, temperature divides them, top_k,
    top_p and min_p leave the likeliest, and one of these is drawn. With num_beams > 1 nothing is
    drawn: see `beam_search`. ValueError for options out of range or at odds with each other.
    """

    max_new_tokens: int = 200
    temperature: float = 1.0  # below 1 sharpens; 0: greedy, always the likeliest token
    top_k: int = 0  # leave the k likeliest; 0: all
    top_p: float = 1.0  # leave the fewest likeliest that together have this probability
    min_p: float = 0.0  # leave those with this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # above 1: tokens that were there already become less likely
    num_beams: int = 1
    length_penalty: float = 1.0  # with beams; above 0 favours long texts, below 0 short ones
    num_return_sequences: int = 1
    stop_strings: Sequence[str] = ()  # the text ends before the first of these
    use_cache: bool = True  # False: compute every token's keys and values again, for comparison

    def __post_init__(self) -> None:
        least = {"max_new_tokens": 0, "top_k": 0, "num_beams": 1, "num_return_sequences": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
                off = " (off)" if name == "top_k" else ""
                raise ValueError(f"{name} must be an integer of {low}{off} or more, got {value!r}")
        _check_real("temperature", self.temperature, "0 or more", lambda x: x >= 0)
        _check_real("top_p", self.top_p, "in (0, 1]", lambda x: 0 < x <= 1)
        _check_real("min_p", self.min_p, "in [0, 1]", lambda x: 0 <= x <= 1)
        _check_real("repetition_penalty", self.repetition_penalty, "above 0", lambda x: x > 0)
        _check_real("length_penalty", self.length_penalty, "a finite number", lambda x: True)
        stops = self.stop_strings
        if isinstance(stops, str) or not all(isinstance(s, str) and s for s in stops):
            raise ValueError(f"stop_strings must be a list of non-empty strings, got {stops!r}")
        self._check_together()

    def _check_together(self) -> None:
        if self.num_beams == 1:
            if self.temperature == 0 and self.num_return_sequences > 1:
                raise ValueError(
                    f"temperature 0 has one text only, got num_return_sequences = "
                    f"{self.num_return_sequences}: raise the temperature, or use num_beams"
                )
            if self.length_penalty != 1:
                raise ValueError("length_penalty is for beams: leave it out, or raise num_beams")
            return
        for name, off in {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}.items():
            if getattr(self, name) != off:
                raise ValueError(f"num_beams > 1 draws nothing: leave out {name}")
        if self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences must be at most num_beams = {self.num_beams}, "
                f"got {self.num_return_sequences}"
            )


def _check_real(name: str, value: Any, range: str, inside: Callable[[Any], bool]) -> None:
    if not isinstance(value, Real) or not math.isfinite(value) or not inside(value):
        raise ValueError(f"{name} must be {range}, got {value!r}")


def generate(
    model: GPT,
    ids: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    use_cache: bool = True,
    stream: backend.RandomStream | None = None,
    eos_id: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` token ids that go on from `ids`, each as soon as it is known.

    The options are `GenerationConfig`'s. `stream` (the default one unless given) makes the choices:
    the same seed, the same text. Ends after `eos_id`, which is yielded too. Dropout is off while a
    token is computed.

    The model sees at first the last `n_positions` of `ids`. Whenever its positions are full, this
    window slides by half of them and is computed anew: so a long text costs little more per token
    than a short one, and the model always sees more than the last n_positions / 2 tokens.

    Raises ValueError for an empty prompt, ids out of the vocabulary or options out of range;
    FloatingPointError where the model's logits are not numbers.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        use_cache=use_cache,
    )
    stream = backend.random if stream is None else stream
    drawn = samples(model, ids, config, streams=[stream], eos_id=eos_id)
    return (token for _, token in drawn)


def samples(
    model: GPT,
    ids: Sequence[int],
    config: GenerationConfig,
    *,
    streams: Sequence[backend.RandomStream],
    eos_id: int | None = None,
    ended: Callable[[int, int], bool] | None = None,
    vocab_size: int | None = None,
) -> Iterator[tuple[int, int]]:
    """Yield (i, token), the next token of text i, for as many texts as there are streams.

    All go on from `ids`, side by side in one batch. Text i is drawn from streams[i] alone, so it is
    what `generate` writes with that stream, whatever the others do. A text leaves the batch after
    `eos_id`, and when `ended(i, token)` says so, which is asked after the token was yielded. Of a
    model whose vocabulary is padded only the first `vocab_size` tokens are drawn. Raises as
    `generate` does.
    """
    reader = _Reader(model, ids, config.use_cache, vocab_size)

    def over(i: int, token: int) -> bool:
        return token == eos_id or (ended is not None and ended(i, token))

    return _samples(reader, config, streams, over)


def _samples(
    reader: _Reader,
    config: GenerationConfig,
    streams: Sequence[backend.RandomStream],
    over: Callable[[int, int], bool],
) -> Iterator[tuple[int, int]]:
    rows = dict.fromkeys(range(len(streams)), 0)  # text -> its row in the batch: first the prompt
    for _ in range(config.max_new_tokens):
        logits = reader.next_logits()  # (B, V)
        drawn = {
            i: sample(logits[row], config, streams[i], reader.ids[row]) for i, row in rows.items()
        }
        yield from drawn.items()
        left = [i for i in rows if not over(i, drawn[i])]
        if not left:
            return
        reader.advance([rows[i] for i in left], [drawn[i] for i in left])
        rows = {i: row for row, i in enumerate(left)}


class _Reader:
    """A model that reads B texts of the same length at once, each token once.

    It begins with one text. `ids` (B, T) are the tokens so far, of which the model sees those from
    `start` on; the keys and values of all but the newest are in the cache.
    """

    def __init__(
        self, model: GPT, ids: Sequence[int], use_cache: bool, vocab_size: int | None
    ) -> None:
        _check_prompt(model, ids)
        self.model, self.n_positions = model, model.config.n_positions
        self.vocab_size = vocab_size
        self.device = next(iter(model.parameters())).device
        self.ids = np.array([ids], dtype=np.int64)
        self.start = max(0, len(ids) - self.n_positions)
        self.cache = KVCache(model.config) if use_cache else None

    def next_logits(self) -> np.ndarray:
        """The logits (B, V) of the token after each text, float64 on the CPU."""
        if self.ids.shape[1] - self.start > self.n_positions:
            # Each position has an embedding of its own, so what slides is all computed anew.
            self.start += max(1, self.n_positions // 2)
            if self.cache is not None:
                self.cache.clear()
        read = 0 if self.cache is None else self.cache.length
        new = Tensor(self.ids[:, self.start + read :]).to(self.device)
        training = self.model.training
        self.model.eval()
        try:
            with no_grad():
                logits = self.model.next_logits(new, self.cache).numpy()  # (B, V)
        finally:
            self.model.train(training)
        logits = logits[:, : self.vocab_size].astype(np.float64)
        if not np.isfinite(logits.max(axis=1)).all():
            raise FloatingPointError(
                "the model's logits are not numbers: its weights are damaged, take an earlier "
                "checkpoint"
            )
        return logits

    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Go on with these of the B texts, each with one more token."""
        self.ids = np.concatenate((self.ids[list(rows)], np.array(tokens)[:, None]), axis=1)
        if self.cache is not None:
            self.cache.select(rows)


def _check_prompt(model: GPT, ids: Sequence[int]) -> None:
    if len(ids) == 0:
        raise ValueError("generation needs at least one token to go on from, got none")
    outside = [i for i in ids if not 0 <= i < model.config.vocab_size]
    if outside:
        last = model.config.vocab_size - 1
        raise ValueError(f"token ids must be from 0 to {last}, got {outside[0]}")


def sample(
    logits: np.ndarray,
    config: GenerationConfig,
    stream: backend.RandomStream,
    seen: Sequence[int] | np.ndarray = (),
) -> int:
    """k with probability softmax(logits / temperature)[k], among those that the options leave.

    top_k leaves the k likeliest tokens; top_p the fewest likeliest ones that together have at least
    that probability (Holtzman et al., "The curious case of neural text degeneration", 2020); min_p
    those at least that many times as likely as the likeliest (Nguyen et al., "Turning up the heat",
    2024). `seen` are the tokens that repetition_penalty makes less likely.

    logits: (V,) float64. One number is drawn from `stream` for a token: k is the first one at which
    the cumulative probability, from the likeliest down, exceeds it. At temperature 0 none is.
    """
    logits = _penalised(logits, seen, config.repetition_penalty)
    if config.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")  # the likeliest first
    if config.top_k:
        order = order[: config.top_k]
    p = np.exp((logits[order] - logits[order[0]]) / config.temperature)  # the likeliest has 1
    cumulative = np.cumsum(p / p.sum())
    left = len(p)
    if config.top_p < 1:
        left = 1 + int(np.searchsorted(cumulative, config.top_p))
    if config.min_p > 0:
        left = min(left, int(np.count_nonzero(p >= config.min_p)))
    cumulative = cumulative[:left]
    u = float(stream.uniform((), np.float64)) * cumulative[-1]
    return int(order[np.searchsorted(cumulative, u, side="right")])


def _penalised(logits: np.ndarray, seen: Sequence[int] | np.ndarray, penalty: float) -> np.ndarray:
    """l / θ for l > 0 and l θ for l < 0, of the tokens seen (Keskar et al., "CTRL", 2019)."""
    if penalty == 1 or len(seen) == 0:
        return logits
    at = np.unique(seen)
    logits = logits.copy()
    logits[at] = np.where(logits[at] > 0, logits[at] / penalty, logits[at] * penalty)
    return logits


# --- beam search ----------------------------------------------------------------------------------


class Beam(NamedTuple):
    """A text that was found: its new tokens, and Σ ln p / (their number) ** length_penalty."""

    ids: list[int]
    score: float


def beam_search(
    model: GPT,
    ids: Sequence[int],
    config: GenerationConfig,
    *,
    eos_id: int | None = None,
    ended: Callable[[Sequence[int]], bool] | None = None,
    vocab_size: int | None = None,
) -> list[Beam]:
    """The `num_return_sequences` texts of the best score that were found, the best first.

        score = Σ ln p(token | those before) / n ** length_penalty        over the n new tokens

    In each step every one of the `num_beams` texts goes on with every token, and the likeliest
    `num_beams` of all these stay. Texts end with `eos_id`, where `ended(their new tokens)` says so,
    and at `max_new_tokens`. The search is over when no text that goes on can still become better
    than those found (`transformers` guesses here, and may end earlier). `vocab_size` is as in
    `samples`. Raises as `generate` does.
    """
    reader, prompt = _Reader(model, ids, config.use_cache, vocab_size), len(ids)
    total = np.zeros(1)  # Σ ln p of each text that goes on, the likeliest first
    found: list[Beam] = [] if config.max_new_tokens else [Beam([], 0.0)]
    for n in range(1, config.max_new_tokens + 1):
        rows, tokens, totals = [], [], []
        for rank, (row, token, score) in enumerate(_likeliest(reader, total, config)):
            new = [*reader.ids[row, prompt:].tolist(), token]
            if n < config.max_new_tokens and not (
                token == eos_id or (ended is not None and ended(new))
            ):
                rows, tokens, totals = [*rows, row], [*tokens, token], [*totals, score]
            elif rank < config.num_beams:
                found.append(Beam(new, score / n**config.length_penalty))
            if len(rows) == config.num_beams:
                break
        found = sorted(found, key=lambda beam: -beam.score)[: config.num_return_sequences]
        full = len(found) == config.num_return_sequences
        if not rows or (full and found[-1].score >= _best(totals[0], n, config)):
            break
        reader.advance(rows, tokens)
        total = np.array(totals)
    return found


def _likeliest(
    reader: _Reader, total: np.ndarray, config: GenerationConfig
) -> Iterator[tuple[int, int, float]]:
    """(row, token, Σ ln p) of the likeliest ways to go on: twice the beams, since some may end."""
    logits = np.stack(
        [
            _penalised(row, seen, config.repetition_penalty)
            for row, seen in zip(reader.next_logits(), reader.ids, strict=True)
        ]
    )
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))  # (B, V)
    totals = (total[:, None] + log_p).reshape(-1)
    count = min(2 * config.num_beams, totals.size)
    best = np.argpartition(-totals, count - 1)[:count]
    for at in best[np.argsort(-totals[best], kind="stable")]:
        if totals[at] > -np.inf:
            row, token = divmod(int(at), log_p.shape[1])
            yield row, token, float(totals[at])


def _best(total: float, n: int, config: GenerationConfig) -> float:
    """The best score that a text of n tokens may still get: ln p of all that follows is 0."""
    longest = config.length_penalty > 0
    return total / (config.max_new_tokens if longest else n + 1) ** config.length_penalty


# --- from text to text ----------------------------------------------------------------------------


class Codec(Protocol):
    """What is needed of a tokenizer: `data.tokenizers.Tokenizer`, or whatever answers to it."""

    eos_id: int | None
    vocab_size: int

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

    `write_many` for one text, with its most common options.
    """
    config = GenerationConfig(max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    pieces = write_many(model, tokenizer, prompt, config, seed=seed, stop_at_end=stop_at_end)
    return (piece.text for piece in pieces)


class Piece(NamedTuple):
    """The next piece of text `number`, counted from 0, and whether it is its last; may be empty."""

    number: int
    text: str
    last: bool


def write_many(
    model: GPT,
    tokenizer: Codec,
    prompt: str,
    config: GenerationConfig,
    *,
    seed: int = 0,
    stop_at_end: bool = True,
) -> Iterator[Piece]:
    """Yield `num_return_sequences` texts with which the model goes on from `prompt`, in pieces.

    They are written side by side, and text i is the one that the seed `seed` + i gives alone; those
    of a beam search come whole, the best first. A text ends before the first of the stop strings.
    An empty prompt begins a document. `stop_at_end` ends with the document that the model ends;
    otherwise it goes on to the next, after `<|endoftext|>`.
    """
    prompt_tokens = prompt_ids(tokenizer, prompt)
    _check_prompt(model, prompt_tokens)
    eos_id = tokenizer.eos_id if stop_at_end else None
    if config.num_beams > 1:
        return _found(model, tokenizer, prompt_tokens, config, eos_id)
    texts = [
        TextStream(tokenizer, prompt_tokens, config.stop_strings)
        for _ in range(config.num_return_sequences)
    ]
    first = backend.RandomStream(seed).seed
    streams = [backend.RandomStream((first + i) % 2**64) for i in range(len(texts))]
    drawn = samples(
        model,
        prompt_tokens,
        config,
        streams=streams,
        eos_id=eos_id,
        ended=lambda i, _: texts[i].stopped,
        vocab_size=tokenizer.vocab_size,
    )
    return _pieces(drawn, texts, eos_id)


def _pieces(
    drawn: Iterable[tuple[int, int]], texts: Sequence[TextStream], eos_id: int | None
) -> Iterator[Piece]:
    open_texts = set(range(len(texts)))
    for i, token in drawn:
        if token != eos_id:
            text = texts[i].push(token)
            if not texts[i].stopped:
                yield Piece(i, text, last=False)
                continue
        else:
            text = texts[i].end()
        open_texts.remove(i)
        yield Piece(i, text, last=True)
    for i in sorted(open_texts):  # max_new_tokens
        yield Piece(i, texts[i].end(), last=True)


def _found(
    model: GPT,
    tokenizer: Codec,
    prompt: list[int],
    config: GenerationConfig,
    eos_id: int | None,
) -> Iterator[Piece]:
    def stops(ids: Sequence[int]) -> bool:
        if not config.stop_strings:
            return False
        text = TextStream(tokenizer, prompt, config.stop_strings)
        for token in ids:
            text.push(token)
        return text.stopped

    beams = beam_search(
        model, prompt, config, eos_id=eos_id, ended=stops, vocab_size=tokenizer.vocab_size
    )
    for i in range(config.num_return_sequences):  # a small vocabulary may have fewer texts
        ids = beams[i].ids if i < len(beams) else []
        ids = ids[:-1] if ids and ids[-1] == eos_id else ids
        text = "".join(stream_text(tokenizer, prompt, ids, config.stop_strings))
        yield Piece(i, text, last=True)


def prompt_ids(tokenizer: Codec, prompt: str) -> list[int]:
    """The ids of the prompt; of an empty one the mark that stands before every document."""
    if prompt:
        return tokenizer.encode(prompt).tolist()
    if tokenizer.eos_id is None:
        raise ValueError("the prompt is empty, and this tokenizer has no token to begin with")
    return [tokenizer.eos_id]


class TextStream:
    """decode(prompt + tokens) less the prompt's own text, up to the first stop string.

    A byte-level tokenizer may cut a character, '你' in three: its bytes come out together, when it
    is whole. What may be the beginning of a stop string waits until that is known. Each time only
    the tokens since the last but one piece are decoded, so that a long text costs no more per token
    than a short one.
    """

    def __init__(
        self, tokenizer: Codec, prompt: Sequence[int], stop_strings: Sequence[str] = ()
    ) -> None:
        self.tokenizer, self.stop_strings = tokenizer, stop_strings
        self.window = list(prompt)  # tokens whose text is out already, then those still waiting
        self.out = len(self.window)
        self.held = ""  # may begin a stop string
        self.stopped = False  # a stop string was found

    def push(self, token: int) -> str:
        """The text that is certain now that this token follows."""
        self.window.append(token)
        before, after = self._decoded()
        if after.endswith("\ufffd"):  # the beginning of a character
            return ""
        self.window, self.out = self.window[self.out :], len(self.window) - self.out
        return self._before_stop(after[len(before) :])

    def end(self) -> str:
        """The rest of the text, now that no token follows."""
        text = ""
        if self.out < len(self.window):
            before, after = self._decoded()
            text = self._before_stop(after[len(before) :])
        return text + self.held

    def _decoded(self) -> tuple[str, str]:
        """The text of the window that is out already, and all of it."""
        return self.tokenizer.decode(self.window[: self.out]), self.tokenizer.decode(self.window)

    def _before_stop(self, text: str) -> str:
        text = self.held + text
        places = [(text.find(stop), len(stop)) for stop in self.stop_strings if stop in text]
        if places:  # the one that is whole first, however the tokens cut the text
            self.stopped, self.held = True, ""
            _, at = min((start + length, start) for start, length in places)
            return text[:at]
        waiting = max((_overlap(text, stop) for stop in self.stop_strings), default=0)
        cut = len(text) - waiting
        self.held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of text begin stop: ('yes, EN', 'END') -> 2"""
    return next(n for n in range(min(len(stop), len(text)), -1, -1) if text.endswith(stop[:n]))


def stream_text(
    tokenizer: Codec, prompt: Sequence[int], ids: Iterable[int], stop_strings: Sequence[str] = ()
) -> Iterator[str]:
    """The text of `ids` after `prompt`, piece by piece, each as soon as it is certain."""
    text = TextStream(tokenizer, prompt, stop_strings)
    for token in ids:
        if piece := text.push(token):
            yield piece
        if text.stopped:
            return
    if piece := text.end():
        yield piece
