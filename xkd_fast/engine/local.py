"""What follows the backward pass for a model that one process holds alone, without DeepSpeed: for profiles and benchmarks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xkd_fast.engine.ema import Teachers
from xkd_fast.engine.groups import group_parameters
from xkd_fast.engine.optimizer import ClippedAdamW
from xkd_fast.engine.updates import Update
from xkd_fast.reference import update_centres


class LocalUpdate:
    """Per-tensor clipping, AdamW, teachers and centres of a model.

    Attributes:
        optimizer: the optimiser.
        teachers: the pairs of students and teachers.
    """

    def __init__(self, model: Any, update: Update, *, lr: float, weight_decay: float, clip_norm: float | None) -> None:
        self._model = model
        video, audio = ((model.student(m), model.teacher(m)) for m in ("video", "audio"))
        self.teachers = Teachers(video, audio, model if hasattr(model, "halves") else None)
        groups = group_parameters(model.named_parameters(), weight_decay)
        self.optimizer = ClippedAdamW(groups, lr=lr, clip_norm=clip_norm, update=update, teachers=self.teachers)

    def step(self, video_momentum: float, audio_momentum: float) -> None:
        """Clip, update the students, and forget the gradients; the update may move teachers on its way."""
        self.teachers.set_momenta(video_momentum, audio_momentum)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def follow(self, teacher_means: dict[str, Tensor]) -> None:
        """Move the teachers that have not moved yet, and the centres."""
        self.teachers.follow()
        update_centres(self._model, teacher_means)
