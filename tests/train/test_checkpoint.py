"""A checkpoint that is not what was saved is refused, wherever it was changed, in one sentence."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest

from tinygrad_llm import backend
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.storage import SUMS
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train import pretrain
from tinygrad_llm.train.checkpoint import CheckpointError, unusable
from tinygrad_llm.train.log import PlainLog
from tinygrad_llm.train.run import Run

FILES = (
    *("config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json"),
    *("trainer.json", "run.toml", SUMS, "ema/config.json", "ema/model.safetensors", f"ema/{SUMS}"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has done 4 steps, with checkpoints of steps 2 and 4 and an averaged model."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("".join(f"{i} and {i}.\n" for i in range(60)))
    tiny = configuration.preset("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.Trainer, "_draw", lambda self: None)
        settings = dataclasses.replace(
            tiny,
            data=dataclasses.replace(tiny.data, source=str(folder / "text.txt")),
            model=dataclasses.replace(tiny.model, n_embd=4),
            train=dataclasses.replace(
                tiny.train, steps=4, eval_every=2, checkpoint_every=2, ema=0.9, eval_batches=1
            ),
        )
        pretrain.start(settings, folder / "run", PlainLog(io.StringIO())).trainer.fit()
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def resume(folder, **changes):
    """The run as it would go on, two more steps being allowed."""
    run = Run.open(folder)
    settings = configuration.load(run.config_file)
    train = dataclasses.replace(settings.train, steps=6, **changes)
    ready = pretrain.resume(
        run, dataclasses.replace(settings, train=train), PlainLog(io.StringIO())
    )
    ready.run.close()
    return ready


def contents(folder):
    found = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}
    assert len(found) > 10
    return found


def refused(run):
    """The sentence, all else being as it was."""
    before = contents(run)
    with pytest.raises(CheckpointError) as caught:
        resume(run)
    assert contents(run) == before
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 700
    return sentence


def test_bits_flipped_at_200_random_places(run):
    last = run / "checkpoints" / "step-000004"
    rng = np.random.default_rng(0)
    for place in range(200):
        file = last / FILES[place % len(FILES)]
        whole = file.read_bytes()
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        sentence = refused(run)
        assert str(file) in sentence
        assert sentence.endswith(f"to go on from step-000002, delete the folder {last}")
        file.write_bytes(whole)
    assert resume(run).trainer.step == 4


def test_cuts_at_random_lengths_and_missing_files(run):
    last = run / "checkpoints" / "step-000004"
    rng = np.random.default_rng(1)
    for name in FILES:
        whole = (last / name).read_bytes()
        for length in (0, 1, *rng.integers(0, len(whole), 5), len(whole) - 1):
            (last / name).write_bytes(whole[:length])
            assert str(last / name) in refused(run)
        if not name.endswith(SUMS):
            (last / name).unlink()
            assert str(last) in refused(run)
        (last / name).write_bytes(whole)
    shutil.rmtree(last / "ema")
    assert "ema" in refused(run)


def test_what_the_sentence_says_is_what_helps(run):
    for step, advice in ((4, "to go on from step-000002"), (2, "to begin from the start")):
        folder = run / "checkpoints" / f"step-00000{step}"
        with (folder / "optimizer.safetensors").open("r+b") as file:
            file.truncate(100)
        sentence = refused(run)
        assert sentence.endswith(f"; {advice}, delete the folder {folder}")
        shutil.rmtree(folder)
    ready = resume(run)
    assert ready.trainer.step == 0
    ready.run.begin(ready.run.config_file.read_text())
    ready.trainer.fit()
    assert [r["step"] for r in ready.run.metrics()] == list(range(7))


def test_the_checkpoint_before_is_the_one_with_the_next_lower_number(tmp_path):
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        (tmp_path / f"step-{step:06d}").mkdir()
    error = unusable(tmp_path / "step-1000000", "it is damaged")
    assert str(error).startswith("it is damaged; to go on from step-999999, delete the folder")


def complaint(run):
    """What is wrong with the run, where that is known; another exception is a failure."""
    try:
        resume(run)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def test_without_checksums_no_flip_ends_in_another_error(run):
    """As in a folder that somebody made: what is read is refused in a sentence, or is whole."""
    last = run / "checkpoints" / "step-000004"
    for path in (last / SUMS, last / "ema" / SUMS):
        path.unlink()
    rng = np.random.default_rng(2)
    for name in (name for name in FILES if not name.endswith(SUMS)):
        whole = (last / name).read_bytes()
        head = 8 + int.from_bytes(whole[:8], "little") if "safetensors" in name else len(whole)
        for _ in range(40):
            data = bytearray(whole)
            data[rng.integers(head)] ^= 1 << int(rng.integers(8))
            (last / name).write_bytes(data)
            assert "\n" not in complaint(run)
        (last / name).write_bytes(whole)


@pytest.mark.parametrize(
    "key", ["step", "tokens", "elapsed", "best", "optimizer", "limits", "data"]
)
@pytest.mark.parametrize("value", [None, "4", -1, 1e400, [], {}, [[1]], True])
def test_a_state_of_the_wrong_kind_is_refused_or_harmless(run, key, value):
    last = run / "checkpoints" / "step-000004"
    (last / SUMS).unlink()
    state = json.loads((last / "trainer.json").read_text())
    (last / "trainer.json").write_text(json.dumps(state | {key: value}))
    sentence = complaint(run)
    assert "\n" not in sentence
    if not sentence:
        ready = resume(run)
        ready.run.begin(ready.run.config_file.read_text())
        ready.trainer.fit()


def test_the_configuration_of_a_run_is_that_of_its_checkpoint(run):
    """An edited config.toml must not give a run that is neither the old one nor a new one."""
    config = run / "config.toml"
    text = config.read_text()
    assert (run / "checkpoints" / "step-000004" / "run.toml").read_text() == text
    for key, edited in (("train.lr", "lr = 0.5\n"), ("model.n_embd", "n_embd = 8\n")):
        name = key.partition(".")[2]
        changed = "".join(
            edited if line.startswith(f"{name} =") else line for line in text.splitlines(True)
        )
        config.write_text(changed)
        with pytest.raises(ValueError, match=rf"started with {key} = .*, which cannot become"):
            resume(run)
        assert config.read_text() == changed
    config.write_text(text)
    (run / "checkpoints" / "step-000004" / "run.toml").unlink()
    (run / "checkpoints" / "step-000004" / SUMS).unlink()
    resume(run)


def test_the_tokenizer_of_another_model_is_refused(run):
    last = run / "checkpoints" / "step-000004"
    Tokenizer.bpe("and so on and on", 300).save(last)
    assert "tokenizer.json is not as it was saved" in refused(run)
    (last / SUMS).unlink()
    assert "tokens, but the model's vocab_size is 257" in refused(run)


def test_a_resumed_run_draws_from_where_it_stopped(run):
    """The state that was compared is the state that is used."""
    resume(run)
    state = json.loads((run / "checkpoints" / "step-000004" / "trainer.json").read_text())
    assert backend.random.state() == state["random"]
