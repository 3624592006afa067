"""What the machine says of itself."""

import json
import os

from tinygrad_llm.train import machine
from tinygrad_llm.train.machine import facts, physical_memory


def test_memory_is_known_or_said_to_be_unknown(monkeypatch):
    found = physical_memory()
    assert found is None or found > 10**8

    def unknown(name):
        raise ValueError(f"unrecognized configuration name {name}")

    monkeypatch.setattr(os, "sysconf", unknown)
    assert physical_memory() is None


def test_nothing_about_gpus_where_there_is_none():
    known = dict(facts())
    assert known["device"].startswith("cpu")
    assert not {"cuda:0", "CUDA", "tuned"} & known.keys()


def test_a_gpu_and_what_drives_it(fake_cupy, monkeypatch, tmp_path):
    monkeypatch.setenv("TINYGRAD_LLM_CACHE", str(tmp_path))
    monkeypatch.setenv("TINYGRAD_LLM_KERNELS", "gpu")
    monkeypatch.setattr(machine, "_distribution", lambda module: "there")
    known = dict(facts())
    assert known["device"] == "cuda (CuPy sees a GPU)"
    assert known["GPU"] == "Fake GPU"
    assert known["cuda:0"].startswith("Fake GPU: 8.6 GB, 8.6 GB free; compute capability 9.0")
    assert known["CUDA"] == "13.0 by the driver, 13.0 by CuPy"
    assert known["on the GPU"].startswith("Triton for softmax, ")
    assert "for linear and matmul cuBLAS" in known["on the GPU"]
    assert known["tuned"].startswith("nothing yet")


def test_what_was_tuned_before_is_counted(fake_cupy, monkeypatch, tmp_path):
    monkeypatch.setenv("TINYGRAD_LLM_CACHE", str(tmp_path))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "A.json").write_text(json.dumps({"one": {}, "two": {}}))
    (tmp_path / "kernels" / "B.json").write_text("{")
    assert machine._tuned().startswith("2 in A.json, B.json cannot be read, in ")


def test_a_driver_that_is_too_old_is_said(fake_cupy, monkeypatch):
    monkeypatch.setattr(fake_cupy.runtime, "driverGetVersion", staticmethod(lambda: 12040))
    said = dict(machine._about_gpus())["CUDA"]
    assert said.startswith("12.4 by the driver, 13.0 by CuPy: the driver is too old")


def test_without_kernels_on_the_gpu_it_says_what_runs_instead(fake_cupy, monkeypatch):
    monkeypatch.setenv("TINYGRAD_LLM_KERNELS", "interpret")
    assert machine._what_runs().startswith("CuPy and cuBLAS: kernels do not run on the GPU")
