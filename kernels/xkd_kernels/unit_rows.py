"""Rows over their length, times a number of their own: L2 normalisation, and the weight of a weight-normalised layer.

    y = scale · x / max(‖x‖, eps)        length in float32

One pass reads a row and writes it in the type that a matrix product wants, so a weight that is normalised anew in every step
costs no more memory traffic than its cast. Kept for the backward pass are the input and one number per row. Legend: M rows,
D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

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

EPS = 1e-12


def naive_unit_rows(x: Tensor, scale: Tensor | None = None, *, eps: float = EPS, dtype: torch.dtype | None = None) -> Tensor:
    """The definition; in float32, or wider where the input is."""
    wide = x if x.dtype == torch.float64 else x.float()
    unit = wide / wide.norm(dim=-1, keepdim=True).clamp_min(eps)
    return (unit if scale is None else scale * unit).to(dtype or x.dtype)


def unit_rows(
    x: Tensor, scale: Tensor | None = None, *, eps: float = EPS, dtype: torch.dtype | None = None, backend: str = "auto"
) -> Tensor:
    """Rows over their L2 norm, times a number for each row.

    Args:
        x: [M, D] of any floating type.
        scale: [M, 1]; None = 1.
        eps: the least length that is divided by.
        dtype: of the result; None = that of ``x``.
        backend: see :mod:`xkd_kernels.backends`.

    Returns:
        [M, D] in ``dtype``.

    Raises:
        ValueError: shapes, types or devices that do not fit.
        BackendError: a backend that cannot run here.
    """
    if x.ndim != 2 or 0 in x.shape or not eps > 0:
        raise ValueError(f"x has the shape {list(x.shape)} and eps = {eps}; [M, D] and eps > 0 are wanted")
    if scale is not None and scale.shape != (len(x), 1):
        raise ValueError(f"scale has the shape {list(scale.shape)}; [{len(x)}, 1], a number for each row, is wanted")
    width, dtype = whole_number(x.shape[1]), dtype or x.dtype
    given = {"x": x} if scale is None else {"x": x, "scale": scale}
    require_floats(**given)
    require_float_type(dtype)
    require_one_device(**given)
    if backend_of("unit_rows", x.device, kernel_type(*given.values()), str(width), backend) == "torch":
        with torch.autocast(x.device.type, enabled=False):
            return _ByTorch.apply(x, scale, eps, dtype)  # type: ignore[no-any-return]
    require_no_tangent(*given.values())
    return unit_rows_forward(x, scale, eps, dtype)[0]


class _ByTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        inverse = length.clamp_min(eps).reciprocal_()
        ctx.save_for_backward(x, scale, inverse)
        ctx.eps = eps
        unit = wide * (inverse if scale is None else inverse * scale)
        return unit if unit.dtype == dtype else unit.to(dtype)  # torch 2.11's compiler loses gradients at a cast of nothing

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x, scale, inverse = ctx.saved_tensors
        wide, gradient = x.to(inverse.dtype), gradient.to(inverse.dtype)
        along = torch.linalg.vecdot(gradient, wide).unsqueeze(1) * inverse  # of the unit row
        factor = inverse if scale is None else inverse * scale
        shrink = torch.where(inverse < 1 / ctx.eps, along * inverse, 0.0)  # a length below eps does not move the result's
        to_x = torch.addcmul(gradient, wide, shrink, value=-1).mul_(factor).to(x.dtype)
        return to_x, None if scale is None else along.to(scale.dtype), None, None


# ------------------------------------------------------------------------------------------------------------------ operators


@torch.library.custom_op("xkd_kernels::unit_rows", mutates_args=())
@on_own_device
def unit_rows_forward(x: Tensor, scale: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scaled unit rows [M, D], and each row's inverse length [M] float32, negative where it is 1 / eps."""
    x, scale = x.contiguous(), None if scale is None else scale.contiguous()
    rows, width = x.shape
    out, inverse = torch.empty_like(x, dtype=dtype), torch.empty(rows, dtype=torch.float32, device=x.device)
    launch = launch_of("unit_rows_forward", x, str(width))
    _unit_rows_forward_kernel[(triton.cdiv(rows, launch.meta["ROWS"]),)](
        x, scale, out, inverse, rows, eps,
        WIDTH=width, WIDTH_BLOCK=triton.next_power_of_2(width), HAS_SCALE=scale is not None, **launch.options,
    )  # fmt: skip
    return out, inverse


@unit_rows_forward.register_fake
def _(x: Tensor, scale: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return out, torch.empty(len(x), dtype=torch.float32, device=x.device)


@torch.library.custom_op("xkd_kernels::unit_rows_backward", mutates_args=())
@on_own_device
def unit_rows_backward(gradient: Tensor, x: Tensor, scale: Tensor | None, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x [M, D] in its type and of the scale [M, 1] in float32."""
    gradient, x, scale = gradient.contiguous(), x.contiguous(), None if scale is None else scale.contiguous()
    rows, width = x.shape
    to_x, to_scale = torch.empty_like(x), torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    launch = launch_of("unit_rows_backward", x, str(width))
    _unit_rows_backward_kernel[(triton.cdiv(rows, launch.meta["ROWS"]),)](
        gradient, x, scale, inverse, to_x, to_scale, rows,
        WIDTH=width, WIDTH_BLOCK=triton.next_power_of_2(width), HAS_SCALE=scale is not None, **launch.options,
    )  # fmt: skip
    return to_x, to_scale


@unit_rows_backward.register_fake
def _(gradient: Tensor, x: Tensor, scale: Tensor | None, inverse: Tensor) -> tuple[Tensor, Tensor]:
    to_scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    return torch.empty_like(x, memory_format=torch.contiguous_format), to_scale


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, scale, _, _ = inputs
    ctx.save_for_backward(x, scale, output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Any) -> tuple[Any, ...]:
    x, scale, inverse = ctx.saved_tensors
    to_x, to_scale = unit_rows_backward(gradient, x, scale, inverse)
    return to_x, None if scale is None else to_scale.to(scale.dtype), None, None


unit_rows_forward.register_autograd(_differentiate, setup_context=_keep)


# -------------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _unit_rows_forward_kernel(
    x, scale, out, inverse, rows, eps,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, HAS_SCALE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH_BLOCK)
    places = own[:, None] * WIDTH + columns[None, :]
    inside = (own < rows)[:, None] & (columns < WIDTH)[None, :]
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    most = tl.maximum(tl.max(tl.abs(values), axis=1), 1e-30)  # no square of it overflows
    length = tl.sqrt(tl.sum((values / most[:, None]) * (values / most[:, None]), axis=1)) * most
    factor = 1 / tl.maximum(length, eps)
    tl.store(inverse + own, tl.where(length > eps, factor, -factor), mask=own < rows)
    if HAS_SCALE:
        factor *= tl.load(scale + own, mask=own < rows, other=0.0).to(tl.float32)
    tl.store(out + places, (values * factor[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _unit_rows_backward_kernel(
    gradient, x, scale, inverse, to_x, to_scale, rows,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, HAS_SCALE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH_BLOCK)
    places = own[:, None] * WIDTH + columns[None, :]
    inside = (own < rows)[:, None] & (columns < WIDTH)[None, :]
    kept = tl.load(inverse + own, mask=own < rows, other=1.0)
    factor = tl.abs(kept)
    unit = tl.load(x + places, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
    to_out = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
    along = tl.sum(to_out * unit, axis=1)
    tl.store(to_scale + own, along, mask=own < rows)
    if HAS_SCALE:
        factor *= tl.load(scale + own, mask=own < rows, other=0.0).to(tl.float32)
    along = tl.where(kept > 0, along, 0.0)
    to_values = (to_out - unit * along[:, None]) * factor[:, None]
    tl.store(to_x + places, to_values.to(to_x.dtype.element_ty), mask=inside)
