"""The projection head's way through: vectors of length 1 on prototypes of length 1, normalised in the type of their product."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from xkd_fast.model.precision import product_dtype
from xkd_fast.model.products import linear, through
from xkd_fast.reference import LAYER_NORM_EPS, Head, wide
from xkd_kernels import unit_rows


def directions(head: Head, pooled: Tensor, kernels: str) -> Tensor:
    """What meets the prototypes: [rows, D] → [rows, bottleneck], each of length 1. Arguments as of :func:`project`."""
    x = F.gelu(head.norm(through(head.linear1, pooled)))
    x = F.gelu(head.norm(through(head.linear2, x)))
    return unit_rows(through(head.linear3, x), backend=kernels)


def project(head: Head, pooled: Tensor, kernels: str) -> Tensor:
    """Logits of pooled tokens.

    Args:
        head: its weights.
        pooled: [rows, D].
        kernels: who normalises, as ``model.kernels`` says it.

    Returns:
        [rows, K] in float32, or wider where the input is.
    """
    x = directions(head, pooled, kernels)
    prototypes = unit_rows(head.prototypes, head.prototype_scale, dtype=product_dtype(x), backend=kernels)
    return F.layer_norm(wide(linear(x, prototypes, None)), (len(prototypes),), eps=LAYER_NORM_EPS)
