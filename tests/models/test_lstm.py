"""The LSTM language model and classifier."""

import math

import numpy as np
import pytest

from tinygrad_llm import Tensor, manual_seed, no_grad, ops
from tinygrad_llm.generate import GenerationConfig, beam_search, generate, samples
from tinygrad_llm.models import auto
from tinygrad_llm.models.lstm import (
    LSTMConfig,
    LSTMForSequenceClassification,
    LSTMLanguageModel,
    StateCache,
    pooled,
)
from tinygrad_llm.optim import Adam

SMALL = {"vocab_size": 11, "n_positions": 8, "n_embd": 6, "n_hidden": 6, "n_layer": 2}


def model(**options):
    manual_seed(0)
    return LSTMLanguageModel(LSTMConfig(**{**SMALL, **options}))


def ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 11, shape)


def test_the_logits_are_those_of_the_formula():
    lstm = model(n_layer=1)
    weights = {name: p.numpy().astype(np.float64) for name, p in lstm.named_parameters()}
    text = ids(1, 5)
    e, prefix = weights["network.embedding.weight"], "network.lstm."
    h = c = np.zeros(6)
    for t in range(5):
        gates = (
            weights[f"{prefix}weight_ih_l0"] @ e[text[0, t]]
            + weights[f"{prefix}weight_hh_l0"] @ h
            + weights[f"{prefix}bias_ih_l0"]
            + weights[f"{prefix}bias_hh_l0"]
        )
        i, f, g, o = np.split(gates, 4)
        c = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
        h = np.tanh(c) / (1 + np.exp(-o))
    expected = e @ h + weights["lm_head.bias"]  # the head is the embedding again
    np.testing.assert_allclose(lstm(text).numpy()[0, -1], expected, atol=1e-5)
    np.testing.assert_allclose(lstm.next_logits(text).numpy()[0], expected, atol=1e-5)


def test_no_logit_depends_on_what_follows():
    lstm, text = model(), ids(2, 8)
    other = text.copy()
    other[:, 5:] = (other[:, 5:] + 1) % 11
    a, b = lstm(text).numpy(), lstm(other).numpy()
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert (a[:, 5:] != b[:, 5:]).any()


def test_the_loss_is_the_mean_over_the_targets_that_count():
    lstm, text = model(), ids(2, 5)
    targets = ids(2, 5, seed=1)
    targets[0, :3] = -100
    logits = lstm(text).numpy().astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    counted = targets != -100
    expected = -log_p[counted, targets[counted]].mean()
    assert lstm.loss(text, targets).item() == pytest.approx(expected, rel=1e-5)


def test_a_text_in_two_parts_with_the_state_carried_is_the_text():
    lstm, text = model().eval(), ids(3, 8)
    with no_grad():
        whole, cache = lstm(text).numpy(), lstm.new_cache()
        parts = [lstm(text[:, :5], cache).numpy(), lstm(text[:, 5:], cache).numpy()]
        np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-6)
        assert cache.length == 8
        cache.select([2, 2, 0])
        after = lstm.next_logits(text[[2, 2, 0], :1], cache).numpy()
        longer = lstm(np.concatenate([text, text[:, :1]], axis=1)).numpy()[[2, 2, 0], -1]
        np.testing.assert_allclose(after, longer, atol=1e-6)
        cache.clear()
        np.testing.assert_allclose(lstm(text, cache).numpy(), whole, atol=1e-6)


def test_a_cache_and_gradients_do_not_go_together():
    with pytest.raises(ValueError, match=r"no_grad\(\)"):
        model()(ids(1, 3), StateCache())


def test_generating_with_the_state_writes_what_reading_all_anew_writes():
    lstm = model(n_positions=64).eval()
    for penalty in (1.0, 1.5):
        texts = [
            list(
                generate(
                    lstm,
                    [1, 2, 3],
                    20,
                    temperature=0.0,
                    repetition_penalty=penalty,
                    use_cache=cached,
                )
            )
            for cached in (True, False)
        ]
        assert texts[0] == texts[1]
        assert len(texts[0]) == 20
    beams = [
        beam_search(lstm, [1, 2], GenerationConfig(6, num_beams=3, use_cache=cached))[0].ids
        for cached in (True, False)
    ]
    assert beams[0] == beams[1]


def test_several_texts_are_written_side_by_side():
    from tinygrad_llm.backend import RandomStream

    lstm = model(n_positions=64).eval()
    config = GenerationConfig(10, num_return_sequences=2)
    drawn: dict[int, list[int]] = {0: [], 1: []}
    streams = [RandomStream(3), RandomStream(4)]
    for i, token in samples(lstm, [1], config, streams=streams):
        drawn[i].append(token)
    for i, seed in enumerate((3, 4)):
        alone = generate(lstm, [1], 10, stream=RandomStream(seed))
        assert list(alone) == drawn[i]


def test_it_goes_to_a_folder_and_back(tmp_path):
    lstm = model(dropout=0.1, eos_token_id=3)
    lstm.save_pretrained(tmp_path)
    back = auto.from_pretrained(tmp_path)
    assert isinstance(back, LSTMLanguageModel)
    assert back.config == LSTMConfig.from_dict(lstm.config.to_dict())
    assert not back.training
    assert back.lm_head.weight is back.network.embedding.weight
    np.testing.assert_array_equal(back(ids(1, 4)).numpy(), lstm.eval()(ids(1, 4)).numpy())


def test_a_classifier_can_begin_with_the_network_of_a_language_model(tmp_path):
    lstm = model()
    lstm.save_pretrained(tmp_path)
    classifier, loaded = LSTMForSequenceClassification.load(tmp_path, num_labels=3)
    assert loaded.new == ["classifier.weight", "classifier.bias"]
    for name, p in lstm.network.named_parameters():
        np.testing.assert_array_equal(dict(classifier.network.named_parameters())[name], p)
    assert classifier(ids(2, 4)).shape == (2, 3)


def test_untied_heads_and_other_widths():
    lstm = model(n_hidden=9, tie_word_embeddings=False)
    assert lstm(ids(1, 3)).shape == (1, 3, 11)
    assert lstm.lm_head.weight.shape == (11, 9)
    inside = sum(p.size for p in lstm.network.parameters())
    assert inside == lstm.config.num_parameters()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bidirectional": True}, "it would see the token"),
        ({"n_hidden": 7}, "needs n_embd = n_hidden, got 6 and 7"),
        ({"n_layer": 0}, "n_layer must be an integer of at least 1"),
        ({"dropout": 1.0}, "dropout must be a number from 0 to below 1"),
        ({"pooling": "last"}, "pooling must be one of max, mean"),
        ({"id2label": {0: "no"}}, "must name the labels 0 to 1"),
        ({"vocab_size": 10**12}, "more than any machine has"),
    ],
)
def test_what_makes_no_network_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        model(**options)


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="model_type must be 'tinygrad-llm-lstm' for an LSTM"):
        LSTMConfig.from_dict({"model_type": "gpt2"})


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shape \(B, T\), got \(3,\)"):
        model()(ids(3))
    with pytest.raises(ValueError, match="targets must have the shape"):
        model().loss(ids(2, 3), ids(2, 4))


# --- classification -------------------------------------------------------------------------------


def classifier(**options):
    manual_seed(0)
    config = LSTMConfig(**{**SMALL, "bidirectional": True, "num_labels": 3, **options})
    return LSTMForSequenceClassification(config).eval()


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_padding_changes_nothing(pooling):
    net, text = classifier(pooling=pooling), ids(3, 7)
    lengths = [7, 4, 1]
    mask = (np.arange(7) < np.array(lengths)[:, None]).astype(np.int64)
    together = net(text, mask).numpy()
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(together[i], net(text[i : i + 1, :n]).numpy()[0], atol=1e-6)


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_two_texts_are_pooled_apart_and_compared(pooling, tmp_path):
    net, text = classifier(pooling=pooling, compare=True), ids(2, 6)
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2])
    types = np.array([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]])
    logits = net(text, mask, types).numpy()
    weight, bias = (p.numpy() for p in net.classifier.parameters())
    for b, n in enumerate([6, 4]):
        states, _ = net.network(ops.as_tensor(text[b : b + 1, :n]), None, None)
        parts = (states.numpy()[0][types[b, :n] == which] for which in (0, 1))
        u, v = (getattr(part, pooling)(axis=0) for part in parts)
        features = np.concatenate([u, v, np.abs(u - v), u * v])
        np.testing.assert_allclose(logits[b], weight @ features + bias, atol=1e-5)
    net.save_pretrained(tmp_path)
    again = LSTMForSequenceClassification.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again(text, mask, types).numpy(), logits)
    with pytest.raises(ValueError, match="token_type_ids must say"):
        net(text, mask)


def test_pooling_is_what_it_says_and_a_text_of_no_tokens_gives_zeros():
    x = Tensor(np.array([[[1.0, -5.0], [3.0, -7.0], [9.0, 9.0]], [[2.0, 2.0]] * 3]))
    real = np.array([[True, True, False], [False] * 3])
    assert pooled(x, real, "max").numpy().tolist() == [[3.0, -5.0], [0.0, 0.0]]
    assert pooled(x, real, "mean").numpy().tolist() == [[2.0, -6.0], [0.0, 0.0]]
    assert pooled(x, None, "mean").numpy()[1].tolist() == [2.0, 2.0]


def test_a_gap_in_the_mask_is_refused():
    with pytest.raises(ValueError, match="all 1 must come before all 0"):
        classifier()(ids(1, 3), np.array([[1, 0, 1]]))


def test_the_classifier_goes_to_a_folder_and_back_with_its_labels(tmp_path):
    net = classifier(id2label={0: "a", 1: "b", 2: "c"})
    net.save_pretrained(tmp_path)
    back = auto.from_pretrained(tmp_path)
    assert back.config.labels == {0: "a", 1: "b", 2: "c"}
    np.testing.assert_array_equal(back(ids(2, 5)).numpy(), net(ids(2, 5)).numpy())


def test_both_learn():
    text = np.tile(np.arange(8), (4, 1))
    lstm = model(n_layer=1)
    optimizer = Adam(lstm.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        lstm.loss(text[:, :-1], text[:, 1:]).backward()
        optimizer.step()
    assert lstm.loss(text[:, :-1], text[:, 1:]).item() < 0.05
    assert lstm.loss(text[:, :-1], text[:, 1:]).item() < math.log(11)

    net, texts = classifier(n_layer=1), ids(24, 5)
    labels = (texts == 3).any(axis=1).astype(np.int64)
    optimizer = Adam(net.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        net.loss(texts, labels).backward()
        optimizer.step()
    assert (net(texts).numpy().argmax(axis=1) == labels).all()


def test_the_loss_of_a_classifier_in_half_precision_is_float32():
    net, texts = classifier(n_layer=1).eval(), ids(6, 5)
    labels = np.arange(6) % 2
    expected = net.loss(texts, labels).item()
    for p in net.parameters():
        p.data = p.data.astype(np.float16)
    loss = net.loss(texts, labels)
    assert loss.dtype == np.float32
    assert loss.item() == pytest.approx(expected, rel=0.02)
    loss.backward()
