"""Brings a run's metrics to the progress bar and the logs, at the logging cadence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from xkd_fast.engine.engine import Engine
from xkd_fast.engine.metrics import MetricLog, Speedometer, StepMetrics, memory_metrics, moment_metrics
from xkd_fast.engine.progress import TrainProgress
from xkd_fast.engine.schedule import Moment, Schedule
from xkd_fast.objective.losses import Losses

if TYPE_CHECKING:
    from xkd_fast.config import Config


class Reporter:
    """One run's reporting; use as a context manager."""

    def __init__(self, config: Config, engine: Engine, step: int, schedule: Schedule) -> None:
        """``step``: steps already taken; later rows of an interrupted run are dropped from the logs."""
        self._every, self._steps_per_epoch = config.log.every_steps, schedule.steps_per_epoch
        self._engine, self._metrics = engine, StepMetrics(engine)
        self._speed = Speedometer(config.train.global_batch)
        self._log = MetricLog(Path(config.output), config, resumed_at=step)
        enabled = config.log.progress and dist.get_rank() == 0
        self._progress = TrainProgress(schedule.total_steps, step, enabled=enabled)

    def __enter__(self) -> Reporter:
        self._progress.__enter__()
        self._speed.restart()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(None, None, None)
        self._log.close()

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        self._progress.say(message)

    def waited(self, seconds: float) -> None:
        """Count time the step waited for its data."""
        self._speed.waited(seconds)

    def add(self, losses: Losses, step: int) -> None:
        """Take in a micro-batch's losses of step number ``step`` (counted from 1)."""
        self._metrics.add(losses, step)

    def due(self, step: int) -> bool:
        """Whether a row belongs after ``step`` steps."""
        return step % self._every == 0

    def end_step(self, step: int, moment: Moment, extra: Callable[[], dict[str, float]], *, is_last: bool) -> bool:
        """Close step number ``step``; write a row where one is due. True where it was: this synchronised with the device.

        Raises:
            NonFiniteLoss: naming the term, if one is NaN or infinite (found out at the logging cadence).
        """
        self._speed.step()
        self._progress.advance()
        is_due = is_last or self.due(step)
        if is_due:
            self.check_finite()
            row = {"step": step, "epoch": step / self._steps_per_epoch, **self._metrics.report(), **self._speed.read()}
            row |= moment_metrics(moment) | memory_metrics(self._engine.device) | extra()
            self._log.write(row)
            self._progress.show(row)
        self._metrics.end_step()
        return is_due

    def check_finite(self) -> None:
        """Raise :class:`NonFiniteLoss` if any loss so far was NaN or infinite."""
        self._metrics.check_finite()
