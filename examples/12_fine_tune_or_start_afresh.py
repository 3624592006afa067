"""Lesson 12: fine-tune the small BERT, or train from scratch?

What you will learn:
- fine-tuning: the same network with a new head, all of it trained on a task with labels;
- a fair comparison: equal labels, steps and settings, more than one learning rate, three seeds,
  and the spread beside the mean: a difference within it is no result;
- that pretraining has to be earned: after a minute of it fine-tuning loses here, and with all
  labels both lose against counting words.

The task is built in: docstrings of Python's library → their package. The texts were in pretraining,
too, labels were not; and its minute comes on top of the steps that are equal. A count of words
stands beside both, for a network is not always worth it. Lesson 11 does the pretraining. With the
word `small` behind it, the lesson takes seconds and shows nothing but that it runs.
"""

import importlib
import sys
from typing import Any

import numpy as np

from tinygrad_llm import Tensor, manual_seed, nn, no_grad, ops, optim
from tinygrad_llm.data import builtin
from tinygrad_llm.models.bert import BertConfig, BertForPreTraining, BertModel
from tinygrad_llm.optim.schedules import Linear, Warmup

lesson11: Any = importlib.import_module("11_pretrain_a_small_bert")
Split = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids, which are real, labels


class Classifier(nn.Module):
    """A new head on the mean of the states.

    BERT's own classifier reads [CLS] through the pooler. With that and 250 labels, fine-tuning was
    worse than starting afresh, 33 % against 44 %: what is carried over has to be of use, too.
    """

    def __init__(self, config: BertConfig, classes: int) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, classes)

    def forward(self, ids: np.ndarray, real: np.ndarray) -> Tensor:
        return self.head(self.bert.sentence_embedding(ids, real, normalize=False))


def read(tokenizer: Any) -> tuple[Split, Split, list[str]]:
    """Training, validation, and the names of the labels."""
    data: Any = builtin.load("classify")
    packages = sorted({row[1] for row in data.train.rows})
    splits = []
    for split in (data.train, data.validation):
        labels = np.array([packages.index(row[1]) for row in split.rows])
        splits.append((*lesson11.encode(tokenizer, [row[0] for row in split.rows]), labels))
    return splits[0], splits[1], packages


def fine_tune(model: Classifier, data: Split, steps: int, lr: float, seed: int) -> None:
    """Train all of the network; batches of 32, the learning rate up and then down to nothing."""
    rng = np.random.default_rng(seed)
    optimizer = optim.AdamW(optim.decay_groups(model, 0.01), lr=lr)
    schedule = Warmup(steps // 10, Linear(steps - steps // 10))
    scheduler = optim.LRScheduler(optimizer, schedule)
    model.train()
    for _ in range(steps):
        rows = rng.integers(len(data[2]), size=32)
        ids, real, labels = (part[rows] for part in data)
        loss = ops.cross_entropy(model(ids, real), labels)
        optimizer.zero_grad()
        loss.backward()
        optim.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()


def accuracy(model: Classifier, data: Split) -> float:
    model.eval()
    with no_grad():
        guesses = model(*data[:2]).numpy().argmax(axis=1)
    return float(np.mean(guesses == data[2]))


def by_counting_words(train: Split, held_out: Split, words: int, classes: int) -> float:
    """Naive Bayes: the label k with the highest Σ ln p(word | k) + ln p(k)"""
    counts = np.ones((classes, words))  # the 1: never say that something is impossible
    for ids, real, label in zip(*train, strict=True):
        np.add.at(counts[label], ids[real], 1.0)
    scores = np.log(counts / counts.sum(axis=1, keepdims=True))
    prior = np.log(1.0 + np.bincount(train[2], minlength=classes))
    ids, real, labels = held_out
    found = (scores[:, ids] * real).sum(axis=-1).T + prior  # (N, classes)
    return float(np.mean(found.argmax(axis=1) == labels))


def compare(pretrained: BertForPreTraining, data: Any, steps: int, lr: float) -> list[np.ndarray]:
    """The accuracies of three seeds: from scratch, fine-tuned."""
    train, held_out, packages = data
    found = []
    for start in (None, pretrained):
        scores = []
        for seed in (1, 2, 3):  # of the new head, the order, and from scratch of all weights
            manual_seed(seed)
            model = Classifier(pretrained.config, len(packages))
            if start is not None:
                weights = start.bert.state_dict().items()
                model.bert.load_state_dict({n: w for n, w in weights if "pooler" not in n})
            fine_tune(model, train, steps, lr, seed)
            scores.append(accuracy(model, held_out))
        found.append(np.array(scores))
    return found


def main() -> None:
    small = sys.argv[1:] == ["small"]
    task = lesson11.make_task(1000 if small else 10_000)
    print("1. Pretraining; none: who reads nothing")
    pretrained = lesson11.pretrain(task, 20 if small else 1200)
    train, held_out, packages = read(task.tokenizer)
    if small:
        held_out = held_out[0][:60], held_out[1][:60], held_out[2][:60]
    usual = np.bincount(train[2]).argmax()
    print(f"\n2. Of {len(held_out[2])} docstrings never seen with a label, so many are right, in %")
    print(f"   {packages[usual]!r} for all: {np.mean(held_out[2] == usual):.1%}")
    print("   labels  learning rate   from scratch     fine-tuned      difference")
    best: dict[int, list[float]] = {}
    for count in (40, 80) if small else (250, len(train[2])):
        some: Any = tuple(part[:count] for part in train)
        for lr in (5e-4, 2e-3):
            data = some, held_out, packages
            runs = [100 * run for run in compare(pretrained, data, 5 if small else 150, lr)]
            scratch, tuned = (f"{r.mean():5.1f} ± {r.std(ddof=1):3.1f}" for r in runs)
            gain = runs[1].mean() - runs[0].mean()
            noise = np.sqrt(sum(r.var(ddof=1) for r in runs) / 3)  # of a difference of two means
            told = "" if abs(gain) > 2 * noise else "  (within the noise)"
            print(
                f"   {count:6} {lr:14} {scratch:>14} {tuned:>14} {gain:+12.1f} ± {noise:.1f}{told}"
            )
            before = best.get(count, [0.0, 0.0])
            best[count] = [max(b, float(r.mean())) for b, r in zip(before, runs, strict=True)]
        words = by_counting_words(some, held_out, task.tokenizer.vocab_size, len(packages))
        print(f"   {count:6}   counting words: {words:.1%}")
    assert small or min(map(min, best.values())) > 100 * np.mean(held_out[2] == usual)
    print("\n3. Each side at its better learning rate:")
    for count, (scratch, tuned) in best.items():
        print(f"   {count:6} labels: {scratch:.1f} from scratch, {tuned:.1f} fine-tuned")


if __name__ == "__main__":
    main()
