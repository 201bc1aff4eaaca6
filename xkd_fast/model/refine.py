"""Cross-modal feature refinement in closed form (XKD.md section 5): O(N + M) per head in place of O(N · M)."""

from __future__ import annotations

from torch import Tensor

from xkd_fast.model.precision import as_written
from xkd_fast.reference import wide


def refinement_weights(own: Tensor, other: Tensor, mode: str) -> Tensor:
    """Weights [B, N] of a teacher's patch tokens.

    own: [B, h, N] and other: [B, h, M], how much each head looks at each patch. The mean over the other modality's patches of
    the outer product is own × mean(other).
    """
    own, other = wide(own), wide(other)
    averaged = own * other.mean(dim=-1, keepdim=True)
    weights = averaged.softmax(dim=-1) if mode == "softmax" else averaged / own.mean(dim=-1, keepdim=True)
    return weights.mean(dim=1)


def refined_mean(tokens: Tensor, weights: Tensor) -> Tensor:
    """Mean over patches [B, D] of the re-weighted tokens [B, N, D], its energy that of the plain mean."""
    with as_written(tokens.device):
        tokens = wide(tokens)
        plain = tokens.mean(dim=1)
        weighted = (weights.unsqueeze(1) @ tokens).squeeze(1) / tokens.shape[1]
        energy = plain.square().sum(dim=-1, keepdim=True) / weighted.square().sum(dim=-1, keepdim=True)
        return energy.sqrt() * weighted
