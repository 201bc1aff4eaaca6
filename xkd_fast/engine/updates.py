"""Who computes the AdamW update once gradients are clipped: this project's operator, PyTorch, DeepSpeed or apex.

All give the same trajectory. ``xkd`` passes over memory once and moves the teachers on its way; the others are for comparison,
and for users who trust what they know.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xkd_fast.engine.groups import indices_on
from xkd_fast.errors import UserError
from xkd_kernels import Segments, adamw_ema_, choose
from xkd_kernels import obstacle as kernel_obstacle
from xkd_kernels.adamw_ema import OPERATOR, scale_

if TYPE_CHECKING:
    from xkd_fast.engine.ema import Teachers
    from xkd_fast.engine.optimizer import Share


class Update(ABC):
    """One way to compute AdamW.

    Attributes:
        name: as ``optimizer.implementation`` says it.
        defaults: options of a parameter group.
    """

    name: str

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        self.betas, self.eps = betas, eps
        self.defaults: dict[str, Any] = {"betas": betas, "eps": eps}

    @abstractmethod
    def prepare(self, state: dict[str, Any], parameter: Tensor) -> None:
        """Fill a parameter's state before its first step."""

    @abstractmethod
    def __call__(
        self, shares: Sequence[Share], segments: Segments, scales: Tensor, states: Any, teachers: Teachers | None
    ) -> None:
        """Move the shares by their gradients times ``scales``, one per segment; what ``teachers`` are whole may follow."""


class Xkd(Update):
    """``xkd_kernels.adamw_ema_``: clipping, AdamW, teachers and their bfloat16 copies in one pass."""

    name = "xkd"

    def __init__(self, betas: tuple[float, float], eps: float, backend: str = "auto") -> None:
        super().__init__(betas, eps)
        self.backend = backend

    def prepare(self, state: dict[str, Any], parameter: Tensor) -> None:
        """Moments of zero, and a count of steps on the host."""
        if not state:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            state.update(step=0, **moments)

    def __call__(
        self, shares: Sequence[Share], segments: Segments, scales: Tensor, states: Any, teachers: Teachers | None
    ) -> None:
        """See the class; parameters at different counts of steps (once frozen) move in turns."""
        counts = [self._count(states[share.parameter]) for share in shares]
        for step in sorted(set(counts)):
            own = [number for number, count in enumerate(counts) if count == step]
            renumbered = {number: place for place, number in enumerate(own)}
            kept = [i for i, number in enumerate(segments.tensor) if number in renumbered]
            part = Segments(
                [renumbered[segments.tensor[i]] for i in kept],
                [segments.start[i] for i in kept],
                [segments.count[i] for i in kept],
            )
            some = scales if len(kept) == len(segments.tensor) else scales[indices_on(kept, scales.device)]
            self._move([shares[number] for number in own], part, some, states, step, teachers)

    def _move(
        self, shares: list[Share], segments: Segments, scales: Tensor, states: Any, step: int, teachers: Teachers | None
    ) -> None:
        parameters = [share.parameter for share in shares]
        followers = [teachers.follower(parameter) for parameter in parameters] if teachers else []
        adamw_ema_(
            parameters,
            [share.gradient for share in shares],
            [states[parameter]["exp_avg"] for parameter in parameters],
            [states[parameter]["exp_avg_sq"] for parameter in parameters],
            scales,
            segments,
            lr=shares[0].group["lr"],
            betas=self.betas,
            eps=self.eps,
            weight_decays=[share.group["weight_decay"] for share in shares],
            step=step,
            teachers=[follower.teacher if follower else None for follower in followers],
            follow=[follower.weight if follower else 0.0 for follower in followers],
            copies=[follower.copy if follower else None for follower in followers],
            backend=self.backend,
        )
        if teachers:
            teachers.moved(parameters)

    @staticmethod
    def _count(state: dict[str, Any]) -> int:
        """Count a step."""
        state["step"] = int(state["step"]) + 1
        return state["step"]


class Wrapped(Update):
    """Another library's optimiser on gradients that are clipped in place."""

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        super().__init__(betas, eps)
        options: dict[str, Any] = {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0}
        self._inner = self.build([torch.nn.Parameter(torch.zeros(1))], options)
        self.defaults = {**self._inner.defaults, "betas": betas, "eps": eps}

    @abstractmethod
    def build(self, parameters: list[torch.nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
        """The other library's optimiser."""

    def prepare(self, state: dict[str, Any], parameter: Tensor) -> None:
        """It fills the state itself."""

    def __call__(
        self, shares: Sequence[Share], segments: Segments, scales: Tensor, states: Any, teachers: Teachers | None
    ) -> None:
        """Scale the gradients, then let it step."""
        pieces = [
            shares[number].gradient.view(-1).narrow(0, start, count)
            for number, start, count in zip(segments.tensor, segments.start, segments.count, strict=True)
        ]
        scale_(pieces, scales)
        self._inner.state = states
        groups: dict[int, dict[str, Any]] = {}
        for share in shares:
            group = groups.setdefault(share.group["index"], {**share.group, "params": []})
            share.parameter.grad = share.gradient
            group["params"].append(share.parameter)
        self._inner.param_groups = list(groups.values())
        self._inner.step()
        for share in shares:  # some count their steps in the group
            if "step" in groups[share.group["index"]]:
                share.group["step"] = groups[share.group["index"]]["step"]


class Torch(Wrapped):
    """``torch.optim.AdamW``, fused."""

    name = "torch"

    def build(self, parameters: list[torch.nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
        """See the class."""
        return torch.optim.AdamW(parameters, **options, fused=True)


class DeepSpeedCpu(Wrapped):
    """``deepspeed.ops.adam.DeepSpeedCPUAdam``, made for offloaded optimiser states; compiled at first use."""

    name = "deepspeed_cpu"

    def build(self, parameters: list[torch.nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
        """See the class."""
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, **options, adamw_mode=True)


class DeepSpeedFused(Wrapped):
    """``deepspeed.ops.adam.FusedAdam``; compiled at first use."""

    name = "deepspeed_fused"

    def build(self, parameters: list[torch.nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
        """See the class."""
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(parameters, **options, adam_w_mode=True)


class Apex(Wrapped):
    """NVIDIA apex's ``FusedAdam``; built from source by the user."""

    name = "apex"

    def build(self, parameters: list[torch.nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
        """See the class."""
        return import_module("apex.optimizers").FusedAdam(parameters, **options, adam_w_mode=True)


UPDATES: dict[str, type[Update]] = {each.name: each for each in (Xkd, Torch, DeepSpeedCpu, DeepSpeedFused, Apex)}


def obstacle(name: str, device: torch.device) -> str | None:
    """Why the update ``name`` cannot run on parameters of ``device``; None if it can, as far as can be told beforehand."""
    if name == "apex":
        if device.type != "cuda":
            return "NVIDIA apex's FusedAdam runs on a GPU alone"
        if find_spec("apex") is None or find_spec("apex.optimizers") is None:
            return "NVIDIA apex is not installed; build it from source (github.com/NVIDIA/apex, with --cuda_ext)"
    if name == "deepspeed_cpu" and device.type != "cpu":
        return "DeepSpeedCPUAdam moves parameters in host memory: set train.offload_optimizer=true"
    if name == "deepspeed_fused" and device.type == "cpu" and _deepspeed_is_on_a_gpu():
        return "DeepSpeed's FusedAdam is compiled for the GPU here, and the states are in host memory: take deepspeed_cpu"
    if name == "xkd":
        return kernel_obstacle(device, torch.float32, "native")
    return None


def _deepspeed_is_on_a_gpu() -> bool:
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def choose_update(name: str, device: torch.device, betas: tuple[float, float], eps: float) -> tuple[Update, str]:
    """The update that ``optimizer.implementation`` names for parameters on ``device``, and why it is the one.

    Raises:
        UserError: it cannot run here.
    """
    if name == "auto":
        choice = choose(OPERATOR, device, torch.float32, "")
        return Xkd(betas, eps), f"{choice.backend} operator, {choice.reason}"
    reason = obstacle(name, device)
    if reason:
        raise UserError(
            f"optimizer.implementation = {name} cannot run here: {reason}; or set optimizer.implementation=auto or torch"
        )
    if name == "xkd":
        return Xkd(betas, eps, backend="native"), "asked for"
    try:
        return UPDATES[name](betas, eps), "asked for"
    except (ImportError, RuntimeError, OSError) as error:  # what compiling an extension may raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"optimizer.implementation = {name} cannot be loaded here: {reason}") from error
