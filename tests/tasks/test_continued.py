"""Going on with training: which tokens are learnt and scored, and what is kept of before."""

import math

import numpy as np
import pytest

from tinygrad_llm import manual_seed
from tinygrad_llm.data.corpora import Corpus
from tinygrad_llm.data.loader import IGNORE_INDEX
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.gpt import GPT, GPTConfig
from tinygrad_llm.tasks.continued import ContinuedTask, Sampling, has_documents

BYTES = Tokenizer.byte()
LONG = Corpus("one", ["abcdefgh " * 40])
MANY = Corpus("many", [f"this is text {i}, and no other" for i in range(150)])


def small(context=8):
    manual_seed(2)
    return GPT(GPTConfig(BYTES.vocab_size, context, n_embd=8, n_layer=1, n_head=2))


def task_of(text, validation=None, **options):
    options = {"context": 8, "batch_size": 4, "sampling": Sampling(5)} | options
    return ContinuedTask(text, BYTES, validation=validation, **options)


@pytest.mark.parametrize("count", [0, 1, 2, 99, 100, 101])
def test_documents_are_held_out_where_some_ten_would_be(count):
    text = Corpus("text", [f"number {i}" for i in range(count)])
    assert has_documents(text, 0.1) == (count >= 100)
    assert has_documents(text, 0.5) == (count >= 20)
    assert not has_documents(text, 0.01)


def test_of_one_text_the_tail_is_scored_but_for_its_first_token():
    task = task_of(LONG)
    ids = BYTES.encode(LONG.text)
    held = int(0.1 * len(ids))
    assert np.array_equal(task.scored_tokens.ids, ids[-held:])
    score = task.scored(small())
    assert (score.tokens, score.bytes) == (held - 1, held - 1)
    assert score.tokens == task.unigram.tokens


def test_of_another_text_every_token_is_scored_the_first_too():
    task = task_of(LONG, Corpus("other", ["héllo", "wörld"]))
    score = task.scored(small())
    size = len("héllowörld".encode())
    assert (score.tokens, score.bytes) == (size + 1, size)  # and the mark between them
    assert task.unigram.tokens == score.tokens
    assert task.name == "other"


def test_no_window_has_more_than_one_document_and_each_target_comes_once():
    task = task_of(MANY, batch_size=3)
    seen = []
    for _ in range(task.steps_per_epoch):
        x, y = task.next_batch()
        assert x.shape == y.shape
        assert (y != IGNORE_INDEX).any(axis=0).all()  # no column for nothing
        for row, wanted in zip(x, y, strict=True):
            size = int((wanted != IGNORE_INDEX).sum())
            assert BYTES.eos_id not in row[1:size]
            seen += wanted[:size].tolist()
    assert sorted(seen) == sorted(task.train_tokens.ids[1:].tolist())
    assert task.epochs.epoch == 1


def test_the_first_validation_is_of_before_and_is_kept():
    task, model = task_of(MANY), small()
    first = task.evaluate(model)
    for parameter in model.parameters():
        parameter.data[...] *= 0.5
    second = task.evaluate(model)
    assert second["val_loss"] != first["val_loss"]
    assert task.before is not None
    assert task.before.loss == first["val_loss"]
    assert first["val_bits_per_byte"] == pytest.approx(task.before.bits_per_byte)
    assert f"(before {first['val_loss']:.4f}, " in str(task.remark(second))

    again = task_of(MANY)
    again.load_state(task.state())
    assert again.report(model).as_dict() == task.report(model).as_dict()
    assert np.array_equal(again.next_batch()[0], task.next_batch()[0])


def test_both_write_from_the_same_beginning_with_the_same_choices():
    task, model = task_of(MANY), small()
    assert MANY.text.count(task.prompt) > 100
    assert task.write(model) == task.write(model)
    assert task.write(model) != task_of(MANY, sampling=Sampling(5, seed=9)).write(model)


def test_a_model_that_is_no_model_any_more_says_so():
    task, model = task_of(MANY), small()
    next(iter(model.parameters())).data[...] = np.nan
    assert math.isnan(task.evaluate(model)["val_loss"])  # and the trainer stops


def test_too_short_texts_are_refused():
    with pytest.raises(ValueError, match="has 1 tokens"):
        task_of(Corpus("a", ["a"]), LONG)
    with pytest.raises(ValueError, match="has 1 tokens"):
        task_of(LONG, Corpus("a", ["a"]))
