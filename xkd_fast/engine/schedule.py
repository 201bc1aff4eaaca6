"""Everything that changes with time, as pure functions of the step (XKD.md section 8)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xkd_fast.model.options import TemperatureOptions

if TYPE_CHECKING:
    from xkd_fast.config import Config


def warmup_cosine(step: int, base: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate at ``step``: linear from exactly 0 to exactly ``base`` at the warm-up's last step, then a cosine.

    The cosine is base·½(1 + cos(π·i/n)) for i = 0 … n − 1, so it starts at ``base`` again and 0 is never reached.
    """
    if step < warmup_steps:
        return base * (step / max(warmup_steps - 1, 1))  # the ratio first: its last value is exactly 1
    remaining = total_steps - warmup_steps
    return base * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / remaining))


def cosine(step: int, start: float, end: float, total_steps: int) -> float:
    """From ``start`` at step 0 towards ``end`` along a half cosine, i = 0 … total − 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def teacher_temperature(epoch: int, options: TemperatureOptions) -> float:
    """Temperature of an epoch: linear over the warm-up with both ends included, then constant."""
    if epoch >= options.warmup_epochs:
        return options.end
    return options.start + (options.end - options.start) * epoch / max(options.warmup_epochs - 1, 1)


@dataclass(frozen=True)
class Moment:
    """The schedules' values at one optimiser step."""

    learning_rate: float
    video_momentum: float
    audio_momentum: float
    video_temperature: float
    audio_temperature: float
    last_layer_frozen: bool


@dataclass(frozen=True)
class Schedule:
    """All schedules of a run, by optimiser steps taken."""

    config: Config
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.train.epochs * self.steps_per_epoch

    @property
    def base_learning_rate(self) -> float:
        """Peak learning rate: the configured one scaled linearly with the global batch."""
        optimizer = self.config.optimizer
        return optimizer.lr * self.config.train.global_batch / optimizer.lr_batch

    def at(self, step: int) -> Moment:
        """Values for optimiser step ``step`` (0 is the first)."""
        config, total, epoch = self.config, self.total_steps, step // self.steps_per_epoch
        warmup = min(config.optimizer.warmup_epochs, config.train.epochs) * self.steps_per_epoch
        objective = config.model.objective
        return Moment(
            learning_rate=warmup_cosine(step, self.base_learning_rate, warmup, total),
            video_momentum=cosine(step, config.ema.video_start, config.ema.video_end, total),
            audio_momentum=cosine(step, config.ema.audio_start, config.ema.audio_end, total),
            video_temperature=teacher_temperature(epoch, objective.video_teacher_temperature),
            audio_temperature=teacher_temperature(epoch, objective.audio_teacher_temperature),
            last_layer_frozen=epoch < config.optimizer.freeze_last_layer_epochs,
        )
