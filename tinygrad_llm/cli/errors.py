"""The line between bad input, which gets one sentence, and a bug, which keeps its traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """What the user can mend: `main` prints it as one sentence and exits with status 2."""


@contextmanager
def user_input() -> Iterator[None]:
    """Within: a ValueError or OSError is about what the user gave.

    Commands wrap the part in which they read configuration, text and checkpoints. Outside of it,
    such as in the training loop, a ValueError is a bug of ours.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(_sentence(error)) from error


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:  # the system's own: it has no sentence
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
