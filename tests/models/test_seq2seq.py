"""The encoder–decoder: what it may see, its cache, its folder, and two tasks that it must learn."""

import math
from typing import Any

import numpy as np
import pytest

from tinygrad_llm import backend, no_grad, optim
from tinygrad_llm.generate import GenerationConfig, generate_all
from tinygrad_llm.models import auto
from tinygrad_llm.models.encoder_decoder import shift_right
from tinygrad_llm.models.seq2seq import Seq2Seq, Seq2SeqConfig, sinusoids
from tinygrad_llm.nn import DecoderCache

SIZES: dict[str, Any] = {
    "vocab_size": 13,
    "d_model": 12,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 10,
    "eos_token_id": 1,
}
KINDS: list[dict[str, Any]] = [
    {},
    {"norm_first": True, "position_embedding": "learned", "activation_function": "gelu"},
    {"share_encoder_decoder_embeddings": False, "scale_embedding": False},
    {"tie_word_embeddings": False},
]
RNG = np.random.default_rng(0)
SOURCE = RNG.integers(2, 13, (3, 7))
TARGET = RNG.integers(2, 13, (3, 6))
REAL = np.arange(7) < np.array([7, 5, 3])[:, None]


def make(**options) -> Seq2Seq:
    backend.manual_seed(1)
    return Seq2Seq(Seq2SeqConfig(**{**SIZES, **options})).to("float64").eval()


@pytest.mark.parametrize("options", KINDS)
def test_a_position_sees_the_source_and_what_is_before_it(options):
    model = make(**options)
    assert model.num_parameters() == model.config.num_parameters()
    with no_grad():
        logits = model(SOURCE, TARGET).numpy()
        assert logits.shape == (3, 6, 13)
        later = TARGET.copy()
        later[:, 4] = (later[:, 4] + 1) % 13
        other = model(SOURCE, later).numpy()
        np.testing.assert_allclose(other[:, :4], logits[:, :4], rtol=1e-12)
        assert np.abs(other[:, 4:] - logits[:, 4:]).max(axis=2).min() > 1e-6
        source = SOURCE.copy()
        source[:, 6] = (source[:, 6] + 1) % 13
        assert np.abs(model(source, TARGET).numpy() - logits).max(axis=2).min() > 1e-9


@pytest.mark.parametrize("options", KINDS)
def test_padding_of_the_source_changes_nothing(options):
    model = make(**options)
    with no_grad():
        whole = model(SOURCE, TARGET, REAL).numpy()
        for row, n in enumerate(REAL.sum(axis=1)):
            alone = model(SOURCE[row : row + 1, :n], TARGET[row : row + 1]).numpy()
            np.testing.assert_allclose(alone[0], whole[row], rtol=1e-9, atol=1e-12)
        for mask in (REAL, REAL[:, ::-1].copy()):  # by lengths, and by a mask of keys
            changed = np.where(mask, SOURCE, 5)
            np.testing.assert_array_equal(
                model(changed, TARGET, mask.astype(int)).numpy(),
                model(SOURCE, TARGET, mask).numpy(),
            )


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("cuts", [[1, 2, 3, 4, 5], [4]])
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
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-9, atol=1e-12)


def test_a_cache_goes_on_with_the_rows_selected():
    model, rows = make(), [2, 0, 0]
    cache = DecoderCache(model.config)
    with no_grad():
        memory = model.encode(SOURCE, REAL)
        model.decode(TARGET[:, :3], memory, REAL, cache)
        cache.select(rows)
        found = model.decode(TARGET[rows, 3:], memory[rows], REAL[rows], cache).numpy()
        whole = model.decode(TARGET[rows], memory[rows], REAL[rows]).numpy()
    np.testing.assert_allclose(found, whole[:, 3:], rtol=1e-9, atol=1e-12)


def test_a_cache_has_no_gradients():
    model = make()
    memory = model.encode(SOURCE)
    with pytest.raises(ValueError, match="within no_grad"):
        model.decode(TARGET, memory, None, DecoderCache(model.config))


def test_sinusoids_are_the_papers():
    table = sinusoids(9, 6)
    for t in (0, 3, 8):
        for i in range(3):
            angle = t / 10000 ** (2 * i / 6)
            assert table[t, 2 * i] == pytest.approx(math.sin(angle))
            assert table[t, 2 * i + 1] == pytest.approx(math.cos(angle))
    assert sinusoids(4, 5).shape == (4, 5)


def test_the_loss_is_teacher_forcing_and_smoothing():
    model = make()
    labels = TARGET.copy()
    labels[1, 4:] = -100
    shifted = shift_right(labels, 7, 0).numpy()
    assert shifted[1].tolist() == [7, *TARGET[1, :4], 0]
    model = make(decoder_start_token_id=7)
    logits = model(SOURCE, shifted, REAL).numpy()
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    counted = labels != -100
    picked = np.take_along_axis(log_p, TARGET[..., None], -1)[..., 0]
    assert model.loss(SOURCE, labels, REAL).item() == pytest.approx(-picked[counted].mean())
    smooth = -(0.8 * picked + 0.2 * log_p.mean(-1))[counted].mean()
    found = model.loss(SOURCE, labels, REAL, label_smoothing=0.2).item()
    assert found == pytest.approx(smooth)


@pytest.mark.parametrize("options", KINDS)
def test_a_folder_keeps_every_bit(options, tmp_path):
    model = make(**options)
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is Seq2Seq
    assert again.config == model.config
    for name, tensor in again.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), model.state_dict()[name].numpy())
    with no_grad():
        np.testing.assert_array_equal(
            again(SOURCE, TARGET, REAL).numpy(), model(SOURCE, TARGET, REAL).numpy()
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, "d_model must be an integer of at least 1"),
        ({"encoder_attention_heads": 5}, "multiple of encoder_attention_heads, got 12 and 5"),
        ({"position_embedding": "none"}, "position_embedding must be one of sinusoidal, learned"),
        ({"activation_function": "sine"}, "activation_function must be one of"),
        ({"dropout": 1.0}, "dropout must be a number from 0 to below 1"),
        ({"decoder_start_token_id": 13}, "decoder_start_token_id must be from 0 to 12"),
        ({"eos_token_id": -1}, "eos_token_id must be an integer from 0"),
        ({"norm_first": "yes"}, "norm_first must be one of True, False"),
    ],
)
def test_a_config_that_makes_no_network(options, message):
    with pytest.raises(ValueError, match=message):
        Seq2SeqConfig(**{**SIZES, **options})


def test_input_that_does_not_fit():
    model = make()
    with pytest.raises(ValueError, match=r"the source has 11 tokens, but this Seq2Seq takes"):
        model(np.ones((1, 11), int), TARGET[:1])
    with pytest.raises(ValueError, match=r"the target has 11 tokens"):
        model(SOURCE[:1], np.ones((1, 11), int))
    with pytest.raises(ValueError, match=r"input_ids must be of shape \(B, T\), got \(7,\)"):
        model(SOURCE[0], TARGET[:1])
    with pytest.raises(ValueError, match=r"attention_mask must be of shape \(3, 7\)"):
        model(SOURCE, TARGET, REAL[:, :5])
    with pytest.raises(ValueError, match="attention_mask must be 1 where a token is real"):
        model(SOURCE, TARGET, REAL * 2)


# --- two tasks ------------------------------------------------------------------------------------

SYMBOLS, LONGEST = 10, 6


def sequences(n: int, rng: np.random.Generator, held_out: bool) -> list[list[int]]:
    """Of 2 to 6 symbols; those whose sum divides by 7 are held out, the others trained on."""
    found: list[list[int]] = []
    while len(found) < n:
        sequence = rng.integers(2, 2 + SYMBOLS, rng.integers(2, LONGEST + 1)).tolist()
        if (sum(sequence) % 7 == 0) == held_out:
            found.append(sequence)
    return found


def arrays(texts: list[list[int]], step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, mask, labels): the target is the source, or with step −1 its reverse, and the end."""
    ids, labels = np.zeros((len(texts), LONGEST), int), np.full((len(texts), LONGEST + 1), -100)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        labels[row, : len(text) + 1] = [*text[::step], 1]
    return ids, ids > 0, labels


@pytest.mark.parametrize("step", [1, -1], ids=["copy", "reverse"])
def test_copying_and_reversing_are_learnt_to_the_last_sequence(step):
    backend.manual_seed(0)
    config = Seq2SeqConfig(
        vocab_size=SYMBOLS + 2,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=LONGEST + 1,
        eos_token_id=1,
    )
    model, rng, steps = Seq2Seq(config), np.random.default_rng(0), 500
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0.0)
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, (i + 1) / 30) * (1 - i / steps)
        ids, mask, labels = arrays(sequences(64, rng, held_out=False), step)
        optimizer.zero_grad()
        model.loss(ids, labels, mask).backward()
        optimizer.step()
    texts = sequences(200, rng, held_out=True)
    written = generate_all(model, texts, GenerationConfig(LONGEST + 1, temperature=0.0))
    assert written == [[*text[::step], 1] for text in texts]
