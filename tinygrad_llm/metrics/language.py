"""How well a language model predicts a text, beside what is had for nothing.

loss            L = −(1/n) Σ ln p(token | those before it)      nats per token, n tokens
perplexity      e^L
bits per token  L / ln 2
bits per byte   n L / (ln 2 · bytes)                            comparable between tokenizers
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from tinygrad_llm.metrics.plot import figure_of, plain
from tinygrad_llm.metrics.report import WIDTH

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LanguageScore:
    """What the scoring of a text found; `bytes` is None where the tokens do not tell it."""

    nats: float  # −Σ ln p over the tokens
    tokens: int
    bytes: int | None  # of the text that was scored, in UTF-8; a mark between documents has none

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """e^loss; infinite where that is more than a float can hold (a loss above 709)."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def bits_per_token(self) -> float:
        """loss / ln 2"""
        return self.loss / math.log(2)

    @property
    def bits_per_byte(self) -> float | None:
        """nats / (ln 2 · bytes)"""
        return self.nats / (math.log(2) * self.bytes) if self.bytes else None

    def as_dict(self) -> dict[str, float | None]:
        """What JSON holds of it; None for what is not known and for an infinite perplexity."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_token": self.bits_per_token,
            "bits_per_byte": self.bits_per_byte,
        }


class Written(NamedTuple):
    """How the model went on from the prompt, before and after, drawn with the same seed."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class LanguageReport:
    """A language model that was fine-tuned, itself as it was before, and the unigram model.

    All three are scored on the very same tokens.
    """

    name: str
    score: LanguageScore
    before: LanguageScore
    unigram: LanguageScore
    written: Written
    began: str = "before, as it came"  # what `before` was: a checkpoint, or weights at random
    notes: list[str] = field(default_factory=list)

    def rows(self) -> dict[str, LanguageScore]:
        """The scores by their names, this model first."""
        usual = "how often tokens come"
        return {"this model": self.score, self.began: self.before, usual: self.unigram}

    def as_dict(self) -> dict[str, Any]:
        """What metrics.json holds of it."""
        return {
            **self.score.as_dict(),
            "tokens": self.score.tokens,
            "bytes": self.score.bytes,
            "baselines": {"before": self.before.as_dict(), "unigram": self.unigram.as_dict()},
            "written": self.written._asdict(),
            "notes": self.notes,
        }

    def text(self) -> str:
        """The scores beside the baselines, what to make of them, and what is written."""
        size = "" if self.score.bytes is None else f", {self.score.bytes:,} bytes"
        lines = [f"{self.name}: {self.score.tokens:,} tokens{size}", ""]
        lines += [*_table(self.rows()), "", *textwrap.wrap(self._in_words(), WIDTH)]
        for when, text in (("before", self.written.before), ("after", self.written.after)):
            lines += ["", f"{when}, from {self.written.prompt!r}:"]
            lines += [f"  {line}" for line in _shown(text)]
        said = [line for note in self.notes for line in textwrap.wrap(f"note: {note}", WIDTH)]
        return "\n".join([*(line.rstrip() for line in lines), *([""] if said else []), *said])

    def _in_words(self) -> str:
        gained = self.before.loss - self.score.loss
        if gained > 0:
            share = gained / self.before.loss
            found = f"It is better than before by {gained:.4f} nats per token, {share:.1%}."
        else:
            found = (
                f"It is no better than before, but worse by {-gained:.4f} nats per token: try a "
                "lower learning rate, fewer epochs, or more text."
            )
        if self.score.loss >= self.unigram.loss:
            found += (
                " It is no better than who knows only how often each token comes: it has not "
                "learnt to read this text."
            )
        return found


def _table(rows: Mapping[str, LanguageScore]) -> list[str]:
    width = max(map(len, rows))
    head = f"{'':<{width}}  {'loss':>9}  {'perplexity':>12}  {'bits/token':>10}  {'bits/byte':>9}"
    lines = [head, "-" * len(head)]
    for name, score in rows.items():
        per_byte = score.bits_per_byte
        shown = "unknown" if per_byte is None else f"{per_byte:.4f}"
        perplexity = f"{score.perplexity:,.2f}" if score.perplexity < 1e8 else "above 10⁸"
        numbers = f"{score.loss:9.4f}  {perplexity:>12}  {score.bits_per_token:10.4f}"
        lines.append(f"{name:<{width}}  {numbers}  {shown:>9}")
    return lines


def _shown(text: str) -> list[str]:
    """Its lines, long ones folded, blank ones kept."""
    lines = text.expandtabs(4).split("\n")
    return [part for line in lines for part in textwrap.wrap(line, WIDTH - 2, **_AS_IT_IS) or [""]]


_AS_IT_IS: Any = {"drop_whitespace": False, "replace_whitespace": False}


# --- the picture ----------------------------------------------------------------------------------


@figure_of.register(LanguageReport)
def language_figure(report: LanguageReport) -> Figure:
    """A bar for the loss of each: this model, itself before, the unigram model."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    rows = report.rows()
    figure = Figure(figsize=(8, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    figure.suptitle(plain(report.name))
    bars = axes.barh(
        list(rows),
        [score.loss for score in rows.values()],
        color=["tab:blue", "tab:orange", "tab:gray"],
    )
    axes.bar_label(bars, [_label(score) for score in rows.values()], padding=3)
    axes.set_xlim(0, 1.6 * max(score.loss for score in rows.values()))
    axes.invert_yaxis()
    axes.set_xlabel("loss on the validation text (nats per token)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def _label(score: LanguageScore) -> str:
    per_byte = score.bits_per_byte
    return f"{score.loss:.3f}" + ("" if per_byte is None else f" ({per_byte:.3f} bits per byte)")
