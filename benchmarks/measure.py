"""What a computation costs, counted rather than timed: kept bytes, operator launches, FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xkd_fast.analysis.flops import flop_counter
from xkd_fast.analysis.kept import Kept


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages that autograd keeps for the backward pass, parameters left out."""
    kept = Kept()
    kept.count(forward)
    return sum(kept.bytes.values())


class _Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and torch.Tag.inplace_view not in func.tags:
            self.count += 1
        return func(*args, **(kwargs or {}))


def launches(work: Callable[[], object]) -> int:
    """Operators dispatched by ``work``, views left out; a multi-tensor operator counts once."""
    with _Launches() as counted:
        work()
    return counted.count


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and attention of ``work``."""
    with flop_counter() as counted:
        work()
    return int(counted.get_total_flops())
