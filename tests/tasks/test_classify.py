"""Labels for texts as a task: batches, windows, weights, scores, what is held out."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import manual_seed
from tinygrad_llm.data.labels import LabelSet
from tinygrad_llm.data.tables import Table
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.bert import BertConfig, BertForSequenceClassification
from tinygrad_llm.models.lstm import LSTMConfig, LSTMForSequenceClassification
from tinygrad_llm.tasks.classify import ClassifyTask, Texts, hold_out, window_probabilities
from tinygrad_llm.train.parallel import cut

GOOD, BAD = ["fine", "lovely", "great"], ["awful", "dull", "poor"]


def texts(count=24, seed=0, name="train", words=3):
    """'the film is fine …': good ones 'pos', bad ones 'neg'."""
    rng = np.random.default_rng(seed)
    found, labels = [], []
    for i in range(count):
        kind = GOOD if i % 2 else BAD
        found.append("the film is " + " ".join(kind[j] for j in rng.integers(3, size=words)))
        labels.append("pos" if i % 2 else "neg")
    return Texts(name, found, None, labels, list(range(1, count + 1)))


TOKENIZER = Tokenizer.wordpiece(" ".join(["the film is", *GOOD, *BAD] * 3), 80)
LABELS = LabelSet(["neg", "pos"])


def task(train=None, validation=None, **options):
    train = texts() if train is None else train
    validation = texts(10, 1, "validation", 4) if validation is None else validation
    settings = {"max_length": 12, "batch_size": 4, "seed": 3, **options}
    return ClassifyTask(train, validation, LABELS, TOKENIZER, **settings)


def bert(**options):
    manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=TOKENIZER.vocab_size,
        intermediate_size=24,
        max_position_embeddings=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **{**sizes, **options},
    )
    return BertForSequenceClassification(config)


def bilstm():
    manual_seed(0)
    sizes = {"n_embd": 8, "n_hidden": 8, "n_layer": 1, "tie_word_embeddings": False}
    vocab = TOKENIZER.vocab_size
    return LSTMForSequenceClassification(LSTMConfig(vocab_size=vocab, bidirectional=True, **sizes))


# --- texts ----------------------------------------------------------------------------------------


def test_texts_come_from_columns_and_empty_ones_are_counted():
    rows = [["1", "good"], ["0", " "], ["0", "bad"]]
    table = Table("t.csv", ["label", "text"], rows, [2, 3, 4])
    found = Texts.of(table, "text", "label")
    assert (found.texts, found.labels, found.lines) == (["good", "bad"], ["1", "0"], [2, 4])
    assert "left out 1 row" in found.notes[0]
    assert "line 3" in found.notes[0]
    with pytest.raises(ValueError, match="must be in different columns"):
        Texts.of(table, "text", "text")
    with pytest.raises(ValueError, match=r"no column 'txet'.*did you mean 'text'"):
        Texts.of(table, "txet", "label")


@given(
    words=st.lists(st.sampled_from("abcdef"), min_size=6, max_size=60),
    share=st.floats(0.05, 0.5),
    seed=st.integers(0, 100),
)
def test_what_is_held_out_is_trained_on_nowhere(words, share, seed):
    labels = [word.upper() for word in words[::-1]]
    data = Texts("data", words, None, labels, list(range(len(words))))
    if all(n == 1 for n in Counter(labels).values()):  # each is needed to train on
        with pytest.raises(ValueError, match="too few"):
            hold_out(data, share, seed)
        return
    try:
        train, held = hold_out(data, share, seed)
    except ValueError:  # such as where all are of one text
        return
    assert not {*train.contents()} & {*held.contents()}
    assert Counter(train.lines) + Counter(held.lines) == Counter(data.lines)
    assert {*held.labels} <= {*train.labels}
    again, _ = hold_out(data, share, seed)
    assert again.lines == train.lines


def test_about_the_share_is_held_out():
    data = Texts("data", [f"text {i}" for i in range(200)], None, ["a", "b"] * 100, [*range(200)])
    train, held = hold_out(data, 0.1, 1)
    assert (len(train), len(held)) == (180, 20)
    other, _ = hold_out(data, 0.1, 2)
    assert other.lines != train.lines


# --- batches --------------------------------------------------------------------------------------


def test_an_epoch_has_every_text_once_and_the_next_another_order():
    ours = task(texts(22))
    assert ours.steps_per_epoch == 6
    epochs = []
    for _ in range(2):
        batches = [ours.next_batch() for _ in range(6)]
        rows = [
            (tuple(row[mask == 1].tolist()), int(label))
            for batch in batches
            for row, mask, label in zip(
                batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
            )
        ]
        epochs.append(rows)
    windows = [
        (tuple(w.ids.tolist()), int(ours.train_ids[w.example])) for w in ours.train_windows.windows
    ]
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(windows)
    assert epochs[0] != epochs[1]


def test_the_position_is_the_state():
    ours, other = task(), task()
    for _ in range(9):
        ours.next_batch()
    other.load_state(ours.state())
    for _ in range(5):
        a, b = ours.next_batch(), other.next_batch()
        assert all(np.array_equal(a[key], b[key]) for key in a)
    with pytest.raises(ValueError, match="have changed since the run began"):
        task(texts(20, 5)).load_state(ours.state())


def test_pairs_are_marked_and_a_model_of_one_segment_sees_none():
    def pairs(name, count):
        one = texts(count, 2, name)
        return Texts(name, one.texts, one.texts[::-1], one.labels, one.lines)

    def batch(segments):
        return task(pairs("a", 8), pairs("b", 4), max_length=24, segments=segments).next_batch()

    assert batch(2)["token_type_ids"].max() == 1
    assert batch(1)["token_type_ids"].max() == 0
    separators = (batch(2)["input_ids"] == TOKENIZER.token_to_id("[SEP]")).sum(axis=1)
    assert (separators == 2).all()
    with pytest.raises(ValueError, match="or neither"):
        task(pairs("a", 8), texts(4))


# --- what a label weighs --------------------------------------------------------------------------


def test_the_loss_is_the_weighted_mean_and_parts_of_a_batch_add_up():
    weights = np.array([0.5, 2.0], np.float32)
    ours, model = task(weights=weights), bert()
    batch = ours.next_batch()
    model.train()
    logits = model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]).numpy()
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    each = -np.log(p[np.arange(4), batch["labels"]]) * weights[batch["labels"]]
    assert ours.loss(model, batch).item() == pytest.approx(each.mean(), rel=1e-5)

    from tinygrad_llm.backend import RandomStream

    parts = cut([batch], 3, ours.size, RandomStream(0))
    total = sum(ours.loss(model, part.batch).item() * part.weight for part in parts)
    assert total == pytest.approx(each.mean(), rel=1e-5)
    model.eval()
    plain = -np.log(p[np.arange(4), batch["labels"]]).mean()
    assert ours.loss(model, batch).item() == pytest.approx(plain, rel=1e-5)


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bert, bilstm])
def test_learning_gets_every_label_right(make):
    from tinygrad_llm.optim import Adam

    ours, model = task(), make()
    optimizer = Adam(model.parameters(), lr=1e-2)
    before = ours.evaluate(model)
    for _ in range(40):
        model.train()
        optimizer.zero_grad()
        ours.loss(model, ours.next_batch()).backward()
        optimizer.step()
    after = ours.evaluate(model)
    assert after["val_loss"] < 0.1 < before["val_loss"]
    assert after["val_accuracy"] == after["val_macro_f1"] == after["val_mcc"] == 1.0
    assert ours.predicted(model) == ours.held_out.labels
    assert "accuracy 1.0000" in str(ours.remark(after))


def test_windows_are_averaged_and_their_text_is_learnt_from_in_each():
    long = texts(6, 1, "validation", 20)
    ours = task(texts(8, 0, "train", 20), long, long="windows")
    assert len(ours.val_windows) > 6
    assert any("read in several windows" in note for note in ours.notes)
    model = bert()
    p = window_probabilities(model, ours.val_windows, ours.collate)
    assert p.shape == (6, 2)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
    one = window_probabilities(model, ours.val_windows, ours.collate, batch_size=1)
    np.testing.assert_allclose(p, one, rtol=1e-4)
    owners = Counter(window.example for window in ours.train_windows.windows)
    rows = sum(len(ours.next_batch()["labels"]) for _ in range(ours.steps_per_epoch))
    assert rows == sum(owners.values()) > 8


def test_notes_say_what_was_cut_and_what_is_in_both():
    both = texts(6, 0, "validation", 20)
    ours = task(texts(12, 0, "train", 20), both)
    said = " ".join(ours.notes)
    assert "12 of 12 texts too long" in said
    assert "6 of 6 texts to validate with are also among those that are trained on" in said


def test_a_label_that_training_never_shows_is_an_error_with_its_line():
    strange = Texts("dev.tsv", ["a", "b"], None, ["pos", "meh"], [1, 2])
    with pytest.raises(ValueError, match=r"dev.tsv has a label .* 'meh' \(1 of 2, the first in l"):
        task(validation=strange)


@pytest.mark.parametrize("metric", ["accuracy", "macro-f1", "mcc", "loss"])
def test_the_score_is_one_of_the_numbers(metric):
    ours = task(metric=metric)
    assert ours.score in ours.evaluate(bert())
