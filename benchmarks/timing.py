"""Times of single operators, in turns, so that a machine that slows down slows all of them.

On a GPU each call is timed by events, behind a wait that lets the host get ahead and a sweep that leaves nothing of the call
before in the cache: what is measured is the device's time on data that lie in its memory. A call during which the device caught
up with the host is made again behind a longer wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

WAIT = 4_000_000  # GPU cycles, two milliseconds: longer than most hosts take to launch an operator with its backward pass
LONGEST = 64 * WAIT  # what waits for the device by itself is never ahead of it
CACHE = 256 << 20  # bytes, more than any GPU's second cache holds

Work = Callable[[], object]


def seconds(works: Mapping[str, Work], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Of every work, ``rounds`` times, after two untimed ones."""
    time_once = _DeviceSeconds() if device.type == "cuda" else _host_seconds
    for work in works.values():
        work()
        work()
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(time_once(work, device))
    return found


def _host_seconds(work: Work, device: torch.device) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class _DeviceSeconds:
    """Of one work at a time; remembers how long each has to wait."""

    def __init__(self) -> None:
        self.waits: dict[Work, int] = {}

    def __call__(self, work: Work, device: torch.device) -> float:
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            wait = self.waits.setdefault(work, WAIT)
            torch.cuda._sleep(wait)
            torch.empty(CACHE, dtype=torch.int8, device=device).zero_()
            start.record()
            work()
            is_ahead = not start.query()
            end.record()
            torch.cuda.synchronize(device)
            if is_ahead or wait >= LONGEST:
                return start.elapsed_time(end) / 1e3
            self.waits[work] = 4 * wait
