"""One configuration with several seeds: how much of a result is chance?

RUN/
    seeds.json       the configuration, the seeds, and what came of each; mean and spread
    loss.png         the curves of all of them
    seed-1/, …       an ordinary run folder each
    lock             held by the process that works on them

One training run gives one number, and another seed gives another. Two settings differ for sure only
where their means are further apart than these spread.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tinygrad_llm.train import config as configuration
from tinygrad_llm.train import files, plot, pretrain
from tinygrad_llm.train.config import ConfigError, PretrainConfig
from tinygrad_llm.train.lock import Lock
from tinygrad_llm.train.log import Log
from tinygrad_llm.train.run import Run

FILE = "seeds.json"


@dataclass(frozen=True)
class Result:
    """What a seed has come to; a loss is None where no validation was finite."""

    seed: int
    step: int
    val_loss: float | None  # of the last validation
    best_val_loss: float | None
    failure: str = ""  # why it stopped early, such as a loss that is no number


@dataclass(frozen=True)
class Spread:
    """x̄ = Σ x / n    s = √(Σ (x − x̄)² / (n − 1)), the sample's; None for a single x"""

    n: int
    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Of these; None where there are none."""
        if not values:
            return None
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(len(values), statistics.fmean(values), std)


class SeedRuns:
    """The runs of one configuration with several seeds: `start` and `resume` make it.

    ```python
    runs = SeedRuns.start(config, 3, "runs/three")     # seeds 1, 2 and 3, where config's is 1
    for seed in runs.seeds:
        if ready := runs.prepare(seed, log):           # None: that seed is done
            ready.trainer.fit()
        runs.note(seed)
    runs.close()
    ```
    """

    def __init__(self, folder: Path, config: PretrainConfig, seeds: Sequence[int]) -> None:
        self.folder, self.config, self.seeds = folder, config, list(seeds)
        self.file = folder / FILE
        self.picture_file = folder / "loss.png"
        self.failures: dict[int, str] = {}
        self._lock = Lock(folder / "lock")

    @classmethod
    def start(cls, config: PretrainConfig, count: int, folder: str | Path | None) -> SeedRuns:
        """`count` new runs in `folder` (or under runs/), the first with config's own seed.

        Nothing is written before the first run is ready. Raises FileExistsError where something is
        in the way, and ConfigError where there is no such seed.
        """
        if folder is not None and is_seeds(folder):
            raise FileExistsError(
                f"{folder} holds runs already: go on with --resume {folder}, or name another folder"
            )
        if count < 1:
            raise ConfigError(f"seeds must be at least 1, got {count}")
        first = config.train.seed
        runs = cls(Run.new(folder).folder, config, range(first, first + count))
        runs.config_of(runs.seeds[-1])
        return runs

    @classmethod
    def resume(cls, folder: str | Path, config: PretrainConfig | None = None) -> SeedRuns:
        """The runs in `folder`, to go on with.

        `config` is their own, or it with other values for what may change on the way. Raises
        ValueError where it cannot be used or seeds.json is damaged, and OSError where another
        process works on them.
        """
        kept = _read(Path(folder) / FILE)
        runs = cls(Path(folder), config or kept.config, kept.seeds)
        runs.failures = kept.failures
        configuration.refuse_changes(kept.config, runs.config, runs.folder, pretrain.CHANGEABLE)
        runs._lock.take()
        return runs

    def config_of(self, seed: int) -> PretrainConfig:
        """The configuration of one of the runs."""
        return replace(self.config, train=replace(self.config.train, seed=seed))

    def run(self, seed: int) -> Run:
        """The folder of one of the runs."""
        return Run(self.folder / f"seed-{seed}")

    def prepare(self, seed: int, log: Log) -> pretrain.Pretraining | None:
        """The run of this seed, new or as its last checkpoint left it; None where it is done.

        Raises what `pretrain.start` and `pretrain.resume` do.
        """
        run, config = self.run(seed), self.config_of(seed)
        log.say(f"seed {seed}: {self.seeds.index(seed) + 1} of {len(self.seeds)}")
        if not run.config_file.exists():
            ready = pretrain.start(config, run.folder, log)
        else:
            try:
                ready = pretrain.resume(run, config, log)
            except pretrain.RunIsOver:
                log.say(f"seed {seed} is done")
                return None
        self.config = replace(self.config, data=ready.config.data)  # with the whole path
        try:
            self._lock.take()
            self._save()
        except BaseException:
            ready.run.close()
            raise
        return ready

    def note(self, seed: int, failure: str = "") -> None:
        """Take down what came of the run of this seed, once it has ended."""
        self.failures[seed] = failure
        self._save()

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.release()

    # --- what came of them ------------------------------------------------------------------------

    def results(self) -> list[Result]:
        """What each seed that has begun has come to."""
        found = []
        for seed in self.seeds:
            records = self.run(seed).metrics()
            if records:
                losses = [r["val_loss"] for r in records if "val_loss" in r]
                finite = [loss for loss in losses if math.isfinite(loss)]
                last, best = (losses[-1], min(finite)) if finite else (None, None)
                last = last if last is not None and math.isfinite(last) else None
                failure = self.failures.get(seed, "")
                found.append(Result(seed, records[-1]["step"], last, best, failure))
        return found

    def spread(self, key: str = "val_loss") -> Spread | None:
        """Mean and spread of `val_loss` or `best_val_loss`, over the seeds that did not fail."""
        values = [getattr(result, key) for result in self.results() if not result.failure]
        return Spread.of([value for value in values if value is not None])

    def draw(self) -> str | None:
        """Draw loss.png with all curves; or say in one sentence why not."""
        runs = {f"seed {seed}": self.run(seed).metrics() for seed in self.seeds}
        try:
            return plot.draw_runs(runs, self.picture_file)
        except OSError as error:  # it can be drawn again: no reason to fail
            return f"loss.png was not drawn: {error.strerror or error}"

    def _save(self) -> None:
        spreads = {key: self.spread(key) for key in ("val_loss", "best_val_loss")}
        content = {
            "seeds": self.seeds,
            "results": [asdict(result) for result in self.results()],
            **{key: None if found is None else asdict(found) for key, found in spreads.items()},
            "config": configuration.as_dict(self.config),
        }
        files.write_text(self.file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def is_seeds(folder: str | Path) -> bool:
    """Whether the runs of several seeds are in this folder."""
    return (Path(folder) / FILE).is_file()


def load_config(folder: str | Path) -> PretrainConfig:
    """The configuration of the runs in this folder; ConfigError where it is damaged."""
    return _read(Path(folder) / FILE).config


@dataclass(frozen=True)
class _Kept:
    seeds: list[int]
    failures: dict[int, str]
    config: PretrainConfig


def _read(path: Path) -> _Kept:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        seeds = [int(seed) for seed in content["seeds"]]
        failures = {int(r["seed"]): str(r["failure"]) for r in content["results"]}
        config = configuration.merge(PretrainConfig(), content["config"], where=str(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} holds no runs of several seeds") from None
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): go on with each seed by itself") from error
    return _Kept(seeds, failures, config)
