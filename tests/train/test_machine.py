"""What the machine says of itself."""

import os

from tinygrad_llm.train.machine import physical_memory


def test_memory_is_known_or_said_to_be_unknown(monkeypatch):
    found = physical_memory()
    assert found is None or found > 10**8

    def unknown(name):
        raise ValueError(f"unrecognized configuration name {name}")

    monkeypatch.setattr(os, "sysconf", unknown)
    assert physical_memory() is None
