"""Runs killed again and again, beside the same runs left in peace: are they equal, bit for bit?

Every attempt is the real command, `tinygrad-llm pretrain gpt`, in a process of its own. It is
stopped at random moments of three kinds: while it starts and reads the checkpoint, after so many
steps, and in the middle of a save, which shows by its unfinished folder. Then it goes on with
`--resume`, until the run is over; every checkpoint that a kill leaves is compared with its
checksums. The model is tiny, but everything with a state is on: dropout, several batches in an
update, an average of the weights, a warm-up, pruning of old checkpoints. With `--processes` the
signal goes to the first of the processes that share a step.

    python benchmarks/kill_resume.py [--kills 20] [--signal KILL TERM] [--seeds 1 2]
        [--processes 2] [--save]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import environment

from tinygrad_llm.storage import check_sums
from tinygrad_llm.train.run import Run

RESULTS = Path(__file__).parent / "results"
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM}
KINDS = ("starting", "training", "saving")

CONFIG = """\
[data]
source = "{text}"
tokenizer = "byte"
[model]
n_layer = 2
n_head = 2
n_embd = 32
dropout = 0.1
[train]
steps = {steps}
batch_size = 4
accumulate = 2
context = 32
warmup = 20
ema = 0.99
eval_every = 5
eval_batches = 2
checkpoint_every = 5
keep_last = 3
seed = {seed}
processes = {processes}
[sample]
max_new_tokens = 0
"""

# What tells the time, and so differs from run to run.
TIMING = ("elapsed", "tokens_per_second", "hidden_words_per_second", "mfu")


@dataclass
class Outcome:
    """What came of one run that was stopped again and again."""

    signal: str
    seed: int
    steps: int
    processes: int
    stopped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    in_a_save: int = 0  # stopped with an unfinished checkpoint there
    equal: dict[str, bool] = field(default_factory=dict)
    sha256: str = ""  # of the weights

    @property
    def kills(self) -> int:
        return sum(self.stopped.values())


def compare(name: str, seed: int, kills: int, steps: int, processes: int, folder: Path) -> Outcome:
    """One run left in peace, one stopped `kills` times; what differs at their end."""
    (folder / "text.txt").write_text("".join(f"{i} and {i} make {2 * i}.\n" for i in range(2000)))
    sizes = {"seed": seed, "steps": steps, "processes": processes}
    text = CONFIG.format(text=folder / "text.txt", **sizes)
    (folder / "config.toml").write_text(text)
    whole, stopped = folder / "whole", folder / "stopped"
    finish(begin(folder, whole))

    chance = random.Random(seed)
    outcome = Outcome(name, seed, steps, processes)
    kinds = [KINDS[i % len(KINDS)] for i in range(kills)]
    chance.shuffle(kinds)
    for kind in kinds:
        process = begin(folder, stopped)
        in_a_save = stop(process, SIGNALS[name], stopped, kind, chance)
        if in_a_save is None:
            break  # it came to its end before the moment did
        outcome.stopped[kind] += 1
        outcome.in_a_save += in_a_save
        check_all(stopped)
    else:
        finish(begin(folder, stopped))
    outcome.equal = equal(whole, stopped)
    outcome.sha256 = contents(whole)["weights"]
    return outcome


def begin(folder: Path, run: Path) -> subprocess.Popen[str]:
    """The command that starts the run, or that goes on with it where it has begun."""
    if (run / "config.toml").exists():
        arguments = ["--resume", str(run)]
    else:
        arguments = ["--config", str(folder / "config.toml"), "--run", str(run)]
    return subprocess.Popen(
        [sys.executable, "-m", "tinygrad_llm", "pretrain", "gpt", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, error = process.communicate()
    if process.returncode:
        sys.exit(f"a run failed that should have come to its end: {error}")


def stop(
    process: subprocess.Popen[str], number: signal.Signals, run: Path, kind: str, chance: Any
) -> bool | None:
    """Send the signal at a moment of that kind; whether a save was going on. None: it was over."""
    if kind == "starting":
        time.sleep(chance.uniform(0, 1.2))
    else:
        goal = last_step(run) + chance.randint(1, 12)
        while process.poll() is None and last_step(run) < goal:
            time.sleep(0.0005)
        while kind == "saving" and process.poll() is None and not is_saving(run):
            pass
        time.sleep(chance.uniform(0, 0.01 if kind == "training" else 0.004))
    if process.poll() is not None:
        finish(process)
        return None
    before = is_saving(run)
    process.send_signal(number)
    _, error = process.communicate()
    if process.returncode == 0:
        return None
    if process.returncode not in (-number, 128 + number):
        sys.exit(f"a run failed that should have been stopped by a signal: {error}")
    # SIGKILL leaves the unfinished folder; after SIGTERM the save is brought to its end.
    return is_saving(run) if number == signal.SIGKILL else before


def last_step(run: Path) -> int:
    """The step of the last whole line in metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2000))
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines if line.startswith(b"{") and line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def is_saving(run: Path) -> bool:
    try:
        return any(name.startswith(".unfinished-step") for name in os.listdir(run / "checkpoints"))
    except FileNotFoundError:
        return False


def check_all(run: Path) -> None:
    """Every checkpoint that can be seen is whole; else this fails with Damaged."""
    for folder in (run / "checkpoints").glob("step-*"):
        for inside in (folder, folder / "ema"):
            if not (inside / "SHA256SUMS").is_file():
                sys.exit(f"{inside} has no SHA256SUMS")
            check_sums(inside)


def contents(folder: Path) -> dict[str, str]:
    """The sha256 of what a run came to, without what tells the time."""
    run = Run.open(folder)
    last = run.checkpoint()
    if last is None:
        sys.exit(f"{folder} has no checkpoint")
    state = json.loads((last / "trainer.json").read_text())
    records = run.metrics()
    for timed in (state, *records):
        for key in TIMING:
            timed.pop(key, None)
    found = {
        "weights": (last / "model.safetensors").read_bytes(),
        "average": (last / "ema" / "model.safetensors").read_bytes(),
        "optimizer": (last / "optimizer.safetensors").read_bytes(),
        "state": json.dumps(state).encode(),
        "metrics": json.dumps(records).encode(),
        "checkpoints": " ".join(
            f"{path.name}={path.resolve().name}"
            for path in sorted(run.checkpoints_folder.iterdir())
            if not path.name.startswith(".")
        ).encode(),
    }
    return {what: hashlib.sha256(data).hexdigest() for what, data in found.items()}


def equal(whole: Path, stopped: Path) -> dict[str, bool]:
    a, b = contents(whole), contents(stopped)
    return {what: a[what] == b[what] for what in a}


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a row per run."""
    heads = ["signal", "seed", "steps", "processes", "kills", *(f"while {kind}" for kind in KINDS)]
    heads += ["with a checkpoint half written", "what differs", "sha256 of the weights"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for o in outcomes:
        differing = [what for what, same in o.equal.items() if not same]
        cells = [
            f"SIG{o.signal}",
            o.seed,
            o.steps,
            o.processes,
            o.kills,
            *o.stopped.values(),
            o.in_a_save,
        ]
        cells += [", ".join(differing) or "nothing", f"`{o.sha256[:16]}…`"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="in each run")
    parser.add_argument("--signal", nargs="+", choices=SIGNALS, default=list(SIGNALS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--processes", type=int, default=1, help="that share a step")
    parser.add_argument("--save", action="store_true", help="write into benchmarks/results/")
    arguments = parser.parse_args()
    about = environment()
    outcomes: list[Outcome] = []
    steps = 50 + 25 * arguments.kills  # enough that the end does not come before the last kill
    for name in arguments.signal:
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as folder:
                sizes = arguments.kills, steps, arguments.processes
                outcomes.append(compare(name, seed, *sizes, Path(folder)))
            print(f"SIG{name}, seed {seed}: {outcomes[-1]}", flush=True)
    title = ", ".join(f"{key} {value}" for key, value in about.items())
    print(f"\n{title}\n\n{table(outcomes)}")
    if arguments.save:
        _save(arguments, about, outcomes)
    if not all(ok for outcome in outcomes for ok in outcome.equal.values()):
        sys.exit("a run that was stopped did not end as the one left in peace")


def _save(arguments: argparse.Namespace, about: dict[str, str], outcomes: list[Outcome]) -> None:
    RESULTS.mkdir(exist_ok=True)
    command = f"{Path(__file__).name} --kills {arguments.kills}"
    command += (
        f" --signal {' '.join(arguments.signal)} --seeds {' '.join(map(str, arguments.seeds))}"
    )
    command += f" --processes {arguments.processes}"
    title = ", ".join(f"{key} {value}" for key, value in about.items())
    (RESULTS / "kill_resume.md").write_text(
        f"# Runs killed and resumed\n\n`{command}`: {title}\n\n"
        "Each run is compared with one of the same seed that was left in peace: its last "
        "checkpoint's weights, averaged weights, optimiser, trainer's state (random streams, "
        "position in the data), all of metrics.jsonl (without what tells the time), and which "
        "checkpoints there are.\n\n"
        f"{table(outcomes)}\n",
        encoding="utf-8",
    )
    runs = [{**vars(outcome), "kills": outcome.kills} for outcome in outcomes]
    (RESULTS / "kill_resume.json").write_text(
        json.dumps({"environment": about, "runs": runs}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
