"""Position tables of the fast model are the reference's."""

from __future__ import annotations

import pytest
import torch

from xkd_fast.model.tokens import resampled_position
from xkd_fast.reference import interpolate_position


@pytest.mark.parametrize(
    ("grid", "target"),
    [((5, 28), (5, 9)), ((3, 4), (3, 7)), ((1, 6), (1, 1)), ((4, 6), (4, 6)), ((4, 3, 3), (2, 2, 2)), ((4, 3, 3), (4, 3, 3))],
)
def test_a_resampled_table_is_the_references(grid: tuple[int, ...], target: tuple[int, ...]) -> None:
    """Red if mel bands or channels are mixed, time and mel exchanged, or the scale loses its 0.1."""
    table = torch.randn(1, torch.Size(grid).numel(), 12, dtype=torch.float64, requires_grad=True)
    ours, theirs = (resample(table, grid, target) for resample in (resampled_position, interpolate_position))
    assert torch.equal(ours, theirs)
    weights = torch.randn_like(theirs)
    gradients = [torch.autograd.grad((each * weights).sum(), table)[0] for each in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
