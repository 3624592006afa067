"""BERT's pretraining: its batches, its numbers and their baselines, and that it learns."""

import io
import json
import math
from typing import Any

import numpy as np
import pytest

import tinygrad_llm as tg
from tinygrad_llm import no_grad, ops
from tinygrad_llm.backend import RandomStream
from tinygrad_llm.data.corpora import Corpus
from tinygrad_llm.data.loader import IGNORE_INDEX
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.bert import BertConfig, BertForPreTraining
from tinygrad_llm.optim import AdamW, LRScheduler
from tinygrad_llm.optim.schedules import Cosine, Warmup
from tinygrad_llm.tasks.masked import MaskedTask
from tinygrad_llm.train.config import TrainConfig
from tinygrad_llm.train.gradient import Gradient
from tinygrad_llm.train.log import PlainLog
from tinygrad_llm.train.overfit import one_batch
from tinygrad_llm.train.parallel import cut, weighed
from tinygrad_llm.train.run import Run
from tinygrad_llm.train.task import Summed
from tinygrad_llm.train.trainer import Trainer
from tinygrad_llm.train.transfer import uploaded

ANIMALS = ["cats", "dogs", "owls", "bees", "ants", "cows"]
DOES = ["sleep", "run", "fly", "work", "dig", "eat"]


def documents(count, seed=0):
    """Each is about one animal, which always does the same: both guesses can be learnt."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        i = int(rng.integers(len(ANIMALS)))
        sentences = [f"the {ANIMALS[i]} {DOES[i]} a lot." for _ in range(int(rng.integers(4, 9)))]
        found.append(" ".join(s.capitalize() for s in sentences))
    return found


TEXT = Corpus("animals", documents(120))
WORDS = Tokenizer.wordpiece(TEXT.text, 90)
SIZES = {"context": 32, "batch_size": 8, "val_fraction": 0.2}


@pytest.fixture
def task():
    return MaskedTask(TEXT, WORDS, **SIZES, seed=1)


def small():
    config = BertConfig(
        vocab_size=WORDS.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.08,
    )
    return BertForPreTraining(config)


# --- batches --------------------------------------------------------------------------------------


def test_a_batch_is_what_the_model_takes(task):
    batch = task.next_batch()
    b, t = batch.input_ids.shape
    assert (b, t) == (8, batch.attention_mask.sum(axis=1).max())
    assert t <= 32
    assert all(array.dtype == np.int64 for array in batch)
    asked = batch.labels != IGNORE_INDEX
    assert task.size(batch) == asked.sum() > 0
    assert (batch.attention_mask[asked] == 1).all()
    restored = np.where(asked, batch.labels, batch.input_ids)
    assert not (restored == WORDS.token_to_id("[MASK]")).any()
    assert (batch.input_ids == WORDS.token_to_id("[MASK]")).any()
    follows = [len({w for w in WORDS.decode(row).split() if w in ANIMALS}) == 1 for row in restored]
    for same, label in zip(follows, batch.next_sentence_label, strict=True):
        assert same or label == 1  # two animals are two documents
    assert math.isfinite(task.loss(small(), batch).item())


def test_validation_is_the_same_each_time_and_of_other_documents():
    one, two = (MaskedTask(TEXT, WORDS, **SIZES, seed=seed) for seed in (1, 2))
    batches = list(one.validation())
    assert len(batches) == -(-len(one.val_pairs.sentences.ids) // (8 * 32))
    for other in (one, two):
        for a, b in zip(batches, other.validation(), strict=True):
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x, y)
    assert (one.next_batch().input_ids.shape != two.next_batch().input_ids.shape) or (
        one.next_batch().labels != two.next_batch().labels
    ).any()
    total = len(one.train_pairs.sentences.ids) + len(one.val_pairs.sentences.ids)
    assert total == sum(len(WORDS.encode(d)) for d in TEXT.documents)
    few = MaskedTask(TEXT, WORDS, **SIZES, eval_batches=2)
    assert len(list(few.validation())) == 2


def test_training_goes_on_from_its_state(task):
    for _ in range(3):
        task.next_batch()
    state = json.loads(json.dumps(task.state()))
    expected = task.next_batch()
    again = MaskedTask(TEXT, WORDS, **SIZES, seed=1)
    again.load_state(state)
    for a, b in zip(expected, again.next_batch(), strict=True):
        np.testing.assert_array_equal(a, b)
    changed = MaskedTask(Corpus("animals", documents(120, seed=5)), WORDS, **SIZES)
    with pytest.raises(ValueError, match="text of 'animals' has changed since the run began"):
        changed.load_state(state)


def test_another_text_to_validate_on(task):
    other = Corpus("others", documents(9, seed=7))
    with_other = MaskedTask(TEXT, WORDS, **SIZES, validation=other)
    assert len(with_other.val_pairs.sentences.documents) == 10
    assert len(with_other.train_pairs.sentences.documents) == 121
    state = with_other.state()
    changed = MaskedTask(TEXT, WORDS, **SIZES, validation=Corpus("others", documents(9, seed=8)))
    with pytest.raises(ValueError, match="text of 'others' has changed"):
        changed.load_state(state)


def gradient_of(task, parts):
    """(L, every ∂L/∂θ) of the parts, added up."""
    tg.manual_seed(0)
    model = small()
    loss = Gradient(model, task)(parts)
    grads = [p.grad for p in model.parameters()]
    return loss, [None if g is None else g.numpy() for g in grads]


def test_the_pieces_of_a_batch_make_its_loss_and_its_gradient(task):
    batches = [task.next_batch() for _ in range(2)]
    # Pieces with many hidden words and with none: their pairs count all the same.
    for batch in batches:
        batch.labels[:3] = IGNORE_INDEX
    together = task.next_batch()._make(
        np.concatenate([_wide(a, 32), _wide(b, 32)]) for a, b in zip(*batches, strict=True)
    )
    whole, expected = gradient_of(task, weighed([together], task.size, task.sizes))
    tg.manual_seed(0)
    assert whole == pytest.approx(task.loss(small(), together).item(), rel=1e-6)
    for pieces in (
        weighed(batches, task.size, task.sizes),  # accumulated
        cut([together], 3, task.size, RandomStream(0), task.sizes),  # by processes
        cut(batches, 5, task.size, RandomStream(0), task.sizes),
    ):
        assert any(piece.weight == 0.0 for piece in pieces) == (len(pieces) > 3)
        loss, found = gradient_of(task, pieces)
        assert loss == pytest.approx(whole, rel=1e-6)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-7)


def _wide(array, width):
    """(B, T) padded on the right, as a longer batch would be."""
    if array.ndim == 1 or array.shape[1] == width:
        return array
    fill = IGNORE_INDEX if (array == IGNORE_INDEX).any() else 0
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)


def test_the_losses_are_those_of_the_batch_on_a_gpu_too(task, fake_cupy):
    batch, model = task.next_batch(), small()
    expected = [loss.item() for loss in task.losses(model, batch)]
    assert sum(expected) == pytest.approx(task.loss(model, batch).item(), rel=1e-6)
    there = uploaded(MaskedTask(TEXT, WORDS, **SIZES, seed=1), "cuda")
    assert isinstance(there, Summed)
    sent = there.next_batch()
    assert there.sizes(sent) == task.sizes(batch) == (task.size(batch), 8)
    found = [loss.item() for loss in there.losses(model.to("cuda"), sent)]
    assert found == pytest.approx(expected, rel=1e-5)
    alone = one_batch(task)
    assert isinstance(alone, Summed)
    assert (alone.unit, there.unit) == ("hidden words", "hidden words")
    assert alone.sizes(batch) == task.sizes(batch)
    plain: Any = object()  # of one mean
    assert not isinstance(uploaded(plain, "cuda"), Summed)


def test_what_is_there_is_told():
    text = Corpus("mixed", [*documents(30), "Alone.", f"Long {'words ' * 40}. Short one."] * 2)
    task = MaskedTask(text, WORDS, **SIZES)
    assert len(task.notes) == 2
    together = "; ".join(task.notes)
    assert "tokens in" in task.notes[0]
    assert "of them with one sentence, which give no pair" in together
    assert "longer than half of the context in pieces" in together
    assert task.notes[0].startswith("to train on: ")


@pytest.mark.parametrize(
    ("text", "tokenizer", "options", "words"),
    [
        (Corpus("one", ["The cats run. The dogs eat. The cows fly."]), WORDS, {}, "'one' to .*two"),
        (TEXT, Tokenizer.byte(), {}, r"no \[MASK\].*WordPiece"),
        (TEXT, WORDS, {"context": 4}, "no room for two texts"),
        (TEXT, WORDS, {"batch_size": 0}, "batch_size must be at least 1"),
        (TEXT, WORDS, {"mask_probability": 0.0}, "probability must be above 0"),
        (TEXT, WORDS, {"val_fraction": 0.0}, "'animals' to validate on: pairs of sentences need"),
    ],
)
def test_what_cannot_be_trained_on(text, tokenizer, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        MaskedTask(text, tokenizer, **(SIZES | options))
    assert "\n" not in str(caught.value)


# --- numbers --------------------------------------------------------------------------------------


def test_metrics_are_means_over_all_words_and_all_pairs(task):
    tg.manual_seed(0)
    model = small()
    found = task.evaluate(model)
    nats, right, pair_nats, pairs_right, words, pairs = 0.0, 0, 0.0, 0, 0, 0
    with no_grad():
        for batch in task.validation():
            logits = model(batch.input_ids, batch.attention_mask, batch.token_type_ids)
            asked = batch.labels != IGNORE_INDEX
            labels = batch.labels[asked]
            at = logits.prediction_logits.numpy()[asked]
            nats += ops.cross_entropy(at, labels, reduction="sum").item()
            right += (at.argmax(1) == labels).sum()
            words += len(labels)
            follows = logits.seq_relationship_logits.numpy()
            answers = batch.next_sentence_label
            pair_nats += ops.cross_entropy(follows, answers, reduction="sum").item()
            pairs_right += (follows.argmax(1) == answers).sum()
            pairs += len(answers)
    assert found["val_masked_loss"] == pytest.approx(nats / words, rel=1e-4)
    assert found["val_masked_accuracy"] == pytest.approx(right / words)
    assert found["val_next_loss"] == pytest.approx(pair_nats / pairs, rel=1e-4)
    assert found["val_next_accuracy"] == pytest.approx(pairs_right / pairs)
    assert found["val_loss"] == found["val_masked_loss"] + found["val_next_loss"]
    assert not model.training
    assert all(type(value) is float for value in found.values())


def test_baselines_are_those_of_the_counts(task):
    found = task.baselines
    counts = np.zeros(WORDS.vocab_size)
    for i in task.train_pairs.sentences.ids.tolist():
        counts[i] += task.masking.ordinary[i]
    counts = counts + task.masking.ordinary
    labels = np.concatenate([b.labels[b.labels != IGNORE_INDEX] for b in task.validation()])
    expected = -np.log(counts[labels] / counts.sum()).mean()
    assert found["val_unigram_loss"] == pytest.approx(expected)
    assert found["val_majority_masked"] == pytest.approx((labels == counts.argmax()).mean())
    answers = np.concatenate([b.next_sentence_label for b in task.validation()])
    assert found["val_majority_next"] == max(answers.mean(), 1 - answers.mean()) >= 0.5
    assert found["val_unigram_loss"] < math.log(WORDS.vocab_size)


def test_a_loss_that_sits_at_the_unigram_entropy_is_remarked_once(task):
    unigram = task.baselines["val_unigram_loss"]

    def at(factor):
        return task.remark({"val_masked_loss": factor * unigram, "val_unigram_loss": unigram})

    assert [at(f) is not None for f in (1.5, 1.01, 1.0, 0.9, 1.02, 0.99)] == [False] * 6
    said = at(0.98)
    assert said is not None
    assert "has sat at the unigram entropy" in said
    assert "\n" not in said
    assert at(1.0) is None
    assert at(0.5) is None
    assert at(math.nan) is None


# --- learning -------------------------------------------------------------------------------------


def test_it_learns_both_guesses(tmp_path, monkeypatch):
    task = MaskedTask(TEXT, WORDS, context=16, batch_size=32, val_fraction=0.2, eval_batches=8)
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)
    tg.manual_seed(1)
    model = small()
    first = task.evaluate(model)
    config = TrainConfig(
        steps=250, batch_size=32, context=16, eval_every=125, checkpoint_every=250, processes=1
    )
    optimizer = AdamW(model.parameters(), lr=4e-3)
    schedule = LRScheduler(optimizer, Warmup(10, Cosine(240, end=0.3)))
    run = Run.new(tmp_path / "run")
    run.begin("")
    Trainer(model, optimizer, schedule, task, config, run, PlainLog(io.StringIO())).fit()
    last = task.evaluate(model)
    assert last["val_masked_accuracy"] > first["val_masked_accuracy"] + 0.2
    assert last["val_masked_accuracy"] > last["val_majority_masked"] + 0.4
    assert last["val_masked_loss"] < 0.4 * last["val_unigram_loss"]
    assert last["val_next_accuracy"] > last["val_majority_next"] + 0.1
    saved = run.checkpoint()
    assert saved is not None
    again = task.evaluate(BertForPreTraining.from_pretrained(saved))
    assert again["val_masked_loss"] == pytest.approx(last["val_masked_loss"], rel=1e-5)
    assert Tokenizer.from_file(saved).sha256 == WORDS.sha256
    assert (saved / "vocab.txt").exists()
