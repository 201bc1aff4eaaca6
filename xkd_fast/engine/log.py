"""Where metrics go: ``metrics.jsonl``, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xkd_fast.errors import UserError
from xkd_fast.files import write_aside

if TYPE_CHECKING:
    from xkd_fast.config import Config


@contextmanager
def telling_of(directory: Path) -> Iterator[None]:
    """Turn what goes wrong in writing a run's records into one sentence about its folder."""
    try:
        yield
    except OSError as error:
        place = error.filename or directory
        raise UserError(
            f"{place} cannot be written ({error.strerror or error}); make room or mend that, then go on with --resume auto"
        ) from error


class MetricLog:
    """Rows of metrics in ``metrics.jsonl``, TensorBoard and, if asked for, Weights & Biases; for rank 0 alone."""

    def __init__(self) -> None:
        self._file: Any = None
        self._board: Any = None
        self._wandb: Any = None

    def open(self, directory: Path, config: Config, resumed_at: int) -> None:
        """Open what ``config.log`` asks for; rows after step ``resumed_at``, left by an interrupted run, are dropped.

        Raises:
            UserError: it cannot be written.
        """
        with telling_of(directory):
            self._open(directory, config, resumed_at)

    def _open(self, directory: Path, config: Config, resumed_at: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        if config.log.jsonl:
            path = directory / "metrics.jsonl"
            keep_rows(path, resumed_at)
            self._file = path.open("a", encoding="utf-8")
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)
        if config.log.wandb:
            self._wandb = start_wandb(directory, config, resumed_at)

    def write(self, row: dict[str, float]) -> None:
        """Write one row; ``row["step"]`` is its step.

        Raises:
            UserError: it cannot be written.
        """
        step = int(row["step"])
        with telling_of(self._directory):
            if self._file is not None:
                self._file.write(json.dumps(row) + "\n")
                self._file.flush()
            if self._board is not None:
                for name, value in row.items():
                    if name != "step":
                        self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(row, step=step)

    def close(self) -> None:
        """Flush and close every sink."""
        if self._file is not None:
            with suppress(OSError):  # what could not be written has been told
                self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def keep_rows(path: Path, last_step: int) -> None:
    """Drop from a metrics file the rows after ``last_step`` and a torn last line, replacing the file in one step."""
    if not path.exists():
        return
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= last_step:
            rows.append(line)
    write_aside(path, "".join(line + "\n" for line in rows).encode())


def require_wandb() -> None:
    """Raise ``UserError`` where Weights & Biases is not installed."""
    if find_spec("wandb") is None:
        raise UserError("log.wandb = true needs the package wandb; install it with: pip install wandb")


def start_wandb(directory: Path, config: Config, resumed_at: int) -> Any:
    """A Weights & Biases run; the same one again where training goes on. Its id is kept in the run's folder."""
    import wandb

    path = directory / "wandb-run-id"
    known = path.read_text(encoding="utf-8").strip() if resumed_at and path.exists() else None
    run = wandb.init(dir=str(directory), config=config.shareable().as_dict(), id=known, resume="allow")
    write_aside(path, f"{run.id}\n".encode())
    return run
