"""Work that runs beside the main stream of a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from types import TracebackType

import torch
from torch import Tensor


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one side stream of a device: memory that is freed on a stream serves that stream alone."""
    return torch.cuda.Stream(device)


class SideStream:
    """``with side: …`` puts work on a stream of its own; :meth:`join` before its results are read. Does nothing on a CPU."""

    def __init__(self, device: torch.device, *, wanted: bool) -> None:
        self._device = device
        self._stream = _stream(device) if wanted and device.type == "cuda" else None
        self._entered = torch.cuda.stream(self._stream)

    def __enter__(self) -> SideStream:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._entered.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._entered.__exit__(kind, error, traceback)

    def join(self, results: Iterable[Tensor]) -> None:
        """Let the current stream wait for the side stream, and own its ``results``."""
        if self._stream is None:
            return
        main = torch.cuda.current_stream(self._device)
        main.wait_stream(self._stream)
        for result in results:
            result.record_stream(main)
