"""A fine-tuning run and its page: what was asked, how long it took, what came out.

    python benchmarks/finetune.py --save sst2 --run runs/sst2 -- classify --data sst2/train.tsv …

What stands behind `--` is given to `tinygrad-llm finetune`. `--save NAME` writes
benchmarks/results/finetune_NAME.md: the command, the machine, a row for each validation, and the
report of the best of them. With a `--run` that is already over only its page is written.

The data of our own pages, and the goals: see the pages. Scores depend on command, seed and number
of processes, not on the machine; seconds do.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from machine import environment

from tinygrad_llm.cli import main as tinygrad_llm
from tinygrad_llm.finetune.config import load

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    args = arguments()
    run = Path(args.run)
    command = ["tinygrad-llm", "finetune", *args.finetune]
    if not (run / "metrics.txt").is_file():
        code = tinygrad_llm(["finetune", *args.finetune, "--run", args.run])
        if code:
            return code
    path = RESULTS / f"finetune_{args.save}.md"
    path.write_text(page(command, run, args.note), encoding="utf-8")
    print(f"\nwritten to {path}")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--save", required=True, metavar="NAME", help="write finetune_NAME.md")
    parser.add_argument("--run", required=True, metavar="DIR", help="the run folder")
    parser.add_argument("--note", default="", help="a sentence for the page")
    parser.add_argument("finetune", nargs="+", help="behind --: as for tinygrad-llm finetune")
    return parser.parse_args()


def page(command: list[str], run: Path, note: str) -> str:
    """The result as Markdown."""
    rows = [row for row in records(run) if "val_loss" in row]
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    config = load(run / "config.toml")
    machine = ", ".join(f"{key} {value}" for key, value in environment().items())
    settings = {name: vars(getattr(config, name)) for name in ("model", "train")}
    text = "\n".join(
        [
            f"# {' '.join(command[:3])}: {metrics['name']}",
            "",
            f"`{shlex.join(command)}`",
            "",
            f"{rows[-1]['elapsed']:.0f} s of training and validation; {machine}.",
            *([note] if note else []),
            "The best checkpoint is chosen on the very data that it is scored on. One seed.",
            "",
            *table(rows),
            "",
            "```",
            (run / "metrics.txt").read_text(encoding="utf-8").rstrip(),
            "```",
            "",
            f"All settings: `{json.dumps(settings)}`",
            "",
        ]
    )
    for path in (config.data.source, config.data.val_source, config.model.checkpoint):
        if Path(path).is_absolute():  # the folders above are this machine's alone
            text = text.replace(path, "/".join(Path(path).parts[-2:]))
    return text


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A row for each validation."""
    names = ["step", *(key for key in rows[0] if key.startswith("val_")), "elapsed"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        whole = ("step", "elapsed")
        cells = (f"{row[n]:.0f}" if n in whole else f"{row[n]:.4f}" for n in names)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
