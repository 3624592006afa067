"""Sampling and streaming."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import Tensor
from tinygrad_llm.backend import RandomStream
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.generate import generate, prompt_ids, sample, stream_text
from tinygrad_llm.nn.module import Module, Parameter

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3]))


def frequencies(temperature=1.0, top_k=0, top_p=1.0, logits=LOGITS, n=2000):
    stream = RandomStream(7)
    draws = [sample(logits, temperature, top_k, top_p, stream) for _ in range(n)]
    return np.bincount(draws, minlength=len(logits)) / n


def test_tokens_come_as_often_as_the_model_expects():
    np.testing.assert_allclose(frequencies(), [0.1, 0.4, 0.2, 0.3], atol=0.04)


def test_temperature_sharpens():
    squares = np.array([0.1, 0.4, 0.2, 0.3]) ** 2
    np.testing.assert_allclose(frequencies(0.5), squares / squares.sum(), atol=0.04)


def test_top_k_and_top_p_leave_the_likeliest():
    np.testing.assert_allclose(frequencies(top_k=2), [0, 4 / 7, 0, 3 / 7], atol=0.04)
    np.testing.assert_allclose(frequencies(top_p=0.6), [0, 4 / 7, 0, 3 / 7], atol=0.04)
    np.testing.assert_allclose(frequencies(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9], atol=0.04)
    assert frequencies(top_p=1e-9).tolist() == [0, 1, 0, 0]
    assert frequencies(top_k=1).tolist() == [0, 1, 0, 0]


def test_equal_logits_still_leave_just_k():
    assert np.count_nonzero(frequencies(top_k=3, logits=np.zeros(8))) == 3


@given(
    logits=st.lists(st.floats(-50, 50), min_size=1, max_size=20),
    temperature=st.floats(0.01, 10),
    top_k=st.integers(0, 25),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**32),
)
def test_what_is_drawn_is_among_those_left(logits, temperature, top_k, top_p, seed):
    array = np.array(logits)
    token = sample(array, temperature, top_k, top_p, RandomStream(seed))
    rank = int((array > array[token]).sum())
    assert rank < (top_k or len(logits))
    p = np.exp((array - array.max()) / temperature)
    likelier = p[array > array[token]].sum() / p.sum()
    assert likelier < top_p + 1e-12


# --- the loop -------------------------------------------------------------------------------------


class Counting(Module):
    """A model of 10 tokens that expects n + 1 after n, and writes down what it was shown."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=10, n_positions=4)
        self.bias = Parameter(np.zeros(10, np.float32))
        self.shown = []

    def forward(self, ids):
        self.shown.append((ids.tolist()[0], self.training))
        return Tensor(np.eye(10, dtype=np.float32)[(ids.numpy() + 1) % 10] * 5)


def counting(prompt, n, **options) -> list[int]:
    return list(generate(Counting(), prompt, n, **options))  # pyright: ignore[reportArgumentType]


def test_greedy_takes_the_likeliest():
    assert counting([7], 5, greedy=True) == [8, 9, 0, 1, 2]
    assert counting([7], 5, temperature=0) == [8, 9, 0, 1, 2]
    assert counting([7], 0, greedy=True) == []


def test_it_ends_with_the_end_of_the_document():
    assert counting([7], 9, greedy=True, eos_id=0) == [8, 9, 0]


def test_the_model_sees_the_last_positions_with_dropout_off():
    model = Counting()
    model.train()
    tokens = generate(model, [1, 2, 3], 4, greedy=True)  # pyright: ignore[reportArgumentType]
    for _ in tokens:
        assert model.training  # between two tokens it is as it was
    assert [ids for ids, _ in model.shown] == [[1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]
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
        ([1], {"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
    ],
)
def test_options_out_of_range_are_refused_at_once(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(Counting(), prompt, 3, **options)  # pyright: ignore[reportArgumentType]


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
