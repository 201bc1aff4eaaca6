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
