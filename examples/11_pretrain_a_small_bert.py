"""Lesson 11: pretrain a small BERT, and ask what it has learned.

What you will learn:
- the two guesses from which a BERT learns without labels: hidden words, and what follows what;
- to hold its numbers against those of who knows nothing: the unigram model, the commoner answer;
- three ways to look inside: fill in a blank, the nearest neighbours, a linear probe of the frozen
  states; each beside the same network with random weights, which is no empty vessel.

The text comes with Python: its language reference and docstrings. A minute is a millionth of what
BERT was given, and shows. With the word `small` behind it, the lesson trains for seconds only.
"""

import sys
from typing import Any

import numpy as np

from tinygrad_llm import Tensor, manual_seed, nn, no_grad, ops, optim
from tinygrad_llm.data import builtin, corpora
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.bert import BertConfig, BertForPreTraining
from tinygrad_llm.optim.schedules import Cosine, Warmup
from tinygrad_llm.tasks.masked import MaskedTask

CONTEXT = 32
BLANKS = (
    "Return [MASK] if the object is a file.",
    "Raise [MASK] if the name is not found.",
    "This method must be [MASK] by subclasses.",
)


def make_task(documents: int) -> MaskedTask:
    """Pairs of texts with hidden words, from the first of the documents."""
    texts = corpora.load("python-docs").documents[:documents]
    tokenizer = Tokenizer.wordpiece(texts, 1500)
    return MaskedTask(
        corpora.Corpus("docs", texts), tokenizer, context=CONTEXT, batch_size=32, eval_batches=20
    )


def make_config(tokenizer: Tokenizer) -> BertConfig:
    sizes: Any = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    # Dropout is for what is seen again and again. In a minute nothing is.
    rates: Any = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes |= {"intermediate_size": 256, "max_position_embeddings": CONTEXT}
    return BertConfig(tokenizer.vocab_size, initializer_range=0.05, **sizes, **rates)


def pretrain(task: MaskedTask, steps: int) -> BertForPreTraining:
    manual_seed(0)
    model = BertForPreTraining(make_config(task.tokenizer))
    optimizer = optim.AdamW(optim.decay_groups(model, 0.01), lr=3e-3)
    schedule = Warmup(steps // 10, Cosine(steps - steps // 10, end=0.1))
    scheduler = optim.LRScheduler(optimizer, schedule)
    print("   step   loss of hidden words   guessed   loss of pairs   told")
    for step in range(1, steps + 1):
        model.train()
        loss = task.loss(model, task.next_batch())
        optimizer.zero_grad()
        loss.backward()
        optim.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % (steps // 4) == 0:
            report(str(step), *list(task.evaluate(model).values())[1:5])
    unigram, usual, majority = task.baselines.values()
    report("none", unigram, usual, float(np.log(2)), majority)
    model.eval()
    return model


def report(step: str, nats: float, guessed: float, pair_nats: float, told: float) -> None:
    print(f"   {step:>4} {nats:15.3f} {guessed:15.1%} {pair_nats:12.3f} {told:10.1%}")


def encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """[CLS] text [SEP] as ids, and which are real: (N, CONTEXT) each; what is longer is cut."""
    marks: Any = [tokenizer.token_to_id(mark) for mark in ("[CLS]", "[SEP]")]
    ids = np.zeros((len(texts), CONTEXT), np.int64)
    for row, text in zip(ids, texts, strict=True):
        pieces = tokenizer.encode(text, allow_unknown=True)[: CONTEXT - 2]
        row[: len(pieces) + 2] = [marks[0], *pieces, marks[1]]
    return ids, ids != 0  # 0 is [PAD]


def fill_in(model: BertForPreTraining, tokenizer: Tokenizer, text: str) -> list[str]:
    """The five words that the model would put where [MASK] stands."""
    ids, real = encode(tokenizer, [text])
    with no_grad():
        logits = model(ids, real, positions=ids == tokenizer.token_to_id("[MASK]"))[0]
    return [tokenizer.id_to_token(int(i)) or "" for i in np.argsort(-logits.numpy()[0])[:5]]


def embed(model: BertForPreTraining, ids: np.ndarray, real: np.ndarray) -> np.ndarray:
    """The mean of each text's states, of length 1: (N, C)"""
    with no_grad():
        return model.bert.sentence_embedding(ids, real).numpy()


def probe(x: np.ndarray, labels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """What a linear layer on states x, and nothing else, learns to say of the other states."""
    x, others = ((a - x.mean(axis=0)) / x.std(axis=0) for a in (x, others))
    manual_seed(0)
    layer = nn.Linear(x.shape[1], int(labels.max()) + 1)
    optimizer = optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        ops.cross_entropy(layer(Tensor(x)), labels).backward()
        optimizer.step()
    return layer(Tensor(others)).numpy().argmax(axis=1)


def main() -> None:
    small = sys.argv[1:] == ["small"]
    task = make_task(1000 if small else 10_000)
    print(f"1. {len(task.train_pairs.sentences):,} sentences; none: who reads nothing")
    model = pretrain(task, 40 if small else 1200)
    manual_seed(1)
    untrained = BertForPreTraining(model.config).eval()
    found = task.evaluate(model)
    assert small or found["val_masked_accuracy"] > 1.5 * found["val_majority_masked"]
    assert small or found["val_masked_loss"] < found["val_unigram_loss"] - 0.2

    print("\n2. Fill in the blank:")
    for text in BLANKS:
        print(f"   {text:44} {' '.join(fill_in(model, task.tokenizer, text))}")

    data: Any = builtin.load("classify")  # docstrings, by package
    packages = sorted({row[1] for row in data.train.rows})
    texts, labels, states = [], [], []
    for split in (data.train, data.validation):
        texts.append([row[0] for row in split.rows])
        labels.append(np.array([packages.index(row[1]) for row in split.rows]))
        states.append(encode(task.tokenizer, texts[-1]))
    usual = np.mean(labels[1] == np.bincount(labels[0]).argmax())
    print(f"\n3. A docstring's package, of {len(packages)}; the usual one is right for {usual:.1%}")
    # Training need not help both: it moves what a linear layer finds, and the angle between states.
    for name, network in (("pretrained", model), ("random", untrained)):
        x, others = (embed(network, *state) for state in states)
        near = (others @ x.T).argmax(axis=1)
        same = np.mean(labels[0][near] == labels[1])
        right = np.mean(probe(x, labels[0], others) == labels[1])
        print(f"   {name:10}  by the nearest neighbour {same:5.1%}, by a linear probe {right:5.1%}")
        for i in (0, 1) if network is model else ():
            print(f"      {texts[1][i][:42]!r} is near {texts[0][near[i]][:42]!r}")


if __name__ == "__main__":
    main()
