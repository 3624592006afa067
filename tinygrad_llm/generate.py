"""Writing with a trained model: one token after the other, each drawn from what the model expects.

ids ← ids + [k],   k ~ softmax(logits(ids)[-1] / temperature)

    generate(model, ids, n)                  the tokens of one text, each as soon as it is known
    samples(model, ids, config, streams=…)   several texts at once, drawn
    beam_search(model, ids, config)          the likeliest texts, searched for
    write, write_many                        the same from text to text
    generate_all(model, sources, config)     the targets of many sources, for an encoder–decoder

An encoder–decoder does not go on from `ids`: they are its source, and what is written is the target
from its first token on.

Dimensions: B texts that are written at once, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.autograd import no_grad
from tinygrad_llm.models.encoder_decoder import EncoderDecoder
from tinygrad_llm.models.padding import padded
from tinygrad_llm.nn.cache import DecoderCache, KVCache
from tinygrad_llm.tensor import Tensor

if TYPE_CHECKING:
    from tinygrad_llm.models.gpt import GPT
    from tinygrad_llm.models.llama import Llama
    from tinygrad_llm.models.lstm import LSTMLanguageModel

    Writer = GPT | Llama | LSTMLanguageModel | EncoderDecoder


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
    early_stopping: bool = False  # end when num_beams texts have ended, were others to be better
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
        if not isinstance(self.early_stopping, bool):
            raise ValueError(f"early_stopping must be true or false, got {self.early_stopping!r}")
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
            if self.early_stopping:
                raise ValueError("early_stopping is for beams: leave it out, or raise num_beams")
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
    model: Writer,
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
    the same seed, the same text. Ends after `eos_id`, which is yielded too; that of an
    encoder–decoder is its config's unless given. Dropout is off while a token is computed.

    The model sees at first the last `n_positions` of `ids`. Whenever its positions are full, this
    window slides by half of them and is computed anew: so a long text costs little more per token
    than a short one, and the model always sees more than the last n_positions / 2 tokens. An
    encoder–decoder ends where its positions do.

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
    model: Writer,
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
    reader = _reader(model, ids, config, vocab_size)
    eos_id = _end(model, eos_id)

    def over(i: int, token: int) -> bool:
        return token == eos_id or (ended is not None and ended(i, token))

    rows = dict.fromkeys(range(len(streams)), 0)  # first the prompt is the only one
    return _samples(reader, config, streams, over, rows)


def _end(model: Writer, eos_id: int | None) -> int | None:
    own = model.config.eos_token_id if isinstance(model, EncoderDecoder) else None
    return own if eos_id is None else eos_id


def _samples(
    reader: _Reader,
    config: GenerationConfig,
    streams: Sequence[backend.RandomStream],
    over: Callable[[int, int], bool],
    rows: dict[int, int],
) -> Iterator[tuple[int, int]]:
    """`rows`: text -> its row in the batch."""
    for _ in range(reader.room(config)):
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

    It begins with one text. `ids` (B, T) are the tokens so far, the first `prompt` of them given,
    of which the model sees those from `start` on; the keys and values of all but the newest are in
    the cache.
    """

    def __init__(
        self, model: Any, ids: Sequence[int], use_cache: bool, vocab_size: int | None
    ) -> None:
        _check_prompt(model, ids)
        carries = hasattr(model, "new_cache")  # a state of fixed size, which has no longest text
        self.model, self.n_positions = model, sys.maxsize if carries else model.config.n_positions
        self.vocab_size = vocab_size
        self.device = next(iter(model.parameters())).device
        self.ids, self.prompt = np.array([ids], dtype=np.int64), len(ids)
        self.start = max(0, len(ids) - self.n_positions)
        self.cache: Any = None
        if use_cache:
            self.cache = model.new_cache() if carries else KVCache(model.config)

    def room(self, config: GenerationConfig) -> int:
        """How many tokens there may be."""
        return config.max_new_tokens

    def next_logits(self) -> np.ndarray:
        """The logits (B, V) of the token after each text, float64 on the CPU."""
        if self.ids.shape[1] - self.start > self.n_positions:
            # Each position has an embedding of its own, so what slides is all computed anew.
            self.start += max(1, self.n_positions // 2)
            if self.cache is not None:
                self.cache.clear()
        read = 0 if self.cache is None else self.cache.length
        new = Tensor(self.ids[:, self.start + read :]).to(self.device)
        return self._finite(_quietly(self.model, lambda: self.model.next_logits(new, self.cache)))

    def _finite(self, logits: Tensor) -> np.ndarray:
        found = logits.numpy()[:, : self.vocab_size].astype(np.float64)
        if not np.isfinite(found.max(axis=1)).all():
            raise FloatingPointError(
                "the model's logits are not numbers: its weights are damaged, take an earlier "
                "checkpoint"
            )
        return found

    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Go on with these of the B texts, each with one more token."""
        self.ids = np.concatenate((self.ids[list(rows)], np.array(tokens)[:, None]), axis=1)
        if self.cache is not None:
            self.cache.select(rows)


class _SourceReader(_Reader):
    """An encoder–decoder that has read B sources; `ids` are the targets, from their start on."""

    def __init__(
        self,
        model: EncoderDecoder,
        sources: Sequence[Sequence[int]],
        use_cache: bool,
        vocab_size: int | None,
    ) -> None:
        for source in sources:
            _check_prompt(model, source)
        self.model, self.vocab_size = model, vocab_size
        self.device = next(iter(model.parameters())).device
        self.ids = np.full((len(sources), 1), model.config.decoder_start_token_id, np.int64)
        self.prompt = 1
        source_ids, real = padded(sources, model.config.pad_token_id)
        self.real = None if real.all() else real
        self.memory = _quietly(
            model, lambda: model.encode(Tensor(source_ids).to(self.device), self.real)
        )
        self.cache: DecoderCache | None = DecoderCache(model.config) if use_cache else None

    def room(self, config: GenerationConfig) -> int:
        """As many tokens as there are positions: none of a target can be let go."""
        positions = getattr(self.model.config, "n_positions", None)
        wanted = config.max_new_tokens
        return wanted if positions is None else min(wanted, positions)

    def next_logits(self) -> np.ndarray:
        """The logits (B, V) of the token after each target, float64 on the CPU."""
        read = 0 if self.cache is None else self.cache.length
        new = Tensor(self.ids[:, read:]).to(self.device)
        return self._finite(
            _quietly(
                self.model,
                lambda: self.model.next_logits(new, self.memory, self.real, self.cache),
            )
        )

    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Go on with these of the B texts, each with one more token."""
        if list(rows) != list(range(len(self.ids))):
            self.memory = Tensor(self.memory.data[list(rows)])
            self.real = None if self.real is None else self.real[list(rows)]
        super().advance(rows, tokens)


def _reader(
    model: Writer, ids: Sequence[int], config: GenerationConfig, vocab_size: int | None
) -> _Reader:
    if isinstance(model, EncoderDecoder):
        return _SourceReader(model, [ids], config.use_cache, vocab_size)
    return _Reader(model, ids, config.use_cache, vocab_size)


def _quietly(model: Any, function: Callable[[], Tensor]) -> Tensor:
    """function() with dropout off and no graph."""
    training = model.training
    model.eval()
    try:
        with no_grad():
            return function()
    finally:
        model.train(training)


def _check_prompt(model: Writer, ids: Sequence[int]) -> None:
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
    model: Writer,
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
    than those found, as with early_stopping = "never" in `transformers` (whose default guesses, and
    may end earlier); with `early_stopping` when `num_beams` texts have ended. `vocab_size` is as in
    `samples`. Raises as `generate` does.
    """
    reader = _reader(model, ids, config, vocab_size)
    search = _Search(config, reader.room(config), _end(model, eos_id), ended)
    _search(reader, [search], config)
    return search.found


class _Search:
    """The beams of one prompt: the texts that go on, and the best of those that ended."""

    def __init__(
        self,
        config: GenerationConfig,
        longest: int,
        eos_id: int | None,
        ended: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        self.config, self.longest, self.eos_id, self.ended = config, longest, eos_id, ended
        self.total = np.zeros(1)  # Σ ln p of each text that goes on, the likeliest first
        self.found: list[Beam] = [] if longest else [Beam([], 0.0)]
        self.ends = 0  # how many have ended

    def step(self, log_p: np.ndarray, texts: np.ndarray) -> tuple[list[int], list[int]]:
        """(rows, tokens): which of its texts go on, with which token; none where it is over.

        log_p: (b, V) of the token after each text; texts: (b, n) the new tokens so far.
        """
        config, n = self.config, texts.shape[1] + 1
        rows, tokens, totals = [], [], []
        for rank, (row, token, total) in enumerate(self._likeliest(log_p)):
            new = [*texts[row].tolist(), token]
            if n < self.longest and not self._is_end(new):
                rows, tokens, totals = [*rows, row], [*tokens, token], [*totals, total]
            elif rank < config.num_beams:
                self.found.append(Beam(new, total / n**config.length_penalty))
                self.ends += 1
            if len(rows) == config.num_beams:
                break
        self.found.sort(key=lambda beam: -beam.score)
        del self.found[config.num_return_sequences :]
        self.total = np.array(totals)
        return ([], []) if self._is_over(n) else (rows, tokens)

    def _is_end(self, new: list[int]) -> bool:
        return new[-1] == self.eos_id or (self.ended is not None and self.ended(new))

    def _is_over(self, n: int) -> bool:
        config = self.config
        if not len(self.total) or (config.early_stopping and self.ends >= config.num_beams):
            return True
        full = len(self.found) == config.num_return_sequences
        return full and self.found[-1].score >= _best(self.total[0], n, self.longest, config)

    def _likeliest(self, log_p: np.ndarray) -> Iterator[tuple[int, int, float]]:
        """(row, token, Σ ln p) of the likeliest ways on: twice the beams, since some may end."""
        totals = (self.total[:, None] + log_p).reshape(-1)
        count = min(2 * self.config.num_beams, totals.size)
        best = np.argpartition(-totals, count - 1)[:count]
        for at in best[np.argsort(-totals[best], kind="stable")]:
            if totals[at] > -np.inf:
                row, token = divmod(int(at), log_p.shape[1])
                yield row, token, float(totals[at])


def _search(reader: _Reader, searches: Sequence[_Search], config: GenerationConfig) -> None:
    """Take all searches to their ends, a step of each at a time; each begins with one row."""
    searches = [search for search in searches if search.longest]
    while searches:
        log_p = _log_p(reader, config)
        texts = reader.ids[:, reader.prompt :]
        rows, tokens, left, end = [], [], [], 0
        for search in searches:
            start, end = end, end + len(search.total)
            of_search, new = search.step(log_p[start:end], texts[start:end])
            rows += [start + row for row in of_search]
            tokens += new
            left += [search] if new else []
        searches = left
        if searches:
            reader.advance(rows, tokens)


def _log_p(reader: _Reader, config: GenerationConfig) -> np.ndarray:
    """ln p of the token after each text, (B, V)"""
    logits = np.stack(
        [
            _penalised(row, seen, config.repetition_penalty)
            for row, seen in zip(reader.next_logits(), reader.ids, strict=True)
        ]
    )
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def _best(total: float, n: int, longest: int, config: GenerationConfig) -> float:
    """The best score that a text of n tokens may still get: ln p of all that follows is 0."""
    return total / (longest if config.length_penalty > 0 else n + 1) ** config.length_penalty


# --- many sources ---------------------------------------------------------------------------------


def generate_all(
    model: EncoderDecoder,
    sources: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    batch_size: int = 32,
    seed: int = 0,
    eos_id: int | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """The target of each source, in their order, with `eos_id` at its end where it came to one.

    Sources of similar length are read side by side, `batch_size` at once, and that changes nothing
    in what is written: the target of source i is that of `generate` with the seed `seed` + i; with
    beams the best that `beam_search` finds. Raises as `generate` does.
    """
    if not isinstance(model, EncoderDecoder):
        raise TypeError(f"generate_all() is for encoder–decoders, got a {type(model).__name__}")
    if config.num_return_sequences != 1 or batch_size < 1:
        raise ValueError(
            "generate_all() gives one text for each source, in batches of at least 1, got "
            f"num_return_sequences = {config.num_return_sequences}, batch_size = {batch_size}"
        )
    eos_id = _end(model, eos_id)
    targets: list[list[int]] = [[] for _ in sources]
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        reader = _SourceReader(model, [sources[i] for i in batch], config.use_cache, vocab_size)
        if config.num_beams > 1:
            searches = [_Search(config, reader.room(config), eos_id) for _ in batch]
            _search(reader, searches, config)
            for i, search in zip(batch, searches, strict=True):
                targets[i] = search.found[0].ids
            continue
        streams = [backend.RandomStream((seed + i) % 2**64) for i in batch]
        rows = {row: row for row in range(len(batch))}
        for row, token in _samples(reader, config, streams, lambda _, k: k == eos_id, rows):
            targets[batch[row]].append(token)
    return targets


# --- from text to text ----------------------------------------------------------------------------


class Codec(Protocol):
    """What is needed of a tokenizer: `data.tokenizers.Tokenizer`, or whatever answers to it."""

    eos_id: int | None
    vocab_size: int

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def write(
    model: Writer,
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
    model: Writer,
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
    otherwise it goes on to the next, after `<|endoftext|>`. To an encoder–decoder the prompt is the
    source, and its target always ends.
    """
    if isinstance(model, EncoderDecoder):
        prompt_tokens, eos_id = source_ids(model, tokenizer, prompt), _end(model, None)
        before: list[int] = []
    else:
        prompt_tokens = before = prompt_ids(tokenizer, prompt)
        eos_id = tokenizer.eos_id if stop_at_end else None
    _check_prompt(model, prompt_tokens)
    if config.num_beams > 1:
        return _found(model, tokenizer, prompt_tokens, before, config, eos_id)
    texts = [
        TextStream(tokenizer, before, config.stop_strings)
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
    model: Writer,
    tokenizer: Codec,
    prompt: list[int],
    before: list[int],
    config: GenerationConfig,
    eos_id: int | None,
) -> Iterator[Piece]:
    """`before`: what of the prompt the texts go on from."""

    def stops(ids: Sequence[int]) -> bool:
        if not config.stop_strings:
            return False
        text = TextStream(tokenizer, before, config.stop_strings)
        for token in ids:
            text.push(token)
        return text.stopped

    beams = beam_search(
        model, prompt, config, eos_id=eos_id, ended=stops, vocab_size=tokenizer.vocab_size
    )
    for i in range(config.num_return_sequences):  # a small vocabulary may have fewer texts
        ids = beams[i].ids if i < len(beams) else []
        ids = ids[:-1] if ids and ids[-1] == eos_id else ids
        text = "".join(stream_text(tokenizer, before, ids, config.stop_strings))
        yield Piece(i, text, last=True)


def prompt_ids(tokenizer: Codec, prompt: str) -> list[int]:
    """The ids of the prompt; of an empty one the mark that stands before every document."""
    if prompt:
        return tokenizer.encode(prompt).tolist()
    if tokenizer.eos_id is None:
        raise ValueError("the prompt is empty, and this tokenizer has no token to begin with")
    return [tokenizer.eos_id]


def source_ids(model: EncoderDecoder, tokenizer: Codec, text: str) -> list[int]:
    """The ids of the text and the model's end of texts, as sources are given to it in training."""
    ids = tokenizer.encode(text).tolist()
    end = model.config.eos_token_id
    return ids if end is None else [*ids, end]


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
