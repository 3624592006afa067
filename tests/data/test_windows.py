"""Windows: every word is scored exactly once, in order, where most is seen around it."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from tinygrad_llm.data.loader import IGNORE_INDEX
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.data.windows import (
    Marks,
    TextWindows,
    WordWindows,
    longest_first,
    pad,
    pad_labels,
    scored_words,
    word_spans,
)

TEXT = "alex visited neuschwanstein in the rain and went on to los angeles . , 0 1 2 3 4 5"


@pytest.fixture(scope="module")
def bert() -> Tokenizer:
    """WordPiece with [CLS] and [SEP]."""
    return Tokenizer.wordpiece([TEXT] * 3, 80)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """No marks around a text, no unknown token."""
    return Tokenizer.bpe([TEXT] * 3, 300)


def tokens(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> list[str | None]:
    return [tokenizer.id_to_token(int(i)) for i in ids]


# --- words ----------------------------------------------------------------------------------------


def test_the_label_stands_on_the_first_piece(bert: Tokenizer):
    words = ["alex", "visited", "neuschwanstein"]
    (window,) = WordWindows(bert, [words], max_length=64).windows
    labels = window.labels(np.array([7, 8, 9]))
    assert window.ids[0] == bert.token_to_id("[CLS]")
    assert window.ids[-1] == bert.token_to_id("[SEP]")
    assert labels[[0, -1]].tolist() == [IGNORE_INDEX] * 2
    assert labels[labels != IGNORE_INDEX].tolist() == [7, 8, 9]
    for word, place in zip(words, window.first, strict=True):
        assert word.startswith(bert.id_to_token(int(window.ids[place])) or "nothing")
    inside = set(range(1, len(window.ids) - 1)) - set(window.first.tolist())
    assert inside  # some word has several pieces
    assert all((bert.id_to_token(int(window.ids[i])) or "").startswith("##") for i in inside)


def test_ids_are_those_of_the_text(bpe: Tokenizer):
    windows = WordWindows(bpe, [TEXT.split()], max_length=500).windows
    assert windows[0].ids.tolist() == bpe.encode(TEXT).tolist()
    assert windows[0].words == windows[0].scored == range(len(TEXT.split()))


def test_words_that_vanish_are_read_as_unknown_and_counted(bert: Tokenizer):
    windows = WordWindows(bert, [["in", "\u200b", "rain", "\ufffd"], ["Ω", "in"]], max_length=64)
    first, second = windows.windows
    unknown = bert.token_to_id("[UNK]")
    assert [first.ids[i] for i in first.first][1::2] == [unknown, unknown]
    assert second.ids[1] == unknown
    assert windows.vanished == 2
    assert windows.notes == [
        "2 of 6 words vanish in the tokenizer and are read as unknown",
        "1 of 6 words have a piece that the tokenizer lacks",
    ]


def test_a_word_that_vanishes_without_an_unknown_token_is_refused(bpe: Tokenizer):
    with pytest.raises(ValueError, match="no unknown token"):
        WordWindows(bpe, [[""]], max_length=8)


def test_sentences_of_zero_length_have_no_window_and_are_counted(bert: Tokenizer):
    windows = WordWindows(bert, [[], ["in"], []], max_length=8)
    assert [window.example for window in windows.windows] == [1]
    assert windows.merge([["B-X"]]) == [[], ["B-X"], []]
    assert windows.notes == ["2 sentences of zero length: nothing to read there"]


def test_a_word_longer_than_a_window_is_cut_counted_and_keeps_its_label(bert: Tokenizer):
    windows = WordWindows(bert, [["in", "neuschwanstein" * 3, "rain"]], max_length=6)
    assert windows.cut == 1
    assert windows.cut_pieces > 0
    assert "cut off their ends, their labels kept" in windows.notes[0]
    assert windows.merge([list(window.scored) for window in windows.windows]) == [[0, 1, 2]]
    assert all(len(window.ids) <= 6 for window in windows.windows)


def test_bad_lengths(bert: Tokenizer):
    with pytest.raises(ValueError, match="max_length 2 has no room for 1 piece beside the 2 marks"):
        WordWindows(bert, [["in"]], max_length=2)
    for stride in (0, 7):
        with pytest.raises(ValueError, match="stride must be from 1 to 6"):
            WordWindows(bert, [["in"]], max_length=8, stride=stride)


def test_merge_refuses_what_does_not_belong(bert: Tokenizer):
    windows = WordWindows(bert, [["in", "the"]], max_length=8)
    with pytest.raises(ValueError, match="expected 1 windows of values, got 2"):
        windows.merge([[1, 2], [3]])
    with pytest.raises(ValueError, match="expected 2 values, one for each word"):
        windows.merge([[1]])


LENGTHS = st.lists(st.integers(1, 5), max_size=40)


@given(LENGTHS, st.integers(5, 12), st.data())
def test_every_word_is_scored_once_in_order_where_it_has_most_context(
    lengths: list[int], room: int, data: st.DataObject
):
    stride = data.draw(st.integers(1, room))
    begins = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    spans = list(word_spans(begins, room, stride))
    scored = scored_words(begins, spans)
    assert [word for words in scored for word in words] == list(range(len(lengths)))
    for words in spans:
        assert begins[words.stop] - begins[words.start] <= room
    chosen = {word: k for k, words in enumerate(scored) for word in words}
    for word, k in chosen.items():
        contexts = [_context(begins, words, word) for words in spans]
        assert contexts[k] == max(contexts)
        assert contexts.index(contexts[k]) == k  # the earlier of equals


def _context(begins: np.ndarray, words: range, word: int) -> float:
    """The smaller of what the window shows before and after it; −1 where it is not in it."""
    if word not in words:
        return -1.0
    middle = (begins[word] + begins[word + 1]) / 2
    text_begins, text_ends = words.start == 0, words.stop == len(begins) - 1
    before = np.inf if text_begins else middle - begins[words.start]
    after = np.inf if text_ends else begins[words.stop] - middle
    return float(min(before, after))


@given(
    st.lists(st.lists(st.sampled_from([*TEXT.split(), "\u200b", "Ω"]), max_size=30), max_size=3),
    st.integers(4, 14),
)
def test_labels_come_back_as_they_went_in(sentences: list[list[str]], max_length: int):
    windows = WordWindows(_BERT, sentences, max_length)
    labels = [np.arange(len(words)) for words in sentences]
    found = []
    for window in windows.windows:
        row = window.labels(labels[window.example])
        assert (row != IGNORE_INDEX).sum() == len(window.scored)
        found.append(row[row != IGNORE_INDEX])
        assert len(window.ids) <= max_length
        np.testing.assert_array_equal(window.first[window.kept], window.scored_first)
    assert windows.merge(found) == [label.tolist() for label in labels]


_BERT = Tokenizer.wordpiece([TEXT] * 3, 80)


# --- batches --------------------------------------------------------------------------------------


def test_padding(bert: Tokenizer):
    windows = WordWindows(bert, [["in"], ["in", "the", "rain"]], max_length=64).windows
    batch = pad(windows, pad_id=5)
    assert batch["attention_mask"].sum(axis=1).tolist() == [len(w.ids) for w in windows]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 5).all()
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
    labels = pad_labels([window.labels(np.arange(3)) for window in windows])
    assert labels.shape == batch["input_ids"].shape
    assert (labels[batch["attention_mask"] == 0] == IGNORE_INDEX).all()
    assert pad([])["input_ids"].shape == pad_labels([]).shape == (0, 0)


def test_marks_are_what_the_tokenizer_says(bert: Tokenizer, bpe: Tokenizer):
    cls, sep = bert.token_to_id("[CLS]"), bert.token_to_id("[SEP]")
    assert Marks.of(bert) == ([cls], [sep], [cls], [sep], [sep])
    assert Marks.of(bpe) == ([], [], [], [], [])
    roberta = Tokenizer.byte()
    roberta.tokenizer.add_special_tokens(["<s>", "</s>"])
    roberta.tokenizer.post_processor = processors.RobertaProcessing(("</s>", 258), ("<s>", 257))
    assert Marks.of(roberta) == ([257], [258], [257], [258, 258], [258])


# --- texts ----------------------------------------------------------------------------------------


def test_texts_and_pairs_are_as_the_tokenizer_writes_them(bert: Tokenizer):
    (window,) = TextWindows(bert, ["in the rain"], max_length=32).windows
    assert window.ids.tolist() == bert.tokenizer.encode("in the rain").ids
    (window,) = TextWindows(bert, ["in the rain"], ["to los angeles"], max_length=32).windows
    whole = bert.tokenizer.encode("in the rain", "to los angeles")
    assert window.ids.tolist() == whole.ids
    assert window.types.tolist() == whole.type_ids


def test_what_is_cut_is_counted(bert: Tokenizer):
    texts = ["0 1 2 3 4 5", "0 1"]
    windows = TextWindows(bert, texts, max_length=6)
    assert tokens(bert, windows.windows[0].ids) == ["[CLS]", "0", "1", "2", "3", "[SEP]"]
    assert windows.notes == ["1 of 2 texts too long: 2 pieces cut off their ends"]
    pairs = TextWindows(bert, texts, ["5", "5 4 3"], max_length=7)
    assert [tokens(bert, w.ids)[1:-1] for w in pairs.windows] == [
        ["0", "1", "2", "[SEP]", "5"],
        ["0", "1", "[SEP]", "5", "4"],
    ]
    assert (pairs.cut, pairs.cut_pieces) == (2, 4)


def test_empty_and_unknown_texts_are_counted(bert: Tokenizer):
    windows = TextWindows(bert, ["\u200b", "Ω in", "in"], max_length=8)
    assert len(windows) == 3
    assert windows.notes == [
        "1 of 3 texts of zero length for the tokenizer",
        "1 of 3 texts have a piece that the tokenizer lacks",
    ]


def test_long_texts_in_windows_are_averaged(bert: Tokenizer):
    windows = TextWindows(bert, ["0 1 2 3 4 5", "0"], max_length=6, long="windows")
    assert [tokens(bert, w.ids)[1:-1] for w in windows.windows] == [
        ["0", "1", "2", "3"],
        ["2", "3", "4", "5"],
        ["0"],
    ]
    assert windows.notes == ["1 of 2 texts too long: read in several windows, averaged"]
    merged = windows.merge(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], np.float32))
    assert merged.tolist() == [[2.0, 3.0], [5.0, 6.0]]
    assert merged.dtype == np.float32
    with pytest.raises(ValueError, match="expected 3 values, one a window, got 2"):
        windows.merge(np.zeros(2))


def test_the_second_of_a_pair_is_read_in_windows(bert: Tokenizer):
    windows = TextWindows(bert, ["0"], ["1 2 3 4 5"], max_length=6, long="windows")
    assert [tokens(bert, w.ids)[1:-1] for w in windows.windows] == [
        ["0", "[SEP]", "1", "2"],
        ["0", "[SEP]", "2", "3"],
        ["0", "[SEP]", "3", "4"],
        ["0", "[SEP]", "4", "5"],
    ]
    with pytest.raises(ValueError, match="leaves no room for windows of the second"):
        TextWindows(bert, ["0 1 2 3"], ["1"], max_length=7, long="windows")


@given(st.integers(0, 40), st.integers(3, 12))
def test_windows_cover_every_piece(count: int, max_length: int):
    text = " ".join("012345"[i % 6] for i in range(count))
    windows = TextWindows(_BERT, [text], max_length=max_length, long="windows").windows
    rows = [window.ids[1:-1].tolist() for window in windows]
    ids = _BERT.encode(text).tolist()
    starts = [0]
    for row, following in pairwise(rows):
        step = min(max(1, len(row) // 2), count - len(following) - starts[-1])
        starts.append(starts[-1] + step)
    covered = {s + i for s, row in zip(starts, rows, strict=True) for i in range(len(row))}
    assert covered == set(range(count))
    assert all(ids[s : s + len(r)] == r for s, r in zip(starts, rows, strict=True))


def test_bad_texts(bert: Tokenizer):
    with pytest.raises(ValueError, match="as many second texts"):
        TextWindows(bert, ["a"], [], max_length=8)
    with pytest.raises(ValueError, match="room for 2 pieces"):
        TextWindows(bert, ["a"], ["b"], max_length=4)
    with pytest.raises(ValueError, match="'cut' or 'windows'"):
        TextWindows(bert, ["a"], max_length=8, long="drop")  # pyright: ignore[reportArgumentType]


@given(st.integers(0, 30), st.integers(0, 30), st.integers(2, 30))
def test_the_longer_text_is_cut_first(first: int, second: int, room: int):
    a, b = first, second
    while a + b > room:
        a, b = (a - 1, b) if a > b else (a, b - 1)
    kept = longest_first(first, second, room)
    assert sum(kept) == a + b
    assert abs(kept[0] - a) <= 1  # who loses the last piece where both are as long does not matter
    assert kept[0] <= first
    assert kept[1] <= second
