"""The training step under DeepSpeed: one optimiser step is a function of the global batch.

The exception is the MMD, which compares the rows of a micro-batch: of each rank (``mmd_scope: rank``, as released) or of all.

Order within a step, for every micro-batch: forward, backward; then once: gradient reduction, per-tensor clipping, AdamW,
teachers, centres. Losses use the centres as they were before the step; the centres' new value is the mean over all
micro-batches and ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from xkd_fast.data.views import MaskNoise, Views
from xkd_fast.engine.ema import TeacherUpdate
from xkd_fast.engine.optimizer import ClippedAdamW, group_parameters
from xkd_fast.engine.schedule import Moment
from xkd_fast.objective.losses import Losses

if TYPE_CHECKING:
    from xkd_fast.config import Config

MODALITIES = ("video", "audio")


def deepspeed_settings(config: Config, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration that follows from ours.

    Parameters stay float32 on every rank: bfloat16 is autocast only, and gradients are reduced in float32, so that teachers
    can be kept by a local float32 update. DeepSpeed's own clipping, by global norm, is off.
    """
    train = config.train
    settings: dict[str, Any] = {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.clips_per_pass(world_size),
        "gradient_accumulation_steps": train.accumulation(world_size),
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": train.zero_stage, "round_robin_gradients": False},
    }
    if train.zero_stage in (1, 2):
        settings["zero_optimization"]["compute_grad_norm"] = False  # a host synchronisation per step, for a norm we do not use
    if train.precision == "bfloat16":
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return settings


class Engine:
    """A model, its optimiser and its teachers, under DeepSpeed.

    Attributes:
        module: the model itself (full float32 parameters on every rank at ZeRO 0–2).
        optimizer: the optimiser that clips and steps.
        deepspeed: DeepSpeed's engine, for checkpoints.
        device: where the model lives.
    """

    def __init__(self, model: Any, config: Config, deepspeed: Any) -> None:
        self.module = model
        groups = group_parameters(model.named_parameters(), config.optimizer.weight_decay)
        self.optimizer = ClippedAdamW(
            groups,
            lr=0.0,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            clip_norm=config.optimizer.clip_norm,
        )
        settings = deepspeed_settings(config, dist.get_world_size())
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=settings)
        self.device: torch.device = self.deepspeed.device
        self.accumulation: int = settings["gradient_accumulation_steps"]
        self._update_teachers = TeacherUpdate(
            (self.module.student("video"), self.module.teacher("video")),
            (self.module.student("audio"), self.module.teacher("audio")),
        )
        self._teacher_means: dict[str, Tensor] = {}

    def prepare(self, moment: Moment) -> None:
        """Set the schedules' values for the coming step."""
        self.optimizer.set_learning_rate(moment.learning_rate)
        self.optimizer.last_layer_frozen = moment.last_layer_frozen
        self.module.set_teacher_temperatures(moment.video_temperature, moment.audio_temperature)

    def forward_backward(self, views: Views, masks: MaskNoise) -> Losses:
        """One micro-batch: losses, and their gradients added to the step's."""
        losses: Losses = self.deepspeed(views, masks)
        self.deepspeed.backward(losses.total)
        for modality, mean in losses.outputs.teacher_means.items():
            previous = self._teacher_means.get(modality)
            self._teacher_means[modality] = mean if previous is None else previous + mean
        return losses

    def step(self, moment: Moment) -> bool:
        """Clip, update students, teachers and centres; False if DeepSpeed skipped the step (then nothing moved).

        Call once per micro-batch, as DeepSpeed counts them; it acts on the last of a global batch.
        """
        is_boundary = self.deepspeed.is_gradient_accumulation_boundary()
        self.deepspeed.step()
        if not is_boundary:
            return False
        applied: bool = self.deepspeed.was_step_applied()
        if applied:
            self._update_teachers(moment.video_momentum, moment.audio_momentum)
            self._update_centres()
        self._teacher_means = {}
        return applied

    @torch.no_grad()
    def _update_centres(self) -> None:
        means = torch.stack([self._teacher_means[modality] for modality in MODALITIES])
        dist.all_reduce(means)
        means /= dist.get_world_size() * self.accumulation
        momentum = self.module.options.objective.centre_momentum
        for modality, mean in zip(MODALITIES, means, strict=True):
            self.module.get_buffer(f"{modality}_centre").lerp_(mean.expand(1, -1), 1 - momentum)
