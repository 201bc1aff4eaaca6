"""Every kernel compiles for GPUs that are not here, without spilling registers and within their shared memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one program may have
# A stack of 8 bytes at 80 registers holds no spilled register: half of the register file is free. These two have one, at 10.0.
STACK = 8
NO_SPILL = [
    ("_packed_attention_forward_kernel", {"WIDTH": 16, "PRECISION": None, "Q_BLOCK": 64, "K_BLOCK": 64, "num_warps": 4}),
    ("_packed_attention_forward_kernel", {"WIDTH": 64, "PRECISION": "ieee", "Q_BLOCK": 32, "K_BLOCK": 32, "num_warps": 4}),
]


@pytest.fixture(scope="module")
def resources() -> list[dict]:
    """Of all kernels at all capabilities; compiled by another process, since this one interprets them."""
    command = [sys.executable, "-m", "benchmarks.resources", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def is_known(row: dict) -> bool:
    """Whether what counts as spilled is one of the known stacks."""
    if row["capability"] != 100 or row["spilled"] > STACK or row["registers"] > 80 or row["kernel"] != NO_SPILL[0][0]:
        return False
    return any(all(row["constants"].get(name) == value for name, value in constants.items()) for _, constants in NO_SPILL)


def test_only_the_known_stacks_are_excused():
    """Catches an exception so wide that a spill hides in it."""
    kernel, constants = NO_SPILL[0]
    row = {"kernel": kernel, "constants": constants, "capability": 100, "registers": 80, "spilled": STACK}
    assert is_known(row)
    changes = [{"spilled": 16}, {"registers": 88}, {"capability": 90}, {"kernel": "_packed_attention_whole_backward_kernel"}]
    for change in [*changes, {"constants": {**constants, "Q_BLOCK": 128}}]:
        assert not is_known({**row, **change})


def test_the_bench_command_prints_the_table():
    """Catches a table that pytest keeps to itself: that of a passing test, without -s."""
    (recipe,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "pytest benchmarks" in line]
    flags = recipe.split("pytest benchmarks")[1].replace("$(PYTEST_ARGS)", "").split()
    assert "--benchmark" in flags
    flags.remove("--benchmark")  # one case instead of all
    command = [sys.executable, "-m", "pytest", "benchmarks/test_resources.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and re.search(r"bias_gelu_backward .* sm_90 +\d+ +0 B", done.stdout), done.stdout


def test_nothing_spills_and_everything_fits(resources):
    """Catches tiles that outgrow the registers or the shared memory: slow or impossible to launch, and seen on no CPU."""
    spilling = [row for row in resources if row["spilled"] and not is_known(row)]
    assert spilling == []
    assert [row for row in resources if row["shared"] > SHARED_LIMIT[row["capability"]]] == []
    assert all(0 < row["registers"] <= 255 for row in resources)


def test_every_kernel_is_compiled(resources):
    """Catches a kernel without a case, whose resources nobody would see."""
    kernels = {row["kernel"] for row in resources}
    written = set()
    for path in (ROOT / "kernels" / "xkd_kernels").glob("*.py"):
        names = [line.split("(")[0].removeprefix("def ") for line in path.read_text().splitlines()]
        written |= {name for name in names if name.startswith("_") and name.endswith("_kernel")}
    assert written - kernels == set()
    assert {row["capability"] for row in resources} == {80, 90, 100}
