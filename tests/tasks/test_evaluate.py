"""Scoring a text: against a slow reference, whatever the stride and however the ids come."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import backend
from tinygrad_llm.autograd import no_grad
from tinygrad_llm.data.loader import IGNORE_INDEX, SequentialBatches
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.gpt import GPT, GPTConfig
from tinygrad_llm.tasks.evaluate import (
    Reading,
    Score,
    byte_lengths,
    evaluate_ids,
    evaluate_text,
    windows,
)

TEXT = "Über 狐狸 and 🎉: once upon a time, twice upon a time.\n" * 3


def small(vocab_size, n_positions=8):
    backend.manual_seed(3)
    config = GPTConfig(vocab_size, n_positions, n_embd=8, n_layer=1, n_head=2)
    model = GPT(config)
    for p in model.parameters():  # 0.02 would say nearly the same of every token
        p.data *= 20
    return model


def slow(model, ids, context, stride):
    """−ln p of ids[1:], each from the window that the rule gives it, one token at a time."""
    losses = []
    for target in range(1, len(ids)):
        first = max(0, -(-(target - context) // stride)) * stride  # the first window that has it
        seen = np.array([ids[first:target]])
        with no_grad():
            logits = model.next_logits(seen).data[0].astype(np.float64)
        losses.append(math.log(np.exp(logits - logits.max()).sum()) + logits.max())
        losses[-1] -= logits[ids[target]]
    return losses


@pytest.mark.parametrize("length", [2, 8, 9, 10, 33])
@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (8, 1), (5, 4), (1, 1)])
def test_each_token_is_scored_once_in_its_window(length, context, stride):
    tokenizer = Tokenizer.byte()
    model = small(257)
    ids = np.random.default_rng(1).integers(0, 257, length)
    score = evaluate_ids(model, tokenizer, ids, Reading(context, stride, batch_size=3))
    expected = slow(model, ids, context, stride)
    assert score.tokens == len(expected) == length - 1
    assert score.loss == pytest.approx(np.mean(expected), rel=1e-5)


@given(
    length=st.integers(0, 60),
    context=st.integers(1, 12),
    stride=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 60), max_size=5),
)
def test_windows_cover_everything_once_however_the_ids_come(length, context, stride, cuts):
    stride = min(stride, context)
    ids = np.arange(length)
    rows = list(windows(np.split(ids, sorted(cuts)), context, stride))
    scored = [int(t) for _, y in rows for t in y if t != IGNORE_INDEX]
    assert scored == list(range(1, length))
    for i, (x, y) in enumerate(rows):
        assert x.shape == y.shape == (context,)
        counted = y != IGNORE_INDEX
        assert counted.any()
        assert (x[counted] == y[counted] - 1).all()
        assert x[0] == i * stride
        if i:  # at least T − stride tokens more than the target's own place in a row
            assert np.flatnonzero(counted)[0] == context - stride


def test_side_by_side_is_the_validation_of_a_run():
    ids = np.random.default_rng(2).integers(0, 257, 50)
    rows = windows([ids], 8, 8)
    for x, y in SequentialBatches(ids, 1, 8):
        ours = next(rows)
        assert (ours[0] == x[0]).all()
        assert (ours[1] == y[0]).all()
    assert next(rows, None) is None


def test_dropout_is_off():
    backend.manual_seed(3)
    model = GPT(GPTConfig(257, 8, n_embd=8, n_layer=1, n_head=2, embd_pdrop=0.5, resid_pdrop=0.5))
    ids = Tokenizer.byte().encode(TEXT)
    first, second = (evaluate_ids(model.train(), Tokenizer.byte(), ids) for _ in range(2))
    assert first.nats == second.nats


def test_documents_apart_know_nothing_of_each_other():
    tokenizer = Tokenizer.byte()
    model, eos = small(257), tokenizer.eos_id
    documents = ["one and one", "", "two", TEXT]
    rows = [[eos, *tokenizer.encode(text), eos] for text in documents]
    rows[-1].pop()  # no mark behind the last
    expected = [loss for row in rows for loss in slow(model, row, 8, 3)]
    parts = [("one ", False), ("and one", True), ("", True), ("two", True), (TEXT, True)]
    score = evaluate_text(model, tokenizer, parts, Reading(8, 3, apart=True))
    assert score.tokens == len(expected)
    assert score.loss == pytest.approx(np.mean(expected), rel=1e-5)
    assert score.bytes == sum(len(text.encode()) for text in documents)

    ids = np.concatenate([row[:-1] for row in rows[:-1]] + [rows[-1]])
    stops = np.cumsum([len(row) - 1 for row in rows])
    spans = [
        (int(stop) - len(row) + 1, int(stop) + 1) for row, stop in zip(rows, stops, strict=True)
    ]
    same = evaluate_ids(model, tokenizer, ids, Reading(8, 3, apart=True), spans)
    assert (same.nats, same.tokens, same.bytes) == (score.nats, score.tokens, score.bytes)
    packed = evaluate_text(model, tokenizer, parts, Reading(8, 3))
    assert packed.tokens == score.tokens
    assert packed.loss != score.loss
    with pytest.raises(ValueError, match="expected spans where documents are read apart"):
        evaluate_ids(model, tokenizer, ids, Reading(apart=True))


def test_a_smaller_stride_costs_nothing_in_tokens():
    model, tokenizer = small(257), Tokenizer.byte()
    ids = tokenizer.encode(TEXT)
    scores = [evaluate_ids(model, tokenizer, ids, Reading(8, stride)) for stride in (8, 4, 1)]
    assert {(s.tokens, s.bytes) for s in scores} == {(len(ids) - 1, len(TEXT.encode()) - 1)}
    assert len({s.loss for s in scores}) == 3


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "unigram", "wordpiece"])
def test_the_bytes_are_those_of_the_text(kind):
    tokenizer = {
        "byte": Tokenizer.byte,
        "char": lambda: Tokenizer.char(TEXT),
        "bpe": lambda: Tokenizer.bpe(TEXT, 280),
        "unigram": lambda: Tokenizer.unigram(TEXT, 280),
        "wordpiece": lambda: Tokenizer.wordpiece(TEXT, 100),
    }[kind]()
    model = small(tokenizer.vocab_size)
    parts = [(TEXT[:57], False), (TEXT[57:], True), ("", True), ("time", True)]
    whole = evaluate_text(model, tokenizer, parts)
    size = len(TEXT.encode()) + 4
    marks = 2
    assert whole.bytes == size
    pieces = (TEXT[:57], TEXT[57:], "time")
    assert whole.tokens == marks + sum(len(tokenizer.encode(piece)) for piece in pieces)
    assert whole.bits_per_byte == pytest.approx(whole.nats / math.log(2) / size)
    ids = tokenizer.encode(f"<|endoftext|>{TEXT}")
    part = evaluate_ids(model, tokenizer, ids)
    if kind == "wordpiece":
        assert byte_lengths(tokenizer) is part.bytes is part.bits_per_byte is None
    else:
        assert part.bytes == len(TEXT.encode())


def test_documents_are_read_one_at_a_time():
    taken = []

    def documents():
        for i in range(4):
            taken.append(i)
            yield f"{i} and {i}"

    pieces = (Tokenizer.byte().encode(d) for d in documents())
    next(windows(pieces, 3, 3))
    assert taken == [0]


def test_who_watches_hears_of_tokens_and_bytes():
    seen = []
    tokenizer = Tokenizer.byte()
    parts = [("time", True), (TEXT, True)]
    reading = Reading(8, batch_size=2)
    whole = evaluate_text(
        small(257), tokenizer, parts, reading, watch=lambda *so_far: seen.append(so_far)
    )
    assert seen == sorted(seen)
    assert seen[0] == (16, 15)  # the mark between the documents is no text
    assert seen[-1] == (whole.tokens, whole.bytes)


def test_perplexity_overflows_to_infinity():
    score = Score(nats=8000.0, tokens=10, bytes=0, seconds=0.0)
    assert (score.loss, score.perplexity) == (800.0, math.inf)
    assert (score.bits_per_byte, score.tokens_per_second) == (None, 0.0)
    uniform = Score(nats=6 * math.log(256), tokens=6, bytes=6, seconds=2.0)
    assert uniform.perplexity == pytest.approx(256)
    assert uniform.bits_per_byte == pytest.approx(8)
    assert uniform.tokens_per_second == 3


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        (Reading(context=9), "context must be from 1 to 8, what the model sees, got 9"),
        (Reading(context=4, stride=5), "stride must be from 1 to 4, the context, got 5"),
        (Reading(stride=-1), "stride must be from 1 to 8"),
        (Reading(batch_size=0), "batch_size must be at least 1"),
    ],
)
def test_what_cannot_be_read_so(reading, message):
    with pytest.raises(ValueError, match=message):
        evaluate_ids(small(257), Tokenizer.byte(), np.arange(20), reading)


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="257 tokens, the model knows 200: they do not belong"):
        evaluate_ids(small(200), Tokenizer.byte(), np.arange(20))
    with pytest.raises(ValueError, match="nothing to score"):
        evaluate_ids(small(257), Tokenizer.byte(), np.arange(1))
    with pytest.raises(ValueError, match="nothing to score"):
        evaluate_text(small(257), Tokenizer.byte(), [("", True)])
