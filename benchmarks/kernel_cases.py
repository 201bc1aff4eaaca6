"""The fused operators at the shapes of the base model's step, with what each is measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import xkd_kernels as kernels
from xkd_kernels.segments import Runs

HEADS, WIDTH, HIDDEN = 12, 768, 3072
DECODER_WIDTH, DECODER_HIDDEN = 384, 1536
VIDEO_PATCH, AUDIO_PATCH = (4, 16, 16), (4, 16)
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Case:
    """One operator at one place of the step.

    Attributes:
        name: operator and place.
        inputs: (clips, device) → its tensors; those that require a gradient are differentiated.
        fused: of the inputs, by our kernels.
        naive: of the inputs, by its definition.
    """

    name: str
    inputs: Callable[[int, torch.device], list[Tensor]]
    fused: Callable[..., Tensor | tuple[Tensor, ...]]
    naive: Callable[..., Tensor | tuple[Tensor, ...]]

    @property
    def operator(self) -> str:
        """What is measured."""
        return self.name.split(",")[0]


def _attention(place: str, lengths: tuple[int, ...], width: int, *, trained: bool) -> Case:
    def inputs(clips: int, device: torch.device) -> list[Tensor]:
        shape = (clips * sum(lengths), 3, HEADS, width)
        return [torch.randn(shape, dtype=torch.bfloat16, device=device, requires_grad=trained)]

    def runs(qkv: Tensor) -> Runs:
        return [(len(qkv) // sum(lengths), length) for length in lengths]

    return Case(
        f"packed_attention, {place}",
        inputs,
        lambda qkv: kernels.packed_attention(qkv, runs(qkv), backend="triton"),
        lambda qkv: kernels.naive_packed_attention(qkv, runs(qkv)),
    )


def _cls_attention(place: str, length: int, *, trained: bool = False) -> Case:
    def inputs(clips: int, device: torch.device) -> list[Tensor]:
        shape = (clips * length, 3, HEADS, WIDTH // HEADS)
        return [torch.randn(shape, dtype=torch.bfloat16, device=device, requires_grad=trained)]

    return Case(
        f"cls_attention, {place}",
        inputs,
        lambda qkv: kernels.cls_attention(qkv, [(len(qkv) // length, length)], backend="triton"),
        lambda qkv: kernels.naive_cls_attention(qkv, [(len(qkv) // length, length)]),
    )


def _residual_layer_norm(place: str, tokens: int, width: int) -> Case:
    def inputs(clips: int, device: torch.device) -> list[Tensor]:
        x = torch.randn(clips * tokens, width, device=device, requires_grad=True)
        branch = torch.randn(clips * tokens, width, dtype=torch.bfloat16, device=device, requires_grad=True)
        return [x, branch, *(torch.randn(width, device=device, requires_grad=True) for _ in range(2))]

    return Case(
        f"residual_layer_norm, {place}",
        inputs,
        lambda *x: kernels.residual_layer_norm(*x, 1e-5, dtype=torch.bfloat16, backend="triton"),
        lambda *x: kernels.naive_residual_layer_norm(*x, 1e-5, torch.bfloat16),
    )


def _bias_gelu(place: str, tokens: int, width: int) -> Case:
    def inputs(clips: int, device: torch.device) -> list[Tensor]:
        h = torch.randn(clips * tokens, width, dtype=torch.bfloat16, device=device, requires_grad=True)
        return [h, torch.randn(width, device=device, requires_grad=True)]

    return Case(
        f"bias_gelu, {place}",
        inputs,
        lambda h, bias: kernels.bias_gelu(h, bias, backend="triton"),
        kernels.naive_bias_gelu,
    )


def _gather(place: str, size: tuple[int, ...], patch: tuple[int, ...], keep: int, total: int) -> Case:
    video = len(size) == 4
    affine = (PIXEL_MEAN, PIXEL_STD) if video else ((), ())

    def inputs(clips: int, device: torch.device) -> list[Tensor]:
        ids = torch.rand(clips, total, device=device).argsort(dim=1)[:, :keep]
        if video:
            frames = torch.randint(256, (clips, *size), dtype=torch.uint8, device=device)
            return [frames.permute(0, 4, 1, 2, 3), ids]
        return [torch.randn(clips, 1, *size, device=device), ids]

    return Case(
        f"gather_patches, {place}",
        inputs,
        lambda clip, ids: kernels.gather_patches(clip, ids, patch, *affine, dtype=torch.bfloat16, backend="triton"),
        lambda clip, ids: kernels.naive_gather_patches(clip, ids, patch, *affine, dtype=torch.bfloat16),
    )


CASES = (
    _attention("student video", (60, 73), 64, trained=True),
    _attention("student audio", (113, 141), 64, trained=True),
    _attention("teacher video", (393,), 64, trained=False),
    _attention("teacher audio", (561,), 64, trained=False),
    _attention("decoder video", (393,), 32, trained=True),
    _attention("decoder audio", (561,), 32, trained=True),
    _cls_attention("teacher video", 393),
    _cls_attention("teacher audio", 561),
    _residual_layer_norm("student audio", 254, WIDTH),
    _residual_layer_norm("decoder audio", 561, DECODER_WIDTH),
    _bias_gelu("student audio", 254, HIDDEN),
    _bias_gelu("decoder audio", 561, DECODER_HIDDEN),
    _gather("video of bytes", (32, 112, 112, 3), VIDEO_PATCH, 59, 392),
    _gather("spectrogram", (80, 448), AUDIO_PATCH, 112, 560),
)

# Sizes that the base model does not have but users may: other head widths, a trained CLS attention, float32.
FURTHER = (
    *(_attention(f"head width {width}", (50, 200), width, trained=True) for width in (16, 24, 128)),
    _cls_attention("trained", 141, trained=True),
    _residual_layer_norm("large", 254, 1024),
)
