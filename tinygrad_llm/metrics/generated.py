"""Scores of texts that a model wrote: translations and answers.

BLEU            brevity · exp(mean of ln p_n, n = 1 … 4), p_n: n-grams that the reference has
exact match     the answers that are the gold one, but for case, punctuation and articles
F1              2 P R / (P + R) over the words that answer and gold answer share
"""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TranslationScores:
    """Corpus scores from 0 to 100, and the signature with which others can compute the same."""

    bleu: float
    chrf: float  # F-score over characters: for single words and languages of long ones
    exact: float  # of 100 translations so many are the reference to the letter
    signature: str
    count: int
    copied: float | None  # BLEU of giving the source back: what a model must beat
    copied_chrf: float | None = None
    copied_exact: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds of it."""
        return {
            "bleu": self.bleu,
            "chrf": self.chrf,
            "exact": self.exact,
            "bleu of copying the source": self.copied,
            "chrf of copying the source": self.copied_chrf,
            "exact of copying the source": self.copied_exact,
            "signature": self.signature,
            "count": self.count,
        }


def translation_scores(
    predicted: Sequence[str],
    references: Sequence[str] | Sequence[Sequence[str]],
    sources: Sequence[str] | None = None,
    *,
    tokenize: str = "13a",
) -> TranslationScores:
    """BLEU and chrF of translations, through sacrebleu.

    references[i]: the translation of text i, or several that are as good. sources: to score beside
    it what copying the source would give. tokenize: how BLEU finds words: '13a' for European
    languages, 'zh' for Chinese, 'char'.

    Raises ValueError where there is nothing to score or not as many of all; ImportError without
    sacrebleu.
    Papineni et al., ACL 2002; Post, WMT 2018 (sacrebleu); Popović, WMT 2015 (chrF).
    """
    for what, other in (("references", references), ("sources", sources)):
        if other is not None and len(other) != len(predicted):
            raise ValueError(f"expected {len(predicted):,} {what}, got {len(other):,}")
    if not predicted:
        raise ValueError("there is nothing to score: no translation was given")
    library = _sacrebleu()
    several = [[text] if isinstance(text, str) else list(text) for text in references]
    # sacrebleu takes one list for each kind of reference, None where a text has fewer.
    most = max(map(len, several))
    streams = [[texts[k] if k < len(texts) else None for texts in several] for k in range(most)]
    bleu, chrf = library.BLEU(tokenize=tokenize), library.CHRF()

    def scores(written: Sequence[str]) -> tuple[float, float, float]:
        exact = sum(text in texts for text, texts in zip(written, several, strict=True))
        return (
            bleu.corpus_score(list(written), streams).score,
            chrf.corpus_score(list(written), streams).score,
            100 * exact / len(written),
        )

    own = scores(predicted)
    copied = (None, None, None) if sources is None else scores(sources)
    return TranslationScores(*own, str(bleu.get_signature()), len(predicted), *copied)


def sentence_chrf(
    predicted: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]]
) -> list[float]:
    """chrF of each translation alone, from 0 to 100: which ones are good.

    references, raises: as `translation_scores`. Their mean is not the chrF of all of them together.
    """
    if len(references) != len(predicted):
        raise ValueError(f"expected {len(predicted):,} references, got {len(references):,}")
    chrf = _sacrebleu().CHRF()
    several = ([text] if isinstance(text, str) else list(text) for text in references)
    pairs = zip(predicted, several, strict=True)
    return [chrf.sentence_score(text, texts).score for text, texts in pairs]


def _sacrebleu() -> Any:
    try:
        return importlib.import_module("sacrebleu.metrics")
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu: pip install 'tinygrad-llm[metrics]'") from error


@dataclass(frozen=True)
class AnswerScores:
    """Means over the questions, from 0 to 100."""

    exact_match: float
    f1: float
    count: int

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds of it."""
        return {"exact match": self.exact_match, "f1": self.f1, "count": self.count}


def answer_scores(
    predicted: Sequence[str], answers: Sequence[str] | Sequence[Sequence[str]]
) -> AnswerScores:
    """SQuAD's scores of answers; answers[i]: the right one to question i, or several.

    Of several answers the one counts that is nearest. A question without an answer has '' for its
    answer, and only '' is right there.

    Raises ValueError where there is nothing to score or not as many of both.
    Rajpurkar et al., EMNLP 2016.
    """
    if len(answers) != len(predicted):
        raise ValueError(f"expected {len(predicted):,} right answers, got {len(answers):,}")
    if not predicted:
        raise ValueError("there is nothing to score: no answer was given")
    exact = f1 = 0.0
    for guess, right in zip(predicted, answers, strict=True):
        several = [right] if isinstance(right, str) else list(right) or [""]
        exact += max(normal_answer(guess) == normal_answer(text) for text in several)
        f1 += max(word_f1(guess, text) for text in several)
    n = len(predicted)
    return AnswerScores(100 * exact / n, 100 * f1 / n, n)


def word_f1(predicted: str, answer: str) -> float:
    """F1 over the words that both have, as often as both have them; 1 where both have none."""
    guess, right = normal_answer(predicted).split(), normal_answer(answer).split()
    if not guess or not right:
        return float(guess == right)
    shared = (Counter(guess) & Counter(right)).total()
    return 2 * shared / (len(guess) + len(right))


def normal_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no a, an, the, single blanks: 'The U.S.' -> 'us'"""
    bare = "".join(letter for letter in text.lower() if letter not in _PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


_PUNCTUATION = frozenset(string.punctuation)
