"""The completion scripts, asked by the shells themselves where they are installed."""

import re
import shlex
import shutil
import subprocess

import pytest

from tinygrad_llm.cli import COMMANDS, main
from tinygrad_llm.cli.completion import FORMS, commands
from tinygrad_llm.finetune.config import TASKS
from tinygrad_llm.train.config import PRESETS

# Ends at the cursor; the last word is the one that is being written.
QUESTIONS = {
    "tinygrad-llm ": {*COMMANDS},
    "tinygrad-llm ge": {"generate"},
    "tinygrad-llm pretrain ": {"gpt", "llama", "bert", "lstm", "t5"},
    "tinygrad-llm pretrain gpt --preset ": {*PRESETS},
    "tinygrad-llm pretrain gpt --preset sh": {"shakespeare-char", "shakespeare-char-gpu"},
    "tinygrad-llm pretrain gpt --steps 3 --overfit": {"--overfit-one-batch"},
    "tinygrad-llm pretrain gpt --weight": {"--weight-decay"},
    "tinygrad-llm pretrain gpt --steps ": set(),
    "tinygrad-llm generate --num-b": {"--num-beams"},
    "tinygrad-llm finetune ": {*TASKS},
    "tinygrad-llm finetune tag --lon": {"--long"},
    "tinygrad-llm finetune pair --header ": {"auto", "yes", "no"},
    "tinygrad-llm finetune pair --step": set(),
    "tinygrad-llm evaluate --split ": {"all", "val"},
    "tinygrad-llm tokenizer ": {"train", "show"},
    "tinygrad-llm tokenizer train --kind w": {"wordpiece"},
    "tinygrad-llm tokenizer train --cas": {"--cased"},
    "tinygrad-llm tokenizer show --te": {"--text"},
    "tinygrad-llm runs comp": {"compare"},
    "tinygrad-llm runs --so": {"--sort"},
    "tinygrad-llm runs compare --so": set(),
    "tinygrad-llm completion ": {"bash", "zsh", "fish"},
    "tinygrad-llm xray soft": {"softmax"},
    "tinygrad-llm xray --dtype b": {"bf16"},
    "tinygrad-llm xray my-t": {"my-text.txt"},
    "tinygrad-llm generate --model my-": {"my-model", "my-text.txt"},
    "tinygrad-llm runs compare my-m": {"my-model"},
    "tinygrad-llm pretrain gpt --tokenizer un": {"unigram"},
    "tinygrad-llm pretrain gpt --data sha": {"shakespeare"},
    "tinygrad-llm pretrain gpt --data python-d": {"python-docs"},
}

ASK_BASH = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_tinygrad_llm
printf '%s\\n' "${{COMPREPLY[@]}}"
"""

ASK_ZSH = """
compdef() {{ }}
compset() {{ return 1 }}
compadd() {{ shift; for w in "$@"; do [[ $w == $last* ]] && print -r -- $w; done }}
_files() {{ print -rl -- $last*(N) }}
source {script}
words=({words}); CURRENT=$#words; last=$words[-1]
_tinygrad_llm; true
"""

ASK_FISH = "source {script}; complete -C {line}"


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """The path of the script for a shell, in a folder with two files."""
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-text.txt").touch()
    monkeypatch.chdir(tmp_path)

    def write(shell):
        assert main(["completion", shell]) == 0
        path = tmp_path / f"script.{shell}"
        path.write_text(capsys.readouterr().out)
        return path

    return write


def ask(shell, *arguments):
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return {line.split("\t")[0].rstrip("/") for line in done.stdout.splitlines() if line}


def quoted(line):
    """The words of the line for a shell's array, with an empty one for the one not begun."""
    return shlex.join(line.split() + ([""] if line.endswith(" ") else []))


def check(answers):
    """What a shell offers; flags, which some offer along with words, only where asked for."""
    for line, answer in answers.items():
        word = line.rpartition(" ")[2]
        if not word.startswith("--"):
            answer = {found for found in answer if not found.startswith("--")}
        assert answer == QUESTIONS[line], line


def test_bash(script):
    path = script("bash")
    how = ("--norc", "--noprofile", "-c")
    check(
        {
            line: ask("bash", *how, ASK_BASH.format(script=path, words=quoted(line)))
            for line in QUESTIONS
        }
    )


def test_bash_splits_at_the_equals_sign(script):
    path = script("bash")
    for words, answer in (
        ("tinygrad-llm evaluate --split = v", {"val"}),
        ("tinygrad-llm evaluate --split =", {"all", "val"}),
    ):
        assert ask("bash", "-c", ASK_BASH.format(script=path, words=words)) == answer


def test_zsh(script):
    path = script("zsh")
    check(
        {
            line: ask("zsh", "-f", "-c", ASK_ZSH.format(script=path, words=quoted(line)))
            for line in QUESTIONS
        }
    )


def test_fish(script):
    path = script("fish")
    check(
        {
            line: ask("fish", "-N", "-c", ASK_FISH.format(script=path, line=shlex.quote(line)))
            for line in QUESTIONS
        }
    )


def test_every_command_is_completed():
    assert {words.split()[0] for words in FORMS} == set(COMMANDS)


@pytest.mark.parametrize("words", FORMS)
def test_the_flags_are_those_that_help_lists(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # one column of boxes
    with pytest.raises(SystemExit):
        main([*words.split(), "--help"])
    out = capsys.readouterr().out
    listed = re.findall(r"^(?:│ | {2})(-.*?)(?: {2}| *│|$)", out, re.MULTILINE)
    flags = {flag for line in listed for flag in re.findall(r"--[a-z][a-z-]*", line)}
    command = next(command for command in commands() if command.words == words)
    assert {flag.name for flag in command.flags} == flags


def test_another_shell_is_refused(capsys):
    assert main(["completion", "tcsh"]) == 2
    err = capsys.readouterr().err
    assert "'tcsh'" in err
    assert err.count("\n") == 1
