"""What a run reports: losses, health of the distillation, speed. Nothing here waits for the device off the logging path."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from xkd_fast.engine.engine import MODALITIES, Engine
from xkd_fast.engine.schedule import Moment
from xkd_fast.errors import UserError
from xkd_fast.files import write_aside
from xkd_fast.objective.losses import Losses

if TYPE_CHECKING:
    from xkd_fast.config import Config

NEVER = 2**62
GRADIENT_NORM = "gradient_norm"


def entropy(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Mean entropy, in nats, of softmax(logits / temperature): [rows, K] → scalar. ln K means uniform: nothing is taught."""
    log_probabilities = (logits.float() / temperature).log_softmax(dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()


class StepMetrics:
    """Collects one optimiser step's losses over its micro-batches and remembers, per term, the first step that broke.

    Everything stays on the device until :meth:`report`, which synchronises on purpose and is called on the logging path only.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._micro_batches = 0
        self._first_bad: Tensor | None = None  # per term, and last the gradient norm
        self._last: Losses | None = None

    def add(self, losses: Losses, step: int) -> None:
        """Take in one micro-batch of step number ``step`` (counted from 1)."""
        terms = losses.terms()
        values = torch.stack([value.float() for value in terms.values()])
        if self._first_bad is None:
            self._names = list(terms)
            self._first_bad = torch.full((len(terms) + 1,), NEVER, dtype=torch.int64, device=values.device)
        self._note_bad(slice(None, -1), values, step)
        self._sum = values if self._sum is None else self._sum + values
        self._micro_batches += 1
        self._last = losses

    def add_gradients(self, step: int) -> None:
        """Take in the gradients of step number ``step``, once the optimiser has used them."""
        self._note_bad(slice(-1, None), self._engine.optimizer.gradient_norm(), step)

    def _note_bad(self, places: slice, values: Tensor, step: int) -> None:
        assert self._first_bad is not None
        first = self._first_bad[places]
        self._first_bad[places] = torch.where(values.isfinite(), first, first.clamp(max=step))

    def end_step(self) -> None:
        """Forget the step's sums; the next :meth:`add` starts a new step."""
        self._sum, self._micro_batches = None, 0

    def first_non_finite(self) -> tuple[list[str], int] | None:
        """The terms that were NaN or infinite first, on any rank, and the step; None while all were finite. Synchronises.

        A term is told apart from the sums that it enters, and the gradient norm from the losses it follows from.
        """
        if self._first_bad is None:
            return None
        first = self._first_bad.clone()
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        bad = {name: step for name, step in zip([*self._names, GRADIENT_NORM], first.tolist(), strict=True) if step < NEVER}
        if not bad:
            return None
        start = min(bad.values())
        culprits = [name for name, step in bad.items() if step == start]
        follow = ("total", "reconstruction", "distillation", "alignment", GRADIENT_NORM)
        return [name for name in culprits if name not in follow] or culprits, start

    def report(self) -> dict[str, float]:
        """The step's terms averaged over micro-batches and ranks, entropies and gradient norm. Synchronises."""
        assert self._sum is not None and self._last is not None
        values = {name: value for name, value in zip(self._names, self._sum / self._micro_batches, strict=True)}
        outputs, module = self._last.outputs, self._engine.module
        for modality in MODALITIES:
            centred = outputs.teacher_logits[modality] - module.get_buffer(f"{modality}_centre")
            temperature = module.get_buffer(f"{modality}_teacher_temperature")
            values[f"{modality}_teacher_entropy"] = entropy(centred, temperature)
            student_temperature = module.options.objective.student_temperature
            values[f"{modality}_student_entropy"] = entropy(outputs.student_logits[modality], student_temperature)
        vector = torch.stack([value.float() for value in values.values()])
        dist.all_reduce(vector)
        vector /= dist.get_world_size()
        report = dict(zip(values, vector.tolist(), strict=True))
        report[GRADIENT_NORM] = self._engine.optimizer.gradient_norm().item()
        return report


class Speedometer:
    """Clips per second and the share of time spent waiting for data, since the last reading."""

    def __init__(self, clips_per_step: int) -> None:
        self._clips_per_step = clips_per_step
        self.restart()

    def restart(self) -> None:
        """Begin a new measuring interval."""
        self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def waited(self, seconds: float) -> None:
        """Count time the step waited for its data."""
        self._waited += seconds

    def step(self) -> None:
        """Count one optimiser step."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Rates since the last reading, and start a new interval."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        rates = {
            "clips_per_second": self._steps * self._clips_per_step / elapsed,
            "data_wait_share": self._waited / elapsed,
        }
        self.restart()
        return rates


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
            self._wandb = start_wandb(directory, config)

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


def start_wandb(directory: Path, config: Config) -> Any:
    """A Weights & Biases run."""
    import wandb

    return wandb.init(dir=str(directory), config=config.as_dict(), resume="allow")


def moment_metrics(moment: Moment) -> dict[str, float]:
    """The schedules' values as metrics."""
    return {
        "learning_rate": moment.learning_rate,
        "video_ema_momentum": moment.video_momentum,
        "audio_ema_momentum": moment.audio_momentum,
        "video_teacher_temperature": moment.video_temperature,
        "audio_teacher_temperature": moment.audio_temperature,
    }


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Host memory of this process and, on a GPU, the device's peak, in GiB."""
    metrics = {"host_memory_gib": psutil.Process().memory_info().rss / 2**30}
    if device.type == "cuda":
        metrics["gpu_peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return metrics
