"""Brings a run's metrics to the progress bar and the logs, at the logging cadence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from xkd_fast.engine.checkpoint import Checkpoints
from xkd_fast.engine.engine import Engine
from xkd_fast.engine.launch import every_rank, first_rank_first
from xkd_fast.engine.metrics import MetricLog, Speedometer, StepMetrics, memory_metrics, moment_metrics, telling_of
from xkd_fast.engine.progress import TrainProgress
from xkd_fast.engine.schedule import Moment, Schedule
from xkd_fast.errors import UserError
from xkd_fast.objective.losses import Losses

if TYPE_CHECKING:
    from xkd_fast.config import Config
    from xkd_fast.data.pipeline import DamagedSample


class NonFiniteLoss(UserError):
    """A loss term, or the gradients, became NaN or infinite."""


class Reporter:
    """One run's reporting; use as a context manager."""

    def __init__(self, config: Config, engine: Engine, step: int, schedule: Schedule) -> None:
        """``step``: steps already taken; later rows of an interrupted run are dropped from the logs."""
        self._config, self._steps_per_epoch = config, schedule.steps_per_epoch
        self._engine, self._metrics = engine, StepMetrics(engine)
        self._speed = Speedometer(config.train.global_batch)
        self._folder, self._damaged = Path(config.output), 0
        self._log = MetricLog()
        first_rank_first(lambda: self._log.open(self._folder, config, resumed_at=step))
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
        return step % self._config.log.every_steps == 0

    def end_step(self, step: int, moment: Moment, damage: Callable[[], list[DamagedSample]], *, is_last: bool) -> bool:
        """Close step number ``step``; write a row where one is due. True where it was: this synchronised with the device.

        ``damage`` gives the samples that this rank found damaged since it was last asked; they are listed and counted.

        Raises:
            NonFiniteLoss: naming the term, if one is NaN or infinite (found out at the logging cadence).
        """
        self._metrics.add_gradients(step)
        self._speed.step()
        self._progress.advance()
        is_due = is_last or self.due(step)
        if is_due:
            self.check_finite()
            row = {"step": step, "epoch": step / self._steps_per_epoch, **self._metrics.report(), **self._speed.read()}
            row |= moment_metrics(moment) | memory_metrics(self._engine.device)
            row["damaged_samples"] = self._list_damaged(damage())
            first_rank_first(lambda: self._log.write(row))
            self._progress.show(row)
        self._metrics.end_step()
        return is_due

    def _list_damaged(self, new: list[DamagedSample]) -> int:
        """Append to this rank's list of damaged samples; returns how many all ranks have met so far."""

        def append() -> None:
            path = self._folder / f"damaged-{dist.get_rank():05d}.jsonl"
            with telling_of(path), path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(sample)) + "\n" for sample in new)

        every_rank(append if new else lambda: None)
        if new:
            self.say(f"{len(new)} damaged samples replaced, such as {new[0].reason}; listed in {self._folder}/damaged-*.jsonl")
        self._damaged += len(new)
        total = torch.tensor(self._damaged, device=self._engine.device)
        dist.all_reduce(total)
        return int(total.item())

    def check_finite(self) -> None:
        """Raise :class:`NonFiniteLoss` on every rank if any loss, or the gradients, were NaN or infinite so far."""
        bad = self._metrics.first_non_finite()
        if bad is None:
            return
        self._stop(*bad)

    def check_savable(self, step: int) -> None:
        """:meth:`check_finite`, and the same of the weights after ``step`` steps: every number that a checkpoint would hold."""
        self.check_finite()
        norms = torch.stack(torch._foreach_norm(list(self._engine.module.parameters())))
        spoiled = (~norms.isfinite()).any().int()
        dist.all_reduce(spoiled, op=dist.ReduceOp.MAX)
        if spoiled.item():
            self._stop(["weights"], step)

    def _stop(self, names: list[str], step: int) -> None:
        found = Checkpoints.from_config(self._config).found()
        standing = f"{found[-1]} is of a step before" if found else "no checkpoint was written before"
        float32 = "" if self._config.train.precision == "float32" else ", or with train.precision=float32"
        error = NonFiniteLoss(
            f"{', '.join(names)} became NaN or infinite at step {step}, and training stopped; {standing}. "
            f"Start a new run (another output) with a lower optimizer.lr{float32}"
        )
        error.is_told = dist.get_rank() > 0
        raise error
