"""Tagging as a task: rows, batches, scores."""

import io
import json
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tinygrad_llm import manual_seed
from tinygrad_llm.backend import RandomStream
from tinygrad_llm.data.conll import Sentences
from tinygrad_llm.data.labels import Scheme, convert
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.metrics.entities import entity_scores
from tinygrad_llm.models import auto
from tinygrad_llm.models.bert import BertConfig
from tinygrad_llm.models.tagger import Tagger
from tinygrad_llm.optim import Adam, AdamW, Constant, LRScheduler
from tinygrad_llm.tasks.tag import Collator, Rows, TagTask, documents_of, predict, tagger_config
from tinygrad_llm.train.config import TrainConfig
from tinygrad_llm.train.log import PlainLog
from tinygrad_llm.train.parallel import cut
from tinygrad_llm.train.run import Run
from tinygrad_llm.train.trainer import Trainer

NAMES = ["Ada", "Bob", "Cleo", "Dan", "Eva"]
PLACES = ["Rome", "Oslo", "Lima", "New York City"]


def sentences(count: int, seed: int = 0, name: str = "train", scheme: Scheme = "BIO") -> Any:
    """'Ada Smith went to New York City .', with documents of five sentences."""
    rng = np.random.default_rng(seed)
    words, tags = [], []
    for _ in range(count):
        who, where = NAMES[rng.integers(5)], PLACES[rng.integers(4)].split()
        second = ["Smith"] * int(rng.integers(2))
        words.append([who, *second, "went", "to", *where, "."])
        types = ["PER"] * (1 + len(second)), ["LOC"] * len(where)
        inside = [[f"I-{kind}" for kind in kinds] for kinds in types]
        tags.append(convert([*inside[0], "O", "O", *inside[1], "O"], scheme))
    documents = [i // 5 for i in range(count)]
    return Sentences(name, words, tags, list(range(count)), documents)


SIZES = {"word_size": 12, "character_size": 4, "character_features": 6, "shape_size": 3}
OPTIONS = {**SIZES, "hidden_size": 16, "dropout": 0.1}
TEXT = [" ".join(words) for words in sentences(40).words]


def task(count=40, config=None, train=None, **options):
    train = sentences(count) if train is None else train
    config = tagger_config(train, **OPTIONS) if config is None else config
    settings = {"batch_size": 4, "seed": 3, **options}
    return TagTask(config, train, sentences(12, 1, "validation"), **settings)


def bert_parts(positions: int = 64, **options: Any) -> Any:
    """A tokenizer, and the config of a tagger on a small BERT."""
    tokenizer = Tokenizer.wordpiece(TEXT, 60)
    bert = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=positions,
    )
    return tokenizer, tagger_config(sentences(40), bert=bert, **options)


def tagger(config):
    manual_seed(0)
    return Tagger(config)


# --- rows -----------------------------------------------------------------------------------------


def check_rows(rows, words):
    """Every word is scored once, and stands where its row says."""
    counts = Counter(
        (part.sentence, j)
        for row in rows.rows
        for part in row.parts
        for j in range(part.start, part.stop)
    )
    assert counts == {(i, j): 1 for i, row in enumerate(words) for j in range(len(row))}
    for row in rows.rows:
        for part in row.parts:
            there = row.words[part.at : part.at + part.stop - part.start]
            assert there == words[part.sentence][part.start : part.stop]
        if len(row.pieces):
            assert row.owners[row.first].tolist() == list(range(1, len(row.words) + 1))
            assert len(row.owners) == len(row.pieces)


@pytest.mark.parametrize(
    ("positions", "row_pieces", "context"),
    [(64, 0, 0), (64, 30, 0), (64, 30, 8), (64, 1000, 1000), (8, 30, 8), (4, 0, 2), (3, 0, 0)],
)
def test_every_word_is_scored_once_however_rows_are_packed(positions, row_pieces, context):
    options = {"row_pieces": row_pieces, "context_pieces": context}
    tokenizer, config = bert_parts(positions, **options)
    data = sentences(17)
    data.words[4] = data.words[4] * 5  # longer than most rows
    rows = Rows(config, tokenizer, data.words, data.documents)
    check_rows(rows, data.words)
    assert max(len(row.pieces) for row in rows.rows) <= positions
    for row in rows.rows:
        assert row.pieces[0] == tokenizer.token_to_id("[CLS]")
        assert row.pieces[-1] == tokenizer.token_to_id("[SEP]")


def test_context_is_of_the_same_document():
    tokenizer, config = bert_parts(row_pieces=30, context_pieces=10)
    data = sentences(20)
    rows = Rows(config, tokenizer, data.words, data.documents)
    for row in rows.rows:
        documents = {data.documents[part.sentence] for part in row.parts}
        assert len(documents) == 1
        first, last = row.parts[0], row.parts[-1]
        before = [w for i in range(first.sentence) for w in data.words[i]]
        assert row.words[: first.at] == before[len(before) - first.at :]
        if data.documents[first.sentence] != data.documents[max(0, first.sentence - 1)]:
            assert first.at == 0
        assert [b.sentence - a.sentence for a, b in pairwise(row.parts)] == [1] * (
            len(row.parts) - 1
        )
        assert last.at + last.stop <= len(row.words)
    assert any(row.parts[0].at for row in rows.rows)
    assert any(len(row.parts) > 1 for row in rows.rows)
    alone = Rows(config, tokenizer, data.words, None)  # no documents: every sentence by itself
    assert [len(row.parts) for row in alone.rows] == [1] * 20
    assert not any(row.parts[0].at for row in alone.rows)


def test_sentences_of_no_known_document_are_strangers_to_one_another():
    tokenizer, config = bert_parts(row_pieces=30, context_pieces=10)
    data = sentences(20)
    with_documents = task(config=config, tokenizer=tokenizer)
    assert any(len(row.parts) > 1 for row in with_documents.train_rows.rows)
    data.documents[:] = [0] * 20
    assert documents_of(data) is None
    without = task(config=config, tokenizer=tokenizer, train=data)
    assert [len(row.parts) for row in without.train_rows.rows] == [1] * 20


def test_pieces_are_those_of_the_words():
    tokenizer, config = bert_parts(row_pieces=20, context_pieces=6)
    data = sentences(10)
    for row in Rows(config, tokenizer, data.words, data.documents).rows:
        expected = tokenizer.encode(" ".join(row.words)).tolist()
        assert row.pieces[1:-1].tolist() == expected


def test_values_of_rows_become_those_of_sentences():
    tokenizer, config = bert_parts(positions=9, row_pieces=9, context_pieces=4)
    data = sentences(12)
    rows = Rows(config, tokenizer, data.words, data.documents)
    values = [np.array([[hash(word) % 1000.0] for word in row.words]) for row in rows.rows]
    merged = rows.merge(values)
    for words, found in zip(data.words, merged, strict=True):
        assert found[:, 0].tolist() == [hash(word) % 1000.0 for word in words]
    with pytest.raises(ValueError, match="expected values of"):
        rows.merge(values[:-1])


def test_sentences_of_zero_length_have_no_row_and_no_tags():
    config = tagger_config(sentences(40), **OPTIONS)
    words = [[], ["Ada"], []]
    tags, _ = predict(tagger(config), None, words)
    assert [len(found) for found in tags] == [0, 1, 0]
    tokenizer, on_bert = bert_parts()
    tags, notes = predict(tagger(on_bert), tokenizer, words)
    assert [len(found) for found in tags] == [0, 1, 0]
    assert "2 sentences of zero length" in notes[0]


def test_words_of_which_the_characters_are_cut_are_counted():
    words = [["a" * 32, "b" * 33]]
    notes = Rows(tagger_config(sentences(5)), None, words).notes
    assert len(notes) == 1
    assert notes[0].startswith("1 word of more than 32 characters: the character encoder reads")
    assert Rows(tagger_config(sentences(5), character_encoder="none"), None, words).notes == []


def test_a_tokenizer_belongs_to_a_checkpoint():
    tokenizer, config = bert_parts()
    with pytest.raises(ValueError, match="the encoder 'bert' and none"):
        Rows(config, None, [["a"]])
    other = Tokenizer.wordpiece(TEXT, config.bert.vocab_size + 1)
    with pytest.raises(ValueError, match="the tokenizer of another model"):
        Rows(config, other, [["a"]])
    with pytest.raises(ValueError, match="the encoder 'bilstm' and one"):
        Rows(tagger_config(sentences(5)), tokenizer, [["a"]])


# --- batches --------------------------------------------------------------------------------------


def test_an_epoch_has_every_word_once_in_another_order_each_time():
    tagging = task()
    orders = []
    for _ in range(2):
        batches = [tagging.next_batch() for _ in range(tagging.steps_per_epoch)]
        assert sum(map(tagging.size, batches)) == tagging.train.tokens
        orders.append([batch["words"].tolist() for batch in batches])
    assert tagging.epoch == 2
    assert orders[0] != orders[1]
    again = task()
    assert [again.next_batch()["words"].tolist() for _ in orders[0]] == orders[0]


def test_without_shuffling_every_epoch_is_the_same():
    tagging = task(shuffle=False)
    steps = tagging.steps_per_epoch
    batches = [tagging.next_batch()["words"].tolist() for _ in range(2 * steps)]
    assert batches[:steps] == batches[steps:]


def test_rows_of_a_batch_are_of_similar_length():
    tagging = task(400)
    batches = [tagging.next_batch() for _ in range(tagging.steps_per_epoch)]
    real = sum(int(batch["lengths"].sum()) for batch in batches)
    assert real / sum(batch["words"].size for batch in batches) > 0.95


def test_labels_stand_on_scored_words_only():
    tokenizer, config = bert_parts(row_pieces=10, context_pieces=8)
    tagging = task(config=config, tokenizer=tokenizer)
    batch = tagging.next_batch()
    scored = batch["sentences"] >= 0
    assert ((batch["labels"] >= 0) == scored).all()
    inside = np.arange(scored.shape[1]) < batch["lengths"][:, None]
    assert (inside & ~scored).any()  # context
    assert not (scored & ~inside).any()
    assert tagging.size(batch) == scored.sum()


def test_going_on_from_a_state_gives_the_batches_that_would_have_come():
    one, two = task(), task()
    for _ in range(13):  # in the second epoch
        one.next_batch()
    two.load_state(json.loads(json.dumps(one.state())))
    for _ in range(9):
        a, b = one.next_batch(), two.next_batch()
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_other_sentences_are_refused_when_going_on():
    with pytest.raises(ValueError, match="sentences of train have changed since the run began"):
        task().load_state(task(39).state())


def test_an_entity_that_two_rows_divide_is_well_formed_in_both():
    tokenizer, config = bert_parts(positions=5)
    words, tags = ["Ada"] * 12, ["B-PER"] + ["I-PER"] * 11
    rows = Rows(config, tokenizer, [words])
    assert len(rows.rows) > 2
    batch = Collator(config)(rows.rows, [tags])
    begins = config.labels.index("B-PER")
    for labels, sentences_of_row in zip(batch["labels"], batch["sentences"], strict=True):
        scored = labels[sentences_of_row >= 0]
        assert scored[0] == begins
        assert (scored[1:] != begins).all()
    assert np.isfinite(tagger(config).loss(batch).item())


# --- labels and schemes ---------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["IOB1", "BIO", "BIOES", "BILOU"])
@pytest.mark.parametrize("learnt", ["BIO", "BIOES"])
def test_tags_are_learnt_in_one_scheme_and_predicted_in_that_of_the_data(written, learnt):
    train = sentences(30, scheme=written)
    config = tagger_config(train, scheme=learnt, **OPTIONS)
    assert {label[0] for label in config.labels} == set(learnt)
    tagging = TagTask(config, train, sentences(6, 1, "validation", written), batch_size=8)
    model = tagger(config)
    _, predicted = tagging.scored(model)
    assert predicted == [convert(tags, written) for tags in predicted]


def test_validation_may_be_written_in_another_scheme():
    train = sentences(40)
    config = tagger_config(train, **OPTIONS)
    model = trained(task(config=config), tagger(config), 5)
    found = [
        TagTask(config, train, sentences(12, 1, "validation", scheme)).evaluate(model)
        for scheme in ("BIO", "IOB1", "BILOU")
    ]
    assert found[0] == found[1] == found[2]
    assert found[0]["val_token_accuracy"] == 1.0


def test_plain_tags_are_scored_by_their_accuracy():
    train = Sentences("pos", [["a", "b"], ["b", "a"]], [["DET", "N"], ["N", "DET"]], [1, 4], [0, 0])
    config = tagger_config(train, **OPTIONS)
    assert config.scheme == "plain"
    found = TagTask(config, train, train, batch_size=2).evaluate(tagger(config))
    assert found["val_f1"] == found["val_token_accuracy"]
    assert found.keys() == {"val_loss", "val_f1", "val_token_accuracy"}


def test_a_label_that_training_never_shows_counts_as_missed_and_is_said():
    train, validation = sentences(40), sentences(12, 1, "validation")
    validation.tags[0][0] = "B-MISC"
    config = tagger_config(train, **OPTIONS)
    tagging = TagTask(config, train, validation, batch_size=8)
    assert any("1 word with a tag that training never shows (B-MISC)" in n for n in tagging.notes)
    found, predicted = tagging.scored(tagger(config))
    scores = entity_scores(validation.tags, predicted)
    assert found["val_f1"] == scores.averages.micro.f1
    assert scores.rows["MISC"].support == 1
    words = sum(map(len, validation.words)) - len(validation.words[0])
    assert sum(map(tagging.size, tagging.validation())) == words


def test_tags_that_are_not_well_formed_are_mended_and_said():
    train = sentences(40)
    train.tags[3][0] = "I-PER"  # in BIO, where the others begin with B-
    config = tagger_config(train, **OPTIONS)
    tagging = TagTask(config, train, sentences(5, 1), batch_size=8)
    assert any("1 entity not as BIO writes them" in note for note in tagging.notes)
    assert np.isfinite(tagging.loss(tagger(config), tagging.next_batch()).item())


def test_sentences_without_tags_are_refused():
    untagged = Sentences("new", [["a"]], None, [1], [0])
    with pytest.raises(ValueError, match="new has no tags"):
        tagger_config(untagged)
    with pytest.raises(ValueError, match="new has no tags"):
        TagTask(tagger_config(sentences(5)), sentences(5), untagged)
    with pytest.raises(ValueError, match="batch sizes must be at least 1"):
        task(batch_size=0)


# --- learning -------------------------------------------------------------------------------------


def trained(tagging, model, epochs, lr=0.02):
    optimizer = Adam(model.parameters(), lr=lr)
    for _ in range(epochs * tagging.steps_per_epoch):
        model.train()
        loss = tagging.loss(model, tagging.next_batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("scheme", ["BIO", "BIOES"])
def test_a_bilstm_crf_learns_names_and_places(scheme):
    config = tagger_config(sentences(40), scheme=scheme, **OPTIONS)
    tagging = task(config=config)
    before = tagging.evaluate(tagger(config))
    after = tagging.evaluate(trained(tagging, tagger(config), 5))
    assert after["val_f1"] == 1.0
    assert after["val_token_accuracy"] == 1.0
    assert before["val_f1"] < 0.9
    assert after["val_loss"] < 0.1 * before["val_loss"]


def test_a_tagger_on_a_bert_learns_and_a_folder_predicts_the_same(tmp_path):
    tokenizer, config = bert_parts(row_pieces=24, context_pieces=8, character_features=6)
    tagging = task(config=config, tokenizer=tokenizer)
    model = trained(tagging, tagger(config), 12, lr=0.01)
    found, predicted = tagging.scored(model)
    assert found["val_f1"] > 0.9
    assert config.vocabularies.words == ()  # the checkpoint has its own
    model.save_pretrained(tmp_path)
    tagging.save(tmp_path)
    back, words = auto.from_pretrained(tmp_path), tagging.held_out.words
    again = predict(back, Tokenizer.from_file(tmp_path), words, tagging.held_out.documents)
    assert again[0] == predicted
    assert again[1] == []


def test_the_size_of_a_batch_changes_no_prediction():
    tagging = task()
    model = trained(tagging, tagger(tagging.config), 1)
    words = tagging.held_out.words
    assert predict(model, None, words, batch_size=1) == predict(model, None, words, batch_size=64)


def test_the_loss_of_validation_is_the_mean_over_its_words():
    tagging = task()
    model = tagger(tagging.config).eval()
    batches = list(tagging.validation())
    weighted = sum(tagging.loss(model, b).item() * tagging.size(b) for b in batches)
    expected = weighted / sum(map(tagging.size, batches))
    assert tagging.evaluate(model)["val_loss"] == pytest.approx(expected, rel=1e-6)


# --- in the trainer -------------------------------------------------------------------------------


@pytest.mark.parametrize("on_bert", [False, True])
def test_a_batch_cut_for_two_processes_has_the_loss_of_the_whole(on_bert):
    if on_bert:
        tokenizer, config = bert_parts(row_pieces=20, context_pieces=5)
        tagging = task(config=config, tokenizer=tokenizer, batch_size=5)
    else:
        tagging = task(batch_size=5)
    model = tagger(tagging.config).eval()
    batch = tagging.next_batch()
    whole = tagging.loss(model, batch).item()
    parts = cut([batch], 2, tagging.size, RandomStream(0))
    assert len(parts) == 2
    found = sum(tagging.loss(model, part.batch).item() * part.weight for part in parts)
    assert found == pytest.approx(whole, rel=1e-5)


def trainer(folder, steps, model=None):
    """A run of the real trainer, new or, with a model from its checkpoint, to be gone on with."""
    tagging = task(seed=5)
    manual_seed(7)
    fresh = Tagger(tagging.config) if model is None else model
    optimizer = AdamW(fresh.parameters(), lr=0.01)
    settings = TrainConfig(
        steps=steps, eval_every=4, checkpoint_every=4, processes=1, mfu=False, warmup=0
    )
    run = Run.new(folder) if model is None else Run.open(folder)
    schedule = LRScheduler(optimizer, Constant())
    return Trainer(fresh, optimizer, schedule, tagging, settings, run, PlainLog(io.StringIO()))


def test_a_run_that_is_gone_on_with_is_bit_for_bit_the_one_that_was_not_stopped(tmp_path):
    whole = trainer(tmp_path / "whole", 16)
    whole.run.begin("")
    whole.fit()
    first = trainer(tmp_path / "parts", 12)  # in the second epoch
    first.run.begin("")
    first.fit()
    saved = first.run.checkpoint()
    assert saved is not None
    second = trainer(tmp_path / "parts", 16, Tagger.from_pretrained(saved))
    second.resume(saved)
    second.run.begin("")
    second.fit()
    pairs = zip(whole.model.parameters(), second.model.parameters(), strict=True)
    for one, two in pairs:
        np.testing.assert_array_equal(one.numpy(), two.numpy())
    assert second.step == 16
    last = list(second.run.metrics())[-1]
    assert {"val_loss", "val_f1", "val_token_accuracy"} <= last.keys()
    assert second.best is not None
    assert second.best["val_f1"] == max(r.get("val_f1", 0) for r in second.run.metrics())


def test_what_is_said_of_a_validation():
    tagging = task()
    tags = [tag for sentence in tagging.val_tags for tag in sentence]
    share = tags.count("O") / len(tags)
    said = tagging.remark({"val_token_accuracy": share, "val_f1": 0.0})
    scores = f"validation: entity F1 0.0000, accuracy over words {share:.4f}"
    assert said == f"{scores}; O for every word would be right for {share:.4f}"
    said = tagging.remark({"val_token_accuracy": 1.0, "val_f1": 0.5})
    assert said == "validation: entity F1 0.5000, accuracy over words 1.0000"
