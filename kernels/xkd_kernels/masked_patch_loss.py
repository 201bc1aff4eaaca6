"""Mean squared error of predicted patches to patches of raw clips, each normalised by itself; the targets never exist.

    target = (patch − mean(patch)) / √(var(patch) + 1e-6)     unbiased variance; statistics in float32
    loss = mean((predicted − target)²)                        over all numbers of all patches

Patches are those of :mod:`xkd_kernels.gather_patches`. The backward pass makes the targets again, from the clip and from two
numbers that were kept of each patch. Legend: B clips, n patches of each, P numbers of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xkd_kernels.backends import backend_of
from xkd_kernels.checks import has_tangent, kernel_type, require_floats, require_no_tangent, require_one_device, whole_number
from xkd_kernels.configurations import launch_of, on_own_device
from xkd_kernels.gather_patches import (
    affine,
    by_channel,
    check_ids,
    checked_patch,
    gather_by_indexing,
    geometry,
    naive_gather_patches,
    number_offsets,
    patch_origin,
)

TARGET_EPS = 1e-6


def naive_masked_patch_loss(
    predicted: Tensor,
    clip: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Tensor:
    """The definition; in float32, or wider where the prediction is."""
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    patches = naive_gather_patches(clip.detach(), ids, patch, mean, std, dtype=dtype)
    centred = patches - patches.mean(dim=-1, keepdim=True)
    target = centred / (patches.var(dim=-1, keepdim=True, unbiased=True) + TARGET_EPS).sqrt()
    return (predicted.to(dtype) - target).square().mean()


def masked_patch_loss(
    predicted: Tensor,
    clip: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    *,
    backend: str = "auto",
) -> Tensor:
    """Mean squared error of predictions to patches that are normalised one by one.

    Args:
        predicted: [B, n, P] of any floating type.
        clip: [B, C, T, H, W] video or [B, C, F, T] spectrogram, of any strides; 8-bit values are divided by 255. No gradient
            flows to it.
        ids: [B, n] numbers of the patches that are predicted, in grid order, 0 ≤ id < N. Others are an error on a CPU; on a
            GPU, which nothing waits for, an assertion of PyTorch's, or of our kernel a loss of NaN.
        patch: its extent along each axis of the grid; P = C × their product, at least 2.
        mean, std: per channel, of values after the division; empty = values as they are.
        backend: see :mod:`xkd_kernels.backends`.

    Returns:
        A scalar in float32; float64 where ``predicted`` is.

    Raises:
        ValueError: a patch that does not divide the clip, mean and deviation that do not fit the channels, types, shapes or
            devices that do not fit.
        IndexError: ids of no patch, on a CPU.
        BackendError: a backend that cannot run here.
    """
    patch = checked_patch(clip, ids, patch, mean, std)
    numbers = whole_number(clip.shape[1]) * math.prod(patch)
    if predicted.shape != (*ids.shape, numbers) or predicted.numel() == 0:
        raise ValueError(
            f"predicted has the shape {list(predicted.shape)}, but {[*ids.shape, numbers]} is wanted for ids of the shape "
            f"{list(ids.shape)} and patches of {numbers} numbers, and at least 1 patch"
        )
    if numbers < 2:
        raise ValueError(f"patch = {patch} of a clip with 1 channel is 1 number, which has no variance; 2 or more are wanted")
    require_floats(predicted=predicted)
    require_one_device(predicted=predicted, clip=clip)
    if backend_of("masked_patch_loss", predicted.device, kernel_type(predicted, clip), str(numbers), backend) == "torch":
        return _by_operators(predicted, clip, ids, patch, mean, std)
    require_no_tangent(predicted, clip)
    loss, _, _ = masked_patch_loss_forward(predicted, clip.detach(), ids, patch, list(mean), list(std))
    return loss


def _by_operators(
    predicted: Tensor, clip: Tensor, ids: Tensor, patch: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    if has_tangent(predicted):  # nothing is kept in forward mode
        return naive_masked_patch_loss(predicted, clip, ids, patch, mean, std)
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    target = gather_by_indexing(clip.detach(), ids, patch, mean, std, dtype)
    variance, average = torch.var_mean(target, dim=-1, keepdim=True)
    target = (target - average).mul_((variance + TARGET_EPS).rsqrt_())
    return _Error.apply(predicted, target)[0]


class _Error(torch.autograd.Function):
    """Mean squared error that keeps the difference alone, in the type of the prediction.

    It is as large as the prediction, which nothing else keeps, and saves the backward pass another gathering. Being an output,
    it can be differentiated again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        difference = predicted.to(target.dtype) - target
        return difference.square().mean(), difference.to(predicted.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1])
        if not torch.compiler.is_compiling():  # which makes zeros of its own
            ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, to_difference: Tensor | None) -> Any:  # type: ignore[override]
        if gradient is None:
            return to_difference, None
        (difference,) = ctx.saved_tensors
        scaled = (difference.to(gradient.dtype) * (gradient * (2 / difference.numel()))).to(difference.dtype)
        return scaled if to_difference is None else scaled + to_difference, None


# ------------------------------------------------------------------------------------------------------------------ operators


@torch.library.custom_op("xkd_kernels::masked_patch_loss", mutates_args=())
@on_own_device
def masked_patch_loss_forward(
    predicted: Tensor, clip: Tensor, ids: Tensor, patch: list[int], mean: list[float], std: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, a scalar, and each patch's mean and inverse deviation [B·n]; all float32."""
    check_ids(clip, ids, patch)
    predicted = predicted.contiguous()
    rows, numbers = ids.numel(), predicted.shape[-1]
    averages, inverse_deviations = (torch.empty(rows, dtype=torch.float32, device=clip.device) for _ in range(2))
    launch = launch_of("masked_patch_loss_forward", predicted, str(numbers))
    programs = triton.cdiv(rows, launch.meta["ROWS"])
    partial = torch.empty(programs, dtype=torch.float32, device=clip.device)
    constants, arguments = _places(clip, ids, patch, mean, std)
    _masked_patch_loss_forward_kernel[(programs,)](
        predicted, clip, ids, averages, inverse_deviations, partial, rows, 1 / predicted.numel(), TARGET_EPS,
        *arguments, **constants, BLOCK=triton.next_power_of_2(numbers), **launch.options,
    )  # fmt: skip
    return partial.sum(), averages, inverse_deviations


@masked_patch_loss_forward.register_fake
def _(
    predicted: Tensor, clip: Tensor, ids: Tensor, patch: list[int], mean: list[float], std: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    averages, inverse_deviations = (torch.empty(ids.numel(), dtype=torch.float32, device=clip.device) for _ in range(2))
    return torch.empty((), dtype=torch.float32, device=clip.device), averages, inverse_deviations


@torch.library.custom_op("xkd_kernels::masked_patch_loss_backward", mutates_args=())
@on_own_device
def masked_patch_loss_backward(
    gradient: Tensor,
    predicted: Tensor,
    clip: Tensor,
    ids: Tensor,
    averages: Tensor,
    inverse_deviations: Tensor,
    patch: list[int],
    mean: list[float],
    std: list[float],
) -> Tensor:
    """The gradient [B, n, P] of the prediction, in its type, given that of the loss."""
    check_ids(clip, ids, patch)
    predicted = predicted.contiguous()
    rows, numbers = ids.numel(), predicted.shape[-1]
    to_predicted = torch.empty_like(predicted)
    launch = launch_of("masked_patch_loss_backward", predicted, str(numbers))
    constants, arguments = _places(clip, ids, patch, mean, std)
    _masked_patch_loss_backward_kernel[(triton.cdiv(rows, launch.meta["ROWS"]),)](
        gradient, predicted, clip, ids, averages, inverse_deviations, to_predicted, rows, 2 / predicted.numel(),
        *arguments, **constants, BLOCK=triton.next_power_of_2(numbers), **launch.options,
    )  # fmt: skip
    return to_predicted


@masked_patch_loss_backward.register_fake
def _(
    gradient: Tensor,
    predicted: Tensor,
    clip: Tensor,
    ids: Tensor,
    averages: Tensor,
    inverse_deviations: Tensor,
    patch: list[int],
    mean: list[float],
    std: list[float],
) -> Tensor:
    return torch.empty_like(predicted.contiguous())


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    predicted, clip, ids, ctx.patch, ctx.mean, ctx.std = inputs
    ctx.save_for_backward(predicted, clip, ids, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if gradient is None:
        return None, None, None, None, None, None
    to_predicted = masked_patch_loss_backward(gradient, *ctx.saved_tensors, ctx.patch, ctx.mean, ctx.std)
    return to_predicted, None, None, None, None, None


masked_patch_loss_forward.register_autograd(_differentiate, setup_context=_keep)


def _places(
    clip: Tensor, ids: Tensor, patch: list[int], mean: list[float], std: list[float]
) -> tuple[dict[str, int], list[int | float]]:
    """Compile-time constants of a kernel, and what it reads ids and patches by."""
    constants, strides = geometry(clip, patch)
    scale, shift = affine(clip, mean, std)
    return constants, [ids.shape[1], *ids.stride(), *strides, *scale, *shift]


# -------------------------------------------------------------------------------------------------------------------- kernels
#
# A program is some whole patches, each read once and held in registers: the variance is that of differences to the mean.


@triton.jit
def _load_patches(
    clip, ids, own, rows, numbers, count, stride_ids, stride_id, stride_clip, stride_channel, stride_t, stride_h, stride_w,
    scale_0, scale_1, scale_2, scale_3, shift_0, shift_1, shift_2, shift_3,
    DEPTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GRID_ROWS: tl.constexpr,
    GRID_COLUMNS: tl.constexpr, PATCHES: tl.constexpr, CHANNELS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The ``numbers`` of the patches ``own`` (64-bit), [rows, numbers] float32, and which are patches of their clip."""
    batch = own // count
    patch = tl.load(ids + batch * stride_ids + own % count * stride_id, mask=own < rows, other=0).to(tl.int64)
    is_there = (patch >= 0) & (patch < PATCHES)
    origin = batch * stride_clip
    origin += patch_origin(patch, stride_t, stride_h, stride_w, DEPTH, HEIGHT, WIDTH, GRID_ROWS, GRID_COLUMNS)
    offsets = number_offsets(numbers, stride_channel, stride_t, stride_h, stride_w, HEIGHT, WIDTH, CHANNELS, RUN)
    NUMBERS: tl.constexpr = DEPTH * HEIGHT * WIDTH * CHANNELS
    inside = ((own < rows) & is_there)[:, None] & (numbers < NUMBERS)[None, :]
    values = tl.load(clip + origin[:, None] + offsets[None, :], mask=inside, other=0).to(tl.float32)
    values *= by_channel(numbers, scale_0, scale_1, scale_2, scale_3, CHANNELS)[None, :]
    values += by_channel(numbers, shift_0, shift_1, shift_2, shift_3, CHANNELS)[None, :]
    return values, is_there


@triton.jit
def _masked_patch_loss_forward_kernel(
    predicted, clip, ids, averages, inverse_deviations, partial, rows, share, eps,
    count, stride_ids, stride_id, stride_clip, stride_channel, stride_t, stride_h, stride_w,
    scale_0, scale_1, scale_2, scale_3, shift_0, shift_1, shift_2, shift_3,
    DEPTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GRID_ROWS: tl.constexpr, GRID_COLUMNS: tl.constexpr,
    PATCHES: tl.constexpr, CHANNELS: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Every program writes the sum of its patches' squared errors, times ``share``."""
    own = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    numbers = tl.arange(0, BLOCK)
    NUMBERS: tl.constexpr = DEPTH * HEIGHT * WIDTH * CHANNELS
    inside = (own < rows)[:, None] & (numbers < NUMBERS)[None, :]
    guess = tl.load(predicted + own[:, None] * NUMBERS + numbers[None, :], mask=inside, other=0.0).to(tl.float32)
    values, is_there = _load_patches(
        clip, ids, own, rows, numbers, count, stride_ids, stride_id, stride_clip, stride_channel, stride_t, stride_h, stride_w,
        scale_0, scale_1, scale_2, scale_3, shift_0, shift_1, shift_2, shift_3,
        DEPTH, HEIGHT, WIDTH, GRID_ROWS, GRID_COLUMNS, PATCHES, CHANNELS, RUN,
    )  # fmt: skip
    average = tl.where(is_there, tl.sum(tl.where(inside, values, 0.0), axis=1) / NUMBERS, float("nan"))
    centred = tl.where(inside, values - average[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) / (NUMBERS - 1) + eps)
    error = guess - centred * inverse[:, None]
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(error * error, axis=1), axis=0) * share)
    tl.store(averages + own, average, mask=own < rows)
    tl.store(inverse_deviations + own, inverse, mask=own < rows)


@triton.jit
def _masked_patch_loss_backward_kernel(
    gradient, predicted, clip, ids, averages, inverse_deviations, to_predicted, rows, share,
    count, stride_ids, stride_id, stride_clip, stride_channel, stride_t, stride_h, stride_w,
    scale_0, scale_1, scale_2, scale_3, shift_0, shift_1, shift_2, shift_3,
    DEPTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GRID_ROWS: tl.constexpr, GRID_COLUMNS: tl.constexpr,
    PATCHES: tl.constexpr, CHANNELS: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    numbers = tl.arange(0, BLOCK)
    NUMBERS: tl.constexpr = DEPTH * HEIGHT * WIDTH * CHANNELS
    inside = (own < rows)[:, None] & (numbers < NUMBERS)[None, :]
    places = own[:, None] * NUMBERS + numbers[None, :]
    guess = tl.load(predicted + places, mask=inside, other=0.0).to(tl.float32)
    values, _ = _load_patches(
        clip, ids, own, rows, numbers, count, stride_ids, stride_id, stride_clip, stride_channel, stride_t, stride_h, stride_w,
        scale_0, scale_1, scale_2, scale_3, shift_0, shift_1, shift_2, shift_3,
        DEPTH, HEIGHT, WIDTH, GRID_ROWS, GRID_COLUMNS, PATCHES, CHANNELS, RUN,
    )  # fmt: skip
    average = tl.load(averages + own, mask=own < rows, other=0.0)[:, None]
    inverse = tl.load(inverse_deviations + own, mask=own < rows, other=0.0)[:, None]
    error = (guess - (values - average) * inverse) * (tl.load(gradient).to(tl.float32) * share)
    tl.store(to_predicted + places, error.to(to_predicted.dtype.element_ty), mask=inside)
