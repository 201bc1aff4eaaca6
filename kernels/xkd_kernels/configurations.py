"""How each kernel is launched: on which device, and with which tile sizes, warps and stages, by kernel, type and shape class.

The defaults were chosen by what fits the registers of sm_80, sm_90 and sm_100 without spilling; ``tuned.json`` holds, by device
name, what the benchmark found to be faster on a device, and goes before them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

TUNED = Path(__file__).with_name("tuned.json")
Operator = TypeVar("Operator", bound=Callable[..., Any])


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
    if dtype == torch.float32 and width > 64:
        return Launch({"Q_BLOCK": min(length, 32), "K_BLOCK": 16}, warps=8)
    if dtype == torch.float32:
        return Launch({"Q_BLOCK": min(length, 32), "K_BLOCK": min(length, 32)}, warps=4)
    if width > 64:
        return Launch({"Q_BLOCK": min(length, 64), "K_BLOCK": min(length, 32)}, warps=4)
    if length <= 128:
        return Launch({"Q_BLOCK": length, "K_BLOCK": length}, warps=8 if length == 128 else 4)
    return Launch({"Q_BLOCK": 64, "K_BLOCK": 64}, warps=4)


def _attention_whole_backward(dtype: torch.dtype, length: int, width: int) -> Launch:
    if dtype == torch.float32:
        return Launch({"STEP": 16}, warps=4 if width <= 64 else 16, stages=1)
    if width <= 32:  # at 128 keys, four warps spill 16 to 56 bytes in steps of 64, and none in these
        return Launch({"STEP": min(length, 64) if length < 128 else 16}, warps=4, stages=1)
    return Launch({"STEP": min(length, 32)}, warps=8 if length * width > 4096 else 4, stages=1)


def _attention_streamed_backward(dtype: torch.dtype, length: int, width: int) -> Launch:
    if dtype == torch.float32:
        return Launch({"BLOCK": 32 if width <= 64 else 16, "STEP": 16}, warps=8, stages=1)
    return Launch({"BLOCK": 64, "STEP": 32}, warps=4 if width <= 64 else 8)


def _cls_attention(dtype: torch.dtype, length: int, width: int) -> Launch:
    return Launch({"K_BLOCK": min(length, 64)}, warps=4)


def _rows(dtype: torch.dtype, width: int) -> Launch:
    return Launch({"ROWS": max(1, 2048 // (1 << (width - 1).bit_length()))}, warps=4 if width <= 2048 else 8)


def _columns(dtype: torch.dtype, width: int) -> Launch:
    """Wide enough for whole sectors; rows are what the weighted ones that pass by are read once for."""
    return Launch({"ROWS": 8, "COLUMNS": 256}, warps=4)


def _patches(dtype: torch.dtype, numbers: int) -> Launch:
    return Launch({"BLOCK": min(1024, max(16, 1 << (numbers - 1).bit_length()))}, warps=4)


def _prototypes_online(dtype: torch.dtype, prototypes: int) -> Launch:
    block = min(2048, max(256, 1 << (prototypes - 1).bit_length()))
    return Launch({"BLOCK": block, "COLUMNS": 128}, warps=8)


def _prototypes(dtype: torch.dtype, prototypes: int) -> Launch:
    return Launch({"BLOCK": min(1024, max(128, 1 << (prototypes - 1).bit_length()))}, warps=4)


def _pairs_of_rows(dtype: torch.dtype, rows: int, width: int) -> Launch:
    """Tiles of pairs, small enough that 132 processors have one each; all with 64 sums in a thread's registers."""
    tile, block, warps, stages = (4, 512, 4, 2) if rows <= 64 else (8, 256, 8, 2) if rows <= 128 else (16, 32, 4, 2)
    return Launch({"TILE": tile, "BLOCK": min(block, 1 << (width - 1).bit_length())}, warps=warps, stages=stages)


def _pull_of_rows(dtype: torch.dtype, rows: int, width: int) -> Launch:
    return Launch({"ROWS": 8 if rows <= 64 else 16, "STEP": 8, "BLOCK": min(128, 1 << (width - 1).bit_length())}, warps=4)


def _whole_patches(dtype: torch.dtype, numbers: int) -> Launch:
    block = 1 << (numbers - 1).bit_length()
    return Launch({"ROWS": max(1, 2048 // block)}, warps=min(16, max(4, block // 1024)))


def _refine(dtype: torch.dtype, width: int) -> Launch:
    return Launch({"TOKENS": max(1, 8192 >> (width - 1).bit_length()), "COLUMNS": 128, "STAGES": 3}, warps=16)


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
    "distillation_loss_forward": _prototypes_online,
    "distillation_loss_backward": _prototypes,
    "unit_rows_forward": _rows,
    "unit_rows_backward": _rows,
    "mmd_loss_forward": _pairs_of_rows,
    "mmd_loss_backward_weights": _pairs_of_rows,
    "mmd_loss_backward_gradient": _pull_of_rows,
    "masked_patch_loss_forward": _whole_patches,
    "masked_patch_loss_backward": _whole_patches,
    "refine_forward": _refine,
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


def on_own_device(operator: Operator) -> Operator:
    """An operator whose kernels run where its first tensor is, whichever device is the current one: Triton asks that one.

    Stands between ``torch.library.custom_op`` and the function. Nothing on a CPU.
    """

    @wraps(operator)
    def guarded(*inputs: Any, **options: Any) -> Any:
        first = next(x for x in (*inputs, *options.values()) if isinstance(x, Tensor))
        with torch.cuda.device_of(first):
            return operator(*inputs, **options)

    # custom_op reads annotations, which are strings, by the names that its function's module has, and here that is this one
    guarded.__signature__ = inspect.signature(operator, eval_str=True)  # type: ignore[attr-defined]
    return guarded  # type: ignore[return-value]
