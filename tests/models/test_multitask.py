"""One encoder with several heads: shared once, saved once, each head as if it were alone."""

import json
from typing import Any

import numpy as np
import pytest

from tinygrad_llm import manual_seed, no_grad
from tinygrad_llm.models import auto
from tinygrad_llm.models.bert import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)
from tinygrad_llm.models.multitask import Head, MultiTask, MultiTaskConfig
from tinygrad_llm.models.tagger import Tagger, TaggerConfig
from tinygrad_llm.models.word_features import Vocabularies, WordReader

BERT = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=16,
)
WORDS = [["Los", "Angeles", "in"], ["in"]]
KNOWN = Vocabularies.of(WORDS)
TAGS = ("B-LOC", "I-LOC", "O")
IDS = np.array([[1, 5, 6, 7, 8, 9, 2], [1, 9, 2, 0, 0, 0, 0]])
MASK = np.array([[1] * 7, [1, 1, 1, 0, 0, 0, 0]])


def classifier(*labels: str, **changes: Any) -> Head:
    sizes = {**vars(BERT), "num_labels": len(labels), "id2label": dict(enumerate(labels))}
    return Head("BertForSequenceClassification", BertConfig(**{**sizes, **changes}))


def tagger(**options: Any) -> Head:
    sizes = {"word_size": 0, "character_size": 3, "character_features": 4, "shape_size": 2}
    settings = {**sizes, "hidden_size": 6, "scheme": "BIO", "encoder": "bert", "bert": BERT}
    return Head("Tagger", TaggerConfig(TAGS, KNOWN, **{**settings, **options}))


HEADS = {"reviews": classifier("bad", "fine", "good"), "names": tagger()}


def model(**heads: Head) -> Any:
    manual_seed(0)
    return MultiTask(MultiTaskConfig(BERT, heads or HEADS))


def batch() -> dict[str, Any]:
    """Three words and one, tagged O."""
    arrays = WordReader(KNOWN).read(WORDS)
    lengths = np.array([3, 1])
    real = np.arange(3) < lengths[:, None]
    return {
        **arrays,
        "lengths": lengths,
        "labels": np.where(real, 2, -100),
        "sentences": real - 1,
        "input_ids": IDS,
        "attention_mask": MASK,
        "first": np.array([[1, 3, 5], [1, 0, 0]]),
        "piece_words": np.array([[0, 1, 1, 2, 2, 3, 0], [0, 1, 0, 0, 0, 0, 0]]),
    }


def said(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """What its two heads say, dropout off."""
    model.eval()
    with no_grad():
        return model("reviews", IDS, MASK).numpy(), model("names", batch()).numpy()


# --- what is shared -------------------------------------------------------------------------------


def test_the_encoder_is_one_object_and_its_parameters_come_once():
    both = model()
    assert both.heads["reviews"].bert is both.bert
    assert both.heads["names"].bert is both.bert
    names = [name for name, _ in both.named_parameters()]
    assert len({id(p) for p in both.parameters()}) == len(names)
    assert not [name for name in names if ".bert." in name]
    alone = [both.head(name).num_parameters() for name in both.heads]
    without_pooler = BertModel(BERT, add_pooling_layer=False).num_parameters()
    assert both.num_parameters() == sum(alone) - without_pooler
    assert {name.split(".")[0] for name in names} == {"bert", "heads"}


def test_modes_and_dtypes_reach_every_part():
    both = model().eval()
    assert not any(module.training for module in both.modules())
    both.heads["names"].train()
    assert both.bert.training
    assert not both.heads["reviews"].training
    both.to("float64")
    assert {str(p.dtype) for p in both.parameters()} == {"float64"}


def test_a_pooler_is_there_where_a_head_looks_at_it():
    assert model().bert.pooler is not None
    assert model(names=tagger()).bert.pooler is None
    mean = classifier("a", "b", classifier_pooling="mean")
    assert model(names=tagger(), reviews=mean).bert.pooler is None


def test_the_encoder_learns_from_every_task_and_a_head_from_its_own():
    both = model().eval()  # no dropout: the gradients of both losses are the sum of those of each
    losses = {
        "reviews": lambda: both.heads["reviews"].loss(IDS, np.array([0, 2]), MASK),
        "names": lambda: both.heads["names"].loss(batch()),
    }
    parameters = dict(both.named_parameters())
    shared = parameters["bert.encoder.layer.0.attention.self.query.weight"]
    found = []
    for name, loss in losses.items():
        both.zero_grad()
        loss().backward()
        found.append(shared.grad.numpy().copy())
        assert np.abs(found[-1]).max() > 0
        reached = [n for n, p in parameters.items() if p.grad is not None and "heads" in n]
        assert reached
        assert all(n.startswith(f"heads.{name}.") for n in reached)
    both.zero_grad()
    for loss in losses.values():
        loss().backward()
    np.testing.assert_allclose(shared.grad.numpy(), found[0] + found[1], atol=1e-7)


def test_weights_begin_as_in_the_single_models():
    both = model()
    assert both.heads["names"].project.weight.numpy().max() == 0  # at first it reads what it knows
    std = both.heads["reviews"].classifier.weight.numpy().std()
    assert 0.005 < std < 0.05
    again = model()
    for a, b in zip(both.parameters(), again.parameters(), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_comes_back_to_the_last_bit(tmp_path):
    both = model()
    before = said(both)
    both.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is MultiTask
    assert loaded.config == both.config
    assert loaded.heads["names"].bert is loaded.bert
    theirs = dict(loaded.named_parameters())
    for name, parameter in both.named_parameters():
        np.testing.assert_array_equal(theirs[name].numpy(), parameter.numpy())
    for a, b in zip(before, said(loaded), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_a_heads_own_comes_back(tmp_path):
    heads = {
        "a": classifier("x", "y", classifier_pooling="mean", classifier_dropout=0.5),
        "b": classifier("x", "y"),
    }
    both = model(**heads)
    both.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert loaded.config == both.config
    own = loaded.config.heads["a"].config
    assert (own.classifier_pooling, own.classifier_dropout) == ("mean", 0.5)
    assert loaded.config.heads["b"].config.classifier_pooling == "cls"
    labelled: Any = heads["a"].config
    assert MultiTaskConfig(labelled, heads).bert == BERT  # what is a head's is left out


def test_the_file_holds_the_encoder_once(tmp_path):
    from safetensors.numpy import load_file

    both = model()
    both.save_pretrained(tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    assert sum(array.size for array in arrays.values()) == both.num_parameters()
    assert "bert.embeddings.word_embeddings.weight" in arrays
    assert "heads.reviews.classifier.weight" in arrays
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "tinygrad-llm-multitask"
    assert config["heads"]["reviews"]["config"]["id2label"] == {
        "0": "bad",
        "1": "fine",
        "2": "good",
    }
    assert "hidden_size" not in config["heads"]["reviews"]["config"]  # it is the encoder's
    assert "bert" not in config["heads"]["names"]["config"]


def test_each_head_says_what_the_single_model_with_its_weights_says(tmp_path):
    both = model()
    reviews, names = said(both)
    for name in both.heads:
        both.head(name).save_pretrained(tmp_path / name)
    alone = BertForSequenceClassification.from_pretrained(tmp_path / "reviews")
    tags = Tagger.from_pretrained(tmp_path / "names")
    assert list(alone.config.labels.values()) == ["bad", "fine", "good"]
    with no_grad():
        np.testing.assert_array_equal(alone(IDS, MASK).numpy(), reviews)
        np.testing.assert_array_equal(tags(batch()).numpy(), names)
    own = both.head("names")
    own.bert.embeddings.word_embeddings.weight.data[:] = 0  # a copy: nothing happens to the others
    np.testing.assert_array_equal(said(both)[0], reviews)


def test_what_a_head_saves_opens_in_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    both = model()
    reviews, _ = said(both)
    both.head("reviews").save_pretrained(tmp_path)
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found = theirs(torch.tensor(IDS), torch.tensor(MASK)).logits.numpy()
    np.testing.assert_allclose(found, reviews, atol=1e-5)


def test_heads_on_a_checkpoint(tmp_path):
    manual_seed(3)
    pretrained = BertForMaskedLM(BERT)
    pretrained.save_pretrained(tmp_path)
    both = MultiTask.from_checkpoint(tmp_path, MultiTaskConfig(BERT, HEADS))
    theirs = pretrained.bert.state_dict()
    for name, tensor in both.bert.state_dict().items():
        if not name.startswith("pooler."):
            np.testing.assert_array_equal(tensor.numpy(), theirs[name].numpy())
    other = BertConfig(**{**vars(BERT), "intermediate_size": 16})
    heads = {"reviews": classifier("a", "b", intermediate_size=16)}
    with pytest.raises(ValueError, match="is not the config of the BERT in"):
        MultiTask.from_checkpoint(tmp_path, MultiTaskConfig(other, heads))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: MultiTaskConfig(BERT, {}), "at least one head"),
        (lambda: MultiTaskConfig(BERT, {"a.b": HEADS["names"]}), "letters, digits, '_' and '-'"),
        (lambda: MultiTaskConfig(BERT, {"train": HEADS["names"]}), "cannot be the name of a task"),
        (
            lambda: MultiTaskConfig(BERT, {"a": classifier("x", "y", hidden_size=4)}),
            "head 'a' stands on another encoder",
        ),
        (lambda: Head("GPT", BERT), "architecture must be one of BertForSequenceClassification"),
        (lambda: Head("Tagger", BERT), "a Tagger has a TaggerConfig, got a BertConfig"),
        (lambda: model().head("tags"), "there is no head 'tags'; there are 'reviews', 'names'"),
    ],
)
def test_what_makes_no_model_is_said(make, why):
    with pytest.raises(ValueError, match=why):
        make()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c.pop("heads"), "bert and heads must be objects"),
        (lambda c: c["heads"].update(reviews=3), "must be an object with architecture, config"),
        (lambda c: c["heads"]["reviews"].update(architecture="GPT"), "of head 'reviews' must be"),
        (lambda c: c["heads"]["reviews"]["config"].update(hidden_size=4), "another encoder"),
    ],
)
def test_a_damaged_config_is_named(change, why, tmp_path):
    model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=why) as caught:
        auto.from_pretrained(tmp_path)
    assert "config.json cannot be used" in str(caught.value)
    assert "\n" not in str(caught.value)
