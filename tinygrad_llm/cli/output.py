"""What commands print: lines for people, JSON for programs, the text that a model wrote."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any
from unicodedata import east_asian_width

from tyro.conf import FlagCreatePairsOff, arg

from tinygrad_llm.train.log import as_json, printable

# Two options that most commands have: `quiet: Quiet = False`.
Quiet = Annotated[bool, FlagCreatePairsOff, arg(help="Only errors and the result.")]
Json = Annotated[bool, FlagCreatePairsOff, arg(help="JSON for programs, an object a line.")]


def show_text(pieces: Iterable[str]) -> None:
    """Print the pieces one after the other, each at once, control characters as U+FFFD."""
    for piece in pieces:
        print(printable(piece), end="", flush=True)


def show_json(value: dict[str, Any]) -> None:
    """Print the object on one line; see `as_json`."""
    print(as_json(value), flush=True)


def show_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int]) -> None:
    """Print a table: with rich on a terminal, in plain columns elsewhere.

    The columns whose numbers are in `right` end at the same place, the others begin there.
    """
    lines = [[printable(cell).replace("\n", " ") for cell in row] for row in (head, *rows)]
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        _show_rich(lines, right)
        return
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = []
        for i, (cell, width) in enumerate(zip(line, widths, strict=True)):
            blanks = " " * (width - _width(cell))
            padded.append(blanks + cell if i in right else cell + blanks)
        print("  ".join(padded).rstrip())


def _width(text: str) -> int:
    """How many places it takes: Chinese characters and emoji take two."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def _show_rich(lines: Sequence[Sequence[str]], right: Collection[int]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", box=None, pad_edge=False)
    for i, name in enumerate(lines[0]):
        table.add_column(Text(name), justify="right" if i in right else "left")
    for line in lines[1:]:
        table.add_row(*map(Text, line))  # Text: no [markup] in a name
    Console(file=sys.stdout, highlight=False).print(table)
