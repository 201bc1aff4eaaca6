"""Masked reconstruction (XKD.md section 4): mean squared error to patches that are normalised one by one, inside the loss.

target = (patch − mean(patch)) / √(var(patch) + 1e-6)     unbiased variance
loss = mean((predicted − target)²)
"""

from __future__ import annotations

import torch
from torch import Tensor

from xkd_fast.model.options import AudioOptions, VideoOptions
from xkd_kernels import masked_patch_loss


def reconstruction_loss(
    predicted: Tensor, clip: Tensor, masked: Tensor, options: VideoOptions | AudioOptions, kernels: str
) -> Tensor:
    """The loss of predicted patches, whose targets are made inside of it; no gradient flows to the clip.

    Args:
        predicted: [B, n, P] of any floating type.
        clip: video [B, C, T, H, W] or audio [B, 1, F, T], of any strides; a video of uint8 is normalised first.
        masked: [B, n] token numbers of the predicted patches, in grid order.
        options: the patches' extent, and the pixels' mean and deviation.
        kernels: who computes, as ``model.kernels`` says it.

    Returns:
        A scalar in float32, or wider where ``predicted`` is.
    """
    affine = options.affine(is_raw=clip.dtype == torch.uint8)
    return masked_patch_loss(predicted, clip, masked, options.patch, *affine, backend=kernels)
