"""When a run is over: its steps, its time, its tokens or its patience are used up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tinygrad_llm.train.config import TrainConfig


@dataclass(frozen=True)
class End:
    """Why a run is over, and the flag that lets it go on: it needs more than `limit`."""

    reason: str  # after "the run has"
    flag: str
    limit: float


def better(score: str, value: float, than: float | None) -> bool:
    """Is `value` better? A loss is the better the lower, every other score the higher."""
    if than is None or math.isnan(value):
        return not math.isnan(value)
    return value < than if score.endswith("loss") else value > than


class Limits:
    """Watches a run against the limits in `config`.

    Patience counts validations, the one before the first step among them: it is used up when as
    many in a row as `config.patience` were no better than the best before them. The count belongs
    to the state of a run, so that a resumed one stops where the whole one does. `score` says what
    is compared: a loss, or what is the better the higher.
    """

    def __init__(self, config: TrainConfig, score: str = "val_loss") -> None:
        self.config, self.score = config, score
        self.best: float | None = None
        self.waited = 0

    def validated(self, value: float) -> None:
        """Take note of a validation."""
        if better(self.score, value, self.best):
            self.best, self.waited = value, 0
        else:
            self.waited += 1

    def over(self, step: int, tokens: int, seconds: float) -> End | None:
        """Why the run is over after so many steps, tokens and seconds; None while it is not."""
        c = self.config
        if step >= c.steps:
            return End(f"done {step} of {c.steps} steps", "--steps", c.steps)
        if 0 < c.max_tokens <= tokens:
            reason = f"seen {tokens:,} tokens, its limit being {c.max_tokens:,}"
            return End(reason, "--max-tokens", c.max_tokens)
        if 0 < c.max_seconds <= seconds:
            reason = f"trained for {seconds:.1f} s, its limit being {c.max_seconds:g} s"
            return End(reason, "--max-seconds", c.max_seconds)
        if 0 < c.patience <= self.waited:
            what = self.score.removeprefix("val_")
            reason = f"had {self.waited} validations without a better {what} than {self.best:.4f}"
            return End(reason, "--patience", self.waited)
        return None

    def state(self) -> dict[str, Any]:
        """The count of patience, as JSON."""
        return {"best": self.best, "waited": self.waited}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.best, self.waited = state["best"], state["waited"]
