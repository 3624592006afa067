"""samples.jsonl: whole lines, no later ones after a resume."""

import json

import pytest

from tinygrad_llm.train.samples import Samples


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_texts_are_written_when_due(tmp_path):
    texts = iter(["狐\n", "b\u2028\x1b", "c"])
    samples = Samples(tmp_path, 5, lambda: next(texts))
    assert [step for step in range(1, 16) if samples.due(step)] == [5, 10, 15]
    assert [samples.take(step) for step in (5, 10, 15)] == ["狐\n", "b\u2028\x1b", "c"]
    expected = [(5, "狐\n"), (10, "b\u2028\x1b"), (15, "c")]
    with samples.path.open(encoding="utf-8", newline="\n") as file:
        assert [tuple(json.loads(line).values()) for line in file] == expected


def test_never_is_never(tmp_path):
    samples = Samples(tmp_path, 0, lambda: "x")
    assert not any(samples.due(step) for step in range(10))
    samples.forget_after(3)
    assert not samples.path.exists()


@pytest.mark.parametrize(
    "tail", ['{"step": 6, "te', '{"step": 6, "text": "x"}', "[]\n", '{"step": "x"}\n', "\n"]
)
def test_later_and_spoilt_lines_are_forgotten(tmp_path, tail):
    samples = Samples(tmp_path, 2, lambda: "x")
    for step in (2, 4):
        samples.take(step)
    with samples.path.open("a") as file:
        file.write(tail)
    samples.forget_after(100)
    assert lines(samples.path) == [{"step": 2, "text": "x"}, {"step": 4, "text": "x"}]
    samples.forget_after(3)
    assert lines(samples.path) == [{"step": 2, "text": "x"}]
    samples.forget_after(-1)
    assert samples.path.read_text() == ""


def test_bytes_that_are_no_text_end_it(tmp_path):
    samples = Samples(tmp_path, 1, lambda: "x")
    samples.take(1)
    with samples.path.open("ab") as file:
        file.write(b"\xff\x00\xfe\n")
    samples.forget_after(5)
    assert lines(samples.path) == [{"step": 1, "text": "x"}]
