"""Several tasks at once: whose turn it is, how losses weigh, what is scored, where it goes on."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import manual_seed, no_grad
from tinygrad_llm.backend import RandomStream
from tinygrad_llm.data.conll import Sentences
from tinygrad_llm.data.labels import LabelSet
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.bert import BertConfig
from tinygrad_llm.models.multitask import Head, MultiTask, MultiTaskConfig
from tinygrad_llm.optim import AdamW, Constant, LRScheduler
from tinygrad_llm.tasks.classify import ClassifyTask, Texts
from tinygrad_llm.tasks.multi import Of, SeveralTasks, shares
from tinygrad_llm.tasks.tag import TagTask, tagger_config
from tinygrad_llm.train.config import TrainConfig
from tinygrad_llm.train.log import QuietLog
from tinygrad_llm.train.parallel import cut
from tinygrad_llm.train.run import Run
from tinygrad_llm.train.trainer import Measured, Trainer
from tinygrad_llm.train.transfer import UploadedTask, with_arrays

GOOD, BAD = ["fine", "lovely", "great"], ["awful", "dull", "poor"]
NAMES, PLACES = ["Ada", "Bob", "Cleo"], ["Rome", "Oslo", "Lima"]


def texts(count: int, seed: int = 0, name: str = "texts") -> Texts:
    """'the film is fine …': good ones 'pos', bad ones 'neg'."""
    rng = np.random.default_rng(seed)
    kinds = [GOOD if i % 2 else BAD for i in range(count)]
    found = ["the film is " + " ".join(k[j] for j in rng.integers(3, size=2)) for k in kinds]
    labels = ["pos" if i % 2 else "neg" for i in range(count)]
    return Texts(name, found, None, labels, list(range(1, count + 1)))


def sentences(count: int, seed: int = 0, name: str = "sentences") -> Sentences:
    """'Ada went to Rome .' and, every second time, 'so Ada went to Rome .'"""
    rng = np.random.default_rng(seed)
    words, tags = [], []
    for i in range(count):
        extra = ["so"] * (i % 2)
        words.append([*extra, NAMES[rng.integers(3)], "went", "to", PLACES[rng.integers(3)], "."])
        tags.append(["O"] * (i % 2) + ["B-PER", "O", "O", "B-LOC", "O"])
    return Sentences(name, words, tags, list(range(count)), list(range(count)))


TOKENIZER = Tokenizer.wordpiece(
    " ".join(["the film is so went to .", *GOOD, *BAD, *NAMES, *PLACES] * 3), 120
)
BERT = BertConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=16,
)
LABELS = LabelSet(["neg", "pos"])
TRAIN_TEXTS, TRAIN_SENTENCES = texts(22), sentences(13)
TAGGER = tagger_config(
    TRAIN_SENTENCES,
    bert=BERT,
    hidden_size=8,
    character_size=4,
    character_features=4,
    shape_size=3,
    dropout=0.1,
)


def model(dropout: float = 0.1) -> Any:
    manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    bert = BertConfig(**{**vars(BERT), **rates})
    tagger = type(TAGGER)(**{**vars(TAGGER), "bert": bert, "dropout": dropout})
    labelled = BertConfig(**{**vars(bert), "id2label": {0: "neg", 1: "pos"}})
    heads = {
        "reviews": Head("BertForSequenceClassification", labelled),
        "names": Head("Tagger", tagger),
    }
    return MultiTask(MultiTaskConfig(bert, heads))


def task(train: Texts = TRAIN_TEXTS, **options: Any) -> SeveralTasks:
    reviews = ClassifyTask(
        train, texts(8, 1, "held out"), LABELS, TOKENIZER, max_length=12, batch_size=4, seed=3
    )
    held_out = sentences(6, 1, "held out")
    names = TagTask(TAGGER, TRAIN_SENTENCES, held_out, TOKENIZER, batch_size=3, seed=3)
    return SeveralTasks({"reviews": reviews, "names": names}, TOKENIZER, seed=5, **options)


def the(batch: Any) -> tuple[Of, dict[str, np.ndarray]]:
    return next(iter(batch.items()))


def trainer(folder: Any, learnt: Any, steps: int, **options: Any) -> Any:
    its = model()
    optimizer = AdamW(its.parameters(), lr=5e-3)
    config = TrainConfig(steps=steps, warmup=1, min_lr=0.0, eval_every=100, **options)
    run = Run.new(folder)
    run.begin("")
    return Trainer(
        its, optimizer, LRScheduler(optimizer, Constant()), learnt, config, run, QuietLog()
    )


# --- whose turn it is -----------------------------------------------------------------------------


def test_an_epoch_has_each_batch_of_each_task_once():
    ours, reviews, names = task(), task().tasks["reviews"], task().tasks["names"]
    assert ours.steps_per_epoch == reviews.steps_per_epoch + names.steps_per_epoch == 6 + 5
    for _ in range(2):
        drawn = [the(ours.next_batch()) for _ in range(ours.steps_per_epoch)]
        assert Counter(of.task for of, _ in drawn) == {"reviews": 6, "names": 5}
        for alone, name in ((reviews, "reviews"), (names, "names")):
            theirs = [alone.next_batch() for _ in range(alone.steps_per_epoch)]
            own = [arrays for of, arrays in drawn if of.task == name]
            for a, b in zip(own, theirs, strict=True):
                np.testing.assert_array_equal(a["input_ids"], b["input_ids"])


def test_the_order_is_another_in_every_epoch_and_the_same_for_a_seed():
    def order(ours):
        return [the(ours.next_batch())[0].task for _ in range(ours.steps_per_epoch)]

    ours, again = task(), task()
    first, second = order(ours), order(ours)
    assert first != second
    assert (order(again), order(again)) == (first, second)
    assert first not in (sorted(first), sorted(first, reverse=True))


@given(st.lists(st.integers(1, 500), min_size=1, max_size=5), st.floats(1.0, 20.0))
def test_a_temperature_brings_shares_nearer_to_each_other(batches, temperature):
    found = shares(batches, temperature)
    assert min(found) >= 1
    assert abs(sum(found) - sum(batches)) <= len(batches)
    assert max(found) - min(found) <= max(batches) - min(batches) + 1
    assert [a for _, a in sorted(zip(batches, found, strict=True))] == sorted(found)
    assert shares(batches) == batches


def test_shares_and_an_epoch_with_a_temperature():
    assert shares([90, 10], 2.0) == [75, 25]
    ours = task(texts(26), temperature=1e9)
    assert ours.shares == [6, 6]  # as many of each, whatever their size
    drawn = Counter(the(ours.next_batch())[0].task for _ in range(12))
    assert drawn == {"reviews": 6, "names": 6}


# --- losses ---------------------------------------------------------------------------------------


def test_a_loss_is_that_of_the_task_on_its_head_times_its_weight():
    ours, both = task(weights={"names": 0.25}), model().eval()
    for batch in (ours.next_batch() for _ in range(6)):
        of, arrays = the(batch)
        with no_grad():
            alone = ours.tasks[of.task].loss(both.heads[of.task], arrays).item()
            expected = alone * (0.25 if of.task == "names" else 1.0)
            np.testing.assert_allclose(ours.loss(both, batch).item(), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["reviews", "names"])
def test_parts_of_a_batch_add_up_to_it(name):
    ours, both = task(), model(0.0)
    drawn = (ours.next_batch() for _ in range(20))
    rows = {"reviews": 4, "names": 3}[name]
    batch = next(b for b in drawn if the(b)[0][:2] == (name, rows))
    loss = ours.loss(both, batch)
    loss.backward()
    whole = {n: p.grad.numpy().copy() for n, p in both.named_parameters() if p.grad is not None}
    both.zero_grad()
    parts = cut([batch], 2, ours.size, RandomStream(1))
    assert len(parts) == 2
    assert sum(ours.size(part.batch) for part in parts) == ours.size(batch)
    total = 0.0
    for part in parts:
        scaled = ours.loss(both, part.batch) * part.weight
        scaled.backward()
        total += scaled.item()
    np.testing.assert_allclose(total, loss.item(), rtol=1e-5)
    for n, p in both.named_parameters():
        if n in whole:
            assert p.grad is not None
            np.testing.assert_allclose(p.grad.numpy(), whole[n], atol=2e-6)


def test_the_name_of_the_task_goes_along_where_arrays_are_replaced():
    ours = task()
    batch = ours.next_batch()
    copied = with_arrays(batch, np.copy)
    assert list(copied) == list(batch)
    both = model().eval()
    assert ours.loss(both, copied).item() == ours.loss(both, batch).item()


def test_batches_are_uploaded_and_drawn_ahead_as_those_of_one_task(fake_cupy):
    ours, theirs = UploadedTask(task(), "cuda"), task()
    for _ in range(13):  # into the second epoch
        ours.draw_ahead()
        there: Any = the(ours.next_batch().on_gpu())
        of, host = the(theirs.next_batch())
        assert there[0] == of
        np.testing.assert_array_equal(there[1]["input_ids"].get(), host["input_ids"])
        assert ours.state() == theirs.state()


def test_a_head_whose_turn_it_is_not_stays_as_it_is(tmp_path):
    ours = task()
    teacher = trainer(tmp_path / "run", ours, 1)
    first = the(task().next_batch())[0].task
    before = {n: p.numpy().copy() for n, p in teacher.model.named_parameters()}
    teacher.train_step()
    teacher.run.close()
    for name, parameter in teacher.model.named_parameters():
        changed = not np.array_equal(parameter.numpy(), before[name])
        if name.startswith("heads."):
            assert changed <= name.startswith(f"heads.{first}."), name
        elif "encoder" in name and name.endswith("dense.weight"):
            assert changed, name


# --- scores ---------------------------------------------------------------------------------------


def test_each_task_is_scored_and_their_mean():
    ours, both = task(weights={"reviews": 3.0}), model()
    assert isinstance(ours, Measured)
    found = ours.evaluate(both)
    alone = {name: its.evaluate(both.heads[name]) for name, its in ours.tasks.items()}
    for name, scores in alone.items():
        for key, value in scores.items():
            assert found[f"val_{name}_{key.removeprefix('val_')}"] == value
    mean = (alone["reviews"]["val_accuracy"] + alone["names"]["val_f1"]) / 2
    np.testing.assert_allclose(found["val_mean"], mean)
    loss = (3 * alone["reviews"]["val_loss"] + alone["names"]["val_loss"]) / 4
    np.testing.assert_allclose(found["val_loss"], loss)
    assert ours.score == "val_mean"
    said = ours.remark(found) or ""
    assert "reviews: accuracy" in said
    assert "names: entity F1" in said
    assert f"mean {mean:.4f}" in said
    json.dumps(found)


def test_the_validation_is_that_of_every_task():
    ours = task()
    of = [the(batch)[0] for batch in ours.validation()]
    assert sum(o.rows for o in of if o.task == "reviews") == 8
    assert sum(o.targets for o in of if o.task == "names") == sum(5 + i % 2 for i in range(6))


def test_notes_say_whose_they_are():
    ours = task()
    assert ours.notes
    assert all(note.startswith(("reviews: ", "names: ")) for note in ours.notes)


def test_two_easy_tasks_are_both_learnt(tmp_path):
    ours = task(texts(40))
    teacher = trainer(tmp_path / "run", ours, 8 * ours.steps_per_epoch)
    teacher.fit()
    found = ours.evaluate(teacher.model)
    assert found["val_reviews_accuracy"] == 1.0
    assert found["val_names_f1"] == 1.0
    assert found["val_mean"] == 1.0


# --- going on -------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_one_that_was_not_stopped(tmp_path):
    straight = trainer(tmp_path / "straight", task(), 9)
    straight.fit()
    stopped = trainer(tmp_path / "stopped", task(), 4)
    stopped.fit()
    folder = stopped.run.checkpoint("latest")
    assert folder is not None
    run = Run.open(tmp_path / "stopped")
    its = MultiTask.from_pretrained(folder)
    optimizer = AdamW(its.parameters(), lr=5e-3)
    config = TrainConfig(steps=9, warmup=1, min_lr=0.0, eval_every=100)
    schedule = LRScheduler(optimizer, Constant())
    resumed = Trainer(its, optimizer, schedule, task(), config, run, QuietLog())
    resumed.resume(folder)
    resumed.fit()
    theirs = dict(straight.model.named_parameters())
    for name, parameter in its.named_parameters():
        np.testing.assert_array_equal(parameter.numpy(), theirs[name].numpy(), err_msg=name)


def test_a_state_is_exact_and_of_the_same_mixture():
    ours = task()
    for _ in range(7):
        ours.next_batch()
    state = json.loads(json.dumps(ours.state()))
    again = task()
    again.load_state(state)
    for _ in range(15):
        (of, arrays), (theirs, others) = the(ours.next_batch()), the(again.next_batch())
        assert of == theirs
        np.testing.assert_array_equal(arrays["input_ids"], others["input_ids"])
    with pytest.raises(ValueError, match="the task names had 5 batches in an epoch and the weight"):
        task(weights={"names": 2.0}).load_state(state)
    with pytest.raises(ValueError, match=r"the texts of texts have changed since the run began"):
        task(texts(22, seed=9)).load_state(state)
    fewer = SeveralTasks({"names": task().tasks["names"]}, TOKENIZER)
    with pytest.raises(ValueError, match="began with the tasks reviews, names, and now"):
        fewer.load_state(state)


def test_the_tokenizer_and_how_each_task_reads_are_kept(tmp_path):
    about = {"task": "multi", "tasks": {"reviews": {"task": "classify"}}}
    task(about=about).save(tmp_path)
    assert json.loads((tmp_path / "task.json").read_text()) == about
    assert Tokenizer.from_file(tmp_path).vocab_size == TOKENIZER.vocab_size


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"weights": {"names": 0.0}}, "weights are numbers above 0"),
        ({"weights": {"nams": 1.0}}, "of reviews, names, got nams"),
        ({"temperature": 0.5}, "temperature must be a number from 1, got 0.5"),
    ],
)
def test_what_makes_no_mixture_is_said(options, why):
    with pytest.raises(ValueError, match=why):
        task(**options)
    with pytest.raises(ValueError, match="at least one task"):
        SeveralTasks({}, TOKENIZER)
