"""The command line around the commands: help, errors, how it says to start it again."""

import shlex
import sys

import pytest

from tinygrad_llm import cli
from tinygrad_llm.cli import COMMANDS, main
from tinygrad_llm.cli.arguments import program


def failure(arguments, capsys):
    """The one sentence on standard error that `arguments` get, with exit status 2."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tinygrad-llm: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_overview_names_every_command(arguments, capsys):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    name, version = capsys.readouterr().out.split()
    assert name == "tinygrad-llm"
    assert version[0].isdecimal()


@pytest.mark.parametrize(
    "command",
    [
        *([name] for name in COMMANDS if name != "tokenizer"),
        ["pretrain", "gpt"],
        ["runs", "compare"],
        ["tokenizer", "show"],
    ],
)
def test_every_command_helps_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "example" in out
    assert f"  tinygrad-llm {' '.join(command)}" in out
    assert "{None}" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretain"], ["unknown command 'pretain'", "did you mean 'pretrain'?"]),
        (["xyz"], ["unknown command 'xyz'", "pretrain, finetune"]),
        (["doctor", "--now"], ["unrecognized options: --now"]),
        (["pretrain"], ["Expected gpt, llama, bert, lstm or t5, got nothing"]),
        (["pretrain", "bird"], ["lstm or t5, got 'bird'"]),
        (["pretrain", "gpt", "--stpes", "3"], ["unrecognized options: --stpes", "--steps?"]),
        (["pretrain", "gpt", "--steps", "many"], ["--steps", "'many'"]),
        (["pretrain", "gpt", "--steps"], ["--steps"]),
        (["pretrain", "gpt", "--steps", "0"], ["train.steps must be at least 1, got 0"]),
        (["pretrain", "gpt", "--tokenizer", "bqe"], ["'bqe'", "'bpe'"]),
        (["pretrain", "gpt", "--preset", "demmo"], ["did you mean 'demo'?"]),
        (["pretrain", "gpt", "--preset", "gpt2"], ["name a text with --data: the preset gpt2"]),
        (["pretrain", "gpt", "--config", "none.toml"], ["no configuration file none.toml"]),
        (["pretrain", "gpt", "--data", "none.txt"], ["no file 'none.txt'"]),
        (["pretrain", "gpt", "--device", "gpu"], ["auto, cpu, cuda or cuda:N, got 'gpu'"]),
        (["pretrain", "gpt", "--resume", "nothing"], ["nothing is not a run folder"]),
        (["pretrain", "gpt", "--resume", "a", "--run", "b"], ["leave out --run"]),
        (["pretrain", "gpt", "--resume=a", "--preset=tiny"], ["leave out --preset"]),
        (["evaluate"], ["--model is missing (tinygrad-llm evaluate --help"]),
        (["runs"], ["there is no folder runs"]),
        (["completion"], ["which shell? Expected bash, zsh or fish, got nothing"]),
        (["generate"], ["--model is missing (tinygrad-llm generate --help"]),
        (["generate", "--model", "nothing"], ["there is no run or checkpoint nothing"]),
        (["generate", "--model", "."], ["holds no checkpoint"]),
    ],
)
def test_bad_input_gets_one_sentence(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sentence = failure(arguments, capsys)
    assert all(word in sentence for word in words), sentence
    assert list(tmp_path.iterdir()) == []


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(arguments):
        raise ValueError("a bug of ours")

    monkeypatch.setattr(cli, "_command", lambda name: broken)
    with pytest.raises(ValueError, match="a bug of ours"):
        main(["doctor"])


def test_ctrl_c_outside_of_training_is_no_traceback(monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_command", lambda name: interrupted)
    assert main(["doctor"]) == 130


def test_the_program_is_named_so_that_it_starts_again(tmp_path, monkeypatch):
    script = tmp_path / "my env" / "bin" / "tinygrad-llm"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["my env/bin/tinygrad-llm", "doctor"])
    assert shlex.split(program()) == ["my env/bin/tinygrad-llm"]
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert shlex.split(program()) == ["my env/bin/tinygrad-llm"]
    monkeypatch.chdir(script.parent)
    assert program() == "./tinygrad-llm"
    monkeypatch.chdir("/usr")
    assert shlex.split(program()) == [str(script)]
    monkeypatch.setenv("PATH", str(script.parent))
    assert program() == "tinygrad-llm"
    monkeypatch.setattr(sys, "argv", ["/anywhere/tinygrad_llm/__main__.py"])
    assert shlex.split(program()) == [sys.executable, "-m", "tinygrad_llm"]
