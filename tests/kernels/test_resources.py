"""Every kernel compiles for GPUs that are not here, without spilling registers and within their shared memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one program may have
# A stack of 8 bytes at 80 registers holds no spilled register: half of the register file is free.
NO_SPILL = {("_packed_attention_forward_kernel", "packed_attention, head width 16", 100)}


@pytest.fixture(scope="module")
def resources() -> list[dict]:
    """Of all kernels at all capabilities; compiled by another process, since this one interprets them."""
    command = [sys.executable, "-m", "benchmarks.resources", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_spills_and_everything_fits(resources):
    """Catches tiles that outgrow the registers or the shared memory: slow or impossible to launch, and seen on no CPU."""
    spilling = {
        (row["kernel"], row["case"], row["capability"]): row["spilled"]
        for row in resources
        if row["spilled"] and (row["kernel"], row["case"], row["capability"]) not in NO_SPILL
    }
    assert spilling == {}
    assert [row for row in resources if row["shared"] > SHARED_LIMIT[row["capability"]]] == []
    assert all(0 < row["registers"] <= 255 for row in resources)


def test_every_kernel_is_compiled(resources):
    """Catches a kernel without a case, whose resources nobody would see."""
    kernels = {row["kernel"] for row in resources}
    written = set()
    for path in (ROOT / "kernels" / "xkd_kernels").glob("*.py"):
        names = [line.split("(")[0].removeprefix("def ") for line in path.read_text().splitlines()]
        written |= {name for name in names if name.startswith("_") and name.endswith("_kernel")}
    assert written - kernels == {"_gather_patches_backward_kernel"}, "raw pixels get no gradient in the trainer"
    assert {row["capability"] for row in resources} == {80, 90, 100}
