"""The commands on real input: in this process, through a pipe, on a terminal, interrupted."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinygrad_llm.cli import main
from tinygrad_llm.cli.output import show_text
from tinygrad_llm.gradcheck import Report
from tinygrad_llm.train.run import Run

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
COMMAND = [sys.executable, "-m", "tinygrad_llm"]


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A small text in the present folder, which is a fresh one."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"{i} and {i} make {2 * i}.\n" for i in range(300)))
    return "text.txt"


def pretrain(*arguments):
    return ["pretrain", "gpt", "--preset", "tiny", "--data", "text.txt", *arguments]


def records(run):
    path = Path(run, "metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_from_text_to_a_model_that_writes(text, capsys):
    assert main(pretrain("--run", "my run")) == 0
    out = capsys.readouterr().out
    assert "step 20/20" in out
    assert "val loss" in out
    assert "sample (" in out
    assert "my run/loss.png" in out
    assert not CONTROL.search(out)

    commands = re.findall(r"^(?:resume|sample): +(.*)$", out, flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:  # as pasted into a shell
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
        assert done.stderr == ""
    assert [r["step"] for r in records("my run")] == list(range(41))


def test_flags_beat_the_file_which_beats_the_preset(text, capsys):
    Path("my.toml").write_text("[train]\nsteps = 3\nseed = 7\n[model]\nn_embd = 8\n")
    assert main(pretrain("--config", "my.toml", "--seed", "9", "--run", "run")) == 0
    config = Path("run/config.toml").read_text()
    assert "steps = 3\n" in config  # the file's
    assert "seed = 9\n" in config  # the flag's
    assert "n_embd = 8\n" in config
    assert "context = 16\n" in config  # the preset's
    capsys.readouterr()
    assert main(["pretrain", "gpt", "--config", "run/config.toml", "--run", "again"]) == 0
    assert Path("again/config.toml").read_text() == config
    last = "checkpoints/latest/model.safetensors"
    assert Path("again", last).read_bytes() == Path("run", last).read_bytes()


def test_a_config_that_cannot_be_used(text, capsys):
    Path("my.toml").write_text("[train]\nstpes = 3\n")
    assert main(pretrain("--config", "my.toml")) == 2
    assert "unknown key 'train.stpes'; did you mean 'train.steps'?" in capsys.readouterr().err


def test_resume_goes_on_and_refuses_another_run(text, capsys):
    assert main(pretrain("--run", "run")) == 0
    assert main(["pretrain", "gpt", "--resume", "run", "--steps", "22"]) == 0
    assert [r["step"] for r in records("run")] == list(range(23))
    capsys.readouterr()
    for arguments, words in (
        (["--resume", "run"], "has done 22 of 22 steps"),
        (["--resume", "run", "--lr", "0.5"], "train.lr = 0.001, which cannot become 0.5"),
        (["--run", "run"], "holds a run already"),
    ):
        assert main(["pretrain", "gpt", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_a_budget_ends_the_run_with_the_command_that_goes_on(text, capsys):
    budget = ["--max-tokens", "300", "--accumulate", "2", "--ema", "0.9", "--keep-last", "1"]
    assert main(pretrain("--run", "run", *budget)) == 0
    out = capsys.readouterr().out
    assert "stopped: the run has seen 384 tokens, its limit being 300" in out
    assert "averaged" in out
    assert main(["pretrain", "gpt", "--resume", "run"]) == 2
    assert "give a larger --max-tokens to train on" in capsys.readouterr().err
    commands = re.findall(r"^(?:resume|sample|averaged): +(.*)$", out, flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:  # as pasted into a shell
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
        assert done.stderr == ""
    assert [r["step"] for r in records("run")] == list(range(6))


def test_one_batch_is_overfitted(text, capsys):
    one = ["--overfit-one-batch", "--steps", "150", "--lr", "0.02", "--dropout", "0"]
    assert main(pretrain("--run", "run", "--eval-every", "150", *one)) == 0
    last = records("run")[-1]
    assert last["loss"] < 0.5
    assert last["val_loss"] == pytest.approx(last["loss"], rel=0.3)


def test_a_run_in_use_is_one_sentence(text, capsys):
    assert main(pretrain("--run", "run")) == 0
    held = Run.open("run")
    held.hold()
    capsys.readouterr()
    assert main(["pretrain", "gpt", "--resume", "run", "--steps", "30"]) == 2
    err = capsys.readouterr().err
    assert f"run is in use by another process (pid {os.getpid()})" in err
    assert err.count("\n") == 1
    held.close()
    assert main(["pretrain", "gpt", "--resume", "run", "--steps", "30"]) == 0


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(text, capsys, monkeypatch):
    fsync, room = os.fsync, [40]

    def filling(descriptor):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", filling)
        assert main(pretrain("--run", "run", "--checkpoint-every", "2")) == 2
    err = capsys.readouterr().err
    match = re.search(r"\(No space left on device\), .* last good checkpoint is (\S+): ", err)
    assert match is not None, err
    assert err.count("\n") == 1
    assert sorted(os.listdir(match[1])) == [
        *("SHA256SUMS", "config.json", "model.safetensors", "optimizer.safetensors"),
        *("run.toml", "tokenizer.json", "trainer.json"),
    ]


def test_a_folder_that_cannot_be_made_is_one_sentence(text, capsys):
    assert main(pretrain("--run", "text.txt/run")) == 2
    err = capsys.readouterr().err
    assert "cannot write into the run folder text.txt/run (Not a directory)" in err
    assert err.count("\n") == 1


def test_generate_repeats_with_its_seed(text, capsys):
    assert main(pretrain("--run", "run", "--max-new-tokens", "0")) == 0
    assert "sample (" not in capsys.readouterr().out

    def write(*arguments):
        assert main(["generate", "--model", "run", "--max-new-tokens", "30", *arguments]) == 0
        return capsys.readouterr().out

    one = write("--prompt", "7 and")
    assert one.startswith("7 and")
    assert one == write("--prompt", "7 and", "--seed", "1")
    assert one != write("--prompt", "7 and", "--seed", "2")
    greedy = write("--prompt", "7 and", "--temperature", "0")
    assert greedy == write("--prompt", "7 and", "--top-k", "1", "--seed", "5")
    assert write("--model", "run/checkpoints/step-000010")
    for arguments in (["--temperature", "-1"], ["--top-p", "0"], ["--top-k", "-2"]):
        assert main(["generate", "--model", "run", *arguments]) == 2
        assert " must be " in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_one_sentence(text, capsys):
    assert main(pretrain("--run", "run", "--lr", "1e30", "--warmup", "0", "--grad-clip", "0")) == 1
    err = capsys.readouterr().err
    assert re.search(
        r"the loss is .* at step \d+: \w+ made (NaN|infinity) in .*, so training stopped; "
        r"there is no checkpoint",
        err,
    )
    assert err.count("\n") == 1


def test_text_of_a_model_cannot_steer_the_terminal(capsys):
    show_text(["a\x1b[2J", "b\r\n\tc\x00狐"])
    assert capsys.readouterr().out == "a\ufffd[2Jb\n\tc\ufffd狐"


def test_doctor_is_quick_and_knows_what_is_there():
    code = (
        "import sys; from tinygrad_llm.cli import main; main(['doctor']);"
        "assert not {'tokenizers', 'matplotlib', 'cupy', 'rich', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("Python", "NumPy", "BLAS", "threads", "CuPy", "device", "memory", "Philox"):
        assert word in done.stdout
    assert not CONTROL.search(done.stdout)


def test_gradcheck_checks_the_ops_it_is_given(capsys):
    assert main(["gradcheck", "Tanh", "Negative"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["op", "samples", "first", "second"]
    assert [row.split()[0] for row in rows] == ["Tanh", "Negative"]
    assert all(float(error) < 1e-6 for row in rows for error in row.split()[2:])


def test_gradcheck_fails_with_the_place(capsys, monkeypatch):
    wrong = Report("Tanh", 3, 0.5, None, None, False, "Tanh: argument 0 …, got 1, expected 2")
    refused = Report("Erf", 2, 1e-9, None, "no second order: …", True, "")
    module = sys.modules["tinygrad_llm.gradcheck"]  # the package has a function of that name
    monkeypatch.setattr(module, "check_all", lambda ops: iter([wrong, refused]))
    assert main(["gradcheck"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^Tanh .*FAILED$", out, re.MULTILINE)
    assert re.search(r"^Erf .*no second order: …$", out, re.MULTILINE)
    assert out.endswith("Tanh: argument 0 …, got 1, expected 2\n")


def test_gradcheck_of_an_op_that_is_none(capsys):
    assert main(["gradcheck", "Tahn"]) == 2
    assert "no op is called Tahn" in capsys.readouterr().err


# --- other processes ------------------------------------------------------------------------------


def test_a_pipe_gets_plain_lines_and_status_0(text):
    done = subprocess.run([*COMMAND, *pretrain("--run", "run")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not CONTROL.search(done.stdout)
    assert re.search(r"^step 10/20 · loss .* · val loss .* tokens/s", done.stdout, re.MULTILINE)


def test_bad_input_has_status_2_and_no_traceback(text):
    done = subprocess.run([*COMMAND, *pretrain("--lr", "x")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tinygrad-llm: --lr")


def test_a_reader_that_goes_away_is_no_error(text):
    subprocess.run([*COMMAND, *pretrain("--run", "run")], capture_output=True, check=True)
    generate = shlex.join([*COMMAND, "generate", "--model", "run", "--max-new-tokens", "5000"])
    done = subprocess.run(f"{generate} | head -c 1", shell=True, capture_output=True)
    assert (len(done.stdout), done.stderr) == (1, b"")


def test_a_terminal_gets_a_live_bar(text):
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30"}
    with subprocess.Popen(
        [*COMMAND, *pretrain("--run", "run")], stdout=slave, stderr=slave, env=environment
    ) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                piece = os.read(master, 4096)
            except OSError:  # Linux says so when the other end has closed
                break
            if not piece:
                break
            shown += piece
    os.close(master)
    text = shown.decode()
    assert process.returncode == 0, text
    assert "\x1b[?25l" in text  # the cursor hides while the bar moves …
    assert "\x1b[?25h" in text  # … and comes back
    assert "━" in text
    assert re.search(r"step 20/20 .*loss \d\.\d+ · val loss \d\.\d+ · [\d,]+ tokens/s", text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_prints_the_command_that_goes_on(text, number):
    forever = pretrain("--run", "it's mine", "--steps", "1000000", "--checkpoint-every", "1000000")
    with subprocess.Popen(
        [*COMMAND, *forever], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        until = time.monotonic() + 60
        while len(records("it's mine")) < 4 and process.poll() is None:
            assert time.monotonic() < until, "training does not start"
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == ""
    match = re.search(rf"{number.name} after step (\d+); saved\. Go on with:\n  (.*)\n", out)
    assert match is not None, out
    reached, command = int(match[1]), match[2]
    assert [r["step"] for r in records("it's mine")] == list(range(reached + 1))
    done = subprocess.run(
        f"{command} --steps {reached + 2}", shell=True, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [r["step"] for r in records("it's mine")] == list(range(reached + 3))
