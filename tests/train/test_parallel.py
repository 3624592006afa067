"""Several processes take the steps of one, end together, and leave nothing behind."""

import contextlib
import dataclasses
import errno
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import Tensor, backend, ops
from tinygrad_llm.cli import main
from tinygrad_llm.models.gpt import GPT, GPTConfig
from tinygrad_llm.optim import SGD, AdamW, LRScheduler
from tinygrad_llm.tasks.causal import CausalTask
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train import parallel, pretrain
from tinygrad_llm.train.config import TrainConfig
from tinygrad_llm.train.gradient import Gradient
from tinygrad_llm.train.log import PlainLog
from tinygrad_llm.train.parallel import Lost, Part, Team, cut, owners, processes_for
from tinygrad_llm.train.run import Run
from tinygrad_llm.train.step import TeamStep
from tinygrad_llm.train.stopping import Limits
from tinygrad_llm.train.trainer import Diverged, Interrupted, OutOfMemory, Trainer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")

THIS = os.getpid()


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)


@pytest.fixture(autouse=True)
def nothing_is_left():
    """After every test: no process, no signal handler, no thread setting that was not there."""
    before = backend.blas_threads(), signal.getsignal(signal.SIGTERM), children(THIS)
    yield
    assert (backend.blas_threads(), signal.getsignal(signal.SIGTERM), children(THIS)) == before


def children(pid):
    """The processes that `pid` has forked, also those that have ended and were not waited for."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return sorted(found)


# --- the same steps -------------------------------------------------------------------------------


class Rows:
    """A task with given batches of rows (x, y), the same ones to validate on."""

    def __init__(self, batches):
        self.batches, self.next = batches, itertools.cycle(batches)

    def next_batch(self):
        return next(self.next)

    def size(self, batch):
        return batch[1].size

    def loss(self, model, batch):
        return model.loss(*batch)

    def validation(self):
        return iter(self.batches)

    def save(self, folder):
        pass

    def state(self):
        return {}

    def load_state(self, state):
        pass


def momentum(parameters):
    return SGD(parameters, lr=0.1, momentum=0.9)


def rows(*counts):
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, 11, (n, 9)) for n in counts]
    return [(ids[:, :-1], ids[:, 1:]) for ids in drawn]


def learn(processes, batches, dtype="float64", make=momentum, **train):
    """Five steps: their records, the weights, the optimiser's state, the loss of validation."""
    backend.manual_seed(1)
    size = GPTConfig(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    model = GPT(size).to(dtype)
    stepper = make(model.parameters())
    schedule = LRScheduler(stepper, lambda step: 1 / (1 + step))
    config = TrainConfig(processes=processes, **train)
    log, run = PlainLog(io.StringIO()), Run(Path("unused"))
    trainer = Trainer(model, stepper, schedule, Rows(batches), config, run, log)
    try:
        records = [trainer.train_step() for _ in range(5)]
        found = trainer.evaluate()
        if trainer.team is not None:
            assert len(children(THIS)) >= processes - 1
            trainer.team.gather()
    finally:
        if trainer.team is not None:
            trainer.team.stop()
    assert trainer.evaluate() == found  # the weights stay, and one process is enough
    weights = [p.numpy().copy() for p in model.parameters()]
    return records, weights, stepper.state_dict()["state"], found


def close(a, b, rtol):
    """The numbers of two nests of dicts, lists and arrays are equal to a rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"tokens_per_second"}:
            close(a[key], b[key], rtol)
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            close(x, y, rtol)
    else:
        size = np.abs(b).max() if np.size(b) else 0.0
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(float(size), 1e-2))


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize(
    ("processes", "counts", "accumulate"),
    [(2, [4], 1), (2, [5, 3], 2), (3, [1], 1), (4, [2, 1, 3], 3), (2, [1, 1], 2)],
)
def test_several_processes_take_the_steps_of_one(dtype, rtol, processes, counts, accumulate):
    """Also with fewer rows than processes, and with batches of different sizes in an update."""
    options = {"accumulate": accumulate, "grad_clip": 0.5}
    alone = learn(1, rows(*counts), dtype, **options)
    assert any(record["grad_norm"] > 0.5 for record in alone[0])  # it was clipped
    close(learn(processes, rows(*counts), dtype, **options), alone, rtol)


def test_the_gathered_state_is_that_of_one_process():
    together, alone = (
        learn(n, rows(4), make=lambda p: AdamW(p, lr=1e-2, weight_decay=0.1)) for n in (3, 1)
    )
    close(together, alone, 1e-10)  # Adam divides by gradients that are nothing but rounding
    assert {key for kept in together[2].values() for key in kept} >= {"exp_avg", "exp_avg_sq"}


def test_a_validation_is_the_same_to_the_last_bit():
    """It is not divided: each batch is worked on by one process, as a whole."""
    batches = rows(4, 4, 3, 4, 1)
    trained, weights, _, loss = learn(2, batches, "float32")
    assert trained
    size = GPTConfig(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    model = GPT(size)
    for p, w in zip(model.parameters(), weights, strict=True):
        p.data[...] = w
    model.eval()
    total = sum(model.loss(*batch).item() * batch[1].size for batch in batches)
    assert loss == total / sum(batch[1].size for batch in batches)


class Switched:
    """loss = mean((a − x)²) + b² for rows of ones; c is frozen, d is never reached, 0 numbers in e.

    b has a gradient only in the parts that hold a one.
    """

    def __init__(self):
        values = ([1.0, 2.0], 3.0, [4.0, 4.0], 5.0, np.zeros((0, 2)))
        frozen = 2
        self.all = [
            Tensor(np.array(v, dtype=np.float64), requires_grad=i != frozen)
            for i, v in enumerate(values)
        ]

    def loss(self, batch):
        a, b, c, *_ = self.all
        loss = ops.square(a - batch).mean() + 0.0 * c.sum()
        return loss + b * b if batch.any() else loss


@pytest.mark.parametrize("ones", [(0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 0, 1), (1, 1, 1, 1)])
def test_parameters_without_a_gradient_in_some_parts_or_in_all(ones):
    batch = np.array(ones, dtype=np.float64)[:, None] * np.ones(2)
    parts = [Part(batch[:2], 0.5), Part(batch[2:], 0.5)]
    found = []
    for count in (1, 2):
        model = Switched()
        learnt = [p for p in model.all if p.requires_grad]
        optimizer = SGD(learnt, lr=0.1, momentum=0.9)

        def gradient(parts, model=model):
            total = 0.0
            for part in parts:
                loss = model.loss(part.batch) * part.weight
                loss.backward()
                total += loss.item()
            return total

        team = Team(model.all, optimizer, gradient, lambda _: 0.0, count)
        try:
            records = []
            for _ in range(3):
                records.append(team.gradient(parts, math.inf))
                team.step()
            team.gather()
        finally:
            team.stop()
        found.append((records, [p.numpy().copy() for p in model.all], optimizer.state_dict()))
    together, alone = found[1], found[0]
    close(together[:2], alone[:2], 1e-14)
    close(together[2]["state"], alone[2]["state"], 1e-14)
    weights = together[1]
    assert (weights[1] == 3.0) == (not any(ones))
    np.testing.assert_array_equal(weights[2], [4.0, 4.0])
    assert weights[3] == 5.0


def test_no_answer_to_a_job_that_was_broken_off_is_taken_for_another():
    p, break_off = Tensor(np.ones(2), requires_grad=True), []

    def gradient(parts):
        if os.getpid() == THIS and break_off:
            raise KeyboardInterrupt
        for part in parts:
            (p * part.batch).sum().backward()
        return float(sum(part.batch for part in parts))

    team = Team([p], SGD([p], lr=1.0), gradient, float, 2)
    break_off.append("the first step")
    with pytest.raises(KeyboardInterrupt):
        team.gradient([Part(10.0, 1.0), Part(20.0, 1.0)], math.inf)
    break_off.clear()
    assert team.gradient([Part(1.0, 1.0), Part(2.0, 1.0)], math.inf)[0] == 3.0
    team.step()
    assert p.tolist() == [-2.0, -2.0]
    break_off.append("the second")
    with pytest.raises(KeyboardInterrupt):
        team.gradient([Part(1.0, 1.0)], math.inf)
    with pytest.raises(Lost, match="the optimiser's state was lost"):  # such as its momentum
        team.gradient([Part(1.0, 1.0)], math.inf)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_refused(dtype):
    p = Tensor(np.ones(2), dtype=dtype, requires_grad=True)
    with pytest.raises(ValueError, match=rf"float32 or float64 .* got one in {dtype} on cpu"):
        Team([p], SGD([p], lr=1.0), lambda parts: 0.0, lambda batch: 0.0, 2)


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A tiny run on two processes with everything that has a state."""
    text = tmp_path_factory.mktemp("data") / "text.txt"
    text.write_text("".join(f"{i} and {i} make {2 * i}.\n" for i in range(400)))
    tiny = configuration.preset("tiny")
    return dataclasses.replace(
        tiny,
        data=dataclasses.replace(tiny.data, source=str(text)),
        train=dataclasses.replace(
            tiny.train,
            **{"steps": 8, "eval_every": 2, "checkpoint_every": 2, "processes": 2, "mfu": False},
            **{"accumulate": 2, "ema": 0.9, "patience": 50, "gradient_checkpointing": True},
            lr_groups={"wte": 0.5, "h.0.mlp": 2.0},
        ),
        sample=dataclasses.replace(tiny.sample, every=3, every_max_new_tokens=2),
    )


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    """What that run comes to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_draw", lambda self: None)
        train(config, folder)
    return whole(folder)


def changed(config, **train):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


class Watched(PlainLog):
    """Calls `at[step](trainer)` when the record of that step comes."""

    def __init__(self, at):
        super().__init__(io.StringIO())
        self.at: Any = at or {}
        self.trainer: Any = None

    def record(self, record):
        super().record(record)
        self.at.get(record["step"], lambda trainer: None)(self.trainer)


def begin(config, folder, at=None):
    log = Watched(at)
    ready = pretrain.start(config, folder, log)
    log.trainer = ready.trainer
    return ready


def train(config, folder, at=None):
    ready = begin(config, folder, at)
    ready.trainer.fit()
    return ready


def said(ready):
    """What the log of a run holds."""
    return ready.trainer.log.out.getvalue()


def go_on(folder, **changes):
    run = Run.open(folder)
    settings = changed(configuration.load(run.config_file), **changes)
    ready = pretrain.resume(run, settings, PlainLog(io.StringIO()))
    ready.trainer.fit()
    return ready


def whole(folder):
    """Every byte of the last checkpoint, without the time it took."""
    last = Run.open(folder).checkpoint()
    assert last is not None
    found = {str(p.relative_to(last)): p.read_bytes() for p in last.rglob("*") if p.is_file()}
    state = json.loads(found.pop("trainer.json"))
    del found["SHA256SUMS"], state["elapsed"]
    return found, state


def stopped_by(number):
    return lambda trainer: signal.raise_signal(number)


def test_the_same_number_of_processes_gives_the_same_bits_also_across_a_stop(
    config, undisturbed, tmp_path
):
    assert config.model.dropout > 0
    ready = train(config, tmp_path / "again")
    assert "processes: 2, which share every batch" in said(ready)
    assert whole(tmp_path / "again") == undisturbed
    steps = np.random.default_rng().choice(np.arange(1, 8), 2, replace=False)
    for step, number in zip(steps, (signal.SIGTERM, signal.SIGINT), strict=True):
        folder = tmp_path / f"stopped after {step}"
        with pytest.raises(Interrupted, match=f"after step {step}; saved"):
            train(config, folder, {step: stopped_by(number)})
        go_on(folder)
        assert whole(folder) == undisturbed, step


def test_each_part_drops_other_activations(config, tmp_path, monkeypatch):
    """Not every process the same ones; and the stream is beyond all of them after the step."""
    drawn = []
    monkeypatch.setattr(
        TeamStep,
        "__call__",
        lambda self, parts: drawn.append([part.random for part in parts]) or (1.0, 1.0),
    )
    monkeypatch.setattr(Team, "step", lambda self: None)
    trainer = begin(config, tmp_path / "run").trainer
    trainer.train_step()
    trainer.train_step()
    places = [random["offset"] for parts in drawn for random in parts]
    assert len(set(places)) == 8  # two batches of two parts, in two steps
    assert places == sorted(places)
    assert backend.random.offset > max(places)
    trainer.run.close()


def test_another_number_of_processes_may_come_on_the_way(config, tmp_path):
    train(changed(config, steps=4), tmp_path / "run")
    assert go_on(tmp_path / "run", steps=6, processes=1).trainer.team is None
    ready = go_on(tmp_path / "run", steps=8, processes=3)
    assert ready.trainer.team is not None
    assert configuration.load(ready.run.config_file).train.processes == 3
    assert ready.trainer.step == 8


def test_several_processes_are_refused_on_a_gpu_before_the_folder_is_made(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(pretrain, "choose_device", lambda wanted: ("cuda", "pretended"))
    monkeypatch.setattr(GPT, "to", lambda self, device: self)
    with pytest.raises(ValueError, match=r"processes = 3 needs the CPU .* not cuda .* give --pro"):
        begin(changed(config, processes=3), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_batch_is_learnt_by_heart(config, tmp_path):
    config = dataclasses.replace(
        config, model=configuration.ModelConfig(n_layer=1, n_head=2, n_embd=32)
    )
    limits = {"steps": 60, "eval_every": 60, "checkpoint_every": 60, "lr": 2e-2, "lr_groups": {}}
    ready = train(changed(config, overfit_one_batch=True, **limits), tmp_path / "run")
    last = ready.run.metrics()[-1]
    assert last["val_loss"] < 0.5 < 5.0 < ready.run.metrics()[0]["val_loss"]


def test_a_second_fit_goes_on(config, undisturbed, tmp_path):
    ready = begin(config, tmp_path / "run")
    limits, ready.trainer.limits = ready.trainer.limits, Limits(changed(config, steps=4).train)
    ready.trainer.fit()
    assert ready.trainer.step == 4
    limits.load_state(ready.trainer.limits.state())
    ready.trainer.limits = limits
    ready.run.hold()
    ready.trainer.fit()
    assert whole(tmp_path / "run") == undisturbed


def test_in_a_thread(config, undisturbed, tmp_path):
    ready = begin(config, tmp_path / "run")
    thread = threading.Thread(target=ready.trainer.fit)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert whole(tmp_path / "run") == undisturbed


def test_the_log_does_not_start_before_the_others(config, tmp_path, monkeypatch):
    """A live bar is a thread, and a fork beside it may copy a lock that nobody opens any more."""
    ready = begin(config, tmp_path / "run")
    seen = []
    monkeypatch.setattr(ready.trainer.log, "start", lambda *_: seen.append(children(THIS)))
    monkeypatch.setattr(ready.trainer, "_loop", lambda: None)
    ready.trainer.fit()
    assert len(seen[0]) == 1


# --- failures -------------------------------------------------------------------------------------


def in_the_other(monkeypatch, owner, name, call, fail):
    """Let the second process fail when it comes to a method for the time number `call`."""
    method, calls = getattr(owner, name), itertools.count(1)

    def failing(self, *arguments):
        if os.getpid() != THIS and next(calls) == call:
            fail()
        return method(self, *arguments)

    monkeypatch.setattr(owner, name, failing)


def kill_this():
    os.kill(os.getpid(), signal.SIGKILL)


# How far the run has come, what the second process does not live to see, and its number.
MOMENTS = [
    (5, Team, "_work_out", 6),
    (5, Team, "_add_up", 6),
    (5, Team, "_update", 6),
    (6, Gradient, "loss", 13),  # two of the four batches, twice a validation, three times before
    (6, Team, "_own_state", 3),
]


@pytest.mark.parametrize(("step", "owner", "name", "call"), [(5, None, "", 0), *MOMENTS])
def test_a_process_that_is_killed_is_one_sentence(
    config, undisturbed, tmp_path, monkeypatch, step, owner, name, call
):
    if owner is not None:
        in_the_other(monkeypatch, owner, name, call, kill_this)
        ready = begin(config, tmp_path / "run")
    else:  # between two steps
        ready = begin(config, tmp_path / "run", {5: lambda t: t.team._children[0].kill()})
    with pytest.raises(Lost) as caught:
        ready.trainer.fit()
    sentence, saved = str(caught.value), ready.run.step_folder(4)
    assert sentence == (
        "a process that helped with the training has died, perhaps for want of memory, so "
        f"training stopped after step {step}; the last good checkpoint is {saved}: go on with "
        "--resume, perhaps with fewer --processes"
    )
    assert ready.run.checkpoint() == saved
    with pytest.raises(Lost, match="the optimiser's state was lost with the processes"):
        ready.trainer.fit()
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)
    go_on(tmp_path / "run")
    assert whole(tmp_path / "run") == undisturbed


def test_the_command_says_it_too_and_goes_on(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.toml").write_text(configuration.dumps(config))
    command = ["pretrain", "gpt", "--quiet"]
    with monkeypatch.context() as patch:
        in_the_other(patch, Team, "_work_out", 6, kill_this)
        begun = [*command, "--config", str(tmp_path / "run.toml"), "--run", str(tmp_path / "run")]
        assert main(begun) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"tinygrad-llm: a process that helped .* has died.* --processes\n", err)
    assert main([*command, "--resume", str(tmp_path / "run")]) == 0
    assert "after 8 steps" in capsys.readouterr().out


def divide_by_zero():
    raise ZeroDivisionError("on purpose")


def test_what_another_process_raises_comes_with_its_traceback(config, tmp_path, monkeypatch):
    in_the_other(monkeypatch, Team, "_work_out", 2, divide_by_zero)
    with pytest.raises(
        RuntimeError,
        match=r"(?s)helped with the training failed:\n\nTraceback.*"
        r"in divide_by_zero.*ZeroDivisionError: on purpose",
    ):
        train(config, tmp_path / "run")


def no_memory(*_):
    np.empty(2**60, np.uint8)


@pytest.mark.parametrize("where", ["here", "there"])
def test_too_little_memory_in_any_process(config, undisturbed, tmp_path, monkeypatch, where):
    with monkeypatch.context() as patch:
        if where == "there":
            in_the_other(patch, Team, "_work_out", 6, no_memory)
        fail_here = {5: lambda trainer: patch.setattr(GPT, "train", no_memory)}
        ready = begin(config, tmp_path / "run", fail_here if where == "here" else None)
        with pytest.raises(
            OutOfMemory, match=r"after step 5 .*\(Unable to .* or fewer --processes$"
        ):
            ready.trainer.fit()
    go_on(tmp_path / "run")
    assert whole(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("missing", ["fork", "memory"])
def test_processes_that_cannot_be_started(config, tmp_path, monkeypatch, missing):
    def refuse(*_):
        number = errno.EAGAIN if missing == "fork" else errno.ENOMEM
        raise OSError(number, os.strerror(number))

    ready = begin(changed(config, processes=3), tmp_path / "run")
    fork, calls = os.fork, itertools.count()
    with monkeypatch.context() as patch:
        if missing == "fork":  # the first one can be
            patch.setattr(os, "fork", lambda: refuse() if next(calls) else fork())
        else:
            patch.setattr(parallel.mmap, "mmap", refuse)
        with pytest.raises(
            Lost, match=r"3 processes cannot be started \(.*\), .* no checkpoint yet"
        ):
            ready.trainer.fit()
    assert go_on(tmp_path / "run").trainer.step == 8  # nobody holds the folder


def test_a_loss_that_is_no_number_names_the_op(config, tmp_path, monkeypatch):
    """Also where it was another process that met it."""
    loss = CausalTask.loss

    def spoilt(self, model, batch):
        value = loss(self, model, batch)
        if ready.trainer.step == 0 and model.training and 0 in batch[0][:, 0]:
            value = ops.log(value - value)
        return value

    monkeypatch.setattr(CausalTask, "loss", spoilt)
    ready = begin(config, tmp_path / "run")
    batch = ready.trainer.task.next_batch()
    batch[0][:, 0] = 1
    batch[0][-1, 0] = 0  # the last row is the second process's
    monkeypatch.setattr(ready.trainer.task, "next_batch", lambda: batch)
    before = [p.numpy().copy() for p in ready.model.parameters()]
    with (
        np.errstate(divide="ignore"),
        pytest.raises(Diverged, match=r"at step 1: Log made infinity in 1 of 1 .*, so training"),
    ):
        ready.trainer.fit()
    for p, w in zip(ready.model.parameters(), before, strict=True):
        np.testing.assert_array_equal(p.numpy(), w)


# --- the end of a process -------------------------------------------------------------------------


def is_gone(pid):
    """A zombie is: it waits for its new parent only."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(condition, what):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_nothing_behind(config, tmp_path, number):
    """SIGINT and SIGTERM go to all processes, as a terminal or a service manager sends them."""
    folder = tmp_path / "run"
    forever = changed(config, steps=10**6, eval_every=10**6, checkpoint_every=10**6, processes=3)
    (tmp_path / "run.toml").write_text(configuration.dumps(forever))
    arguments = ["pretrain", "gpt", "--config", str(tmp_path / "run.toml"), "--run", str(folder)]
    with subprocess.Popen(
        [sys.executable, "-m", "tinygrad_llm", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        wait_until(
            lambda: len(Run(folder).metrics()) > 3 or process.poll() is not None, "it never began"
        )
        others = children(process.pid)
        if number == signal.SIGKILL:
            process.kill()
        else:
            for pid in 3 * others:  # the first process alone decides
                os.kill(pid, number)
                time.sleep(0.01)
            os.killpg(process.pid, number)
        process.wait(60)
        run = Run.open(folder)
        run.hold()  # at once
        run.close()
        out, err = process.communicate(timeout=60)
    assert err == ""
    assert len(others) == 2
    wait_until(lambda: all(map(is_gone, others)), "a process is left")
    if number == signal.SIGKILL:
        assert process.returncode == -number
        return
    assert process.returncode == 128 + number
    match = re.search(rf"{number.name} after step (\d+); saved\. Go on with:\n  (.*)\n", out)
    assert match is not None, out
    assert run.checkpoint() == run.step_folder(int(match[1]))


@pytest.mark.parametrize("end", ["pass", "raise ValueError('on purpose')", "sys.exit(3)"])
def test_python_ends_also_where_nobody_stopped_the_others(end):
    code = f"""
import sys
import numpy as np
from tinygrad_llm import Tensor
from tinygrad_llm.optim import SGD
from tinygrad_llm.train.parallel import Part, Team

def gradient(parts):
    for part in parts:
        (p * part.batch).sum().backward()
    return 1.0 * len(parts)

p = Tensor(np.ones(3), requires_grad=True)
team = Team([p], SGD([p], lr=1.0), gradient, float, 3)
print(team.gradient([Part(2.0, 1.0)] * 3, 1e9)[0], flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "3.0\n"
    expected = {"p": (0, ""), "r": (1, "on purpose"), "s": (3, "")}[end[0]]
    assert (done.returncode, done.stderr.strip()[-10:]) == expected


# --- who does what --------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(0, 10**9), max_size=50), count=st.integers(1, 9))
def test_every_parameter_has_one_owner_and_all_own_about_the_same(sizes, count):
    owner = owners(sizes, count)
    assert len(owner) == len(sizes)
    assert set(owner) <= set(range(count))
    loads = [sum(s for s, o in zip(sizes, owner, strict=True) if o == r) for r in range(count)]
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes, default=0)
    assert owner == owners(sizes, count)  # all processes must agree


Pair = namedtuple("Pair", "x y")
SHAPES = {
    "array": lambda x, y: x,
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dict": lambda x, y: {"x": x, "y": (y,)},
    "named": Pair,
}


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    count=st.integers(1, 5),
    shape=st.sampled_from(sorted(SHAPES)),
    data=st.data(),
)
def test_the_parts_are_the_batches_in_order(lengths, count, shape, data):
    targets = data.draw(st.lists(st.integers(0, 3), min_size=sum(lengths), max_size=sum(lengths)))
    rows, batches = iter(range(sum(lengths))), []
    for n in lengths:
        x = np.array(list(itertools.islice(rows, n)), dtype=np.int64)
        batches.append(SHAPES[shape](x, 10 * x[:, None]))

    def first(batch):
        return batch if shape == "array" else batch["x"] if shape == "dict" else batch[0]

    def second(batch):
        return batch["y"][0] if shape == "dict" else batch[1]

    def size(batch):
        return sum(targets[row] for row in first(batch))

    stream = backend.RandomStream(7)
    stream.words(10)
    before = stream.offset
    parts = cut(batches, count, size, stream)
    assert all(type(part.batch) is type(batches[0]) for part in parts)
    if sum(targets):
        assert math.fsum(part.weight for part in parts) == pytest.approx(1, rel=1e-14)
    else:
        assert parts == []
    seen = [int(row) for part in parts for row in first(part.batch)]
    assert seen == sorted(set(seen))
    assert {row for row, n in enumerate(targets) if n} <= set(seen)
    for part in parts:
        assert part.weight == size(part.batch) / sum(targets) > 0
        if shape != "array":
            np.testing.assert_array_equal(second(part.batch)[:, 0], 10 * first(part.batch))
    places = [part.random["offset"] for part in parts if part.random]
    room = 2**32  # counters, of four words each
    assert len(places) == len(parts)
    assert all(b - a >= room for a, b in itertools.pairwise([*places, stream.offset]))
    assert all(place >= before for place in places)
    assert stream.offset - before == len(batches) * count * (parallel._STREAM // 4)


def machine(monkeypatch, cores=8, quota="max 100000\n", **variables):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    file = io.StringIO(quota)
    monkeypatch.setattr(parallel, "_CPU_MAX", type("F", (), {"read_text": file.getvalue}))


LARGE = {"rows": 16, "tokens": 16 * 1024, "parameters": 10**6}  # worth any number of processes


@pytest.mark.parametrize(
    ("wanted", "device", "change", "found"),
    [
        (0, "cpu", {}, 8),
        (0, "cpu", {"rows": 3}, 3),
        (0, "cpu", {"tokens": 64}, 2),  # 6 · 64 · 10⁶ FLOPs are 2.9 times the least
        (0, "cpu", {"tokens": 16}, 1),
        (0, "cpu", {"parameters": 124_000_000}, 1),  # the gradients of two would be 2 GB
        (0, "cpu", {"parameters": 30_000_000}, 4),
        (0, "cpu", {"parameters": 0}, 1),
        (0, "cuda", {}, 1),
        (1, "cuda", {}, 1),
        (1, "cpu", {}, 1),
        (5, "cpu", {"rows": 1, "tokens": 1}, 5),  # who asks for them gets them
    ],
)
def test_how_many_processes_suit(monkeypatch, wanted, device, change, found):
    machine(monkeypatch)
    assert processes_for(wanted, device, **{**LARGE, **change}) == found


@pytest.mark.parametrize(
    ("limits", "found"),
    [
        ({"cores": 1}, 1),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "4"}, 1),
        ({"OMP_NUM_THREADS": "16"}, 8),
        ({"OMP_NUM_THREADS": "4,2"}, 8),  # by level of nesting: none of ours
        ({"OMP_NUM_THREADS": "0"}, 8),
        ({"quota": "250000 100000\n"}, 2),
        ({"quota": "50000 100000\n"}, 1),
        ({"quota": "nonsense"}, 8),
    ],
)
def test_the_cores_are_those_that_may_be_used(monkeypatch, limits, found):
    machine(monkeypatch, **limits)
    assert processes_for(0, "cpu", **LARGE) == found


def test_where_there_is_no_fork(monkeypatch):
    machine(monkeypatch)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert processes_for(0, "cpu", **LARGE) == 1
    assert processes_for(1, "cpu", **LARGE) == 1
    with pytest.raises(
        ValueError, match=r"processes = 2 .*, not cpu on darwin: give --processes 1"
    ):
        processes_for(2, "cpu", **LARGE)
