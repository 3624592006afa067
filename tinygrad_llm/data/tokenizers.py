"""Text ↔ token ids: bytes, characters, BPE, WordPiece or Unigram, all in one file format.

A `Tokenizer` is a `tokenizers.Tokenizer` with a few manners. The kinds differ in how they are
made, not in how they are used, and each saves as the Hugging Face `tokenizer.json` which
`tokenizers.Tokenizer.from_file` opens and which encodes the same there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tinygrad_llm.data import END_OF_TEXT, files

UNKNOWN = "<unk>"
FILE_NAME = "tokenizer.json"

BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BERT_FILE_NAME = "vocab.txt"

Kind = Literal["byte", "char", "bpe", "wordpiece", "unigram", "other"]


class Tokenizer:
    """decode(encode(text)) = text, to the letter, for the kinds made here, less WordPiece.

        byte()                        ids 0 … 255 are the bytes of UTF-8
        char(text)                    the distinct characters of the text, sorted; then `<unk>`
        bpe(text, vocab_size)         the 256 bytes, then the merges in the order they were found
        unigram(text, vocab_size)     pieces of bytes, the likeliest first
        wordpiece(text, vocab_size)   BERT's: `[PAD]` … `[MASK]`, characters, pieces of words
        from_vocab(path)              WordPiece from BERT's vocab.txt
        from_file(path)               one of these, or whatever else the file holds (kind 'other')

    The last id of those made here is `eos_id`, `<|endoftext|>`, GPT-2's mark between documents: one
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
    def unigram(cls, text: str | Iterable[str], vocab_size: int) -> Tokenizer:
        """argmax over cuts of a word into pieces of Σ log p(piece): the likeliest cut is taken.

        The pieces and their p come by expectation maximisation, from many pieces down to
        `vocab_size`. Words and alphabet are those of `bpe`, so no text is unknown and blanks, line
        ends, Chinese and emoji come back; it is not SentencePiece's file, which writes a blank
        as '▁'. A short text may give fewer ids than asked. The same text gives the same pieces.
        Raises ValueError for a text without a character and a `vocab_size` below 258.
        Kudo, ACL 2018 (arXiv:1804.10959).
        """
        if vocab_size < 258:
            raise ValueError(
                f"vocab_size must be at least 258 for Unigram (256 bytes, a piece and "
                f"{END_OF_TEXT}), got {vocab_size}"
            )
        documents = list(_documents(text))
        if not any(documents):
            raise ValueError("Unigram is made from a text, got an empty one")
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = _assemble(models.Unigram(), words, decoders.ByteLevel())
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size - 1,  # the last id is the mark's
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
        tokenizer.model = _repeatable(tokenizer)
        return cls(_with_mark(tokenizer))

    @classmethod
    def wordpiece(
        cls, text: str | Iterable[str], vocab_size: int, *, cased: bool = False
    ) -> Tokenizer:
        """From the start of a word, the longest piece that is known, then again: 'un ##aff ##able'.

        BERT's layout: `[PAD] [UNK] [CLS] [SEP] [MASK]` are the ids 0 … 4, then come the characters,
        the same inside of words with '##' before them, and the pieces. Control characters go,
        every blank is a blank, Chinese characters stand alone; unless `cased`, letters are
        lower-cased and lose their accents. A word with a character outside the text is `[UNK]`.
        So decode(encode(text)) is readable, but not the text to the letter.

        The pieces are those that BPE finds. A short text may give fewer ids than asked. The same
        text gives the same ids. Raises ValueError for a text without a character and for a
        `vocab_size` too small for its characters.
        Devlin et al., NAACL 2019 (BERT); Wu et al. 2016, arXiv:1609.08144.
        """
        documents = list(_documents(text))
        # Merges that tie are decided by ids, and the trainer numbers the '##' characters at random.
        # So a first pass finds the characters alone, and the second is given them in order.
        characters = _train_wordpiece(documents, BERT_TOKENS, 0, cased)
        alphabet = sorted(characters.keys() - {*BERT_TOKENS}, key=lambda token: (len(token), token))
        if not alphabet:
            raise ValueError("WordPiece is made from a text, got an empty one")
        known = (*BERT_TOKENS, *alphabet)
        if vocab_size <= len(known):
            raise ValueError(
                f"vocab_size must be at least {len(known) + 1} for WordPiece on this text (its "
                f"{len(alphabet)} characters at the start and inside of words, "
                f"{len(BERT_TOKENS) + 1} special tokens), got {vocab_size}"
            )
        vocab = _train_wordpiece(documents, known, vocab_size - 1, cased)
        return cls(_bert({**vocab, END_OF_TEXT: len(vocab)}, cased))

    @classmethod
    def from_vocab(cls, path: str | PathLike[str], *, cased: bool | None = None) -> Tokenizer:
        """WordPiece from BERT's vocab.txt: line n (from 0) is the token with id n.

        cased: keep capitals and accents; None: as `do_lower_case` in the tokenizer_config.json
        beside it says, else not. Raises FileNotFoundError where there is no such file, ValueError
        where it is not text, has a token twice, or lacks `[UNK]`, `[CLS]` or `[SEP]`.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no vocabulary at '{file}': expected a {BERT_FILE_NAME}")
        lines = files.decode(file.read_bytes(), f"'{file}'").removesuffix("\n").split("\n")
        vocab: dict[str, int] = {}
        for i, token in enumerate(line.removesuffix("\r") for line in lines):
            if token in vocab:
                raise ValueError(
                    f"'{file}' has the token {token!r} twice, in lines {vocab[token] + 1} and "
                    f"{i + 1}"
                )
            vocab[token] = i
        for token in ("[UNK]", "[CLS]", "[SEP]"):
            if token not in vocab:
                raise ValueError(f"'{file}' is no vocabulary of BERT's: it has no line {token!r}")
        return cls(_bert(vocab, _is_cased(file) if cased is None else cased))

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> Tokenizer:
        """The tokenizer of a `tokenizer.json`, or of the folder that holds one.

        A vocab.txt, or a folder with that alone, is read by `from_vocab`. Raises FileNotFoundError
        where there is neither, ValueError where the file is not one.
        """
        file = Path(path)
        if file.is_dir():
            alone = not (file / FILE_NAME).exists() and (file / BERT_FILE_NAME).exists()
            file = file / (BERT_FILE_NAME if alone else FILE_NAME)
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer at '{file}': expected a {FILE_NAME}")
        if file.name == BERT_FILE_NAME:
            return cls.from_vocab(file)
        try:
            return cls(tokenizers.Tokenizer.from_buffer(file.read_bytes()))
        except ValueError as error:
            raise ValueError(f"'{file}' is not a readable {FILE_NAME}: {error}") from error

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write `folder`/tokenizer.json (the folder is made if need be); its path.

        WordPiece also writes BERT's vocab.txt and, with `do_lower_case`, tokenizer_config.json.
        """
        file = Path(folder) / FILE_NAME
        file.parent.mkdir(parents=True, exist_ok=True)
        if self.kind == "wordpiece":
            self._save_vocab(file.parent)
        _write(file, self.tokenizer.to_str(pretty=True))
        return file

    def _save_vocab(self, folder: Path) -> None:
        tokens = [self.tokenizer.id_to_token(i) for i in range(self.vocab_size)]
        if None in tokens or not _is_berts_own(self.tokenizer):
            return  # a line is an id, and the file says nothing of other ways to normalise
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.tokenizer.normalizer.lowercase,
        }
        _write(folder / BERT_FILE_NAME, "".join(f"{token}\n" for token in tokens))
        _write(folder / _CONFIG, f"{json.dumps(config, indent=2)}\n")

    def encode(self, text: str, *, allow_unknown: bool = False) -> np.ndarray:
        """The token ids of the text, int64 of shape (T,); no special token is added.

        A long text is encoded in pieces, on all cores, cut where the ids are those of the whole.
        Raises ValueError, with the position, for a lone surrogate and for a character outside the
        alphabet of a character tokenizer (with `allow_unknown` that becomes `<unk>`). WordPiece
        has `[UNK]` for such words, as BERT.
        """
        _check_text(text)
        return self.encode_each([text], allow_unknown=allow_unknown)[0]

    def encode_each(
        self,
        texts: Sequence[str],
        *,
        positions: Sequence[int] | None = None,
        allow_unknown: bool = False,
    ) -> list[np.ndarray]:
        """The token ids of each text, as `encode`: many short ones keep all cores busy, too.

        positions: where each text stands in the whole that it was taken from, for the error that
        names a character. The texts are taken for UTF-8: a lone surrogate is a bug of the caller.
        """
        pieces: list[str] = []
        ends = []  # of each text's pieces
        for text in texts:
            pieces += [text] if self.kind == "other" else _pieces(text)
            ends.append(len(pieces))
        parts = []
        for batch in _batches(pieces):
            encodings = self.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            parts += [np.array(encoding.ids, np.int64) for encoding in encodings]
        found = [
            np.concatenate(parts[start:end])
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
        if self.kind == "char" and not allow_unknown:
            unknown = self.token_to_id(UNKNOWN)
            for i, (text, ids) in enumerate(zip(texts, found, strict=True)):
                if unknown in ids:
                    raise self._unknown_character(text, positions[i] if positions else 0)
        return found

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

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of what `save` writes to tokenizer.json: the same one gives the same ids."""
        return hashlib.sha256(self.tokenizer.to_str(pretty=True).encode()).hexdigest()

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the file spells it (BPE: 'Ġthe' for ' the'), or None."""
        return self.tokenizer.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token with that id as the file spells it, or None."""
        return self.tokenizer.id_to_token(token_id)

    def piece(self, token_id: int) -> str | bytes:
        """What the token stands for in a text; bytes where it is no whole number of characters.

        BPE: ' the' for the token 'Ġthe', and two bytes for the first two thirds of '中'. WordPiece
        and what is not of our kinds: the token as the file spells it ('##s').
        Raises ValueError for an id without a token.
        """
        token = self.tokenizer.id_to_token(token_id)
        if token is None:
            raise ValueError(f"no token has the id {token_id}")
        over_bytes = self.kind in ("byte", "bpe", "unigram") and token_id != self.eos_id
        if not over_bytes or not _BYTES.keys() >= set(token):
            return token
        data = bytes(_BYTES[letter] for letter in token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size})"

    def _unknown_character(self, text: str, start: int) -> ValueError:
        alphabet = self.tokenizer.get_vocab(with_added_tokens=False).keys() - {UNKNOWN}
        marks_hidden = text.replace(END_OF_TEXT, min(alphabet) * len(END_OF_TEXT))
        position, character = next(
            (i, character) for i, character in enumerate(marks_hidden) if character not in alphabet
        )
        return ValueError(
            f"the character {character!r} (U+{ord(character):04X}) at position "
            f"{start + position} is not "
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


_BYTES = _byte_vocab()


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="\n")


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


# --- training -------------------------------------------------------------------------------------


def _repeatable(tokenizer: tokenizers.Tokenizer) -> models.Unigram:
    """The trained Unigram model with what is random in it taken out: same text, same ids.

    The trainer adds up in an order that changes from run to run, so scores are rounded and ties
    stand in alphabetical order. Bytes that are no pieces of their own it puts below the least score
    s, at s + 0.0001 k in random order: they get s.
    """
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    lowest = min(score for _, score in vocab)
    band = lowest + 0.0001 * 256
    scores = {
        token: round(lowest if len(token) == 1 and score < band else score, 6)
        for token, score in vocab
    }
    return models.Unigram(sorted(scores.items(), key=lambda item: (-item[1], item[0])))


def _train_wordpiece(
    documents: list[str], known: Sequence[str], vocab_size: int, cased: bool
) -> dict[str, int]:
    """Token → id: the `known` ones first, then the pieces; vocab_size 0: the characters alone."""
    tokenizer = _bert({token: i for i, token in enumerate(BERT_TOKENS)}, cased)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(known), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer.get_vocab()


# --- WordPiece as BERT has it ---------------------------------------------------------------------

_CONFIG = "tokenizer_config.json"


def _bert(vocab: dict[str, int], cased: bool) -> tokenizers.Tokenizer:
    model = models.WordPiece(vocab, unk_token="[UNK]")
    tokenizer = _assemble(model, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece())
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens([t for t in (*BERT_TOKENS, END_OF_TEXT) if t in vocab])
    return tokenizer


def _is_berts_own(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether vocab.txt and `do_lower_case` say all about this WordPiece tokenizer."""
    model, normalizer = tokenizer.model, tokenizer.normalizer
    accents_as_case = normalizer.strip_accents in (None, normalizer.lowercase)
    return (
        (model.unk_token, model.continuing_subword_prefix) == ("[UNK]", "##")
        and (normalizer.clean_text and normalizer.handle_chinese_chars)
        and accents_as_case
    )


def _is_cased(vocab_file: Path) -> bool:
    """What the tokenizer_config.json beside it says; BERT's own default is to lower-case."""
    config = vocab_file.parent / _CONFIG
    if not config.is_file():
        return False
    try:
        settings = json.loads(files.decode(config.read_bytes(), f"'{config}'"))
    except json.JSONDecodeError as error:
        raise ValueError(f"'{config}' is not JSON: {error}") from error
    lower = settings.get("do_lower_case", True) if isinstance(settings, dict) else None
    if not isinstance(lower, bool):
        raise ValueError(f"'{config}' must have true or false in 'do_lower_case'")
    return not lower


# --- long texts -----------------------------------------------------------------------------------

_PIECE = 1 << 14  # characters
_BATCH = 32  # long pieces encoded at a time: an Encoding is a hundred times larger than its ids


def _pieces(text: str) -> Iterator[str]:
    """Pieces of 16K characters or a little more, cut where their ids are those of the whole."""
    start = 0
    while len(text) - start > _PIECE and (seam := files.SEAM.search(text, start + _PIECE)):
        yield text[start : seam.start()]
        start = seam.start()
    yield text[start:]


def _batches(pieces: Sequence[str]) -> Iterator[Sequence[str]]:
    """As many pieces as make 32 long ones."""
    start = characters = 0
    for i, piece in enumerate(pieces):
        characters += len(piece)
        if characters >= _BATCH * _PIECE:
            yield pieces[start : i + 1]
            start, characters = i + 1, 0
    if start < len(pieces):
        yield pieces[start:]


def _kind(tokenizer: tokenizers.Tokenizer) -> Kind:
    """Which of ours it is; 'other' for all that we cannot promise to encode in pieces."""
    added = tokenizer.get_added_tokens_decoder().values()
    if isinstance(tokenizer.model, models.WordPiece):
        return "wordpiece" if _is_bert(tokenizer) and all(map(_stands_alone, added)) else "other"
    if tokenizer.normalizer is not None or not all(map(_is_mark, added)):
        return "other"
    model, words = tokenizer.model, tokenizer.pre_tokenizer
    if words is None and isinstance(model, models.BPE):
        vocab = tokenizer.get_vocab(with_added_tokens=False)
        letters = all(len(token) == 1 for token in vocab if token != UNKNOWN)
        return "char" if letters and model.unk_token == UNKNOWN else "other"
    if not isinstance(words, pre_tokenizers.ByteLevel) or words.add_prefix_space:
        return "other"
    return _kind_over_bytes(tokenizer, words.use_regex)


def _kind_over_bytes(tokenizer: tokenizers.Tokenizer, cuts_words: bool) -> Kind:
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    if isinstance(tokenizer.model, models.BPE):
        if cuts_words:
            return "bpe"
        return "byte" if vocab == _byte_vocab() else "other"
    whole = isinstance(tokenizer.model, models.Unigram) and vocab.keys() >= _BYTES.keys()
    return "unigram" if whole and cuts_words else "other"


def _is_bert(tokenizer: tokenizers.Tokenizer) -> bool:
    return isinstance(tokenizer.normalizer, normalizers.BertNormalizer) and isinstance(
        tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer
    )


def _is_mark(token: tokenizers.AddedToken) -> bool:
    """True for `<|endoftext|>` that takes no blanks with it and needs none around it."""
    return token.content == END_OF_TEXT and _stands_alone(token)


def _stands_alone(token: tokenizers.AddedToken) -> bool:
    """True for a token without blanks, whatever is around it."""
    blank = re.search(r"\s", token.content)
    return not (blank or token.lstrip or token.rstrip or token.single_word)
