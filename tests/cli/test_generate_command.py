"""`tinygrad-llm generate` with every option, on a small model that was not trained."""

import re
import shlex

import numpy as np
import pytest

from tinygrad_llm import backend
from tinygrad_llm.cli import main
from tinygrad_llm.cli.generate import HELP, _one_after_the_other
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.generate import Piece
from tinygrad_llm.models.gpt import GPT, GPTConfig


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model folder `model` in the present folder, which is a fresh one."""
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.char("Once upon a time.! bdfghjklqrsvwxyzO,?")
    assert tokenizer.vocab_size == 34
    tokenizer.save("model")
    small().save_pretrained("model")
    return tmp_path / "model"


def small():
    backend.manual_seed(1)
    return GPT(GPTConfig(34, 16, n_embd=12, n_layer=1, n_head=2, initializer_range=0.5))


@pytest.fixture
def run(folder, capsys):
    def run(*arguments, code=0):
        capsys.readouterr()
        words = ["generate", "--model", "model", "--max-new-tokens", "30", *arguments]
        assert main(words) == code
        out, err = capsys.readouterr()
        return err if code else out

    return run


def test_several_texts_are_those_of_the_next_seeds(run):
    alone = [run("--prompt", "On", "--seed", str(seed)) for seed in (4, 5, 6)]
    several = run("--prompt", "On", "--seed", "4", "--num-return-sequences", "3")
    assert several == "".join(f"--- {i} of 3 ---\n{text}" for i, text in enumerate(alone, 1))
    assert len(set(alone)) == 3
    assert all(text.startswith("On") and text.endswith("\n") for text in alone)


def test_the_default_temperature_is_the_one_in_the_help(run):
    assert run("--prompt", "On") == run("--prompt", "On", "--temperature", "0.8")
    assert run("--prompt", "On") != run("--prompt", "On", "--temperature", "1.5")


def test_weights_of_few_bits(run):
    """Rounded to 8 bits the likeliest text stays; to 4 bits, on so small a model, another comes."""
    texts = [
        run("--prompt", "One", "--temperature", "0", "--quantize", kind)
        for kind in ("none", "int8", "int4")
    ]
    assert texts[0] == texts[1] != texts[2]
    assert "invalid choice 'int2'" in run("--quantize", "int2", code=2)


def test_every_option_reaches_the_model(run):
    plain = run("--prompt", "One")
    for arguments in (
        ["--top-k", "2"],
        ["--top-p", "0.3"],
        ["--min-p", "0.5"],
        ["--repetition-penalty", "5"],
        ["--num-beams", "3"],
    ):
        assert run("--prompt", "One", *arguments) != plain, arguments
    assert run("--prompt", "One", "--min-p", "1") == run("--prompt", "One", "--temperature", "0")


def test_stop_strings_end_the_text(run):
    texts = [(run("--seed", str(seed)).removesuffix("\n"), seed) for seed in range(5)]
    text, seed = max(texts, key=lambda text_and_seed: len(text_and_seed[0]))
    one, other = text[9], text[5]
    cut = run("--seed", str(seed), "--stop-strings", one, other)
    assert cut == re.split(f"[{re.escape(one + other)}]", text)[0] + "\n"


def test_beams_repeat_and_come_in_order(run):
    best = run("--prompt", "One", "--num-beams", "4")
    assert best == run("--prompt", "One", "--num-beams", "4", "--seed", "9")
    two = run("--prompt", "One", "--num-beams", "4", "--num-return-sequences", "2")
    assert two.startswith(f"--- 1 of 2 ---\n{best}--- 2 of 2 ---\nOne")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--min-p", "2"], "min_p must be in [0, 1], got 2.0"),
        (["--repetition-penalty", "0"], "repetition_penalty must be above 0, got 0.0"),
        (["--max-new-tokens", "-3"], "max_new_tokens must be an integer of 0 or more, got -3"),
        (["--num-return-sequences", "0"], "num_return_sequences must be an integer of 1 or more"),
        (["--num-beams", "2", "--temperature", "0.5"], "draws nothing: leave out temperature"),
        (["--num-beams", "2", "--num-return-sequences", "3"], "at most num_beams = 2, got 3"),
        (["--temperature", "0", "--num-return-sequences", "3"], "temperature 0 has one text only"),
        (["--stop-strings", ""], "stop_strings must be a list of non-empty strings"),
        (["--seed", "-1"], "a seed is an integer from 0"),
        (["--prompt", "狐"], "狐"),
    ],
)
def test_bad_options_are_one_sentence(run, arguments, words):
    err = run(*arguments, code=2)
    assert words in err
    assert err.count("\n") == 1


def test_damaged_weights_are_one_sentence(run):
    model = small()
    bias = {"transformer.ln_f.bias": np.full(12, np.nan, np.float32)}
    model.load_state_dict({**model.state_dict(), **bias})
    model.save_pretrained("model")
    err = run("--prompt", "One", code=2)
    assert "logits are not numbers" in err
    assert err.count("\n") == 1


def test_the_examples_of_the_help_run(folder, capsys):
    examples = re.findall(r"^  tinygrad-llm (generate .*)$", HELP, flags=re.MULTILINE)
    assert len(examples) >= 4
    for example in examples:
        words = shlex.split(example)
        words[words.index("--model") + 1] = "model"
        assert main([*words, "--max-new-tokens", "5"]) == 0, example
        assert capsys.readouterr().out


def test_the_first_text_is_shown_while_it_is_written():
    given = []

    def pieces():
        for piece in (
            Piece(0, "a", last=False),
            Piece(1, "x", last=False),
            Piece(0, "b", last=True),
            Piece(1, "y", last=True),
        ):
            given.append(piece)
            yield piece

    shown = _one_after_the_other(pieces(), "> ", 2)
    assert [next(shown) for _ in range(3)] == ["--- 1 of 2 ---\n", "> ", "a"]
    assert len(given) == 1
    assert "".join(shown) == "b\n--- 2 of 2 ---\n> xy\n"
