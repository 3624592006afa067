"""What a word looks like, as a vector: the word itself, its characters, its shape.

    word          shape     word, normalised
    Mr.           Xx.       mr.
    1996-08-22    00-00-00  0000-00-00
    iPhone        xXxx      iphone
    USA           XX        usa

A word is looked up in lower case with 0 for every digit, so that rare spellings share a vector.
What that loses is in the characters and in the shape, which keep the case; they also speak for
words that training never showed.

Dimensions: N rows, V words in a row, L characters of the longest, F features.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from tinygrad_llm import backend, ops
from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.nn import LSTM, Embedding, Linear, Module
from tinygrad_llm.tensor import Tensor

LONGEST_WORD = 32  # characters

PADDING, UNKNOWN = 0, 1  # ids in all three vocabularies; what is known begins at 2

CharacterEncoder = Literal["cnn", "lstm", "none"]

_DIGITS = re.compile(r"\d")


def normalized(word: str) -> str:
    """The word in lower case, 0 for every digit: 'May1997' -> 'may0000'"""
    return _DIGITS.sub("0", word.lower())


def shape_of(word: str) -> str:
    """The kinds of its characters, a run of one kind cut to two: 'McDonald' -> 'XxXxx'

    X upper case, x lower case, 0 a digit, w a letter without case; all else stands for itself.
    Longer ones end after 12.
    """
    kinds: list[str] = []
    for character in word:
        kind = _kind(character)
        if kinds[-2:] != [kind, kind]:
            kinds.append(kind)
    return "".join(kinds[:_LONGEST_SHAPE])


_LONGEST_SHAPE = 12


def _kind(character: str) -> str:
    if character.isupper():
        return "X"
    if character.islower():
        return "x"
    if character.isdigit():
        return "0"
    return "w" if character.isalpha() else character


@dataclass(frozen=True)
class Vocabularies:
    """The words, characters and shapes of training data, the most frequent first; ids begin at 2.

    The last `rare` words occurred once: a tagger learns what to do with unknown words by taking
    them for unknown now and then.
    """

    words: tuple[str, ...]
    rare: int
    characters: str
    shapes: tuple[str, ...]

    @classmethod
    def of(cls, sentences: Iterable[Sequence[str]]) -> Vocabularies:
        """Of the words of training sentences; characters and shapes that occur once are left out.

        Equal counts are ordered by name, so the same data gives the same ids in whatever order.
        """
        counts = Counter(word for words in sentences for word in words)
        words: Counter[str] = Counter()
        characters: Counter[str] = Counter()
        shapes: Counter[str] = Counter()
        for word, n in counts.items():
            words[normalized(word)] += n
            shapes[shape_of(word)] += n
            for character in word:
                characters[character] += n
        by_count = _by_count(words)
        return cls(
            tuple(by_count),
            sum(words[word] == 1 for word in by_count),
            "".join(c for c in _by_count(characters) if characters[c] > 1),
            tuple(s for s in _by_count(shapes) if shapes[s] > 1),
        )


def _by_count(counts: Mapping[str, int]) -> list[str]:
    return sorted(counts, key=lambda name: (-counts[name], name))


class WordReader:
    """Words → the ids that `WordFeatures` takes.

    Args:
        vocabularies: the ids.
        longest: characters of a word that are read; of a longer one as many from its beginning as
            from its end.
    """

    def __init__(self, vocabularies: Vocabularies, longest: int = LONGEST_WORD) -> None:
        self._words = {word: i for i, word in enumerate(vocabularies.words, 2)}
        self._characters = {c: i for i, c in enumerate(vocabularies.characters, 2)}
        self._shapes = {shape: i for i, shape in enumerate(vocabularies.shapes, 2)}
        self._longest = longest
        self._known: dict[str, tuple[int, int, list[int]]] = {}

    def read(self, rows: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
        """{'words': (N, V), 'shapes': (N, V), 'characters': (N, V, L)}, int64, 0 for padding."""
        found = [[self._ids(word) for word in row] for row in rows]
        longest = max((len(row) for row in found), default=0)
        letters = max((len(word[2]) for row in found for word in row), default=1)
        words, shapes = (np.zeros((len(rows), longest), np.int64) for _ in range(2))
        characters = np.zeros((len(rows), longest, max(1, letters)), np.int64)
        for i, row in enumerate(found):
            for j, (word, shape, spelling) in enumerate(row):
                words[i, j], shapes[i, j] = word, shape
                characters[i, j, : len(spelling)] = spelling
        return {"words": words, "shapes": shapes, "characters": characters}

    def _ids(self, word: str) -> tuple[int, int, list[int]]:
        ids = self._known.get(word)
        if ids is None:
            half = self._longest // 2
            read = word if len(word) <= self._longest else word[:half] + word[-half:]
            ids = (
                self._words.get(normalized(word), UNKNOWN),
                self._shapes.get(shape_of(word), UNKNOWN),
                [self._characters.get(c, UNKNOWN) for c in read],
            )
            if len(self._known) < _MOST_KNOWN:
                self._known[word] = ids
        return ids


_MOST_KNOWN = 1 << 18  # words whose ids are kept


class FeatureSizes(Protocol):
    """What `WordFeatures` needs of a config."""

    @property
    def vocabularies(self) -> Vocabularies: ...
    @property
    def word_size(self) -> int: ...
    @property
    def shape_size(self) -> int: ...
    @property
    def character_size(self) -> int: ...
    @property
    def character_features(self) -> int: ...
    @property
    def character_encoder(self) -> CharacterEncoder: ...
    @property
    def word_dropout(self) -> float: ...


class WordFeatures(Module):
    """y = [word embedding, characters, shape embedding] (N, V, F), what has size 0 left out

    In training a word that occurred once is taken for unknown with probability `word_dropout`.
    """

    def __init__(self, config: FeatureSizes) -> None:
        super().__init__()
        known = config.vocabularies
        self.word_dropout = config.word_dropout
        self.first_rare = 2 + len(known.words) - known.rare
        self.size = 0  # F
        self.words = self.shapes = self.characters = None
        if config.word_size:
            self.words = Embedding(2 + len(known.words), config.word_size, PADDING)
            self.size += config.word_size
        if config.character_encoder != "none":
            kind = CharacterCNN if config.character_encoder == "cnn" else CharacterLSTM
            sizes = (config.character_size, config.character_features)
            self.characters = kind(2 + len(known.characters), *sizes)
            self.size += config.character_features
        if config.shape_size:
            self.shapes = Embedding(2 + len(known.shapes), config.shape_size, PADDING)
            self.size += config.shape_size

    def forward(self, words: Array, shapes: Array, characters: Array) -> Tensor:
        """From the arrays of `WordReader.read`."""
        found = []
        if self.words is not None:
            found.append(self.words(self._with_dropout(words)))
        if self.characters is not None:
            rows = self.characters(characters.reshape(-1, characters.shape[2]))
            found.append(rows.reshape(*words.shape, rows.shape[1]))
        if self.shapes is not None:
            found.append(self.shapes(shapes))
        return found[0] if len(found) == 1 else ops.concatenate(found, axis=-1)

    def _with_dropout(self, words: Array) -> Array:
        if not self.training or not self.word_dropout:
            return words
        xp = namespace(words)
        dropped = backend.random.uniform(words.shape, xp=xp) < self.word_dropout
        return xp.where(dropped & (words >= self.first_rare), UNKNOWN, words)


class CharacterCNN(Module):
    """yᵢ = max over the places l of relu(W [e_{l−1}, e_l, e_{l+1}] + b)ᵢ

    Each of the features looks for one sequence of three characters, wherever it stands. Ma and
    Hovy, "End-to-end sequence labeling via bi-directional LSTM-CNNs-CRF", 2016.
    """

    def __init__(self, characters: int, size: int, features: int) -> None:
        super().__init__()
        self.embedding = Embedding(characters, size, PADDING)
        self.convolution = Linear(3 * size, features)

    def forward(self, ids: Array) -> Tensor:
        """(n, L) -> (n, features); a word of no characters gives zeros."""
        xp = namespace(ids)
        edge = xp.zeros((len(ids), 1), dtype=ids.dtype)
        e = self.embedding(xp.concatenate((edge, ids, edge), axis=1))  # (n, L + 2, E)
        near = ops.concatenate([e[:, :-2], e[:, 1:-1], e[:, 2:]], axis=-1)  # (n, L, 3E)
        found = ops.relu(self.convolution(near))
        real = Tensor((ids != PADDING).astype(found.dtype)[:, :, None])
        return ops.max(found * real, axis=1)


class CharacterLSTM(Module):
    """y = [h after the last character, h of the reverse direction after the first]

    Lample et al., "Neural architectures for named entity recognition", 2016.
    """

    def __init__(self, characters: int, size: int, features: int) -> None:
        super().__init__()
        self.embedding = Embedding(characters, size, PADDING)
        self.lstm = LSTM(size, features // 2, batch_first=True, bidirectional=True)

    def forward(self, ids: Array) -> Tensor:
        """(n, L) -> (n, features); a word of no characters gives zeros."""
        _, (h, _) = self.lstm(self.embedding(ids), lengths=(ids != PADDING).sum(axis=1))
        return ops.concatenate([h[0], h[1]], axis=-1)
