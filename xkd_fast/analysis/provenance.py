"""What every figure says about itself: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("numpy", "deepspeed", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "scikit-learn", "triton", "xformers")
OF_THE_CODE = (":/", ":(top,exclude)benchmarks/results", ":(top,exclude)README.md")  # what decides a figure


def device_name() -> str:
    """The accelerator, or the CPU's model and instruction set with the threads torch uses: ``AMD EPYC (AVX2), 2 threads``.

    Clouds give processors of several generations one name; the instruction set tells those apart that matter here.
    """
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    instructions = "AMX" if torch.cpu._is_amx_tile_supported() else torch.backends.cpu.get_cpu_capability()
    return f"{_processor()} ({instructions}), {torch.get_num_threads()} threads"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def provenance() -> dict[str, Any]:
    """Device, versions and commit; ``dirty`` where a tracked file but a result or the README differs from the commit.

    A tree that was copied without its history has its commit from ``XKD_BENCHMARK_COMMIT``; whoever copies it vouches for that.
    """
    named = os.environ.get("XKD_BENCHMARK_COMMIT")

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
        except OSError:  # no git here
            return ""
        return done.stdout.strip()

    return {
        "device": device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "commit": named or git("rev-parse", "HEAD") or None,
        "dirty": not named and bool(git("status", "--porcelain", "--untracked-files=no", "--", *OF_THE_CODE)),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
