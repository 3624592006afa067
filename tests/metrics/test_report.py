"""Reports: what stands in them, how wide they are, and that they cannot mislead."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from tinygrad_llm.metrics.generated import answer_scores, translation_scores
from tinygrad_llm.metrics.report import (
    WIDTH,
    GeneratedReport,
    label_report,
    tag_report,
    translation_report,
    write_metrics,
)

GOLD = [["B-PER", "I-PER", "O", "O"], ["O", "O", "B-LOC"], ["O", "O", "O"]]
GUESS = [["B-PER", "O", "O", "O"], ["O", "O", "B-LOC"], ["O", "O", "O"]]


def numbers(text: str, name: str) -> list[str]:
    """The cells of the line that begins with this name."""
    line = next(line for line in text.split("\n") if line.startswith(f"{name} "))
    return line.removeprefix(name).split()


def test_tags_with_and_without_o_and_entities_side_by_side():
    report = tag_report(GOLD, GUESS, name="dev")
    text = report.text()
    assert text.startswith("dev: 10 words in 3 sentences, 2 entities, tags as BIO\n")
    assert numbers(text, "micro, without O") == ["1.0000", "0.6667", "0.8000", "3", "2"]
    assert numbers(text, "micro, with O") == ["0.9000"] * 3 + ["10", "10"]
    assert numbers(text, "LOC") == ["1.0000"] * 3 + ["1", "1"]
    assert numbers(text, "PER")[:3] == ["0.0000"] * 3
    assert numbers(text, "entities") == ["0.5000", "0.0000"]
    assert numbers(text, "words with O, micro = accuracy") == ["0.9000", "0.7000"]
    assert "always O" in text
    assert "70.0% of the words are O" in text
    assert "no measure of what was found" in text.replace("\n", " ")


def test_averages_are_those_of_the_printed_rows():
    text = tag_report(GOLD, GUESS).text()
    head, rows = text.split("Word by word")[1].split("\n", 1)
    assert "precision" in head
    f1 = {row.split()[0]: float(row.split()[3]) for row in rows.split("\n")[1:5]}
    assert list(f1) == ["B-LOC", "B-PER", "I-PER", "O"]
    assert float(numbers(text, "macro, with O")[2]) == pytest.approx(
        np.mean(list(f1.values())), abs=1e-4
    )
    del f1["O"]
    mean = np.mean(list(f1.values()))
    assert float(numbers(text, "macro, without O")[2]) == pytest.approx(mean, abs=1e-4)


def test_baselines_and_notes():
    report = tag_report(GOLD, GUESS, usual="B-PER", baselines={"words": GOLD}, notes=["2 cut"])
    assert report.baselines["words"].summary()["entities"] == 1.0
    assert report.baselines["always B-PER"].summary()["words without O, micro"] > 0
    assert report.text().endswith("\n\nnote: 2 cut")


def test_tags_that_mark_no_entities():
    report = tag_report([["NN", "VB"], ["NN"]], [["NN", "NN"], ["NN"]])
    text = report.text()
    assert report.scores.entities is None
    assert "Entities" not in text
    assert "without O" not in text
    assert numbers(text, "words, micro = accuracy") == ["0.6667", "0.6667"]


def test_labels():
    report = label_report(["yes", "no", "yes"], ["yes", "yes", "yes"], name="pairs", usual="no")
    text = report.text()
    assert text.startswith("pairs: 3 texts, 2 labels\n")
    assert numbers(text, "accuracy")[:3] == ["0.6667"] * 3
    assert numbers(text, "MCC") == ["0.0000", "0.0000"]
    assert "always 'no'" in text
    assert re.search(r"^no +0 +1$", text, re.MULTILINE)


def test_a_report_is_a_hundred_columns_wide_at_most():
    names = [f"B-type-of-entity-{i}" for i in range(20)]
    gold = [[name, "O"] for name in names]
    guess = [[name, "O"] for name in reversed(names)]
    note = "a note that goes on " * 10
    baselines = {"the most frequent tag of every word": gold}
    text = tag_report(gold, guess, baselines=baselines, notes=[note]).text()
    assert max(map(len, text.split("\n"))) <= WIDTH
    assert "Confusions, the most frequent" in text
    assert "10 other ways" in text
    text = label_report(names, names[::-1]).text()
    assert max(map(len, text.split("\n"))) <= WIDTH


def test_nothing_confused():
    names = [f"label {i}" for i in range(20)]
    assert "Confusions: none" in label_report(names, names).text()


def test_generated_texts():
    scores = translation_scores(["a b c d"], ["a b c d"], ["x"])
    text = GeneratedReport("eng-fra", scores).text()
    assert re.search(r"BLEU +100.00    copying the source: 0.00", text)
    assert "sacrebleu" in text
    text = GeneratedReport("qa", answer_scores(["a b"], ["b c"]), ["1 cut"]).text()
    assert re.search(r"F1 of words +66.67", text) or re.search(r"F1 of words +", text)
    assert text.endswith("note: 1 cut")


def test_a_handful_of_translations_is_shown():
    sources = [f"source {i}" for i in range(12)]
    written = [f"written {i}" for i in range(12)]
    sources[2], written[4] = "a\nb " + "long " * 40, "\t\n"
    references = [[f"target {i}", "another", "a third"][: 1 + i % 3] for i in range(12)]
    report = translation_report(written, references, sources, name="eng-fra", notes=["1 cut"])
    text = report.text()
    assert max(map(len, text.split("\n"))) <= WIDTH
    lines = [line.split(maxsplit=1) for line in text.split("\n") if line.startswith("  ")]
    shown = [tuple(line[1] if len(line) > 1 else "" for line in lines[i : i + 3]) for i in (0, 3)]
    assert shown[0] == ("source 0", "target 0", "written 0")
    assert shown[1][0].startswith("a b long long")
    assert shown[1][0].endswith("…")
    assert shown[1][1] == "target 2 (or 2 more)"
    assert [line[1] for line in lines[::3][2:]] == ["source 4", "source 7", "source 9"]
    assert text.endswith("note: 1 cut")
    assert "source 0" not in json.dumps(report.as_dict())
    assert translation_report(written, references, sources).text().count("\n  source ") == 5
    few = translation_report(written[:2], references[:2], sources[:2])
    assert few.text().count("\n  source ") == 2


def test_metrics_json(tmp_path: Path):
    report = tag_report(GOLD, GUESS, name="dev")
    file = write_metrics(tmp_path / "metrics.json", report, seconds=1.5)
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (found["name"], found["seconds"], found["sentences"]) == ("dev", 1.5, 3)
    assert found["entities"]["micro"]["f1"] == 0.5
    assert found["words"]["without O"]["micro"]["f1"] == pytest.approx(0.8)
    assert found["words"]["micro"]["f1"] == 0.9
    assert found["words"]["labels"]["I-PER"]["support"] == 1
    assert np.sum(found["words"]["confusion"]["gold × predicted"]) == 10
    assert found["baselines"]["always O"]["entities"] == 0.0
    for other in (
        label_report(["a"], ["a"]),
        GeneratedReport("x", answer_scores(["a"], ["a"])),
    ):
        assert json.loads(write_metrics(file, other).read_text(encoding="utf-8"))["notes"] == []
    with pytest.raises(ValueError, match="JSON"):
        write_metrics(file, report, loss=float("nan"))


def test_metrics_that_cannot_be_written_leave_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = write_metrics(tmp_path / "metrics.json", label_report(["a"], ["a"], name="old"))
    before = file.read_bytes()

    def fails(*_: object):
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="power cut"):
        write_metrics(file, label_report(["a"], ["b"], name="new"))
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_predictions_that_do_not_fit():
    with pytest.raises(ValueError, match="sentence 1 has 4 words but 1 predicted tags"):
        tag_report(GOLD, [["O"], ["O"], ["O"]])
