"""Next-token prediction as a task."""

import json
from typing import Any

import numpy as np
import pytest

from tinygrad_llm.data.corpora import Corpus
from tinygrad_llm.data.loader import IGNORE_INDEX
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.gpt import GPT, GPTConfig
from tinygrad_llm.tasks.causal import CausalTask

TEXT = "".join(chr(97 + i % 26) for i in range(1000))


def task(**options):
    settings = {"context": 8, "batch_size": 4, "val_fraction": 0.1, "seed": 1, **options}
    return CausalTask(Corpus("abc", [TEXT]), Tokenizer.byte(), **settings)


def test_the_target_is_the_next_token():
    x, y = task().next_batch()
    assert x.shape == y.shape == (4, 8)
    np.testing.assert_array_equal(y, (x - 97 + 1) % 26 + 97)


def test_the_loss_is_the_mean_cross_entropy():
    model = GPT(GPTConfig(vocab_size=257, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    causal = task()
    x, y = causal.next_batch()
    logits = model(_tensor(x)).numpy().astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, y[..., None], -1).mean()
    assert causal.loss(model, (x, y)).item() == pytest.approx(expected, rel=1e-5)


def _tensor(ids):
    from tinygrad_llm import Tensor

    return Tensor(ids)


def test_validation_counts_every_held_out_token_once_and_never_changes():
    causal = task()
    batches = list(causal.validation())
    assert sum(causal.size(b) for b in batches) == 99  # the first of 100 has nothing before it
    for one, two in zip(batches, causal.validation(), strict=True):
        np.testing.assert_array_equal(one, two)
    assert len(list(task(eval_batches=2).validation())) == 2


def test_going_on_from_a_state_gives_the_batches_that_would_have_come():
    one, two = task(), task()
    for _ in range(3):
        one.next_batch()
    two.load_state(one.state())
    np.testing.assert_array_equal(one.next_batch(), two.next_batch())


def test_another_text_is_refused():
    state = task().state()
    with pytest.raises(ValueError, match="text of 'abc' has changed"):
        task().load_state({**state, "sha256": "0" * 64})


# --- orders, documents, sides ---------------------------------------------------------------------

MANY = Corpus("many", [f"{i}: {'ab' * (i % 9)}." for i in range(60)])


def many(**options):
    settings = {"context": 8, "batch_size": 4, "val_fraction": 0.2, "seed": 1, **options}
    return CausalTask(MANY, Tokenizer.byte(), **settings)


def targets(batches):
    return np.concatenate([y[y != IGNORE_INDEX] for _, y in batches]).tolist()


def epoch(causal):
    """The batches of the first epoch: all rows that belong to it, and no more."""
    windows = causal.train.windows
    rows = [next(causal.train) for _ in range(-(-len(windows) // 4))]
    x, y = (np.concatenate(part)[: len(windows)] for part in zip(*rows, strict=True))
    return [(x, y)]


@pytest.mark.parametrize("val_by", ["tail", "document"])
@pytest.mark.parametrize("documents", ["packed", "separate"])
@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_an_epoch_has_every_token_to_train_on_once(order, documents, val_by):
    causal = many(order=order, documents=documents, val_by=val_by)
    expected = causal.train_tokens.ids[1:].tolist()
    found = targets(epoch(causal))
    assert sorted(found) == sorted(expected)
    assert (found == expected) == (order == "sequential")
    assert targets(causal.validation()) == causal.val_tokens.ids[1:].tolist()


@pytest.mark.parametrize("documents", ["packed", "separate"])
@pytest.mark.parametrize("order", ["random", "sequential", "shuffled"])
def test_every_order_goes_on_from_its_state(order, documents):
    options = {"order": order, "documents": documents, "val_by": "document"}
    one, two = many(**options), many(**options)
    for _ in range(70):  # into another epoch
        one.next_batch()
    two.load_state(json.loads(json.dumps(one.state())))
    for _ in range(5):
        np.testing.assert_array_equal(one.next_batch(), two.next_batch())


def test_separate_windows_hold_one_document():
    causal = many(documents="separate", order="random")
    for _ in range(20):
        x, _ = causal.next_batch()
        assert not (x[:, 1:] == Tokenizer.byte().eos_id).any()  # a mark only begins a window
    assert any((x == 256).any() for x, _ in many().validation())


def test_sides_by_document_share_none():
    causal = many(val_by="document")
    train, held_out = (
        set(Tokenizer.byte().decode(tokens.ids.astype(int)).split("<|endoftext|>"))
        for tokens in (causal.train_tokens, causal.val_tokens)
    )
    assert train | held_out == set(MANY.documents)
    assert not train & held_out
    assert 4 <= len(held_out) <= 20


def test_another_text_to_validate_on_leaves_all_of_the_first_to_train_on():
    other = Corpus("other", ["something else entirely"])
    causal = many(validation=other)
    assert len(causal.train_tokens) == len(Tokenizer.byte().encode(MANY.text))
    assert targets(causal.validation()) == [*b"omething else entirely"]
    assert causal.val_bytes == 22
    state = causal.state()
    causal.load_state(state)
    changed = Corpus("other", ["something else entire"])
    with pytest.raises(ValueError, match="text of 'other' has changed since the run began"):
        many(validation=changed).load_state(state)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_val_bytes_are_those_of_the_text_held_out(kind):
    text = "中文 and é 🎉. " * 40
    corpus = Corpus("it", [text, text[:100]])
    tokenizer = {
        "byte": Tokenizer.byte,
        "char": lambda: Tokenizer.char(text),
        "bpe": lambda: Tokenizer.bpe(text, 280),
    }[kind]()
    causal = CausalTask(corpus, tokenizer, context=8, batch_size=4, val_fraction=0.5)
    ids = causal.val_tokens.ids.astype(int)
    pieces = [tokenizer.piece(i) for i in ids[1:] if i != tokenizer.eos_id]
    assert causal.val_bytes == sum(len(p if isinstance(p, bytes) else p.encode()) for p in pieces)
    words = Tokenizer.wordpiece("some words to learn from", 60)
    assert (
        CausalTask(Corpus("it", ["words " * 50]), words, context=4, batch_size=1).val_bytes is None
    )


def test_a_side_that_is_too_small_is_told():
    byte = Tokenizer.byte()
    one = Corpus("one", ["a single document of some length"])
    options: dict[str, Any] = {"context": 8, "batch_size": 4}
    with pytest.raises(ValueError, match=r"by document holds out (none|all) of the 1 documents"):
        CausalTask(one, byte, val_by="document", **options)
    with pytest.raises(ValueError, match=r"leaves 1 for validation, which needs 2"):
        CausalTask(one, byte, val_fraction=0.05, **options)
    with pytest.raises(ValueError, match=r"has 3 tokens, but a context of 8 needs 9: .* shorter"):
        CausalTask(Corpus("s", ["abc"]), byte, validation=one, **options)
    with pytest.raises(ValueError, match="to validate on has 1 tokens, which is too short"):
        CausalTask(one, byte, validation=Corpus("s", ["a"]), **options)
    short = CausalTask(
        Corpus("s", ["abc", "de"]), byte, validation=one, documents="separate", **options
    )
    assert short.size(short.next_batch()) > 0
