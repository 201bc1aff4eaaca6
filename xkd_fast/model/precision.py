"""The precision policy, in one place.

Under autocast, matrix products and attention run in autocast's type on weights cast to it (the teachers' once per update,
``half.HalfCopy``; the students' once per use). The residual stream, norms, softmax statistics, embeddings' sums, pooling,
refinement and every loss stay in float32, or in the input's type where that is wider: a float64 replay is float64 throughout.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """The type that matrix products of ``x`` run in here: autocast's, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def as_written(device: torch.device) -> AbstractContextManager[object]:
    """Every operation inside in the types of its inputs: for losses, and for code that casts by itself."""
    return torch.autocast(device.type, enabled=False)
