"""Answers as pieces: found back in the text to the letter, in every window that holds them."""

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tinygrad_llm.data.answers import AnswerWindows, pieces_of
from tinygrad_llm.data.questions import Answer
from tinygrad_llm.data.tokenizers import Tokenizer

TEXT = "who wrote it ? ada wrote the program in 1843 , in london . café naïve 中文 is nice é ñ a b"
WORDPIECE = Tokenizer.wordpiece(TEXT * 4, 130)
CASED = Tokenizer.wordpiece(TEXT * 4 + " Ada London", 130, cased=True)
CLS, SEP = WORDPIECE.token_to_id("[CLS]"), WORDPIECE.token_to_id("[SEP]")


def byte_level():
    """A BPE over bytes that marks texts as BERT does."""
    from tokenizers import processors

    tokenizer = Tokenizer.bpe(TEXT, 320).tokenizer
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    ids = [(mark, tokenizer.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return Tokenizer(tokenizer)


BYTES = byte_level()
KINDS = {"uncased": WORDPIECE, "cased": CASED, "bytes": BYTES}


def windows(question, context, answer=None, tokenizer=WORDPIECE, max_length=40, **options):
    at = None if answer is None else Answer(answer, context.index(answer))
    return AnswerWindows(tokenizer, [question], [context], [at], max_length=max_length, **options)


def passages(found, context):
    """The text of the target of each window; None for [CLS]."""
    texts = []
    for k, (first, last) in enumerate(found.targets.tolist()):
        begin, end = found.characters(k, first, last) if first else (0, 0)
        texts.append(context[begin:end] if first else None)
    return texts


# --- one window -----------------------------------------------------------------------------------


def test_the_question_comes_first_and_the_context_second():
    found = windows("who wrote it ?", "ada wrote the program", "the program")
    (window,) = [found.window(k) for k in range(len(found))]
    ids, types = window.ids.tolist(), window.types.tolist()
    assert (ids[0], ids[-1]) == (CLS, SEP)
    split = ids.index(SEP) + 1
    assert types == [0] * split + [1] * (len(ids) - split)
    assert found.begin(0) == split
    assert found.lengths.tolist() == [len(ids)]
    allowed = found.allowed(0)
    assert allowed.tolist() == [False] * split + [True] * (len(ids) - split - 1) + [False]
    whole = WORDPIECE.tokenizer.encode("who wrote it ?", "ada wrote the program")
    assert (whole.ids, whole.type_ids) == (ids, types)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("ada wrote it in 1843 , in london", "in 1843"),
        ("She sat in the café.", "café"),
        ("She sat in the cafe\u0301 , naive", "cafe\u0301"),  # the accent is a mark of its own
        ("我们 在 中文 里", "中文"),
        ("这是中文。", "中文"),
        ("it is 👍🏽 nice", "👍🏽"),
        ("it is 👩\u200d💻 nice", "👩\u200d💻"),
        ("e\u0301 \u0301a ñ", "ñ"),
        ("ada  wrote\tit\nin 1843", "wrote\tit\nin"),
        ("f(a=None, b='x')", "'x'"),
        ("f(a=None, b='x')", "None"),
    ],
)
def test_answers_in_all_letters_are_cut_out_to_the_letter(kind, context, answer):
    found = windows("who ?", context, answer, KINDS[kind], max_length=80)
    assert passages(found, context) == [answer]
    assert found.inexact == 0
    assert found.notes == []


def test_an_answer_within_a_piece_takes_the_whole_piece_and_is_counted():
    found = windows("who ?", "the program is nice", "rogra")
    assert passages(found, "the program is nice") == ["program"]
    assert "1 of 1 question have an answer that begins or ends within a piece" in found.notes[0]


LETTERS = st.sampled_from(
    [*"adwrote in1843,.()'=A中文é", "e\u0301", "👩\u200d💻", "👍🏽", "\u200b", "  "]
)


@pytest.mark.parametrize("kind", KINDS)
@given(
    parts=st.lists(LETTERS, min_size=1, max_size=40),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    max_length=st.integers(14, 60),
)
@example(parts=list("in 中文 é"), place=(0.4, 0.7), max_length=20)
def test_every_answer_is_found_back_from_its_pieces(kind, parts, place, max_length):
    context = "".join(parts)
    low, high = sorted(int(share * len(context)) for share in place)
    answer = context[low : high + 1].strip()
    assume(answer)
    start = context.index(answer, low if context[low:].startswith(answer) else 0)
    tokenizer = KINDS[kind]
    right = [Answer(answer, start)]
    found = AnswerWindows(tokenizer, ["who ?"], [context], right, max_length=max_length)
    (pieces,) = pieces_of(tokenizer, [context])
    span = pieces.covering(start, start + len(answer))
    if span is None:  # zero-width blanks, of which WordPiece leaves nothing
        assert found.vanished == 1
        assert not found.learnable.any()
        return
    shown = 0
    for k in range(len(found)):
        begin, size = int(found.firsts[k]), int(found.sizes[k])
        holds = begin <= span[0] and span[1] < begin + size
        first, last = found.targets[k].tolist()
        assert (first > 0) == (last > 0) == holds
        if not holds:
            continue
        shown += 1
        low, high = found.characters(k, first, last)
        exact = (low, high) == (start, start + len(answer))
        assert exact == (found.inexact == 0)
        if exact:
            assert context[low:high] == answer
    assert found.learnable.all() == (shown > 0)
    assert found.unseen == (shown == 0)


@pytest.mark.parametrize("kind", KINDS)
@given(parts=st.lists(LETTERS, min_size=1, max_size=40), data=st.data())
def test_what_pieces_spell_is_an_answer_to_the_letter(kind, parts, data):
    context, tokenizer = "".join(parts), KINDS[kind]
    (pieces,) = pieces_of(tokenizer, [context])
    places = np.flatnonzero(pieces.starts < pieces.stops).tolist()
    assume(places)
    first, last = sorted(data.draw(st.sampled_from(places)) for _ in range(2))
    start, stop = int(pieces.starts[first]), int(pieces.stops[last])
    right = [Answer(context[start:stop], start)]
    found = AnswerWindows(tokenizer, ["who ?"], [context], right, max_length=200)
    assert found.inexact == found.unseen == 0
    assert found.characters(0, *found.targets[0].tolist()) == (start, stop)


@given(st.lists(LETTERS, max_size=40))
def test_pieces_are_of_runs_of_characters_in_their_order(parts):
    text = "".join(parts)
    for tokenizer in KINDS.values():
        (pieces,) = pieces_of(tokenizer, [text])
        assert (pieces.starts <= pieces.stops).all()
        assert (np.diff(pieces.starts) >= 0).all()
        for start, stop in zip(pieces.starts, pieces.stops, strict=True):
            part = text[start:stop]
            assert part == part.strip()


# --- several windows ------------------------------------------------------------------------------


def test_a_long_context_is_read_in_windows_and_those_without_the_answer_have_none():
    context = " ".join(["the program is nice ."] * 12) + " ada wrote it ."
    found = windows("who wrote it ?", context, "ada", max_length=30)
    texts = passages(found, context)
    assert len(texts) > 3
    assert texts[-1] == "ada"
    assert set(texts[:-1]) == {None}
    assert found.targets[0].tolist() == [0, 0]
    assert (found.lengths == 30).all()
    assert "read in several that overlap" in found.notes[0]
    total = len(WORDPIECE.encode(context))
    seen = np.zeros(total, int)
    for first, size in zip(found.firsts, found.sizes, strict=True):
        seen[first : first + size] += 1
    assert seen.min() == 1
    assert (np.diff(found.firsts)[:-1] == found.sizes[0] // 2).all()


def test_cut_contexts_lose_their_tails_and_the_answers_in_them():
    context = " ".join(["the program is nice ."] * 12) + " ada wrote it ."
    found = windows("who wrote it ?", context, "ada", max_length=30, long="cut")
    assert len(found) == 1
    assert not found.learnable.any()
    assert "only its head is read" in found.notes[0]
    assert "an answer that no window shows as a whole" in found.notes[1]


def test_no_answer_is_learnt_in_every_window():
    context = " ".join(["the program is nice ."] * 12)
    found = AnswerWindows(WORDPIECE, ["who ?"], [context], [None], max_length=30)
    assert len(found) > 1
    assert found.learnable.all()
    assert not found.targets.any()


def test_a_question_is_cut_where_it_leaves_too_little_room():
    found = windows("who wrote it ? " * 20, "ada wrote the program in 1843 , in london", "ada")
    room = 40 - 3
    assert found.begin(0) == room - room // 4 + 2
    assert any(
        "leave too little room to their contexts: cut at their ends" in n for n in found.notes
    )
    assert len(windows("who wrote it ? " * 7, "ada", "ada")) == 1
    assert windows("who wrote it ? " * 7, "ada", "ada").notes == []


def test_empty_contexts_and_answers_that_vanish_are_counted():
    found = AnswerWindows(WORDPIECE, ["who ?"], ["\u200b"], [Answer("\u200b", 0)], max_length=20)
    assert not found.learnable.any()
    assert not found.allowed(0).any()
    assert len(found.notes) == 2
    assert "leaves nothing" in found.notes[1]


def test_the_longest_answer_is_in_pieces():
    found = windows("who ?", "ada wrote the program", "wrote the program")
    assert found.longest_answer == len(WORDPIECE.encode("wrote the program"))
    assert AnswerWindows(WORDPIECE, ["?"], ["a"], [None], max_length=9).longest_answer == 0


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match=r"puts \[CLS\] before a text"):
        windows("who ?", "ada", "ada", Tokenizer.bpe(TEXT, 300))
    with pytest.raises(ValueError, match="max_length 4 has no room for a question and a context"):
        windows("who ?", "ada", "ada", max_length=4)
    with pytest.raises(ValueError, match="long must be 'cut' or 'windows'"):
        windows("who ?", "ada", "ada", long="all")
