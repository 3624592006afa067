"""The run folder: everything that a run reads again or leaves behind.

runs/20250131-142530/
    config.toml               the configuration: enough to run it again
    metrics.jsonl             one JSON object a step
    loss.png                  the curves
    checkpoints/step-000500/  a Hugging Face model folder, and the trainer's state
    checkpoints/latest        → the newest of them
    checkpoints/best          → the one with the lowest validation loss
    lock                      held by the process that trains
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from tinygrad_llm.storage import check_sums, write_sums
from tinygrad_llm.train import files
from tinygrad_llm.train.lock import Lock

Record = dict[str, Any]

CONFIG_COPY = "run.toml"  # not config.toml: a checkpoint is not a run folder

_STEP = re.compile(r"step-(\d{6,})")


class Run:
    """A run folder: `Run.new(path)` for one that is to be, `Run.open(path)` for one that is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_file = folder / "config.toml"
        self.metrics_file = folder / "metrics.jsonl"
        self.picture_file = folder / "loss.png"
        self.checkpoints_folder = folder / "checkpoints"
        self._lock = Lock(folder / "lock")
        self._new = False
        self._metrics: TextIO | None = None

    @classmethod
    def new(cls, folder: str | Path | None = None) -> Run:
        """A run that will be in `folder`, or in `runs/` under the present time; see `begin`.

        Raises FileExistsError where a run, or anything else, is in the way.
        """
        path = Path(folder) if folder is not None else _unused(Path("runs"), datetime.now())
        run = cls(path)
        run._new = True
        run._refuse_another()
        if path.exists() and (not path.is_dir() or not _is_as_good_as_empty(path)):
            raise FileExistsError(f"{path} is in use and holds no run: name another folder")
        return run

    def begin(self, config: str) -> None:
        """Make the folder, with `config` as its config.toml, and hold it until `close()`.

        For a run that is there: only hold it and replace config.toml. Raises OSError with one
        sentence where the folder cannot be written or another process holds it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.hold()
            if self._new:
                self._refuse_another()  # one that began since `new` looked
            files.write_text(self.config_file, config)
            self.checkpoints_folder.mkdir(exist_ok=True)
        except OSError as error:
            self.close()
            raise _for_people(error, self.folder) from error
        self._new = False

    def _refuse_another(self) -> None:
        if self.config_file.exists():
            raise FileExistsError(
                f"{self.folder} holds a run already: go on with --resume {self.folder}, or name "
                "another folder"
            )

    def hold(self) -> None:
        """Take the folder for this process until `close()`; fine where it is held already.

        Raises Locked, which is an OSError, where another process trains in it.
        """
        try:
            self._lock.take()
        except OSError as error:
            raise _for_people(error, self.folder) from error

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """The run in `folder`; FileNotFoundError where there is none."""
        run = cls(Path(folder))
        if not run.config_file.is_file():
            raise FileNotFoundError(f"{folder} is not a run folder: it has no config.toml")
        return run

    # --- metrics ----------------------------------------------------------------------------------

    def append(self, record: Record) -> None:
        """Add one line to metrics.jsonl, there for other programs at once."""
        if self._metrics is None:
            self._metrics = self.metrics_file.open("a", encoding="utf-8")
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()

    def metrics(self) -> list[Record]:
        """The records so far. A last line cut short by a kill is not one."""
        if not self.metrics_file.exists():
            return []
        return list(self._records())

    def _records(self) -> Iterator[Record]:
        with self.metrics_file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    record = json.loads(line.decode())
                    if type(record["step"]) is not int:
                        raise TypeError
                except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
                    raise ValueError(
                        f"{self.metrics_file} is damaged: line {number} is no record of a step; "
                        "delete that line to go on without it"
                    ) from error
                yield record

    def forget_after(self, step: int) -> None:
        """Drop the records later than `step`: a resumed run makes them again.

        They were synced up to the checkpoint of `step`; what a power cut left of later ones is not
        looked at.
        """
        self._close_metrics()
        kept: list[Record] = []
        if self.metrics_file.exists():
            with contextlib.suppress(StopIteration):
                records = self._records()
                while not kept or kept[-1]["step"] < step:
                    kept.append(next(records))
        kept = [record for record in kept if record["step"] <= step]
        files.write_text(self.metrics_file, "".join(json.dumps(r) + "\n" for r in kept))

    def close(self) -> None:
        """Close metrics.jsonl and let another process have the folder."""
        self._close_metrics()
        self._lock.release()

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    # --- checkpoints ------------------------------------------------------------------------------

    def save_checkpoint(self, step: int, fill: Callable[[Path], object]) -> Path:
        """checkpoints/step-N, written by `fill(folder)` whole or not at all; `latest` names it.

        It gets a copy of config.toml, and the checksums of all its files.
        """
        if self._metrics is not None:  # the records up to a checkpoint outlive a power cut, too
            os.fsync(self._metrics.fileno())
        folder = self.step_folder(step)
        files.write_folder(folder, lambda unfinished: self._fill(unfinished, fill))
        self.mark_latest(folder)
        return folder

    def _fill(self, folder: Path, fill: Callable[[Path], object]) -> None:
        fill(folder)
        if self.config_file.exists():  # deleted meanwhile: no reason to lose the training
            shutil.copyfile(self.config_file, folder / CONFIG_COPY)
        for inside, _, _ in os.walk(folder):
            write_sums(inside)

    def saved_config(self, checkpoint: Path | None) -> Path:
        """The configuration that the checkpoint was made with, whatever config.toml says now.

        The run's own config.toml where there is no checkpoint, or one without a copy. Raises
        Damaged where the copy is not as it was saved.
        """
        if checkpoint is None:
            return self.config_file
        check_sums(checkpoint, lambda name: name == CONFIG_COPY)
        copy = checkpoint / CONFIG_COPY
        return copy if copy.is_file() else self.config_file

    def step_folder(self, step: int) -> Path:
        """Where the checkpoint of that step is, or would be."""
        return self.checkpoints_folder / f"step-{step:06d}"

    def keep_last(self, count: int, best: Path | None) -> None:
        """Delete the checkpoints that are neither `best` nor among the newest `count`."""
        steps = self._steps()
        for step in sorted(steps)[:-count]:
            if best is None or steps[step].name != best.name:
                files.remove_folder(steps[step])

    def mark_latest(self, checkpoint: Path) -> None:
        """Let `latest` name this checkpoint."""
        files.point(self.checkpoints_folder / "latest", checkpoint.name)

    def mark_best(self, checkpoint: Path) -> None:
        """Let `best` name this checkpoint."""
        files.point(self.checkpoints_folder / "best", checkpoint.name)

    def checkpoint(self, which: str = "latest") -> Path | None:
        """The folder of the `latest` or the `best` checkpoint; None where there is none.

        A step folder is there only when it is whole, so the latest is the one with the highest
        number, also when a kill came between its rename and the turn of the link.
        """
        if which == "best":
            return files.pointed(self.checkpoints_folder / "best")
        steps = self._steps()
        return steps[max(steps)] if steps else None

    def _steps(self) -> dict[int, Path]:
        return {
            int(match[1]): path
            for path in self.checkpoints_folder.glob("step-*")
            if (match := _STEP.fullmatch(path.name))
        }


def _is_as_good_as_empty(folder: Path) -> bool:
    """Whether it holds at most what a run that was killed in `begin` left there."""
    return all(p.name == "lock" or files.is_unfinished(p) for p in folder.iterdir())


def _for_people(error: OSError, folder: Path) -> OSError:
    """The error as a sentence, where it is the system's own two words."""
    if not error.strerror:
        return error
    return OSError(
        f"cannot write into the run folder {folder} ({error.strerror}): make it "
        "writable, or name another with --run"
    )


def _unused(parent: Path, now: datetime) -> Path:
    """runs/20250131-142530, with -2, -3 … where two runs start in one second."""
    name = now.strftime("%Y%m%d-%H%M%S")
    path, number = parent / name, 1
    while path.exists():
        number += 1
        path = parent / f"{name}-{number}"
    return path


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the best (else the latest) one of a run.

    Raises FileNotFoundError where it means none.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"there is no run or checkpoint {path}")
    if (folder / "config.json").is_file():
        return folder
    if folder.is_file():  # `latest` and `best` where the file system has no symbolic links
        found = files.pointed(folder)
    else:
        run = Run(folder)
        found = run.checkpoint("best") or run.checkpoint("latest")
    if found is None:
        raise FileNotFoundError(
            f"{path} holds no checkpoint: expected a run folder, or a model folder with config.json"
        )
    return found


def speed_key(unit: str) -> str:
    """'hidden words' -> 'hidden_words_per_second': the key of a record for what a task counts in"""
    return f"{unit.replace(' ', '_')}{_SPEED}"


def speed(record: Record) -> tuple[float, str] | None:
    """{'tokens_per_second': 1234.5} -> (1234.5, 'tokens'); None where a record says no speed"""
    for key, value in record.items():
        if key.endswith(_SPEED):
            return value, key.removesuffix(_SPEED).replace("_", " ")
    return None


_SPEED = "_per_second"
_ACCURACY = re.compile(r"val_(?:(\w+)_)?(accuracy|f1)")


def accuracies(records: Sequence[Record]) -> dict[str, tuple[str, str]]:
    """{key: (its name, the key of its baseline)} of the accuracies that were recorded.

    'val_masked_accuracy'  ->  ('masked accuracy', 'val_majority_masked')
    """
    found: dict[str, tuple[str, str]] = {}
    for key in dict.fromkeys(key for record in records for key in record):
        if match := _ACCURACY.fullmatch(key):
            of, kind = match[1] or "", match[2]
            found[key] = (f"{of} {kind}".strip().replace("_", " "), f"val_majority_{of or kind}")
    return found
