"""`pretrain`: several seeds, rates by group, texts on the way, each architecture, refusals."""

import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tinygrad_llm.cli import main
from tinygrad_llm.cli import pretrain as command
from tinygrad_llm.train import pretrain as training
from tinygrad_llm.train.gradient import Gradient
from tinygrad_llm.train.trainer import Trainer

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
COMMAND = [sys.executable, "-m", "tinygrad_llm"]


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A small text in the present folder, which is a fresh one."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"{i} and {i} make {2 * i}.\n" for i in range(300)))


def pretrain(*arguments):
    return ["pretrain", "gpt", "--preset", "tiny", "--data", "text.txt", "--no-mfu", *arguments]


def weights(run):
    return Path(run, "checkpoints/latest/model.safetensors").read_bytes()


# --- several seeds --------------------------------------------------------------------------------


def test_several_seeds_end_with_mean_and_spread(text, capsys):
    assert main(pretrain("--seeds", "2", "--seed", "5", "--run", "my runs", "--steps", "10")) == 0
    out = capsys.readouterr().out
    assert not CONTROL.search(out)
    content = json.loads(Path("my runs/seeds.json").read_text())
    a, b = (f"{result['val_loss']:.4f}" for result in content["results"])
    mean, std = (f"{content['val_loss'][key]:.4f}" for key in ("mean", "std"))
    table = out[out.index("seed  steps") :].splitlines()
    assert [line.split()[:3] for line in table[1:3]] == [["5", "10", a], ["6", "10", b]]
    assert [line.split()[:2] for line in table[3:5]] == [["mean", mean], ["std", std]]
    assert f"val loss {mean} ± {std} (mean ± sample standard deviation, 2 seeds)" in out
    assert "loss curve: my runs/loss.png" in out
    assert Path("my runs/loss.png").exists()

    commands = re.findall(r"^(?:resume|sample): +(.*)$", out, flags=re.MULTILINE)
    assert len(commands) == 2
    for line in commands:  # as pasted into a shell
        done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
        assert done.stderr == ""
    assert main(pretrain("--run", "alone", "--seed", "6", "--steps", "10")) == 0
    assert main(["pretrain", "gpt", "--resume", "alone", "--steps", "20"]) == 0
    assert weights("my runs/seed-6") == weights("alone")


def test_seeds_that_are_done_are_told_again(text, capsys):
    assert main(pretrain("--seeds", "2", "--run", "runs", "--quiet")) == 0
    table = capsys.readouterr().out
    assert table.split()[:4] == ["seed", "steps", "val", "loss"]
    assert main(["pretrain", "gpt", "--resume", "runs", "--quiet"]) == 0
    assert capsys.readouterr().out == table
    assert main(["pretrain", "gpt", "--resume", "runs", "--json"]) == 0
    *said, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert {"message": "seed 2 is done"} in said
    assert [result["seed"] for result in last["results"]] == [1, 2]
    assert last["val_loss"]["n"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume", "runs", "--seeds", "3"], "leave out --seeds"),
        (["--resume", "runs", "--lr", "0.5"], "cannot become 0.5"),
        (["--seeds", "2", "--run", "runs"], "runs holds runs already: go on with --resume runs"),
        (["--seeds", "-2", "--run", "more"], "seeds must be at least 1, got -2"),
        (["--seeds", "x", "--run", "more"], "--seeds"),
        (["--seeds", "2", "--data", "no/such.txt", "--run", "more"], "no/such.txt"),
    ],
)
def test_seeds_that_cannot_be(text, capsys, arguments, words):
    assert main(pretrain("--seeds", "1", "--run", "runs", "--steps", "1")) == 0
    capsys.readouterr()
    assert main(["pretrain", "gpt", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not Path("more").exists()


def test_a_seed_that_diverges_does_not_stop_the_others(text, capsys, monkeypatch):
    gradient, step, now = Gradient.__call__, Trainer.train_step, [False]

    def noting(self):
        now[0] = self.config.seed == 2 and self.step == 12
        return step(self)

    def spoilt(self, parts):
        loss = gradient(self, parts)
        return float("nan") if now[0] else loss

    monkeypatch.setattr(Trainer, "train_step", noting)
    monkeypatch.setattr(Gradient, "__call__", spoilt)
    assert main(pretrain("--seeds", "3", "--run", "runs")) == 1
    out, err = capsys.readouterr()
    assert re.search(r"^tinygrad-llm: seed 2: the loss is nan .* at step 13.*step-000010;", err)
    assert re.search(r"^ +2 +12 +failed ", out, re.MULTILINE)
    assert ", 2 seeds)" in out
    results = json.loads(Path("runs/seeds.json").read_text())["results"]
    assert [bool(result["failure"]) for result in results] == [False, True, False]
    monkeypatch.setattr(Gradient, "__call__", gradient)
    assert main(["pretrain", "gpt", "--resume", "runs"]) == 0  # that seed goes on
    assert ", 3 seeds)" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_seeds_and_prints_the_command_that_goes_on(text, number):
    forever = pretrain("--seeds", "3", "--run", "it's mine", "--steps", "100000")
    metrics = Path("it's mine/seed-1/metrics.jsonl")
    with subprocess.Popen(
        [*COMMAND, *forever], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        until = time.monotonic() + 60
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > 500):
            assert time.monotonic() < until, "training does not start"
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == ""
    match = re.search(rf"{number.name} after step (\d+); saved\. Go on with:\n  (.*)\n", out)
    assert match is not None, out
    assert not Path("it's mine/seed-2").exists()
    steps = int(match[1]) + 2
    done = subprocess.run(f"{match[2]} --steps {steps}", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads(Path("it's mine/seeds.json").read_text())["results"]
    assert [(result["seed"], result["step"]) for result in results] == [
        (1, steps),
        (2, steps),
        (3, steps),
    ]


def test_ctrl_c_between_two_seeds_prints_the_command_too(text, capsys, monkeypatch):
    start, begun = training.start, []

    def stopped(*arguments):
        if begun:
            raise KeyboardInterrupt
        begun.append(1)
        return start(*arguments)

    monkeypatch.setattr(training, "start", stopped)
    assert main(pretrain("--seeds", "2", "--run", "runs")) == 130
    out = capsys.readouterr().out
    assert re.search(r"stopped by SIGINT\. Go on with:\n  .* pretrain gpt --resume runs\n", out)
    monkeypatch.setattr(training, "start", start)
    assert main(["pretrain", "gpt", "--resume", "runs"]) == 0
    assert Path("runs/seed-2/loss.png").exists()


# --- one run --------------------------------------------------------------------------------------


def test_rates_and_texts_by_flags(text, capsys):
    rates = ["--lr-groups", "wte=0.1", "h.0.*=2", "--gradient-checkpointing"]
    assert main(pretrain("--run", "run", *rates, "--sample-every", "10")) == 0
    out = capsys.readouterr().out
    config = Path("run/config.toml").read_text()
    assert 'lr_groups = {"wte" = 0.1, "h.0.*" = 2.0}\n' in config
    assert "gradient_checkpointing = true\n" in config
    assert len(re.findall(r"^step \d0 writes: '.*'$|^step \d0 writes: \".*\"$", out, re.M)) == 2
    lines = Path("run/samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20]
    assert not CONTROL.search(out)
    assert main(["pretrain", "gpt", "--config", "run/config.toml", "--run", "again"]) == 0
    assert weights("again") == weights("run")


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        ("wtee=0.1", "lr_groups: 'wtee' matches no parameter; the nearest is 'wte'"),
        ("wte", "--lr-groups: expected PATTERN=FACTOR, such as wte=0.1, got 'wte'"),
        ("wte=x", "expected PATTERN=FACTOR, such as wte=0.1, got 'wte=x'"),
        ("wte=-1", "train.lr_groups wte must be 0 or more, got -1.0"),
    ],
)
def test_rates_that_mean_nothing(text, capsys, factor, words):
    assert main(pretrain("--run", "run", "--lr-groups", factor)) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not Path("run").exists()


def test_programs_are_told_in_json(text, capsys):
    assert main(pretrain("--run", "run", "--json")) == 0
    *said, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [o["step"] for o in said if "step" in o] == list(range(21))
    assert last["run"] == "run"
    assert last["step"] == 20
    assert last["val_loss"] == said[-1]["val_loss"]
    assert last["tokens_per_second"] > 0
    assert isinstance(last["sample"], str)


def test_quiet_tells_the_result_only(text, capsys):
    assert main(pretrain("--run", "run", "--quiet")) == 0
    out = capsys.readouterr().out
    assert re.fullmatch(r"run: val loss \d\.\d{4} after 20 steps\n", out)


def test_the_speed_is_told_with_its_share_of_the_peak(text, capsys, monkeypatch):
    monkeypatch.setattr(training, "measured_peak", lambda device: 1e9)
    assert main([*pretrain("--run", "run"), "--mfu"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^speed: +[\d,]+ tokens/s, \d+% of the measured peak \(median", out, re.M)
    assert main(pretrain("--run", "without")) == 0
    out = capsys.readouterr().out
    assert re.search(r"^speed: +[\d,]+ tokens/s \(median over the steps\)$", out, re.M)


def test_too_little_memory_is_one_sentence(text, capsys, monkeypatch):
    def large(*_):
        np.empty(2**60, np.uint8)

    with monkeypatch.context() as small:
        small.setattr(Gradient, "__call__", large)
        assert main(pretrain("--run", "run")) == 2
    err = capsys.readouterr().err
    assert "not enough memory to go on after step 0 with batch_size 4 and context 16" in err
    assert "there is no checkpoint yet" in err
    assert err.count("\n") == 1
    with monkeypatch.context() as small:
        small.setattr(training, "new_model", large)
        assert main(pretrain("--run", "other")) == 2
    err = capsys.readouterr().err
    assert "there is not enough memory to begin (Unable to allocate" in err
    assert not Path("other").exists()


def test_help_has_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", "gpt", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for flag in (
        "--seeds",
        "--lr-groups",
        "--gradient-checkpointing",
        "--sample-every",
        "--no-mfu",
    ):
        assert flag in out


def test_the_examples_in_the_help_run(text, capsys):
    """As they stand there, but for a size and a number of steps that take no time."""
    Path("text.txt").rename("book.txt")
    small = shlex.split(
        "--data book.txt --steps 2 --batch-size 2 --context 8 --n-layer 2 --n-head 2 --n-embd 8 "
        "--vocab-size 260 --eval-batches 1 --max-new-tokens 1 --no-mfu --quiet"
    )
    examples = [
        shlex.split(line)[1:]
        for line in command.HELP.splitlines()
        if line.startswith("  tinygrad-llm ")
    ]
    assert len(examples) >= 6
    for example in examples:
        short = ["--steps", "3", "--quiet"] if "--resume" in example else small
        assert main([*example, *short]) == 0, example
        assert "val loss" in capsys.readouterr().out


# --- each architecture ----------------------------------------------------------------------------

OTHERS = ["llama", "bert", "lstm", "t5"]


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """Several documents of several sentences: BERT's pairs come from such."""
    monkeypatch.chdir(tmp_path)
    texts = ["".join(f"{i + j} and {i} make {2 * i + j}. " for i in range(9)) for j in range(40)]
    Path("text.txt").write_text("\n<|endoftext|>\n".join(texts))


def tiny(architecture, *arguments):
    data = ["--preset", "tiny", "--data", "text.txt", "--eval-batches", "2"]
    return ["pretrain", architecture, *data, *arguments]


def records(run):
    """metrics.jsonl without what tells the time."""
    lines = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    timed = ("elapsed", "tokens_per_second", "hidden_words_per_second", "mfu")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


@pytest.mark.parametrize("architecture", OTHERS)
def test_each_architecture_trains_and_resumes_bit_for_bit(documents, capsys, architecture):
    often = ["--steps", "4", "--checkpoint-every", "2", "--eval-every", "2"]
    assert main(tiny(architecture, *often, "--run", "whole")) == 0
    out = capsys.readouterr().out
    assert f"pretrain {architecture} --resume whole --steps 8" in out
    assert ("generate --model whole" in out) == (architecture in ("llama", "lstm"))
    config = Path("whole/config.toml").read_text()
    assert f'architecture = "{architecture}"\n' in config
    assert f"pretrain {architecture} --config" in config

    assert main(tiny(architecture, *often[2:], "--steps", "4", "--run", "stopped")) == 0
    shutil.rmtree("stopped/checkpoints/step-000004")  # as if it had not come so far
    capsys.readouterr()
    assert main(["pretrain", architecture, "--resume", "stopped"]) == 0
    assert weights("stopped") == weights("whole")
    assert records("stopped") == records("whole")

    # A run's own file says the whole of it.
    assert main(["pretrain", architecture, "--config", "whole/config.toml", "--run", "again"]) == 0
    assert weights("again") == weights("whole")


@pytest.mark.parametrize("architecture", OTHERS)
def test_each_architecture_learns_one_batch_by_heart(documents, capsys, architecture):
    hard = ["--overfit-one-batch", "--steps", "60", "--lr", "0.03", "--eval-every", "60"]
    assert main(tiny(architecture, *hard, "--checkpoint-every", "60", "--run", "run")) == 0
    first, *_, last = records("run")
    assert last["val_loss"] < 0.7 * first["val_loss"]


@pytest.mark.parametrize("architecture", OTHERS)
def test_two_processes_and_two_seeds(documents, capsys, architecture):
    few = ["--steps", "2", "--eval-every", "2", "--checkpoint-every", "2", "--quiet"]
    assert main(tiny(architecture, *few, "--processes", "2", "--run", "a")) == 0
    assert main(tiny(architecture, *few, "--processes", "2", "--run", "b")) == 0
    assert weights("a") == weights("b")
    assert main(tiny(architecture, *few, "--seeds", "2", "--run", "seeds")) == 0
    capsys.readouterr()
    assert main(["pretrain", architecture, "--resume", "seeds", "--quiet"]) == 0
    assert "mean" in capsys.readouterr().out


@pytest.mark.parametrize("architecture", OTHERS)
def test_each_architecture_trains_in_half_precision(documents, architecture):
    few = ["--steps", "2", "--eval-every", "2", "--quiet", "--dtype", "bfloat16"]
    assert main(tiny(architecture, *few, "--run", "run")) == 0
    assert math.isfinite(records("run")[-1]["val_loss"])


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_blocks_computed_again_give_the_same_weights(documents, architecture):
    few = ["--steps", "3", "--quiet"]
    assert main(tiny(architecture, *few, "--run", "kept")) == 0
    assert main(tiny(architecture, *few, "--gradient-checkpointing", "--run", "again")) == 0
    assert weights("kept") == weights("again")


def test_bert_tells_both_guesses_beside_what_needs_no_skill(documents, capsys):
    assert main(tiny("bert", "--run", "run", "--whole-words")) == 0
    out = capsys.readouterr().out
    assert re.search(r"^to train on: [\d,]+ tokens in [\d,]+ sentences of \d+ documents", out, re.M)
    assert re.search(r"^masked accuracy: [\d.]+% \(without skill [\d.]+%\)$", out, re.M)
    assert re.search(r"^next accuracy: [\d.]+% \(without skill [\d.]+%\)$", out, re.M)
    assert "whole_words = true\n" in Path("run/config.toml").read_text()
    last = records("run")[-1]
    assert last["val_loss"] == pytest.approx(last["val_masked_loss"] + last["val_next_loss"])
    assert {"val_unigram_loss", "val_majority_masked", "val_majority_next"} <= last.keys()
    assert main(["generate", "--model", "run"]) == 2
    assert (
        "holds a BertForPreTraining, which reads texts and writes none" in capsys.readouterr().err
    )


@pytest.mark.parametrize("architecture", ["llama", "lstm"])
def test_evaluate_scores_those_that_predict_the_next_token(documents, capsys, architecture):
    whole = ["--steps", "2", "--eval-batches", "0", "--quiet", "--run", "run"]
    assert main(tiny(architecture, *whole)) == 0
    capsys.readouterr()
    assert main(["evaluate", "--model", "run", "--split", "val", "--json"]) == 0
    score = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert score["loss"] == pytest.approx(records("run")[-1]["val_loss"], rel=1e-4)


@pytest.mark.parametrize("architecture", ["bert", "t5"])
def test_evaluate_refuses_the_others(documents, capsys, architecture):
    assert main(tiny(architecture, "--steps", "1", "--quiet", "--run", "run")) == 0
    assert main(["evaluate", "--model", "run"]) == 2
    assert "does not predict each token of a text" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["llama", "lstm", "t5"])
def test_generate_writes_with_each_that_can(documents, capsys, architecture):
    assert main(tiny(architecture, "--steps", "1", "--quiet", "--run", "run")) == 0
    capsys.readouterr()
    assert main(["generate", "--model", "run", "--prompt", "1 and", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("1 and")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lstm", "--n-head", "2"], "--n-head is nothing that pretraining lstm has: it is for gpt"),
        (
            ["gpt", "--whole-words"],
            "--whole-words is nothing that pretraining gpt has: it is for b",
        ),
        (["bert", "--prompt", "x"], "--prompt is nothing that pretraining bert has"),
        (["bert", "--sample-every=5"], "--sample-every is nothing that pretraining bert has"),
        (["t5", "--gradient-checkpointing"], "it is for gpt, llama, bert"),
        (["bert", "--preset", "gpt2"], "unknown preset 'gpt2' of bert"),
        (["bert", "--tokenizer", "byte"], "has no [PAD]"),
        (["bert", "--mask-probability", "1.5"], "masking.mask_probability must be in (0, 1)"),
        (["t5", "--mean-span", "0.5"], "span.mean_span must be at least 1, got 0.5"),
        (
            ["lstm", "--config", "heads.toml"],
            "heads.toml: model.n_head is nothing that pretraining",
        ),
        (
            ["gpt", "--config", "lstm.toml"],
            "lstm.toml is of the architecture lstm: say pretrain lst",
        ),
        (["lstm", "--config", "rnn.toml"], "model.architecture must be one of gpt, llama, bert"),
    ],
)
def test_what_an_architecture_has_not_is_refused(documents, capsys, arguments, words):
    Path("heads.toml").write_text("[model]\nn_head = 2\n")
    Path("lstm.toml").write_text('[model]\narchitecture = "lstm"\n')
    Path("rnn.toml").write_text('[model]\narchitecture = "rnn"\n')
    name, *flags = arguments
    assert main(["pretrain", name, "--data", "text.txt", "--run", "run", *flags]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not Path("run").exists()


def test_a_run_is_gone_on_with_as_what_it_is(documents, capsys):
    assert main(tiny("lstm", "--steps", "1", "--quiet", "--run", "run")) == 0
    capsys.readouterr()
    assert main(["pretrain", "gpt", "--resume", "run", "--steps", "2"]) == 2
    assert "run is of the architecture lstm: say pretrain lstm" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", OTHERS)
def test_help_has_the_flags_that_apply(capsys, architecture):
    with pytest.raises(SystemExit):
        main(["pretrain", architecture, "--help"])
    out = capsys.readouterr().out
    assert f"tinygrad-llm pretrain {architecture} --preset demo" in out
    assert "--architecture" not in out
    assert ("--n-head" in out) == (architecture != "lstm")
    assert ("--tied" in out) == (architecture == "lstm")
    assert ("--mask-probability" in out) == (architecture == "bert")
    assert ("--noise-density" in out) == (architecture == "t5")


@pytest.mark.parametrize("architecture", OTHERS)
def test_the_examples_of_each_help_run(documents, capsys, architecture):
    Path("text.txt").rename("book.txt")
    small = shlex.split(
        "--data book.txt --steps 2 --batch-size 2 --context 16 --n-layer 1 --n-embd 8 "
        "--vocab-size 300 --eval-batches 1 --quiet"
    )
    lines = command.HELPS[architecture].splitlines()
    examples = [shlex.split(line)[1:] for line in lines if line.startswith("  tinygrad-llm ")]
    assert len(examples) == 3
    for example in examples:
        short = ["--steps", "3", "--quiet"] if "--resume" in example else small
        assert main([*example, *short]) == 0, example
        assert "val loss" in capsys.readouterr().out
