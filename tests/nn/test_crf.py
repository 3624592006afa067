"""The CRF against all label sequences, one by one; and what label names allow."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygrad_llm import Tensor, gradcheck, manual_seed, nn, ops
from tinygrad_llm.nn.crf import Constraints, constraints_for

BIO = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
BIOES = ("O", "B-X", "I-X", "E-X", "S-X")


def _crf(labels: int | tuple[str, ...], rng: np.random.Generator, scale: float = 1.0) -> nn.CRF:
    """With transitions at random, in float64."""
    many = isinstance(labels, int)
    crf = nn.CRF(labels) if many else nn.CRF(len(labels), constraints_for(labels))
    for parameter in crf.parameters():
        parameter.data = rng.normal(size=parameter.shape) * scale
    return crf


def _chain(crf: nn.CRF) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pairs = (
        (crf.transitions, crf.allowed),
        (crf.start_transitions, crf.allowed_start),
        (crf.end_transitions, crf.allowed_end),
    )
    a, b, c = (np.where(allowed.numpy(), w.numpy(), -np.inf) for w, allowed in pairs)
    return a, b, c


def _all_scores(crf: nn.CRF, x: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(sequences, scores): every sequence of n labels, of one row of emissions."""
    moves, start, end = _chain(crf)
    sequences = np.array(list(itertools.product(range(x.shape[1]), repeat=n)), np.int64)
    sequences = sequences.reshape(-1, n)
    scores = start[sequences[:, 0]] + end[sequences[:, -1]]
    scores = scores + x[np.arange(n), sequences].sum(axis=1)
    return sequences, scores + moves[sequences[:, :-1], sequences[:, 1:]].sum(axis=1)


def _log_sum(scores: np.ndarray) -> float:
    return float(scores.max() + np.log(np.exp(scores - scores.max()).sum()))


# --- brute force ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    labels=st.one_of(st.integers(1, 4), st.sampled_from([BIO, BIOES])),
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3),
)
def test_everything_equals_brute_force(
    seed: int, labels: int | tuple[str, ...], lengths: list[int]
) -> None:
    """ln Z, its marginals, the score and the loss of tags, and the best labels."""
    rng = np.random.default_rng(seed)
    crf, k = _crf(labels, rng, 2.0), labels if isinstance(labels, int) else len(labels)
    x = rng.normal(size=(len(lengths), max(lengths), k)) * 2.0
    tags = np.zeros(x.shape[:2], np.int64) - 100
    totals, gold, marginals, best = np.zeros(len(x)), np.zeros(len(x)), np.zeros(x.shape), []
    for row, n in enumerate(lengths):
        if n == 0:
            best.append([])
            continue
        sequences, scores = _all_scores(crf, x[row], n)
        totals[row] = _log_sum(scores)
        probabilities = np.exp(scores - totals[row])
        for t in range(n):
            marginals[row, t] = np.bincount(sequences[:, t], probabilities, minlength=k)
        best.append(sequences[scores.argmax()].tolist())
        tags[row, :n] = picked = sequences[rng.choice(len(scores), p=probabilities)]
        gold[row] = scores[(sequences == picked).all(axis=1)][0]
    close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
    np.testing.assert_allclose(crf.log_partition(x, lengths=lengths).numpy(), totals, **close)
    np.testing.assert_allclose(crf.marginals(x, lengths=lengths).numpy(), marginals, **close)
    np.testing.assert_allclose(crf.score(x, tags, lengths=lengths).numpy(), gold, **close)
    each = crf(x, tags, lengths=lengths, reduction="none").numpy()
    np.testing.assert_allclose(each, totals - gold, **close)
    assert crf.decode(x, lengths=lengths) == best


def test_the_losses_gradient_is_its_derivative() -> None:
    rng = np.random.default_rng(0)
    crf = _crf(BIO, rng)
    tags, lengths = np.array([[1, 2, 0, 3], [0, 3, -1, -1], [9, 9, 9, 9]]), [4, 2, 0]

    def loss(x: Tensor, moves: Tensor, start: Tensor, end: Tensor) -> Tensor:
        for name, value in (("", moves), ("start_", start), ("end_", end)):
            object.__setattr__(crf, f"{name}transitions", value)
        return crf(x, tags, lengths=lengths)

    arrays = (rng.normal(size=s) for s in ((3, 4, 5), (5, 5), (5,), (5,)))
    assert gradcheck(loss, *[Tensor(a) for a in arrays], order=1)


# --- long and extreme -----------------------------------------------------------------------------


def test_float32_stays_exact_over_long_and_extreme_sequences() -> None:
    rng = np.random.default_rng(0)
    crf = _crf(BIO, rng)
    x = rng.normal(size=(2, 400, 5)) * 50
    exact, exact_p = crf.log_partition(x).numpy(), crf.marginals(x).numpy()
    crf.to("float32")
    found, p = crf.log_partition(x.astype(np.float32)), crf.marginals(x.astype(np.float32))
    assert found.dtype == p.dtype == np.float32
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-6)
    np.testing.assert_allclose(p.numpy(), exact_p, atol=2e-4)
    np.testing.assert_allclose(p.numpy().sum(axis=2), 1.0, atol=1e-4)


def test_what_only_a_weak_label_leads_to_is_not_lost() -> None:
    """I-PER comes only after B-PER, which lies e^−300 behind: float32 must not drop it."""
    crf = nn.CRF(5, constraints_for(BIO))
    x = np.zeros((1, 3, 5), np.float32)
    x[0, 0, 1], x[0, 1, 2], x[0, 2, 0] = -300.0, 600.0, 0.0
    assert crf.decode(x)[0][:2] == [1, 2]
    p = crf.marginals(x).numpy()[0]
    np.testing.assert_allclose(p[0, 1], 1.0, atol=1e-6)
    np.testing.assert_allclose(p[1, 2], 1.0, atol=1e-6)


def test_half_precision_computes_in_float32() -> None:
    rng = np.random.default_rng(0)
    crf = nn.CRF(3).to("float16")
    x = rng.normal(size=(2, 200, 3)).astype(np.float16)
    exact = nn.CRF(3)
    exact.load_state_dict(crf.state_dict())
    np.testing.assert_allclose(
        crf.log_partition(x).numpy().astype(np.float32),
        exact.log_partition(x.astype(np.float32)).numpy(),
        rtol=1e-3,
    )


# --- use ------------------------------------------------------------------------------------------


def test_it_learns_what_follows_what() -> None:
    """Emissions say nothing: only transitions can tell that 0 and 1 take turns."""
    manual_seed(0)
    crf = nn.CRF(2)
    x, tags = np.zeros((4, 6, 2), np.float32), np.tile([0, 1], (4, 3))
    first = crf(x, tags).item()
    for _ in range(60):
        crf.zero_grad()
        loss = crf(x, tags)
        loss.backward()
        for parameter in crf.parameters():
            assert parameter.grad is not None
            parameter.data -= 0.5 * parameter.grad.data
    assert crf(x, tags).item() < 0.1 * first
    assert crf.decode(x) == tags.tolist()


def test_mask_lengths_and_padding_agree() -> None:
    rng = np.random.default_rng(0)
    crf, x = _crf(3, rng), rng.normal(size=(3, 5, 3))
    tags, lengths = rng.integers(0, 3, size=(3, 5)), np.array([5, 2, 0])
    mask = np.arange(5) < lengths[:, None]
    loss = crf(x, tags, lengths=lengths).item()
    assert crf(x, tags, mask=mask).item() == pytest.approx(loss)
    poisoned, other = x.copy(), np.where(mask, tags, -100)
    poisoned[~mask] = 1e3
    assert crf(poisoned, other, mask=Tensor(mask)).item() == pytest.approx(loss)
    assert crf.decode(poisoned, mask=mask) == crf.decode(x, lengths=lengths)
    each = crf(x, tags, mask=mask, reduction="none").numpy()
    assert each[2] == 0
    assert crf(x, tags, mask=mask, reduction="sum").item() == pytest.approx(each.sum())
    assert loss == pytest.approx(each[:2].mean())


def test_no_steps_and_no_rows() -> None:
    crf = nn.CRF(3)
    for shape in ((2, 0, 3), (0, 4, 3)):
        x = np.zeros(shape, np.float32)
        loss = crf(x, np.zeros(shape[:2], np.int64))
        loss.backward()
        assert loss.item() == 0
        assert crf.decode(x) == [[]] * shape[0]
        assert crf.marginals(x).shape == shape


def test_the_state_dict_holds_the_transitions_alone() -> None:
    crf = nn.CRF(5, constraints_for(BIO))
    assert list(crf.state_dict()) == ["transitions", "start_transitions", "end_transitions"]
    assert repr(crf) == "CRF(5, BIO constraints)"
    assert repr(nn.CRF(2)) == "CRF(2)"
    for parameter in crf.parameters():
        assert np.abs(parameter.numpy()).max() <= 0.1


def test_what_does_not_fit_is_refused() -> None:
    crf = nn.CRF(5, constraints_for(BIO))
    x, tags = np.zeros((2, 3, 5), np.float32), np.zeros((2, 3), np.int64)
    with pytest.raises(ValueError, match="num_labels must be at least 1, got 0"):
        nn.CRF(0)
    with pytest.raises(ValueError, match="constraints are for 5 labels, expected 4"):
        nn.CRF(4, constraints_for(BIO))
    with pytest.raises(ValueError, match=r"emissions \(B, T, 5\), got \(2, 3, 4\)"):
        crf(x[..., :4], tags)
    with pytest.raises(ValueError, match="a mask or lengths, got both"):
        crf(x, tags, mask=tags == 0, lengths=[3, 3])
    with pytest.raises(ValueError, match="row 1 has a gap"):
        crf(x, tags, mask=[[1, 1, 0], [1, 0, 1]])
    with pytest.raises(ValueError, match=r"a mask \(2, 3\), got \(2, 2\)"):
        crf(x, tags, mask=[[1, 1], [1, 1]])
    with pytest.raises(ValueError, match="from 0 to the 3 steps there are, got 4"):
        crf(x, tags, lengths=[3, 4])
    with pytest.raises(ValueError, match="got 5 in sequence 1 at step 2"):
        crf(x, [[0, 0, 0], [0, 0, 5]])
    with pytest.raises(ValueError, match=r"tags must be \(2, 3\) integers, got float64"):
        crf(x, tags.astype(float))
    with pytest.raises(ValueError, match="reduction is 'mean', 'sum' or 'none'"):
        crf(x, tags, reduction="batch")
    with pytest.raises(
        ValueError, match="BIO does not allow I-LOC after B-PER, in sequence 0 at step 1"
    ):
        crf(x, [[1, 4, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match="I-PER as the first label, in sequence 1 at step 0"):
        crf(x, [[1, 2, 0], [2, 0, 0]])
    strict = nn.CRF(5, constraints_for(BIOES))
    with pytest.raises(ValueError, match="B-X as the last label, in sequence 0 at step 1"):
        strict(x, [[0, 1, 0], [0, 0, 0]], lengths=[2, 3])
    hopeless = nn.CRF(2, constraints_for(["O", "I-X"])._replace(start=np.zeros(2, bool)))
    with pytest.raises(ValueError, match="no label sequence that is not forbidden"):
        hopeless.decode(np.zeros((1, 2, 2)))


# --- constraints ----------------------------------------------------------------------------------


def _valid(names: tuple[str, ...], scheme: str) -> bool:
    """Whether a sequence of labels is well formed, by reading it once from left to right."""
    inside: str | None = None  # the type of the entity that is still open
    for name in names:
        prefix, _, kind = name.partition("-")
        if prefix in ("I", "E", "M", "L"):
            if inside != kind:
                return False
            inside = kind if prefix in ("I", "M") else None
        elif inside is not None and scheme != "BIO":
            return False
        else:
            inside = kind if prefix == "B" else None
    return inside is None or scheme == "BIO"


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [
        (BIO, "BIO"),
        (("O", "B-X"), "BIO"),
        (BIOES, "BIOES"),
        (("O", "B-X", "I-X", "E-X", "S-X", "S-Y"), "BIOES"),
        (("O", "B-X", "I-X", "L-X", "U-X"), "BILOU"),
        (("B", "M", "E", "S"), "BMES"),
        (("O", "B", "I"), "BIO"),
        (("B-X", "I-X", "B-Y-Z", "I-Y-Z", "O", "[PAD]"), "BIO"),
    ],
)
def test_exactly_the_well_formed_sequences_are_allowed(
    labels: tuple[str, ...], scheme: str
) -> None:
    found = constraints_for(labels)
    assert found.scheme == scheme
    for n in (1, 2, 3):
        for ids in itertools.product(range(len(labels)), repeat=n):
            allowed = found.start[ids[0]] and found.end[ids[-1]]
            allowed = allowed and all(found.transitions[a, b] for a, b in itertools.pairwise(ids))
            assert allowed == _valid(tuple(labels[i] for i in ids), scheme), ids


@pytest.mark.parametrize(
    "labels", [("NOUN", "VERB"), ("O", "I-X"), ("O", "B-X", "I-X", "I-Y"), ("N", "M", "S")]
)
def test_without_a_scheme_all_is_allowed(labels: tuple[str, ...]) -> None:
    found = constraints_for(labels)
    assert found.scheme == ""
    assert found.labels == labels
    assert found.transitions.all()
    assert found.start.all()
    assert found.end.all()


def test_labels_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="'O' twice"):
        constraints_for(["O", "B-X", "O"])
    with pytest.raises(ValueError, match="prefixes B, E, U belong to none of BIOES, BILOU"):
        constraints_for(["O", "B-X", "E-X", "U-X"])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 8))
def test_what_is_decoded_is_well_formed(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    for labels, scheme in ((BIO, "BIO"), (BIOES, "BIOES")):
        crf = _crf(labels, rng)
        x = rng.normal(size=(2, n, 5)) * 5
        for ids in crf.decode(x):
            assert _valid(tuple(labels[i] for i in ids), scheme)
        impossible = crf.marginals(x).numpy()[:, 0, ~crf.allowed_start.numpy()]
        assert (impossible == 0).all()


def test_constraints_none() -> None:
    free = Constraints.none(3)
    assert free.transitions.shape == (3, 3)
    assert free.transitions.all()
    assert ops.crf_decode(np.eye(3)[None], np.zeros((3, 3)), np.zeros(3), np.zeros(3)) == [
        [0, 1, 2]
    ]
