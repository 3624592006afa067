"""Which configuration of a kernel is fastest here: measured once, kept on disk.

The file is $TINYGRAD_LLM_CACHE/kernels/DEVICE-triton-VERSION.json (or the same under
$XDG_CACHE_HOME/tinygrad-llm); deleting it makes everything be measured again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
import re
import statistics
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tinygrad_llm import backend
from tinygrad_llm.backend import Array
from tinygrad_llm.kernels.language import INTERPRETED, triton
from tinygrad_llm.kernels.launch import next_power_of_2

Config = dict[str, Any]  # a kernel's constants and Triton's options, by name
Report = Callable[[str], None]

VARIABLE = "TINYGRAD_LLM_TUNE"

_chosen: dict[tuple[Any, ...], Config] = {}
_lock = threading.RLock()
_report: Report | None = None
_on = os.environ.get(VARIABLE, "1").strip().lower() not in ("0", "false", "off", "no")


def choose(
    kernel: Any,
    candidates: Sequence[Config],
    sample: Array,
    sizes: Sequence[int],
    run: Callable[[Config], None],
    **also: Any,
) -> Config:
    """The fastest of the candidates, for this GPU, this dtype and sizes of about these.

    Args:
        kernel: a `triton.jit` function; when its file changes, it is measured again.
        candidates: constants and Triton's options, the one to take unmeasured first. One that
            needs more shared memory or registers than there are is passed over.
        sample: an array of the call: its dtype and device are part of the key.
        sizes: the sizes that decide, each rounded up to a power of two for the key.
        run: launches with a configuration. It is called many times: what it writes must come out
            the same each time (an update in place needs a copy to work on).
        also: whatever else makes another kernel of it, as `causal=True`.

    The first candidate is taken unmeasured in the interpreter, with one candidate only, with tuning
    switched off (`tuning(False)`, TINYGRAD_LLM_TUNE=0), and while a CUDA graph is captured.

    Raises:
        RuntimeError: no candidate fits this GPU.
    """
    if INTERPRETED or len(candidates) == 1:
        return candidates[0]
    bucket = tuple([next_power_of_2(n) for n in sizes])
    place = (id(kernel), sample.dtype, sample.data.device_id, _on)
    key = (*place, *bucket, *also.items(), len(candidates))
    found = _chosen.get(key)
    if found is None:
        with _lock:
            found = _stored_or_measured(kernel, candidates, sample, bucket, run, also)
        if found is None:
            if _on:  # a graph is captured: later there will be time
                return candidates[0]
            found = candidates[0]
        _chosen[key] = found
    return found


@contextlib.contextmanager
def tuning(on: bool) -> Iterator[None]:
    """Inside the `with`, measure or do not: what is on disk is used in either case."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


@contextlib.contextmanager
def reporting(report: Report | None) -> Iterator[None]:
    """Inside the `with`, `report` gets a line at each measurement: for a progress display."""
    global _report
    before, _report = _report, report
    try:
        yield
    finally:
        _report = before


def table() -> dict[str, dict[str, Any]]:
    """{key: {'config': …, 'ms': …}}: what is on disk for the current GPU."""
    return _read(_file(_device_name()))


def _stored_or_measured(
    kernel: Any,
    candidates: Sequence[Config],
    sample: Array,
    bucket: tuple[int, ...],
    run: Callable[[Config], None],
    also: dict[str, Any],
) -> Config | None:
    """None where nothing is stored and nothing may be measured."""
    file = _file(_device_name())
    key = _key(kernel, sample, bucket, also)
    stored = _read(file).get(key)
    if stored is not None and stored["config"] in candidates:
        return stored["config"]
    if not _on or backend.cupy().cuda.get_current_stream().is_capturing():
        return None
    config, milliseconds = _fastest(key.partition("@")[0].strip(), candidates, run)
    _write(file, key, {"config": config, "ms": round(milliseconds, 6)})
    return config


def _key(kernel: Any, sample: Array, bucket: tuple[int, ...], also: dict[str, Any]) -> str:
    """'softmax._forward float32 (128, 1024) causal=True @ 1f3a…', the digest that of the file."""
    module = kernel.fn.__module__.rpartition(".")[2]
    options = "".join([f" {name}={value}" for name, value in sorted(also.items())])
    name = f"{module}.{kernel.fn.__name__} {sample.dtype} {bucket}{options}"
    return f"{name} @ {_digest(inspect.getfile(kernel.fn))}"


@functools.cache
def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


# --- measuring ------------------------------------------------------------------------------------

_TOO_LARGE = (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError)


def _fastest(
    name: str, candidates: Sequence[Config], run: Callable[[Config], None]
) -> tuple[Config, float]:
    best, least, refusal = None, math.inf, None
    cold = _cold_cache()
    for i, config in enumerate(candidates):
        if _report is not None:
            so_far = "" if best is None else f", best {least:.4f} ms"
            _report(f"tuning {name}: {i + 1} of {len(candidates)}{so_far}")
        try:
            milliseconds = _time(functools.partial(run, config), cold, least)
        except _TOO_LARGE as error:
            refusal = error
            continue
        if milliseconds < least:
            best, least = config, milliseconds
    if best is None:
        raise RuntimeError(
            f"none of the {len(candidates)} configurations of {name} fits this GPU: {refusal}"
        ) from refusal
    if _report is not None:
        _report(f"tuned {name}: {best}, {least:.4f} ms")
    return best, least


def _time(run: Callable[[], None], cold: Callable[[], None], least: float) -> float:
    """The median milliseconds of a run, from memory that no cache holds.

    Few runs suffice to see that one takes twice the `least` so far.
    """
    run()  # compiles
    run()
    milliseconds = _events(run, cold, 5)
    if milliseconds > 2 * least:
        return milliseconds
    return _events(run, cold, max(10, min(100, int(20 / max(milliseconds, 1e-3)))))


def _events(run: Callable[[], None], cold: Callable[[], None], times: int) -> float:
    cuda = backend.cupy().cuda
    pairs = [(cuda.Event(), cuda.Event()) for _ in range(times)]
    for start, stop in pairs:
        cold()  # which also takes longer than a launch: the GPU never waits for Python
        start.record()
        run()
        stop.record()
    pairs[-1][1].synchronize()
    return statistics.median([cuda.get_elapsed_time(start, stop) for start, stop in pairs])


def _cold_cache() -> Callable[[], None]:
    """A function that overwrites twice as much memory as the level-2 cache holds."""
    cupy = backend.cupy()
    level_2 = cupy.cuda.Device().attributes.get("L2CacheSize", 0)
    memory = cupy.empty(max(2 * level_2, 2**26), dtype="uint8")
    return lambda: memory.data.memset_async(0, memory.nbytes)


# --- on disk --------------------------------------------------------------------------------------


def _device_name() -> str:
    cupy = backend.cupy()
    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"]
    return name.decode() if isinstance(name, bytes) else str(name)


def _file(device: str) -> Path:
    # As data/cache.py has it, which stands some floors above.
    shared = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache"
    folder = os.environ.get("TINYGRAD_LLM_CACHE") or base / "tinygrad-llm"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", device).strip("-")
    return Path(folder).expanduser() / "kernels" / f"{name}-triton-{triton.__version__}.json"


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """What is stored; nothing, with a warning, where the file is not what we write."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        if all(isinstance(e["config"], dict) and e["ms"] >= 0 for e in entries.values()):
            return entries
        problem = "it holds something else"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        problem = str(error)
    warnings.warn(
        f"the tuning cache {file} cannot be used ({problem}): kernels are measured again",
        RuntimeWarning,
        stacklevel=2,
    )
    return {}


def _write(file: Path, key: str, entry: dict[str, Any]) -> None:
    """Add an entry; whoever reads meanwhile sees the file of before or the one of after."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `choose` has said so already
            entries = _read(file) | {key: entry}
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem)
        try:
            with open(handle, "w", encoding="utf-8") as stream:
                json.dump(entries, stream, indent=1, sort_keys=True)
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        warnings.warn(
            f"the tuning cache {file} cannot be written ({error}): kernels are measured again in "
            f"the next process",
            RuntimeWarning,
            stacklevel=2,
        )
