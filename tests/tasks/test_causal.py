"""Next-token prediction as a task."""

import numpy as np
import pytest

from tinygrad_llm.data.corpora import Corpus
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
