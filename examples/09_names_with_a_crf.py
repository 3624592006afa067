"""Lesson 9: names in text, and what a CRF adds to a BiLSTM.

What you will learn:
- a softmax chooses each tag alone, a CRF chooses the tags of a sentence together;
- how it can: the sum over K^T sequences in T steps, checked against all of them, one by one;
- what the transitions learn, what rules alone give, and what is left for the CRF.

The data are built in: functions of Python's own library, the role of each name as its tag, so that
`self . path . join` is one CALL: B-CALL I-CALL I-CALL I-CALL I-CALL. With the word `small` behind
it, the lesson trains on less. Letters: T words in a sentence, K tags.
"""

import sys
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import numpy as np

from tinygrad_llm import manual_seed, nn, optim
from tinygrad_llm.data import builtin
from tinygrad_llm.data.conll import Sentences
from tinygrad_llm.metrics.entities import entity_scores
from tinygrad_llm.models.tagger import Tagger
from tinygrad_llm.nn import constraints_for
from tinygrad_llm.tasks.tag import TagTask, row_emissions, tagger_config

Tags = list[list[str]]


def first(sentences: Sentences, count: int) -> Sentences:
    """The first `count` of the sentences."""
    s, tags = sentences, sentences.tags or []
    return Sentences(s.name, s.words[:count], tags[:count], s.lines[:count], s.documents[:count])


def partition_by_hand() -> None:
    """ln Σ e^score over all sequences: once as it is written, once as the CRF computes it."""
    K, T = 3, 6
    crf = nn.CRF(K)
    emissions = np.random.default_rng(0).normal(size=(T, K)).astype(np.float32)
    start, moves, end = (
        p.numpy() for p in (crf.start_transitions, crf.transitions, crf.end_transitions)
    )

    def score(tags: tuple[int, ...]) -> float:
        steps = sum(moves[a, b] for a, b in pairwise(tags))
        return start[tags[0]] + emissions[range(T), tags].sum() + steps + end[tags[-1]]

    scores = {tags: score(tags) for tags in product(range(K), repeat=T)}
    summed = np.log(np.exp(list(scores.values())).sum())
    # α[k]: the same sum over the sequences that are t words long and end with tag k. One more
    # word costs K² sums, so all of them cost T K², not K^T.
    alpha = start + emissions[0]
    for row in emissions[1:]:
        alpha = np.log(np.exp(alpha[:, None] + moves).sum(axis=0)) + row
    forward = np.log(np.exp(alpha + end).sum())
    ours, best = crf.log_partition(emissions[None]).item(), crf.decode(emissions[None])[0]
    print(f"1. ln Σ e^score of {len(scores)} sequences, one by one: {summed:.5f}")
    print(f"   by the forward algorithm: {forward:.5f}; nn.CRF's: {ours:.5f}")
    print(f"   the best of them: {list(max(scores, key=scores.__getitem__))}; Viterbi's: {best}")
    assert abs(summed - ours) < 1e-4
    assert list(max(scores, key=scores.__getitem__)) == best


def train(task: TagTask, stops: list[int]) -> Iterator[tuple[Tagger, list[np.ndarray]]]:
    """The tagger after so many batches, and the emissions (T, K) of each held-out sentence."""
    manual_seed(0)
    model = Tagger(task.config)
    optimizer = optim.Adam(model.parameters(), lr=5e-3)
    for step in range(1, stops[-1] + 1):
        model.train()
        loss = task.loss(model, task.next_batch())  # −ln p(all tags) / words, of either head
        optimizer.zero_grad()
        loss.backward()
        optim.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if step in stops:
            yield model, task.val_rows.merge(row_emissions(model, task.val_rows, task.collate))


def by_rules_alone(model: Tagger, emissions: list[np.ndarray]) -> Tags:
    """The best sequences that BIO allows, from a softmax tagger: nothing is learned for it."""
    labels = model.config.labels
    crf = nn.CRF(len(labels), constraints_for(labels))
    for weights in crf.parameters():
        nn.init.zeros_(weights)  # all that is allowed is alike
    return [[labels[k] for k in crf.decode(e[None])[0]] for e in emissions]


def illegal(tags: list[str]) -> list[int]:
    """Where an I-X stands that goes on with nothing: not behind B-X or I-X."""
    before = ["O", *tags[:-1]]
    return [i for i, t in enumerate(tags) if t[:2] == "I-" and t[2:] != before[i][2:]]


def strongest(names: tuple[str, ...], moves: np.ndarray, count: int) -> None:
    """The transitions that the CRF came to like best and least, of those that BIO allows."""
    allowed = np.argwhere(constraints_for(names).transitions)
    order = sorted(allowed.tolist(), key=lambda pair: moves[tuple(pair)])
    for what, pairs in (("liked", order[::-1][:count]), ("avoided", order[:count])):
        for a, b in pairs:
            print(f"   {what:8} {moves[a, b]:+5.2f}  {names[a]:12} → {names[b]}")


def main() -> None:
    count, stops = (200, [40, 80]) if sys.argv[1:] == ["small"] else (2000, [40, 100, 400])
    manual_seed(0)
    partition_by_hand()
    splits: Any = builtin.load("tag")
    sentences, held_out = first(splits.train, count), first(splits.validation, count // 5)
    sizes = {"word_size": 32, "character_features": 16, "hidden_size": 32, "dropout": 0.2}
    found: dict[tuple[int, str], Tags] = {}
    names, moves = (), np.zeros(0)
    for head in ("softmax", "crf"):
        task = TagTask(tagger_config(sentences, head=head, **sizes), sentences, held_out)
        for step, (model, emissions) in zip(stops, train(task, stops), strict=True):
            found[step, head] = model.decode(emissions)
            if head == "softmax":
                found[step, "softmax + rules"] = by_rules_alone(model, emissions)
            if model.crf is not None:
                names, moves = model.config.labels, model.crf.transitions.numpy()

    gold = held_out.tags or []
    print(f"\n2. {len(gold)} sentences of modules never seen, {len(names)} tags")
    print("   batches  head              entity F1   illegal tags")
    f1, broken = {}, {}
    for (step, head), tags in sorted(found.items()):
        f1[step, head] = entity_scores(gold, tags).averages.micro.f1
        broken[step, head] = sum(len(illegal(row)) for row in tags)
        print(f"   {step:7}  {head:17} {f1[step, head]:9.3f} {broken[step, head]:14}")
    # An LSTM finds out what may follow what, given time; the CRF cannot get it wrong. So most of
    # its lead comes early, and much of that from the rules: what it learns beyond them is less.
    assert broken[stops[0], "softmax"] > broken[stops[-1], "softmax"]
    assert all(n == 0 for (_, head), n in broken.items() if head != "softmax")
    assert f1[stops[0], "softmax + rules"] > f1[stops[0], "softmax"]
    assert f1[stops[-1], "crf"] > max(0.5, f1[stops[-1], "softmax"] - 0.02)

    ours, theirs = found[stops[0], "crf"], found[stops[0], "softmax"]
    i, at = next((i, illegal(tags)[0]) for i, tags in enumerate(theirs) if illegal(tags))
    print(f"\n3. Broken by the softmax after {stops[0]} batches:  word, right, softmax, CRF")
    for row in range(max(0, at - 3), min(at + 3, len(gold[i]))):
        tags = " ".join(f"{t[i][row]:12}" for t in (gold, theirs, ours)).rstrip()
        print(f"   {'→' if row == at else ' '} {held_out.words[i][row]:14} {tags}")
    print("\n4. Transitions that the CRF learned:")
    strongest(names, moves, 5)


if __name__ == "__main__":
    main()
