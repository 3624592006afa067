"""`tinygrad-llm pretrain gpt`: from text to a model that writes."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from tinygrad_llm.cli.arguments import parse, program
from tinygrad_llm.cli.errors import UsageError, user_input
from tinygrad_llm.cli.output import show_text
from tinygrad_llm.data import END_OF_TEXT
from tinygrad_llm.train import checkpoint
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train.config import PRESETS, PretrainConfig
from tinygrad_llm.train.run import Run

if TYPE_CHECKING:
    from tinygrad_llm.train.pretrain import Pretraining

HELP = """\
Train a GPT on text, from nothing to a model that writes.

A run leaves a folder with its configuration, metrics, loss curve and checkpoints.
Ctrl-C saves and prints the command that goes on. What counts, in this order:
the preset, over it the --config file, over it the flags.

examples:
  tinygrad-llm pretrain gpt --preset demo
  tinygrad-llm pretrain gpt --data book.txt --tokenizer char --steps 2000 --run runs/book
  tinygrad-llm pretrain gpt --resume runs/book
  tinygrad-llm pretrain gpt --data book.txt --max-seconds 600 --patience 5 --keep-last 2
  tinygrad-llm pretrain gpt --preset tiny --overfit-one-batch --steps 200
"""


@dataclass(frozen=True)
class Options:
    """Which run; what is in it stands in PretrainConfig."""

    preset: Annotated[str, arg(metavar="{" + ",".join(PRESETS) + "}")] = "demo"
    """Where the configuration starts from."""
    config: Annotated[str, arg(metavar="FILE", help_behavior_hint="")] = ""
    """A TOML file with sections [data], [model], [train], [sample], such as a run's config.toml."""
    resume: Annotated[str, arg(metavar="RUN", help_behavior_hint="")] = ""
    """Go on with this run folder, bit for bit as if it had never stopped."""
    run: Annotated[str, arg(metavar="DIR", help_behavior_hint="")] = ""
    """The new run folder; otherwise runs/ and the time."""
    settings: Annotated[PretrainConfig, arg(name="")] = field(default_factory=PretrainConfig)


def run(arguments: Sequence[str]) -> int:
    """Train; 0 when done, 1 when the loss is no longer a number, 128 + n after signal n.

    Raises UsageError for bad input, and where the run folder can no longer be written.
    """
    with user_input():
        options = read_options(_after_architecture(arguments))

    from tinygrad_llm.train import pretrain
    from tinygrad_llm.train.log import open_log
    from tinygrad_llm.train.trainer import Diverged, Interrupted, NotSaved

    log = open_log()
    with user_input():
        if options.resume:
            ready = pretrain.resume(Run.open(options.resume), options.settings, log)
        else:
            ready = pretrain.start(options.settings, options.run or None, log)
    log.say(f"run folder: {ready.run.folder}")
    try:
        ready.trainer.fit()
    except Interrupted as stop:
        print(f"\n{stop}. Go on with:\n  {_resume_command(ready)}")
        return 128 + stop.number
    except Diverged as error:
        print(f"tinygrad-llm: {error}", file=sys.stderr)
        return 1
    except NotSaved as error:
        raise UsageError(str(error)) from error
    _print_sample(ready)
    _print_farewell(ready)
    return 0


def _after_architecture(arguments: Sequence[str]) -> Sequence[str]:
    """The flags after the word that says what is trained; so far it is gpt."""
    known = ("gpt",)
    if not arguments or arguments[0] not in (*known, "-h", "--help"):
        got = repr(arguments[0]) if arguments else "nothing"
        raise UsageError(f"pretrain what? Expected {' or '.join(known)}, got {got}")
    return arguments[1:] if arguments[0] in known else arguments


def read_options(arguments: Sequence[str]) -> Options:
    """preset < TOML file < flags; with --resume, the run's own configuration < flags."""
    first = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for flag in ("--preset", "--config", "--resume", "--run"):
        first.add_argument(flag, default="", nargs="?", const="")
    seen, _ = first.parse_known_args(arguments)
    if seen.resume:
        for flag in ("preset", "config", "run"):
            if getattr(seen, flag):
                raise UsageError(f"--resume takes the run as it is: leave out --{flag}")
        settings = configuration.load(Run.open(seen.resume).config_file)
    else:
        settings = configuration.preset(seen.preset or Options.preset)
        if seen.config:
            settings = configuration.load(seen.config, settings)
    default = Options(settings=settings)
    return parse(Options, arguments, "pretrain gpt", HELP, default)


def _print_sample(ready: Pretraining) -> None:
    sample = ready.config.sample
    if not sample.max_new_tokens:
        return
    print(f"\nsample (temperature {sample.temperature}, seed {ready.config.train.seed}):\n")
    show_text([sample.prompt])
    show_text(piece.replace(END_OF_TEXT, "\n\n") for piece in ready.sample())
    print()


def _print_farewell(ready: Pretraining) -> None:
    run, end = ready.run, ready.trainer.end
    if end and end.flag != "--steps":
        print(f"\nstopped: the run has {end.reason}")
    print(f"\nrun folder: {run.folder}")
    if run.picture_file.exists():
        print(f"loss curve: {run.picture_file}")
    if end:
        print(f"resume:     {_resume_command(ready)} {end.flag} {2 * end.limit}")
    print(f"sample:     {_sample_command(run.folder)}")
    if ready.trainer.average is not None:
        best = run.checkpoints_folder / "best" / checkpoint.AVERAGE
        print(f"averaged:   {_sample_command(best)}")


def _sample_command(folder: Path) -> str:
    return f"{program()} generate --model {shlex.quote(str(folder))}"


def _resume_command(ready: Pretraining) -> str:
    return f"{program()} pretrain gpt --resume {shlex.quote(str(ready.run.folder))}"
