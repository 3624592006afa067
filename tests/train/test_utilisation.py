"""The share of the peak that training gets."""

import time
from types import SimpleNamespace

from tinygrad_llm import backend
from tinygrad_llm.train import utilisation
from tinygrad_llm.train.utilisation import Utilisation, measured_peak


def test_mfu_is_flops_over_peak():
    assert Utilisation(flops_per_token=10, peak=4000.0).mfu(tokens=50, seconds=0.5) == 0.25


def test_the_peak_is_measured_once_and_draws_nothing():
    measured_peak.cache_clear()
    before = backend.random.state()
    peak = measured_peak("cpu", 0.01)
    assert 1e6 < peak < 1e15
    assert measured_peak("cpu", 0.01) == peak
    assert backend.random.state() == before
    measured_peak.cache_clear()


def clocked(monkeypatch, rate):
    """Products on a machine of so many FLOP/s: (the sizes that are tried, their repetitions)."""
    tried, now = [], [0.0]

    def product(n, device, repeat):
        tried.append((n, repeat))
        times = [2 * n**3 / rate * (1 + i % 2) for i in range(repeat)]  # every second one is slow
        now[0] += sum(times)
        return times

    monkeypatch.setattr(utilisation, "_product", product)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return tried, now


def test_a_fast_machine_gets_large_products_and_a_slow_one_small_ones(monkeypatch):
    for rate, largest in ((1e8, 256), (1e11, 1024), (1e15, 4096)):
        tried, now = clocked(monkeypatch, rate)
        peak = measured_peak.__wrapped__("cpu", 0.15)
        sizes = [n for n, _ in tried]
        assert sizes[-1] == sizes[-2] == largest
        assert tried[-1][1] >= 3
        assert rate / 2 <= peak <= rate
        assert rate == 1e8 or now[0] < 0.3


def test_one_slow_product_is_not_the_peak(monkeypatch):
    """The machine may be busy for a moment: the shortest time counts."""
    real = utilisation._product
    monkeypatch.setattr(utilisation, "_product", lambda *a, **k: [*real(*a, **k)[:-1], 100.0])
    assert measured_peak.__wrapped__("cpu", 0.01) > 1e7


def test_a_product_is_timed_as_often_as_asked():
    times = utilisation._product(8, "cpu", repeat=4)
    assert len(times) == 4
    assert all(seconds > 0 for seconds in times)


def test_a_gpu_is_waited_for_before_and_after_each_product(monkeypatch):
    """A stand-in for CuPy: a product only begins when it is called, and ends when waited for."""
    done = []

    class Device:
        def __enter__(self):
            done.append("enter")

        def __exit__(self, *_):
            done.append("exit")

    class GpuArray:
        device = Device()

    stream = SimpleNamespace(synchronize=lambda: done.append("wait"))
    cupy = SimpleNamespace(
        cuda=SimpleNamespace(get_current_stream=lambda: stream),
        empty_like=lambda a: GpuArray(),
        matmul=lambda a, b, out: done.append("product"),
    )
    monkeypatch.setattr(backend, "to_device", lambda array, device: GpuArray())
    monkeypatch.setattr(backend, "namespace", lambda array: cupy)
    assert len(utilisation._product(8, "cuda:0", repeat=2)) == 2
    assert done == ["enter", *["wait", "product", "wait"] * 2, "exit"]
