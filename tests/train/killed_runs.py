"""A run stopped by a signal again and again, beside the same run left in peace: `test_kill.py`.

python killed_runs.py FOLDER SEED STOPS SIGKILL|SIGTERM PROCESSES

Every attempt is a process of its own, forked from this one so that it starts at once. SIGTERM comes
from outside at random moments. So does every other SIGKILL; the others come from within, before or
after a random one of the calls that write a checkpoint, or with a file half written. Prints what
came of it, as JSON.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import replace
from io import StringIO
from pathlib import Path

from tinygrad_llm.storage import check_sums
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train import pretrain
from tinygrad_llm.train.log import PlainLog
from tinygrad_llm.train.run import Run
from tinygrad_llm.train.trainer import Interrupted, Trainer

STEPS = 80


def settings(text, processes):
    """A tiny run that has everything with a state: dropout, pieces, an average, texts, pruning."""
    tiny = configuration.preset("tiny")
    limits = {"steps": STEPS, "eval_every": 2, "checkpoint_every": 2, "keep_last": 2}
    size = {"accumulate": 2, "batch_size": 2, "gradient_checkpointing": True, "mfu": False}
    size["processes"] = processes
    rates = {"wte": 0.5, "h.0.mlp": 2.0}
    train = replace(tiny.train, **limits, **size, lr_groups=rates, ema=0.9, patience=50)
    sample = replace(tiny.sample, every=3, every_max_new_tokens=2)
    return replace(tiny, data=replace(tiny.data, source=str(text)), train=train, sample=sample)


def train(folder, config):
    log = PlainLog(StringIO())
    Trainer._draw = lambda self: None
    if (folder / "config.toml").exists():
        ready = pretrain.resume(Run.open(folder), config, log)
    else:
        ready = pretrain.start(config, folder, log)
    ready.trainer.fit()


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def plan_death(countdown, moment):
    """Die at the call number `countdown` of those that write: before it, after it, or halfway."""
    left = [countdown]

    def deadly(call):
        def wrapped(*arguments, **options):
            left[0] -= 1
            if left[0] or moment == "after":
                result = call(*arguments, **options)
                return result if left[0] else die()
            if moment == "halfway" and call is write_text:
                path, text = arguments
                with path.open("w") as file:
                    file.write(text[: len(text) // 2])
            return die()

        return wrapped

    write_text = Path.write_text
    for owner, name in (
        *((os, name) for name in ("fsync", "replace")),
        *((Path, name) for name in ("mkdir", "write_text", "symlink_to", "unlink")),
        (Trainer, "train_step"),
    ):
        setattr(owner, name, deadly(getattr(owner, name)))


def attempt(folder, config, prepare=lambda: None, outside=None):
    """Whether the run came to its end; an exception in it ends this program.

    `outside` is a signal, a number of steps to wait for, and seconds to wait after them.
    """
    child = os.fork()
    if not child:
        try:
            prepare()
            train(folder, config)
        except Interrupted as stop:
            os._exit(128 + stop.number)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = None
    if outside is not None:
        number, steps, seconds = outside
        goal = reached(folder) + steps
        while status is None and last_record(folder) < goal:
            time.sleep(0.001)
            done, code = os.waitpid(child, os.WNOHANG)
            status = code if done else None
        if status is None:
            time.sleep(seconds)
            os.kill(child, number)
    if status is None:
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
        sys.exit("a run failed that should have gone on")
    return code == 0


def reached(folder):
    """The step of the last checkpoint, from which the next attempt goes on."""
    last = Run(folder).checkpoint()
    return int(last.name.removeprefix("step-")) if last else 0


def last_record(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def check_whole(run):
    """Every checkpoint that can be seen is one: nothing is missing, nothing is cut short."""
    for folder in run.checkpoints_folder.glob("step-*"):
        names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        model = {"config.json", "model.safetensors", "tokenizer.json", "SHA256SUMS"}
        training = {"trainer.json", "optimizer.safetensors", "run.toml"}
        expected = model | training | {f"ema/{n}" for n in model}
        if names != expected:
            sys.exit(f"{folder} holds {sorted(names)}")
        check_sums(folder)
        check_sums(folder / "ema")


def digest(folder):
    last = Run.open(folder).checkpoint() or folder
    weights = (last / name for name in ("model.safetensors", "ema/model.safetensors"))
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights]


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def main(folder, seed, stops, number, processes):
    chance = random.Random(seed)
    text = folder / "text.txt"
    text.write_text("".join(f"{i} and {i} make {2 * i}.\n" for i in range(200)))
    config, killed = settings(text, processes), folder / "killed"
    attempt(folder / "whole", config)

    found, in_save = 0, 0
    while found < stops and reached(killed) < STEPS:
        if found % 2 or number == signal.SIGTERM:
            moment = (number, chance.randint(1, 4), chance.uniform(0, 0.01))
            over = attempt(killed, config, outside=moment)
        else:
            when, how = chance.randint(1, 70), chance.choice(["before", "after", "halfway"])
            over = attempt(killed, config, lambda w=when, h=how: plan_death(w, h))
        found += not over
        in_save += any((killed / "checkpoints").glob(".unfinished-*"))
        check_whole(Run(killed))
    if reached(killed) < STEPS:
        attempt(killed, config)
    print(
        json.dumps(
            {
                "stops": found,
                "in a save": in_save,
                "whole": digest(folder / "whole"),
                "killed": digest(killed),
                "metrics": [r["step"] for r in Run(killed).metrics()],
                "samples": samples(killed) == samples(folder / "whole"),
            }
        )
    )


if __name__ == "__main__":
    where, first, count, name, together = sys.argv[1:]
    main(Path(where), int(first), int(count), signal.Signals[name], int(together))
