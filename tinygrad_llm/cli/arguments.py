"""From the words of the command line to a frozen dataclass, through tyro."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from tinygrad_llm.cli.errors import UsageError

T = TypeVar("T")


def parse(
    kind: type[T], arguments: Sequence[str], command: str, help: str, default: T | None = None
) -> T:
    """The dataclass `kind` with what `arguments` say, over `default` where it is given.

    Sections of `kind` are flattened: `--lr`, not `--config.train.lr`. `--help` prints `help` and
    every flag, and exits. Raises UsageError with one sentence where they cannot be understood.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind,
                args=list(arguments),
                prog=f"tinygrad-llm {command}",
                description=help,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stopped:
        if stopped.code in (0, None):  # --help
            raise
    raise UsageError(_sentence(complaint.getvalue(), command))


def _sentence(box: str, command: str) -> str:
    """tyro's framed complaint (title, message, perhaps a guess, the way to help) as one sentence.

    ╭─ Unrecognized options ────────╮
    │ Unrecognized options: --lrr   │      ->   unrecognized options: --lrr; did you mean --lr?
    │ ───────────────────────────── │           (tinygrad-llm pretrain gpt --help lists all)
    │ Perhaps you meant:            │
    │     --lr FLOAT                │
    """
    parts: list[list[str]] = [[]]
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines():
        words = line.strip(" │")
        if re.fullmatch(r"[─╰╯-]{4,}", words):
            parts.append([])
        elif words.startswith("╭"):
            parts += [[words.strip("╭╮─ ")], []]
        elif words:
            parts[-1].append(words)
    _, message, *rest = [" ".join(part) for part in parts if part] + ["it cannot be understood"]
    message = message.rstrip(".").removeprefix("Error parsing ")
    message = re.sub(r"^settings\.\w+: ", "", message)  # a section refused: it says which key
    message = re.sub(r"^Missing from .*?: (--[\w-]+) .*", r"\1 is missing", message)
    guess = re.search(r"Perhaps you meant: *(--[\w-]+)", " ".join(rest))
    hint = f"; did you mean {guess[1]}?" if guess else ""
    return f"{message[:1].lower()}{message[1:]}{hint} (tinygrad-llm {command} --help lists all)"


def program() -> str:
    """How to start this program again from the present folder, ready to be pasted.

    `tinygrad-llm` where the shell would find the one that runs, else its path, such as
    `.venv/bin/tinygrad-llm`; `python -m tinygrad_llm` where it was started so, or by a test.
    """
    started = Path(sys.argv[0])
    if started.name != "tinygrad-llm" or not started.is_file():
        return shlex.join([_short(Path(sys.executable)), "-m", "tinygrad_llm"])
    found = shutil.which(started.name)
    if found is not None and Path(found).resolve() == started.resolve():
        return started.name
    return shlex.quote(_short(started))


def _short(path: Path) -> str:
    """The path from the present folder where it lies within it, else the whole one."""
    path = Path.cwd() / path  # not resolve(): .venv/bin/python is a link out of the environment
    if not path.is_relative_to(Path.cwd()):
        return str(path)
    inside = path.relative_to(Path.cwd())
    return str(inside) if len(inside.parts) > 1 else f"./{inside}"
