"""How much memory a contestant takes at most: measured, one contestant at a time."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def free_unused(device: torch.device) -> None:
    """Give back what no tensor holds: compiled programs and their models, cached blocks, freed heap."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def retries(device: torch.device) -> int:
    """How often the allocator has found no memory before it gave back what it kept in reserve."""
    return torch.cuda.memory_stats().get("num_alloc_retries", 0) if device.type == "cuda" else 0


def most_allocated(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that tensors hold at most while ``work`` goes on, beyond those before it; None on a CPU, where nobody counts."""
    if device.type == "cpu":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


class PeakMemory:
    """Watches from its making on: on a GPU what the allocator reserves, a graph's own pool too; on a CPU what is resident."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        free_unused(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_reserved()
        elif CLEAR.exists():
            CLEAR.write_text("5")  # the peak begins anew
            self._before = _resident("VmRSS")

    def bytes(self) -> int | None:
        """The most so far beyond what was held at the beginning; None on a system that does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved() - self._before
        return _resident("VmHWM") - self._before if CLEAR.exists() else None


def _resident(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])
