"""Masked reconstruction (XKD.md section 4): mean squared error to patches that are normalised one by one, inside the loss.

target = (patch − mean(patch)) / √(var(patch) + 1e-6)     unbiased variance
loss = mean((predicted − target)²)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TARGET_EPS = 1e-6


class _PatchError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, predicted: Tensor, patches: Tensor) -> Tensor:
        dtype = torch.promote_types(predicted.dtype, torch.float32)
        target = patches.to(dtype)
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean).mul_((variance + TARGET_EPS).rsqrt_())
        difference = predicted.to(dtype) - target
        ctx.save_for_backward(difference.to(predicted.dtype))
        return difference.square().mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        (difference,) = ctx.saved_tensors
        scaled = difference.to(gradient.dtype) * (gradient * (2 / difference.numel()))
        return scaled.to(difference.dtype), None


def patch_error(predicted: Tensor, patches: Tensor) -> Tensor:
    """The loss of some patches; what it keeps for the backward pass is as large as ``predicted``, in its type.

    Args:
        predicted: [B, n, P] of any floating type.
        patches: [B, n, P] raw numbers of those patches; no gradient flows to them.

    Returns:
        A scalar in float32, or wider where ``predicted`` is.
    """
    return _PatchError.apply(predicted, patches)  # type: ignore[no-any-return]
