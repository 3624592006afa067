"""Masks: who is asked for, what is seen in their place, and nothing else is touched."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm.backend import RandomStream
from tinygrad_llm.data.loader import IGNORE_INDEX
from tinygrad_llm.data.masking import Masking, continuations, special_id, special_ids
from tinygrad_llm.data.tokenizers import BERT_TOKENS, Tokenizer

WORDS = Tokenizer.wordpiece("unaffable people sing and are singing unaffably " * 9, 60)
V, SPECIAL, MASK = 50, (0, 1, 2, 3, 4), 4
CONTINUES = np.arange(V) % 3 == 0  # some of the ids go on with a word
CONTINUES[list(SPECIAL)] = False


def rows(shape, seed=0, special=0.2):
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, V, shape)
    return np.where(rng.random(shape) < special, rng.integers(0, 5, shape), ids)


@given(
    st.integers(1, 5),
    st.integers(1, 30),
    st.floats(0.01, 1.0),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_law_of_masking(b, t, probability, special, whole, seed):
    masking = Masking(V, MASK, SPECIAL, probability, CONTINUES if whole else None)
    ids = rows((b, t), seed, special)
    before, stream = ids.copy(), RandomStream(seed)
    masked, labels = masking(ids, stream)
    asked = labels != IGNORE_INDEX
    np.testing.assert_array_equal(ids, before)
    np.testing.assert_array_equal(labels[asked], ids[asked])
    np.testing.assert_array_equal(masked[~asked], ids[~asked])  # nothing else is touched
    assert not np.isin(ids[asked], SPECIAL).any()
    changed = masked[asked & (masked != MASK)]
    assert not np.isin(changed, SPECIAL).any()
    ordinary = (~np.isin(ids, SPECIAL)).sum(axis=1)
    wanted = np.maximum(np.rint(probability * ordinary), 1) * (ordinary > 0)
    if not whole:
        np.testing.assert_array_equal(asked.sum(axis=1), wanted)
    else:
        check_whole_words(ids, asked, wanted)
    again, same = masking(ids, RandomStream(seed))
    np.testing.assert_array_equal(again, masked)
    np.testing.assert_array_equal(same, labels)


def check_whole_words(ids, asked, wanted):
    for row in range(len(ids)):
        words, word = [], []
        for i, token in enumerate(ids[row]):
            if token in SPECIAL:
                word = []
                continue
            if not (CONTINUES[token] and word):
                word = []
                words.append(word)
            word.append(i)
        for places in words:
            assert len(set(asked[row, places])) == 1  # all of it or nothing
        taken = asked[row].sum()
        largest = max(map(len, words), default=0)
        assert taken <= max(wanted[row], largest)
        assert (taken > 0) == bool(words)


def test_eighty_ten_ten():
    masking = Masking(V, MASK, SPECIAL)
    ids = rows((200, 100), special=0.0)
    masked, labels = masking(ids, RandomStream(1))
    asked = labels != IGNORE_INDEX
    assert asked.mean() == pytest.approx(0.15)
    n = asked.sum()  # 3000: a standard deviation of 0.7 % for the first
    hidden = (masked[asked] == MASK).sum() / n
    same = (masked[asked] == ids[asked]).sum() / n
    assert hidden == pytest.approx(0.8, abs=0.03)
    assert same == pytest.approx(0.1 + 0.1 / 45, abs=0.025)  # another word may be the same one
    others = masked[asked & (masked != MASK) & (masked != ids)]
    assert len(set(others)) > 40  # any of the 45 words
    places = asked.mean(axis=0)
    assert places.min() > 0.05  # every position has its turn
    assert places.max() < 0.28


def test_the_shares_can_be_others():
    ids = rows((50, 40), special=0.0)
    only, labels = Masking(V, MASK, SPECIAL, 0.5, hidden=1.0, replaced=0.0)(ids, RandomStream(1))
    assert (only[labels != IGNORE_INDEX] == MASK).all()
    kept, _ = Masking(V, MASK, SPECIAL, 0.5, hidden=0.0, replaced=0.0)(ids, RandomStream(1))
    np.testing.assert_array_equal(kept, ids)


def test_masks_are_new_each_time_and_go_on_from_a_state():
    masking, stream = Masking(V, MASK, SPECIAL), RandomStream(3)
    ids = rows((4, 20))
    first = masking(ids, stream)[1]
    state = stream.state()
    second = masking(ids, stream)[1]
    assert (first != second).any()
    stream.load_state(state)
    np.testing.assert_array_equal(masking(ids, stream)[1], second)


def test_what_wordpiece_says():
    assert special_id(WORDS, "mask") == 4
    assert special_ids(WORDS) == [*range(5), WORDS.vocab_size - 1]
    assert {WORDS.id_to_token(i) for i in special_ids(WORDS)} == {*BERT_TOKENS, "<|endoftext|>"}
    goes_on = continuations(WORDS)
    for i in range(WORDS.vocab_size):
        assert goes_on[i] == str(WORDS.piece(i)).startswith("##")
    masking = Masking.of(WORDS, 0.3, whole_words=True)
    ids = np.stack([WORDS.encode("people are singing unaffably and sing")] * 50)
    masked, labels = masking(ids, RandomStream(0))
    assert (masked == 4).any()
    begins = ~goes_on[ids[0]]
    word = np.cumsum(begins)
    for row in labels != IGNORE_INDEX:
        assert {w for w, a in zip(word, row, strict=True) if a}.isdisjoint(
            {w for w, a in zip(word, row, strict=True) if not a}
        )


def test_tokenizers_that_will_not_do():
    with pytest.raises(ValueError, match=r"byte tokenizer has no \[MASK\].*WordPiece"):
        Masking.of(Tokenizer.byte())
    with pytest.raises(ValueError, match="whole words are told apart by the '##'"):
        continuations(Tokenizer.byte())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"probability": 0.0}, "probability must be above 0"),
        ({"probability": 1.5}, "probability must be above 0"),
        ({"hidden": 0.8, "replaced": 0.3}, "add up to at most 1"),
        ({"hidden": -0.1}, "shares of 0 or more"),
        ({"mask_id": 50}, "mask_id must be from 0 to 49"),
        ({"special_ids": range(50)}, "every token is a special one"),
        ({"continues": np.zeros(3, bool)}, r"continues must be \(50,\)"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        Masking(**({"vocab_size": V, "mask_id": MASK, "special_ids": SPECIAL} | arguments))
