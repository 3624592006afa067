"""`tinygrad-llm evaluate`: how well a trained model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from tinygrad_llm.cli.arguments import parse
from tinygrad_llm.cli.errors import UsageError, user_input
from tinygrad_llm.cli.output import Json, Quiet, show_json
from tinygrad_llm.train.log import as_json

HELP = """\
Say how well a trained model predicts a text: its loss, perplexity and bits per byte.

The loss is in nats per token and depends on the tokenizer; bits per byte do not.
Without --data it is the run's own text, the part that it was validated with.
Nothing is written, unless --out names a file.

examples:
  tinygrad-llm evaluate --model runs/book
  tinygrad-llm evaluate --model runs/book --data other.txt --stride 16
  tinygrad-llm evaluate --model runs/book/checkpoints/step-000500 --data book.txt --split val
  tinygrad-llm evaluate --model runs/book --data other.txt --out metrics.json --quiet
"""


@dataclass(frozen=True)
class Options:
    """Which model, on which text."""

    model: Annotated[str, arg(metavar="DIR")]
    """A run folder (its best checkpoint is taken), or a checkpoint."""
    data: Annotated[str, arg(metavar="NAME|PATH|URL", help_behavior_hint="")] = ""
    """A text as for pretrain, or - for standard input; the run's own where it is left out."""
    split: Annotated[
        Literal["all", "val"] | None,
        arg(metavar="{all,val}", help_behavior_hint="(default: all with --data, else val)"),
    ] = None
    """all of the text, or val: the part of it that the run is validated with."""
    stride: Annotated[int, arg(help_behavior_hint="(default: the context)")] = 0
    """Tokens from one window to the next: with fewer, each token is told from more before it, which
    takes longer."""
    context: Annotated[int, arg(help_behavior_hint="(default: all the model can)")] = 0
    """How many tokens the model sees at most."""
    batch_size: int = 16
    """Windows at a time: they cost memory, and change nothing."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: the GPU where CuPy sees one."""
    out: Annotated[str, arg(metavar="FILE", help_behavior_hint="")] = ""
    """Also write the result into this new file, as JSON."""
    quiet: Quiet = False
    json: Json = False


def run(arguments: Sequence[str]) -> int:
    """Print the score; with --out, write it."""
    options = parse(Options, arguments, "evaluate", HELP)

    from tinygrad_llm.tasks.evaluate import Reading
    from tinygrad_llm.train import evaluate
    from tinygrad_llm.train.files import write_text
    from tinygrad_llm.train.log import open_log
    from tinygrad_llm.train.progress import LogReport

    out = Path(options.out).expanduser()
    part = options.split or ("all" if options.data else "val")
    with user_input():
        _refuse(out if options.out else None)
        subject = evaluate.load(options.model, options.device)
        reading = Reading(options.context, options.stride, options.batch_size)
        reading = reading.fit(subject.model)
        log = open_log(quiet=options.quiet or options.json)
        with LogReport(log) as report:
            text = evaluate.open_text(subject, options.data, part, report)
        source = options.data or evaluate.own_text(subject, part)
        if not (options.quiet or options.json):
            print(f"model: {subject.folder}, {subject.model.config.num_parameters():,} parameters")
            which = "all of it" if part == "all" else "the validation split"
            print(f"text:  {source}, {which}", flush=True)
        with LogReport(log) as report:
            score = evaluate.evaluate(subject, text, reading, report)
        if not math.isfinite(score.loss):
            raise UsageError(
                f"the loss of {subject.folder} is {score.loss}: its weights hold NaN or infinity"
            )
        found = {
            "model": str(subject.folder),
            "data": source,
            "split": part,
            "loss": score.loss,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "tokens": score.tokens,
            "bytes": score.bytes,
            "context": reading.context,
            "stride": reading.stride,
            "tokens_per_second": score.tokens_per_second,
        }
        if options.out:
            write_text(out, as_json(found) + "\n")
    _show(found, options)
    return 0


def _refuse(out: Path | None) -> None:
    """Better now than after an hour."""
    if out is not None and out.exists():
        raise UsageError(f"{out} is there already: delete it, or name another --out")
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent} to write {out.name} into")


def _show(found: dict[str, Any], options: Options) -> None:
    if options.json:
        show_json(found)
        return
    perplexity = found["perplexity"]
    words = f"{perplexity:,.4g}" if perplexity < math.inf else "inf (more than a float can hold)"
    bits = found["bits_per_byte"]
    size = found["bytes"]
    print(f"loss:          {found['loss']:.4f} nats per token")
    print(f"perplexity:    {words}")
    print(f"bits per byte: {_unknown() if bits is None else f'{bits:.4f}'}")
    print(f"scored:        {found['tokens']:,} tokens{'' if size is None else f', {size:,} bytes'}")
    if not options.quiet:
        print(f"read:          {found['context']} tokens at a time, {found['stride']} apart")
        print(f"speed:         {found['tokens_per_second']:,.0f} tokens/s")
        if options.out:
            print(f"saved:         {options.out}")


def _unknown() -> str:
    return "unknown (this tokenizer's tokens do not spell the text out)"
