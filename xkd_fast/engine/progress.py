"""What a person sees while a run goes on: a rich progress bar on a terminal, a line per logging step elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SHOWN = {"total": "loss", "reconstruction": "recon", "distillation": "distil", "alignment": "align"}


def summary(row: dict[str, float]) -> str:
    """One row of metrics as a short text."""
    losses = "  ".join(f"{label} {row[name]:.4f}" for name, label in _SHOWN.items())
    return f"{losses}  {row['clips_per_second']:.1f} clips/s  data wait {row['data_wait_share']:.0%}"


class TrainProgress:
    """Progress of a run; silent where ``enabled`` is false (every rank but the first)."""

    def __init__(self, total_steps: int, completed: int, *, enabled: bool) -> None:
        self._console = Console()
        self._enabled, self._total = enabled, total_steps
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[row]}"),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
        )
        self._task = self._bar.add_task("steps", total=total_steps, completed=completed, row="")

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """One optimiser step done."""
        self._bar.advance(self._task)

    def show(self, row: dict[str, float]) -> None:
        """Show the newest metrics."""
        if not self._enabled:
            return
        if self._console.is_terminal:
            self._bar.update(self._task, row=summary(row))
        else:
            self._console.print(f"step {int(row['step'])}/{self._total}  {summary(row)}", soft_wrap=True, highlight=False)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self._enabled:
            self._console.print(message, soft_wrap=True, highlight=False)
