"""A video view in one compiled pass (``kernels/csrc/video_view_cpu.cpp``); `xkd_fast.data.augment` is its definition.

Stored bytes are read once and the view's numbers written once. A call uses one thread and lets other Python threads run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from xkd_fast.data.views import VideoDraw, short_side_size
from xkd_kernels import native

GREY = 4  # number of the operation that comes after the drawn ones 0-3
MOST_STEPS = 5
NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # values of brightness, contrast, saturation and hue that change nothing


class VideoView(ctypes.Structure):
    """``xkd_video_view`` of ``video_view.h``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("frames", "height", "width", "resized_height", "resized_width")),
        *((name, ctypes.c_int64) for name in ("top", "left", "crop_height", "crop_width", "size")),
        *((name, ctypes.c_int64) for name in ("frame_stride", "row_stride")),
        *((name, ctypes.c_int64) for name in ("out_channel", "out_frame", "out_row", "out_pixel")),
        *((name, ctypes.c_int32) for name in ("flip", "out_is_uint8", "steps")),
        ("operation", ctypes.c_int32 * MOST_STEPS),
        ("factor", ctypes.c_float * MOST_STEPS),
        ("blur_taps", ctypes.c_int32),
        ("blur_sigma", ctypes.c_float),
        ("mean", ctypes.c_float * 3),
        ("std", ctypes.c_float * 3),
    ]


def obstacle(device: torch.device) -> str | None:
    """Why the compiled pass cannot make views on a device; None if it can."""
    if device.type != "cpu":
        return f"it is written for CPUs, not for {device.type}"
    return native.missing("cpu")


def native_view(
    frames: Tensor,
    draw: VideoDraw,
    out: Tensor,
    *,
    short_side: int,
    blur_taps: int,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
) -> None:
    """One video view of one clip, written into ``out``.

    Args:
        frames: [T, H, W, 3] uint8 of any strides, the whole clip.
        draw: of the view.
        out: [3, frames of the view, size, size] of any strides; float32: normalised, uint8: grey levels.
        short_side: resize the frames to this short side before the crop; 0 = crop the frames as they are.
        blur_taps: width of the Gaussian kernel, where a blur is drawn.
        pixel_mean: of red, green, blue in [0, 1].
        pixel_std: of red, green, blue in [0, 1].

    Raises:
        ValueError: tensors and draws that do not fit together.
        RuntimeError: there is no compiled library.
        MemoryError: a few frames of the view find no memory.
    """
    _check(frames, draw, out)
    if frames.stride(3) != 1 or frames.stride(2) != 3:
        frames = frames.contiguous()
    height, width = frames.shape[1:3]
    resized = short_side_size(height, width, short_side) if short_side else (height, width)
    top, left, crop_height, crop_width = draw.crop
    if (
        min(top, left) < 0
        or min(crop_height, crop_width) < 1
        or top + crop_height > resized[0]
        or left + crop_width > resized[1]
    ):
        raise ValueError(f"the crop (top, left, height, width) = {draw.crop} leaves its frame of {resized[0]} × {resized[1]}")
    drawn = draw.brightness, draw.contrast, draw.saturation, draw.hue
    steps = [(number, drawn[number]) for number in draw.order if drawn[number] != NEUTRAL[number]] + [(GREY, 0.0)] * draw.grey
    view = VideoView(
        frames=out.shape[1], height=height, width=width, resized_height=resized[0], resized_width=resized[1],
        top=top, left=left, crop_height=crop_height, crop_width=crop_width, size=out.shape[2],
        frame_stride=frames.stride(0), row_stride=frames.stride(1),
        out_channel=out.stride(0), out_frame=out.stride(1), out_row=out.stride(2), out_pixel=out.stride(3),
        flip=draw.flip, out_is_uint8=out.dtype == torch.uint8, steps=len(steps),
        operation=tuple(number for number, _ in steps), factor=tuple(factor for _, factor in steps),
        blur_taps=blur_taps if draw.blur_sigma > 0 else 1, blur_sigma=draw.blur_sigma,
        mean=tuple(pixel_mean), std=tuple(pixel_std),
    )  # fmt: skip
    first = frames.data_ptr() + draw.start * frames.stride(0)
    failed = native.library("cpu").xkd_video_view_cpu(
        ctypes.byref(view), ctypes.c_void_p(first), ctypes.c_void_p(out.data_ptr())
    )
    if failed:
        raise MemoryError(f"no memory for a view of {out.shape[2]} × {out.shape[2]} pixels")


def _check(frames: Tensor, draw: VideoDraw, out: Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[3] != 3 or min(frames.shape) < 1:
        raise ValueError(f"frames of {frames.dtype} {list(frames.shape)}, where uint8 [T, H, W, 3] is wanted")
    if out.dim() != 4 or out.shape[0] != 3 or out.shape[2] != out.shape[3] or out.dtype not in (torch.float32, torch.uint8):
        raise ValueError(
            f"a view of {out.dtype} {list(out.shape)}, where [3, frames, size, size] of float32 or uint8 is wanted"
        )
    if frames.device.type != "cpu" or out.device.type != "cpu":
        raise ValueError(f"frames on {frames.device} and a view on {out.device}, where both must be on a CPU")
    if draw.start < 0 or draw.start + out.shape[1] > len(frames):
        raise ValueError(f"{out.shape[1]} frames from frame {draw.start} on leave their clip of {len(frames)}")
    if len(draw.order) >= MOST_STEPS:
        raise ValueError(f"{len(draw.order)} operations on colours, where {MOST_STEPS - 1} are the most")
