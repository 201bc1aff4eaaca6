"""What every benchmark result says about itself, and how it is written."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    """The accelerator, or the CPU model with the threads torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def provenance() -> dict[str, Any]:
    """Device, versions and commit; ``dirty`` where the tree differs from the commit."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
        return done.stdout.strip()

    return {
        "device": device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "commit": git("rev-parse", "HEAD") or None,
        "dirty": bool(git("status", "--porcelain", "--", "*.py")),
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, extremes and number of the measurements."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "runs": len(seconds)}


def write(name: str, result: dict[str, Any]) -> Path:
    """Write ``results/NAME.json`` with its provenance; replaces the file in one step."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    aside = path.with_suffix(".json.partial")
    aside.write_text(json.dumps({**provenance(), **result}, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)
    return path
