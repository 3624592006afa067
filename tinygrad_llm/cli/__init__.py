"""`tinygrad-llm COMMAND`: one file per command, each with `SUMMARY` and `run(arguments) -> status`.

A command parses, calls and prints; what it calls lives on the floors below. Only the module of the
command that runs is imported, so each starts as fast as what it needs.
"""

from __future__ import annotations

import difflib
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from tinygrad_llm import __version__
from tinygrad_llm.cli.errors import UsageError
from tinygrad_llm.train.log import printable

COMMANDS = {
    "pretrain": "train a model on text, from nothing",
    "finetune": "fine-tune a model on labelled texts, and score it",
    "predict": "label new texts with a fine-tuned model",
    "generate": "let a trained model write",
    "evaluate": "say how well a trained model predicts a text",
    "runs": "list the runs and how they stand; compare some of them",
    "tokenizer": "train a tokenizer, show how one cuts a text",
    "gradcheck": "check the gradient of every op against central differences",
    "xray": "compile a GPU kernel on any machine, show what became of it",
    "doctor": "say what this machine has and what would be used",
    "completion": "print what makes bash, zsh or fish complete commands and flags",
}

OVERVIEW = f"""\
usage: tinygrad-llm COMMAND [OPTIONS]

A from-scratch neural-network engine for language models.

commands:
{chr(10).join(f"  {name:<11} {summary}" for name, summary in COMMANDS.items())}

options:
  -h, --help     this text; `tinygrad-llm COMMAND --help` for a command's own
  --version      the version

example:
  tinygrad-llm pretrain gpt --preset demo
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0 done, 1 failed, 2 bad input, 128 + n signal n.

    Bad input is one sentence on standard error. What is no user's fault keeps its traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # LANG=C: '\\u2026' for what ASCII has not
        sys.stdout.reconfigure(errors="backslashreplace")
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(OVERVIEW, end="")
        return 0
    if name == "--version":
        print(f"tinygrad-llm {__version__}")
        return 0
    try:
        return _command(name)(rest)
    except UsageError as error:
        print(f"tinygrad-llm: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has gone: `tinygrad-llm … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _command(name: str) -> Callable[[list[str]], int]:
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there is {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command {name!r}: {hint}")
    return import_module(f"tinygrad_llm.cli.{name}").run
