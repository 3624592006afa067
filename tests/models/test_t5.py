"""T5: distances in buckets, its gated and untied forms, padding, cache, folder."""

import json
import math
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tinygrad_llm import backend, no_grad, ops
from tinygrad_llm.gradcheck import gradcheck
from tinygrad_llm.models.padding import ALL
from tinygrad_llm.models.t5 import T5, T5Attention, T5Config, relative_buckets
from tinygrad_llm.nn import DecoderCache

SIZES: dict[str, Any] = {
    "vocab_size": 17,
    "d_model": 12,
    "d_kv": 5,
    "d_ff": 16,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}
KINDS: list[dict[str, Any]] = [
    {},
    {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    {"feed_forward_proj": "gated-silu", "num_decoder_layers": 1},
]
RNG = np.random.default_rng(0)
SOURCE, TARGET = RNG.integers(2, 17, (3, 14)), RNG.integers(2, 17, (3, 13))
REAL = np.arange(14) < np.array([14, 9, 4])[:, None]


def make(**options) -> T5:
    backend.manual_seed(1)
    return T5(T5Config(**{**SIZES, **options})).to("float64").eval()


# --- distances ------------------------------------------------------------------------------------


def test_buckets_are_exact_when_near_and_coarse_when_far():
    # [−20 … 20] with 8 buckets to 10: 0 1 | 2 3 to the left, 5 | 6 7 to the right
    found = relative_buckets(np.array([-20, -10, -4, -3, -2, -1, 0, 1, 2, 5, 20]), True, 8, 10)
    assert found.tolist() == [3, 3, 2, 2, 2, 1, 0, 5, 6, 7, 7]
    found = relative_buckets(np.array([-20, -7, -4, -3, -1, 0, 1, 9]), False, 8, 10)
    assert found.tolist() == [7, 6, 4, 3, 1, 0, 0, 0]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 10), (16, 64), (64, 256)])
def test_buckets_grow_with_the_distance_and_use_them_all(bidirectional, buckets, furthest):
    distances = np.arange(2 * furthest)
    left = relative_buckets(-distances, bidirectional, buckets, furthest)
    assert (np.diff(left) >= 0).all()
    count = buckets // 2 if bidirectional else buckets
    assert set(left.tolist()) == set(range(count))
    assert left[: count // 2].tolist() == list(range(count // 2))
    right = relative_buckets(distances[1:], bidirectional, buckets, furthest)
    if bidirectional:
        np.testing.assert_array_equal(right, left[1:] + count)
    else:
        assert not right.any()


def test_buckets_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = np.arange(-3000, 3000)
    for both in (True, False):
        for buckets, furthest in ((32, 128), (8, 10), (16, 64), (64, 256)):
            expected = t5.T5Attention._relative_position_bucket(
                torch.tensor(distances), both, buckets, furthest
            )
            found = relative_buckets(distances, both, buckets, furthest)
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("in_decoder", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_the_gradient_reaches_the_biases(in_decoder, padded):
    """Of the op: with a bias that is one for all texts, a causal mask and lengths."""
    backend.manual_seed(0)
    part = T5Attention(T5Config(**SIZES), in_decoder, has_bias=True).to("float64")
    x = ops.randn(2, 6, 12).astype("float64")
    assert part.relative_attention_bias is not None
    table = part.relative_attention_bias.weight.detach()
    lengths = np.array([6, 4]) if padded else None

    def run(weight):
        buckets = relative_buckets(
            np.arange(6) - np.arange(6)[:, None], not in_decoder, buckets=8, max_distance=10
        )
        bias = ops.embedding(buckets, weight).transpose(2, 0, 1).unsqueeze(0)
        return part(x, attn_mask=bias, lengths=lengths)

    np.testing.assert_allclose(
        run(table).numpy(), part(x, attn_mask=part.position_bias(0, 6), lengths=lengths).numpy()
    )
    assert gradcheck(run, table)


def test_scores_are_not_divided_and_the_head_is():
    model = make()
    memory = model.encode(SOURCE)
    x = model.decoder(ops.as_tensor(TARGET), ALL, memory)
    logits = model(SOURCE, TARGET).numpy()
    np.testing.assert_allclose(logits, (x.numpy() / math.sqrt(12)) @ model.shared.weight.numpy().T)
    assert make(tie_word_embeddings=False).config.scales_outputs is False
    assert make(scale_decoder_outputs=False).config.scales_outputs is False


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
def test_padding_on_either_side_changes_nothing(options):
    model = make(**options)
    assert model.num_parameters() == model.config.num_parameters()
    with no_grad():
        whole = model(SOURCE, TARGET, REAL).numpy()
        for row, n in enumerate(REAL.sum(axis=1)):
            alone = model(SOURCE[row : row + 1, :n], TARGET[row : row + 1]).numpy()
            np.testing.assert_allclose(alone[0], whole[row], rtol=1e-9, atol=1e-11)
            left = np.zeros((1, 14), int)
            left[0, 14 - n :] = SOURCE[row, :n]
            found = model(left, TARGET[row : row + 1], (np.arange(14) >= 14 - n)[None]).numpy()
            np.testing.assert_allclose(found[0], whole[row], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("cuts", [list(range(1, 13)), [5, 6]])
def test_a_target_in_parts_with_a_cache_is_the_whole(options, cuts):
    model = make(**options)
    cache = DecoderCache(model.config)
    with no_grad():
        memory = model.encode(SOURCE, REAL)
        whole = model.decode(TARGET, memory, REAL).numpy()
        parts = [
            model.decode(part, memory, REAL, cache).numpy()
            for part in np.split(TARGET, cuts, axis=1)
        ]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-9, atol=1e-11)


def test_dropout_is_for_training():
    model = make(dropout_rate=0.3)
    with no_grad():
        np.testing.assert_array_equal(model(SOURCE, TARGET).numpy(), model(SOURCE, TARGET).numpy())
        model.train()
        one, two = (model(SOURCE, TARGET).numpy() for _ in range(2))
    assert np.abs(one - two).max() > 1e-3


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
def test_a_folder_keeps_every_bit(options, tmp_path):
    model = make(**options)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["is_encoder_decoder"] is True
    names = set(load_file(tmp_path / "model.safetensors"))
    assert ("lm_head.weight" in names) is not model.config.tie_word_embeddings
    assert not any("embed_tokens" in name for name in names)
    again = T5.from_pretrained(tmp_path)
    assert again.config.scales_outputs == model.config.scales_outputs
    with no_grad():
        np.testing.assert_array_equal(again(SOURCE, TARGET).numpy(), model(SOURCE, TARGET).numpy())


def test_old_files_hold_the_embedding_thrice_and_a_bias_that_is_not_used(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    arrays = load_file(file)
    for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        arrays[f"{name}.weight"] = arrays["shared.weight"].copy()
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    arrays[unused] = np.ones((8, 3))
    save_file(arrays, file)
    again = T5.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.shared.weight
    np.testing.assert_array_equal(again(SOURCE, TARGET).numpy(), model(SOURCE, TARGET).numpy())
    arrays["encoder.embed_tokens.weight"] += 1
    save_file(arrays, file)
    with pytest.raises(ValueError, match="differ, and are one and the same here"):
        T5.from_pretrained(tmp_path)


def test_a_head_of_its_own_is_known_from_the_file(tmp_path):
    """`transformers` 5 writes tie_word_embeddings = true whatever the head is."""
    model = make(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"tie_word_embeddings": True}
    path.write_text(json.dumps(config))
    again = T5.from_pretrained(tmp_path)
    assert again.lm_head.weight is not again.shared.weight
    np.testing.assert_array_equal(again(SOURCE, TARGET).numpy(), model(SOURCE, TARGET).numpy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads must be an integer of at least 1"),
        ({"relative_attention_num_buckets": 6}, "must be a multiple of 4"),
        ({"relative_attention_max_distance": 4}, "must be above half"),
        ({"feed_forward_proj": "gated-sine"}, "feed_forward_proj must be one of"),
        ({"feed_forward_proj": None}, "feed_forward_proj must be one of"),
        ({"pad_token_id": None}, "pad_token_id must be from 0 to 16"),
        ({"tie_word_embeddings": 1.5}, "tie_word_embeddings must be one of"),
    ],
)
def test_a_config_that_makes_no_network(options, message):
    with pytest.raises(ValueError, match=message):
        T5Config(**{**SIZES, **options})


def test_another_kind_of_model_is_refused():
    with pytest.raises(ValueError, match="model_type must be one of t5, got 'mt5'"):
        T5Config.from_dict({"model_type": "mt5"})
