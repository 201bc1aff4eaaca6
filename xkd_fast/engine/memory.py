"""A record of every allocation on the GPU, for pytorch.org/memory_viz: where memory went, or why it ran out."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from xkd_fast.errors import UserError

ENTRIES = 200_000  # allocations remembered


class MemoryRecord:
    """Records from entering on; the snapshot is written after the step asked for, or where memory runs out before."""

    def __init__(self, folder: Path, step: int | None, device: torch.device) -> None:
        """``step``: after which step; None = nothing is recorded.

        Raises:
            UserError: there is no GPU whose memory could be recorded.
        """
        if step is not None and device.type != "cuda":
            raise UserError(f"log.memory_snapshot = {step} records a GPU's memory, but this run has none; set it to null")
        self._path, self._step = folder / f"memory-{dist.get_rank():05d}.pickle", step

    def __enter__(self) -> MemoryRecord:
        if self._step is not None:
            torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._step is None:
            return
        if isinstance(error, torch.OutOfMemoryError):
            self._write()
        torch.cuda.memory._record_memory_history(enabled=None)

    def expect(self, first: int, last: int) -> None:
        """Say which steps the run will take: ``first`` to ``last``.

        Raises:
            UserError: the step to record is not one of them, so nothing would ever be written.
        """
        if self._step is not None and not first <= self._step <= last:
            raise UserError(
                f"log.memory_snapshot = {self._step} is none of the steps that this run takes, {first} to {last}; name one of "
                "them, or set it to null"
            )

    def after(self, step: int) -> None:
        """Write the snapshot if this was the step, and record no more: running out of memory later must not replace it."""
        if step == self._step:
            self._write()
            torch.cuda.memory._record_memory_history(enabled=None)
            self._step = None

    def _write(self) -> None:
        torch.cuda.memory._dump_snapshot(str(self._path))
