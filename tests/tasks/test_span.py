"""Span corruption: what is hidden comes back, as much is hidden as was asked for, going on."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import backend
from tinygrad_llm.backend import RandomStream
from tinygrad_llm.data.corpora import Corpus
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.t5 import T5, T5Config
from tinygrad_llm.tasks.span import (
    Spans,
    SpanTask,
    noise_mask,
    restore,
    sentinel_ids,
    span_counts,
    text_length,
    with_sentinels,
)

TOKENIZER = with_sentinels(Tokenizer.byte())
SENTINELS = sentinel_ids(TOKENIZER)
TEXT = Corpus("abc", ["".join(chr(97 + i % 26) for i in range(1500))])


def task(text=TEXT, tokenizer=TOKENIZER, **options) -> SpanTask:
    settings: dict[str, Any] = {"context": 24, "batch_size": 4, "seed": 1, **options}
    return SpanTask(text, tokenizer, **settings)


# --- the law --------------------------------------------------------------------------------------


@given(
    ids=st.lists(st.integers(0, 255), min_size=2, max_size=200),
    density=st.floats(0.01, 0.99),
    mean_span=st.floats(1, 20),
    seed=st.integers(0, 2**32),
)
def test_source_and_target_restore_the_text(ids, density, mean_span, seed):
    spans = Spans(TOKENIZER, density, mean_span)
    noise, count = span_counts(len(ids), density, mean_span)
    source, target = spans.hide(np.array(ids), RandomStream(seed))
    assert restore(source, target, SENTINELS) == [*ids, 256]
    assert len(source) == len(ids) - noise + count + 1
    assert len(target) == noise + count + 1
    for side in (source, target):  # each sentinel once, in their order
        assert [i for i in side if i in SENTINELS] == SENTINELS[:count]
    again = spans.hide(np.array(ids), RandomStream(seed))
    np.testing.assert_array_equal(again[0], source)


@given(
    length=st.integers(2, 300),
    density=st.floats(0.01, 0.99),
    mean_span=st.floats(1, 20),
    seed=st.integers(0, 2**32),
)
def test_spans_are_apart_and_as_many_as_said(length, density, mean_span, seed):
    hidden = noise_mask(length, density, mean_span, RandomStream(seed))
    noise, count = span_counts(length, density, mean_span)
    assert hidden.shape == (length,)
    assert hidden.sum() == noise
    assert np.count_nonzero(np.diff(hidden.astype(int), prepend=0) == 1) == count
    assert 1 <= noise < length


def test_the_share_and_the_mean_are_t5s():
    assert span_counts(512, 0.15, 3.0) == (77, 26)
    assert span_counts(2, 0.15, 3.0) == (1, 1)
    # 568 tokens are what T5 reads for a source of 512: 568 − 85 + 28 + 1
    assert text_length(512, 0.15, 3.0) == 568


def test_every_place_is_hidden_and_every_way_as_often_as_another():
    stream = RandomStream(0)
    ways = [noise_mask(5, 0.6, 1.5, stream).astype(int).tolist() for _ in range(3000)]
    found, counts = np.unique(ways, axis=0, return_counts=True)
    assert len(found) == 6  # 3 hidden in 2 spans apart: 1 + 2 or 2 + 1, each at 3 places
    np.testing.assert_allclose(counts / 3000, 1 / 6, atol=0.03)
    often = np.mean([noise_mask(40, 0.25, 2.5, stream) for _ in range(2000)], axis=0)
    assert often.min() > 0.1


def test_a_worked_example():
    words = [5, 6, 7, 8, 9]
    source, target = [5, 90, 8, 91, 1], [90, 6, 7, 91, 9, 1]
    assert restore(source, target, [90, 91]) == [*words, 1]
    assert restore([5, 90, 8, 91], [1, 90, 6], [90, 91]) == [5, 6, 8]  # 91 was not written


# --- sentinels ------------------------------------------------------------------------------------


def test_sentinels_get_ids_after_the_last_and_stay():
    plain = Tokenizer.bpe("the cat sat on the mat", 270)
    tokenizer = with_sentinels(plain, 5)
    ids = sentinel_ids(tokenizer)
    assert ids == list(range(plain.vocab_size, plain.vocab_size + 5))
    assert tokenizer.eos_id == plain.eos_id
    assert tokenizer.encode("the<extra_id_3>cat").tolist().count(ids[3]) == 1
    np.testing.assert_array_equal(tokenizer.encode("the mat"), plain.encode("the mat"))
    assert with_sentinels(tokenizer, 5).vocab_size == tokenizer.vocab_size
    with pytest.raises(ValueError, match="at least 1 sentinel, got 0"):
        with_sentinels(plain, 0)
    with pytest.raises(ValueError, match=r"make it by with_sentinels\(tokenizer\)"):
        sentinel_ids(plain)


# --- the task -------------------------------------------------------------------------------------


def test_batches_are_of_the_context_and_restore_the_text(tmp_path):
    spans = task()
    length = text_length(24, 0.15, 3.0)
    for _ in range(20):
        batch = spans.next_batch()
        assert batch.input_ids.shape == (4, 24)
        assert batch.attention_mask.all()
        assert spans.size(batch) == batch.labels.size
        for source, target in zip(batch.input_ids, batch.labels, strict=True):
            text = np.array(restore(source, target, SENTINELS)[:-1])
            assert len(text) == length
            np.testing.assert_array_equal(text[1:], (text[:-1] - 97 + 1) % 26 + 97)
    spans.save(tmp_path)
    assert sentinel_ids(Tokenizer.from_file(tmp_path / "tokenizer.json")) == SENTINELS


def test_validation_hides_the_same_every_time_and_training_does_not():
    spans = task(order="sequential", batch_size=40)
    first, again = list(spans.validation()), list(spans.validation())
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.input_ids, two.input_ids)
    epoch = 1350 // (text_length(24, 0.15, 3.0) - 1)
    rows = np.concatenate([spans.next_batch().labels for _ in range(4)])
    assert not np.array_equal(rows[:epoch], rows[epoch : 2 * epoch])
    assert len(list(task(eval_batches=1, batch_size=2).validation())) == 1


def test_documents_apart_are_filled_up_and_not_cut():
    many = Corpus("many", [f"{i}: {'ab' * (i % 9)}." for i in range(60)])
    spans = task(many, documents="separate", val_by="document", val_fraction=0.2)
    seen = set()
    for _ in range(40):
        batch = spans.next_batch()
        for ids, real, labels in zip(*batch, strict=True):
            text = restore(ids[real], labels[labels >= 0], SENTINELS)
            seen.add(TOKENIZER.decode([i for i in text if i != 256]))
    assert {len(text) for text in seen} >= {5, 7}
    assert any(text.endswith(".") for text in seen)


def test_going_on_gives_the_batches_that_would_have_come():
    one, two = task(), task()
    for _ in range(3):
        one.next_batch()
    two.load_state(one.state())
    for a, b in zip(one.next_batch(), two.next_batch(), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="text of 'abc' has changed"):
        task().load_state({**one.state(), "sha256": "0" * 64})


def test_t5_learns_from_it():
    backend.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=TOKENIZER.vocab_size, eos_token_id=256, **sizes)
    model, spans = T5(config), task()
    loss = spans.loss(model, spans.next_batch())
    loss.backward()
    assert np.isfinite(loss.item())
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_density": 0.0}, "noise_density must be above 0 and below 1"),
        ({"mean_span": 0.5}, "mean_span must be at least 1"),
        ({"context": 2}, "a context of 2 is too short"),
        ({"context": 5000}, "spans, but the tokenizer has only 100 sentinels"),
        ({"context": 1400}, "gives|needs|too short"),
        ({"tokenizer": Tokenizer.byte()}, "needs a tokenizer with <extra_id_0>"),
    ],
)
def test_what_cannot_be_trained_on(options, message):
    with pytest.raises(ValueError, match=message):
        task(**options)
