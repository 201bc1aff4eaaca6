"""Matrix products in the type that autocast asks for, by whatever a processor multiplies that type the fastest with.

A processor without instructions for bfloat16 multiplies such numbers one at a time: an EPYC with AVX2 does a linear layer of
the base model at 19 GFLOP/s in bfloat16 and at 104 in float32. There the bfloat16 numbers are multiplied in float32 and the
result is rounded once, which is what such instructions do. Whatever is kept for the backward pass stays in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xkd_fast.model.precision import as_written, product_dtype

LACKS_BFLOAT16 = not torch.ops.mkldnn._is_mkldnn_bf16_supported()  # this processor has no fast product of that type


def multiplied_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which numbers of ``dtype`` are multiplied on ``device``: their own, but for bfloat16 as said above."""
    return torch.float32 if LACKS_BFLOAT16 and dtype == torch.bfloat16 and device.type == "cpu" else dtype


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the type of ``a``, to which ``b`` is cast."""
    dtype = multiplied_in(a.dtype, a.device)
    if dtype == a.dtype:
        return a @ b.to(dtype)
    with as_written(a.device):
        return (a.to(dtype) @ b.to(a.dtype).to(dtype)).to(a.dtype)


def cast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer in the type of ``x``, to which its weights are cast."""
    dtype = multiplied_in(x.dtype, x.device)
    bias = None if bias is None else bias.to(x.dtype).to(dtype)
    return F.linear(x.to(dtype), weight.to(x.dtype).to(dtype), bias).to(x.dtype)


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """Of a linear layer whose products are in the type of its output's ``gradient``."""
    return matmul(gradient, weight)


def weight_gradients(gradient: Tensor, entered: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of a linear layer's weight and bias, from its output's gradient and what entered it."""
    rows, inputs = gradient.flatten(0, -2), entered.flatten(0, -2)
    to_weight = matmul(rows.transpose(0, 1), inputs).to(weight.dtype)
    return to_weight, None if bias is None else rows.sum(dim=0, dtype=bias.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` in autocast's type, multiplied as this module says. x: [..., inputs], weight: [outputs, inputs]."""
    dtype = product_dtype(x)
    if multiplied_in(dtype, x.device) == dtype:
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        with as_written(x.device):
            return cast_linear(x.to(dtype), weight, bias)
    return _Linear.apply(x, weight, bias, dtype)  # type: ignore[no-any-return]


def through(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; where ``layer`` is linear, by :func:`linear`."""
    if isinstance(layer, nn.Linear) and multiplied_in(product_dtype(x), x.device) != product_dtype(x):
        return linear(x, layer.weight, layer.bias)
    return layer(x)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """What is kept is what entered, in the type of the product: no wider copy of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        with as_written(x.device):
            entered = x.to(dtype)
            ctx.save_for_backward(entered, weight, bias)
            ctx.dtype = x.dtype
            return cast_linear(entered, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        entered, weight, bias = ctx.saved_tensors
        with as_written(entered.device):
            to_x = input_gradient(gradient, weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None
            return to_x, *weight_gradients(gradient, entered, weight, bias), None
