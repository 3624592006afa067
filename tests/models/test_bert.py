"""BERT: equal to Hugging Face's, in and out of its folders; heads, masks, losses, bad input."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import tinygrad_llm as tg
from tinygrad_llm import Tensor, backend, no_grad, ops
from tinygrad_llm.models import bert, pretrained
from tinygrad_llm.models.bert import BertConfig, BertModel
from tinygrad_llm.models.pretrained import NewWeights
from tinygrad_llm.optim import AdamW

GOLDEN = Path(__file__).parent / "golden" / "bert.safetensors"
CONFIG = BertConfig(
    vocab_size=37,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=12,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.3,
)
HEADS: list[Any] = [
    bert.BertForPreTraining,
    bert.BertForMaskedLM,
    bert.BertForNextSentencePrediction,
    bert.BertForSequenceClassification,
    bert.BertForTokenClassification,
    bert.BertForQuestionAnswering,
]
RNG = np.random.default_rng(0)
IDS = RNG.integers(1, 37, (3, 9))
LENGTHS = np.array([9, 6, 4])
MASK = (np.arange(9) < LENGTHS[:, None]).astype(np.int64)
SEGMENTS = np.broadcast_to((np.arange(9) > 3).astype(np.int64), (3, 9))
LABELS = {
    "BertForPreTraining": {
        "labels": np.where(MASK * (np.arange(9) % 3 == 1) == 1, IDS, -100),
        "next_sentence_label": np.array([0, 1, 1]),
    },
    "BertForMaskedLM": {"labels": np.where(MASK * (np.arange(9) % 3 == 1) == 1, IDS, -100)},
    "BertForNextSentencePrediction": {"labels": np.array([1, 0, 1])},
    "BertForSequenceClassification": {"labels": np.array([1, 0, 1])},
    "BertForTokenClassification": {"labels": np.where(MASK == 1, IDS % 2, -100)},
    "BertForQuestionAnswering": {
        "start_positions": np.array([2, 0, 3]),
        "end_positions": np.array([5, 4, 3]),
    },
}


def named(name: str) -> Any:
    return getattr(bert, name)


def as_tuple(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Within `tolerance` of the largest expected value, or of 1."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    assert np.abs(found - expected).max(initial=0.0) <= tolerance * scale


def check_gradients(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Within 1e-4 of each one's largest value; some are 0, such as that of a bias of all keys."""
    noise = 1e-6 * max(np.abs(g).max() for g in expected.values())
    for name, g in expected.items():
        assert np.abs(found[name] - g).max() <= 1e-4 * np.abs(g).max() + noise, name


# --- what it computes -----------------------------------------------------------------------------


def golden(name: str) -> tuple[BertConfig, dict[str, dict[str, np.ndarray]]]:
    """The config and {"weights", "inputs", "logits", "gradients": {name: array}} of a class."""
    found: dict[str, dict[str, np.ndarray]] = {"": {}}
    with safe_open(GOLDEN, framework="np") as file:
        config = BertConfig.from_dict(json.loads(file.metadata()["config"]))
        names = file.keys()
        for key in names:
            owner, _, rest = key.partition("/")
            if owner == name:
                kind, _, inner = rest.rpartition("/")
                found.setdefault(kind, {})[inner] = file.get_tensor(key)
    return config, found


def loaded_from(name: str, config: BertConfig, weights: dict[str, np.ndarray]) -> Any:
    model = named(name)(config).eval()
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize(
    "name",
    [
        *("BertForPreTraining", "BertForSequenceClassification", "BertForTokenClassification"),
        "BertForQuestionAnswering",
    ],
)
def test_logits_loss_and_gradients_are_those_stored(name):
    config, stored = golden(name)
    model = loaded_from(name, config, stored["weights"])
    given_in = stored["inputs"]
    context = {k: v for k, v in given_in.items() if k not in LABELS[name]}
    for i, logits in enumerate(as_tuple(model(**context))):
        close(logits.numpy(), stored["logits"][str(i)], 1e-5)
    loss = model.loss(**given_in)
    close(loss.numpy(), stored[""]["loss"], 1e-5)
    loss.backward()
    assert len(stored["gradients"]) >= 8
    gradients = {n: p.grad.numpy() for n, p in model.named_parameters()}
    check_gradients(gradients, stored["gradients"])


@pytest.mark.parametrize("name", [head.__name__ for head in HEADS])
def test_parity_with_transformers_both_ways(name, tmp_path):
    torch: Any = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(2)
    sizes = {k: v for k, v in CONFIG.to_dict().items() if k not in ("id2label", "label2id")}
    theirs = getattr(transformers, name)(transformers.BertConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = named(name).from_pretrained(tmp_path / "theirs")
    context = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": SEGMENTS}

    def expected_logits(model):
        tensors = {k: torch.tensor(v) for k, v in (context | LABELS[name]).items()}
        output = model(**tensors)
        return output.loss, [v.detach().numpy() for k, v in output.items() if "logits" in k]

    loss, logits = expected_logits(theirs)
    for found, expected in zip(as_tuple(ours(**context)), logits, strict=True):
        close(found.numpy(), expected, 1e-5)
    own_loss = ours.loss(**context, **LABELS[name])
    close(own_loss.numpy(), loss.item(), 1e-5)
    own_loss.backward()
    loss.backward()
    check_gradients(
        {n: p.grad.numpy() for n, p in ours.named_parameters()},
        {n: p.grad.numpy() for n, p in theirs.named_parameters()},
    )

    ours.save_pretrained(tmp_path / "ours")
    again, info = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for found, expected in zip(expected_logits(again.eval())[1], logits, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.fixture
def model():
    tg.manual_seed(3)
    return BertModel(CONFIG).eval()


def test_padding_changes_nothing_however_it_is_said(model):
    """By lengths, by a mask of keys, by a mask of pairs; and without padding."""
    whole = model(IDS, MASK, SEGMENTS).last_hidden_state.numpy()
    pairs = np.repeat(MASK[:, None], 9, axis=1)
    np.testing.assert_allclose(
        model(IDS, pairs, SEGMENTS).last_hidden_state.numpy(), whole, atol=2e-6
    )
    for row, length in enumerate(LENGTHS):
        alone = model(IDS[row : row + 1, :length], None, SEGMENTS[row : row + 1, :length])
        np.testing.assert_allclose(
            alone.last_hidden_state.numpy()[0], whole[row, :length], atol=2e-6
        )
    other = np.where(MASK == 1, IDS, 5)
    changed = model(other, MASK, SEGMENTS).last_hidden_state.numpy()
    np.testing.assert_array_equal(changed[MASK == 1], whole[MASK == 1])
    assert np.abs(model(IDS).last_hidden_state.numpy() - whole).max() > 0.01


def test_a_mask_with_holes(model):
    holes = np.ones((3, 9), bool)
    holes[:, 4] = False
    masked = model(IDS, holes).last_hidden_state.numpy()
    other = IDS.copy()
    other[:, 4] = 7
    changed = model(other, holes).last_hidden_state.numpy()
    np.testing.assert_array_equal(masked[:, :4], changed[:, :4])
    without, places = np.delete(IDS, 4, axis=1), np.delete(np.arange(9), 4)
    shorter = model(without, position_ids=places).last_hidden_state.numpy()
    np.testing.assert_allclose(shorter, np.delete(masked, 4, axis=1), atol=2e-6)


def test_what_is_left_out_is_what_the_defaults_say(model):
    x = model(IDS).last_hidden_state.numpy()
    said = model(IDS, np.ones((3, 9)), np.zeros((3, 9), int), np.arange(9)[None].repeat(3, 0))
    np.testing.assert_allclose(said.last_hidden_state.numpy(), x, atol=1e-6)
    states = model(IDS, output_hidden_states=True)
    assert states.hidden_states is not None
    assert len(states.hidden_states) == CONFIG.num_hidden_layers + 1
    assert states.hidden_states[-1] is states.last_hidden_state
    assert BertModel(CONFIG, add_pooling_layer=False)(IDS).pooler_output is None


def test_sentence_embeddings_are_means_over_tokens_of_length_one(model):
    y = model.sentence_embedding(IDS, MASK).numpy()
    x = model(IDS, MASK).last_hidden_state.numpy()
    means = np.stack([x[b, :n].mean(axis=0) for b, n in enumerate(LENGTHS)])
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(y, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-6)
    bare = model.sentence_embedding(IDS, MASK, normalize=False).numpy()
    np.testing.assert_allclose(bare, means, atol=1e-6)
    full = model.sentence_embedding(IDS, normalize=False).numpy()
    np.testing.assert_allclose(full, model(IDS).last_hidden_state.numpy().mean(1), atol=1e-6)
    nothing = model.sentence_embedding(IDS, np.zeros((3, 9), int)).numpy()
    np.testing.assert_array_equal(nothing, 0.0)


def test_a_classifier_of_the_mean_over_tokens(tmp_path):
    config = dataclasses.replace(CONFIG, classifier_pooling="mean")
    tg.manual_seed(3)
    model = bert.BertForSequenceClassification(config).eval()
    assert model.bert.pooler is None
    mean = model.bert.sentence_embedding(IDS, MASK, SEGMENTS, normalize=False)
    logits = model(IDS, MASK, SEGMENTS).numpy()
    np.testing.assert_array_equal(logits, model.classifier(mean).numpy())
    model.save_pretrained(tmp_path)
    again = bert.BertForSequenceClassification.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again(IDS, MASK, SEGMENTS).numpy(), logits)
    assert "classifier_pooling" not in CONFIG.to_dict()  # Hugging Face's BERT has no such option
    with pytest.raises(ValueError, match="classifier_pooling"):
        dataclasses.replace(CONFIG, classifier_pooling="max")


def test_a_classifier_that_compares_two_texts(tmp_path):
    config = dataclasses.replace(CONFIG, classifier_pooling="compare")
    tg.manual_seed(3)
    model = bert.BertForSequenceClassification(config).eval()
    x = model.bert(IDS, MASK, SEGMENTS).last_hidden_state.numpy()
    weight, bias = (p.numpy() for p in model.classifier.parameters())
    logits = model(IDS, MASK, SEGMENTS).numpy()
    for b in range(len(IDS)):
        parts = (x[b][(MASK[b] == 1) & (SEGMENTS[b] == text)] for text in (0, 1))
        u, v = (part.mean(axis=0) if len(part) else np.zeros(x.shape[2]) for part in parts)
        features = np.concatenate([u, v, np.abs(u - v), u * v])
        np.testing.assert_allclose(logits[b], weight @ features + bias, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = bert.BertForSequenceClassification.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again(IDS, MASK, SEGMENTS).numpy(), logits)
    with pytest.raises(ValueError, match="token_type_ids"):
        model(IDS, MASK)
    with pytest.raises(ValueError, match="type_vocab_size 1"):
        bert.BertForSequenceClassification(dataclasses.replace(config, type_vocab_size=1))


@pytest.mark.parametrize("head", HEADS)
def test_gradient_checkpointing_changes_no_bit(head):
    config = dataclasses.replace(CONFIG, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1)
    tg.manual_seed(1)
    model = head(config)
    gradients = []
    for on in (False, True):
        (model.gradient_checkpointing_enable if on else model.gradient_checkpointing_disable)()
        assert model.is_gradient_checkpointing is on
        model.zero_grad()
        tg.manual_seed(5)
        model.loss(
            input_ids=IDS, attention_mask=MASK, token_type_ids=SEGMENTS, **LABELS[head.__name__]
        ).backward()
        gradients.append([p.grad.numpy() for p in model.parameters()])
    for kept, again in zip(*gradients, strict=True):
        np.testing.assert_array_equal(kept, again)


@pytest.mark.parametrize("head", HEADS)
def test_a_head_learns_its_labels(head):
    tg.manual_seed(4)
    model = head(CONFIG)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": SEGMENTS}
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model.loss(**inputs, **LABELS[head.__name__])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


# --- losses ---------------------------------------------------------------------------------------


def test_the_parts_of_the_loss_of_pretraining():
    model = bert.BertForPreTraining(CONFIG).eval()
    hidden, follows = LABELS["BertForPreTraining"].values()
    parts = model.losses(IDS, hidden, follows, MASK, SEGMENTS)
    words, pairs = model(IDS, MASK, SEGMENTS)
    close(parts.masked_lm.numpy(), ops.cross_entropy(words, hidden).numpy(), 1e-6)
    close(parts.next_sentence.numpy(), ops.cross_entropy(pairs, follows).numpy(), 1e-6)
    close(parts.loss.numpy(), parts.masked_lm.numpy() + parts.next_sentence.numpy(), 1e-6)
    nothing = model.losses(IDS, np.full((3, 9), -100), np.full(3, -100))
    assert nothing.loss.item() == 0.0
    nothing.loss.backward()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head", HEADS)
def test_losses_of_half_precision_are_float32(head, dtype):
    tg.manual_seed(3)
    given = {"input_ids": IDS, "attention_mask": MASK, **LABELS[head.__name__]}
    model = head(CONFIG).eval()
    expected = model.loss(**given).item()
    for p in model.parameters():
        p.data = p.data.astype(backend.as_dtype(dtype))
    loss = model.loss(**given)
    assert loss.dtype == np.float32
    assert loss.item() == pytest.approx(expected, rel=0.05)
    assert loss.item() != float(np.asarray(loss.item()).astype(backend.as_dtype(dtype)))
    loss.backward()
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize("labels", [np.array([0.5, 2.0, 1.0]), np.eye(3)])
def test_other_losses_of_half_precision_are_float32(labels):
    model = bert.BertForSequenceClassification(
        dataclasses.replace(CONFIG, num_labels=1 if labels.ndim == 1 else 3)
    )
    for p in model.parameters():
        p.data = p.data.astype(np.float16)
    loss = model.loss(IDS, labels, MASK)
    assert loss.dtype == np.float32
    loss.backward()


def test_classes_can_weigh_differently_and_be_smoothed():
    weight = np.array([0.2, 3.0])
    tokens = bert.BertForTokenClassification(CONFIG).eval()
    labels = LABELS["BertForTokenClassification"]["labels"]
    found = tokens.loss(IDS, labels, MASK, weight=weight, label_smoothing=0.1)
    logits = tokens(IDS, MASK)
    expected = ops.cross_entropy(logits, labels, weight, label_smoothing=0.1)
    close(found.numpy(), expected.numpy(), 1e-6)
    assert abs(found.item() - tokens.loss(IDS, labels, MASK).item()) > 1e-3
    whole = bert.BertForSequenceClassification(CONFIG).eval()
    found = whole.loss(IDS, np.array([1, -100, 0]), MASK, weight=weight)
    expected = ops.cross_entropy(whole(IDS, MASK), np.array([1, -100, 0]), weight)
    close(found.numpy(), expected.numpy(), 1e-6)


@pytest.mark.parametrize(
    ("problem", "num_labels", "labels"),
    [
        ("regression", 1, np.array([0.5, -1.0, 2.0])),
        ("regression", 2, RNG.standard_normal((3, 2))),
        ("multi_label_classification", 3, np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1.0]])),
        (None, 1, np.array([[0.5], [1.0], [2.0]])),
        (None, 3, np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1.0]])),
        (None, 3, np.array([2, 0, 1])),
    ],
)
def test_problem_types(problem, num_labels, labels):
    config = dataclasses.replace(CONFIG, problem_type=problem, num_labels=num_labels)
    model = bert.BertForSequenceClassification(config).eval()
    logits = model(IDS).numpy().astype(np.float64)
    found = model.loss(IDS, labels).item()
    if labels.ndim == 1 and num_labels == 3:
        expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(3), labels]
    elif num_labels == 3:
        expected = np.logaddexp(0, logits) - labels * logits
    else:
        expected = (logits - labels.reshape(logits.shape)) ** 2
    assert found == pytest.approx(expected.mean(), rel=1e-4)


def test_labels_that_do_not_fit_are_refused():
    config = dataclasses.replace(CONFIG, num_labels=3)
    model = bert.BertForSequenceClassification(config)
    with pytest.raises(ValueError, match=r"class|outside"):
        model.loss(IDS, np.array([0, 7, 1]))
    with pytest.raises(
        ValueError, match=r"multi_label_classification must be \(3, 3\), got \(3,\)"
    ):
        model.loss(IDS, np.array([0.0, 7.0, 1.0]))
    regression = dataclasses.replace(config, problem_type="regression")
    with pytest.raises(ValueError, match="not for regression"):
        bert.BertForSequenceClassification(regression).loss(
            IDS, RNG.random((3, 3)), weight=[1, 2, 3]
        )
    with pytest.raises(ValueError, match=r"labels must have input_ids' shape \(3, 9\)"):
        bert.BertForMaskedLM(CONFIG).loss(IDS, IDS[:, 1:])


def test_answers_that_were_cut_off_do_not_count():
    model = bert.BertForQuestionAnswering(CONFIG).eval()
    starts, ends = model(IDS, MASK)
    found = model.loss(IDS, np.array([2, 9, 40]), np.array([5, 8, -100]), MASK)
    first = ops.cross_entropy(starts, np.array([2, -100, -100]))
    last = ops.cross_entropy(ends, np.array([5, 8, -100]))
    close(found.numpy(), (first.numpy() + last.numpy()) / 2, 1e-6)
    with pytest.raises(ValueError, match="two labels, begin and end"):
        bert.BertForQuestionAnswering(dataclasses.replace(CONFIG, num_labels=3))


# --- first values ---------------------------------------------------------------------------------


def test_first_values_follow_the_config():
    config = dataclasses.replace(CONFIG, initializer_range=0.05, hidden_size=64, vocab_size=500)
    tg.manual_seed(0)
    model = bert.BertForPreTraining(config)
    for name, p in model.named_parameters():
        values = p.numpy()
        if name.endswith("bias"):
            np.testing.assert_array_equal(values, 0)
        elif p.ndim == 1:
            np.testing.assert_array_equal(values, 1)
        elif p.size > 1000:
            assert values.std() == pytest.approx(0.05, rel=0.1)
    words = model.bert.embeddings.word_embeddings.weight
    np.testing.assert_array_equal(words.numpy()[0], 0)
    assert model.cls.predictions.decoder.weight is words
    count = sum(p.size for p in BertModel(config).parameters())
    assert config.num_parameters() == count
    drawn = [p.numpy().copy() for p in model.parameters()]
    tg.manual_seed(0)
    again = bert.BertForPreTraining(config)
    for a, b in zip(drawn, again.parameters(), strict=True):
        np.testing.assert_array_equal(a, b.numpy())


def test_the_output_layer_may_be_a_matrix_of_its_own(tmp_path):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    model = bert.BertForMaskedLM(config).eval()
    decoder = model.cls.predictions.decoder
    assert decoder.weight is not model.bert.embeddings.word_embeddings.weight
    model.save_pretrained(tmp_path)
    assert "cls.predictions.decoder.weight" in load_file(tmp_path / pretrained.WEIGHTS)
    loaded = bert.BertForMaskedLM.from_pretrained(tmp_path)
    np.testing.assert_array_equal(loaded(IDS).numpy(), model(IDS).numpy())
    rewrite_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="differ, and are one and the same here"):
        bert.BertForMaskedLM.from_pretrained(tmp_path)


# --- folders --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of pretraining."""
    tg.manual_seed(6)
    bert.BertForPreTraining(CONFIG).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change: Any) -> None:
    arrays = load_file(folder / pretrained.WEIGHTS)
    save_file(change(arrays) or arrays, folder / pretrained.WEIGHTS)


def rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / pretrained.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("head", [BertModel, *HEADS])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_round_trip_keeps_every_bit(head, dtype, tmp_path):
    model = head(CONFIG).to(dtype)
    model.save_pretrained(tmp_path)
    loaded, fit = head.load(tmp_path)
    assert (fit.new, fit.unused) == ([], [])
    assert str(fit) == "the checkpoint fits"
    assert loaded.config == CONFIG
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.dtype == backend.as_dtype(dtype)
        assert found.data.tobytes() == tensor.data.tobytes()


def test_the_folder_is_hugging_faces(folder):
    arrays = load_file(folder / pretrained.WEIGHTS)
    assert "cls.predictions.bias" in arrays
    assert "bert.encoder.layer.1.attention.self.query.weight" in arrays
    assert not [n for n in arrays if "decoder" in n]
    config = json.loads((folder / pretrained.CONFIG).read_text())
    assert config["model_type"] == "bert"
    assert config["architectures"] == ["BertForPreTraining"]
    assert config["torch_dtype"] == "float32"
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    assert config["label2id"] == {"LABEL_0": 0, "LABEL_1": 1}
    assert "num_labels" not in config


def test_shards(folder, tmp_path):
    model = bert.BertForPreTraining.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert (tmp_path / "shards" / pretrained.INDEX).exists()
    again = bert.BertForPreTraining.from_pretrained(tmp_path / "shards")
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize("head", HEADS[1:])
def test_an_encoder_loads_into_any_head(head, folder):
    loaded, fit = head.load(folder)
    encoder = bert.BertForPreTraining.from_pretrained(folder).bert
    for name, p in loaded.bert.named_parameters():
        np.testing.assert_array_equal(p.numpy(), dict(encoder.named_parameters())[name].numpy())
    is_new = head.__name__ not in ("BertForMaskedLM", "BertForNextSentencePrediction")
    assert bool(fit.new) == is_new
    assert all(name.startswith(("classifier.", "qa_outputs.")) for name in fit.new)
    assert any(name.startswith("cls.") for name in fit.unused)
    new = [loaded.state_dict()[name].numpy() for name in fit.new]
    assert all(np.isfinite(array).all() for array in new)
    assert not is_new or any(array.any() for array in new)
    loaded.loss(input_ids=IDS, **LABELS[head.__name__]).backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_a_new_head_is_warned_of_in_one_sentence(folder):
    with pytest.warns(NewWeights, match=r"no classifier\.weight, classifier\.bias: new at random"):
        bert.BertForTokenClassification.from_pretrained(folder, num_labels=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bert.BertForMaskedLM.from_pretrained(folder)  # nothing is new
    tg.manual_seed(1)
    one, _ = bert.BertForTokenClassification.load(folder, num_labels=9)
    tg.manual_seed(2)
    two, _ = bert.BertForTokenClassification.load(folder, num_labels=9)
    assert one.classifier.weight.shape == (9, 16)
    assert (one.classifier.weight.numpy() != two.classifier.weight.numpy()).any()


def test_a_pooler_may_be_missing(folder, tmp_path):
    tokens, _ = bert.BertForTokenClassification.load(folder)
    tokens.save_pretrained(tmp_path / "tokens")
    _, fit = bert.BertForSequenceClassification.load(tmp_path / "tokens")
    assert fit.new == ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    _, fit = BertModel.load(tmp_path / "tokens")
    assert fit.new == ["pooler.dense.weight", "pooler.dense.bias"]
    assert sorted(fit.unused) == ["classifier.bias", "classifier.weight"]


def test_a_head_for_other_labels_is_refused_unless_it_may_begin_anew(folder, tmp_path):
    tokens, _ = bert.BertForTokenClassification.load(folder)
    tokens.save_pretrained(tmp_path / "two")
    with pytest.raises(
        ValueError, match=r"shape \(2, 16\), not \(9, 16\).*num_labels = 9"
    ) as caught:
        bert.BertForTokenClassification.from_pretrained(tmp_path / "two", num_labels=9)
    assert "ignore_mismatched_sizes=True" in str(caught.value)
    assert "\n" not in str(caught.value)
    loaded, fit = bert.BertForTokenClassification.load(
        tmp_path / "two", num_labels=9, ignore_mismatched_sizes=True
    )
    assert fit.new == ["classifier.weight", "classifier.bias"]
    assert loaded.config.num_labels == 9
    names = {i: f"L{i}" for i in range(2)}
    again, fit = bert.BertForTokenClassification.load(tmp_path / "two", id2label=names)
    assert not fit.new
    assert again.config.label2id == {"L0": 0, "L1": 1}


def test_options_that_are_none_are_refused(folder):
    with pytest.raises(TypeError, match=r"no option 'num_label'; did you mean num_labels\?"):
        bert.BertForTokenClassification.from_pretrained(folder, num_label=9)
    with pytest.raises(TypeError, match="BertConfig has no option 'x'"):
        bert.BertForTokenClassification.load(folder, x=1)
    with pytest.raises(ValueError, match="hidden_dropout_prob must be a number"):
        bert.BertForMaskedLM.load(folder, hidden_dropout_prob=2.0)
    drier, _ = bert.BertForMaskedLM.load(folder, hidden_dropout_prob=0.3)
    assert drier.config.hidden_dropout_prob == 0.3


def test_names_without_the_prefix_and_old_names_are_read(folder):
    expected = BertModel.from_pretrained(folder)(IDS).last_hidden_state.numpy()

    def old(arrays):
        arrays = {n: a for n, a in arrays.items() if n.startswith("bert.")}
        arrays = {n.removeprefix("bert."): a for n, a in arrays.items()}
        arrays = {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): a
            for n, a in arrays.items()
        }
        return arrays | {"embeddings.position_ids": np.arange(12)[None]}

    rewrite(folder, old)
    np.testing.assert_array_equal(
        BertModel.from_pretrained(folder)(IDS).last_hidden_state.numpy(), expected
    )
    loaded, fit = bert.BertForTokenClassification.load(folder)
    np.testing.assert_array_equal(loaded.bert(IDS).last_hidden_state.numpy(), expected)
    assert fit.new == ["classifier.weight", "classifier.bias"]


def test_a_stored_output_layer_must_be_the_embedding(folder):
    def stored(arrays):
        words = arrays["bert.embeddings.word_embeddings.weight"]
        arrays["cls.predictions.decoder.weight"] = words.copy()
        arrays["cls.predictions.decoder.bias"] = arrays["cls.predictions.bias"].copy()

    rewrite(folder, stored)
    bert.BertForPreTraining.from_pretrained(folder)

    def other(arrays):
        arrays["cls.predictions.decoder.weight"][3, 3] += 1

    rewrite(folder, other)
    with pytest.raises(ValueError, match=r"decoder\.weight differ, and are one"):
        bert.BertForPreTraining.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("bert.encoder.layer.0.output.dense.weight") is None, "it has no bert.enc"),
        (lambda a: a.update({"bert.encoder.layer.2.output.dense.weight": np.ones(3)}), "no place"),
        (lambda a: a.update({"embeddings.LayerNorm.bias": np.ones(16)}), "twice, as"),
        (
            lambda a: a.update({"bert.embeddings.word_embeddings.weight": np.ones((5, 16))}),
            r"has the shape \(5, 16\), not \(37, 16\) as by config.json",
        ),
        (lambda a: {"x": np.ones(3)}, "it has no bert.emb"),
    ],
)
def test_a_file_of_another_network_is_refused_in_one_sentence(folder, change, words):
    rewrite(folder, lambda a: r if isinstance(r := change(a), dict) else None)
    for head in (bert.BertForTokenClassification, BertModel):
        with pytest.raises(ValueError, match=words.replace("bert.", "(bert.)?")) as caught:
            head.from_pretrained(folder)
        assert "cannot be used" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "model_type must be 'bert'"),
        ({"is_decoder": True}, "is_decoder must be False"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be absolute"),
        ({"hidden_size": 18}, "multiple of num_attention_heads"),
        ({"hidden_act": "elu2"}, "hidden_act must be one of"),
        ({"num_hidden_layers": 10**9}, "over 10¹² parameters"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob must be a number"),
        ({"layer_norm_eps": None}, "layer_norm_eps must be a number"),
        ({"pad_token_id": 37}, "pad_token_id must be below vocab_size"),
        ({"id2label": {"0": "O", "2": "PER"}}, "id2label must name the labels"),
        ({"id2label": {"0": "O", "1": "O"}}, "id2label must name the labels"),
        ({"id2label": ["O"]}, "id2label must name the labels"),
        ({"num_labels": 5}, "num_labels is 5, but id2label names 2"),
        ({"problem_type": "guessing"}, "problem_type must be one of"),
        ({"vocab_size": "many"}, "vocab_size must be an integer"),
    ],
)
def test_a_config_that_makes_no_bert(folder, changes, words):
    rewrite_config(folder, **changes)
    with pytest.raises(ValueError, match=words) as caught:
        bert.BertForPreTraining.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_config_of_the_hub_is_read():
    """That of bert-base-uncased, with keys that do not concern us."""
    theirs = {
        "architectures": ["BertForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "transformers_version": "4.6.0.dev0",
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": 30522,
    }
    assert BertConfig.from_dict(theirs) == BertConfig()


def test_input_that_does_not_fit(model):
    for arguments, words in (
        ((IDS[0],), r"input_ids of shape \(B, T\)"),
        ((np.ones((1, 13), int),), "13 tokens, but this BERT sees at most .* = 12"),
        ((IDS, MASK[:, 1:]), "attention_mask"),
        ((IDS, np.ones((3, 9, 8))), r"attention_mask must be \(3, 9\) or \(3, 9, 9\)"),
        ((IDS, None, SEGMENTS[:2]), r"token_type_ids must be \(3, 9\), got \(2, 9\)"),
        ((IDS, None, None, np.arange(8)), r"position_ids must be \(3, 9\) or \(9,\), got \(8,\)"),
        ((IDS + 36,), "outside the table"),
        ((IDS, None, SEGMENTS + 1), "id 2 is outside"),
    ):
        with pytest.raises((ValueError, IndexError), match=words):
            model(*arguments)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2**31))
def test_law_padding_never_reaches_a_token(lengths, seed):
    """Whatever stands in the padding, and however much of it there is."""
    tg.manual_seed(3)
    model = BertModel(CONFIG).eval()
    rng = np.random.default_rng(seed)
    mask = np.arange(9) < np.array(lengths)[:, None]
    ids = rng.integers(1, 37, mask.shape)
    other = np.where(mask, ids, rng.integers(0, 37, mask.shape))
    with no_grad():
        one, two = (model(x, mask).last_hidden_state.numpy() for x in (ids, other))
    np.testing.assert_array_equal(one[mask], two[mask])


def test_float64_stays_float64(model):
    assert model.to("float64").sentence_embedding(IDS, MASK).dtype == np.float64


def test_flops_of_a_step():
    model = bert.BertForPreTraining(CONFIG)
    matrices = 2 * (4 * 16 * 16 + 2 * 16 * 24)
    assert model.flops_per_token(9) == 6 * matrices + 12 * 2 * 9 * 16
