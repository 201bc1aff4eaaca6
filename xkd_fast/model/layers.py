"""Layers of a block that keep only what enters them for the backward pass and compute what lies between once more.

Per token and block of width D this keeps 10 D numbers in place of 18 D: the normalised inputs of both linear layers and the
GELU's output come back for the price of an elementwise pass. Nor are the weights kept in autocast's type: they are cast again.

Each comes in two forms: by PyTorch's operators, and by the fused ones of ``xkd_kernels``, which pass over memory once and hand
out in their backward pass what the linear layer's weight gradient wants. Being compiled, both are written out without a
backward pass of their own: the compiler decides by itself what to keep.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xkd_fast.model.fp8 import Fp8Linear
from xkd_fast.model.kernels import wants
from xkd_fast.model.packing import added
from xkd_fast.model.precision import as_written, product_dtype
from xkd_fast.model.products import cast_linear, input_gradient, through, weight_gradients
from xkd_fast.model.products import linear as multiply
from xkd_kernels import bias_gelu, bias_gelu_fp8, residual_layer_norm, residual_layer_norm_fp8
from xkd_kernels.bias_gelu import bias_gelu_backward, bias_gelu_forward
from xkd_kernels.residual_layer_norm import residual_layer_norm_backward, residual_layer_norm_forward


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:
        with as_written(x.device):
            normed, mean, inverse_deviation = torch.native_layer_norm(x, x.shape[-1:], gain, shift, eps)
            ctx.save_for_backward(x, mean, inverse_deviation, gain, shift, weight, bias)
            ctx.eps, ctx.dtype = eps, dtype
            return cast_linear(normed.to(dtype), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x, mean, inverse_deviation, gain, shift, weight, bias = ctx.saved_tensors
        with as_written(x.device):
            normed, _, _ = torch.native_layer_norm(x, x.shape[-1:], gain, shift, ctx.eps)
            to_weight, to_bias = weight_gradients(gradient, normed.to(ctx.dtype), weight, bias)
            to_x, to_gain, to_shift = torch.ops.aten.native_layer_norm_backward(
                input_gradient(gradient, weight).to(x.dtype), x, x.shape[-1:], mean, inverse_deviation, gain, shift, [True] * 3
            )
        return to_x, to_gain, to_shift, to_weight, to_bias, None, None


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with as_written(h.device):
            ctx.save_for_backward(h, weight, bias)
            return cast_linear(F.gelu(h), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        h, weight, bias = ctx.saved_tensors
        with as_written(h.device):
            to_weight, to_bias = weight_gradients(gradient, F.gelu(h), weight, bias)
            to_h = torch.ops.aten.gelu_backward(input_gradient(gradient, weight), h)
        return to_h, to_weight, to_bias


class _FusedResidualNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor,
        gain: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        with as_written(x.device):
            total, normed, mean, inverse_deviation = residual_layer_norm_forward(x, branch, gain, shift, eps, dtype)
            ctx.save_for_backward(total, mean, inverse_deviation, gain, shift, weight, bias)
            ctx.dtype, ctx.branch_dtype = dtype, branch.dtype
            ctx.set_materialize_grads(False)
            return total, cast_linear(normed, weight, bias)

    @staticmethod
    def backward(ctx: Any, to_total: Tensor | None, gradient: Tensor | None) -> Any:  # type: ignore[override]
        total, mean, inverse_deviation, gain, shift, weight, bias = ctx.saved_tensors
        if gradient is None:
            return to_total, None if to_total is None else to_total.to(ctx.branch_dtype), *[None] * 6
        with as_written(total.device):
            to_normed, dtypes = input_gradient(gradient, weight), (ctx.branch_dtype, ctx.dtype)
            to_x, to_branch, to_gain, to_shift, normed = residual_layer_norm_backward(
                to_total, to_normed, total, mean, inverse_deviation, gain, shift, *dtypes
            )
            to_weight, to_bias = weight_gradients(gradient, normed, weight, bias)
        to_branch = to_branch if ctx.branch_dtype != total.dtype else to_x
        return to_x, to_branch, to_gain.to(gain.dtype), to_shift.to(shift.dtype), to_weight, to_bias, None, None


class _FusedBiasGeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, first_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with as_written(h.device):
            ctx.save_for_backward(h, first_bias, weight, bias)
            return cast_linear(bias_gelu_forward(h, first_bias), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        h, first_bias, weight, bias = ctx.saved_tensors
        with as_written(h.device):
            to_h, to_first_bias, activated = bias_gelu_backward(input_gradient(gradient, weight), h, first_bias, True)
            to_weight, to_bias = weight_gradients(gradient, activated, weight, bias)
        return to_h, to_first_bias.to(first_bias.dtype), to_weight, to_bias


def residual_norm_linear(
    x: Tensor, branch: Tensor | None, norm: nn.LayerNorm, linear: nn.Linear | Fp8Linear, kernels: str, *, biased: bool = True
) -> tuple[Tensor, Tensor]:
    """The stream and a linear layer of its norm: ``s = x + branch``, ``linear(norm(s))``. What is normalised is not kept.

    Args:
        x: [..., D] the stream, float32 or wider.
        branch: [..., D] what is added to it; None = nothing.
        norm, linear: the layers.
        kernels: who computes, as ``model.kernels`` says it.
        biased: whether the linear layer's bias, if it has one, is added here.

    Returns:
        s [..., D] in the type of ``x``, and [..., outputs] in the type of products.
    """
    dtype = product_dtype(x)
    if isinstance(linear, Fp8Linear):
        total, q, scale = residual_layer_norm_fp8(x, branch, norm.weight, norm.bias, norm.eps, backend=kernels)
        return total, linear.of_quantised(q, scale, dtype, biased=biased)
    weight, bias = linear.weight, linear.bias if biased else None
    if branch is None or not wants("residual_layer_norm", kernels, x, str(x.shape[-1])):
        total = added(x, branch)
        if torch.compiler.is_compiling():
            return total, multiply(norm(total), weight, bias)
        found = _NormLinear.apply(total, norm.weight, norm.bias, weight, bias, norm.eps, dtype)
        return total, found  # type: ignore[return-value]
    if torch.compiler.is_compiling():
        total, normed = residual_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, dtype=dtype, backend="triton")
        return total, multiply(normed, weight, bias)
    both = _FusedResidualNormLinear.apply(x, branch, norm.weight, norm.bias, weight, bias, norm.eps, dtype)
    return both  # type: ignore[return-value]


def mlp(
    x: Tensor,
    branch: Tensor | None,
    norm: nn.LayerNorm,
    fc1: nn.Linear | Fp8Linear,
    fc2: nn.Linear | Fp8Linear,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    """The stream ``s = x + branch`` and the next branch, ``fc2(gelu(fc1(norm(s))))`` with the exact GELU.

    Shapes as in :func:`residual_norm_linear`. Neither what is normalised nor what GELU gives is kept.
    """
    if isinstance(fc2, Fp8Linear):
        x, h = residual_norm_linear(x, branch, norm, fc1, kernels, biased=False)
        return x, fc2.of_quantised(*bias_gelu_fp8(h, fc1.bias, backend=kernels), h.dtype)
    fused = wants("bias_gelu", kernels, x, str(len(fc1.weight)))  # the bias is added where GELU is computed
    x, h = residual_norm_linear(x, branch, norm, fc1, kernels, biased=not fused)
    if torch.compiler.is_compiling():
        return x, through(fc2, bias_gelu(h, fc1.bias, backend="triton") if fused else F.gelu(h))
    if fused:
        return x, _FusedBiasGeluLinear.apply(h, fc1.bias, fc2.weight, fc2.bias)  # type: ignore[return-value]
    return x, _GeluLinear.apply(h, fc2.weight, fc2.bias)  # type: ignore[return-value]
