"""Rows in E4M3 with a scale each, for products of 8-bit floats: the quantisation alone, or fused into what comes before it.

    scale = max|row| / 448                          448 is E4M3's largest number; 1 where a row's numbers are all but zero
    q     = row / scale                             rounded to the nearest, ties to even

Forward only: what is quantised has no gradient. A row that holds no number (NaN, infinity) has such a scale, and what its own
places hold is of no meaning. Legend: M rows, D or H width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from xkd_kernels.backends import backend_of
from xkd_kernels.bias_gelu import naive_bias_gelu, normal_below
from xkd_kernels.checks import kernel_type, require_floats, require_no_gradient, require_one_device, whole_number
from xkd_kernels.configurations import launch_of, on_own_device
from xkd_kernels.packed_attention import INTERPRETED
from xkd_kernels.residual_layer_norm import naive_residual_layer_norm

E4M3 = torch.float8_e4m3fn
LARGEST: tl.constexpr = tl.constexpr(448.0)
LEAST: tl.constexpr = tl.constexpr(2.0**-126)  # float32's smallest normal number: no scale is below it


def naive_quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition; in float32, or wider where the input is."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = wide.abs().amax(dim=-1, keepdim=True) / LARGEST.value
    scale = torch.where(scale < LEAST.value, 1.0, scale)
    return (wide / scale).to(E4M3), scale.float()


def naive_residual_layer_norm_fp8(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition; statistics in float32, or wider where the input is."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    branch = torch.zeros_like(x) if branch is None else branch
    total, normalised = naive_residual_layer_norm(x, branch, weight, bias, eps, wide)
    return total, *naive_quantise_rows(normalised)


def naive_bias_gelu_fp8(h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The definition; in float32, or wider where the input is."""
    return naive_quantise_rows(naive_bias_gelu(h if h.dtype == torch.float64 else h.float(), bias))


def quantise_rows(x: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Rows in E4M3.

    Args:
        x: [..., D].
        backend: see :mod:`xkd_kernels.backends`.

    Returns:
        q [..., D] in E4M3 and scale [..., 1] in float32: ``q · scale`` is about ``x``.

    Raises:
        ValueError: a shape or type that does not fit, or an input to be differentiated.
        BackendError: a backend that cannot run here.
    """
    _require_rows(x=x)
    if _backend("quantise_rows", x, backend) == "torch":
        return naive_quantise_rows(x)
    return quantise_rows_forward(x)


def residual_layer_norm_fp8(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of a residual stream and a branch, and its LayerNorm in E4M3.

    Args:
        x: [..., D] the stream, float32 or a half type.
        branch: [..., D] of any floating type; None = nothing is added.
        weight, bias: [D].
        eps: added to the variance.
        backend: see :mod:`xkd_kernels.backends`.

    Returns:
        The sum in the type of ``x`` (``x`` itself where nothing is added), and the normalised sum as q [..., D] in E4M3 and
        scale [..., 1] in float32.

    Raises:
        ValueError: shapes, types or devices that do not fit, or an input to be differentiated.
        BackendError: a backend that cannot run here.
    """
    more = {} if branch is None else {"branch": branch}
    if any(tensor.shape != x.shape for tensor in more.values()) or not weight.shape == bias.shape == x.shape[-1:]:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (x, *more.values(), weight, bias))
        raise ValueError(f"{', '.join(('x', *more))}, weight, bias have the shapes {shapes}; [..., D] and [D] twice are wanted")
    if not eps >= 0:
        raise ValueError(f"eps = {eps}, but eps ≥ 0 is wanted")
    _require_rows(x=x, **more, weight=weight, bias=bias)
    if _backend("residual_layer_norm_fp8", x, backend, weight, bias, *(() if branch is None else (branch,))) == "torch":
        total = x if branch is None else (x + branch).to(x.dtype)
        wide = total if x.dtype == torch.float64 else total.float()
        normalised = F.layer_norm(wide, wide.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps)
        return total, *naive_quantise_rows(normalised)
    total, q, scale = residual_layer_norm_fp8_forward(x, branch, weight, bias, eps)
    return x if branch is None else total, q, scale


def bias_gelu_fp8(h: Tensor, bias: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """``gelu(h + bias)`` with the exact GELU, in E4M3.

    Args:
        h: [..., H] a linear layer's output without its bias.
        bias: [H].
        backend: see :mod:`xkd_kernels.backends`.

    Returns:
        q [..., H] in E4M3 and scale [..., 1] in float32.

    Raises:
        ValueError: shapes, types or devices that do not fit, or an input to be differentiated.
        BackendError: a backend that cannot run here.
    """
    if bias.shape != h.shape[-1:]:
        raise ValueError(f"h and bias have the shapes {list(h.shape)} and {list(bias.shape)}, but [..., H] and [H] are wanted")
    _require_rows(h=h, bias=bias)
    if _backend("bias_gelu_fp8", h, backend, bias) == "torch":
        return naive_quantise_rows(F.gelu((h if h.dtype == torch.float64 else h.float()) + bias))
    return bias_gelu_fp8_forward(h, bias)


def _require_rows(**tensors: Tensor) -> None:
    """What all three ask of their inputs, the first of which has the rows."""
    (name, x), *_ = tensors.items()
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has the shape {list(x.shape)}, but rows of at least 1 number are wanted")
    require_floats(**tensors)
    require_one_device(**tensors)
    require_no_gradient(**tensors)


def _backend(operator: str, x: Tensor, asked: str, *others: Tensor) -> str:
    return backend_of(operator, x.device, kernel_type(x, *others), str(whole_number(x.shape[-1])), asked)


# ------------------------------------------------------------------------------------------------------------------ operators


def _empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where rows like those of a contiguous ``x`` are quantised to: q [..., D] and scale [..., 1]."""
    return torch.empty_like(x, dtype=E4M3), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("xkd_kernels::quantise_rows", mutates_args=())
@on_own_device
def quantise_rows_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """q [..., D] and scale [..., 1]."""
    x = x.contiguous()
    width, (q, scale) = x.shape[-1], _empty_rows(x)
    launch = launch_of("quantise_rows_forward", x, str(width))
    _quantise_rows_forward_kernel[(triton.cdiv(scale.numel(), launch.meta["ROWS"]),)](
        x, q, scale, scale.numel(), WIDTH=width, WIDTH_BLOCK=triton.next_power_of_2(width), **launch.options
    )
    return q, scale


@quantise_rows_forward.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_rows(x.contiguous())


@torch.library.custom_op("xkd_kernels::residual_layer_norm_fp8", mutates_args=())
@on_own_device
def residual_layer_norm_fp8_forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum [..., D], empty without a branch; q [..., D] and scale [..., 1]."""
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    width, (q, scale) = x.shape[-1], _empty_rows(x)
    total = x.new_empty(0) if branch is None else torch.empty_like(x)
    launch = launch_of("residual_layer_norm_fp8_forward", x, str(width))
    _residual_layer_norm_fp8_forward_kernel[(triton.cdiv(scale.numel(), launch.meta["ROWS"]),)](
        x, branch, weight.contiguous(), bias.contiguous(), total, q, scale, scale.numel(), eps,
        WIDTH=width, WIDTH_BLOCK=triton.next_power_of_2(width), HAS_BRANCH=branch is not None, **launch.options,
    )  # fmt: skip
    return total, q, scale


@residual_layer_norm_fp8_forward.register_fake
def _(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    return x.new_empty(0) if branch is None else torch.empty_like(x), *_empty_rows(x)


@torch.library.custom_op("xkd_kernels::bias_gelu_fp8", mutates_args=())
@on_own_device
def bias_gelu_fp8_forward(h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """q [..., H] and scale [..., 1]."""
    h = h.contiguous()
    width, (q, scale) = h.shape[-1], _empty_rows(h)
    launch = launch_of("bias_gelu_fp8_forward", h, str(width))
    _bias_gelu_fp8_forward_kernel[(triton.cdiv(scale.numel(), launch.meta["ROWS"]),)](
        h, bias.contiguous(), q, scale, scale.numel(),
        WIDTH=width, WIDTH_BLOCK=triton.next_power_of_2(width), **launch.options,
    )  # fmt: skip
    return q, scale


@bias_gelu_fp8_forward.register_fake
def _(h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_rows(h.contiguous())


# -------------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _quantised(y):
    """Rows of y [R, W] float32 as E4M3 [R, W] and scales [R]; columns beyond a row's end must be 0.

    Largest numbers are found as whole numbers, among which NaN is the largest. A GPU's cast rounds to the nearest; the
    interpreter's cuts off, so there float32 rounds before: at this distance from 0 its spacing is E4M3's, 2⁻³ of the number's
    power of two and 2⁻⁹ at least.
    """
    largest = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    scale = largest / LARGEST
    scale = tl.where(scale < LEAST, 1.0, scale)
    y = y * (1.0 / scale)[:, None]
    if INTERPRETED:
        power = (y.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        distance = tl.maximum(power, 0.015625) * 1572864.0  # 2⁻⁶, E4M3's smallest normal number; 1.5 · 2²⁰
        y = (y + distance) - distance
    return y.to(tl.float8e4nv), scale


@triton.jit
def _quantise_rows_forward_kernel(
    x, q, scale, rows, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH_BLOCK)
    places = own[:, None] * WIDTH + columns[None, :]
    inside = (own < rows)[:, None] & (columns < WIDTH)[None, :]
    numbers, scales = _quantised(tl.load(x + places, mask=inside, other=0.0).to(tl.float32))
    tl.store(q + places, numbers, mask=inside)
    tl.store(scale + own, scales, mask=own < rows)


@triton.jit
def _residual_layer_norm_fp8_forward_kernel(
    x, branch, weight, bias, total, q, scale, rows, eps,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_BRANCH: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH_BLOCK)
    places = own[:, None] * WIDTH + columns[None, :]
    inside = (own < rows)[:, None] & (columns < WIDTH)[None, :]
    s = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        s += tl.load(branch + places, mask=inside, other=0.0).to(tl.float32)
        rounded = s.to(total.dtype.element_ty)
        tl.store(total + places, rounded, mask=inside)
        s = rounded.to(tl.float32)
    average = tl.sum(s, axis=1) / WIDTH
    centred = tl.where(inside, s - average[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) / WIDTH + eps)
    gain = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    numbers, scales = _quantised(centred * inverse[:, None] * gain[None, :] + shift[None, :])
    tl.store(q + places, numbers, mask=inside)
    tl.store(scale + own, scales, mask=own < rows)


@triton.jit
def _bias_gelu_fp8_forward_kernel(
    h, bias, q, scale, rows, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH_BLOCK)
    places = own[:, None] * WIDTH + columns[None, :]
    inside = (own < rows)[:, None] & (columns < WIDTH)[None, :]
    u = tl.load(h + places, mask=inside, other=0.0).to(tl.float32)
    u += tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    below, _ = normal_below(u)
    numbers, scales = _quantised(u * below)
    tl.store(q + places, numbers, mask=inside)
    tl.store(scale + own, scales, mask=own < rows)
