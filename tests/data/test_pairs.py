"""Sentence pairs: real neighbours or real strangers, nothing cut, no way to tell but by reading."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm.backend import RandomStream
from tinygrad_llm.data import END_OF_TEXT
from tinygrad_llm.data.corpora import Corpus
from tinygrad_llm.data.pairs import (
    SentencePairs,
    Sentences,
    longest_sentence,
    sentences_of,
    split_sentences,
)
from tinygrad_llm.data.tokenizers import BERT_TOKENS, Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = Tokenizer.wordpiece([f"{a}{b} . !" for a in LETTERS for b in LETTERS], 740)
PAD, CLS, SEP = (BERT_TOKENS.index(token) for token in ("[PAD]", "[CLS]", "[SEP]"))


# --- sentences ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("He said (e.g. this) no. Yes", ["He said (e.g. this) no.", "Yes"]),
        ("Version 3.14 is. out", ["Version 3.14 is. out"]),
        ('"Stop." Then (it did.) And', ['"Stop."', "Then (it did.)", "And"]),
        ("A title\n\nA text\nof lines.\n \nEnd", ["A title", "A text\nof lines.", "End"]),
        ("一句话。第二句！三", ["一句话。", "第二句！", "三"]),
        (" \n\n ", []),
        ("", []),
    ],
)
def test_sentences_of_a_text(text, expected):
    assert split_sentences(text) == expected


@given(st.text(alphabet="aB.!? \n。\"')", max_size=60))
def test_law_no_character_is_lost_at_a_seam(text):
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


def test_sentences_and_documents_as_tokens():
    documents = ["Ab cd. Ef.", "  ", "Gh ij kl mn op.", "Qr! St uv. Wx", "yz"]
    found = sentences_of(Corpus("it", documents), WORDS, longest=4)
    texts = [WORDS.decode(found.tokens(i, i + 1)) for i in range(len(found))]
    assert [t.replace(" ", "") for t in texts] == [
        *("abcd.", "ef."),
        *("ghijkl", "mnop."),  # 6 tokens in two pieces
        *("qr!", "stuv.", "wx"),
        "yz",
    ]
    assert found.divided == 1
    assert found.documents.tolist() == [0, 2, 4, 7, 8]  # the blank one is left out
    assert found.ids.dtype == np.uint16


@given(st.integers(1, 40), st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_law_every_token_is_in_one_sentence(longest, counts):
    documents = [
        " ".join(f"{LETTERS[i]}{LETTERS[j]} cd. X" for j in range(n)) for i, n in enumerate(counts)
    ]
    found = sentences_of(Corpus("it", documents), WORDS, longest)
    expected = [i for d in documents for i in WORDS.encode(d)]
    assert found.ids.tolist() == expected
    lengths = np.diff(found.starts)
    assert (lengths > 0).all()
    assert lengths.max(initial=0) <= longest
    assert found.starts[-1] == len(expected)
    assert found.documents[-1] == len(found)
    assert (np.diff(found.documents) > 0).all()


def test_large_texts_come_in_groups(monkeypatch):
    documents = [f"Ab {LETTERS[i]}{LETTERS[i]}. Cd ef. Gh." for i in range(26)]
    whole = sentences_of(Corpus("it", documents), WORDS, 20)
    monkeypatch.setattr("tinygrad_llm.data.pairs._GROUP", 30)
    parts = sentences_of(Corpus("it", documents), WORDS, 20)
    for a, b in ((whole.ids, parts.ids), (whole.starts, parts.starts)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(whole.documents, parts.documents)


# --- pairs ----------------------------------------------------------------------------------------


def numbered(counts, length=3, seed=0):
    """Sentences whose tokens tell where they are: id = 100 + 3 s, + 1 … (no marks among them)."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, length + 1, sum(counts))
    ids = [100 + 20 * s + i for s, n in enumerate(lengths) for i in range(n)]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Sentences(np.array(ids, np.uint16), starts, np.concatenate([[0], np.cumsum(counts)]))


def parts(batch, row):
    """(first, second) of a row as ids, checked for its marks."""
    ids = batch.input_ids[row][batch.attention_mask[row] == 1]
    segments = batch.token_type_ids[row][batch.attention_mask[row] == 1]
    assert ids[0] == CLS
    ends = np.flatnonzero(ids == SEP)
    assert len(ends) == 2
    assert ends[1] == len(ids) - 1
    np.testing.assert_array_equal(segments, np.arange(len(ids)) > ends[0])
    rest = batch.input_ids[row][batch.attention_mask[row] == 0]
    assert (rest == PAD).all()
    return ids[1 : ends[0]], ids[ends[0] + 1 : -1]


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=6).filter(lambda c: sum(n > 1 for n in c) > 1),
    st.integers(9, 40),
    st.floats(0, 1),
    st.integers(0, 2**32),
)
def test_law_of_pairs(counts, context, short, seed):
    sentences = numbered(counts, seed=seed)
    pairs = SentencePairs(sentences, WORDS, PAD, context, short)
    batch = pairs.draw(8, RandomStream(seed))
    assert batch.input_ids.shape[1] <= context
    assert batch.attention_mask.sum(axis=1).max() == batch.input_ids.shape[1]
    owner = np.repeat(np.arange(len(counts)), counts)
    for row, label in enumerate(batch.next_sentence_label):
        first, second = parts(batch, row)
        spans = []
        for text in (first, second):  # whole sentences, side by side, of one document
            numbers = (text - 100) // 20
            low, high = numbers[0], numbers[-1]
            np.testing.assert_array_equal(sentences.tokens(low, high + 1), text)
            assert owner[low] == owner[high]
            spans.append((low, high))
        assert (owner[spans[0][0]] != owner[spans[1][0]]) == label
        assert (
            spans[1][0] == spans[0][1] + 1 and owner[spans[0][0]] == owner[spans[1][0]]
        ) != label
        assert spans[1][0] not in sentences.documents  # never the beginning of a document


def test_half_of_them_follow_and_every_gap_has_its_turn():
    counts = [2, 7, 3, 12]
    pairs = SentencePairs(numbered(counts), WORDS, PAD, 40)
    assert pairs.gaps == sum(counts) - len(counts)
    batch = pairs.draw(4000, RandomStream(5))
    assert batch.next_sentence_label.mean() == pytest.approx(0.5, abs=0.03)
    begins = {0: [], 1: []}
    for row, label in enumerate(batch.next_sentence_label):
        begins[int(label)].append(int((parts(batch, row)[1][0] - 100) // 20))
    assert len(set(begins[0])) == len(set(begins[1])) == pairs.gaps
    for label in (0, 1):  # no gap is far from its share of 1/20 in either kind
        share = np.bincount(begins[label])[np.unique(begins[label])] / len(begins[label])
        assert share.min() > 0.02
        assert share.max() < 0.1


def test_lengths_tell_nothing_of_the_label():
    pairs = SentencePairs(numbered([30] * 8), WORDS, PAD, 40)
    batch = pairs.draw(3000, RandomStream(6))
    lengths = [[len(text) for text in parts(batch, row)] for row in range(3000)]
    for part in (0, 1):
        by_label = [
            np.mean(
                [n[part] for n, x in zip(lengths, batch.next_sentence_label, strict=True) if x == i]
            )
            for i in (0, 1)
        ]
        assert by_label[0] == pytest.approx(by_label[1], abs=0.6)


def test_pairs_fill_the_context_and_some_are_short():
    sentences = numbered([60] * 4)
    full = SentencePairs(sentences, WORDS, PAD, 64, 0.0).draw(300, RandomStream(1))
    lengths = full.attention_mask.sum(axis=1)
    assert np.median(lengths) >= 60
    short = SentencePairs(sentences, WORDS, PAD, 64, 1.0).draw(300, RandomStream(1))
    assert np.median(short.attention_mask.sum(axis=1)) < 50


def test_the_same_stream_gives_the_same_pairs_and_goes_on():
    pairs, stream = SentencePairs(numbered([9, 9, 9]), WORDS, PAD, 30), RandomStream(2)
    pairs.draw(5, stream)
    state = stream.state()
    one = pairs.draw(5, stream)
    stream.load_state(state)
    for a, b in zip(one, pairs.draw(5, stream), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_pair_of_a_real_text_is_cut():
    documents = [
        f"{a}{b} cd ef gh ij kl mn op qr st uv wx. Short one. " * 3 for a in "abc" for b in LETTERS
    ]
    tokenizer = WORDS
    longest = longest_sentence(tokenizer, 16)
    assert longest == 6
    sentences = sentences_of(Corpus("it", documents), tokenizer, longest)
    assert sentences.divided >= len(documents)
    batch = SentencePairs(sentences, tokenizer, PAD, 16).draw(500, RandomStream(1))
    assert batch.input_ids.shape[1] <= 16
    assert END_OF_TEXT not in WORDS.decode(batch.input_ids[0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SentencePairs(numbered([5]), WORDS, PAD, 30), "two documents of two sentences"),
        (lambda: SentencePairs(numbered([5, 1, 1]), WORDS, PAD, 30), "1 of them with two sent"),
        (lambda: SentencePairs(numbered([]), WORDS, PAD, 30), "got 0 documents"),
        (lambda: SentencePairs(numbered([5, 5], 9), WORDS, PAD, 12), "do not fit into a context"),
        (lambda: SentencePairs(numbered([5, 5]), WORDS, PAD, 30, 1.5), "short_probability"),
        (lambda: longest_sentence(WORDS, 4), "a context of 4 has no room.*make it 5"),
        (lambda: longest_sentence(Tokenizer.byte(), 64), r"puts no \[CLS\] and \[SEP\]"),
        (lambda: sentences_of(Corpus("x", ["a"]), WORDS, 0), "longest must be at least 1"),
    ],
)
def test_what_makes_no_pairs(make, words):
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
