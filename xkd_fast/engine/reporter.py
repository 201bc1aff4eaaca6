"""Brings a run's metrics to the progress bar and the logs, at the logging cadence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from xkd_fast.data.stage_times import StageTimes
from xkd_fast.engine.checkpoint import Checkpoints, TrainState
from xkd_fast.engine.data_wait import DataWait
from xkd_fast.engine.engine import Engine
from xkd_fast.engine.health import collapse
from xkd_fast.engine.launch import every_rank, first_rank_first
from xkd_fast.engine.log import MetricLog, telling_of
from xkd_fast.engine.metrics import Speedometer, StepMetrics, memory_metrics, moment_metrics
from xkd_fast.engine.progress import TrainProgress
from xkd_fast.engine.schedule import Moment, Schedule
from xkd_fast.errors import UserError
from xkd_fast.objective.losses import Losses

if TYPE_CHECKING:
    from xkd_fast.config import Config
    from xkd_fast.data.fetch import DamagedSample


@dataclass(frozen=True)
class StepCost:
    """What model FLOPs utilisation is computed from.

    Attributes:
        flops_per_clip: of a step, per clip.
        peak: FLOP/s of large matrix products on all ranks together, measured here.
    """

    flops_per_clip: float
    peak: float


class NonFiniteLoss(UserError):
    """A loss term, or the gradients, became NaN or infinite."""


class Reporter:
    """One run's reporting; use as a context manager."""

    def __init__(self, config: Config, engine: Engine, state: TrainState, schedule: Schedule, cost: StepCost) -> None:
        """``state``: where the run stands; later rows of an interrupted one are dropped from the logs."""
        self._config, self._steps_per_epoch = config, schedule.steps_per_epoch
        self._engine, self._metrics = engine, StepMetrics(engine)
        self._speed = Speedometer(config.train.global_batch)
        self._folder, self._damaged, self._collapsed = Path(config.output), 0, False
        self._cost, self._skipped = cost, state.skipped
        self._data_wait = DataWait(StageTimes(), config.log.data_wait_alarm, engine.device)
        self._log = MetricLog()
        first_rank_first(lambda: self._log.open(self._folder, config, resumed_at=state.step))
        enabled = config.log.progress and dist.get_rank() == 0
        self._progress = TrainProgress(schedule.total_steps, state.step, enabled=enabled)

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

    def watch(self, times: StageTimes) -> None:
        """Warn of whichever stage of the data keeps the step waiting, by these times."""
        self._data_wait = DataWait(times, self._config.log.data_wait_alarm, self._engine.device)

    def waited(self, seconds: float) -> None:
        """Count time the step waited for its data."""
        self._speed.waited(seconds)

    def add(self, losses: Losses) -> None:
        """Take in a micro-batch's losses."""
        self._metrics.add(losses)

    def skip_step(self) -> None:
        """The micro-batches so far were of a step that was not taken: its gradients overflowed."""
        self._metrics.begin_step()
        self._skipped += 1

    def due(self, step: int) -> bool:
        """Whether a row belongs after ``step`` steps."""
        return step % self._config.log.every_steps == 0

    def end_step(self, step: int, moment: Moment, damage: Callable[[], list[DamagedSample]], *, is_last: bool) -> bool:
        """Close step number ``step``; write a row where one is due. True where it was: this synchronised with the device.

        ``damage`` gives the samples that this rank found damaged since it was last asked; they are listed and counted.

        Raises:
            NonFiniteLoss: naming the term, if one is NaN or infinite (found out at the logging cadence).
        """
        self._metrics.end_step(step)
        self._speed.step()
        self._progress.advance()
        is_due = is_last or self.due(step)
        if is_due:
            self.check_finite()
            row = {"step": step, "epoch": step / self._steps_per_epoch, **self._metrics.report(), **self._speed.read()}
            row["mfu"] = row["clips_per_second"] * self._cost.flops_per_clip / self._cost.peak
            row |= moment_metrics(moment) | memory_metrics(self._engine.device)
            if self._engine.optimizer.watches_overflow:
                row |= {"loss_scale": self._engine.loss_scale.value, "skipped_steps": self._skipped}
            row |= self._engine.stragglers.read() if self._engine.stragglers else {}
            stages, warning = self._data_wait.read(row["data_wait_share"], row["clips_per_second"])
            row |= stages
            if warning:
                self.say(f"warning: {warning}")
            row["damaged_samples"] = self._list_damaged(damage())
            self._warn_of_collapse(row)
            first_rank_first(lambda: self._log.write(row))
            self._progress.show(row)
        self._metrics.begin_step()
        return is_due

    def _warn_of_collapse(self, row: dict[str, float]) -> None:
        """Say so when a teacher has collapsed: once, until it has recovered."""
        train = self._config.train
        clips = train.clips_per_pass(dist.get_world_size()) * dist.get_world_size()
        warning = collapse(row, self._config.model.head.prototypes, clips)
        if warning and not self._collapsed:
            self.say(f"warning: {warning}")
        self._collapsed = warning is not None

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
        norms = torch.stack(torch._foreach_norm(self._engine.own_parameters()))
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
