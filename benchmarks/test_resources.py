"""What each kernel takes of a GPU, compiled without one: the whole table with ``--benchmark``, one case without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_resources(measuring: bool) -> None:
    """Prints registers, spills and shared memory."""
    arguments = [] if measuring else ["--case", "bias_gelu, student audio"]
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    command = [sys.executable, "-m", "benchmarks.resources", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert "bias_gelu_backward" in done.stdout and "sm_90" in done.stdout
