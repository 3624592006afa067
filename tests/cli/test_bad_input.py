"""All that may be wrong with what a command is given: one sentence, status 2, nothing lost.

Where a part of it can be reached from Python, the exception that its documentation names stands
beside it. Every case begins with a whole run, and every file of it is the same afterwards.
"""

import errno
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tinygrad_llm import Tensor, no_grad, ops
from tinygrad_llm.cli import main
from tinygrad_llm.data import corpora
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.gpt import GPT, GPTConfig
from tinygrad_llm.storage import SUMS, write_sums
from tinygrad_llm.tasks.causal import CausalTask
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train import pretrain
from tinygrad_llm.train.log import PlainLog
from tinygrad_llm.train.run import Run
from tinygrad_llm.train.trainer import Trainer

TEXT = "".join(f"{i} and {i} make {2 * i}.\n" for i in range(60))
SMALL = ["--n-embd", "4", "--steps", "4", "--eval-every", "2", "--checkpoint-every", "2"]
BEGIN = ["pretrain", "gpt", "--preset", "tiny", *SMALL, "--max-new-tokens", "0"]
RESUME = ["pretrain", "gpt", "--resume", "run", "--steps", "6"]
GENERATE = ["generate", "--model", "run", "--max-new-tokens", "2"]
EVALUATE = ["evaluate", "--model", "run", "--data", "text.txt"]
LAST = Path("run/checkpoints/step-000004")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder with text.txt and `run`: 4 steps, checkpoints of 2 and 4, 4 being the best."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(Trainer, "_draw", lambda self: None)
        Path("text.txt").write_text(TEXT)
        assert main([*BEGIN, "--data", "text.txt", "--run", "run"]) == 0
        Run.open("run").mark_best(LAST)
    return folder


@pytest.fixture(autouse=True)
def here(template, tmp_path, monkeypatch):
    """The present folder is a copy of the template."""
    shutil.copytree(template, tmp_path, symlinks=True, dirs_exist_ok=True)
    config = Path(tmp_path, "run/config.toml")  # it names the text by its whole path
    for file in (config, *(tmp_path / "run" / "checkpoints").glob("step-*/run.toml")):
        file.write_text(file.read_text().replace(str(template), str(tmp_path)))
    for folder in (tmp_path / "run" / "checkpoints").glob("step-*"):
        write_sums(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)
    return tmp_path


def contents(folder="."):
    """Every file and link below, by its path; the lock may hold the id of who was last."""
    return {
        str(p): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in sorted(Path(folder).rglob("*"))
        if p.name != "lock"
    }


@pytest.fixture
def refused(capsys):
    """refused(arguments, words …): the one sentence they get, all files being as they were."""

    def refused(arguments, *words, status=2):
        before = contents()
        capsys.readouterr()
        assert main(arguments) == status
        found = capsys.readouterr().err
        assert found.startswith("tinygrad-llm: ")
        assert found.count("\n") == 1
        assert "Traceback" not in found
        assert len(found) < 900
        for word in words:
            assert re.search(word, found), found
        assert contents() == before
        return found

    return refused


# --- text -----------------------------------------------------------------------------------------


def _nothing():
    pass


def _folder(*files):
    def make():
        Path("it").mkdir()
        for name in files:
            Path("it", name).write_text("a = 1\n")

    return make


def _file(data):
    return lambda: Path("it").write_bytes(data)


TEXTS = {
    "missing": (_nothing, "no file 'it'"),
    "empty": (_file(b""), "'it' holds no text"),
    "blank": (_file(b" \n\n\t"), "'it' holds no text"),
    "binary": (_file(bytes(range(256)) * 9), "'it' .*binary"),
    "invalid UTF-8": (_file(b"abc \xff def" * 50), "'it' is not UTF-8 text .*0xff at position 4"),
    "UTF-16": (_file("abc".encode("utf-16") * 50), "'it' .*UTF-16"),
    "empty folder": (_folder(), "'it' holds no .txt or .md file"),
    "folder without text": (_folder("a.py", "b.csv"), "'it' holds no .txt or .md file"),
    "too short": (_file(b"abc"), "at least|longer text|needs"),
}


@pytest.mark.parametrize("what", TEXTS)
def test_a_text_that_cannot_be_used(what, refused):
    make, words = TEXTS[what]
    make()
    refused([*BEGIN, "--data", "it", "--run", "new"], words)
    if what != "too short":  # it can be evaluated on, and a tokenizer made from it
        refused([*EVALUATE, "--data", "it"], words)
        refused(["tokenizer", "train", "--kind", "bpe", "--data", "it", "--out", "tok"], words)
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            corpora.load_text("it")


def test_a_text_shorter_than_one_context(refused):
    Path("short.txt").write_text("0123456789")
    refused([*BEGIN, "--data", "short.txt"], "longer text")
    refused([*BEGIN, "--data", "text.txt", "--context", "5000"], "longer text or a shorter context")
    corpus = corpora.load_text("short.txt")
    with pytest.raises(ValueError, match="longer text"):
        CausalTask(corpus, Tokenizer.byte(), context=16, batch_size=1)


def test_a_text_that_changed_or_went_before_resume(refused):
    Path("text.txt").write_text(TEXT + "more\n")
    refused(RESUME, r"text\.txt' has changed since the run began")
    Path("text.txt").write_bytes(b"\xff")
    refused(RESUME, "is not UTF-8 text")
    Path("text.txt").unlink()
    refused(RESUME, r"no file '.*text\.txt'")


# --- configuration --------------------------------------------------------------------------------

CONFIGS = {
    "[train]\nstpes = 3\n": r"unknown key 'train\.stpes'; did you mean 'train\.steps'\?",
    "[trian]\nsteps = 3\n": r"unknown key 'trian'; did you mean 'train'\?",
    "lr = 0.1\n": r"unknown key 'lr'; did you mean 'train\.lr'\?",
    "[data]\ntokenizer = 'bqe'\n": r"must be one of .*'bqe'; did you mean 'bpe'\?",
    "[train]\nsteps = 'many'\n": r"train\.steps must be an integer, got 'many'",
    "[train]\nsteps = 3.5\n": r"train\.steps must be an integer, got 3\.5",
    "[train]\nsteps = true\n": r"train\.steps must be an integer, got True",
    "[train]\nsteps = 0\n": r"train\.steps must be at least 1, got 0",
    "[train]\nlr = nan\n": r"train\.lr must be .*nan",
    "[train]\nlr = inf\n": r"train\.lr must be .*inf",
    "[train]\nbetas = [0.9]\n": r"train\.betas must be a list of 2 numbers",
    "[model]\nn_embd = 7\n": "n_embd must be a multiple of .*n_head, got 7 and 2",
    "[model]\nn_embd = 1000000000\n": "over 10¹² parameters",
    "[model]\nn_layer = 10000000000\n": "over 10¹² parameters",
    "model = 3\n": r"model must be a section \[model\], got 3",
    "[train\nsteps = 3\n": "is not valid TOML",
    "[train]\nsteps = 3\nsteps = 4\n": "is not valid TOML",
    "\0": "is not valid TOML",
}


@pytest.mark.parametrize("text", CONFIGS)
def test_a_configuration_that_cannot_be_used(text, refused):
    Path("my.toml").write_text(text)
    arguments = ["pretrain", "gpt", "--config", "my.toml", "--preset", "tiny", "--data", "text.txt"]
    refused([*arguments, "--run", "new"], CONFIGS[text])
    if "10¹²" not in CONFIGS[text]:  # which only the model knows
        with pytest.raises(configuration.ConfigError, match=CONFIGS[text]):
            configuration.load("my.toml", configuration.preset("tiny"))


@pytest.mark.parametrize("sizes", [["--n-embd", "200000"], ["--n-layer", "1000000000"]])
def test_a_model_larger_than_the_machine(sizes, refused, monkeypatch):
    monkeypatch.setattr(pretrain, "physical_memory", lambda: 8 * 10**9)
    refused([*BEGIN, "--data", "text.txt", *sizes], "needs [0-9,]+ GB .* machine has 8:")


def test_a_configuration_file_that_is_none(refused):
    Path("my.toml").write_bytes(b"\xff\xfe")
    arguments = ["pretrain", "gpt", "--data", "text.txt", "--config"]
    refused([*arguments, "my.toml"], "my.toml is not UTF-8 text")
    refused([*arguments, "none.toml"], "no configuration file none.toml")
    refused([*arguments, "run"], "run: Is a directory")


@pytest.mark.parametrize("text", [*CONFIGS, ""])
def test_a_run_whose_config_was_edited(text, refused):
    if "10¹²" in CONFIGS.get(text, ""):
        expected = r"with model\.n_layer = 1, which cannot become \d+ on the way \(\d+ more differ"
    elif "n_head, got 7" in CONFIGS.get(text, ""):
        expected = "n_embd must be a multiple of .*n_head, got 7 and 4"
    else:
        expected = CONFIGS.get(text, r"was started with data\.source = .*, which cannot become")
    Path("run/config.toml").write_text(text)
    refused(RESUME, expected)


def test_resume_says_what_differs(refused):
    refused([*RESUME, "--lr", "0.5"], r"started with train\.lr = 0\.001, which cannot become 0\.5")
    text = Path("run/config.toml").read_text()
    Path("run/config.toml").write_text(text.replace("dropout = 0.1", "dropout = 0.2"))
    refused(RESUME, r"started with model\.dropout = 0\.1, which cannot become 0\.2")
    Path("run/config.toml").write_text(text)
    assert main(RESUME) == 0


# --- checkpoints ----------------------------------------------------------------------------------

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", SUMS)
TRAINING_FILES = ("optimizer.safetensors", "trainer.json", "run.toml")


@pytest.mark.parametrize("name", [*MODEL_FILES, *TRAINING_FILES])
def test_a_checkpoint_with_a_flipped_bit_or_cut_short(name, refused):
    whole = (LAST / name).read_bytes()
    rng = np.random.default_rng(len(name))
    damaged = [whole[: rng.integers(1, len(whole))], b""]
    for _ in range(6):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(data))
    for data in damaged:
        (LAST / name).write_bytes(data)
        refused(RESUME, name, f"to go on from step-000002, delete the folder {LAST}")
        if name in MODEL_FILES:
            refused(GENERATE, name)
            refused(EVALUATE, name)
            with pytest.raises(ValueError, match=name):
                GPT.from_pretrained(LAST)
    if name in TRAINING_FILES:  # a model can write without them
        assert main(GENERATE) == 0


def test_going_on_from_the_checkpoint_before(refused):
    """The command does what the sentence says."""
    (LAST / "model.safetensors").write_bytes(b"")
    sentence = refused(RESUME, "delete the folder")
    shutil.rmtree(sentence.split("delete the folder ")[1].strip())
    assert main(RESUME) == 0
    assert [r["step"] for r in Run.open("run").metrics()] == list(range(7))


def rewrite_config(**changes):
    path = LAST / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (LAST / SUMS).unlink()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_embd": 10**9}, "over 10¹² parameters"),
        ({"vocab_size": 10**12}, "over 10¹² parameters"),
        ({"n_layer": 10**7}, "n_layer is 1 and 10000000"),
        ({"n_positions": 10**10}, "n_positions is 16 and 10000000000"),
        ({"n_embd": -4}, "n_embd must be an integer of at least 1, got -4"),
        ({"n_embd": 0}, "n_embd must be an integer of at least 1, got 0"),
        ({"n_embd": "4"}, "n_embd must be an integer of at least 1, got '4'"),
        ({"n_embd": 4.0}, r"n_embd must be an integer of at least 1, got 4\.0"),
        ({"n_layer": True}, "n_layer must be an integer of at least 1, got True"),
        ({"n_head": math.nan}, "n_head must be an integer of at least 1, got nan"),
        ({"n_head": 3}, "n_embd must be a multiple of n_head, got 4 and 3"),
        ({"model_type": "lama"}, "model_type must be ('gpt2'|one of gpt2, bert)"),
    ],
    ids=str,
)
def test_a_config_json_with_absurd_sizes(changes, words, refused):
    rewrite_config(**changes)
    for command in (RESUME, GENERATE, EVALUATE):
        refused(command, r"config\.json", words)
    with pytest.raises(ValueError, match=words):
        GPT.from_pretrained(LAST)


def test_a_config_json_with_missing_keys(refused):
    (LAST / "config.json").write_text("{}")
    (LAST / SUMS).unlink()
    refused(RESUME, "n_embd is 4 and 768")  # which knows that it is a GPT
    for command in (GENERATE, EVALUATE):
        refused(command, "model_type must be one of gpt2, bert")


def test_weights_of_wrong_shapes(refused):
    arrays = load_file(LAST / "model.safetensors")
    name = "transformer.h.0.mlp.c_proj.weight"
    arrays[name] = np.zeros((5, 4), np.float32)
    save_file(arrays, LAST / "model.safetensors")
    (LAST / SUMS).unlink()
    words = r"h\.0\.mlp\.c_proj\.weight: expected shape \(4, 16\), got \(4, 5\)"
    for command in (RESUME, GENERATE, EVALUATE):
        refused(command, words)
    with pytest.raises(ValueError, match=words):
        GPT.from_pretrained(LAST)


def test_weights_that_are_missing_or_too_many(refused):
    arrays = load_file(LAST / "model.safetensors")
    arrays["transformer.more"] = arrays.pop("transformer.ln_f.bias")
    save_file(arrays, LAST / "model.safetensors")
    (LAST / SUMS).unlink()
    words = (r"missing: transformer\.ln_f\.bias", r"unexpected: transformer\.more")
    for command in (RESUME, GENERATE, EVALUATE):
        refused(command, *words)


@pytest.mark.parametrize(
    "head",
    [
        (2**63 - 1).to_bytes(8, "little"),
        (10**8 + 1).to_bytes(8, "little") + b"{" * 100,
        (2).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_header_that_promises_too_much(head, refused):
    (LAST / "model.safetensors").write_bytes(head)
    (LAST / SUMS).unlink()
    for command in (RESUME, GENERATE, EVALUATE):
        refused(command, "model.safetensors cannot be used")


def test_a_header_whose_tensors_overlap(refused):
    def entry(start, end):
        return {"dtype": "F32", "shape": [4], "data_offsets": [start, end]}

    header = json.dumps({"a": entry(0, 16), "b": entry(8, 24)}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(24)
    (LAST / "model.safetensors").write_bytes(data)
    (LAST / SUMS).unlink()
    refused(GENERATE, "model.safetensors cannot be used")


def test_a_vocabulary_that_does_not_fit(refused):
    larger = Tokenizer.bpe(TEXT, 300)
    larger.save(LAST)
    (LAST / SUMS).unlink()
    assert larger.vocab_size > 257
    for command in (RESUME, GENERATE, EVALUATE):
        refused(command, f"the tokenizer has {larger.vocab_size} tokens, .* 257")


def test_a_folder_that_is_no_run_and_no_checkpoint(refused):
    Path("empty").mkdir()
    for name, words in (
        ("nowhere", "no run or checkpoint nowhere|nowhere is not a run folder"),
        ("empty", "holds no checkpoint|is not a run folder"),
        ("text.txt", "holds no checkpoint|is not a run folder"),
        (str(LAST / "model.safetensors"), "holds no checkpoint|is not a run folder"),
    ):
        for flag in (
            ["generate", "--model"],
            ["evaluate", "--model"],
            ["pretrain", "gpt", "--resume"],
        ):
            refused([*flag, name], words)


# --- labels and token ids -------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, -101, 3, 2**40])
def test_labels_and_ids_out_of_range(bad):
    with pytest.raises(ValueError, match=f"target is {bad}, but the logits have classes 0 to 2"):
        ops.cross_entropy(Tensor(np.zeros((2, 3), np.float32)), [0, bad])
    with pytest.raises(IndexError, match=f"id {bad} is outside the table's rows 0 to 2"):
        ops.embedding(np.array([[0, bad]]), Tensor(np.zeros((3, 4), np.float32)))
    model = GPT(GPTConfig(vocab_size=3, n_positions=4, n_embd=4, n_layer=1, n_head=1))
    with no_grad(), pytest.raises(IndexError, match=f"id {bad} is outside the table's rows 0 to 2"):
        model(np.array([[0, bad]]))
    with pytest.raises(ValueError, match=f"target is {bad}, "):
        model.loss(np.array([[0, 1]]), np.array([[0, bad]]))


# --- while it runs --------------------------------------------------------------------------------


def test_a_loss_that_is_no_number(refused, monkeypatch, capsys):
    """Step, op and the last good checkpoint, from which it goes on; the status is 1."""
    loss, calls = CausalTask.loss, []

    def spoilt(self, model, batch):
        calls.append(model.training)
        bad = model.training and sum(calls) >= 3
        size = 1e30 if bad else 1.0
        return loss(self, model, batch) * size * size

    with monkeypatch.context() as patch:
        patch.setattr(CausalTask, "loss", spoilt)
        assert main([*BEGIN, "--data", "text.txt", "--run", "new"]) == 1
    found = capsys.readouterr().err
    assert found.count("\n") == 1
    assert re.search(
        r"^tinygrad-llm: the loss is inf .* at step 3: Multiply made infinity in .*, so training "
        r"stopped; the last good checkpoint is new/checkpoints/step-000002; ",
        found,
    )
    assert main(["pretrain", "gpt", "--resume", "new"]) == 0


@pytest.mark.parametrize("seed", range(6))
def test_a_disk_that_is_full_at_a_random_write(seed, monkeypatch, capsys):
    """Whatever call the room ends at: what was whole stays so, and --resume makes the same run."""
    expected = (LAST / "model.safetensors").read_bytes()
    left = random.Random(seed).randint(0, 55)

    def filling(call):
        def wrapped(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*arguments, **options)

        return wrapped

    with monkeypatch.context() as full:
        for owner, name in (
            *((os, name) for name in ("fsync", "replace", "mkdir", "symlink")),
            *((Path, name) for name in ("write_text", "write_bytes")),
            (Run, "append"),
        ):
            full.setattr(owner, name, filling(getattr(owner, name)))
        full.setattr("safetensors.numpy.save_file", filling(save_file))
        status = main([*BEGIN, "--data", "text.txt", "--run", "new"])
    found = capsys.readouterr().err
    if left < 0:
        assert status == 2
        assert found.startswith("tinygrad-llm: ")
        assert "No space left on device" in found
        assert found.count("\n") == 1
        assert "Traceback" not in found
    for folder in Path("new").glob("checkpoints/step-*"):
        assert GPT.from_pretrained(folder).config.n_embd == 4
    if Path("new/config.toml").exists():
        again = main(["pretrain", "gpt", "--resume", "new"])
        assert again == 0 or "has done 4 of 4 steps" in capsys.readouterr().err
    else:
        assert main([*BEGIN, "--data", "text.txt", "--run", "new"]) == 0
    assert Path("new", *LAST.parts[1:], "model.safetensors").read_bytes() == expected


def another(code, *arguments):
    """A second process, once it has printed a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_run_that_another_process_works_on(refused):
    code = """
import sys
from tinygrad_llm.train.run import Run
run = Run.open(sys.argv[1])
run.hold()
print("ready", flush=True)
sys.stdin.read()
"""
    with another(code, "run") as process:
        try:
            refused(RESUME, rf"run is in use by another process \(pid {process.pid}\)")
            assert main(GENERATE) == 0  # reading is no trouble
        finally:
            process.kill()
    assert main(RESUME) == 0


@pytest.mark.parametrize(
    "line",
    [b"nonsense", b"\xff\xfe", b'{"step": "1"}', b"[" * 10**5, b"7"],
    ids=lambda b: repr(b[:9]),
)
def test_metrics_with_a_line_of_garbage(line, refused):
    path = Path("run/metrics.jsonl")
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, line + b"\n", *rest]))
    refused(RESUME, r"metrics\.jsonl is damaged: line 2 is no record of a step; delete that line")
    path.write_bytes(b"".join([first, *rest, line + b"\n"]))  # behind the checkpoint
    assert main(RESUME) == 0
    assert [r["step"] for r in Run.open("run").metrics()] == list(range(7))


def test_a_run_folder_that_cannot_be(refused):
    refused([*BEGIN, "--data", "text.txt", "--run", "text.txt"], "text.txt is in use")
    refused([*BEGIN, "--data", "text.txt", "--run", "text.txt/new"], "Not a directory")
    refused([*BEGIN, "--data", "text.txt", "--run", "run"], "holds a run already")


# --- real file systems ----------------------------------------------------------------------------


def in_namespace(script):
    """Run a shell script that may mount; skip where the system does not let us."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs unshare")
    enter = [unshare, "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*enter, "mount -t tmpfs none /mnt"], capture_output=True).returncode:
        pytest.skip("no mounts are allowed here")
    program = f"{sys.executable} -m tinygrad_llm"
    command = [*enter, script.replace("PROGRAM", program)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_file_system_that_is_full():
    """150 kB hold the run's beginning and some checkpoints, not all of them."""
    begin = " ".join([*BEGIN, "--data", "text.txt", "--run", "new/run"])
    many = "--steps 40 --checkpoint-every 1"
    done = in_namespace(
        f"mkdir new; mount -t tmpfs -o size=150k none new && PROGRAM {begin} {many}; "
        "status=$?; cp -a new/run kept; exit $status"
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(
        "tinygrad-llm: new/run cannot be written (No space left on device"
    )
    assert done.stderr.count("\n") == 1
    saved = sorted(Path("kept/checkpoints").glob("step-*"))
    assert len(saved) >= 1
    for folder in saved:
        GPT.from_pretrained(folder)
    settings = configuration.load("kept/config.toml")
    ready = pretrain.resume(Run.open("kept"), settings, PlainLog(io.StringIO()))
    assert ready.trainer.step == len(saved)
    ready.run.close()


def test_a_folder_that_is_read_only():
    before = contents("run")
    done = in_namespace(
        f"mount --bind run run && mount -o remount,bind,ro run && {' '.join(['PROGRAM', *RESUME])}"
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write into the run folder run (Read-only file system)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents("run") == before
