"""Text ↔ token ids: bytes, characters, or byte-level BPE, all in one file format.

A `Tokenizer` is a `tokenizers.Tokenizer` with a few manners. The three kinds differ in how they are
made, not in how they are used, and each saves as the Hugging Face `tokenizer.json` which
`tokenizers.Tokenizer.from_file` opens and which encodes the same there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tinygrad_llm.data import END_OF_TEXT

UNKNOWN = "<unk>"
FILE_NAME = "tokenizer.json"

Kind = Literal["byte", "char", "bpe", "other"]


class Tokenizer:
    """decode(encode(text)) = text, to the letter, for the three kinds that are made here.

        byte()                  ids 0 … 255 are the bytes of UTF-8
        char(text)              the distinct characters of the text, sorted; then `<unk>`
        bpe(text, vocab_size)   the 256 bytes, then the merges in the order they were found
        from_file(path)         one of these, or whatever else the file holds (kind 'other')

    The last id of the first three is `eos_id`, `<|endoftext|>`, GPT-2's mark between documents: one
    token wherever a text has it. `vocab_size` is the largest id + 1, the rows an embedding needs.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        # Files saved for inference may cut and pad every text: a corpus would lose its tail.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.kind: Kind = _kind(tokenizer)
        self.vocab_size: int = 1 + max(tokenizer.get_vocab().values(), default=-1)
        self.eos_id: int | None = tokenizer.token_to_id(END_OF_TEXT)

    @classmethod
    def byte(cls) -> Tokenizer:
        """id = the value of the byte; `vocab_size` is 257."""
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model = models.BPE(vocab=_byte_vocab(), merges=[])
        return cls(_with_mark(_assemble(model, words, decoders.ByteLevel())))

    @classmethod
    def char(cls, text: str) -> Tokenizer:
        """id = the place of the character among the sorted distinct characters of `text`.

        It knows this alphabet and no more: `encode` refuses other characters, or makes them
        `<unk>`. Raises ValueError for a text without a character.
        """
        _check_text(text)
        alphabet = sorted(set(text.replace(END_OF_TEXT, "")))
        if not alphabet:
            raise ValueError("a character tokenizer is made from a text, got an empty one")
        vocab = {token: i for i, token in enumerate([*alphabet, UNKNOWN])}
        model = models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN)
        return cls(_with_mark(_assemble(model, None, decoders.Fuse())))

    @classmethod
    def bpe(cls, text: str | Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-pair encoding: merge the most frequent pair of neighbours until the ids are used up.

        Words come from GPT-2's pattern and the alphabet is the 256 bytes, so no text is unknown.
        `text` is one string or an iterable of them; a short one may give fewer ids than asked.
        Raises ValueError for a `vocab_size` below 257.
        Sennrich et al., ACL 2016; over bytes: Radford et al. 2019 (GPT-2).
        """
        if vocab_size < 257:
            raise ValueError(
                f"vocab_size must be at least 257 for byte-level BPE (256 bytes and {END_OF_TEXT}),"
                f" got {vocab_size}"
            )
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = _assemble(models.BPE(), words, decoders.ByteLevel())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,  # the last id is the mark's
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_documents(text), trainer)
        return cls(_with_mark(tokenizer))

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> Tokenizer:
        """The tokenizer of a `tokenizer.json`, or of the folder that holds one.

        Raises FileNotFoundError where there is none, ValueError where the file is not one.
        """
        file = Path(path)
        if file.is_dir():
            file = file / FILE_NAME
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer at '{file}': expected a {FILE_NAME}")
        try:
            return cls(tokenizers.Tokenizer.from_buffer(file.read_bytes()))
        except ValueError as error:
            raise ValueError(f"'{file}' is not a readable {FILE_NAME}: {error}") from error

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write `folder`/tokenizer.json (the folder is made if need be); its path."""
        file = Path(folder) / FILE_NAME
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8", newline="\n")
        return file

    def encode(self, text: str, *, allow_unknown: bool = False) -> np.ndarray:
        """The token ids of the text, int64 of shape (T,); no special token is added.

        A long text is encoded in pieces, on all cores, cut where the ids are those of the whole.
        Raises ValueError, with the position, for a lone surrogate and for a character outside the
        alphabet of a character tokenizer (with `allow_unknown` that becomes `<unk>`).
        """
        _check_text(text)
        pieces = [text] if self.kind == "other" else list(_pieces(text))
        parts = [np.empty(0, np.int64)]
        for i in range(0, len(pieces), _BATCH):
            encodings = self.tokenizer.encode_batch_fast(
                pieces[i : i + _BATCH], add_special_tokens=False
            )
            parts += [np.array(encoding.ids, np.int64) for encoding in encodings]
        ids = np.concatenate(parts)
        if self.kind == "char" and not allow_unknown and self.token_to_id(UNKNOWN) in ids:
            raise self._unknown_character(text)
        return ids

    def decode(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
        """The text of the token ids (a list or a one-dimensional integer array).

        Bytes that are not UTF-8, as in the middle of a character, become U+FFFD. Raises ValueError
        for an id outside 0 … vocab_size − 1.
        """
        array = np.asarray(ids)
        if array.size == 0:
            return ""
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(
                f"decode() takes a list of token ids, got {array.dtype} of shape {array.shape}"
            )
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside this tokenizer's vocabulary "
                f"of {self.vocab_size}"
            )
        return self.tokenizer.decode(array.tolist(), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the file spells it (BPE: 'Ġthe' for ' the'), or None."""
        return self.tokenizer.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token with that id as the file spells it, or None."""
        return self.tokenizer.id_to_token(token_id)

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size})"

    def _unknown_character(self, text: str) -> ValueError:
        alphabet = self.tokenizer.get_vocab(with_added_tokens=False).keys() - {UNKNOWN}
        marks_hidden = text.replace(END_OF_TEXT, min(alphabet) * len(END_OF_TEXT))
        position, character = next(
            (i, character) for i, character in enumerate(marks_hidden) if character not in alphabet
        )
        return ValueError(
            f"the character {character!r} (U+{ord(character):04X}) at position {position} is not "
            f"among the {len(alphabet)} that this character tokenizer was made from; leave it out, "
            "or use a byte or BPE tokenizer, which know every character"
        )


def _assemble(model: Any, words: Any, decoder: Any) -> tokenizers.Tokenizer:
    """The model, what cuts a text into words before it, what makes text of tokens after it."""
    tokenizer = tokenizers.Tokenizer(model)
    if words is not None:
        tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoder
    return tokenizer


def _with_mark(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    tokenizer.add_special_tokens([END_OF_TEXT])  # takes the next free id: the last
    return tokenizer


def _byte_vocab() -> dict[str, int]:
    """How GPT-2 writes byte b in a vocabulary: as itself where printable, else as U+0100 + n.

    {'A': 65, 'Ġ': 32, 'Ċ': 10, …}: Ġ is the blank, Ċ the newline.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


def _check_text(text: str) -> None:
    """Refuse what no UTF-8 file can hold: a lone surrogate."""
    if not isinstance(text, str):
        raise TypeError(f"expected a text (str), got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at position "
            f"{error.start}, which is half a character: remove it"
        ) from error


def _documents(text: str | Iterable[str]) -> Iterator[str]:
    """What lies between the marks, so that BPE never learns to spell the mark itself."""
    for string in [text] if isinstance(text, str) else text:
        _check_text(string)
        yield from string.split(END_OF_TEXT)


_PIECE = 1 << 14  # characters
_BATCH = 32  # pieces encoded at a time: an Encoding is a hundred times larger than its ids
# GPT-2's pattern ends a word wherever a blank or newline follows a character that is neither.
_SEAM = re.compile(r"(?<=\S)[ \n]")


def _pieces(text: str) -> Iterator[str]:
    """Pieces of 16K characters or a little more, cut where their ids are those of the whole."""
    start = 0
    while len(text) - start > _PIECE and (seam := _SEAM.search(text, start + _PIECE)):
        yield text[start : seam.start()]
        start = seam.start()
    yield text[start:]


def _kind(tokenizer: tokenizers.Tokenizer) -> Kind:
    """Which of ours it is; 'other' for all that we cannot promise to encode in pieces."""
    model, words = tokenizer.model, tokenizer.pre_tokenizer
    if not isinstance(model, models.BPE) or tokenizer.normalizer is not None:
        return "other"
    if not all(map(_is_mark, tokenizer.get_added_tokens_decoder().values())):
        return "other"
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    if words is None:
        letters = all(len(token) == 1 for token in vocab if token != UNKNOWN)
        return "char" if letters and model.unk_token == UNKNOWN else "other"
    if not isinstance(words, pre_tokenizers.ByteLevel) or words.add_prefix_space:
        return "other"
    if words.use_regex:
        return "bpe"
    return "byte" if vocab == _byte_vocab() else "other"


def _is_mark(token: tokenizers.AddedToken) -> bool:
    """True for `<|endoftext|>` that takes no blanks with it and needs none around it."""
    return token.content == END_OF_TEXT and not (token.lstrip or token.rstrip or token.single_word)
