"""The fused operators at the shapes of the base model's step, with what each is measured against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import xkd_kernels as kernels
from xkd_kernels.backends import shape_class
from xkd_kernels.segments import Runs

HEADS, WIDTH, HIDDEN = 12, 768, 3072
DECODER_WIDTH, DECODER_HIDDEN = 384, 1536
VIDEO_PATCH, AUDIO_PATCH = (4, 16, 16), (4, 16)
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One operator at one place of the step.

    Attributes:
        name: operator and place.
        dtype, shape: by which ``xkd_kernels.choose`` looks for its measurement.
        inputs: (clips, device) → its tensors; those that require a gradient are differentiated.
        call: (backend, inputs) → by our operator.
        naive: of the inputs, by its definition.
        lengths: of attention's segments, one of each per clip.
        capabilities: of the GPUs that it can run on.
        close: the most that results of two implementations may differ by, in parts of the largest number.
    """

    name: str
    dtype: torch.dtype
    shape: str
    inputs: Callable[[int, torch.device], list[Tensor]]
    call: Callable[..., Result]
    naive: Callable[..., Result]
    lengths: tuple[int, ...] = ()
    capabilities: tuple[int, ...] = (80, 90, 100)
    close: float = 2e-2  # in bfloat16

    @property
    def operator(self) -> str:
        """What is measured."""
        return self.name.split(",")[0]

    @property
    def fused(self) -> Callable[..., Result]:
        """By our kernels."""
        return partial(self.call, "triton")

    @property
    def plain(self) -> Callable[..., Result]:
        """By PyTorch's own operators, as our operator takes them."""
        return partial(self.call, "torch")


def runs_of(qkv: Tensor, lengths: tuple[int, ...]) -> Runs:
    """As many segments of each length as there are clips."""
    return [(len(qkv) // sum(lengths), length) for length in lengths]


def _attention(place: str, lengths: tuple[int, ...], width: int, *, trained: bool, heads: int = HEADS) -> Case:
    def inputs(clips: int, device: torch.device) -> list[Tensor]:
        shape = (clips * sum(lengths), 3, heads, width)
        return [torch.randn(shape, dtype=torch.bfloat16, device=device, requires_grad=trained)]

    return Case(
        f"packed_attention, {place}",
        torch.bfloat16,
        f"{shape_class(max(lengths))}x{width}",
        inputs,
        lambda backend, qkv: kernels.packed_attention(qkv, runs_of(qkv, lengths), backend=backend),
        lambda qkv: kernels.naive_packed_attention(qkv, runs_of(qkv, lengths)),
        lengths,
    )


def _cls_attention(place: str, length: int, *, trained: bool = False, heads: int = HEADS) -> Case:
    def inputs(clips: int, device: torch.device) -> list[Tensor]:
        shape = (clips * length, 3, heads, WIDTH // HEADS)
        return [torch.randn(shape, dtype=torch.bfloat16, device=device, requires_grad=trained)]

    return Case(
        f"cls_attention, {place}",
        torch.bfloat16,
        f"{shape_class(length)}x{WIDTH // HEADS}",
        inputs,
        lambda backend, qkv: kernels.cls_attention(qkv, runs_of(qkv, (length,)), backend=backend),
        lambda qkv: kernels.naive_cls_attention(qkv, runs_of(qkv, (length,))),
    )


def _residual_layer_norm(place: str, tokens: int, width: int) -> Case:
    def inputs(clips: int, device: torch.device) -> list[Tensor]:
        x = torch.randn(clips * tokens, width, device=device, requires_grad=True)
        branch = torch.randn(clips * tokens, width, dtype=torch.bfloat16, device=device, requires_grad=True)
        return [x, branch, *(torch.randn(width, device=device, requires_grad=True) for _ in range(2))]

    return Case(
        f"residual_layer_norm, {place}",
        torch.float32,
        str(width),
        inputs,
        lambda backend, *x: kernels.residual_layer_norm(*x, 1e-5, dtype=torch.bfloat16, backend=backend),
        lambda *x: kernels.naive_residual_layer_norm(*x, 1e-5, torch.bfloat16),
    )


def _bias_gelu(place: str, tokens: int, width: int) -> Case:
    def inputs(clips: int, device: torch.device) -> list[Tensor]:
        h = torch.randn(clips * tokens, width, dtype=torch.bfloat16, device=device, requires_grad=True)
        return [h, torch.randn(width, device=device, requires_grad=True)]

    return Case(
        f"bias_gelu, {place}",
        torch.bfloat16,
        str(width),
        inputs,
        lambda backend, h, bias: kernels.bias_gelu(h, bias, backend=backend),
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
        torch.bfloat16 if video else torch.float32,
        str(math.prod(patch) * (size[-1] if video else 1)),
        inputs,
        lambda backend, *x: kernels.gather_patches(*x, patch, *affine, dtype=torch.bfloat16, backend=backend),
        lambda *x: kernels.naive_gather_patches(*x, patch, *affine, dtype=torch.bfloat16),
    )


def _fp8(operator: str, place: str, tokens: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """A quantisation in a teacher's pass; two may be a step of E4M3 apart, 1 in 14 for the largest numbers."""

    def inputs(clips: int, device: torch.device) -> list[Tensor]:
        shape = (clips * tokens, width)
        x, weight, bias = torch.randn(shape, dtype=dtype, device=device), *torch.randn(2, width, device=device).unbind()
        if operator == "residual_layer_norm_fp8":
            return [x, torch.randn(shape, dtype=torch.bfloat16, device=device), weight, bias]
        return [x, bias] if operator == "bias_gelu_fp8" else [x]

    eps = (1e-5,) if operator == "residual_layer_norm_fp8" else ()
    return Case(
        f"{operator}, {place}",
        dtype,
        str(width),
        inputs,
        lambda backend, *x: getattr(kernels, operator)(*x, *eps, backend=backend),
        lambda *x: getattr(kernels, f"naive_{operator}")(*x, *eps),
        capabilities=(90, 100),
        close=8e-2,
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
    _fp8("quantise_rows", "teacher audio", 561, WIDTH),
    _fp8("quantise_rows", "weight of fc1", 96, WIDTH, torch.float32),  # at 32 clips as many rows as it has
    _fp8("quantise_rows", "weight of fc2", 24, HIDDEN, torch.float32),
    _fp8("residual_layer_norm_fp8", "audio", 561, WIDTH, torch.float32),
    _fp8("bias_gelu_fp8", "teacher audio", 561, HIDDEN),
)

# Sizes that the base model does not have but users may: other head widths, a trained CLS attention, float32.
FURTHER = (
    *(_attention(f"head width {width}", (50, 200), width, trained=True) for width in (16, 24, 128)),
    _cls_attention("trained", 141, trained=True),
    _residual_layer_norm("large", 254, 1024),
)

# The same operators so small that the interpreter is soon done with them.
SMALL = (
    _attention("small", (5, 20), 16, trained=True, heads=2),
    _cls_attention("small", 9, heads=2),
    _residual_layer_norm("small", 7, 24),
    _bias_gelu("small", 7, 48),
    _gather("small video", (4, 32, 32, 3), VIDEO_PATCH, 2, 4),
    _fp8("quantise_rows", "small", 7, 24),
    _fp8("residual_layer_norm_fp8", "small", 7, 24, torch.float32),
    _fp8("bias_gelu_fp8", "small", 7, 48),
)
