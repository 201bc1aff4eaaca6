"""Memory that a step frees is there for the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CYCLES = """
import resource, torch
from xkd_fast.engine.heap import keep_freed_memory
{keep}
def cycle():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    several = [torch.ones(n * 2**18) for n in (1, 20, 48, 3)]  # 1 to 48 MiB: 72 in all
    del several
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
cycle(), cycle()
print(min(cycle() for _ in range(3)))
"""


def faults(keep: str) -> int:
    """Pages that a process has to fetch for what it has already had and freed."""
    done = subprocess.run([sys.executable, "-c", CYCLES.format(keep=keep)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_not_fetched_again() -> None:
    """Red if glibc is told nothing, or the wrong thing: then 72 MiB, in pages of 4 KiB or 2 MiB, come back in every cycle."""
    assert faults("assert keep_freed_memory()") <= 2 < 20 <= faults("")
