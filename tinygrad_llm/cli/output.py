"""Text that a model wrote, on a terminal or in a pipe."""

from __future__ import annotations

from collections.abc import Iterable

# A model trained on bytes may write any of them, also those that move a terminal's cursor.
_CONTROL = {c: "\ufffd" for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"}
_CONTROL[ord("\r")] = ""


def show_text(pieces: Iterable[str]) -> None:
    """Print the pieces one after the other, each at once, control characters as U+FFFD."""
    for piece in pieces:
        print(piece.translate(_CONTROL), end="", flush=True)
