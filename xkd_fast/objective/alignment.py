"""Domain alignment (XKD.md section 7): the squared maximum mean discrepancy of both modalities' logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from xkd_kernels import mmd_loss


def align(video: Tensor, audio: Tensor, gammas: Sequence[float], kernels: str) -> Tensor:
    """The discrepancy of two sets of rows, exact for rows that nearly coincide.

    Args:
        video: [n, K] logits.
        audio: [m, K] logits.
        gammas: of the Gaussian kernels.
        kernels: who computes, as ``model.kernels`` says it.
    """
    return mmd_loss(video, audio, gammas, backend=kernels)
