"""A CRF on top of a tagger: labels are chosen together, so that they fit one another.

Dimensions: B batch, T steps, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tinygrad_llm import backend, ops
from tinygrad_llm.autograd import enable_grad, grad, no_grad
from tinygrad_llm.backend import Array
from tinygrad_llm.nn import init
from tinygrad_llm.nn.module import Module, Parameter
from tinygrad_llm.ops.convert import as_array, as_float
from tinygrad_llm.ops.recurrent import check_lengths
from tinygrad_llm.tensor import Tensor


class CRF(Module):
    """loss = ln Σ e^score(k₁ … k_n) − score(labels),  over all label sequences of the same length

    score(k₁ … k_n) = start[k₁] + Σ_t emissions[t, k_t] + Σ_t transitions[k_{t−1}, k_t] + end[k_n]

    Weights `transitions` (K, K), from row to column, `start_transitions` and `end_transitions`
    (K,) begin uniform in ±0.1. Batch first, always.

        crf = CRF(len(labels), constraints_for(labels))
        loss = crf(emissions, tags, lengths=lengths)         emissions (B, T, K), tags (B, T)
        best = crf.decode(emissions, lengths=lengths)        a list of labels for each sequence

    Args:
        num_labels: K
        constraints: what may follow what; what may not is impossible, in training too. None: all.

    Lafferty, McCallum and Pereira, "Conditional random fields", 2001; over an LSTM: Lample et al.,
    "Neural architectures for named entity recognition", 2016.
    """

    allowed: Tensor
    allowed_start: Tensor
    allowed_end: Tensor

    def __init__(self, num_labels: int, constraints: Constraints | None = None) -> None:
        super().__init__()
        if num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {num_labels}")
        if constraints is not None and len(constraints.start) != num_labels:
            raise ValueError(
                f"the constraints are for {len(constraints.start)} labels, expected {num_labels}"
            )
        self.num_labels = num_labels
        self.transitions = Parameter.empty(num_labels, num_labels)
        self.start_transitions = Parameter.empty(num_labels)
        self.end_transitions = Parameter.empty(num_labels)
        found = constraints or Constraints.none(num_labels)
        self.scheme, self.labels = found.scheme, found.labels
        # Not in the state dict: they follow from the labels, and files stay those of other CRFs.
        self.register_buffer("allowed", Tensor(found.transitions), persistent=False)
        self.register_buffer("allowed_start", Tensor(found.start), persistent=False)
        self.register_buffer("allowed_end", Tensor(found.end), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all transitions anew."""
        for parameter in self.parameters():
            init.uniform_(parameter, -0.1, 0.1)

    def forward(
        self,
        emissions: Any,
        tags: Any,
        mask: Any = None,
        lengths: Any = None,
        reduction: str = "mean",
    ) -> Tensor:
        """The negative log-likelihood of the tags.

        Args:
            emissions: (B, T, K), the score of each label at each step
            tags: (B, T) integers in 0 … K−1; padding may hold anything
            mask: (B, T) True where a step is real, from the first step of each sequence to its
                last without a gap; or
            lengths: (B,) how many steps are real. Neither: all.
            reduction: 'mean' over the sequences that have steps, 'sum', or 'none', (B,)

        Raises:
            ValueError: a tag out of range, or tags that the constraints forbid (the first is named)
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")
        x, counts = self._checked(emissions, mask, lengths)
        losses = ops.crf_log_partition(x, *self._chain(), counts) - self._score(x, tags, counts)
        if reduction == "none":
            return losses
        total = losses.sum()
        return total if reduction == "sum" else total * (1.0 / max(1, int((counts > 0).sum())))

    def score(self, emissions: Any, tags: Any, mask: Any = None, lengths: Any = None) -> Tensor:
        """score(tags) of each sequence, (B,); arguments as for the loss."""
        x, counts = self._checked(emissions, mask, lengths)
        return self._score(x, tags, counts)

    def log_partition(self, emissions: Any, mask: Any = None, lengths: Any = None) -> Tensor:
        """ln Σ e^score over all label sequences, (B,)."""
        x, counts = self._checked(emissions, mask, lengths)
        return ops.crf_log_partition(x, *self._chain(), counts)

    def marginals(self, emissions: Any, mask: Any = None, lengths: Any = None) -> Tensor:
        """P(label k at step t), (B, T, K): rows add up to 1, padding is 0. Not recorded."""
        x, counts = self._checked(emissions, mask, lengths)
        leaf = Tensor(x.data, requires_grad=True)  # the gradient of ln Z is what is asked for
        with no_grad():
            chain = self._chain()
        with enable_grad():
            return grad(ops.crf_log_partition(leaf, *chain, counts).sum(), leaf)[0]

    def decode(self, emissions: Any, mask: Any = None, lengths: Any = None) -> list[list[int]]:
        """The labels with the highest score together, as many for each sequence as it has steps."""
        x, counts = self._checked(emissions, mask, lengths)
        with no_grad():
            return ops.crf_decode(x, *self._chain(), counts)

    def _chain(self) -> tuple[Tensor, Tensor, Tensor]:
        """transitions, start and end, −∞ where the constraints forbid."""
        pairs = (
            (self.transitions, self.allowed),
            (self.start_transitions, self.allowed_start),
            (self.end_transitions, self.allowed_end),
        )
        moves, start, end = (ops.where(allowed, scores, -np.inf) for scores, allowed in pairs)
        return moves, start, end

    def _checked(self, emissions: Any, mask: Any, lengths: Any) -> tuple[Tensor, np.ndarray]:
        """emissions as a Tensor, and the lengths on the host."""
        x = as_float(emissions)
        if x.ndim != 3 or x.shape[2] != self.num_labels:
            raise ValueError(f"CRF needs emissions (B, T, {self.num_labels}), got {x.shape}")
        if mask is not None and lengths is not None:
            raise ValueError("CRF takes a mask or lengths, got both")
        if mask is not None:
            return x, _lengths_of(_on_host(mask), x.shape[:2])
        return x, check_lengths([x.shape[1]] * len(x) if lengths is None else lengths, *x.shape[:2])

    def _score(self, x: Tensor, tags: Any, lengths: np.ndarray) -> Tensor:
        batch, time, _ = x.shape
        real = np.arange(time) < lengths[:, None]
        labels = self._check_tags(_on_host(tags), real)
        if not time:
            return x.sum(axis=(1, 2))
        rows, last = np.arange(batch), np.maximum(lengths - 1, 0)
        transitions, start, end = self._chain()

        def summed(scores: Tensor, where: np.ndarray) -> Tensor:
            return ops.where(_like(where, x), scores, 0.0).sum(axis=1)

        emitted = x[_like(rows[:, None], x), _like(np.arange(time), x), _like(labels, x)]
        moved = transitions[_like(labels[:, :-1], x), _like(labels[:, 1:], x)]
        ends = start[_like(labels[:, 0], x)] + end[_like(labels[rows, last], x)]
        at_ends = ops.where(_like(lengths > 0, x), ends, 0.0)
        return summed(emitted, real) + summed(moved, real[:, 1:]) + at_ends

    def _check_tags(self, tags: np.ndarray, real: np.ndarray) -> np.ndarray:
        """The tags with 0 in the padding, where all else is a label, and one that is allowed."""
        if tags.shape != real.shape or (tags.dtype.kind not in "iu" and tags.size):
            raise ValueError(
                f"tags must be {real.shape} integers, got {tags.dtype} of shape {tags.shape}"
            )
        wrong = np.argwhere(real & ((tags < 0) | (tags >= self.num_labels)))
        if len(wrong):
            row, step = wrong[0]
            raise ValueError(
                f"tags are 0 to {self.num_labels - 1}, got {tags[row, step]} in sequence {row} at "
                f"step {step}"
            )
        labels = np.where(real, tags, 0).astype(np.int64)
        self._check_allowed(labels, real)
        return labels

    def _check_allowed(self, labels: np.ndarray, real: np.ndarray) -> None:
        """Raise for tags that cannot be: their loss would be infinite."""
        moves, start, end = (
            _on_host(a) for a in (self.allowed, self.allowed_start, self.allowed_end)
        )
        last = real & ~np.pad(real[:, 1:], ((0, 0), (0, 1)))
        forbidden = np.zeros(real.shape, bool)
        forbidden[:, 1:] = real[:, 1:] & ~moves[labels[:, :-1], labels[:, 1:]]
        forbidden[:, :1] = real[:, :1] & ~start[labels[:, :1]]
        forbidden |= last & ~end[labels]
        if forbidden.any():
            row, step = np.argwhere(forbidden)[0]
            name = self.labels[labels[row, step]]
            before = f"after {self.labels[labels[row, step - 1]]}" if step else "as the first label"
            what = "as the last label" if last[row, step] and not end[labels[row, step]] else before
            raise ValueError(
                f"{self.scheme or 'the CRF'} does not allow {name} {what}, in sequence {row} at "
                f"step {step}: repair the tags, or build the CRF without constraints"
            )

    def extra_repr(self) -> str:
        return f"{self.num_labels}" + (f", {self.scheme} constraints" if self.scheme else "")


def _on_host(x: Any) -> np.ndarray:
    data = x.data if isinstance(x, Tensor) else x
    return np.asarray(backend.to_device(data, "cpu") if backend.is_array(data) else data)


def _like(a: np.ndarray, x: Tensor) -> Array:
    return as_array(a, x.data)


def _lengths_of(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """How many steps of each row a mask says are real."""
    if mask.shape != shape:
        raise ValueError(f"CRF needs a mask {shape}, got {mask.shape}")
    real = mask.astype(bool)
    gap = real[:, 1:] & ~real[:, :-1]
    if gap.any():
        raise ValueError(
            f"a mask must be True up to the end of each sequence and False after it; row "
            f"{np.argwhere(gap)[0][0]} has a gap: gather the real steps first"
        )
    return real.sum(axis=1)


# --- constraints ----------------------------------------------------------------------------------


class Constraints(NamedTuple):
    """Which labels may begin, follow one another and end: True where allowed."""

    transitions: np.ndarray  # (K, K), from row to column
    start: np.ndarray  # (K,)
    end: np.ndarray  # (K,)
    scheme: str  # '' where all is allowed
    labels: tuple[str, ...]

    @staticmethod
    def none(num_labels: int) -> Constraints:
        """All is allowed."""
        ones, names = np.ones(num_labels, bool), tuple(map(str, range(num_labels)))
        return Constraints(np.ones((num_labels, num_labels), bool), ones, ones.copy(), "", names)


# What begins an entity, goes on in it, ends it, and is one by itself.
_SCHEMES = {"BIOES": "BIES", "BILOU": "BILU", "BMES": "BMES", "BIO": "BI"}


def constraints_for(labels: Sequence[str]) -> Constraints:
    """What the names of the labels say may follow what.

        constraints_for(["O", "B-PER", "I-PER"])      I-PER only after B-PER or I-PER

    A name is `PREFIX-TYPE` (or, where all are so short, the prefix alone); any other is outside of
    all entities, like O. The scheme is found from the prefixes: BIO (also called IOB2), BIOES,
    BILOU or BMES. Entities then begin and end as the scheme says, and keep their type. Nothing is
    forbidden in IOB1, where an entity may begin with I- (taken to be the scheme where a type has I-
    but no B-), and where no label has a prefix.

    Raises:
        ValueError: a label is there twice, or the prefixes belong to no scheme.
    """
    names = tuple(labels)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"labels must differ from one another, got {twice!r} twice")
    alone = "B" in names and all(len(name) == 1 and name in "BIESLUMO" for name in names)
    parts = [_parts(name, alone) for name in names]
    scheme = _scheme(parts)
    if not scheme:
        return Constraints.none(len(names))._replace(labels=names)
    roles = dict(zip(_SCHEMES[scheme], ["beginning", "inside", "ending", "single"], strict=False))
    kinds = [(roles.get(prefix, ""), kind) for prefix, kind in parts]
    open_ended = scheme == "BIO"  # an entity ends by itself
    inside = np.array([role in ("inside", "ending") for role, _ in kinds], bool)
    unfinished = np.array([role in ("beginning", "inside") for role, _ in kinds], bool)
    same = np.array([[a == b for _, b in kinds] for _, a in kinds], bool)
    goes_on = unfinished[:, None] & inside & same
    apart = ~inside[None, :] & (open_ended | ~unfinished[:, None])
    end = np.ones(len(names), bool) if open_ended else ~unfinished
    return Constraints(goes_on | apart, ~inside, end, scheme, names)


def _parts(name: str, alone: bool) -> tuple[str, str]:
    """'B-PER' -> ('B', 'PER'); 'O' -> ('', ''), and so is all that has no prefix."""
    prefix, dash, kind = name.partition("-")
    known = len(prefix) == 1 and prefix in "BIESLUM" and (dash or alone)
    return (prefix, kind) if known else ("", "")


def _scheme(parts: list[tuple[str, str]]) -> str:
    """The scheme that has all these prefixes; '' where there are none, and for IOB1."""
    prefixes = {prefix for prefix, _ in parts if prefix}
    if not prefixes & {"B", "I"}:
        return ""
    fits = [name for name in ("BIO", "BIOES", "BILOU", "BMES") if prefixes <= set(_SCHEMES[name])]
    if not fits:
        raise ValueError(
            f"the prefixes {', '.join(sorted(prefixes))} belong to none of {', '.join(_SCHEMES)}"
        )
    begun = {kind for prefix, kind in parts if prefix == "B"}
    gone_on = {kind for prefix, kind in parts if prefix == "I"}
    return "" if fits[0] == "BIO" and not gone_on <= begun else fits[0]
