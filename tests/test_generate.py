"""Sampling and streaming."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import Tensor, backend
from tinygrad_llm.backend import RandomStream
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.generate import (
    GenerationConfig,
    beam_search,
    generate,
    prompt_ids,
    sample,
    samples,
    stream_text,
    write,
    write_many,
)
from tinygrad_llm.models.gpt import GPT, GPTConfig
from tinygrad_llm.nn.module import Module, Parameter

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3]))


def frequencies(logits=LOGITS, n=2000, seen=(), **options):
    stream, config = RandomStream(7), GenerationConfig(**options)
    draws = [sample(logits, config, stream, seen) for _ in range(n)]
    return np.bincount(draws, minlength=len(logits)) / n


def test_tokens_come_as_often_as_the_model_expects():
    np.testing.assert_allclose(frequencies(), [0.1, 0.4, 0.2, 0.3], atol=0.04)


def test_temperature_sharpens():
    squares = np.array([0.1, 0.4, 0.2, 0.3]) ** 2
    np.testing.assert_allclose(frequencies(temperature=0.5), squares / squares.sum(), atol=0.04)


def test_top_k_and_top_p_leave_the_likeliest():
    np.testing.assert_allclose(frequencies(top_k=2), [0, 4 / 7, 0, 3 / 7], atol=0.04)
    np.testing.assert_allclose(frequencies(top_p=0.6), [0, 4 / 7, 0, 3 / 7], atol=0.04)
    np.testing.assert_allclose(frequencies(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9], atol=0.04)
    assert frequencies(top_p=1e-9).tolist() == [0, 1, 0, 0]
    assert frequencies(top_k=1).tolist() == [0, 1, 0, 0]


def test_min_p_leaves_those_with_a_share_of_the_likeliest():
    np.testing.assert_allclose(frequencies(min_p=0.6), [0, 4 / 7, 0, 3 / 7], atol=0.04)
    np.testing.assert_allclose(frequencies(min_p=0.3), [0, 4 / 9, 2 / 9, 3 / 9], atol=0.04)
    assert frequencies(min_p=1.0).tolist() == [0, 1, 0, 0]
    hot = frequencies(min_p=0.6, temperature=2.0)  # shares are of the probabilities drawn from
    assert np.count_nonzero(hot) == 3


def test_repetition_penalty_moves_seen_tokens_down():
    logits = np.array([-0.5, 0.3, 1.0])
    p = np.exp([-0.5 * 3, 0.3, 1.0 / 3])  # tokens 0 and 2 were there
    drawn = frequencies(logits, seen=[2, 0, 0], repetition_penalty=3.0)
    np.testing.assert_allclose(drawn, p / p.sum(), atol=0.04)
    assert logits.tolist() == [-0.5, 0.3, 1.0]
    assert frequencies(logits, seen=[2], repetition_penalty=5.0, temperature=0)[1] == 1


def test_equal_logits_still_leave_just_k():
    assert np.count_nonzero(frequencies(top_k=3, logits=np.zeros(8))) == 3


@given(
    logits=st.lists(st.floats(-50, 50), min_size=1, max_size=20),
    temperature=st.floats(0.01, 10),
    top_k=st.integers(0, 25),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_what_is_drawn_is_among_those_left(logits, temperature, top_k, top_p, min_p, seed):
    array = np.array(logits)
    config = GenerationConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    token = sample(array, config, RandomStream(seed))
    rank = int((array > array[token]).sum())
    assert rank < (top_k or len(logits))
    p = np.exp((array - array.max()) / temperature)
    likelier = p[array > array[token]].sum() / p.sum()
    assert likelier < top_p + 1e-12
    assert p[token] >= min_p


# --- the loop -------------------------------------------------------------------------------------


class Counting(Module):
    """A model of 10 tokens that expects n + 1 after n, and writes down what it was shown."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=10, n_positions=4, n_layer=1)
        self.bias = Parameter(np.zeros(10, np.float32))
        self.shown = []

    def next_logits(self, ids, cache):
        self.shown.append((ids.tolist()[0], self.training))
        if cache is not None:
            cache.layers[0].length += ids.shape[1]
        return Tensor(np.eye(10, dtype=np.float32)[(ids.numpy()[:, -1] + 1) % 10] * 5)


def counting(prompt, n, **options) -> list[int]:
    return list(generate(Counting(), prompt, n, **options))  # pyright: ignore[reportArgumentType]


def test_greedy_takes_the_likeliest():
    assert counting([7], 5, temperature=0) == [8, 9, 0, 1, 2]
    assert counting([7], 0, temperature=0) == []


def test_it_ends_with_the_end_of_the_document():
    assert counting([7], 9, temperature=0, eos_id=0) == [8, 9, 0]


WINDOWS = [[1, 2, 3], [1, 2, 3, 4], [3, 4, 5], [3, 4, 5, 6], [5, 6, 7]]
NEW = [[1, 2, 3], [4], [3, 4, 5], [6], [5, 6, 7]]  # what a cache leaves to compute


@pytest.mark.parametrize(("use_cache", "shown"), [(False, WINDOWS), (True, NEW)])
def test_the_window_slides_by_half_when_it_is_full(use_cache, shown):
    model = Counting()
    list(generate(model, [1, 2, 3], 5, temperature=0, use_cache=use_cache))  # pyright: ignore[reportArgumentType]
    assert [ids for ids, _ in model.shown] == shown


def test_of_a_long_prompt_the_model_sees_the_last_positions():
    model = Counting()
    list(generate(model, [9, 8, 7, 1, 2, 3], 2, temperature=0))  # pyright: ignore[reportArgumentType]
    assert [ids for ids, _ in model.shown] == [[7, 1, 2, 3], [2, 3, 4]]


def test_dropout_is_off_while_a_token_is_computed():
    model = Counting()
    model.train()
    for _ in generate(model, [1, 2, 3], 4):  # pyright: ignore[reportArgumentType]
        assert model.training  # between two tokens it is as it was
    assert not any(training for _, training in model.shown)
    model.eval()
    list(generate(model, [1], 1))  # pyright: ignore[reportArgumentType]
    assert not model.training


def test_seeds_repeat():
    def draw(seed):
        return counting([0], 50, temperature=3.0, stream=RandomStream(seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "at least one token"),
        ([10], {}, "from 0 to 9"),
        ([-1], {}, "from 0 to 9"),
        ([1], {"temperature": -0.1}, "temperature must be 0 or more"),
        ([1], {"temperature": math.nan}, "temperature must be 0 or more"),
        ([1], {"top_k": -1}, "top_k must be"),
        ([1], {"top_k": 2.5}, "top_k must be an integer"),
        ([1], {"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ([1], {"min_p": 1.1}, r"min_p must be in \[0, 1\]"),
        ([1], {"repetition_penalty": 0}, "repetition_penalty must be above 0"),
    ],
)
def test_options_out_of_range_are_refused_at_once(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(Counting(), prompt, 3, **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer of 0 or more, got -1"),
        ({"num_beams": 0}, "num_beams must be an integer of 1 or more"),
        ({"num_return_sequences": 0}, "num_return_sequences must be"),
        ({"length_penalty": math.inf}, "length_penalty must be a finite number"),
        ({"stop_strings": ""}, "stop_strings must be a list of non-empty strings, got ''"),
        ({"stop_strings": ["a", ""]}, "stop_strings must be"),
        ({"stop_strings": "END"}, "stop_strings must be"),
        ({"temperature": 0, "num_return_sequences": 2}, "temperature 0 has one text only"),
        ({"length_penalty": 2.0}, "length_penalty is for beams"),
        ({"num_beams": 2, "temperature": 0.5}, "draws nothing: leave out temperature"),
        ({"num_beams": 2, "top_k": 5}, "draws nothing: leave out top_k"),
        ({"num_beams": 2, "num_return_sequences": 3}, "at most num_beams = 2, got 3"),
    ],
)
def test_a_config_that_means_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**options)


# --- a real model: the cache, batches, beams ------------------------------------------------------


@pytest.fixture(scope="module")
def gpt():
    return make_gpt()


def make_gpt(dtype="float64", vocab_size=13, n_positions=8):
    """Random weights, large enough for every token to depend on those before it."""
    backend.manual_seed(3)
    config = GPTConfig(
        vocab_size, n_positions, n_embd=12, n_layer=2, n_head=3, initializer_range=0.6
    )
    return GPT(config).to(dtype)


OPTIONS = [
    {"temperature": 0},
    {"temperature": 1.3},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.4},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("prompt", [[1], [1, 2, 3, 4, 5, 6, 7, 8], list(range(12))])
def test_the_cache_changes_no_token(dtype, options, prompt):
    model = make_gpt(dtype)
    cached, plain = (
        list(generate(model, prompt, 30, stream=RandomStream(5), use_cache=use_cache, **options))
        for use_cache in (True, False)
    )
    assert cached == plain
    assert len(cached) == 30


def test_tokens_are_those_of_a_plain_loop_over_the_window(gpt):
    ids, start = [4, 9], 0
    for _ in range(25):
        if len(ids) - start > 8:
            start += 4
        ids.append(int(gpt([ids[start:]]).numpy()[0, -1].argmax()))
    assert list(generate(gpt, [4, 9], 25, temperature=0)) == ids[2:]


@pytest.mark.parametrize("use_cache", [True, False])
def test_texts_in_a_batch_are_those_written_alone(gpt, use_cache):
    config = GenerationConfig(20, use_cache=use_cache)
    texts = [[] for _ in range(6)]
    streams = [RandomStream(seed) for seed in range(6)]
    for i, token in samples(gpt, [1, 2], config, streams=streams, eos_id=7):
        texts[i].append(token)
    alone = [list(generate(gpt, [1, 2], 20, stream=RandomStream(s), eos_id=7)) for s in range(6)]
    assert texts == alone
    assert len({len(text) for text in texts}) > 1  # some ended early, others went on


def test_a_text_that_ended_is_computed_no_more(gpt, monkeypatch):
    batches = []
    forward = GPT.next_logits

    def counted(self, ids, cache):
        batches.append(ids.shape[0])
        return forward(self, ids, cache)

    monkeypatch.setattr(GPT, "next_logits", counted)
    drawn = samples(
        gpt,
        [1],
        GenerationConfig(4),
        streams=[RandomStream(i) for i in range(3)],
        ended=lambda i, _: i == 1,
    )
    assert len(list(drawn)) == 3 + 2 + 2 + 2
    assert batches == [1, 2, 2, 2]  # the prompt is read once for all three


def test_damaged_weights_are_one_sentence():
    model = make_gpt()
    model.load_state_dict(
        {**model.state_dict(), "transformer.ln_f.bias": np.full(12, np.nan)}, strict=False
    )
    with pytest.raises(FloatingPointError, match="logits are not numbers"):
        list(generate(model, [1], 1))


def exhaustive(model, prompt, n, length_penalty, eos_id, penalty):
    """(score, new tokens) of every text that ends with eos_id or has n tokens, the best first."""
    found, going_on = [], [(0.0, [])]
    for step in range(1, n + 1):
        longer = []
        for total, new in going_on:
            logits = model([[*prompt, *new]]).numpy()[0, -1].copy()
            for token in {*prompt, *new}:
                logits[token] *= penalty if logits[token] < 0 else 1 / penalty
            log_p = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            for token, log_q in enumerate(log_p):
                text = (total + log_q, [*new, token])
                if token == eos_id or step == n:
                    found.append((text[0] / step**length_penalty, text[1]))
                else:
                    longer.append(text)
        going_on = longer
    return sorted(found, reverse=True)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize(("eos_id", "penalty"), [(None, 1.0), (2, 1.0), (2, 1.5)])
def test_enough_beams_find_the_best_texts_of_all(length_penalty, eos_id, penalty):
    model = make_gpt(vocab_size=5)
    config = GenerationConfig(
        4,
        repetition_penalty=penalty,
        num_beams=5**4,
        length_penalty=length_penalty,
        num_return_sequences=6,
    )
    beams = beam_search(model, [1, 3], config, eos_id=eos_id)
    best = exhaustive(model, [1, 3], 4, length_penalty, eos_id, penalty)[:6]
    assert [beam.ids for beam in beams] == [ids for _, ids in best]
    np.testing.assert_allclose([beam.score for beam in beams], [score for score, _ in best])


def test_one_beam_is_greedy_and_more_find_likelier_texts(gpt):
    greedy = list(generate(gpt, [1], 12, temperature=0))
    one = beam_search(gpt, [1], GenerationConfig(12))
    assert [beam.ids for beam in one] == [greedy]
    four = beam_search(gpt, [1], GenerationConfig(12, num_beams=4))
    assert four[0].score > one[0].score


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_beams_with_the_cache_are_those_without(gpt, penalty):
    options = {"num_beams": 5, "num_return_sequences": 5, "repetition_penalty": penalty}
    cached, plain = (
        beam_search(gpt, [1, 2], GenerationConfig(25, use_cache=use, **options), eos_id=3)
        for use in (True, False)
    )
    assert [beam.ids for beam in cached] == [beam.ids for beam in plain]
    np.testing.assert_allclose(
        [beam.score for beam in cached], [beam.score for beam in plain], rtol=1e-12
    )


def test_the_search_ends_when_nothing_better_can_come():
    model = Counting()  # expects 8, 9, 0 after 7, then 1 …
    config = GenerationConfig(50, num_beams=2, length_penalty=0.0)
    beams = beam_search(model, [7], config, eos_id=0)  # pyright: ignore[reportArgumentType]
    assert beams[0].ids == [8, 9, 0]
    assert len(model.shown) == 3


def test_a_long_text_may_overtake_one_that_ended():
    class Patient(Counting):
        """Ends with 0 at once with probability 0.6, or goes on with 1s for ever, with 0.3."""

        def next_logits(self, ids, cache):
            super().next_logits(ids, cache)
            p = np.full(10, 0.1 / 8)
            p[:2] = 0.6, 0.3
            later = np.where(np.arange(10) == 1, 1.0, 1e-9)
            return Tensor(np.log(np.where(ids.numpy()[:, -1:] == 1, later, p)))

    config = GenerationConfig(20, num_beams=2)
    beams = beam_search(Patient(), [7], config, eos_id=0)  # pyright: ignore[reportArgumentType]
    assert beams[0].ids == [1] * 20  # ln 0.3 / 20 > ln 0.6 / 1
    np.testing.assert_allclose(beams[0].score, math.log(0.3) / 20, rtol=1e-6)


def test_no_new_tokens_is_an_empty_beam(gpt):
    assert beam_search(gpt, [1], GenerationConfig(0, num_beams=2)) == [([], 0.0)]


# --- from text to text ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"temperature": 3.0}, {"num_beams": 3}])
def test_tokens_that_the_tokenizer_lacks_are_not_written(options):
    model, config = make_gpt(vocab_size=13), GenerationConfig(40, **options)
    pieces = write_many(model, Digits(), "1", config, stop_at_end=False)
    text = "".join(piece.text for piece in pieces)
    assert len(text) == 40  # "12" would be one token of two characters


@pytest.fixture(scope="module")
def writer():
    tokenizer = Tokenizer.char("One A: abcdefghijklmnopqrstuvwxyz")
    return make_gpt("float32", tokenizer.vocab_size, n_positions=32), tokenizer


def texts_of(writer, prompt, seed=1, **options):
    model, tokenizer = writer
    config = GenerationConfig(**options)
    texts = [""] * config.num_return_sequences
    ended = []
    pieces = write_many(model, tokenizer, prompt, config, seed=seed, stop_at_end=False)
    for number, text, last in pieces:
        assert number not in ended
        texts[number] += text
        if last:
            ended.append(number)
    assert sorted(ended) == list(range(len(texts)))
    return texts


def test_the_second_text_is_that_of_the_next_seed(writer):
    texts = texts_of(writer, "One", num_return_sequences=3, max_new_tokens=40)
    assert texts == [texts_of(writer, "One", seed=s, max_new_tokens=40)[0] for s in (1, 2, 3)]
    assert len(set(texts)) == 3
    assert texts[0] == "".join(write(writer[0], writer[1], "One", 40, seed=1, stop_at_end=False))
    with pytest.raises(ValueError, match="seed"):
        texts_of(writer, "One", seed=-1)


def test_each_text_ends_before_its_first_stop_string(writer):
    whole = texts_of(writer, "A", num_return_sequences=4, max_new_tokens=60)
    stop = whole[0][10:12]
    cut = texts_of(writer, "A", num_return_sequences=4, max_new_tokens=60, stop_strings=[stop])
    assert cut == [text.split(stop)[0] for text in whole]
    assert cut[0] != whole[0]


def test_a_stop_string_ends_the_computation(writer, monkeypatch):
    whole = texts_of(writer, "A", max_new_tokens=60)[0]
    calls = []
    forward = GPT.next_logits
    monkeypatch.setattr(GPT, "next_logits", lambda *args: calls.append(1) or forward(*args))
    assert texts_of(writer, "A", max_new_tokens=60, stop_strings=[whole[10:12]])[0]
    assert 0 < len(calls) < 60


def test_beams_as_text_stop_too(writer):
    whole = texts_of(writer, "A", num_beams=3, num_return_sequences=2, max_new_tokens=12)
    assert len(set(whole)) == 2
    cut = texts_of(writer, "A", num_beams=3, max_new_tokens=12, stop_strings=[whole[0][3]])
    assert cut[0]
    assert whole[0][3] not in cut[0]
    assert texts_of(writer, "A", num_beams=2, max_new_tokens=0) == [""]


def test_a_prompt_outside_of_the_vocabulary_is_refused_at_once():
    model = make_gpt(vocab_size=60)
    for beams in (1, 2):
        with pytest.raises(ValueError, match="from 0 to 59, got 65"):
            write_many(model, Tokenizer.byte(), "A", GenerationConfig(num_beams=beams))


class Digits:
    """A tokenizer of ten digits, of which 0 ends a document."""

    eos_id: int | None = 0
    vocab_size = 10

    def encode(self, text):
        return np.array([int(c) for c in text])

    def decode(self, ids):
        return "".join(map(str, ids))


@pytest.mark.parametrize("options", [{"temperature": 0}, {"num_beams": 2, "length_penalty": 0}])
def test_the_mark_between_documents_ends_the_text_and_is_not_shown(options):
    def text(**more):
        config = GenerationConfig(6, **options)
        pieces = write_many(Counting(), Digits(), "7", config, **more)  # pyright: ignore[reportArgumentType]
        return "".join(piece.text for piece in pieces)

    assert text() == "89"
    assert text(stop_at_end=False) == "890123"


# --- streaming ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers():
    text = "The quick brown fox — 快速的棕色狐狸 🦊. " * 20
    return [Tokenizer.byte(), Tokenizer.bpe(text, 300), Tokenizer.char(text)]


@pytest.mark.parametrize("text", ["fox", " fox — 的狐 🦊🦊. The", "", "🦊"])
@pytest.mark.parametrize("prompt", ["", "The", "狐"])
def test_pieces_join_to_the_text(tokenizers, prompt, text):
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text).tolist()
        pieces = list(stream_text(tokenizer, prompt_ids(tokenizer, prompt), ids))
        assert "".join(pieces) == text
        assert all("\ufffd" not in piece for piece in pieces)


def test_a_piece_comes_as_soon_as_its_character_is_whole():
    tokenizer = Tokenizer.byte()
    given: list[int] = []

    def ids():
        for i in tokenizer.encode("a狐b").tolist():
            given.append(i)
            yield i

    pieces = stream_text(tokenizer, [], ids())
    assert (next(pieces), len(given)) == ("a", 1)
    assert (next(pieces), len(given)) == ("狐", 4)
    assert (next(pieces), len(given)) == ("b", 5)


class Words:
    """A tokenizer of these words."""

    eos_id: int | None = None

    def __init__(self, words):
        self.words, self.vocab_size = words, len(words)

    def encode(self, text):
        return np.array([self.words.index(text)])

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


@given(
    words=st.lists(st.text("ab狐", max_size=6), max_size=8),
    stops=st.lists(st.text("ab狐", min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_before_the_stop_string_that_is_whole_first(words, stops):
    text = expected = "".join(words)
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            expected = text[: end - max(map(len, found))]
            break
    for pieces in (words, list(text)):  # the cut does not depend on the tokens
        assert "".join(stream_text(Words(pieces), [], range(len(pieces)), stops)) == expected


def test_what_may_begin_a_stop_string_waits():
    tokenizer = Tokenizer.byte()
    pieces = list(stream_text(tokenizer, [], tokenizer.encode("xENxEND!").tolist(), ["END"]))
    assert pieces == ["x", "ENx"]
    assert list(stream_text(tokenizer, [], tokenizer.encode("xEN").tolist(), ["END"])) == [
        "x",
        "EN",
    ]


@given(st.lists(st.integers(0, 255), max_size=40))
def test_bytes_that_are_no_text_do_not_lose_what_is(ids):
    tokenizer = Tokenizer.byte()
    joined = "".join(stream_text(tokenizer, [65], ids))
    assert joined == bytes(ids).decode(errors="replace")


def test_an_empty_prompt_begins_a_document():
    tokenizer = Tokenizer.byte()
    assert prompt_ids(tokenizer, "") == [tokenizer.eos_id]
    assert prompt_ids(tokenizer, "A") == [65]
    tokenizer.eos_id = None
    with pytest.raises(ValueError, match="the prompt is empty"):
        prompt_ids(tokenizer, "")


def test_log_of_zero_is_never_drawn():
    logits = np.array([-math.inf, 0.0, -math.inf])
    assert frequencies(logits=logits, n=200).tolist() == [0, 1, 0]
