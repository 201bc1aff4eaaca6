"""`benchmarks/gpu.sh` runs anywhere at tiny sizes, so that it does not fail first on the machine it is for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_gpu_script_runs_to_its_end_without_a_gpu() -> None:
    """Red if it needs more than torch, a test or a benchmark of it fails, or a failure does not reach the exit code."""
    packages = (
        "deepspeed",
        "nvidia.dali",
        "pydantic",
        "av",
        "sklearn",
        "rich",
        "yaml",
        "safetensors",
        "hypothesis",
        "matplotlib",
    )
    blocked = f"import sys\nfor name in {packages!r}: sys.modules[name] = None\n"
    results = {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").iterdir()}
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--smoke"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.count(" passed") == 2
    rows = [line for line in done.stdout.splitlines() if " tiny, " in line and "× reference" in line and "× strong" in line]
    assert len(rows) == 6 and done.stdout.rstrip().endswith(rows[-1])
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").iterdir()} == results
    imports = "import benchmarks.test_step, benchmarks.test_attention, benchmarks.table, tests.model.test_fast_model"
    alone = subprocess.run([sys.executable, "-c", blocked + imports], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert alone.returncode == 0, alone.stderr[-2000:]
    wrong = subprocess.run(["bash", "benchmarks/gpu.sh", "--fast"], cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert wrong.returncode == 2 and b"unknown arguments --fast" in wrong.stderr
