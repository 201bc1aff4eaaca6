"""Who is timed: the reference as released, the strongest plain PyTorch, and the fast model. Each does one whole step.

A step is forward, backward, per-tensor clipping, AdamW, both teachers and centres. Needs torch alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xkd_fast import reference
from xkd_fast.data.views import MaskNoise, Views
from xkd_fast.engine.local import LocalUpdate
from xkd_fast.engine.updates import Torch, Update, Xkd
from xkd_fast.model.build import build_model
from xkd_fast.model.options import ModelOptions
from xkd_fast.model.vit import PROGRAMS

LR, BETAS, WEIGHT_DECAY, MAX_NORM, MOMENTUM = 1e-4, (0.9, 0.95), 0.3, 0.3, 0.997


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast in ``dtype``; nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def initial_model(options: ModelOptions, device: torch.device) -> reference.XKD:
    """The model whose weights all begin with: a base model's take a host 13 s to draw, and 1 s to copy."""
    return _drawn_once(options.as_reference(), device)


@lru_cache(maxsize=1)
def _drawn_once(options: ModelOptions, device: torch.device) -> reference.XKD:
    with device:
        return build_model(options, seed=0)


def with_initial_weights(options: ModelOptions, device: torch.device) -> reference.XKD:
    """A model on ``device`` with copies of :func:`initial_model`'s weights and buffers."""
    first = initial_model(options, device)
    state = first.state_dict()
    with torch.device("meta"):  # draws nothing
        model = build_model(options, seed=0)
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    for name, buffer in first.named_buffers():
        if name not in state:
            model.register_buffer(name, buffer.clone(), persistent=False)
    return model


def clip_in_a_loop(model: reference.XKD) -> None:
    """Clip gradients one by one, as released: every norm waits for the device."""
    for parameter in reference.clipped_parameters(model):
        norm = parameter.grad.norm()  # type: ignore[union-attr]
        if (factor := MAX_NORM / (norm.item() + reference.CLIP_EPS)) < 1:
            parameter.grad.mul_(factor)  # type: ignore[union-attr]


class Contestant(ABC):
    """A model with its whole step."""

    name: str

    def __init__(self, options: ModelOptions, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.model = self.build(options)
        self.terms: dict[str, Tensor] = {}  # of the latest step's loss

    def build(self, options: ModelOptions) -> reference.XKD:
        """The model."""
        return with_initial_weights(options.as_reference(), self.device)

    @abstractmethod
    def step(self, views: Views, masks: MaskNoise) -> Tensor:
        """One whole step; returns the loss, not yet waited for."""

    def loss_scale(self) -> float:
        """What the loss is multiplied by; falls with a step that is left out for its gradients' overflow."""
        return 1.0


class Released(Contestant):
    """The plain reference as released: loops over parameters that wait for the device; float16 with loss scaling on a GPU."""

    name = "reference"

    def __init__(self, options: ModelOptions, device: torch.device, dtype: torch.dtype) -> None:
        half = device.type == "cuda" and dtype != torch.float32
        super().__init__(options, device, torch.float16 if half else dtype)
        groups = reference.parameter_groups(self.model, WEIGHT_DECAY)
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS)
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)

    def step(self, views: Views, masks: MaskNoise) -> Tensor:
        """One whole step."""
        self.optimizer.zero_grad()
        with autocast(self.device, self.dtype):
            losses = self.model(views, masks)
        self.scaler.scale(losses.total).backward()
        self.scaler.unscale_(self.optimizer)
        clip_in_a_loop(self.model)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        reference.update_teachers(self.model, MOMENTUM, MOMENTUM)
        reference.update_centres(self.model, losses.outputs.teacher_means)
        self.terms = losses.terms()
        return self.terms["total"]

    def loss_scale(self) -> float:
        """The scaler's."""
        return self.scaler.get_scale()


class _SdpaBlock(reference.Block):
    """A block that attends without a matrix, and so returns none."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)))), x


def _blocks_without_matrix(model: reference.XKD) -> Iterator[reference.Block]:
    """Every block but the teachers' last ones, whose attention refinement needs."""
    needed = {id(model.teacher(modality).encoder.blocks[-1]) for modality in reference.MODALITIES}
    return (block for block in model.modules() if isinstance(block, reference.Block) and id(block) not in needed)


class FewLaunches(Contestant):
    """Multi-tensor clipping, fused AdamW and multi-tensor teachers around a model."""

    update: type[Update] = Torch

    def __init__(self, options: ModelOptions, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(options, device, dtype)
        update = self.update(BETAS, 1e-8)
        self.local = LocalUpdate(self.model, update, lr=LR, weight_decay=WEIGHT_DECAY, clip_norm=MAX_NORM)

    def clip(self) -> None:
        """Whatever clips gradients before the update, which does it by itself."""

    def step(self, views: Views, masks: MaskNoise) -> Tensor:
        """One whole step."""
        with autocast(self.device, self.dtype):
            losses = self.model(views, masks)
        losses.total.backward()
        self.clip()
        self.local.step(MOMENTUM, MOMENTUM)
        self.local.follow(losses.outputs.teacher_means)
        self.terms = losses.terms()
        return self.terms["total"]


class Strong(FewLaunches):
    """The strong yardstick: the reference with SDPA, torch.compile on every block and few launches around it."""

    name = "strong"
    update = Torch

    def build(self, options: ModelOptions) -> reference.XKD:
        """The reference with other blocks."""
        model = super().build(options)
        for block in _blocks_without_matrix(model):
            block.__class__ = _SdpaBlock
        return model

    def __init__(self, options: ModelOptions, device: torch.device, dtype: torch.dtype, *, compiled: bool = True) -> None:
        super().__init__(options, device, dtype)
        self.local.optimizer.backend = self.local.teachers.backend = "torch"  # none of our compiled code
        if compiled:  # views of both modalities, with and without gradient: more programs than the default admits
            torch._dynamo.config.recompile_limit = PROGRAMS
            for module in self.model.modules():
                if isinstance(module, (reference.Block, reference.Head)):
                    module.compile(dynamic=False)


class Fast(FewLaunches):
    """What users train with."""

    name = "fast"
    update = Xkd
    choices: Mapping[str, Any] = {}

    def build(self, options: ModelOptions) -> reference.XKD:
        """The fast model."""
        return with_initial_weights(replace(options, implementation="fast", **self.choices), self.device)


def fast_with(*switches: str) -> type[Fast]:
    """The fast model with some of its switches on, such as "compile" and "cuda_graph"."""
    choices: dict[str, Any] = dict.fromkeys(switches, True)
    return type("FastWith", (Fast,), {"name": " + ".join(("fast", *switches)), "choices": choices})
