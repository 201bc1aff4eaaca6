"""The fast model's reconstruction loss: the reference's numbers, and no more memory than it needs."""

from __future__ import annotations

import pytest
import torch

from xkd_fast import reference
from xkd_fast.analysis.kept import Kept
from xkd_fast.objective.reconstruction import patch_error


def batch(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions of 10 patches of each of 3 clips, and patches far from zero."""
    generator = torch.Generator().manual_seed(0)
    predicted, patches = torch.randn(2, 3, 10, 48, generator=generator, dtype=torch.float64)
    return predicted.to(dtype), patches * 0.3 + 5


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
def test_value_and_gradient_are_the_references(dtype, error):
    """Catches a biased variance (off by 2 % here), a target that is not normalised, a gradient off by a factor."""
    predicted, patches = batch(dtype)
    exact = predicted.double().clone().requires_grad_()
    expected = reference.patch_error(exact, patches)
    expected.backward()
    predicted.requires_grad_()
    loss = patch_error(predicted, patches.to(torch.float64 if dtype == torch.float64 else torch.float32))
    (3 * loss).backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=min(error, 2e-6))
    assert predicted.grad is not None and exact.grad is not None and predicted.grad.dtype == dtype
    assert (predicted.grad - 3 * exact.grad).norm() < error * 3 * exact.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_as_much_as_the_prediction(dtype):
    """Catches targets, or a float32 copy of a prediction in bfloat16, kept for the backward pass."""
    predicted, patches = batch(dtype)
    kept = Kept()
    kept.count(lambda: patch_error(predicted.requires_grad_(), patches.float()))
    assert sum(kept.bytes.values()) == predicted.numel() * predicted.element_size()
