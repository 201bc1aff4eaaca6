"""What is kept for the backward pass is counted, and then let go."""

from __future__ import annotations

import gc
import weakref

import torch

from xkd_fast.analysis.kept import Kept


def test_what_was_counted_is_freed() -> None:
    """Red if the counter's own hooks keep a graph alive: nodes that keep their output would, for good."""
    x, alive = torch.randn(300, 100, requires_grad=True), []

    def forward() -> torch.Tensor:
        out = x.softmax(dim=1)  # keeps its own output
        alive.append(weakref.ref(out))
        return (out * out).sum()

    kept = Kept()
    for _ in range(2):
        kept.count(forward)
    gc.collect()
    assert sum(kept.bytes.values()) > 0
    assert [reference() for reference in alive] == [None, None]


def test_each_storage_counts_once_and_parameters_do_not() -> None:
    """Red if a view is counted beside what it is a view of, a weight or a view of one counts, or anything is left out."""
    x, weight = torch.randn(300, 100, requires_grad=True), torch.nn.Parameter(torch.randn(50, 100))

    def forward() -> torch.Tensor:
        out = (x @ weight.t()).exp()  # keeps x, its own output, and a view of the weight
        return (out * out.view(-1).view_as(out)).sum()  # out and a view of it

    kept = Kept()
    kept.count(forward)
    assert dict(kept.bytes) == {"other": 4 * (300 * 100 + 300 * 50)}
