"""`tinygrad-llm finetune`: from labelled texts to a model that labels."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, cast

from tyro.conf import arg

from tinygrad_llm.cli.arguments import parse, program
from tinygrad_llm.cli.errors import UsageError, user_input
from tinygrad_llm.cli.output import Json, Quiet, show_json
from tinygrad_llm.finetune import config as finetune_config
from tinygrad_llm.finetune.config import PRESETS, TASKS, FinetuneConfig, TaskName
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train.log import open_log, printable
from tinygrad_llm.train.run import Run

if TYPE_CHECKING:
    from tinygrad_llm.finetune.run import Finetuning

HELP = """\
Fine-tune a model on data of one's own, or on built-in data, and score it:

  classify   a label for a text             pair       a label for two texts
  tag        a label for each word          qa         the passage that answers a question
  translate  another text for a text        lm         the next token of texts
  multi      several of the first four, by one encoder with a head for each

The data is built in or a file: CSV, TSV or JSONL; for tag CoNLL columns or JSONL, for qa also
SQuAD's JSON; for lm whatever `pretrain` learns from, or a column of CSV or TSV, a document a row.
For multi it is a TOML file with a section for each task. Its keys are the flags about its data,
with paths relative to the file, and weight, batch_size, max_length, long, metric, class_weights:

  [reviews]                   [names]
  task = "classify"           task = "tag"
  data = "reviews.csv"        data = "train.conll"
  label_column = "stars"      weight = 0.5

--model is a folder with a BERT, for lm with a GPT, a Llama or an LSTM, for translate with a T5 (or
a run, or a name on the Hugging Face hub); without it a small model begins at random. A run leaves
a folder with its configuration, loss curve, the best checkpoint, and its scores in metrics.json,
metrics.txt and metrics.png, beside those of what is had for nothing. `tinygrad-llm predict --model
RUN` labels new texts.
What counts, in this order: the preset, over it the --config file, over it the flags.

examples:
  tinygrad-llm finetune classify --data builtin
  tinygrad-llm finetune pair --data builtin
  tinygrad-llm finetune tag --data builtin
  tinygrad-llm finetune qa --data builtin
  tinygrad-llm finetune translate --data builtin
  tinygrad-llm finetune lm --data builtin --model runs/book
  tinygrad-llm finetune multi --data builtin

  tinygrad-llm finetune classify --data reviews.csv --text-column review --label-column stars
  tinygrad-llm finetune classify --data train.tsv --val-data dev.tsv --no-header --model my-bert
  tinygrad-llm finetune classify --data reviews.csv --text-column review --label-column stars \
--long windows --freeze embeddings 'layer.[0-2]' --model my-bert
  tinygrad-llm finetune pair --data pairs.csv --model my-bert --epochs 4 --class-weights balanced
  tinygrad-llm finetune tag --data train.conll --val-data dev.conll --preset ner-bilstm
  tinygrad-llm finetune tag --data train.conll --val-data dev.conll --preset ner --model my-bert
  tinygrad-llm finetune qa --data train-v2.0.json --val-data dev-v2.0.json --model my-bert
  tinygrad-llm finetune translate --data eng-fra.txt --epochs 40
  tinygrad-llm finetune translate --data eng-fra.txt --model my-t5 \
--prefix 'translate English to French: '
  tinygrad-llm finetune lm --data 'notes/*.md' --model runs/book --max-length 32 --freeze wte wpe
  tinygrad-llm finetune lm --data posts.csv --text-column body --model runs/book --epochs 5
  tinygrad-llm finetune multi --data tasks.toml --model my-bert
  tinygrad-llm finetune --resume runs/reviews --epochs 4
"""


@dataclass(frozen=True)
class Options:
    """Which run; what is in it stands in FinetuneConfig."""

    preset: Annotated[str, arg(metavar="{" + ",".join(PRESETS) + "}")] = "default"
    """Where the configuration starts from."""
    config: Annotated[str, arg(metavar="FILE", help_behavior_hint="")] = ""
    """A TOML file with sections [data], [model], [train], such as a run's config.toml."""
    resume: Annotated[str, arg(metavar="RUN", help_behavior_hint="")] = ""
    """Go on with this run folder, bit for bit as if it had never stopped."""
    run: Annotated[str, arg(metavar="DIR", help_behavior_hint="")] = ""
    """The new run folder; otherwise runs/ and the time."""
    quiet: Quiet = False
    json: Json = False
    settings: Annotated[FinetuneConfig, arg(name="")] = field(default_factory=FinetuneConfig)


def run(arguments: Sequence[str]) -> int:
    """Train and score; 0 when done, 1 when the loss is no longer a number, 128 + n after signal n.

    Raises UsageError for bad input, and where the run folder can no longer be written, there is not
    enough memory, or a process that shares the work dies.
    """
    with user_input():
        options = read_options(arguments)

    from tinygrad_llm.finetune import run as finetune
    from tinygrad_llm.train.trainer import Diverged, Interrupted

    log = open_log(quiet=options.quiet, json=options.json)
    with user_input():
        if options.resume:
            ready = finetune.resume(Run.open(options.resume), options.settings, log)
        else:
            ready = finetune.start(options.settings, options.run or None, log)
    log.say(f"run folder: {ready.run.folder}")
    try:
        _fit(ready, options)
        _show(ready, options)
    except Interrupted as stop:
        return 128 + stop.number
    except Diverged as error:
        print(f"tinygrad-llm: {error}", file=sys.stderr)
        return 1
    except ImportError as error:  # scikit-learn or sacrebleu, which only scores need
        raise UsageError(str(error)) from error
    return 0


def read_options(arguments: Sequence[str]) -> Options:
    """preset < TOML file < flags; with --resume, the run's own configuration < flags."""
    task, arguments = _task_of(arguments)
    arguments = with_answers(arguments)
    first = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for flag in ("--preset", "--config", "--resume", "--run"):
        first.add_argument(flag, default="", nargs="?", const="")
    seen, _ = first.parse_known_args(arguments)
    if seen.resume:
        for flag in ("preset", "config", "run"):
            if getattr(seen, flag):
                raise UsageError(f"--resume takes the run as it is: leave out --{flag}")
        settings = finetune_config.load(Run.open(seen.resume).config_file)
        if task not in ("", settings.task):
            raise UsageError(f"{seen.resume} is a run of {settings.task}, not of {task}")
    else:
        task = task or finetune_config.TASKS[0]
        settings = finetune_config.preset(seen.preset or Options.preset, cast(TaskName, task))
        if seen.config:
            settings = replace(finetune_config.load(seen.config, settings), task=task)
    words = f"finetune {task}".strip()
    return parse(Options, arguments, words, HELP, Options(settings=settings))


def _task_of(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The word that says what is learnt, and the flags after it; '' with --resume and --help."""
    if arguments and arguments[0] in TASKS:
        return arguments[0], arguments[1:]
    asked = [word.partition("=")[0] for word in arguments]
    if arguments and arguments[0].startswith("-") and {"--resume", "-h", "--help"} & {*asked}:
        return "", arguments
    got = repr(arguments[0]) if arguments else "nothing"
    hint = configuration.nearest(arguments[0], TASKS) if arguments else ""
    raise UsageError(f"finetune what? Expected {', '.join(TASKS)}, got {got}{hint}")


def with_answers(arguments: Sequence[str]) -> list[str]:
    """--header alone is --header yes, --no-header is --header no; so with --quoted."""
    found: list[str] = []
    for i, word in enumerate(arguments):
        if word in ("--no-header", "--no-quoted"):
            found += [word.replace("--no-", "--"), "no"]
            continue
        found.append(word)
        after = arguments[i + 1] if i + 1 < len(arguments) else "--"
        if word in ("--header", "--quoted") and after not in ("auto", "yes", "no"):
            found.append("yes")
    return found


# --- one run --------------------------------------------------------------------------------------


def _fit(ready: Finetuning, options: Options) -> None:
    """Train; where a signal ends it, print the command that goes on."""
    from tinygrad_llm.train.graph import GraphError
    from tinygrad_llm.train.parallel import Lost
    from tinygrad_llm.train.trainer import Interrupted, NotSaved, OutOfMemory

    try:
        ready.trainer.fit()
    except Interrupted as stop:
        way_on = f"{program()} finetune --resume {shlex.quote(str(ready.run.folder))}"
        if options.json:
            show_json({"stopped": str(stop), "resume": way_on})
        else:
            print(f"\n{stop}. Go on with:\n  {way_on}")
        raise
    except (NotSaved, OutOfMemory, Lost, GraphError) as error:
        raise UsageError(str(error)) from error


def _show(ready: Finetuning, options: Options) -> None:
    """The scores of the best checkpoint, and where everything is."""
    report, why_not = ready.report()
    best, folder = ready.trainer.best, ready.run.folder
    if options.json:
        show_json(_summary(ready, report))
        return
    if options.quiet:
        score = ready.trainer.score
        found = "" if best is None else f": {score.removeprefix('val_')} {best[score]:.4f}"
        print(f"{folder}{found} after {ready.trainer.step} steps")
        return
    end = ready.trainer.end
    if end and end.flag != "--steps":
        print(f"\nstopped: the run has {end.reason}")
    if best is not None:
        print(f"\nthe best checkpoint, of step {best['step']}, on the validation data:")
    print(f"\n{printable(report.text())}")
    if why_not:
        print(why_not, file=sys.stderr)
    print(f"\nrun folder: {folder}")
    print(f"scores:     {folder / 'metrics.json'}")
    quoted = shlex.quote(str(folder))
    if ready.config.task == "lm":
        print(f'generate:   {program()} generate --model {quoted} --prompt "…"')
        print(f"evaluate:   {program()} evaluate --model {quoted} --data FILE")
    else:
        which = " --task NAME" if ready.config.task == "multi" else ""
        print(f"predict:    {program()} predict --model {quoted}{which} --data FILE")
    more = f"--epochs {2 * ready.config.train.epochs}"
    print(f"resume:     {program()} finetune --resume {quoted} {more}")


def _summary(ready: Finetuning, report: Any) -> dict[str, Any]:
    end = ready.trainer.end
    return {
        "run": str(ready.run.folder),
        "end": end.reason if end else None,
        "step": ready.trainer.step,
        "best": ready.trainer.best,
        **report.as_dict(),
    }
