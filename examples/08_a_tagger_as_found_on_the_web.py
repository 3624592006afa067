"""Lesson 8: a tagger as found on the web, repaired.

What you will learn:
- three faults of a listing that many have copied: one that stops it, one that it never mentions,
  and one that nobody sees;
- PyTorch's way to train, with our imports: DataLoader, CrossEntropyLoss, Adam, train, evaluate;
- to read its table of F1: O, most of the words and the easiest of them, lifts every average.

The data are built in: functions of Python's own library, the role of each name as its tag.
With the word `full` behind it, one batch trains the listing's own size: 12 layers of 768, in 3 GB.
Letters: B sentences in a batch, T words in a sentence, K tags.
"""

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from tinygrad_llm import Tensor, manual_seed, nn, no_grad, optim
from tinygrad_llm.data import builtin
from tinygrad_llm.data.conll import Sentences
from tinygrad_llm.data.dataset import DataLoader, TensorDataset
from tinygrad_llm.metrics.entities import entity_scores
from tinygrad_llm.metrics.scores import Averages, Score

SMALL, FULL = (64, 64, 1), (768, 768, 12)  # input_size, hidden_size, num_layers
T, EPOCHS, PADDING = 24, 3, -100
Batches = Iterable[list[Tensor]]


class AsFound(nn.Module):
    """The listing's model: a 'BERT' that is an LSTM."""

    def __init__(self, vocab_size: int, num_tags: int, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, size[0])
        self.encoder = nn.LSTM(*size, bidirectional=True)
        self.classifier = nn.Linear(2 * size[1], num_tags)

    def forward(self, x: np.ndarray | Tensor) -> Tensor:
        x = self.encoder(self.embedding(x))  # fault 1: this is a pair, (outputs, last states)
        return self.classifier(x)


class Repaired(AsFound):
    def __init__(self, vocab_size: int, num_tags: int, size: tuple[int, int, int]) -> None:
        super().__init__(vocab_size, num_tags, size)
        self.encoder.batch_first = True  # fault 3: it read across the batch, not along the words

    def forward(self, x: np.ndarray | Tensor) -> Tensor:
        outputs, _ = self.encoder(self.embedding(x))  # (B, T, 2 · hidden_size)
        return self.classifier(outputs)  # (B, T, K)


class Data:
    """Fault 2: the listing trains on data sets that it never defines. Here they are."""

    def __init__(self, train: Sentences) -> None:
        self.words = {w: i for i, w in enumerate(sorted({w for s in train.words for w in s}), 2)}
        self.tags = sorted({tag for tags in train.tags or [] for tag in tags})

    def dataset(self, split: Sentences, most: int) -> TensorDataset:
        """Sentences of up to T words as ids: 0 fills up, 1 is a word that training never showed."""
        pairs = zip(split.words, split.tags or [], strict=True)
        chosen = [pair for pair in pairs if len(pair[0]) <= T][:most]
        x, y = np.zeros((len(chosen), T), np.int64), np.full((len(chosen), T), PADDING)
        for i, (words, tags) in enumerate(chosen):
            x[i, : len(words)] = [self.words.get(word, 1) for word in words]
            y[i, : len(tags)] = [self.tags.index(tag) for tag in tags]
        return TensorDataset(x, y)


def train(model: nn.Module, loader: Batches, criterion: nn.Module, optimizer: optim.Adam) -> float:
    """One epoch; the mean loss of its batches."""
    model.train()
    losses = []
    for inputs, targets in loader:
        optimizer.zero_grad()
        losses.append(criterion(model(inputs), targets))
        losses[-1].backward()
        optimizer.step()
    return float(np.mean([loss.item() for loss in losses]))


def evaluate(model: nn.Module, loader: DataLoader, tags: list[str]) -> list[list[list[str]]]:
    """[the right tags of each sentence, the tags that the model gives]; padding left out."""
    found: list[list[list[str]]] = [[], []]
    model.eval()
    with no_grad():
        for inputs, targets in loader:
            right, guesses = targets.numpy(), model(inputs).argmax(axis=-1).numpy()
            for row, guess in zip(right, guesses, strict=True):
                real = row != PADDING  # a table that counts padding, too, is easy to be proud of
                found[0].append([tags[i] for i in row[real]])
                found[1].append([tags[i] for i in guess[real]])
    return found


def table(gold: list[list[str]], guessed: list[list[str]]) -> dict[str, float]:
    """Print F1 for each tag, then the averages; return these by name."""
    truth, guess = (np.array([tag for tags in rows for tag in tags]) for rows in (gold, guessed))
    right = {tag: int(((truth == tag) & (guess == tag)).sum()) for tag in sorted(set(truth))}
    rows = {tag: Score.of(n, sum(guess == tag), sum(truth == tag)) for tag, n in right.items()}
    print("                precision  recall    F1  support")
    for tag, row in rows.items():
        print(f"   {tag:13} {row.precision:8.2f} {row.recall:7.2f} {row.f1:5.2f} {row.support:8}")
    found = {}
    for name, kept in (("with O", rows), ("without O", rows.keys() - {"O"})):
        averages = Averages.of({tag: rows[tag] for tag in kept}, sum(right[tag] for tag in kept))
        found[f"micro, {name}"], found[f"macro, {name}"] = averages.micro.f1, averages.macro.f1
    found["whole entities"] = entity_scores(gold, guessed).averages.micro.f1
    found["micro, with O, of a model that says O to all"] = float(np.mean(truth == "O"))
    for name, f1 in found.items():
        print(f"   {f1:4.2f}  {name}")
    return found


def main() -> None:
    manual_seed(0)
    splits: Any = builtin.load("tag")
    full = sys.argv[1:] == ["full"]
    data = Data(splits.train)
    sizes = 2 + len(data.words), len(data.tags)
    train_loader = DataLoader(data.dataset(splits.train, 1500), batch_size=16, shuffle=True)
    valid_loader = DataLoader(data.dataset(splits.validation, 400), batch_size=64)
    some = next(iter(train_loader))[0][:2]
    try:
        AsFound(*sizes, SMALL)(some)
    except (TypeError, ValueError) as error:
        print(f"1. As found, it stops: {str(error).partition(':')[0]}")
    model = Repaired(*sizes, FULL if full else SMALL)
    print(f"   Repaired, {some.shape} words give scores {model(some).shape}")
    criterion = nn.CrossEntropyLoss(ignore_index=PADDING)
    optimizer = optim.Adam(model.parameters(), lr=1e-3 if full else 1e-2)
    print(f"\n2. {sum(p.size for p in model.parameters()):,} parameters")
    for epoch in range(1 if full else EPOCHS):
        batches = [next(iter(train_loader))] if full else train_loader
        print(f"   epoch {epoch + 1}: loss {train(model, batches, criterion, optimizer):.3f}")
    if full:
        return

    print("\n3. Words of functions that it has never seen:")
    found = table(*evaluate(model, valid_loader, data.tags))
    assert found["micro, with O"] > found["micro, without O"] > 0.5
    assert found["micro, with O"] > found["micro, with O, of a model that says O to all"] + 0.2


if __name__ == "__main__":
    main()
