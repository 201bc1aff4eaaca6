"""Making batches beside the step: a stream of its own on a GPU, and what keeps the two streams from each other's memory.

On a CPU the same calls do nothing, as PyTorch defines them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from xkd_fast.data.views import MaskNoise, Views


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; from the host's memory to a GPU's by way of pinned memory, so that no thread waits for it."""
    if tensor.device == device:
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def seconds_between(marks: Sequence[Any]) -> list[float]:
    """Seconds from each event of a GPU's stream to the next one; all of them have happened."""
    return [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(marks)]


class Beside:
    """The stream of the thread that makes batches for a model on ``device``.

    Attributes:
        asynchronous: whether operations go on after their call has returned, as on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._on = torch.get_device_module(device)
        self.asynchronous = device.type == "cuda"
        self._stream: Any = self._on.Stream(device) if device.type == "cuda" else self._on.Stream()

    def work(self) -> AbstractContextManager[Any]:
        """Inside, this thread's operations go to the stream, on its device."""
        return self._on.stream(self._stream)

    def mark(self) -> Any:
        """An event behind everything so far on the caller's current stream; on a GPU it knows when that was."""
        event = self._on.Event(enable_timing=True) if self.asynchronous else self._on.Event()
        event.record(self._on.current_stream())
        return event

    def hand_over(self, views: Views, noise: MaskNoise, made: Any) -> tuple[Views, MaskNoise]:
        """A batch, made by the time of the event ``made``, for use on the caller's current stream; the host does not wait."""
        stream = self._on.current_stream()
        made.wait(stream)

        def used_here(tensor: Tensor) -> Tensor:
            if tensor.is_cuda:
                tensor.record_stream(stream)  # its memory is not given to a later batch while the step still reads it
            return tensor

        return views.map(used_here), noise.map(used_here)
