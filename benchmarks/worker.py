"""A process for each implementation, which does its work in bursts: one each time it is asked.

    in the benchmark       workers = [Worker(__file__, name, "--worker", name) for name in names]
                           found = in_turns(workers, bursts)
    in the process         serve(burst)

What else the machine does falls on all of them alike where they take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# glibc keeps freed memory, as a process of ours does (`backend.keep_freed_memory`).
_KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


class Worker:
    """`python script *arguments`, which calls `serve`; it is ready when this returns."""

    def __init__(self, script: str, name: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | _KEEP,
        )
        self.name = name
        self._answer()

    def burst(self) -> Any:
        """What one burst gives."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """End the process."""
        self.process.communicate()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.name} ended: see its message above")
        return json.loads(line)


def serve(burst: Callable[[], Any]) -> None:
    """The life of a worker: answer each line on standard input with a burst, as JSON."""
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        print(json.dumps(burst()), flush=True)


def in_turns(workers: Sequence[Worker], bursts: int) -> dict[str, list[Any]]:
    """All bursts of each worker, taken in turns; then the workers are ended."""
    found: dict[str, list[Any]] = {worker.name: [] for worker in workers}
    for _ in range(bursts):
        for worker in workers:
            time.sleep(0.3)  # threads of the one before spin for up to 0.2 s after their last work
            found[worker.name].append(worker.burst())
    for worker in workers:
        worker.stop()
    return found
