"""Some patches of raw clips, copied, normalised and flattened in one pass; the other patches are never touched.

    patches[b, n] = (clip[b, :, patch ids[b, n]] / 255 − mean) / std     numbers in (time, height, width, channel) order

A video may be 8-bit or floating, channels first or last. Of 8-bit pixels a patch's row of 16 takes 48 bytes in two sectors of
32 where channels are last, and 3 × 16 bytes in three where they are first: a third less traffic, counted by
``xkd_fast.analysis.roofline``. A spectrogram is a clip with one channel and one frame.

Legend: B clips, C channels, n patches of each, P numbers of a patch.
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
from xkd_kernels.checks import require_float_type, require_floats, require_no_tangent, require_one_device, whole_number
from xkd_kernels.configurations import launch_of, on_own_device

CHANNELS = 4  # at most, where a mean and a deviation are given
VECTOR = 16  # numbers that one instruction loads at most: 16 bytes


def naive_gather_patches(
    clip: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The definition: all patches, then those asked for; computed in float32, or wider where the clip is."""
    wide = clip if clip.dtype == torch.float64 else clip.float()
    if clip.dtype == torch.uint8:
        wide = wide / 255
    batch, channels, *sizes = clip.shape
    if len(mean):
        shape = (1, channels, *(1 for _ in sizes))
        wide = (wide - wide.new_tensor(mean).view(shape)) / wide.new_tensor(std).view(shape)
    axes = len(sizes)
    split = [part for size, extent in zip(sizes, patch, strict=True) for part in (size // extent, extent)]
    order = (0, *range(2, 2 + 2 * axes, 2), *range(3, 3 + 2 * axes, 2), 1)
    patches = wide.reshape(batch, channels, *split).permute(order).reshape(batch, math.prod(split[0::2]), -1)
    return patches.gather(1, ids.unsqueeze(-1).expand(-1, -1, patches.shape[-1])).to(dtype)


def gather_patches(
    clip: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Patches of clips, normalised and flattened.

    Args:
        clip: [B, C, T, H, W] video or [B, C, F, T] spectrogram, of any strides; 8-bit values are divided by 255.
        ids: [B, n] numbers of the patches to take, in grid order (time, height, width; or mel, time), 0 ≤ id < N. Others are
            an error on a CPU; on a GPU, which nothing waits for, an assertion of PyTorch's, or of our kernel a patch of NaN.
        patch: its extent along each axis of the grid.
        mean, std: per channel, of values after the division; empty = values as they are.
        dtype: of the result.
        backend: see :mod:`xkd_kernels.backends`.

    Returns:
        [B, n, P] in ``dtype``, numbers in (time, height, width, channel) or (mel, time, channel) order.

    Raises:
        ValueError: a patch that does not divide the clip, mean and deviation that do not fit the channels, types or shapes
            other than these.
        IndexError: ids of no patch, on a CPU.
        BackendError: a backend that cannot run here.
    """
    patch = checked_patch(clip, ids, patch, mean, std)
    require_float_type(dtype)
    if gather_backend(clip, patch, dtype, backend) == "torch":
        return gather_by_indexing(clip, ids, patch, mean, std, dtype)
    require_no_tangent(clip)
    return gather_patches_forward(clip, ids, list(patch), list(mean), list(std), dtype)


def checked_patch(clip: Tensor, ids: Tensor, patch: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> list[int]:
    """The patch's extents as whole numbers, once everything is known to fit.

    Raises:
        ValueError: a patch that does not divide the clip, mean and deviation that do not fit the channels, types, shapes or
            devices that do not fit.
    """
    try:
        patch = [whole_number(extent) for extent in patch]
    except TypeError as error:
        raise ValueError(f"patch = {patch!r} must be a list of whole numbers, an extent for each axis") from error
    if clip.ndim not in (4, 5) or len(patch) != clip.ndim - 2:
        raise ValueError(
            f"clip has the shape {list(clip.shape)} and patch = {patch}; [B, C, T, H, W] with three extents or [B, C, F, T] "
            "with two are wanted"
        )
    sizes, channels = clip.shape[2:], clip.shape[1]
    if any(extent < 1 or size < 1 or size % extent for size, extent in zip(sizes, patch)):
        raise ValueError(f"patch = {patch} does not divide the clip's {list(sizes)}; each axis must be a multiple of it")
    if len(mean) not in (0, channels) or len(mean) > CHANNELS:
        raise ValueError(
            f"mean = {list(mean)} of a clip with {channels} channels: none, or one for each of up to {CHANNELS} channels"
        )
    if len(std) != len(mean) or not all(deviation > 0 for deviation in std):
        raise ValueError(f"std = {list(std)} beside mean = {list(mean)}: as many, each above 0")
    if clip.dtype != torch.uint8:
        require_floats(clip=clip)
    if ids.ndim != 2 or len(ids) != len(clip) or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"ids has the shape {list(ids.shape)} and type {str(ids.dtype).removeprefix('torch.')}; [B, n] with the clip's "
            f"B = {len(clip)}, int32 or int64, is wanted"
        )
    require_one_device(clip=clip, ids=ids)
    return patch


def gather_backend(clip: Tensor, patch: Sequence[int], dtype: torch.dtype, backend: str) -> str:
    """Who copies such patches into ``dtype``; it is measured by the clip's type, or by the result's where that is integer."""
    kind = clip.dtype if clip.dtype.is_floating_point else dtype
    return backend_of("gather_patches", clip.device, kind, str(whole_number(clip.shape[1]) * math.prod(patch)), backend)


def gather_by_indexing(
    clip: Tensor, ids: Tensor, patch: Sequence[int], mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """:func:`gather_patches` by PyTorch's operators."""
    axes = len(patch)
    grid = [size // extent for size, extent in zip(clip.shape[2:], patch, strict=True)]
    split = [part for pair in zip(grid, patch, strict=True) for part in pair]
    cells = clip.reshape(*clip.shape[:2], *split).permute(0, *range(2, 2 + 2 * axes, 2), *range(3, 3 + 2 * axes, 2), 1)
    coordinates, rest = [], ids
    for length in reversed(grid[1:]):
        coordinates.append(rest % length)
        rest = rest.div(length, rounding_mode="floor")
    coordinates.append(rest.masked_fill(ids < 0, grid[0]))  # what is no patch's number lies outside of the first axis
    clips = torch.arange(len(clip), device=clip.device).unsqueeze(1)
    found = cells[(clips, *reversed(coordinates))]
    if found.dtype != torch.float64 and (clip.dtype == torch.uint8 or len(mean)):
        found = found.float()
    if clip.dtype == torch.uint8:
        found = found / 255
    if len(mean):  # filled in place: a copy from the host would wait for the device
        average, deviation = (torch.cat([found.new_full((1,), x) for x in values]) for values in (mean, std))
        found = (found - average) / deviation
    return found.flatten(2).to(dtype)


# ------------------------------------------------------------------------------------------------------------------ operators


@torch.library.custom_op("xkd_kernels::gather_patches", mutates_args=())
@on_own_device
def gather_patches_forward(
    clip: Tensor, ids: Tensor, patch: list[int], mean: list[float], std: list[float], dtype: torch.dtype
) -> Tensor:
    """Normalised patches [B, n, P]."""
    check_ids(clip, ids, patch)
    patches = _empty_patches(clip, ids, patch, dtype)
    constants, arguments = geometry(clip, patch)
    scale, shift = affine(clip, mean, std)
    launch = launch_of("gather_patches_forward", patches, str(patches.shape[-1]))
    ids = ids.contiguous()
    _gather_patches_forward_kernel[(ids.numel(),)](
        clip, ids, patches, ids.shape[1], *arguments, *scale, *shift, **constants, **launch.options
    )
    return patches


@gather_patches_forward.register_fake
def _(clip: Tensor, ids: Tensor, patch: list[int], mean: list[float], std: list[float], dtype: torch.dtype) -> Tensor:
    return _empty_patches(clip, ids, patch, dtype)


@torch.library.custom_op("xkd_kernels::gather_patches_backward", mutates_args=())
@on_own_device
def gather_patches_backward(gradient: Tensor, ids: Tensor, clip: Tensor, patch: list[int], std: list[float]) -> Tensor:
    """The gradient of a floating clip, in its type; patches taken twice add up."""
    to_clip = torch.zeros(clip.shape, dtype=torch.float32, device=clip.device)
    check_ids(clip, ids, patch)
    constants, arguments = geometry(to_clip, patch)
    scale, _ = affine(clip, [0.0] * len(std), std)
    launch = launch_of("gather_patches_backward", gradient, str(gradient.shape[-1]))
    ids = ids.contiguous()
    _gather_patches_backward_kernel[(ids.numel(),)](
        gradient.contiguous(), ids, to_clip, ids.shape[1], *arguments, *scale, **constants, **launch.options
    )
    return to_clip.to(clip.dtype)


@gather_patches_backward.register_fake
def _(gradient: Tensor, ids: Tensor, clip: Tensor, patch: list[int], std: list[float]) -> Tensor:
    return torch.empty(clip.shape, dtype=clip.dtype, device=clip.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    clip, ids, ctx.patch, _, ctx.std, _ = inputs
    ctx.save_for_backward(clip, ids)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    clip, ids = ctx.saved_tensors
    return gather_patches_backward(gradient, ids, clip, ctx.patch, ctx.std), None, None, None, None, None


gather_patches_forward.register_autograd(_differentiate, setup_context=_keep)


def check_ids(clip: Tensor, ids: Tensor, patch: list[int]) -> None:
    """Interpreted, a kernel would read the host's memory anywhere; a GPU's is not waited for."""
    patches = math.prod(size // extent for size, extent in zip(clip.shape[2:], patch, strict=True))
    if clip.device.type == "cpu" and ids.numel() and not bool(((ids >= 0) & (ids < patches)).all()):
        raise IndexError(f"ids lie in {int(ids.min())} to {int(ids.max())}, but the clip's patches in 0 to {patches - 1}")


def _empty_patches(clip: Tensor, ids: Tensor, patch: list[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(*ids.shape, clip.shape[1] * math.prod(patch), dtype=dtype, device=clip.device)


def geometry(clip: Tensor, patch: list[int]) -> tuple[dict[str, int], list[int]]:
    """Compile-time extents of patch and grid (always three axes), the run of neighbouring numbers, and the clip's strides."""
    flat = 3 - len(patch)
    sizes, strides = [1] * flat + list(clip.shape[2:]), [0] * flat + list(clip.stride()[2:])
    extents = [1] * flat + list(patch)
    depth, rows, columns = (size // extent for size, extent in zip(sizes, extents, strict=True))
    names = ("DEPTH", "HEIGHT", "WIDTH")
    constants = dict(zip(names, extents, strict=True)) | {"GRID_ROWS": rows, "GRID_COLUMNS": columns}
    constants["PATCHES"] = depth * rows * columns
    return constants | {"CHANNELS": clip.shape[1], "RUN": _run(clip, patch)}, [*clip.stride()[:2], *strides]


def _run(clip: Tensor, patch: list[int]) -> int:
    """How many numbers of a patch always lie side by side, the first of them as many places or a multiple after its origin."""
    channels, width, strides = clip.shape[1], patch[-1], clip.stride()
    if (channels > 1 and strides[1] != 1) or (width > 1 and strides[-1] != channels):
        return 1
    between = [stride for extent, stride in zip(patch[:-1], strides[2:-1], strict=True) if extent > 1]
    return math.gcd(VECTOR, width * channels, *between)


def affine(clip: Tensor, mean: list[float], std: list[float]) -> tuple[list[float], list[float]]:
    """What a channel's raw values are multiplied by and added to, for :data:`CHANNELS` channels."""
    unit = 255.0 if clip.dtype == torch.uint8 else 1.0
    scale = [1 / (unit * deviation) for deviation in std] or [1 / unit] * CHANNELS
    shift = [-average / deviation for average, deviation in zip(mean, std, strict=True)] or [0.0] * CHANNELS
    missing = CHANNELS - len(scale)
    return scale + [1.0] * missing, shift + [0.0] * missing


# -------------------------------------------------------------------------------------------------------------------- kernels
#
# A program is one patch. Consecutive numbers are consecutive channels, then pixels of a row.


@triton.jit
def patch_origin(patch, stride_t, stride_h, stride_w,
                 DEPTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                 GRID_ROWS: tl.constexpr, GRID_COLUMNS: tl.constexpr):  # fmt: skip
    """Where a patch (64-bit) begins in its clip."""
    row = patch // GRID_COLUMNS % GRID_ROWS
    return (patch // (GRID_COLUMNS * GRID_ROWS) * DEPTH * stride_t + row * HEIGHT * stride_h
            + patch % GRID_COLUMNS * WIDTH * stride_w)  # fmt: skip


@triton.jit
def number_offsets(numbers, stride_channel, stride_t, stride_h, stride_w,
                   HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, RUN: tl.constexpr):  # fmt: skip
    """Where the ``numbers`` of a patch lie, from its origin on; the same of every patch.

    The compiler cannot know that RUN of them are neighbours; told so, it loads them by one instruction.
    """
    pixel = numbers // CHANNELS
    channel, w = (numbers % CHANNELS).to(tl.int64), (pixel % WIDTH).to(tl.int64)
    h, t = (pixel // WIDTH % HEIGHT).to(tl.int64), (pixel // (WIDTH * HEIGHT)).to(tl.int64)
    offsets = channel * stride_channel + t * stride_t + h * stride_h + w * stride_w
    if RUN > 1:
        offsets = tl.max_contiguous(tl.multiple_of(offsets, RUN), RUN)
    return offsets


@triton.jit
def by_channel(numbers, first, second, third, fourth, CHANNELS: tl.constexpr):
    """Each number's own of four values, by its channel; the first beyond four channels, where all are the same."""
    channel = numbers % CHANNELS
    values = tl.where(channel == 1, second, first)
    values = tl.where(channel == 2, third, values)
    return tl.where(channel == 3, fourth, values)


@triton.jit
def _gather_patches_forward_kernel(
    clip, ids, patches, count, stride_clip, stride_channel, stride_t, stride_h, stride_w,
    scale_0, scale_1, scale_2, scale_3, shift_0, shift_1, shift_2, shift_3,
    DEPTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GRID_ROWS: tl.constexpr,
    GRID_COLUMNS: tl.constexpr, PATCHES: tl.constexpr, CHANNELS: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    patch = tl.load(ids + place).to(tl.int64)
    is_there = (patch >= 0) & (patch < PATCHES)
    clip += place // count * stride_clip
    clip += patch_origin(patch, stride_t, stride_h, stride_w, DEPTH, HEIGHT, WIDTH, GRID_ROWS, GRID_COLUMNS)
    NUMBERS: tl.constexpr = DEPTH * HEIGHT * WIDTH * CHANNELS
    for first in range(0, NUMBERS, BLOCK):
        numbers = first + tl.arange(0, BLOCK)
        where = number_offsets(numbers, stride_channel, stride_t, stride_h, stride_w, HEIGHT, WIDTH, CHANNELS, RUN)
        values = tl.load(clip + where, mask=(numbers < NUMBERS) & is_there, other=0).to(tl.float32)
        values *= by_channel(numbers, scale_0, scale_1, scale_2, scale_3, CHANNELS)
        values += by_channel(numbers, shift_0, shift_1, shift_2, shift_3, CHANNELS)
        values = tl.where(is_there, values, float("nan"))
        tl.store(patches + place * NUMBERS + numbers, values.to(patches.dtype.element_ty), mask=numbers < NUMBERS)


@triton.jit
def _gather_patches_backward_kernel(
    gradient, ids, to_clip, count, stride_clip, stride_channel, stride_t, stride_h, stride_w,
    scale_0, scale_1, scale_2, scale_3,
    DEPTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GRID_ROWS: tl.constexpr,
    GRID_COLUMNS: tl.constexpr, PATCHES: tl.constexpr, CHANNELS: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    patch = tl.load(ids + place).to(tl.int64)
    is_there = (patch >= 0) & (patch < PATCHES)
    to_clip += place // count * stride_clip
    to_clip += patch_origin(patch, stride_t, stride_h, stride_w, DEPTH, HEIGHT, WIDTH, GRID_ROWS, GRID_COLUMNS)
    NUMBERS: tl.constexpr = DEPTH * HEIGHT * WIDTH * CHANNELS
    for first in range(0, NUMBERS, BLOCK):
        numbers = first + tl.arange(0, BLOCK)
        where = number_offsets(numbers, stride_channel, stride_t, stride_h, stride_w, HEIGHT, WIDTH, CHANNELS, RUN)
        values = tl.load(gradient + place * NUMBERS + numbers, mask=numbers < NUMBERS, other=0.0).to(tl.float32)
        values *= by_channel(numbers, scale_0, scale_1, scale_2, scale_3, CHANNELS)
        tl.atomic_add(to_clip + where, values, mask=(numbers < NUMBERS) & is_there)
