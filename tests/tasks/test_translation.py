"""Pairs of texts: batches by length, what is too long, going on, and a model that learns them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from tinygrad_llm import backend, optim
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.generate import GenerationConfig, source_ids
from tinygrad_llm.models.seq2seq import Seq2Seq, Seq2SeqConfig
from tinygrad_llm.models.t5 import T5, T5Config
from tinygrad_llm.tasks.translation import TranslationTask, translate

PAIRS = [("ab" * (i % 7 + 1) + str(i), str(i) + "b" * (i % 5)) for i in range(60)]


def task(pairs=PAIRS, validation=PAIRS[:9], **options) -> TranslationTask:
    settings: dict[str, Any] = {"batch_size": 4, "seed": 1, **options}
    return TranslationTask(pairs, validation, Tokenizer.byte(), **settings)


def texts(batch):
    """The pairs of a batch as text, the ends left out."""
    decode = Tokenizer.byte().decode
    for ids, real, labels in zip(*batch, strict=True):
        source, target = ids[real].tolist(), labels[labels >= 0].tolist()
        assert source[-1] == target[-1] == 256
        yield decode(source[:-1]), decode(target[:-1])


def test_an_epoch_has_every_pair_once_each_with_its_end():
    translation = task()
    n = len(translation.batches)
    epochs = [[pair for _ in range(n) for pair in texts(translation.next_batch())] for _ in "12"]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(PAIRS)
    assert epochs[0] != epochs[1]
    held_out = [pair for batch in translation.validation() for pair in texts(batch)]
    assert sorted(held_out) == sorted(PAIRS[:9])


def test_similar_lengths_come_together():
    translation = task(PAIRS * 4, batch_size=8)
    real = padded = 0
    for _ in range(len(translation.batches)):
        batch = translation.next_batch()
        real += int(batch.attention_mask.sum())
        padded += batch.attention_mask.size
    assert real / padded > 0.85
    assert np.ptp([len(source) for source, _ in PAIRS]) > 10


def test_validation_is_the_same_every_time():
    translation = task(eval_batches=2)
    first, again = list(translation.validation()), list(translation.validation())
    assert len(first) == 2
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.labels, two.labels)
    assert len(list(task(eval_batches=99).validation())) == 3


def test_what_is_too_long_is_left_out_whole_and_counted():
    said = []
    report = SimpleNamespace(say=said.append, progress=lambda *_: None)
    translation = task(max_source=9, max_target=5, report=report)
    short = [p for p in PAIRS if len(p[0]) + 1 <= 9 and len(p[1]) + 1 <= 5]
    assert len(translation.train) == len(short) < len(PAIRS)
    lost = sum(len(p[0]) > 8 or len(p[1]) > 4 for p in [*PAIRS, *PAIRS[:9]])
    assert translation.left_out == lost
    assert said[0] == (
        f"left out {60 - len(short)} of 60 pairs to train on: over 9 tokens (source) or 5 (target)"
    )
    with pytest.raises(ValueError, match="all 60 pairs to train on are longer than 2 tokens"):
        task(max_source=2)


def test_going_on_gives_the_batches_that_would_have_come():
    one, two = task(), task()
    for _ in range(17):  # into the second epoch
        one.next_batch()
    two.load_state(one.state())
    for _ in range(20):
        for a, b in zip(one.next_batch(), two.next_batch(), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="the pairs have changed since the run began"):
        task(PAIRS[1:]).load_state(one.state())


def test_what_cannot_be_trained_on(tmp_path):
    with pytest.raises(ValueError, match="no pair of texts to train on"):
        task([])
    with pytest.raises(ValueError, match="no pair of texts to validate on"):
        task(validation=[])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        task(batch_size=0)
    wordpiece = Tokenizer.wordpiece("a b c", 12)
    if wordpiece.eos_id is None:
        with pytest.raises(ValueError, match="needs a tokenizer with"):
            TranslationTask(PAIRS, PAIRS, wordpiece, batch_size=2)
    task().save(tmp_path)
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").eos_id == 256


def test_labels_are_smoothed_in_training_only_and_translating_uses_what_was_learnt():
    backend.manual_seed(0)
    pairs = [("ab", "x"), ("cd", "yy"), ("efg", "zx")]
    translation = task(pairs, pairs, batch_size=3, label_smoothing=0.1)
    config = Seq2SeqConfig(
        vocab_size=257,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=8,
        decoder_start_token_id=256,
        eos_token_id=256,
    )
    model = Seq2Seq(config)
    batch = translation.next_batch()
    assert translation.size(batch) == 2 + 3 + 3
    plain = model.loss(batch.input_ids, batch.labels, batch.attention_mask).item()
    smooth = translation.loss(model.train(), batch).item()
    assert translation.loss(model.eval(), batch).item() == pytest.approx(plain, rel=1e-6)
    assert abs(smooth - plain) > 1e-4

    model.train()
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        translation.loss(model, translation.next_batch()).backward()
        optimizer.step()
    sources, targets = zip(*pairs, strict=True)
    assert translate(model, translation.tokenizer, sources) == list(targets)
    beams = GenerationConfig(6, num_beams=3)
    assert translate(model, translation.tokenizer, sources, beams) == list(targets)


# --- T5 -------------------------------------------------------------------------------------------


def t5_tokenizer() -> Tokenizer:
    """As those of T5: Unigram, <pad> </s> <unk> first, </s> added to what is not told otherwise."""
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz: 0123456789"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁to", -2.5), *letters]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return Tokenizer(made)


def small_t5(vocab_size: int, **options: Any) -> T5:
    backend.manual_seed(4)
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5(T5Config(vocab_size=vocab_size, **sizes, **options))


def test_the_end_is_the_models_and_stands_once():
    tokenizer = t5_tokenizer()
    assert tokenizer.tokenizer.encode("to a").ids[-1] == 1  # left to itself it adds one
    model = small_t5(tokenizer.vocab_size)
    pairs = [("a b", "c"), ("d", "e f g")]
    options: dict[str, Any] = {"batch_size": 2, "prefix": "to z: "}
    translation = TranslationTask(pairs, pairs, tokenizer, eos_id=1, **options)
    batch = translation.next_batch()
    for ids, real, labels in zip(*batch, strict=True):
        source, target = ids[real].tolist(), labels[labels >= 0].tolist()
        assert (source.count(1), source[-1]) == (target.count(1), target[-1]) == (1, 1)
        text = tokenizer.decode(source[:-1])
        assert text.startswith("to z: ")
        assert (text.removeprefix("to z: "), tokenizer.decode(target[:-1])) in pairs
        assert source == source_ids(model, tokenizer, text)  # what is given to it afterwards
    with pytest.raises(ValueError, match=r"needs a tokenizer with <\|endoftext\|>"):
        TranslationTask(pairs, pairs, tokenizer, **options)
    with pytest.raises(ValueError, match="the end of texts, 99, is no id of the tokenizer"):
        TranslationTask(pairs, pairs, tokenizer, eos_id=99, **options)
    other = TranslationTask(pairs, pairs, tokenizer, eos_id=1, batch_size=2)
    with pytest.raises(ValueError, match="the pairs have changed"):
        other.load_state(translation.state())  # the same ones with another prefix


def test_a_t5_learns_pairs_and_writes_no_special_token():
    tokenizer = t5_tokenizer()
    model, pairs = small_t5(tokenizer.vocab_size), [("ab", "x"), ("cd", "yy"), ("efg", "zx")]
    options: dict[str, Any] = {"batch_size": 3, "eos_id": 1, "prefix": "to z: "}
    translation = TranslationTask(pairs, pairs, tokenizer, **options)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = translation.loss(model, translation.next_batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sources, targets = [list(side) for side in zip(*pairs, strict=True)]
    for config in (None, GenerationConfig(8, num_beams=3)):
        assert translate(model, tokenizer, sources, config, prefix="to z: ") == targets
    one_token = GenerationConfig(1, temperature=0.0)
    assert "</s>" not in translate(model, tokenizer, ["ab"], one_token, prefix="to z: ")[0]


def test_the_loss_of_a_batch_is_that_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    tokenizer = t5_tokenizer()
    model = small_t5(tokenizer.vocab_size).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    pairs = [("a b c", "d"), ("e", "f g h i j"), ("kl 12", "mno")]
    translation = TranslationTask(
        pairs, pairs, tokenizer, batch_size=3, eos_id=1, prefix="translate: "
    )
    (batch,) = translation.validation()
    read = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
    )
    decoded = [
        tokenizer.decode(i[m][:-1].tolist()) for i, m in zip(batch[0], batch[1], strict=True)
    ]
    theirs = read(decoded, padding=True, return_tensors="pt")
    np.testing.assert_array_equal(theirs["input_ids"].numpy(), batch.input_ids)
    other = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = other(
            input_ids=theirs["input_ids"],
            attention_mask=theirs["attention_mask"],
            labels=torch.tensor(batch.labels),
        ).loss.item()
    assert translation.loss(model, batch).item() == pytest.approx(expected, rel=1e-5)
