"""Where the time goes that a batch takes: seconds by stage, as the thread that makes the batches spends them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

Stage = Literal["read", "decode", "augment", "copy"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class StageTimes:
    """Seconds spent in each stage, and clips made, since the last reading. Threads may share it.

    Stages of one batch follow each other, so their seconds add up to the time that making batches took; within a stage, all
    threads that work on it count once. A GPU works on after it was told to: what is waited for it then is shared out among
    the stages by its own clock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds, self._clips = dict.fromkeys(STAGES, 0.0), 0

    @contextmanager
    def of(self, stage: Stage) -> Iterator[None]:
        """Count the time inside as ``stage``'s."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            with self._lock:
                self._seconds[stage] += elapsed

    @contextmanager
    def of_waiting(self, spent: Callable[[], Mapping[Stage, float]]) -> Iterator[None]:
        """Count the time inside, in which a GPU was waited for, as its stages', in the proportion of their own seconds there.

        ``spent`` is called after it.
        """
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        seconds = spent()
        total = sum(seconds.values())
        with self._lock:
            for stage, own in seconds.items():
                self._seconds[stage] += elapsed * (own / total if total > 0 else 1 / len(seconds))

    def made(self, clips: int) -> None:
        """Count clips of a finished batch."""
        with self._lock:
            self._clips += clips

    def read(self) -> tuple[dict[Stage, float], int]:
        """Seconds by stage and clips since the last reading, and start anew."""
        with self._lock:
            read = self._seconds, self._clips
            self._seconds, self._clips = dict.fromkeys(STAGES, 0.0), 0
        return read
