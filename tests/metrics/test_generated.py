"""Scores of translations and answers."""

import sys

import pytest

from tinygrad_llm.metrics.generated import (
    answer_scores,
    normal_answer,
    sentence_chrf,
    translation_scores,
    word_f1,
)


def test_translations_beside_copying():
    references = ["der Hund läuft schnell nach Hause", "ich bin hier und bleibe"]
    sources = ["the dog runs home fast", "I am here"]
    perfect = translation_scores(references, references, sources)
    assert perfect.bleu == pytest.approx(100)
    assert perfect.exact == 100
    assert perfect.copied is not None
    assert perfect.copied < 10
    assert "tok:13a" in perfect.signature
    worse = translation_scores(["der Hund läuft", references[1]], references)
    assert 0 < worse.bleu < 100
    assert (worse.exact, worse.copied, worse.count) == (50, None, 2)


def test_sentences_one_by_one():
    found = sentence_chrf(["je suis ici", "x", ""], [["non", "je suis ici"], ["je"], ["je"]])
    assert found[0] == pytest.approx(100)
    assert found[1:] == [0, 0]
    with pytest.raises(ValueError, match="expected 1 references, got 0"):
        sentence_chrf(["a"], [])


def test_copying_is_scored_in_all_ways():
    scores = translation_scores(["a b", "c"], [["x"], ["c", "d"]], ["x", "d"])
    assert (scores.copied_exact, scores.copied_chrf) == (100, pytest.approx(100))
    assert scores.exact == 50


def test_bleu_by_hand():
    # p = 5/6, 3/5, 2/4, 1/3 and no brevity penalty
    scores = translation_scores(["a b c d x f"], ["a b c d e f"])
    assert scores.bleu == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_several_references():
    guesses = ["the cat sits on the mat", "one two three four five"]
    references = [["a dog", "the cat sits on the mat"], ["one two three four five"]]
    scores = translation_scores(guesses, references)
    assert scores.bleu == pytest.approx(100)
    assert scores.exact == 100


def test_answers():
    scores = answer_scores(["The Eiffel Tower", "in 1889", ""], ["Eiffel tower.", "1889", ""])
    assert scores.exact_match == pytest.approx(100 * 2 / 3)
    assert scores.f1 == pytest.approx(100 * (1 + 2 / 3 + 1) / 3)
    assert answer_scores(["b"], [["a", "B!"]]).exact_match == 100
    assert answer_scores(["b"], [[]]).f1 == 0
    assert word_f1("a a the", "") == 1.0
    assert word_f1("x x y", "x z") == pytest.approx(2 / 5)
    assert normal_answer("The  U.S., an ally") == "us ally"


def test_what_cannot_be_scored(monkeypatch: pytest.MonkeyPatch):
    for score in (translation_scores, answer_scores):
        with pytest.raises(ValueError, match="nothing to score"):
            score([], [])
        with pytest.raises(ValueError, match="expected 1 "):
            score(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="expected 1 sources, got 0"):
        translation_scores(["a"], ["a"], [])
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match=r"pip install 'tinygrad-llm\[metrics\]'"):
        translation_scores(["a"], ["a"])
