"""How each kernel is launched: tile sizes, warps and pipeline stages, by kernel, type and shape class.

The defaults were chosen by what fits the registers of sm_80, sm_90 and sm_100 without spilling; ``tuned.json`` holds, by device
name, what the benchmark found to be faster on a device, and goes before them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TUNED = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        meta: constants that it is compiled with, such as tile sizes.
        warps: per program.
        stages: of the software pipeline of its loop.
    """

    meta: Mapping[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """As keyword arguments of a Triton launch."""
        return {**self.meta, "num_warps": self.warps, "num_stages": self.stages}


def _attention_forward(dtype: torch.dtype, length: int, width: int) -> Launch:
    if dtype == torch.float32:
        return Launch({"Q_BLOCK": min(length, 32), "K_BLOCK": min(length, 32)}, warps=4)
    if width > 64:
        return Launch({"Q_BLOCK": min(length, 64), "K_BLOCK": min(length, 32)}, warps=4)
    if length <= 128:
        return Launch({"Q_BLOCK": length, "K_BLOCK": length}, warps=8 if length == 128 else 4)
    return Launch({"Q_BLOCK": 64, "K_BLOCK": 64}, warps=4)


def _attention_whole_backward(dtype: torch.dtype, length: int, width: int) -> Launch:
    return Launch({"STEP": min(length, 64 if width <= 32 else 32)}, warps=8 if length * width > 4096 else 4, stages=1)


def _attention_streamed_backward(dtype: torch.dtype, length: int, width: int) -> Launch:
    if dtype == torch.float32:
        return Launch({"BLOCK": 32, "STEP": 32}, warps=4, stages=1)
    return Launch({"BLOCK": 64, "STEP": 32}, warps=4 if width <= 64 else 8)


def _cls_attention(dtype: torch.dtype, length: int, width: int) -> Launch:
    return Launch({"K_BLOCK": min(length, 64)}, warps=4)


def _rows(dtype: torch.dtype, width: int) -> Launch:
    return Launch({"ROWS": max(1, 2048 // (1 << (width - 1).bit_length()))}, warps=4 if width <= 2048 else 8)


def _columns(dtype: torch.dtype, width: int) -> Launch:
    return Launch({"ROWS": 8, "COLUMNS": 256}, warps=4)


def _patches(dtype: torch.dtype, numbers: int) -> Launch:
    return Launch({"BLOCK": min(1024, max(16, 1 << (numbers - 1).bit_length()))}, warps=4)


DEFAULTS: dict[str, Callable[..., Launch]] = {
    "packed_attention_forward": _attention_forward,
    "packed_attention_whole_backward": _attention_whole_backward,
    "packed_attention_streamed_backward": _attention_streamed_backward,
    "cls_attention_forward": _cls_attention,
    "cls_attention_backward": _cls_attention,
    "residual_layer_norm_forward": _rows,
    "residual_layer_norm_backward": _rows,
    "bias_gelu_forward": _columns,
    "bias_gelu_backward": _columns,
    "gather_patches_forward": _patches,
    "gather_patches_backward": _patches,
    "quantise_rows_forward": _rows,
    "residual_layer_norm_fp8_forward": _rows,
    "bias_gelu_fp8_forward": _rows,
}


@cache
def tuned() -> dict[str, Any]:
    """The launches that were found to be faster, by device name, kernel, type and shape class."""
    return json.loads(TUNED.read_text(encoding="utf-8"))


def default_launch(kernel: str, dtype: torch.dtype, shape: str) -> Launch:
    """The launch of ``kernel`` where nothing has been tuned. ``shape``: its sizes, joined by "x"."""
    return DEFAULTS[kernel](dtype, *map(int, shape.split("x")))


@cache
def _launch(kernel: str, device: str | None, dtype: torch.dtype, shape: str) -> Launch:
    kind = str(dtype).removeprefix("torch.")
    found = tuned().get(str(device), {}).get(kernel, {}).get(kind, {}).get(shape)
    return Launch(**found) if found else default_launch(kernel, dtype, shape)


def launch_of(kernel: str, x: Tensor, shape: str) -> Launch:
    """The launch of ``kernel`` for a tensor like ``x``."""
    device = torch.cuda.get_device_name(x.device) if x.is_cuda else None
    return _launch(kernel, device, x.dtype, shape)
