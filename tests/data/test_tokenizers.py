"""Tokenizers: every text comes back to the letter, here and in the `tokenizers` library."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers as library
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors

from tinygrad_llm.data import END_OF_TEXT
from tinygrad_llm.data import tokenizers as module
from tinygrad_llm.data.tokenizers import Tokenizer

TEXT = (
    "The quick brown fox jumps over the lazy dog. The dog's not amused; the fox isn't either.\n"
    "\tif x == 0:\r\n        return  'naïve café'\n\n\n中文 字符 🎉 👨‍👩‍👧 e\u0301\0"
) * 3

BYTE = Tokenizer.byte()
CHAR = Tokenizer.char(TEXT)
BPE = Tokenizer.bpe(TEXT, 300)
UNIGRAM = Tokenizer.unigram(TEXT, 300)
UNCASED = Tokenizer.wordpiece(TEXT, 150)
CASED = Tokenizer.wordpiece(TEXT, 150, cased=True)
OURS = {"byte": BYTE, "char": CHAR, "bpe": BPE, "unigram": UNIGRAM}

# Texts of any characters, and texts dense in what tokenizers trip over.
BLANKS = [" ", "\n", "\t", "\r\n", "\x1c", "\x85", "\u00a0", "\u2028", "\u200b", "\u3000"]
LETTERS = ["a", "The", "'s", "'", "0", "_", "é", "e\u0301", "\u0301", "中", "🎉", "👨‍👩‍👧", "Ġ"]
MARKS = ["<", END_OF_TEXT, "<|endof", "text|>", "<unk>", "\0", "\ufeff", "\ufffd", "\U0010ffff"]
TRICKY = st.lists(st.sampled_from([*BLANKS, *LETTERS, *MARKS]), max_size=40).map("".join)
ANY = st.text(st.characters(exclude_categories=["Cs"])) | TRICKY
OF_ALPHABET = st.lists(st.sampled_from([*sorted(set(TEXT)), END_OF_TEXT])).map("".join)


# --- round trips ----------------------------------------------------------------------------------


@given(ANY)
@example("")
@example("\0")
@example("\r\n\r\n")
@example(" leading, trailing ")
def test_kinds_over_bytes_give_every_text_back(text: str):
    for tokenizer in (BYTE, BPE, UNIGRAM):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64
        assert ids.ndim == 1
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids.tolist()) == text


@given(OF_ALPHABET)
@example("")
def test_char_gives_every_text_of_its_alphabet_back(text: str):
    assert CHAR.decode(CHAR.encode(text)) == text


@pytest.mark.parametrize("kind", OURS)
def test_saved_file_means_the_same_to_the_library_and_to_us(kind: str, tmp_path: Path):
    ours = OURS[kind]
    file = ours.save(tmp_path / "new" / "folder")
    assert file == tmp_path / "new" / "folder" / "tokenizer.json"
    theirs = library.Tokenizer.from_file(str(file))
    again = Tokenizer.from_file(file)
    assert (again.kind, again.vocab_size, again.eos_id) == (kind, ours.vocab_size, ours.eos_id)
    assert again.save(tmp_path / "twice").read_bytes() == file.read_bytes()

    @given(OF_ALPHABET if kind == "char" else ANY)
    def check(text: str):
        ids = ours.encode(text).tolist()
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text
        assert again.encode(text).tolist() == ids
        assert again.decode(ids) == text

    check()


@pytest.mark.parametrize("kind", [*OURS, "cased", "uncased"])
@pytest.mark.parametrize("piece", [1, 2, 7])
def test_a_text_encoded_in_pieces_has_the_ids_of_the_whole(
    kind: str, piece: int, monkeypatch: pytest.MonkeyPatch
):
    ours = {**OURS, "cased": CASED, "uncased": UNCASED}[kind]
    monkeypatch.setattr(module, "_PIECE", piece)
    monkeypatch.setattr(module, "_BATCH", 3)
    blanks = "a  b\n\n c \n The\n"
    assert len(list(module._pieces(blanks))) > 1

    @given(OF_ALPHABET if kind == "char" else TRICKY)
    @example(blanks)
    def check(text: str):
        assert "".join(module._pieces(text)) == text
        whole = ours.tokenizer.encode(text, add_special_tokens=False).ids
        assert ours.encode(text).tolist() == whole

    check()


# --- what the ids are -----------------------------------------------------------------------------


@given(ANY)
def test_byte_ids_are_the_bytes(text: str):
    expected: list[int] = []
    for document in text.split(END_OF_TEXT):
        expected += [*document.encode(), BYTE.eos_id or -1]
    assert BYTE.encode(text).tolist() == expected[:-1]
    assert (BYTE.vocab_size, BYTE.eos_id, BYTE.kind) == (257, 256, "byte")


def test_char_ids_are_places_in_the_sorted_alphabet():
    tokenizer = Tokenizer.char("hello\n<|endoftext|>world")
    alphabet = "\ndehlorw"
    assert tokenizer.encode("world<|endoftext|>").tolist() == [*map(alphabet.index, "world"), 9]
    assert tokenizer.token_to_id("<unk>") == 8
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.kind) == (10, 9, "char")
    assert tokenizer.id_to_token(7) == "w"
    assert tokenizer.id_to_token(10) is None


def test_bpe_merges_the_frequent_and_fills_the_vocabulary():
    tokenizer = Tokenizer.bpe("low lower lowest low low lower newest newest widest" * 5, 270)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.kind) == (270, 269, "bpe")
    assert len(tokenizer.encode(" low")) < len(" low")
    assert tokenizer.token_to_id("Ġlow") is not None
    assert tokenizer.decode([269]) == END_OF_TEXT
    assert tokenizer.decode([269], skip_special_tokens=True) == ""


def test_bpe_is_the_same_from_a_string_and_from_its_documents_and_every_time():
    documents = [TEXT, "another document", "", "and a third " * 5]
    first = Tokenizer.bpe(documents, 320).tokenizer.to_str()
    assert Tokenizer.bpe(iter(documents), 320).tokenizer.to_str() == first
    assert Tokenizer.bpe(END_OF_TEXT.join(documents), 320).tokenizer.to_str() == first


def test_bpe_never_spells_the_mark():
    tokenizer = Tokenizer.bpe(END_OF_TEXT.join("abc" * 50), 400)
    vocabulary = tokenizer.tokenizer.get_vocab(with_added_tokens=False)
    assert not any("endo" in token or "<|" in token for token in vocabulary)
    assert tokenizer.encode(f"a{END_OF_TEXT}b").tolist()[1] == tokenizer.eos_id


def test_bpe_of_a_short_text_has_fewer_ids_and_the_mark_is_still_last():
    tokenizer = Tokenizer.bpe("abab", 5000)
    assert 257 < tokenizer.vocab_size < 270
    assert tokenizer.eos_id == tokenizer.vocab_size - 1
    assert tokenizer.decode(tokenizer.encode("xyz")) == "xyz"


def test_half_a_character_decodes_to_the_replacement_character():
    ids = BYTE.encode("中")
    assert BYTE.decode(ids[:2]) == "\ufffd"


# --- Unigram --------------------------------------------------------------------------------------


def test_unigram_cuts_into_the_likeliest_pieces():
    text = (
        "The quick brown fox jumps over the lazy dog. A quicker fox, a lazier dog, a brownish "
        "jumper; quick jumping over a lazily sleeping dog amuses the brown foxes.\n"
    )
    tokenizer = Tokenizer.unigram(text * 5, 330)
    spec = json.loads(tokenizer.tokenizer.to_str())["model"]
    scores = [score for _, score in spec["vocab"]]
    assert scores == sorted(scores, reverse=True)
    assert (tokenizer.kind, tokenizer.eos_id) == ("unigram", tokenizer.vocab_size - 1)
    assert len(tokenizer.encode("The quick brown fox")) < 10
    score = dict(spec["vocab"])

    def best(word: str) -> float:
        """The largest Σ log p over all cuts of the word."""
        sums = [0.0]
        for end in range(1, len(word) + 1):
            cuts = [sums[i] + score[word[i:end]] for i in range(end) if word[i:end] in score]
            sums.append(max(cuts))
        return sums[-1]

    for word in ("Ġlazy", "Ġbrown", "quick", "jumpy", "Ġfoxiness"):
        ids = tokenizer.encode(word.replace("Ġ", " "))
        assert sum(scores[i] for i in ids) == pytest.approx(best(word))


def test_unigram_learns_chinese_and_emoji_and_gives_them_back():
    text = "今天天气很好。🎉 明天天气也很好！👨‍👩‍👧\n" * 20
    tokenizer = Tokenizer.unigram(text, 400)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    pieces = [tokenizer.piece(i) for i in tokenizer.encode(text).tolist()]
    assert any(isinstance(piece, str) and "天气" in piece for piece in pieces)
    unseen = "昨天 下雨 🌧️▁"
    assert tokenizer.decode(tokenizer.encode(unseen)) == unseen


def test_unigram_is_the_same_every_time_and_never_spells_the_mark():
    documents = [TEXT, "another document", "", "and a third " * 5]
    first = Tokenizer.unigram(documents, 290).tokenizer.to_str()
    for _ in range(3):
        assert Tokenizer.unigram(END_OF_TEXT.join(documents), 290).tokenizer.to_str() == first
    vocabulary = Tokenizer.unigram(END_OF_TEXT.join("abc" * 50), 400).tokenizer.get_vocab(False)
    assert not any("endo" in token or "<|" in token for token in vocabulary)


@pytest.mark.parametrize("text", [" ", "a", "abab", "中" * 50, TEXT])
@pytest.mark.parametrize("vocab_size", [258, 259, 300, 5000])
def test_unigram_never_has_more_ids_than_asked(text: str, vocab_size: int):
    tokenizer = Tokenizer.unigram(text, vocab_size)
    assert 257 <= tokenizer.vocab_size <= vocab_size
    assert tokenizer.decode(tokenizer.encode("xyz 🎉")) == "xyz 🎉"


def test_unigram_needs_a_text_and_room_for_the_bytes():
    for text in ("", END_OF_TEXT, []):
        with pytest.raises(ValueError, match="made from a text, got an empty one"):
            Tokenizer.unigram(text, 300)
    with pytest.raises(ValueError, match=r"vocab_size must be at least 258 .* got 257"):
        Tokenizer.unigram("abcabc", 257)


# --- WordPiece ------------------------------------------------------------------------------------


def test_wordpiece_has_berts_layout():
    tokenizer = Tokenizer.wordpiece("unaffable un unun able able " * 9, 40)
    assert [tokenizer.id_to_token(i) for i in range(5)] == [*module.BERT_TOKENS]
    assert (tokenizer.kind, tokenizer.eos_id) == ("wordpiece", tokenizer.vocab_size - 1)
    tokens = [tokenizer.id_to_token(i) or "" for i in tokenizer.encode("un ununable")]
    assert tokens[0] == "un"
    assert "".join(tokens[1:]).replace("##", "") == "ununable"
    assert tokenizer.decode(tokenizer.encode("un able")) == "un able"
    framed = tokenizer.tokenizer.encode("un", "able").tokens
    assert framed == ["[CLS]", "un", "[SEP]", "able", "[SEP]"]


@pytest.mark.parametrize("cased", [False, True])
def test_wordpiece_normalises_as_bert(cased: bool):
    tokenizer = CASED if cased else UNCASED

    def tokens(text: str) -> list[str | None]:
        return [tokenizer.id_to_token(i) for i in tokenizer.encode(text)]

    assert (tokens("the") == tokens("The")) is not cased
    assert (tokens("naive cafe") == tokens("naïve café")) is not cased
    assert tokens("中文") == ["中", "文"]
    assert tokens("the\t\0\n dog") == tokens("the dog")
    assert tokens(f"a[MASK]{END_OF_TEXT} ☃") == ["a", "[MASK]", END_OF_TEXT, "[UNK]"]


def test_wordpiece_is_the_same_every_time():
    first = Tokenizer.wordpiece([TEXT, "and a third " * 5], 140).tokenizer.to_str()
    for _ in range(4):
        again = Tokenizer.wordpiece(f"{TEXT}{END_OF_TEXT}{'and a third ' * 5}", 140)
        assert again.tokenizer.to_str() == first


def test_wordpiece_has_the_size_asked_for_or_says_the_least():
    text = "low lower lowest newest widest " * 5
    with pytest.raises(ValueError, match="vocab_size must be at least") as info:
        Tokenizer.wordpiece(text, 5)
    least = int(re.findall(r"at least (\d+)", str(info.value))[0])
    assert Tokenizer.wordpiece(text, least).vocab_size == least
    assert Tokenizer.wordpiece(text, least + 3).vocab_size == least + 3
    assert least < Tokenizer.wordpiece(text, 5000).vocab_size < 100
    with pytest.raises(ValueError, match=f"must be at least {least} "):
        Tokenizer.wordpiece(text, least - 1)


@pytest.mark.parametrize("text", ["", " \n", END_OF_TEXT])
def test_wordpiece_needs_a_character(text: str):
    with pytest.raises(ValueError, match="made from a text, got an empty one"):
        Tokenizer.wordpiece(text, 100)


@pytest.mark.parametrize("cased", [False, True])
def test_wordpiece_from_its_files(cased: bool, tmp_path: Path):
    ours = CASED if cased else UNCASED
    file = ours.save(tmp_path)
    theirs = library.Tokenizer.from_file(str(file))
    lines = (tmp_path / "vocab.txt").read_text(encoding="utf-8").split("\n")
    assert lines == [*map(ours.id_to_token, range(ours.vocab_size)), ""]
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("vocab.txt", "tokenizer_config.json"):
        (alone / name).write_bytes((tmp_path / name).read_bytes())
    for again in (
        Tokenizer.from_file(tmp_path),
        Tokenizer.from_file(alone),
        Tokenizer.from_file(tmp_path / "vocab.txt"),
        Tokenizer.from_vocab(alone / "vocab.txt", cased=cased),
    ):
        assert (again.kind, again.eos_id) == ("wordpiece", ours.eos_id)
        text = f"{TEXT}[SEP]{END_OF_TEXT}[MASK] ☃ Ünïcode"
        assert again.encode(text).tolist() == ours.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text).tolist()
    assert again.tokenizer.to_str() == ours.tokenizer.to_str()


@pytest.mark.parametrize("cased", [False, True])
def test_wordpiece_is_read_by_the_librarys_own_bert(cased: bool, tmp_path: Path):
    ours = CASED if cased else UNCASED
    ours.save(tmp_path)
    theirs = library.BertWordPieceTokenizer(str(tmp_path / "vocab.txt"), lowercase=not cased)

    @given(TRICKY.filter(lambda text: END_OF_TEXT not in text))
    @example(TEXT)
    def check(text: str):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text).tolist()

    check()


def test_vocabulary_of_berts_own(tmp_path: Path):
    tokens = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s"]
    file = tmp_path / "vocab.txt"
    file.write_text("\r\n".join(tokens), newline="")
    tokenizer = Tokenizer.from_file(tmp_path)
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id) == ("wordpiece", 9, None)
    assert tokenizer.encode("Hello worlds [MASK] moon").tolist() == [6, 7, 8, 5, 2]
    assert Tokenizer.from_vocab(file, cased=True).encode("Hello").tolist() == [2]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[UNK]\n[CLS]\n[SEP]\na\na\n", r"the token 'a' twice, in lines 4 and 5"),
        ("[CLS]\n[SEP]\n", r"it has no line '\[UNK\]'"),
        ("", r"it has no line '\[UNK\]'"),
        ("[UNK]\n\xff", r"not UTF-8 text \(byte 0xff at position 6\)"),
    ],
)
def test_vocabulary_that_is_none(content: str, sentence: str, tmp_path: Path):
    file = tmp_path / "vocab.txt"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=sentence) as info:
        Tokenizer.from_vocab(file)
    assert str(file) in str(info.value)


@pytest.mark.parametrize("config", ["{", "[]", '{"do_lower_case": "no"}'])
def test_vocabulary_with_a_config_that_cannot_be_read(config: str, tmp_path: Path):
    UNCASED.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json' (is not JSON|must have true or)"
    ):
        Tokenizer.from_vocab(tmp_path / "vocab.txt")
    with pytest.raises(FileNotFoundError, match=r"no vocabulary at .*none'"):
        Tokenizer.from_vocab(tmp_path / "none")


@pytest.mark.parametrize("option", ["clean_text", "handle_chinese_chars", "strip_accents"])
def test_vocab_txt_is_not_written_where_it_would_say_less(option: str, tmp_path: Path):
    other = library.Tokenizer.from_str(UNCASED.tokenizer.to_str())
    other.normalizer = normalizers.BertNormalizer(**{option: False})  # pyright: ignore[reportAttributeAccessIssue]
    Tokenizer(other).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


# --- pieces ---------------------------------------------------------------------------------------


@given(TRICKY)
def test_pieces_over_bytes_join_to_the_text(text: str):
    for tokenizer in (BYTE, BPE, UNIGRAM):
        pieces = [tokenizer.piece(i) for i in tokenizer.encode(text).tolist()]
        data = b"".join(p if isinstance(p, bytes) else p.encode() for p in pieces)
        assert data.decode() == text


def test_a_piece_is_bytes_only_within_a_character():
    assert [BYTE.piece(i) for i in BYTE.encode("a 中").tolist()] == [
        "a",
        " ",
        b"\xe4",
        b"\xb8",
        b"\xad",
    ]
    assert UNCASED.piece(4) == "[MASK]"
    with pytest.raises(ValueError, match="no token has the id 257"):
        BYTE.piece(257)


# --- what is refused ------------------------------------------------------------------------------


def test_unknown_character_is_named_with_its_place():
    tokenizer = Tokenizer.char("abc")
    with pytest.raises(ValueError, match=r"'€' \(U\+20AC\) at position 15 is not among the 3"):
        tokenizer.encode(f"ab{END_OF_TEXT}€|")
    ids = tokenizer.encode("a€€b", allow_unknown=True)
    assert ids.tolist() == [0, 3, 3, 1]
    assert tokenizer.decode(ids) == "a<unk><unk>b"
    # '<unk>' written out in a text is five characters, not the unknown one
    with pytest.raises(ValueError, match=r"'<' \(U\+003C\) at position 1"):
        tokenizer.encode("a<unk>")


@pytest.mark.parametrize("kind", OURS)
def test_lone_surrogates_are_refused(kind: str):
    with pytest.raises(ValueError, match=r"lone surrogate \(U\+D83D\) at position 2"):
        OURS[kind].encode("ab\ud83d")


@pytest.mark.parametrize(
    "make",
    [
        Tokenizer.char,
        lambda text: Tokenizer.bpe([text], 300),
        lambda text: Tokenizer.unigram([text], 300),
        lambda text: Tokenizer.wordpiece([text], 300),
    ],
)
def test_lone_surrogates_are_refused_in_training(make):
    with pytest.raises(ValueError, match="lone surrogate"):
        make("ab\udc00")


def test_what_is_not_a_text_is_refused():
    with pytest.raises(TypeError, match=r"expected a text \(str\), got bytes"):
        BYTE.encode(b"abc")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("text", ["", END_OF_TEXT])
def test_char_needs_a_character(text: str):
    with pytest.raises(ValueError, match="made from a text, got an empty one"):
        Tokenizer.char(text)


def test_bpe_needs_room_for_the_bytes():
    assert Tokenizer.bpe("abcabc", 257).vocab_size == 257
    with pytest.raises(ValueError, match=r"vocab_size must be at least 257 .* got 256"):
        Tokenizer.bpe("abcabc", 256)


@pytest.mark.parametrize("bad", [257, -1, 2**40])
def test_ids_outside_the_vocabulary_are_refused(bad: int):
    with pytest.raises(ValueError, match=f"token id {bad} is outside .* vocabulary of 257"):
        BYTE.decode([65, bad])


@pytest.mark.parametrize("bad", [[0.5], [[1, 2]], ["a"], 3])
def test_decode_wants_a_list_of_integers(bad):
    with pytest.raises(ValueError, match=r"decode\(\) takes a list of token ids, got"):
        BYTE.decode(bad)


def test_decode_of_nothing_is_the_empty_text():
    assert BYTE.decode([]) == ""
    assert BYTE.decode(np.empty(0, np.int64)) == ""


# --- files ----------------------------------------------------------------------------------------


def test_missing_file_gives_one_sentence(tmp_path: Path):
    for path in (tmp_path, tmp_path / "none", tmp_path / "tokenizer.json"):
        with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*tokenizer\.json"):
            Tokenizer.from_file(path)


def test_corrupt_file_gives_one_sentence(tmp_path: Path):
    file = BPE.save(tmp_path)
    whole = file.read_bytes()
    cuts = [whole[: len(whole) * i // 10] for i in range(10)]
    for content in [*cuts, b"{}", b"[]", b'{"model": null}', b"\xff\xfe", b"not JSON"]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"'{file}' is not a readable")) as info:
            Tokenizer.from_file(tmp_path)
        assert "\n" not in str(info.value)


def test_truncation_and_padding_in_a_file_do_not_touch_a_corpus(tmp_path: Path):
    theirs = library.Tokenizer.from_str(BYTE.tokenizer.to_str())
    theirs.enable_truncation(4)
    theirs.enable_padding(length=32)
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_file(tmp_path).encode("a longer text").tolist() == [*b"a longer text"]


def test_gpt2s_own_layout_is_recognised(tmp_path: Path):
    """GPT-2's file has the mark inside the vocabulary, a post-processor, a normalized token."""
    spec = json.loads(BPE.tokenizer.to_str())
    spec["post_processor"] = json.loads(processors.ByteLevel(trim_offsets=False).__getstate__())
    spec["model"]["vocab"][END_OF_TEXT] = BPE.eos_id
    spec["added_tokens"][0]["normalized"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.from_file(tmp_path)
    assert (tokenizer.kind, tokenizer.vocab_size) == ("bpe", BPE.vocab_size)
    text = f"{TEXT}{END_OF_TEXT}{TEXT}"
    assert tokenizer.encode(text).tolist() == BPE.encode(text).tolist()


def test_other_tokenizers_work_whole_and_without_their_frame(tmp_path: Path):
    vocab = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "hello": 3, "world": 4, "##s": 5}
    theirs = library.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    theirs.normalizer = normalizers.BertNormalizer()  # pyright: ignore[reportAttributeAccessIssue]
    theirs.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    theirs.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))  # pyright: ignore[reportAttributeAccessIssue]
    theirs.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path)
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id) == ("other", 6, None)
    assert tokenizer.encode("Hello worlds moon").tolist() == [3, 4, 5, 0]


def _with(part: str, value) -> library.Tokenizer:
    tokenizer = library.Tokenizer.from_str(BPE.tokenizer.to_str())
    setattr(tokenizer, part, value)
    return tokenizer


def _with_token(token: library.AddedToken) -> library.Tokenizer:
    tokenizer = library.Tokenizer.from_str(BPE.tokenizer.to_str())
    tokenizer.add_special_tokens([token])
    return tokenizer


def _unigram_of_some_bytes() -> library.Tokenizer:
    tokenizer = library.Tokenizer(models.Unigram([("?", -9.0), ("a", -1.0), ("Ġ", -2.0)], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _letters_alone() -> library.Tokenizer:
    vocab = {letter: i for i, letter in enumerate("a foxthe\n")}
    return library.Tokenizer(models.BPE(vocab=vocab, merges=[]))


@pytest.mark.parametrize(
    "tokenizer",
    [
        _with("normalizer", normalizers.NFC()),
        _with("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        _with("pre_tokenizer", pre_tokenizers.Whitespace()),
        _with("pre_tokenizer", None),
        _with("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        _with_token(library.AddedToken("<pad>", lstrip=True)),
        _with_token(library.AddedToken(" \n ")),
        _with_token(library.AddedToken(END_OF_TEXT, lstrip=True)),
        _with_token(library.AddedToken(END_OF_TEXT, rstrip=True)),
        _letters_alone(),
        _unigram_of_some_bytes(),
    ],
    ids=str,
)
def test_what_may_not_be_cut_is_not_cut(tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_PIECE", 4)
    ours = Tokenizer(tokenizer)
    text = f"a \n the fox <pad> isn't \n {END_OF_TEXT} \n a fox" * 3
    assert ours.kind == "other"
    assert ours.encode(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_repr_says_which_one():
    assert repr(BYTE) == "Tokenizer(kind='byte', vocab_size=257)"
