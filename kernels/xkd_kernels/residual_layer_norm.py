"""Residual sum and LayerNorm in one pass over memory: (x, branch) → (x + branch, LayerNorm(x + branch)).

    s = x + branch                                  in the type of the stream
    y = (s − mean(s)) / √(var(s) + eps) · w + b     statistics in float32

The backward pass reads what the forward pass wrote, s, and one mean and deviation per row. It can hand out y once more, for a
following linear layer's weight gradient, so that y need not be kept. Legend: M rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from xkd_kernels.backends import backend_of
from xkd_kernels.checks import (
    kernel_type,
    require_float_type,
    require_floats,
    require_no_tangent,
    require_one_device,
    whole_number,
)
from xkd_kernels.configurations import launch_of, on_own_device

PROGRAMS_PER_PROCESSOR = 4  # of the backward pass: each sums its rows' gradients of weight and bias


def naive_residual_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The definition; statistics in float32, or wider where the input is."""
    total = (x + branch).to(x.dtype)
    wide = total if total.dtype == torch.float64 else total.float()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    normalised = centred * (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return total, (normalised * weight + bias).to(dtype or x.dtype)


def residual_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum of a residual stream and a branch, and its LayerNorm.

    Args:
        x: [..., D] the stream, float32 or a half type.
        branch: [..., D] of any floating type; float64 is for ``torch`` alone, as of weight and bias.
        weight, bias: [D].
        eps: added to the variance.
        dtype: of the normalised output; None = that of ``x``.
        backend: see :mod:`xkd_kernels.backends`.

    Returns:
        The sum in the type of ``x``, and the normalised sum in ``dtype``.

    Raises:
        ValueError: shapes, types or devices that do not fit.
        BackendError: a backend that cannot run here.
    """
    if branch.shape != x.shape or weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (x, branch, weight, bias))
        raise ValueError(f"x, branch, weight, bias have the shapes {shapes}, but [..., D] twice and [D] twice are wanted")
    if x.ndim == 0 or x.shape[-1] == 0 or not eps >= 0:
        raise ValueError(f"x has the shape {list(x.shape)} and eps = {eps}; rows of at least 1 number and eps ≥ 0 are wanted")
    width, dtype = whole_number(x.shape[-1]), dtype or x.dtype
    require_floats(x=x, branch=branch, weight=weight, bias=bias)
    require_float_type(dtype)
    require_one_device(x=x, branch=branch, weight=weight, bias=bias)
    kind = kernel_type(x, branch, weight, bias)
    if backend_of("residual_layer_norm", x.device, kind, str(width), backend) == "torch":
        total = (x + branch).to(x.dtype)
        return total, F.layer_norm(total, (width,), weight.to(x.dtype), bias.to(x.dtype), eps).to(dtype)
    require_no_tangent(x, branch, weight, bias)
    total, normalised, _, _ = residual_layer_norm_forward(x, branch, weight, bias, eps, dtype)
    return total, normalised


# ------------------------------------------------------------------------------------------------------------------ operators


@torch.library.custom_op("xkd_kernels::residual_layer_norm", mutates_args=())
@on_own_device
def residual_layer_norm_forward(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum and normalised sum [..., D], and each row's mean and inverse deviation [M] float32."""
    x, branch = x.contiguous(), branch.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    total, normalised = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    mean, inverse_deviation = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    launch = launch_of("residual_layer_norm_forward", x, str(width))
    _residual_layer_norm_forward_kernel[(triton.cdiv(rows, launch.meta["ROWS"]),)](
        x, branch, weight.contiguous(), bias.contiguous(), total, normalised, mean, inverse_deviation, rows, eps,
        WIDTH=width, WIDTH_BLOCK=triton.next_power_of_2(width), **launch.options,
    )  # fmt: skip
    return total, normalised, mean, inverse_deviation


@residual_layer_norm_forward.register_fake
def _(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    contiguous = x.contiguous()
    mean, inverse_deviation = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    return torch.empty_like(contiguous), torch.empty_like(contiguous, dtype=dtype), mean, inverse_deviation


@torch.library.custom_op("xkd_kernels::residual_layer_norm_backward", mutates_args=())
@on_own_device
def residual_layer_norm_backward(
    to_total: Tensor | None,
    to_normalised: Tensor,
    total: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_dtype: torch.dtype,
    again: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x [..., D], of the branch, of weight and bias [D] in float32, and the normalised sum.

    The branch's is empty where its type is the stream's, being x's own; the normalised sum is empty unless wanted ``again``.
    """
    width = total.shape[-1]
    rows = total.numel() // width
    to_normalised, to_total = to_normalised.contiguous(), to_total.contiguous() if to_total is not None else None
    to_x = torch.empty_like(total)
    to_branch = torch.empty_like(total, dtype=branch_dtype) if branch_dtype != total.dtype else total.new_empty(0)
    normalised = torch.empty_like(total, dtype=again) if again else total.new_empty(0)
    launch = launch_of("residual_layer_norm_backward", total, str(width))
    programs = min(triton.cdiv(rows, launch.meta["ROWS"]), programs_at_once(total.device))
    partial = torch.empty(2, programs, width, dtype=torch.float32, device=total.device)
    _residual_layer_norm_backward_kernel[(programs,)](
        to_total, to_normalised, total, mean, inverse_deviation, weight.contiguous(), bias.contiguous(),
        to_x, to_branch, normalised, partial, rows,
        WIDTH=width, WIDTH_BLOCK=triton.next_power_of_2(width), HAS_TOTAL=to_total is not None,
        HAS_BRANCH=to_branch.numel() > 0, AGAIN=again is not None, **launch.options,
    )  # fmt: skip
    to_weight, to_bias = partial.sum(dim=1)
    return to_x, to_branch, to_weight.clone(), to_bias.clone(), normalised


@residual_layer_norm_backward.register_fake
def _(
    to_total: Tensor | None,
    to_normalised: Tensor,
    total: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_dtype: torch.dtype,
    again: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    to_branch = torch.empty_like(total, dtype=branch_dtype) if branch_dtype != total.dtype else total.new_empty(0)
    normalised = torch.empty_like(total, dtype=again) if again else total.new_empty(0)
    to_weight, to_bias = (torch.empty(total.shape[-1], dtype=torch.float32, device=total.device) for _ in range(2))
    return torch.empty_like(total), to_branch, to_weight, to_bias, normalised


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, weight, bias, _, _ = inputs
    total, _, mean, inverse_deviation = output
    ctx.branch_dtype = branch.dtype
    ctx.save_for_backward(total, mean, inverse_deviation, weight, bias)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, to_total: Tensor | None, to_normalised: Tensor | None, *_: Any) -> tuple[Any, ...]:
    total, mean, inverse_deviation, weight, bias = ctx.saved_tensors
    if to_normalised is None:
        to_branch = None if to_total is None else to_total.to(ctx.branch_dtype)
        return to_total, to_branch, None, None, None, None
    to_x, to_branch, to_weight, to_bias, _ = residual_layer_norm_backward(
        to_total, to_normalised, total, mean, inverse_deviation, weight, bias, ctx.branch_dtype, None
    )
    to_branch = to_branch if ctx.branch_dtype != total.dtype else to_x
    return to_x, to_branch, to_weight.to(weight.dtype), to_bias.to(bias.dtype), None, None


residual_layer_norm_forward.register_autograd(_differentiate, setup_context=_keep)


def programs_at_once(device: torch.device) -> int:
    """How many programs a kernel that walks over rows is split into: some for each multiprocessor."""
    if device.type == "cpu":
        return 2 * PROGRAMS_PER_PROCESSOR
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


# -------------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _residual_layer_norm_forward_kernel(
    x, branch, weight, bias, total, normalised, mean, inverse_deviation, rows, eps,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH_BLOCK)
    places = own[:, None] * WIDTH + columns[None, :]
    inside = (own < rows)[:, None] & (columns < WIDTH)[None, :]
    s = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    s += tl.load(branch + places, mask=inside, other=0.0).to(tl.float32)
    rounded = s.to(total.dtype.element_ty)
    tl.store(total + places, rounded, mask=inside)
    s = rounded.to(tl.float32)
    average = tl.sum(s, axis=1) / WIDTH
    centred = tl.where(inside, s - average[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) / WIDTH + eps)
    gain = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    y = centred * inverse[:, None] * gain[None, :] + shift[None, :]
    tl.store(normalised + places, y.to(normalised.dtype.element_ty), mask=inside)
    tl.store(mean + own, average, mask=own < rows)
    tl.store(inverse_deviation + own, inverse, mask=own < rows)


@triton.jit
def _residual_layer_norm_backward_kernel(
    to_total, to_normalised, total, mean, inverse_deviation, weight, bias, to_x, to_branch, normalised, partial, rows,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_TOTAL: tl.constexpr, HAS_BRANCH: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Every program walks over its share of the rows and writes one row of partial sums for weight and for bias."""
    columns = tl.arange(0, WIDTH_BLOCK)
    gain = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    to_gain = tl.zeros([ROWS, WIDTH_BLOCK], tl.float32)
    to_shift = tl.zeros([ROWS, WIDTH_BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        own = first + tl.arange(0, ROWS)
        places = own.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        inside = (own < rows)[:, None] & (columns < WIDTH)[None, :]
        average = tl.load(mean + own, mask=own < rows, other=0.0)[:, None]
        inverse = tl.load(inverse_deviation + own, mask=own < rows, other=0.0)[:, None]
        s = tl.load(total + places, mask=inside, other=0.0).to(tl.float32)
        unit = tl.where(inside, (s - average) * inverse, 0.0)
        to_y = tl.load(to_normalised + places, mask=inside, other=0.0).to(tl.float32)
        to_gain += to_y * unit
        to_shift += to_y
        to_unit = to_y * gain
        along = tl.sum(to_unit * unit, axis=1)[:, None] / WIDTH
        constant = tl.sum(to_unit, axis=1)[:, None] / WIDTH
        to_sum = (to_unit - constant - unit * along) * inverse
        if HAS_TOTAL:
            to_sum += tl.load(to_total + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(to_x + places, to_sum.to(to_x.dtype.element_ty), mask=inside)
        if HAS_BRANCH:
            tl.store(to_branch + places, to_sum.to(to_branch.dtype.element_ty), mask=inside)
        if AGAIN:
            shift = tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
            tl.store(normalised + places, (unit * gain + shift).to(normalised.dtype.element_ty), mask=inside)
    row = partial + tl.program_id(0) * WIDTH + columns
    tl.store(row, tl.sum(to_gain, axis=0), mask=columns < WIDTH)
    tl.store(row + tl.num_programs(0) * WIDTH, tl.sum(to_shift, axis=0), mask=columns < WIDTH)
