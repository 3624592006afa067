"""`tinygrad-llm pretrain gpt`, llama, bert, lstm, t5: from text to a model that knows it."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from tyro.conf import Fixed, Suppress, arg

from tinygrad_llm.cli.arguments import parse, program
from tinygrad_llm.cli.errors import UsageError, user_input
from tinygrad_llm.cli.output import Json, Quiet, show_json, show_text
from tinygrad_llm.data import END_OF_TEXT
from tinygrad_llm.train import checkpoint
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train.config import (
    ARCHITECTURES,
    PRESETS,
    PRESETS_OF,
    Architecture,
    PretrainConfig,
)
from tinygrad_llm.train.log import Log, open_log
from tinygrad_llm.train.run import Run, accuracies, speed, speed_key

if TYPE_CHECKING:
    from tinygrad_llm.train.pretrain import Pretraining
    from tinygrad_llm.train.seeds import SeedRuns, Spread

HELP = """\
Train a GPT on text, from nothing to a model that writes.

A run leaves a folder with its configuration, metrics, loss curve and checkpoints.
Ctrl-C saves and prints the command that goes on. What counts, in this order:
the preset, over it the --config file, over it the flags.

examples:
  tinygrad-llm pretrain gpt --preset demo
  tinygrad-llm pretrain gpt --preset shakespeare-char --data input.txt
  tinygrad-llm pretrain gpt --data book.txt --tokenizer char --steps 2000 --run runs/book
  tinygrad-llm pretrain gpt --resume runs/book --steps 4000
  tinygrad-llm pretrain gpt --data book.txt --max-seconds 600 --patience 5 --keep-last 2
  tinygrad-llm pretrain gpt --preset tiny --overfit-one-batch --steps 200
  tinygrad-llm pretrain gpt --preset tiny --seeds 3 --run runs/three
  tinygrad-llm pretrain gpt --data book.txt --sample-every 200 --lr-groups wte=0.1 'h.[01]=0.5'
  tinygrad-llm pretrain gpt --data book.txt --context 1024 --gradient-checkpointing

Others: pretrain llama, bert, lstm, t5, each with its own --help.
"""

_WRITER = """\
A run leaves a folder with its configuration, metrics, loss curve and checkpoints.
Ctrl-C saves and prints the command that goes on. What counts, in this order:
the preset, over it the --config file, over it the flags.
"""

HELPS: dict[Architecture, str] = {
    "gpt": HELP,
    "llama": f"""\
Train a Llama on text: a GPT with rotary positions, RMSNorm and a gated MLP.

{_WRITER}
examples:
  tinygrad-llm pretrain llama --preset demo
  tinygrad-llm pretrain llama --data book.txt --tokenizer char --steps 2000 --run runs/llama
  tinygrad-llm pretrain llama --resume runs/llama --steps 4000
""",
    "bert": f"""\
Train a BERT on text: it guesses hidden words, and whether one text follows another.

How many it guesses is told beside what needs no skill: the most frequent word, the
commoner answer. It writes nothing: it is the start of a fine-tuning.

{_WRITER}
examples:
  tinygrad-llm pretrain bert --preset demo
  tinygrad-llm pretrain bert --data book.txt --whole-words --run runs/bert
  tinygrad-llm pretrain bert --resume runs/bert --steps 4000
""",
    "lstm": f"""\
Train an LSTM on text: what a text said so far is in a state of fixed size.

{_WRITER}
examples:
  tinygrad-llm pretrain lstm --preset demo
  tinygrad-llm pretrain lstm --data book.txt --tokenizer char --steps 2000 --run runs/lstm
  tinygrad-llm pretrain lstm --resume runs/lstm --steps 4000
""",
    "t5": f"""\
Train a T5 on text: an encoder–decoder that fills in the spans which are hidden.

{_WRITER}
examples:
  tinygrad-llm pretrain t5 --preset demo
  tinygrad-llm pretrain t5 --data book.txt --noise-density 0.3 --run runs/t5
  tinygrad-llm pretrain t5 --resume runs/t5 --steps 4000
""",
}


@dataclass(frozen=True)
class Options:
    """Which run; what is in it stands in PretrainConfig."""

    preset: Annotated[str, arg(metavar="{" + ",".join(PRESETS) + "}")] = "demo"
    """Where the configuration starts from."""
    config: Annotated[str, arg(metavar="FILE", help_behavior_hint="")] = ""
    """A TOML file with sections [data], [model], [train] …, such as a run's config.toml."""
    resume: Annotated[str, arg(metavar="RUN", help_behavior_hint="")] = ""
    """Go on with this run folder, bit for bit as if it had never stopped."""
    run: Annotated[str, arg(metavar="DIR", help_behavior_hint="")] = ""
    """The new run folder; otherwise runs/ and the time."""
    seeds: Annotated[int, arg(metavar="N", help_behavior_hint="")] = 0
    """N runs, one after the other, with the seeds from --seed on: DIR/seed-1, DIR/seed-2 …, and
    the mean and spread of their losses. --resume DIR goes on with all."""
    quiet: Quiet = False
    json: Json = False
    settings: Annotated[PretrainConfig, arg(name="")] = field(default_factory=PretrainConfig)

    def log(self) -> Log:
        """Where the training tells how it goes."""
        return open_log(quiet=self.quiet, json=self.json)


# --- the flags of each architecture ---------------------------------------------------------------


def settings_for(architecture: Architecture) -> type[PretrainConfig]:
    """`PretrainConfig` with flags for what the architecture has a use for, and for no more."""
    sections = []
    for section in dataclasses.fields(PretrainConfig):
        whole: Any = type(getattr(PretrainConfig(), section.name))
        hints = get_type_hints(whole, include_extras=True)
        hidden = [
            (f.name, Suppress[Fixed[hints[f.name]]], _with_default(f))
            for f in dataclasses.fields(whole)
            if not _has_flag(architecture, section.name, f.name)
        ]
        kind = dataclasses.make_dataclass(whole.__name__, hidden, bases=(whole,), frozen=True)
        sections.append((section.name, kind, field(default_factory=kind)))
    bases = (PretrainConfig,)
    return dataclasses.make_dataclass("PretrainConfig", sections, bases=bases, frozen=True)


def _with_default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is dataclasses.MISSING:
        return field(default=f.default)
    return field(default_factory=f.default_factory)


def _has_flag(architecture: Architecture, section: str, key: str) -> bool:
    return key != "architecture" and configuration.applies(architecture, f"{section}.{key}")


def options_for(architecture: Architecture) -> type[Options]:
    """`Options` with the presets and the flags of the architecture."""
    presets = "{" + ",".join(PRESETS_OF[architecture]) + "}"
    words = Annotated[str, arg(metavar=presets, help="Where the configuration starts from.")]
    settings = Annotated[SETTINGS[architecture], arg(name="")]
    return dataclasses.make_dataclass(
        "Options",
        [
            ("preset", words, "demo"),
            ("settings", settings, field(default_factory=SETTINGS[architecture])),
        ],
        bases=(Options,),
        frozen=True,
    )


SETTINGS = {architecture: settings_for(architecture) for architecture in ARCHITECTURES}
OPTIONS = {architecture: options_for(architecture) for architecture in ARCHITECTURES}


def run(arguments: Sequence[str]) -> int:
    """Train; 0 when done, 1 when the loss is no longer a number, 128 + n after signal n.

    Raises UsageError for bad input, and where the run folder can no longer be written, there is not
    enough memory, or a process that shares the work dies.
    """
    with user_input():
        architecture, rest = _architecture(arguments)
        options = read_options(rest, architecture)

    from tinygrad_llm.train.seeds import is_seeds
    from tinygrad_llm.train.trainer import Interrupted

    several = options.seeds or (options.resume and is_seeds(options.resume))
    try:
        return _train_seeds(options) if several else _train_one(options)
    except Interrupted as stop:
        return 128 + stop.number


def _architecture(arguments: Sequence[str]) -> tuple[Architecture, Sequence[str]]:
    """What is trained, and the flags after the word that says it."""
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        return "gpt", arguments
    for known in ARCHITECTURES:
        if first == known:
            return known, arguments[1:]
    got = repr(first) if arguments else "nothing"
    *others, last = ARCHITECTURES
    raise UsageError(f"pretrain what? Expected {', '.join(others)} or {last}, got {got}")


def read_options(arguments: Sequence[str], architecture: Architecture = "gpt") -> Options:
    """preset < TOML file < flags; with --resume, the run's own configuration < flags."""
    first = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for flag in ("--preset", "--config", "--resume", "--run", "--seeds"):
        first.add_argument(flag, default="", nargs="?", const="")
    seen, _ = first.parse_known_args(arguments)
    if seen.resume:
        for flag in ("preset", "config", "run", "seeds"):
            if getattr(seen, flag):
                raise UsageError(f"--resume takes the run as it is: leave out --{flag}")
        settings = _settings_of(seen.resume)
    else:
        settings = configuration.preset(seen.preset or Options.preset, architecture)
        if seen.config:
            settings = configuration.load(seen.config, settings)
    if (there := settings.model.architecture) != architecture:
        raise UsageError(
            f"{seen.resume or seen.config} is of the architecture {there}: say pretrain {there}"
        )
    _refuse_flags(arguments, architecture)
    options = _parse(arguments, architecture, settings)
    if not options.settings.data.source:
        raise UsageError(
            f"name a text with --data: the preset {options.preset} has none of its own, for it "
            "wants more than comes with Python"
        )
    return options


def _refuse_flags(arguments: Sequence[str], architecture: Architecture) -> None:
    """UsageError for a flag that only others have: the sentence says which."""
    given = {word.partition("=")[0].removeprefix("--no-") for word in arguments}
    given = {word.removeprefix("--") for word in given}
    for section in dataclasses.fields(PretrainConfig):
        for f in dataclasses.fields(getattr(PretrainConfig(), section.name)):
            key, flag = f"{section.name}.{f.name}", _flag_of(section.name, f.name)
            if flag in given and not configuration.applies(architecture, key):
                others = [name for name in ARCHITECTURES if configuration.applies(name, key)]
                raise UsageError(
                    f"--{flag} is nothing that pretraining {architecture} has: it is for "
                    f"{', '.join(others)}"
                )


def _flag_of(section: str, key: str) -> str:
    """The flag, without dashes before it: 'n-head'; two of [sample] say so in their names."""
    if section == "sample" and key.startswith("every"):
        key = key.replace("every", "sample", 1) if key != "every" else "sample_every"
    return key.replace("_", "-")


def _parse(
    arguments: Sequence[str], architecture: Architecture, settings: PretrainConfig
) -> Options:
    """The options over `settings`, in the ordinary classes again."""
    fewer = _as(SETTINGS[architecture], settings)
    default = OPTIONS[architecture](settings=fewer)
    options = parse(
        OPTIONS[architecture],
        arguments,
        f"pretrain {architecture}",
        HELPS[architecture],
        default,
    )
    whole: dict[str, Any] = vars(options) | {"settings": _as(PretrainConfig, options.settings)}
    return Options(**whole)


def _as(kind: type[PretrainConfig], settings: PretrainConfig) -> PretrainConfig:
    """The same settings as another class of them, section by section."""
    empty = kind()
    sections = {f.name: type(getattr(empty, f.name)) for f in dataclasses.fields(PretrainConfig)}
    return kind(**{k: section(**vars(getattr(settings, k))) for k, section in sections.items()})


def _settings_of(folder: str) -> PretrainConfig:
    from tinygrad_llm.train import seeds

    if seeds.is_seeds(folder):
        return seeds.load_config(folder)
    return configuration.load(Run.open(folder).config_file)


# --- one run --------------------------------------------------------------------------------------


def _train_one(options: Options) -> int:
    from tinygrad_llm.train import pretrain
    from tinygrad_llm.train.trainer import Diverged

    log = options.log()
    with _beginning():
        if options.resume:
            ready = pretrain.resume(Run.open(options.resume), options.settings, log)
        else:
            ready = pretrain.start(options.settings, options.run or None, log)
    log.say(f"run folder: {ready.run.folder}")
    try:
        _fit(ready, ready.run.folder, options)
    except Diverged as error:
        print(f"tinygrad-llm: {error}", file=sys.stderr)
        return 1
    if options.json:
        sample = {"sample": "".join(_sample(ready))} if _writes(ready.config) else {}
        show_json(_summary(ready) | sample)
    elif options.quiet:
        print(_in_one_line(ready))
    else:
        _print_sample(ready)
        _print_farewell(ready)
    return 0


@contextmanager
def _beginning() -> Iterator[None]:
    """Within: what the user gave is read; a model that is too large for the memory is a mistake."""
    try:
        with user_input():
            yield
    except MemoryError as error:
        why = f" ({error})" if str(error) else ""
        raise UsageError(
            f"there is not enough memory to begin{why}: lower --n-layer, --n-embd, --vocab-size or "
            "--context"
        ) from error


def _fit(ready: Pretraining, folder: Path, options: Options) -> None:
    """Train; where a signal ends it, print the command that goes on with `folder`."""
    from tinygrad_llm.train.graph import GraphError
    from tinygrad_llm.train.parallel import Lost
    from tinygrad_llm.train.trainer import Interrupted, NotSaved, OutOfMemory

    try:
        ready.trainer.fit()
    except Interrupted as stop:
        _print_way_on(str(stop), folder, options)
        raise
    except (NotSaved, OutOfMemory, Lost, GraphError) as error:
        raise UsageError(str(error)) from error


def _print_way_on(why: str, folder: Path, options: Options) -> None:
    if options.json:
        show_json({"stopped": why, "resume": _resume_command(folder, options.settings)})
    else:
        print(f"\n{why}. Go on with:\n  {_resume_command(folder, options.settings)}")


def _sample(ready: Pretraining) -> Iterator[str]:
    return (piece.replace(END_OF_TEXT, "\n\n") for piece in ready.sample())


def _print_sample(ready: Pretraining) -> None:
    sample = ready.config.sample
    if not sample.max_new_tokens or not _writes(ready.config):
        return
    print(f"\nsample (temperature {sample.temperature}, seed {ready.config.train.seed}):\n")
    show_text([sample.prompt])
    show_text(_sample(ready))
    print()


def _print_farewell(ready: Pretraining) -> None:
    run, end = ready.run, ready.trainer.end
    if end and end.flag != "--steps":
        print(f"\nstopped: the run has {end.reason}")
    print(f"\nrun folder: {run.folder}")
    if run.picture_file.exists():
        print(f"loss curve: {run.picture_file}")
    for line in _accuracies(ready):
        print(line)
    print(f"speed:      {_speed(_summary(ready))}")
    if end:
        again = _resume_command(run.folder, ready.config)
        print(f"resume:     {again} {end.flag} {2 * end.limit}")
    if not _writes(ready.config):
        return
    print(f"sample:     {_sample_command(run.folder)}")
    if ready.trainer.average is not None:
        best = run.checkpoints_folder / "best" / checkpoint.AVERAGE
        print(f"averaged:   {_sample_command(best)}")


def _accuracies(ready: Pretraining) -> Iterator[str]:
    """masked accuracy: 24.1% (without skill 5.7%)"""
    last = ready.run.metrics()[-1]
    for key, (name, baseline) in accuracies([last]).items():
        beside = f" (without skill {last[baseline]:.1%})" if baseline in last else ""
        yield f"{name}: {last[key]:.1%}{beside}"


def _writes(config: PretrainConfig) -> bool:
    """Whether it goes on from a prompt."""
    return configuration.applies(config.model.architecture, "sample.")


def _summary(ready: Pretraining) -> dict[str, Any]:
    """What came of a run; speeds are medians over its steps."""
    from tinygrad_llm.train.task import unit_of

    records, end = ready.run.metrics(), ready.trainer.end
    found: dict[str, Any] = {
        "run": str(ready.run.folder),
        "end": end.reason if end else None,
        "step": ready.trainer.step,
        "val_loss": records[-1]["val_loss"],
        "best": ready.trainer.best,
    }
    found |= {k: v for k, v in records[-1].items() if k.startswith("val_")}
    for key in (speed_key(unit_of(ready.trainer.task)), "mfu"):
        values = [record[key] for record in records if key in record]
        if values:
            found[key] = statistics.median(values)
    return found


def _speed(summary: dict[str, Any]) -> str:
    """12,345 tokens/s, 34% of the measured peak (medians)"""
    share = f", {summary['mfu']:.0%} of the measured peak" if "mfu" in summary else ""
    value, unit = speed(summary) or (0.0, "tokens")
    return f"{value:,.0f} {unit}/s{share} (median over the steps)"


def _in_one_line(ready: Pretraining) -> str:
    summary = _summary(ready)
    return f"{summary['run']}: val loss {summary['val_loss']:.4f} after {summary['step']} steps"


def _sample_command(folder: Path) -> str:
    return f"{program()} generate --model {shlex.quote(str(folder))}"


def _resume_command(folder: Path, config: PretrainConfig) -> str:
    kind = config.model.architecture
    return f"{program()} pretrain {kind} --resume {shlex.quote(str(folder))}"


# --- several seeds --------------------------------------------------------------------------------


def _train_seeds(options: Options) -> int:
    from tinygrad_llm.train.seeds import SeedRuns

    with user_input():
        if options.resume:
            runs = SeedRuns.resume(options.resume, options.settings)
        else:
            runs = SeedRuns.start(options.settings, options.seeds, options.run or None)
    try:
        for seed in runs.seeds:
            _train_seed(runs, seed, options)
    except KeyboardInterrupt:  # between two runs; within one it is Interrupted
        if runs.file.exists():
            _print_way_on("stopped by SIGINT", runs.folder, options)
        raise
    finally:
        runs.close()
    why_not = runs.draw()
    if options.json:
        show_json(_seeds_summary(runs))
    else:
        _print_seeds(runs, options)
    if why_not and not options.json:
        print(why_not, file=sys.stderr)
    return 1 if any(runs.failures.values()) else 0


def _train_seed(runs: SeedRuns, seed: int, options: Options) -> None:
    from tinygrad_llm.train.trainer import Diverged

    failure = ""
    with _beginning():
        ready = runs.prepare(seed, options.log())
    if ready is not None:
        try:
            _fit(ready, runs.folder, options)
        except Diverged as error:  # a result, too: the others are to be seen
            failure = str(error)
            print(f"tinygrad-llm: seed {seed}: {error}", file=sys.stderr)
    with user_input():
        runs.note(seed, failure)


def _seeds_summary(runs: SeedRuns) -> dict[str, Any]:
    spreads = {key: runs.spread(key) for key in ("val_loss", "best_val_loss")}
    return {
        "run": str(runs.folder),
        "results": [asdict(result) for result in runs.results()],
        **{key: found and asdict(found) for key, found in spreads.items()},
    }


def _print_seeds(runs: SeedRuns, options: Options) -> None:
    results, last, best = runs.results(), runs.spread(), runs.spread("best_val_loss")
    rows = [("seed", "steps", "val loss", "best")]
    for r in results:
        loss = "failed" if r.failure else _four(r.val_loss)
        rows.append((str(r.seed), str(r.step), loss, _four(r.best_val_loss)))
    rows.append(("mean", "", _four(last and last.mean), _four(best and best.mean)))
    rows.append(("std", "", _four(last and last.std), _four(best and best.std)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    if options.quiet:
        return
    print(f"\nval loss {_plus_minus(last)}")
    print(f"\nrun folder: {runs.folder}")
    if runs.picture_file.exists():
        print(f"loss curve: {runs.picture_file}")
    again = _resume_command(runs.folder, runs.config)
    print(f"resume:     {again} --steps {2 * runs.config.train.steps}")
    whole = [r for r in results if r.best_val_loss is not None]
    if whole and _writes(runs.config):
        chosen = min(whole, key=lambda r: r.best_val_loss or 0.0)
        print(f"sample:     {_sample_command(runs.run(chosen.seed).folder)}")


def _four(number: float | None) -> str:
    return "-" if number is None else f"{number:.4f}"


def _plus_minus(found: Spread | None) -> str:
    """1.2345 ± 0.0123 (mean ± sample standard deviation, 3 seeds)"""
    if found is None:
        return "of no seed is known"
    spread = "" if found.std is None else f" ± {found.std:.4f}"
    return f"{found.mean:.4f}{spread} (mean ± sample standard deviation, {found.n} seeds)"
