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
BOTTLENECK, PROTOTYPES = 256, 8192
VIDEO_PATCH, AUDIO_PATCH = (4, 16, 16), (4, 16)
GAMMAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
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


def _attention(
    place: str,
    lengths: tuple[int, ...],
    width: int,
    *,
    trained: bool,
    heads: int = HEADS,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    def inputs(clips: int, device: torch.device) -> list[Tensor]:
        shape = (clips * sum(lengths), 3, heads, width)
        return [torch.randn(shape, dtype=dtype, device=device, requires_grad=trained)]

    return Case(
        f"packed_attention, {place}",
        dtype,
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


def _gather(place: str, size: tuple[int, ...], patch: tuple[int, ...], keep: int, total: int, *, trained: bool = False) -> Case:
    video = len(size) == 4
    affine = (PIXEL_MEAN, PIXEL_STD) if video else ((), ())

    def inputs(clips: int, device: torch.device) -> list[Tensor]:
        ids = torch.rand(clips, total, device=device).argsort(dim=1)[:, :keep]
        if video:
            frames = torch.randint(256, (clips, *size), dtype=torch.uint8, device=device).permute(0, 4, 1, 2, 3)
            return [frames.float().requires_grad_() if trained else frames, ids]
        return [torch.randn(clips, 1, *size, device=device), ids]

    return Case(
        f"gather_patches, {place}",
        torch.bfloat16 if video and not trained else torch.float32,
        str(math.prod(patch) * (size[-1] if video else 1)),
        inputs,
        lambda backend, *x: kernels.gather_patches(*x, patch, *affine, dtype=torch.bfloat16, backend=backend),
        lambda *x: kernels.naive_gather_patches(*x, patch, *affine, dtype=torch.bfloat16),
    )


def _distillation_loss(place: str, prototypes: int) -> Case:
    def inputs(clips: int, device: torch.device) -> list[Tensor]:
        student = torch.randn(2 * clips, prototypes, device=device, requires_grad=True)
        temperature = torch.full((), 0.07, dtype=torch.float64, device=device)
        return [student, torch.randn(clips, prototypes, device=device), torch.zeros(1, prototypes, device=device), temperature]

    return Case(
        f"distillation_loss, {place}",
        torch.float32,
        str(prototypes),
        inputs,
        lambda backend, *x: kernels.distillation_loss(*x, 0.1, backend=backend).loss,
        lambda *x: kernels.naive_distillation_loss(*x, 0.1).loss,
    )


def _unit_rows(place: str, rows: int, width: int) -> Case:
    def inputs(clips: int, device: torch.device) -> list[Tensor]:
        x = torch.randn(rows, width, device=device, requires_grad=True)
        return [x, torch.ones(rows, 1, device=device)]

    return Case(
        f"unit_rows, {place}",
        torch.float32,
        str(width),
        inputs,
        lambda backend, *x: kernels.unit_rows(*x, dtype=torch.bfloat16, backend=backend),
        lambda *x: kernels.naive_unit_rows(*x, dtype=torch.bfloat16),
    )


def _naive_mmd(x: Tensor, y: Tensor) -> Tensor:
    """The twin's numbers without its [rows, rows, width] differences, which no memory holds."""
    exactly, pairs = "donot_use_mm_for_euclid_dist", ((x, x), (y, y), (x, y))
    distance = [torch.cdist(a.float(), b.float(), compute_mode=exactly) for a, b in pairs]
    means = [sum(torch.exp(-gamma * each.square()).mean() for gamma in GAMMAS) for each in distance]
    return means[0] + means[1] - 2 * means[2]  # type: ignore[no-any-return]


def _mmd(
    place: str,
    views: int = 0,
    *,
    rows: int = 0,
    trained: bool = True,
    width: int = PROTOTYPES,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """As many ``rows`` of each modality, or ``views`` of each clip."""

    def inputs(clips: int, device: torch.device) -> list[Tensor]:
        each = rows or clips * views
        return [torch.randn(each, width, dtype=dtype, device=device, requires_grad=trained) for _ in range(2)]

    return Case(
        f"mmd_loss, {place}",
        dtype,
        str(width),
        inputs,
        lambda backend, x, y: kernels.mmd_loss(x, y, GAMMAS, backend=backend),
        _naive_mmd if rows > 64 else lambda x, y: kernels.naive_mmd_loss(x, y, GAMMAS),
    )


def _masked_patch_loss(
    place: str, size: tuple[int, ...], patch: tuple[int, ...], masked: int, total: int, dtype: torch.dtype = torch.bfloat16
) -> Case:
    video = len(size) == 4
    affine = (PIXEL_MEAN, PIXEL_STD) if video else ((), ())
    numbers = math.prod(patch) * (size[-1] if video else 1)

    def inputs(clips: int, device: torch.device) -> list[Tensor]:
        predicted = torch.randn(clips, masked, numbers, device=device).to(dtype).requires_grad_()
        ids = torch.rand(clips, total, device=device).argsort(dim=1)[:, total - masked :]
        if video:
            frames = torch.randint(256, (clips, *size), dtype=torch.uint8, device=device)
            return [predicted, frames.permute(0, 4, 1, 2, 3), ids]
        return [predicted, torch.randn(clips, 1, *size, device=device), ids]

    return Case(
        f"masked_patch_loss, {place}",
        dtype,
        str(numbers),
        inputs,
        lambda backend, *x: kernels.masked_patch_loss(*x, patch, *affine, backend=backend),
        lambda *x: kernels.naive_masked_patch_loss(*x, patch, *affine),
    )


def _refine(place: str, patches: int, others: int, mode: str = "mean", width: int = WIDTH, heads: int = HEADS) -> Case:
    """As the teachers' last block and norm leave them: tokens with CLS first, looks of each head at all clips' tokens."""

    def looks(clips: int, patches: int, device: torch.device) -> Tensor:
        of_tokens = torch.randn(heads, clips, 1 + patches, device=device).softmax(dim=-1)
        return of_tokens.transpose(0, 1)[:, :, 1:]

    def inputs(clips: int, device: torch.device) -> list[Tensor]:
        tokens = torch.randn(clips, 1 + patches, width, device=device)[:, 1:]
        return [tokens, looks(clips, patches, device), looks(clips, others, device)]

    return Case(
        f"refine, {place}",
        torch.float32,
        str(width),
        inputs,
        lambda backend, *x: kernels.refine(*x, mode, backend=backend),
        lambda *x: kernels.naive_refine(*x, mode),
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
    _distillation_loss("one direction", PROTOTYPES),
    _unit_rows("prototypes", PROTOTYPES, BOTTLENECK),
    _mmd("students", 2),
    _mmd("teachers", 1, trained=False),
    _masked_patch_loss("video of bytes", (32, 112, 112, 3), VIDEO_PATCH, 333, 392),
    _masked_patch_loss("spectrogram", (80, 448), AUDIO_PATCH, 448, 560),
    _refine("video", 392, 560),
    _refine("audio", 560, 392),
    _fp8("quantise_rows", "teacher audio", 561, WIDTH),
    _fp8("quantise_rows", "weight of fc1", 96, WIDTH, torch.float32),  # at 32 clips as many rows as it has
    _fp8("quantise_rows", "weight of fc2", 24, HIDDEN, torch.float32),
    _fp8("residual_layer_norm_fp8", "audio", 561, WIDTH, torch.float32),
    _fp8("bias_gelu_fp8", "teacher audio", 561, HIDDEN),
)

# What the base model does not have but users may: other head widths, float32, a trained CLS attention, pixels with a gradient.
FURTHER = (
    *(_attention(f"head width {width}", (50, 200), width, trained=True) for width in (16, 24, 128)),
    *(_attention(f"100 tokens, head width {width}", (100,), width, trained=True) for width in (16, 24, 32)),
    *(_attention(f"float32, {width}", (30, 200), width, trained=True, dtype=torch.float32) for width in (64, 128)),
    _attention("short float32, 24", (30,), 24, trained=True, dtype=torch.float32),
    _cls_attention("trained", 141, trained=True),
    _gather("trained pixels", (32, 112, 112, 3), VIDEO_PATCH, 59, 392, trained=True),
    _residual_layer_norm("large", 254, 1024),
    _distillation_loss("65 536 prototypes", 65536),
    _mmd("64 rows", rows=64),  # as of 32 clips: resources are told for two
    _mmd("256 rows", rows=256),
    _mmd("512 rows", rows=512),
    _mmd("37 half rows of 1000", rows=37, width=1000, dtype=torch.bfloat16),
    _masked_patch_loss("large patches", (8, 64, 64, 3), (4, 32, 32), 5, 8, torch.float32),
    _refine("softmax, large", 392, 560, "softmax", 1024, 16),
)

# The same operators so small that the interpreter is soon done with them.
SMALL = (
    _attention("small", (5, 20), 16, trained=True, heads=2),
    _cls_attention("small", 9, heads=2),
    _residual_layer_norm("small", 7, 24),
    _bias_gelu("small", 7, 48),
    _gather("small video", (4, 32, 32, 3), VIDEO_PATCH, 2, 4),
    _distillation_loss("small", 65),
    _unit_rows("small", 9, 24),
    _mmd("small", 3, width=48),
    _masked_patch_loss("small video", (4, 32, 32, 3), VIDEO_PATCH, 3, 4),
    _masked_patch_loss("small spectrogram", (8, 64), AUDIO_PATCH, 5, 8),
    _refine("small", 9, 5, width=24, heads=2),
    _refine("small, softmax", 9, 5, "softmax", 24, 2),
    _fp8("quantise_rows", "small", 7, 24),
    _fp8("residual_layer_norm_fp8", "small", 7, 24, torch.float32),
    _fp8("bias_gelu_fp8", "small", 7, 48),
)
