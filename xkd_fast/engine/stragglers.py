"""Which rank is slow: every rank's forward passes, which wait for no other rank, timed on its own device."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist


class Stragglers:
    """Context manager around each forward pass; :meth:`read` compares the ranks at the logging cadence."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._seconds, self._passes = device, 0.0, 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._passes += 1
        if self._events:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._start

    def read(self) -> dict[str, float]:
        """Mean seconds of a forward pass since the last reading, and the slowest rank's. Synchronises; for every rank."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds = sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        mean = torch.tensor([self._seconds / max(self._passes, 1)], device=self._device)
        self._events, self._seconds, self._passes = [], 0.0, 0
        every = [torch.zeros_like(mean) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mean)
        seconds = [each.item() for each in every]
        slowest = max(range(len(seconds)), key=lambda rank: seconds[rank])
        return {
            "forward_seconds": sum(seconds) / len(seconds),
            "slowest_forward_seconds": seconds[slowest],
            "slowest_rank": float(slowest),
        }
