"""Refinement is computed in float32 under autocast, as the precision policy says."""

from __future__ import annotations

import torch

from xkd_fast import reference
from xkd_fast.model.refine import refined_mean


def test_refined_mean_is_not_rounded_under_autocast():
    """Catches the weighted sum as a product in bfloat16: off by 2e-3."""
    generator = torch.Generator().manual_seed(0)
    tokens, weights = torch.randn(4, 50, 96, generator=generator), torch.rand(4, 50, generator=generator)
    exact = reference.refine(tokens.double(), weights.double()).mean(dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = refined_mean(tokens, weights)
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 1e-6 * exact.norm()
