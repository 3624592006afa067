"""Scores of language models, and the report that puts them side by side."""

import json
import math

import pytest

from tinygrad_llm.metrics.language import (
    LanguageReport,
    LanguageScore,
    Written,
    language_figure,
)
from tinygrad_llm.metrics.plot import draw_report
from tinygrad_llm.metrics.report import write_metrics

TEXT = Written("a pro", "mpt\nof\ttwo lines", "x" * 230)


def report(after=100.0, before=300.0, unigram=200.0, size: int | None = 120):
    score, came, usual = (LanguageScore(nats, 50, size) for nats in (after, before, unigram))
    return LanguageReport("a $text$", score, came, usual, TEXT, notes=["a note " * 30])


def test_one_score_in_four_units():
    score = LanguageScore(nats=50 * math.log(8), tokens=50, bytes=75)
    assert score.loss == pytest.approx(math.log(8))
    assert score.perplexity == pytest.approx(8)
    assert score.bits_per_token == pytest.approx(3)
    assert score.bits_per_byte == pytest.approx(2)
    assert LanguageScore(1.0, 1, None).bits_per_byte is None
    assert LanguageScore(1000.0, 1, 1).perplexity == math.inf
    assert LanguageScore(1000.0, 1, 1).as_dict()["perplexity"] is None


def test_the_text_has_all_three_rows_and_fits():
    lines = report().text().splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == "a $text$: 50 tokens, 120 bytes"
    row = next(line for line in lines if line.startswith("this model"))
    assert row.split()[2:] == ["2.0000", "7.39", "2.8854", "1.2022"]
    assert [line.split("  ")[0] for line in lines[4:7]] == [
        *("this model", "before, as it came", "how often tokens come"),
    ]
    assert "It is better than before by 4.0000 nats per token, 66.7%." in lines
    assert "before, from 'a pro':" in lines
    assert lines[lines.index("before, from 'a pro':") + 1 :][:2] == ["  mpt", "  of  two lines"]


@pytest.mark.parametrize(
    ("after", "said"),
    [(100.0, "better than before by"), (310.0, "no better than before"), (250.0, "only how often")],
)
def test_what_is_no_success_is_called_none(after, said):
    text = " ".join(report(after=after).text().split())
    assert said in text
    assert ("only how often" in text) == (after >= 200)
    assert ("no better than before, but worse" in text) == (after > 300)


def test_what_is_not_known_is_not_made_up(tmp_path):
    found = report(size=None)
    assert found.text().splitlines()[0] == "a $text$: 50 tokens"
    assert "unknown" in found.text()
    written = json.loads(write_metrics(tmp_path / "metrics.json", found).read_text())
    assert written["bits_per_byte"] is None
    assert written["baselines"]["unigram"]["loss"] == 4
    assert written["written"]["after"] == TEXT.after


def test_the_picture_has_a_bar_for_each(tmp_path):
    pytest.importorskip("matplotlib")
    (axes,) = language_figure(report()).axes
    assert [bar.get_width() for bar in axes.patches] == [2.0, 6.0, 4.0]  # pyright: ignore
    assert draw_report(report(), tmp_path / "metrics.png") is None
    assert (tmp_path / "metrics.png").stat().st_size > 1000
