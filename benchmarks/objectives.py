"""Heads, refinement and losses by themselves: what follows the encoders and decoders of a model, forward and backward.

Contestants are the reference's code at this place and the fast model's, by PyTorch's operators or by our kernels. What encoders
and decoders give is drawn at random; pixels are 8-bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.ablation import PLAIN, PlainObjectives, replaced
from benchmarks.contestants import autocast
from xkd_fast.model import xkd
from xkd_fast.model.build import build_model
from xkd_fast.model.options import ModelOptions
from xkd_fast.model.precision import as_written
from xkd_fast.reference import MODALITIES


@dataclass(frozen=True)
class Given:
    """What encoders, decoders and data hand over, by modality.

    Attributes:
        pooled: [views · B, D] the students' means of patch tokens, differentiated.
        tokens, attention: the teachers' [B, N, D] and [B, h, N].
        predicted: [B, N − keep, P], differentiated.
        clips: the global view alone, raw.
        order: [B, N] token numbers, the visible ones first.
    """

    pooled: dict[str, Tensor]
    tokens: dict[str, Tensor]
    attention: dict[str, Tensor]
    predicted: dict[str, Tensor]
    clips: dict[str, list[Tensor]]
    order: dict[str, Tensor]


def given(options: ModelOptions, device: torch.device, dtype: torch.dtype, clips: int) -> Given:
    """Random ones, of the types that a pass under autocast in ``dtype`` brings."""
    video, audio = options.video, options.audio
    width, heads = options.encoder.width, options.encoder.heads
    parts = {"video": video, "audio": audio}
    draw = partial(torch.randn, device=device)
    pixels = torch.randint(256, (clips, video.frames, video.size, video.size, video.channels), device=device)
    raw = {
        "video": [pixels.to(torch.uint8).permute(0, 4, 1, 2, 3)],
        "audio": [draw(clips, 1, audio.mel_bins, audio.frames)],
    }
    looks = {m: draw(heads, clips, 1 + part.tokens).softmax(dim=-1) for m, part in parts.items()}
    return Given(
        pooled={m: draw((1 + part.local_views) * clips, width).requires_grad_() for m, part in parts.items()},
        tokens={m: draw(clips, 1 + part.tokens, width)[:, 1:] for m, part in parts.items()},
        attention={m: each.transpose(0, 1)[:, :, 1:] for m, each in looks.items()},
        predicted={
            m: draw(clips, part.tokens - part.keep, part.patch_numbers).to(dtype).requires_grad_() for m, part in parts.items()
        },
        clips=raw,
        order={m: torch.rand(clips, part.tokens, device=device).argsort(dim=1) for m, part in parts.items()},
    )


def loss(model: xkd.XKD, batch: Given, dtype: torch.dtype) -> Tensor:
    """The total loss from what encoders and decoders handed over."""
    device = batch.order["video"].device
    with autocast(device, dtype):
        with torch.no_grad():
            teachers = model.teachers_for(device)
            taught, weights = model.refined_logits(teachers, batch.tokens, batch.attention)
        said = {m: xkd.project(model.student(m).head, batch.pooled[m], model.options.kernels) for m in MODALITIES}
        with as_written(device):
            losses = model.masked_objectives(batch.clips, batch.predicted, batch.order, said, taught, weights)
    return losses.total


class Contestant:
    """One way to compute it.

    Args:
        options: the model's; its blocks are left out.
        batch: what is handed over.
        dtype: of products.
        kernels: who computes, as ``model.kernels`` says it; None = the reference's code.
    """

    def __init__(self, options: ModelOptions, batch: Given, dtype: torch.dtype, kernels: str | None) -> None:
        small: dict[str, Any] = {name: replace(getattr(options, name), depth=1) for name in ("encoder", "decoder")}
        with batch.order["video"].device:
            model = build_model(replace(options, kernels=kernels or "torch", **small), seed=0)
        assert isinstance(model, xkd.XKD)
        self.functions = PLAIN if kernels is None else ()
        if kernels is None:
            model.__class__ = PlainObjectives
        self.model, self.batch, self.dtype = model, batch, dtype
        heads = [p for m in MODALITIES for p in model.student(m).head.parameters() if p.requires_grad]
        self.leaves = [*heads, *batch.pooled.values(), *batch.predicted.values()]

    def forward(self) -> Tensor:
        """The loss."""
        with replaced(self.functions):
            return loss(self.model, self.batch, self.dtype)

    def both_passes(self) -> tuple[Tensor, ...]:
        """The loss and its gradients by heads, pooled tokens and predictions."""
        total = self.forward()
        return total.detach(), *torch.autograd.grad(total, self.leaves)
