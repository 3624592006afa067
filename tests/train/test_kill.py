"""A run stopped at random moments, also in the middle of a save, ends as the one left in peace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("killed_runs.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the program forks")
@pytest.mark.parametrize(
    ("signal", "seed", "processes"),
    [("SIGKILL", 1, 1), ("SIGTERM", 3, 1), ("SIGKILL", 2, 2), ("SIGTERM", 4, 2)],
)
def test_a_run_stopped_twenty_times_ends_with_the_same_weights(tmp_path, signal, seed, processes):
    if processes > 1 and sys.platform != "linux":
        pytest.skip("several processes train on Linux only")
    done = subprocess.run(
        [sys.executable, PROGRAM, str(tmp_path), str(seed), "20", signal, str(processes)],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["stops"] >= 10  # the end may come before the twentieth
    assert found["in a save"] >= (signal == "SIGKILL")
    assert found["killed"] == found["whole"]
    assert found["metrics"] == list(range(81))
    assert found["samples"] is True
