"""The training step under DeepSpeed: one optimiser step is a function of the global batch.

The exception is the MMD, which compares the rows of a micro-batch: of each rank (``mmd_scope: rank``, as released) or of all.

Order within a step, for every micro-batch: forward, backward; then once: gradient reduction, per-tensor clipping, AdamW,
teachers, centres. Losses use the centres as they were before the step; the centres' new value is the mean over all
micro-batches and ranks. It is the same at every ZeRO stage, world size and accumulation.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from xkd_fast.data.views import MaskNoise, Views
from xkd_fast.engine.ema import Teachers
from xkd_fast.engine.groups import group_parameters
from xkd_fast.engine.launch import own_device
from xkd_fast.engine.loss_scale import LossScale
from xkd_fast.engine.optimizer import ClippedAdamW
from xkd_fast.engine.schedule import Moment
from xkd_fast.engine.stragglers import Stragglers
from xkd_fast.engine.updates import choose_update
from xkd_fast.engine.zero import arrange, gather_whole_model, states_on, told_losses, whole
from xkd_fast.errors import UserError
from xkd_fast.model.fp8 import agreement, described, require_agreement, together
from xkd_fast.objective.losses import Losses
from xkd_fast.reference import MODALITIES

if TYPE_CHECKING:
    from xkd_fast.config import Config


def deepspeed_settings(config: Config, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration that follows from ours.

    Parameters stay float32 on every rank: half types are autocast only, and gradients are reduced in float32, so that teachers
    can be kept by a local float32 update. DeepSpeed's own clipping, by global norm, is off.
    """
    train = config.train
    zero: dict[str, Any] = {"stage": train.zero_stage, "round_robin_gradients": False}
    settings: dict[str, Any] = {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.clips_per_pass(world_size),
        "gradient_accumulation_steps": train.accumulation(world_size),
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # ours moves parameters in host memory as well
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice per micro-batch
        "zero_optimization": zero,
    }
    if train.zero_stage in (1, 2) and not train.offload_optimizer:
        zero["compute_grad_norm"] = False  # a host synchronisation per step, for a norm we do not use
    if train.zero_stage == 3:  # all tensors are gathered together, so none is worth keeping
        zero.update(stage3_param_persistence_threshold=0, stage3_prefetch_bucket_size=0)
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if train.precision != "float32":
        settings["torch_autocast"] = {"enabled": True, "dtype": train.precision, "lower_precision_safe_modules": []}
    return settings


class Engine:
    """A model, its optimiser and its teachers, under DeepSpeed.

    Attributes:
        module: the model itself (at ZeRO 3 its tensors are whole during a pass alone).
        optimizer: the optimiser that clips and steps.
        update_reason: which implementation of its update was chosen, and why.
        teachers: the pairs of students and teachers.
        deepspeed: DeepSpeed's engine, for checkpoints.
        device: where the model lives.
        stragglers: times every rank's forward passes, if asked for.
        loss_scale: what the loss is multiplied by in float16; 1 otherwise.
    """

    def __init__(self, model: Any, config: Config, deepspeed: Any) -> None:
        train, options = config.train, config.optimizer
        self.module = model
        self.device = own_device()
        model.to(self.device)
        if train.precision != "float32" and hasattr(model, "prepare_halves"):
            model.prepare_halves(self.device, getattr(torch, train.precision))
        where = states_on(self.device, train.zero_stage, train.offload_optimizer)
        update, reason = choose_update(options.implementation, where, options.betas, options.eps)
        self.update_reason = f"{update.name}: {reason}"
        self.teachers = Teachers(
            (model.student("video"), model.teacher("video")),
            (model.student("audio"), model.teacher("audio")),
            model if hasattr(model, "halves") else None,
        )
        groups = group_parameters(model.named_parameters(), options.weight_decay)
        self.optimizer = ClippedAdamW(groups, lr=0.0, clip_norm=options.clip_norm, update=update, teachers=self.teachers)
        self.loss_scale = LossScale.for_precision(train.precision)
        self.optimizer.watches_overflow = train.precision == "float16"
        settings = deepspeed_settings(config, dist.get_world_size())
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=settings)
        for owner in (self.deepspeed, self.deepspeed.optimizer):  # its loss scaling knows one rank, or one group, at a time
            for name in ("torch_autocast_z0_gradscaler", "torch_autocast_gradscaler"):
                if getattr(owner, name, None) is not None:
                    setattr(owner, name, None)
        if train.zero_stage == 3:
            gather_whole_model(model)
        arrange(self.deepspeed, self.optimizer, self.teachers, train.zero_stage)
        self.accumulation: int = settings["gradient_accumulation_steps"]
        self.stragglers = Stragglers(self.device) if config.log.stragglers else None
        self._teacher_means: dict[str, Tensor] = {}
        self._terms: dict[str, Tensor] = {}  # of the latest loss

    def own_parameters(self) -> list[Tensor]:
        """All weights, or this rank's shares of them at ZeRO 3."""
        share = self.teachers.share_of or (lambda tensor: tensor.detach())
        return [share(parameter) for parameter in self.module.parameters()]

    def restored(self, state: dict[str, Tensor], loss_scale: dict[str, Any]) -> None:
        """Take over the model's ``state`` and the loss scale of a checkpoint, after DeepSpeed has loaded its part."""
        with whole(list(self.module.parameters()), writing=True):
            self.module.load_state_dict(state)
        if hasattr(self.module, "teachers_moved"):
            self.module.teachers_moved(copied=False)
        self.loss_scale = LossScale(**loss_scale)

    def prepare(self, moment: Moment) -> None:
        """Set the schedules' values for the coming step."""
        self.optimizer.set_learning_rate(moment.learning_rate)
        self.optimizer.last_layer_frozen = moment.last_layer_frozen
        self.optimizer.inverse_scale = 1 / self.loss_scale.value
        self.teachers.set_momenta(moment.video_momentum, moment.audio_momentum)
        self.module.set_teacher_temperatures(moment.video_temperature, moment.audio_temperature)

    def check_teachers(self, views: Views) -> str:
        """Compare teachers in FP8 with themselves in bfloat16 on every rank's batch; a line that says how far apart they are.

        Raises:
            UserError: too far; on every rank alike.
        """
        with whole(list(self.module.parameters())), torch.autocast(self.device.type, torch.bfloat16):
            own = agreement(self.module, views)
        parts = [own] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        found = together(parts)
        try:
            require_agreement(found)
        except UserError as error:
            error.is_told = dist.get_rank() > 0
            raise
        return described(found)

    def forward_backward(self, views: Views, masks: MaskNoise) -> Losses:
        """One micro-batch: losses, and their gradients added to the step's."""
        with self.stragglers or nullcontext():
            losses = told_losses(self.deepspeed(views, masks))
        self._terms = losses.terms()
        total = losses.total if self.loss_scale.value == 1 else losses.total * self.loss_scale.value
        self.deepspeed.backward(total)
        for modality, mean in losses.outputs.teacher_means.items():
            previous = self._teacher_means.get(modality)
            self._teacher_means[modality] = mean if previous is None else previous + mean
        return losses

    def step(self) -> bool:
        """Clip, update students, teachers and centres; False if the step was skipped (then nothing moved).

        Call once per micro-batch, as DeepSpeed counts them; it acts on the last of a global batch.

        Raises:
            UserError: the gradients overflow however small the loss is scaled; naming terms of the loss that do themselves.
        """
        is_boundary = self.deepspeed.is_gradient_accumulation_boundary()
        self.optimizer.skipped = True  # until it has moved: DeepSpeed may decide not to call it
        self.deepspeed.step()
        if not is_boundary:
            return False
        applied = not self.optimizer.skipped
        if not applied and not self.optimizer.watches_overflow:
            raise RuntimeError("DeepSpeed has left out an optimiser step by itself, which this engine tells it not to")
        if applied:
            self.teachers.follow()
            self._update_centres()
        self._teacher_means = {}
        if self.optimizer.watches_overflow:
            try:
                self.loss_scale.update(overflowed=not applied)
            except UserError as error:  # every rank has seen the same gradients
                told = self._spoiled_loss() or error
                told.is_told = dist.get_rank() > 0
                raise told from None
        return applied

    def _spoiled_loss(self) -> UserError | None:
        """An error that names the terms of the latest loss that are not finite on any rank; None where all are."""
        spoiled = torch.stack([~value.isfinite() for value in self._terms.values()]).int()
        dist.all_reduce(spoiled, op=dist.ReduceOp.MAX)
        names = [name for name, is_spoiled in zip(self._terms, spoiled.tolist(), strict=True) if is_spoiled]
        if not names:
            return None
        return UserError(
            f"the loss itself is NaN or infinite in float16 ({', '.join(names)}), and has been for many steps; start a new run "
            "(another output) with a lower optimizer.lr, or with train.precision=bfloat16 or float32"
        )

    @torch.no_grad()
    def _update_centres(self) -> None:
        means = torch.stack([self._teacher_means[modality] for modality in MODALITIES])
        dist.all_reduce(means)
        means /= dist.get_world_size() * self.accumulation
        momentum = self.module.options.objective.centre_momentum
        for modality, mean in zip(MODALITIES, means, strict=True):
            self.module.get_buffer(f"{modality}_centre").lerp_(mean.expand(1, -1), 1 - momentum)
