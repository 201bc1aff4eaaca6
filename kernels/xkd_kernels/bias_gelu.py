"""Bias and exact GELU in one pass over memory: h → gelu(h + b), with gelu(u) = u · Φ(u), Φ by erf.

Only h is kept. The backward pass computes Φ again, sums the bias's gradient on its way, and can hand out gelu(h + b) once more,
for a following linear layer's weight gradient, so that it need not be kept. Legend: M rows, H width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from xkd_kernels.backends import backend_of
from xkd_kernels.checks import kernel_type, require_floats, require_no_tangent, require_one_device, whole_number
from xkd_kernels.configurations import launch_of, on_own_device
from xkd_kernels.residual_layer_norm import programs_at_once

ROOT_TWO_PI_INVERSE: tl.constexpr = tl.constexpr(0.3989422804014327)


def naive_bias_gelu(h: Tensor, bias: Tensor) -> Tensor:
    """The definition; in float32, or wider where the input is."""
    u = (h if h.dtype == torch.float64 else h.float()) + bias
    return (u * 0.5 * (1 + torch.erf(u * 0.5**0.5))).to(h.dtype)


def bias_gelu(h: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """``gelu(h + bias)`` with the exact GELU.

    Args:
        h: [..., H] a linear layer's output without its bias.
        bias: [H].
        backend: see :mod:`xkd_kernels.backends`.

    Returns:
        [..., H] in the type of ``h``.

    Raises:
        ValueError: shapes, types or devices that do not fit.
        BackendError: a backend that cannot run here.
    """
    if bias.shape != h.shape[-1:]:
        raise ValueError(f"h and bias have the shapes {list(h.shape)} and {list(bias.shape)}, but [..., H] and [H] are wanted")
    if h.ndim == 0 or h.shape[-1] == 0:
        raise ValueError(f"h has the shape {list(h.shape)}, but rows of at least 1 number are wanted")
    require_floats(h=h, bias=bias)
    require_one_device(h=h, bias=bias)
    if backend_of("bias_gelu", h.device, kernel_type(h, bias), str(whole_number(h.shape[-1])), backend) == "torch":
        return F.gelu(h + bias.to(h.dtype))
    require_no_tangent(h, bias)
    return bias_gelu_forward(h, bias)


# ------------------------------------------------------------------------------------------------------------------ operators


@torch.library.custom_op("xkd_kernels::bias_gelu", mutates_args=())
@on_own_device
def bias_gelu_forward(h: Tensor, bias: Tensor) -> Tensor:
    """``gelu(h + bias)``, [..., H]."""
    h = h.contiguous()
    width = h.shape[-1]
    rows, out = h.numel() // width, torch.empty_like(h)
    launch = launch_of("bias_gelu_forward", h, str(width))
    grid = (triton.cdiv(rows, launch.meta["ROWS"]), triton.cdiv(width, launch.meta["COLUMNS"]))
    _bias_gelu_forward_kernel[grid](h, bias.contiguous(), out, rows, WIDTH=width, **launch.options)
    return out


@bias_gelu_forward.register_fake
def _(h: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(h.contiguous())


@torch.library.custom_op("xkd_kernels::bias_gelu_backward", mutates_args=())
@on_own_device
def bias_gelu_backward(gradient: Tensor, h: Tensor, bias: Tensor, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h [..., H] and of the bias [H] in float32, and ``gelu(h + bias)`` if wanted ``again``, or else empty."""
    h, gradient, bias = h.contiguous(), gradient.contiguous(), bias.contiguous()
    width = h.shape[-1]
    rows, to_h = h.numel() // width, torch.empty_like(h)
    activated = torch.empty_like(h) if again else h.new_empty(0)
    launch = launch_of("bias_gelu_backward", h, str(width))
    stripes = triton.cdiv(width, launch.meta["COLUMNS"])
    programs = min(triton.cdiv(rows, launch.meta["ROWS"]), triton.cdiv(programs_at_once(h.device), stripes))
    partial = torch.empty(programs, width, dtype=torch.float32, device=h.device)
    _bias_gelu_backward_kernel[(programs, stripes)](
        gradient, h, bias, to_h, activated, partial, rows, WIDTH=width, AGAIN=again, **launch.options
    )
    return to_h, partial.sum(dim=0), activated


@bias_gelu_backward.register_fake
def _(gradient: Tensor, h: Tensor, bias: Tensor, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    like_h = torch.empty_like(h.contiguous())
    to_bias = torch.empty(h.shape[-1], dtype=torch.float32, device=h.device)
    return like_h, to_bias, torch.empty_like(like_h) if again else h.new_empty(0)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    h, bias = ctx.saved_tensors
    to_h, to_bias, _ = bias_gelu_backward(gradient, h, bias, False)
    return to_h, to_bias.to(bias.dtype)


bias_gelu_forward.register_autograd(_differentiate, setup_context=_keep)


# -------------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def normal_below(u):
    """Φ(u), and e^(−u²/2), from which it is made: 1 − Φ(|u|) = polynomial(t) · e^(−u²/2), t = 1 / (1 + p|u|).

    Abramowitz and Stegun 7.1.26, at most 7.5e-8 off, which is how far float32's own 0.5 + 0.5 · erf is; a third of its
    instructions, which bound this operator on a GPU, and the tail of negative numbers does not cancel.
    """
    bell = tl.exp(-0.5 * u * u)
    t = 1.0 / (1.0 + 0.231641888 * tl.abs(u))  # 0.3275911 / √2
    tail = ((((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796) * t * bell
    return tl.where(u > 0, 1.0 - tail, tail), bell


@triton.jit
def _bias_gelu_forward_kernel(
    h, bias, out, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    places = own[:, None] * WIDTH + columns[None, :]
    inside = (own < rows)[:, None] & (columns < WIDTH)[None, :]
    u = tl.load(h + places, mask=inside, other=0.0).to(tl.float32)
    u += tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    below, _ = normal_below(u)
    y = u * below
    tl.store(out + places, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _bias_gelu_backward_kernel(
    gradient, h, bias, to_h, activated, partial, rows,
    WIDTH: tl.constexpr, AGAIN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Every program walks over its share of the rows of a stripe of columns and writes their sums."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    shift = tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    to_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        own = first + tl.arange(0, ROWS)
        places = own.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        inside = (own < rows)[:, None] & (columns < WIDTH)[None, :]
        u = tl.load(h + places, mask=inside, other=0.0).to(tl.float32) + shift
        below, bell = normal_below(u)
        slope = below + u * bell * ROOT_TWO_PI_INVERSE
        to_u = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32) * slope
        to_bias += to_u
        tl.store(to_h + places, to_u.to(to_h.dtype.element_ty), mask=inside)
        if AGAIN:
            tl.store(activated + places, (u * below).to(activated.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0) * WIDTH + columns, tl.sum(to_bias, axis=0), mask=columns < WIDTH)
