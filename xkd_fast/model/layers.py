"""Pairs of layers that keep the input of the pair for the backward pass and recompute what lies between.

Per token and block of width D this keeps 10 D numbers in place of 18 D: the normalised inputs of both linear layers and the
GELU's output come back for the price of an elementwise pass. Nor are the weights kept in autocast's type: they are cast again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xkd_fast.model.precision import as_written, product_dtype


def _linear_backward(
    gradient: Tensor, entered: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of input, weight and bias of a linear layer whose products are in the type of ``entered``."""
    rows, inputs = gradient.flatten(0, -2), entered.flatten(0, -2)
    to_weight = (rows.transpose(0, 1) @ inputs).to(weight.dtype)
    to_bias = None if bias is None else rows.sum(dim=0, dtype=bias.dtype)
    return gradient @ weight.to(entered.dtype), to_weight, to_bias


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:
        with as_written(x.device):
            normed, mean, inverse_deviation = torch.native_layer_norm(x, x.shape[-1:], gain, shift, eps)
            ctx.save_for_backward(x, mean, inverse_deviation, gain, shift, weight, bias)
            ctx.dtype = dtype
            return F.linear(normed.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x, mean, inverse_deviation, gain, shift, weight, bias = ctx.saved_tensors
        with as_written(x.device):
            normed = torch.addcmul(shift, (x - mean) * inverse_deviation, gain)
            to_normed, to_weight, to_bias = _linear_backward(gradient, normed.to(ctx.dtype), weight, bias)
            to_x, to_gain, to_shift = torch.ops.aten.native_layer_norm_backward(
                to_normed.to(x.dtype), x, x.shape[-1:], mean, inverse_deviation, gain, shift, [True, True, True]
            )
        return to_x, to_gain, to_shift, to_weight, to_bias, None, None


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with as_written(h.device):
            ctx.save_for_backward(h, weight, bias)
            return F.linear(F.gelu(h), weight.to(h.dtype), bias.to(h.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        h, weight, bias = ctx.saved_tensors
        with as_written(h.device):
            to_activated, to_weight, to_bias = _linear_backward(gradient, F.gelu(h), weight, bias)
            to_h = torch.ops.aten.gelu_backward(to_activated, h)
        return to_h, to_weight, to_bias


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """``linear(norm(x))`` for x [..., D] of at least float32; the normalised input is not kept.

    Being compiled, it is written out: the compiler fuses it, and decides by itself what to recompute.
    """
    if torch.compiler.is_compiling():
        return linear(norm(x))  # type: ignore[no-any-return]
    return _NormLinear.apply(x, norm.weight, norm.bias, linear.weight, linear.bias, norm.eps, product_dtype(x))  # type: ignore[no-any-return]


def gelu_linear(h: Tensor, linear: nn.Linear) -> Tensor:
    """``linear(gelu(h))`` with the exact GELU; only h [..., H] is kept. Being compiled, it is written out."""
    if torch.compiler.is_compiling():
        return linear(F.gelu(h))  # type: ignore[no-any-return]
    return _GeluLinear.apply(h, linear.weight, linear.bias)  # type: ignore[no-any-return]
