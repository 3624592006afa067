"""Texts of encoder–decoders, and beams: against brute force, greedy choice, one another."""

import itertools
from typing import Any

import numpy as np
import pytest

from tinygrad_llm import backend, no_grad
from tinygrad_llm.backend import RandomStream
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.generate import (
    GenerationConfig,
    beam_search,
    generate,
    generate_all,
    samples,
    source_ids,
    write_many,
)
from tinygrad_llm.models.gpt import GPT, GPTConfig
from tinygrad_llm.models.llama import Llama, LlamaConfig
from tinygrad_llm.models.seq2seq import Seq2Seq, Seq2SeqConfig
from tinygrad_llm.models.t5 import T5, T5Config

V = 5


def spread(model, by=0.6):
    """The model with random weights that make some tokens far likelier than others."""
    backend.manual_seed(3)
    stream = RandomStream(3)
    with no_grad():
        for p in model.parameters():
            p.copy_(p.numpy() + by * stream.normal(p.shape))
    return model.to("float64").eval()


def make(kind, vocab_size=V) -> Any:
    if kind == "gpt":
        config = GPTConfig(vocab_size=vocab_size, n_positions=40, n_embd=8, n_layer=2, n_head=2)
        return spread(GPT(config))
    if kind == "llama":
        return spread(
            Llama(
                LlamaConfig(
                    vocab_size=vocab_size,
                    hidden_size=8,
                    intermediate_size=12,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    head_dim=4,
                    max_position_embeddings=40,
                )
            )
        )
    if kind == "t5":
        config = T5Config(
            vocab_size=vocab_size,
            d_model=8,
            d_kv=4,
            d_ff=12,
            num_layers=2,
            num_heads=2,
            tie_word_embeddings=False,
        )
        return spread(T5(config), by=1.5)
    return spread(
        Seq2Seq(
            Seq2SeqConfig(
                vocab_size=vocab_size,
                d_model=8,
                encoder_layers=1,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=12,
                decoder_ffn_dim=12,
                max_position_embeddings=12,
                eos_token_id=1,
            )
        )
    )


KINDS = ["gpt", "llama", "t5", "seq2seq"]
SOURCE = [3, 2, 4, 2]


def log_p(model, source, tokens):
    """ln p of each token after those before it, by the whole network at once."""
    with no_grad():
        if isinstance(model, GPT | Llama):
            logits = model(np.array([source + tokens])).numpy()[0, len(source) - 1 : -1]
        else:
            logits = model(np.array([source]), np.array([[0, *tokens[:-1]]])).numpy()[0]
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits[np.arange(len(tokens)), tokens]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_as_many_beams_as_texts_find_the_best_of_all(kind, length_penalty):
    model, longest = make(kind), 4
    texts = [
        list(text)
        for n in range(1, longest + 1)
        for text in itertools.product(range(V), repeat=n)
        if 1 not in text[:-1] and (text[-1] == 1 or n == longest)
    ]
    scores = [log_p(model, SOURCE, text).sum() / len(text) ** length_penalty for text in texts]
    best = sorted(zip(scores, texts, strict=True), reverse=True)[:6]
    config = GenerationConfig(
        longest, num_beams=V**longest, num_return_sequences=6, length_penalty=length_penalty
    )
    beams = beam_search(model, SOURCE, config, eos_id=1)
    assert [beam.ids for beam in beams] == [text for _, text in best]
    np.testing.assert_allclose([beam.score for beam in beams], [score for score, _ in best])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_one_beam_is_greedy(kind, use_cache):
    model = make(kind, 9)
    for source in ([3], SOURCE, [8, 7, 6, 5, 4]):
        greedy = list(generate(model, source, 11, temperature=0, eos_id=1))
        config = GenerationConfig(11, use_cache=use_cache)
        assert [beam.ids for beam in beam_search(model, source, config, eos_id=1)] == [greedy]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("early", [True, False])
def test_the_cache_is_reordered_with_the_beams(kind, early):
    model = make(kind, 9)
    cached, plain = (
        beam_search(
            model,
            SOURCE,
            GenerationConfig(
                10,
                num_beams=4,
                num_return_sequences=4,
                early_stopping=early,
                repetition_penalty=1.3,
                use_cache=use,
            ),
            eos_id=1,
        )
        for use in (True, False)
    )
    assert [beam.ids for beam in cached] == [beam.ids for beam in plain]
    np.testing.assert_allclose([b.score for b in cached], [b.score for b in plain], rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_network(kind):
    model = make(kind, 9)
    config = GenerationConfig(7, num_beams=3, num_return_sequences=3, length_penalty=0.5)
    for beam in beam_search(model, SOURCE, config, eos_id=1):
        total = log_p(model, SOURCE, beam.ids).sum()
        np.testing.assert_allclose(beam.score, total / len(beam.ids) ** 0.5)


def test_early_stopping_ends_when_as_many_texts_have_ended():
    """Its texts are those found by then, of which none is better than with all the patience."""
    shorter = 0
    for kind, eos_id in itertools.product(KINDS, range(9)):
        model = make(kind, 9)
        patient, hasty = (
            beam_search(
                model,
                SOURCE,
                GenerationConfig(11, num_beams=3, length_penalty=3.0, early_stopping=early),
                eos_id=eos_id,
            )[0]
            for early in (False, True)
        )
        assert hasty.score <= patient.score + 1e-12
        shorter += len(hasty.ids) < len(patient.ids)
    assert shorter
    with pytest.raises(ValueError, match="early_stopping is for beams"):
        GenerationConfig(early_stopping=True)
    with pytest.raises(ValueError, match="early_stopping must be true or false, got 'never'"):
        GenerationConfig(num_beams=2, early_stopping="never")  # pyright: ignore[reportArgumentType]


# --- many sources ---------------------------------------------------------------------------------

SOURCES = [[3, 2, 4], [5], [8, 8, 7, 6, 2], [4, 4], [2, 3, 4, 5, 6]]


@pytest.mark.parametrize("kind", ["t5", "seq2seq"])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.5},
        {"num_beams": 3},
        {"num_beams": 3, "use_cache": False},
        {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0, "repetition_penalty": 1.2},
        {"num_beams": 9, "length_penalty": 1.5},
    ],
)
def test_sources_side_by_side_are_written_as_each_alone(kind, batch_size, options):
    model, config = make(kind, 9), GenerationConfig(10, **options)
    found = generate_all(model, SOURCES, config, batch_size=batch_size, seed=7)
    for i, source in enumerate(SOURCES):
        if config.num_beams > 1:
            alone = beam_search(model, source, config)[0].ids
        else:
            drawn = samples(model, source, config, streams=[RandomStream(7 + i)])
            alone = [token for _, token in drawn]
        assert found[i] == alone
    assert len({tuple(ids) for ids in found}) > 1
    assert generate_all(model, [], config) == []


@pytest.mark.parametrize("kind", ["t5", "seq2seq"])
def test_many_sources_are_searched_in_the_steps_of_the_longest(kind, monkeypatch):
    model, config = make(kind, 9), GenerationConfig(8, num_beams=3)
    calls, read = [], model.next_logits

    def counted(ids, *rest):
        calls.append(len(ids))
        return read(ids, *rest)

    monkeypatch.setattr(model, "next_logits", counted)
    alone = []
    for source in SOURCES:
        beam_search(model, source, config)
        alone.append(len(calls))
        calls.clear()
    generate_all(model, SOURCES, config)
    assert len(calls) == max(alone) < sum(alone)
    assert calls[0] == len(SOURCES)
    assert max(calls) <= 3 * len(SOURCES)
    assert generate_all(model, SOURCES, GenerationConfig(0, num_beams=2)) == [[]] * len(SOURCES)


@pytest.mark.parametrize("kind", ["t5", "seq2seq"])
def test_a_target_ends_with_the_configs_end(kind):
    model = make(kind, 9)
    texts = generate_all(
        model,
        [[i, j] for i in range(2, 9) for j in range(2, 9)],
        GenerationConfig(12, temperature=2.0),
    )
    ended = [ids for ids in texts if ids[-1] == 1]
    assert ended
    assert all(1 not in ids[:-1] for ids in texts)


def test_a_target_ends_with_its_positions():
    model = make("seq2seq", 9)
    for config in (GenerationConfig(100, temperature=0), GenerationConfig(100, num_beams=2)):
        ids = generate_all(model, [[3, 4]], config, eos_id=99)[0]
        assert len(ids) == 12  # the start token and 11 more are read, the 12th is not


def test_what_cannot_be_written():
    seq2seq, gpt = make("seq2seq"), make("gpt")
    greedy = GenerationConfig(3, temperature=0)
    with pytest.raises(TypeError, match="for encoder–decoders, got a GPT"):
        generate_all(gpt, [[1]], greedy)
    with pytest.raises(ValueError, match="at least one token"):
        generate_all(seq2seq, [[1], []], greedy)
    with pytest.raises(ValueError, match="token ids must be from 0 to 4, got 5"):
        generate_all(seq2seq, [[5]], greedy)
    with pytest.raises(ValueError, match="one text for each source"):
        generate_all(seq2seq, [[1]], GenerationConfig(num_return_sequences=2))
    with pytest.raises(ValueError, match="the source has 13 tokens"):
        generate_all(seq2seq, [[2] * 13], greedy)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"num_beams": 2}])
def test_from_text_to_text_without_the_source(options):
    tokenizer = Tokenizer.byte()
    sizes: dict[str, Any] = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    model = spread(T5(T5Config(vocab_size=257, eos_token_id=256, **sizes)), by=0.1)
    assert source_ids(model, tokenizer, "hi") == [104, 105, 256]
    config = GenerationConfig(12, **options)
    pieces = list(write_many(model, tokenizer, "hi", config))
    ids = generate_all(model, [[104, 105, 256]], config)[0]
    written = tokenizer.decode([i for i in ids if i != 256])
    assert "".join(piece.text for piece in pieces) == written
    assert pieces[-1].last
