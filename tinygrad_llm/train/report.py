"""What stands in run folders, without touching them: a line for each, and several side by side.

A run is running (a process holds its lock), finished (a limit of its configuration is reached),
stopped (by a signal, a full disk or a loss that is no number) or crashed (killed: whoever held the
lock let it go without a word). What cannot be read is damaged, and `why` says where.
"""

from __future__ import annotations

import errno
import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from tinygrad_llm.finetune import config as finetune_config
from tinygrad_llm.finetune.config import FinetuneConfig
from tinygrad_llm.train import checkpoint
from tinygrad_llm.train.config import PretrainConfig
from tinygrad_llm.train.run import Record, Run, speed
from tinygrad_llm.train.stopping import Limits, better

State = Literal["running", "finished", "stopped", "crashed", "damaged"]


@dataclass(frozen=True)
class RunReport:
    """One run folder; None for what is not known, such as the loss of a run that has no step."""

    folder: Path
    state: State
    step: int = 0
    steps: int | None = None
    best_val_loss: float | None = None
    score: str = "val_loss"  # by which a checkpoint is the best: of fine-tuning often another
    best: float | None = None  # that score, at `best_step`
    best_step: int | None = None
    loss: float | None = None  # of the last step
    speed: float | None = None  # the median of the last steps, in `unit` per second
    unit: str = "tokens"
    changed: float | None = None  # when its metrics last grew, in seconds since 1970
    why: str = ""  # what is damaged
    config: PretrainConfig | FinetuneConfig | None = None
    curves: list[Record] = field(default_factory=list, repr=False)  # the losses, if asked for

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold of it, less the configuration and the curves."""
        left_out = ("folder", "config", "curves")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        return {"run": str(self.folder), **values}


def find_runs(folder: str | Path) -> list[Path]:
    """The run folders in `folder` and up to three levels below it; `folder` itself where it is one.

    Whatever else lies there is passed over, as is a folder that may not be opened. Raises
    FileNotFoundError where there is no such folder.
    """
    top = Path(folder)
    if not top.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    return sorted(_runs_in(top, levels=3))


def _runs_in(folder: Path, levels: int) -> Iterator[Path]:
    if _is_run(folder):
        yield folder
    elif levels:
        try:
            inside = [path for path in folder.iterdir() if path.is_dir()]
        except OSError:
            return
        for path in inside:
            if not path.is_symlink() and not path.name.startswith("."):
                yield from _runs_in(path, levels - 1)


def _is_run(folder: Path) -> bool:
    """A config.toml alone may be anybody's."""
    traces = ("metrics.jsonl", "checkpoints", "lock")
    return (folder / "config.toml").is_file() and any((folder / name).exists() for name in traces)


def look(folder: str | Path, *, curves: bool = False) -> RunReport:
    """The report on one run folder; with `curves` also its losses, for `plot.draw_runs`.

    What is broken makes a report in the state 'damaged'. Raises FileNotFoundError where the folder
    holds no run.
    """
    run = Run.open(folder)
    try:
        config = finetune_config.own_of_run(run.config_file)
        seen = _read_metrics(run, curves)
    except (ValueError, OSError) as error:
        return RunReport(run.folder, "damaged", why=" ".join(str(error).split()))
    try:
        state, why = _state(run, config, seen.step), ""
    except (ValueError, OSError) as error:
        state, why = "damaged", " ".join(str(error).split())
    score = _score(run)
    best, best_step = seen.best.get(score, (None, None))
    return RunReport(
        run.folder,
        state,
        why=why,
        step=seen.step,
        steps=config.train.steps,
        best_val_loss=seen.best.get("val_loss", (None,))[0],
        score=score,
        best=best,
        best_step=best_step,
        loss=seen.loss,
        speed=statistics.median(seen.speeds) if seen.speeds else None,
        unit=seen.unit,
        changed=seen.changed,
        config=config,
        curves=seen.curves,
    )


# --- metrics --------------------------------------------------------------------------------------


class _Metrics:
    """What the records come to, one after the other: a long run has more than memory should."""

    def __init__(self, keep_curves: bool) -> None:
        self.step, self.loss = 0, None
        self.best: dict[str, tuple[float, int]] = {}  # by the name of a score
        self.speeds: deque[float] = deque(maxlen=50)
        self.unit = "tokens"
        self.changed: float | None = None
        self.curves: list[Record] = []
        self._keep_curves = keep_curves

    def add(self, record: Record) -> None:
        self.step = record["step"]
        self.loss = record.get("loss", self.loss)
        if found := speed(record):
            self.speeds.append(found[0])
            self.unit = found[1]
        for name in (key for key in record if key.startswith("val_")):
            value, before = record[name], self.best.get(name, (None,))[0]
            if math.isfinite(value) and better(name, value, before):
                self.best[name] = value, self.step
        if self._keep_curves:
            wanted = ("step", "loss", "val_loss")
            self.curves.append({key: record[key] for key in wanted if key in record})


def _read_metrics(run: Run, keep_curves: bool) -> _Metrics:
    seen = _Metrics(keep_curves)
    if not run.metrics_file.exists():
        return seen
    seen.changed = run.metrics_file.stat().st_mtime
    with run.metrics_file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):  # being written, or cut short by a kill
                break
            try:
                seen.add(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"line {number} of {run.metrics_file} is no record") from error
    return seen


def _score(run: Run) -> str:
    """By which its checkpoints are compared, as the latest says; until there is one the loss."""
    try:
        latest = run.checkpoint("latest")
        best = checkpoint.read_state(latest)["best"] if latest is not None else None
        others = [key for key in best or () if key not in ("step", "val_loss")]
    except (ValueError, KeyError, TypeError, OSError):  # what is damaged is told by the state
        others = []
    return others[0] if others else "val_loss"


# --- state ----------------------------------------------------------------------------------------


def _state(run: Run, config: PretrainConfig | FinetuneConfig, step: int) -> State:
    held, left = _lock(run.folder / "lock")
    if held:
        return "running"
    if _is_over(run, config, step):
        return "finished"
    return "crashed" if left else "stopped"


def _is_over(run: Run, config: PretrainConfig | FinetuneConfig, step: int) -> bool:
    """Whether its metrics or its latest checkpoint say that a limit is reached."""
    if isinstance(config, FinetuneConfig):
        config = finetune_config.in_common(config)
    if step >= config.train.steps:
        return True
    latest = run.checkpoint("latest")
    if latest is None:
        return False
    limits = Limits(config.train)
    state = checkpoint.read_state(latest)
    with checkpoint.reading(latest):
        limits.load_state(state["limits"])
        return limits.over(state["step"], state["tokens"], state["elapsed"]) is not None


def _lock(path: Path) -> tuple[bool, bool]:
    """(whether a process holds the lock, whether one that is gone left its id there).

    Whoever lets go of the lock empties the file, so one with an id in it is held, or was until a
    kill. Only then is the lock itself asked, shared and for an instant.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False, False
    try:
        if not os.read(descriptor, 100).strip():
            return False, False
        held = _is_held(descriptor)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EDEADLK):  # Windows: a lock is in the way
            raise
        held = True
    finally:
        os.close(descriptor)
    return held, not held


def _is_held(descriptor: int) -> bool:
    if os.name == "nt":
        return _is_alive(descriptor)
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return _is_alive(descriptor)
    return False


def _is_alive(descriptor: int) -> bool:
    """Whether the process whose id is in the file runs, as far as this machine can tell."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        os.kill(int(os.read(descriptor, 100)), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except OSError:  # another user's
        return True
    return True


# --- side by side ---------------------------------------------------------------------------------


def differing(reports: Sequence[RunReport]) -> dict[str, list[Any]]:
    """{'train.lr': [of the first, of the second …]} for the keys that are not the same in all.

    None stands for a key that a run has not, such as one of pretraining beside one of fine-tuning.
    """
    values = [_flat(report.config) for report in reports]
    keys = dict.fromkeys(key for one in values for key in one)
    found = {key: [one.get(key) for one in values] for key in keys}
    return {key: row for key, row in found.items() if any(value != row[0] for value in row)}


def _flat(config: Any, section: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in fields(config) if is_dataclass(config) else ():
        value = getattr(config, f.name)
        if is_dataclass(value):
            found |= _flat(value, f"{section}{f.name}.")
        else:
            found[f"{section}{f.name}"] = value
    return found


def ago(then: float, now: float | None = None) -> str:
    """How long ago that was: '12 s', '5 min', '3 h', '8 d'"""
    seconds = max(0.0, (time.time() if now is None else now) - then)
    for size, unit, below in ((1, "s", 100), (60, "min", 100), (3600, "h", 72)):
        if seconds < size * below:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
