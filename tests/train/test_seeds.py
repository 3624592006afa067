"""Several seeds in one folder: the same runs as one by one, resumed as a whole, mean and spread."""

import dataclasses
import io
import json
import math
import signal
import statistics

import pytest

from tinygrad_llm.train import config as configuration
from tinygrad_llm.train import pretrain
from tinygrad_llm.train.config import ConfigError
from tinygrad_llm.train.log import PlainLog
from tinygrad_llm.train.seeds import SeedRuns, Spread, is_seeds, load_config
from tinygrad_llm.train.trainer import Interrupted, Trainer

TEXT = "".join(f"{i} and {i} make {2 * i}.\n" for i in range(400))


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    tiny = configuration.preset("tiny")
    train = dataclasses.replace(
        tiny.train, steps=6, eval_every=2, checkpoint_every=3, lr_groups={"wte": 0.5}, mfu=False
    )
    data = dataclasses.replace(tiny.data, source=str(tmp_path / "text.txt"))
    return dataclasses.replace(tiny, data=data, train=train)


class Stopping(PlainLog):
    """Raises a signal at the n-th record of a step."""

    def __init__(self, count=0):
        super().__init__(io.StringIO())
        self.count = count

    def record(self, record):
        super().record(record)
        self.count -= "loss" in record
        if self.count == 0 and "loss" in record:
            signal.raise_signal(signal.SIGINT)


def train(runs, log=None):
    log = log or Stopping()
    trained = []
    try:
        for seed in runs.seeds:
            if ready := runs.prepare(seed, log):
                trained.append(seed)
                ready.trainer.fit()
            runs.note(seed)
    finally:
        runs.close()
    return trained


def weights(folder, seed):
    run = folder / f"seed-{seed}" / "checkpoints" / "latest"
    return (run / "model.safetensors").read_bytes()


def test_each_is_the_run_that_its_seed_makes_alone(config, tmp_path):
    runs = SeedRuns.start(config, 3, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    assert train(runs) == runs.seeds == [1, 2, 3]
    for seed in (1, 3):
        alone = pretrain.start(runs.config_of(seed), tmp_path / f"alone-{seed}", Stopping())
        alone.trainer.fit()
        ours = tmp_path / "runs" / f"seed-{seed}"
        assert (ours / "config.toml").read_text() == alone.run.config_file.read_text()
        assert (
            weights(tmp_path / "runs", seed)
            == (alone.run.checkpoints_folder / "latest/model.safetensors").read_bytes()
        )
    assert len({weights(tmp_path / "runs", seed) for seed in (1, 2, 3)}) == 3


def test_what_came_of_them_is_in_the_file(config, tmp_path):
    runs = SeedRuns.start(config, 3, tmp_path / "runs")
    train(runs)
    content = json.loads(runs.file.read_text())
    assert content["seeds"] == [1, 2, 3]
    losses = [runs.run(seed).metrics()[-1]["val_loss"] for seed in runs.seeds]
    assert [result["val_loss"] for result in content["results"]] == losses
    assert [result["step"] for result in content["results"]] == [6, 6, 6]
    assert content["val_loss"] == {
        "n": 3,
        "mean": pytest.approx(sum(losses) / 3),
        "std": pytest.approx(statistics.stdev(losses)),
    }
    assert load_config(runs.folder) == config
    assert is_seeds(runs.folder)
    assert not is_seeds(runs.folder / "seed-1")
    assert runs.draw() is None
    assert runs.picture_file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("steps", [1, 6, 8, 14])
def test_an_interrupted_sequence_goes_on(config, tmp_path, steps):
    train(SeedRuns.start(config, 3, tmp_path / "whole"))
    runs = SeedRuns.start(config, 3, tmp_path / "cut")
    if steps == 6:  # a signal in the last step of a run lets it end: then the next one begins
        assert train(runs, Stopping(steps)) == [1, 2, 3]
    else:
        with pytest.raises(Interrupted):
            train(runs, Stopping(steps))
        begun = 1 + steps // 6
        assert len(list(runs.folder.glob("seed-*"))) == begun
        assert train(SeedRuns.resume(tmp_path / "cut")) == [1, 2, 3][begun - 1 :]
    for seed in (1, 2, 3):
        assert weights(tmp_path / "cut", seed) == weights(tmp_path / "whole", seed)
    ours, theirs = (json.loads((tmp_path / n / "seeds.json").read_text()) for n in ("cut", "whole"))
    assert ours == theirs
    assert train(SeedRuns.resume(tmp_path / "cut")) == []


def test_more_steps_for_all_and_nothing_else(config, tmp_path):
    train(SeedRuns.start(config, 2, tmp_path / "runs"))
    more = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=7))
    assert train(SeedRuns.resume(tmp_path / "runs", more)) == [1, 2]
    assert load_config(tmp_path / "runs").train.steps == 7
    other = dataclasses.replace(more, train=dataclasses.replace(more.train, lr=0.5))
    with pytest.raises(ConfigError, match=r"runs was started with train\.lr .* cannot become 0\.5"):
        SeedRuns.resume(tmp_path / "runs", other)


def test_a_seed_that_failed_is_told_and_not_averaged(config, tmp_path):
    runs = SeedRuns.start(config, 3, tmp_path / "runs")
    train(runs)
    runs.note(2, "the loss is nan")
    losses = [result.val_loss for result in runs.results() if result.seed != 2]
    assert runs.spread() == Spread.of([loss for loss in losses if loss is not None])
    assert json.loads(runs.file.read_text())["results"][1]["failure"] == "the loss is nan"
    again = SeedRuns.resume(tmp_path / "runs")
    assert again.failures[2] == "the loss is nan"
    again.close()


def test_spread_is_the_samples():
    assert Spread.of([]) is None
    assert Spread.of([2.0]) == Spread(1, 2.0, None)
    assert Spread.of([1.0, 2.0, 6.0]) == Spread(3, 3.0, math.sqrt((4 + 1 + 9) / 2))


def test_two_processes_never_share_the_folder(config, tmp_path):
    runs = SeedRuns.start(config, 1, tmp_path / "runs")
    train(runs)
    held = SeedRuns.resume(tmp_path / "runs")
    with pytest.raises(OSError, match="in use by another process"):
        SeedRuns.resume(tmp_path / "runs")
    held.close()
    SeedRuns.resume(tmp_path / "runs").close()


@pytest.mark.parametrize("count", [0, -1])
def test_no_seeds_are_refused(config, tmp_path, count):
    with pytest.raises(ConfigError, match="seeds must be at least 1"):
        SeedRuns.start(config, count, tmp_path / "runs")


def test_folders_that_cannot_be_used(config, tmp_path):
    runs = SeedRuns.start(config, 1, tmp_path / "runs")
    train(runs)
    with pytest.raises(FileExistsError, match=r"runs holds runs already: go on with --resume"):
        SeedRuns.start(config, 1, tmp_path / "runs")
    with pytest.raises(FileNotFoundError, match="holds no runs of several seeds"):
        SeedRuns.resume(tmp_path / "none")
    whole = runs.file.read_text()
    for spoilt in ("{", "[]", "{}", whole.replace('"seeds"', '"sedes"'), whole[: len(whole) // 2]):
        runs.file.write_text(spoilt)
        with pytest.raises(ConfigError, match=r"seeds\.json is damaged") as caught:
            SeedRuns.resume(tmp_path / "runs")
        assert "\n" not in str(caught.value)


def test_a_text_that_is_not_there_leaves_no_folder(config, tmp_path):
    gone = dataclasses.replace(config, data=dataclasses.replace(config.data, source="no/such.txt"))
    runs = SeedRuns.start(gone, 2, tmp_path / "runs")
    with pytest.raises(FileNotFoundError):
        runs.prepare(1, Stopping())
    assert not (tmp_path / "runs").exists()
