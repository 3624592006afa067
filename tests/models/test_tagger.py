"""The tagger: features of words, emissions, labels chosen together."""

import itertools
from typing import Any

import numpy as np
import pytest

from tinygrad_llm import Tensor, manual_seed, no_grad
from tinygrad_llm.models import auto
from tinygrad_llm.models.bert import BertConfig, BertModel
from tinygrad_llm.models.tagger import Tagger, TaggerConfig
from tinygrad_llm.models.word_features import (
    CharacterCNN,
    CharacterLSTM,
    Vocabularies,
    WordFeatures,
    WordReader,
    normalized,
    shape_of,
)

SENTENCES = [["Mr.", "Los", "Los", "Angeles"], ["in", "in", "1996", "1997", "los"]]
KNOWN = Vocabularies.of(SENTENCES)
LABELS = ("B-LOC", "I-LOC", "O")
BERT = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=16,
)


def config(**options):
    sizes = {"word_size": 5, "character_size": 3, "character_features": 4, "shape_size": 2}
    settings = {**sizes, "hidden_size": 6, "scheme": "BIO", **options}
    return TaggerConfig(LABELS, KNOWN, **settings)


def tagger(**options: Any) -> Any:
    manual_seed(0)
    return Tagger(config(**options)).eval()


def batch(rows=SENTENCES, **more):
    """The words of the rows, every one of them scored, all tagged O."""
    arrays = WordReader(KNOWN).read(rows)
    lengths = np.array([len(row) for row in rows])
    real = np.arange(arrays["words"].shape[1]) < lengths[:, None]
    labels = np.where(real, LABELS.index("O"), -100)
    return {**arrays, "lengths": lengths, "labels": labels, "sentences": real - 1, **more}


def bert_batch():
    """Two words of two pieces and one of one; then a row of one word."""
    return batch(
        [["Los", "Angeles", "in"], ["in"]],
        input_ids=np.array([[1, 5, 6, 7, 8, 9, 2], [1, 9, 2, 0, 0, 0, 0]]),
        attention_mask=np.array([[1] * 7, [1, 1, 1, 0, 0, 0, 0]]),
        first=np.array([[1, 3, 5], [1, 0, 0]]),
        piece_words=np.array([[0, 1, 1, 2, 2, 3, 0], [0, 1, 0, 0, 0, 0, 0]]),
    )


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "shape", "seen_as"),
    [
        ("Mr.", "Xx.", "mr."),
        ("1996-08-22", "00-00-00", "0000-00-00"),
        ("iPhone", "xXxx", "iphone"),
        ("USA", "XX", "usa"),
        ("McDonald", "XxXxx", "mcdonald"),
        ("北京", "ww", "北京"),
        ("…" * 40, "……", "…" * 40),
        ("aB" * 20, "xX" * 6, "ab" * 20),
        ("", "", ""),
    ],
)
def test_shapes_and_words(word, shape, seen_as):
    assert shape_of(word) == shape
    assert normalized(word) == seen_as


def test_vocabularies_are_ordered_by_count_and_know_what_was_rare():
    assert KNOWN.words == ("los", "0000", "in", "angeles", "mr.")
    assert KNOWN.rare == 2
    assert "L" in KNOWN.characters
    assert "M" not in KNOWN.characters  # it occurred once
    assert KNOWN.shapes == ("Xxx", "xx", "00") or set(KNOWN.shapes) == {"Xxx", "xx", "00"}
    assert Vocabularies.of(SENTENCES[::-1]) == KNOWN


def test_ids_of_words_and_of_what_is_not_known():
    read = WordReader(KNOWN, longest=4).read([["LOS", "2024", "Xylophone"], ["in"]])
    assert read["words"].tolist() == [[2, 3, 1], [4, 0, 0]]
    assert read["shapes"][0, 0] == 1
    assert read["characters"].shape == (2, 3, 4)
    spelling = [KNOWN.characters.find(c) + 2 for c in "ne"]  # the first two and the last two
    assert read["characters"][0, 2, 2:].tolist() == [max(1, i) for i in spelling]
    assert (read["characters"][1, 1:] == 0).all()


def test_a_row_of_no_words_and_a_word_of_no_characters():
    read = WordReader(KNOWN).read([[], [""]])
    assert read["words"].shape == (2, 1)
    features = WordFeatures(config()).eval()
    assert features(**{k: read[k] for k in ("words", "shapes", "characters")}).shape == (2, 1, 11)


def test_the_characters_cnn_is_a_maximum_over_places():
    manual_seed(0)
    cnn = CharacterCNN(9, 3, 5)
    ids = np.array([[2, 3, 4, 0], [5, 0, 0, 0]])
    e, w, b = (p.numpy() for p in cnn.parameters())
    for word, n in zip(ids, (3, 1), strict=True):
        letters = np.concatenate([[0], word[:n], [0]])
        values = [w @ np.concatenate(e[letters[i : i + 3]]) + b for i in range(n)]
        expected = np.maximum(np.max(values, axis=0), 0)
        np.testing.assert_allclose(cnn(word[None]).numpy()[0], expected, rtol=1e-5, atol=1e-6)
    together, alone = cnn(ids).numpy()[1], cnn(ids[1:, :1]).numpy()[0]
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_the_characters_lstm_reads_a_word_from_both_sides():
    manual_seed(0)
    lstm = CharacterLSTM(9, 3, 4)
    ids = np.array([[2, 3, 4, 0], [5, 0, 0, 0], [0, 0, 0, 0]])
    found = lstm(ids).numpy()
    np.testing.assert_allclose(found[0], lstm(ids[:1, :3]).numpy()[0], atol=1e-6)
    assert (found[2] == 0).all()


def test_rare_words_are_taken_for_unknown_in_training_only():
    manual_seed(0)
    features = WordFeatures(config(word_dropout=0.5))
    words = np.tile([[2, 5, 6]], (200, 1))  # los, and two that occurred once
    dropped = features._with_dropout(words)
    assert (dropped[:, 0] == 2).all()
    assert 0.3 < (dropped[:, 1:] == 1).mean() < 0.7
    features.eval()
    np.testing.assert_array_equal(features._with_dropout(words), words)


# --- emissions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_layers": 0}, {"character_encoder": "lstm"}])
def test_padding_changes_no_emission(options):
    net = tagger(**options)
    together = net.emissions(batch()).numpy()
    for row, sentence in zip(together, SENTENCES, strict=True):
        alone = net.emissions(batch([sentence])).numpy()[0]
        np.testing.assert_allclose(row[: len(sentence)], alone, atol=1e-6)


def test_a_word_is_seen_by_its_first_piece_and_its_features():
    net = tagger(encoder="bert", bert=BERT, num_layers=0)
    given = bert_batch()
    states = net.bert(given["input_ids"], given["attention_mask"]).last_hidden_state.numpy()
    features = net.features(given["words"], given["shapes"], given["characters"]).numpy()
    # What is added to the checkpoint's embeddings is 0 at first.
    rows = np.concatenate([states[0, [1, 3, 5]], features[0]], axis=-1)
    expected = rows @ net.classifier.weight.numpy().T
    np.testing.assert_allclose(net.emissions(given).numpy()[0], expected, atol=1e-5)


def test_features_reach_the_checkpoint_at_the_pieces_of_their_word():
    net = tagger(encoder="bert", bert=BERT, num_layers=0)
    manual_seed(1)
    net.project.weight.data[...] = np.random.default_rng(0).normal(size=net.project.weight.shape)
    given = bert_batch()
    before = net.emissions(given).numpy()
    other = {**given, "shapes": given["shapes"].copy()}
    other["shapes"][0, 1] = 1
    after = net.emissions(other).numpy()
    assert (after[0] != before[0]).all()  # attention carries it to all words of the row
    np.testing.assert_array_equal(after[1], before[1])


def test_without_features_it_is_the_checkpoint_and_a_head():
    off = {"word_size": 0, "shape_size": 0, "character_encoder": "none", "word_dropout": 0.0}
    net = tagger(encoder="bert", bert=BERT, num_layers=0, **off)
    assert net.features is None
    given = bert_batch()
    states = net.bert(given["input_ids"], given["attention_mask"]).last_hidden_state.numpy()
    expected = states[0, [1, 3, 5]] @ net.classifier.weight.numpy().T
    np.testing.assert_allclose(net.emissions(given).numpy()[0], expected, atol=1e-5)


# --- loss and labels ------------------------------------------------------------------------------


def test_the_crf_loss_is_that_of_all_label_sequences():
    net = tagger()
    given = batch([["Los", "Angeles", "in"]])
    given["labels"][0] = [0, 1, 2]
    e = net.emissions(given).numpy()[0].astype(np.float64)
    crf = net.crf
    moves, start, end = (
        p.numpy().astype(np.float64)
        for p in (crf.transitions, crf.start_transitions, crf.end_transitions)
    )

    def score(path):
        steps = sum(e[t, k] for t, k in enumerate(path))
        return steps + start[path[0]] + end[path[-1]] + sum(moves[a, b] for a, b in pairs(path))

    def pairs(path):
        return list(itertools.pairwise(path))

    allowed = [
        path
        for path in itertools.product(range(3), repeat=3)
        if path[0] != 1 and not any(b == 1 and a == 2 for a, b in pairs(path))
    ]
    scores = {path: score(path) for path in allowed}
    log_z = np.log(np.sum(np.exp(list(scores.values()))))
    assert net.loss(given).item() == pytest.approx((log_z - scores[(0, 1, 2)]) / 3, rel=1e-5)
    best = max(scores, key=lambda path: scores[path])
    assert net.decode([e.astype(np.float32)]) == [[LABELS[k] for k in best]]


@pytest.mark.parametrize("head", ["crf", "softmax"])
def test_sentences_that_share_a_row_are_scored_apart_and_context_not_at_all(head):
    net = tagger(head=head, num_layers=0)
    words = ["Los", "in", "1996", "Angeles", "in"]
    together = batch([words])
    together["sentences"][0] = [-1, 0, 0, 1, -1]
    apart = batch([words[1:3], words[3:4]])
    assert net.loss(together).item() == pytest.approx(net.loss(apart).item(), rel=1e-5)


@pytest.mark.parametrize("head", ["crf", "softmax"])
def test_a_loss_of_half_precision_is_float32(head):
    net = tagger(head=head)
    given = batch()
    expected = net.loss(given).item()
    for p in net.parameters():
        p.data = p.data.astype(np.float16)
    loss = net.loss(given)
    assert loss.dtype == np.float32
    assert loss.item() == pytest.approx(expected, rel=0.02)
    loss.backward()


@pytest.mark.parametrize("head", ["crf", "softmax"])
def test_every_parameter_learns(head):
    net = tagger(head=head, encoder="bert", bert=BERT, dropout=0.0)
    net.train()
    net.project.weight.data[...] = 0.1  # 0 at first, and then nothing goes through it
    net.loss(bert_batch()).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert np.abs(p.grad.numpy()).sum() > 0 or "key.bias" in name, name


def test_labels_that_are_decoded_are_well_formed_even_where_the_scores_are_not():
    net = tagger()
    emissions = np.full((4, 3), -5.0, np.float32)
    emissions[:, 1] = 5.0  # I-LOC everywhere
    assert net.decode([emissions])[0][0] != "I-LOC"
    assert tagger(head="softmax").decode([emissions])[0] == ["I-LOC"] * 4


def test_sentences_of_all_lengths_are_decoded_in_their_order():
    net = tagger()
    rng = np.random.default_rng(0)
    some = [rng.normal(size=(n, 3)).astype(np.float32) for n in (3, 0, 7, 1)]
    assert [len(tags) for tags in net.decode(some)] == [3, 0, 7, 1]
    assert net.decode(some) == [net.decode([e])[0] for e in some]


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"head": "softmax"}, {"encoder": "bert", "bert": BERT}])
def test_it_goes_to_a_folder_and_back(options, tmp_path):
    net = tagger(**options)
    net.save_pretrained(tmp_path)
    back = auto.from_pretrained(tmp_path)
    assert isinstance(back, Tagger)
    assert back.config == net.config
    given = bert_batch() if options.get("bert") else batch()
    np.testing.assert_array_equal(back.emissions(given).numpy(), net.emissions(given).numpy())


def test_it_begins_from_a_checkpoint(tmp_path):
    manual_seed(3)
    encoder = BertModel(BERT)
    encoder.save_pretrained(tmp_path)
    net: Any = Tagger.from_checkpoint(tmp_path, config(encoder="bert", bert=BERT)).eval()
    given = bert_batch()
    inputs = given["input_ids"], given["attention_mask"]
    with no_grad():
        expected = encoder.eval()(*inputs).last_hidden_state.numpy()
        np.testing.assert_array_equal(net.bert(*inputs).last_hidden_state.numpy(), expected)
    other = BertConfig(**{**vars(BERT), "hidden_size": 4})
    with pytest.raises(ValueError, match="not the config of the BERT in"):
        Tagger.from_checkpoint(tmp_path, config(encoder="bert", bert=other))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"encoder": "bert"}, "belong together, got the encoder 'bert' and none"),
        ({"bert": BERT}, "belong together, got the encoder 'bilstm' and one"),
        ({"head": "argmax"}, "head must be one of crf, softmax"),
        ({"num_layers": -1}, "num_layers must be an integer from 0"),
        ({"character_encoder": "lstm", "character_features": 3}, "must be even"),
        ({"word_size": 0, "shape_size": 0, "character_encoder": "none"}, "sees nothing"),
        ({"scheme": "IOB9"}, "scheme must be one of"),
    ],
)
def test_what_makes_no_tagger_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        config(**options)


def test_labels_must_differ_and_configs_be_whole():
    with pytest.raises(ValueError, match="all different"):
        TaggerConfig(("O", "O"), KNOWN)
    whole = config().to_dict()
    assert TaggerConfig.from_dict(whole) == config()
    with pytest.raises(ValueError, match="missing or damaged"):
        TaggerConfig.from_dict({**whole, "vocabularies": {"words": []}})
    with pytest.raises(ValueError, match="model_type must be 'tinygrad-llm-tagger'"):
        TaggerConfig.from_dict({**whole, "model_type": "bert"})


def test_the_same_seed_begins_the_same():
    for one, two in zip(tagger().parameters(), tagger().parameters(), strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())
    net: Any = tagger()
    assert isinstance(net(batch()), Tensor)
