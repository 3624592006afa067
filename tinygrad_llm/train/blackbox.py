"""What a run says when its loss is no number: the op that made the first NaN or infinity."""

from __future__ import annotations

from collections.abc import Callable

from tinygrad_llm.watch import detect_anomaly


def first_bad_op(compute: Callable[[], object]) -> str | None:
    """'Exp made infinity in 3 of 64 elements, the first at (2, 1)', or None where it made none.

    `compute` does the forward and backward pass again, from the same batch, weights and random
    state; each op on the way is checked, which is slow and done only here.
    """
    try:
        with detect_anomaly():
            compute()
    except FloatingPointError as error:
        op, _, _ = str(error).partition("; its forward")
        op, _, _ = op.partition(", at ")  # the source line is one of ours: no help to the user
        return op.rstrip(", ")
    return None
