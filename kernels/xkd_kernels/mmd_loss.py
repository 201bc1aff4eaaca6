"""Squared maximum mean discrepancy of two sets of rows, by exact distances of which none is kept for the backward pass.

    k(a, b) = Σ_γ exp(−γ · max(‖a − b‖², 1e-30))
    loss = mean k(x, x) + mean k(y, y) − 2 · mean k(x, y) = Σ_ij s_i s_j k(z_i, z_j)       biased: the diagonals take part

with z the rows of x and of y one after the other, s_i = 1/n of a row of x and −1/m of a row of y. In float32 the expanded
square ‖a‖² + ‖b‖² − 2 a·b loses every distance far below the rows' norms, and a gradient Σ_j w_ij z_i − Σ_j w_ij z_j likewise.
So distances are sums of squared differences, and gradients sums of weighted ones:

    w_ij = Σ_γ γ · exp(−γ ‖z_i − z_j‖²)        d loss / d z_i = −4 s_i Σ_j s_j w_ij (z_i − z_j)

A row's distance to itself is then exactly 0, and its kernel exactly the number of γ. The loss is a small difference of means
near that number: exponentials and their sums are in float64, little work beside the distances, whose rounding alone is left.

The kernels' backward pass makes the weights again, for as many rows at a time as fit :data:`STRIP` bytes: their memory grows
with the number of rows, not with its square. PyTorch's operators hold some float64 numbers of every pair while a pass lasts.

Legend: n rows of x, m rows of y, N = n + m, K numbers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from xkd_kernels.backends import backend_of, shape_class
from xkd_kernels.checks import require_floats, require_no_tangent, require_one_device, whole_number
from xkd_kernels.configurations import launch_of, on_own_device

STRIP = 4 * 2**20  # bytes of weights at a time: all of them up to 1024 rows
LEAST: tl.constexpr = tl.constexpr(1e-30)  # of a squared distance
GAP = 16  # numbers between rows on a CPU: 2^k bytes apart they share few lines of its cache (50 ms, not 180, for 128 × 8192)


def naive_mmd_loss(x: Tensor, y: Tensor, gammas: Sequence[float]) -> Tensor:
    """The definition; in float32, or wider where the input is."""
    x, y = (rows if rows.dtype == torch.float64 else rows.float() for rows in (x, y))

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        distance = (a.unsqueeze(1) - b).square().sum(dim=-1).clamp_min(1e-30)
        return torch.stack([torch.exp(-gamma * distance) for gamma in gammas]).sum(dim=0).mean()

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def mmd_loss(x: Tensor, y: Tensor, gammas: Sequence[float], *, backend: str = "auto") -> Tensor:
    """Squared maximum mean discrepancy, biased estimator.

    Args:
        x: [n, K] float32 or a half type.
        y: [m, K] of the same type.
        gammas: of the Gaussian kernels, per squared distance; at least one.
        backend: see :mod:`xkd_kernels.backends`. ``torch`` too is differentiated only once and backward.

    Returns:
        The loss, a scalar in float32 (float64 of float64 rows). Of x and y the one that requires a gradient gets one.

    Raises:
        ValueError: shapes, types or devices that do not fit, no γ, or one that is not above 0.
        BackendError: a backend that cannot run here.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or 0 in (*x.shape, *y.shape):
        raise ValueError(
            f"x and y have the shapes {list(x.shape)} and {list(y.shape)}, but [n, K] and [m, K], each at least 1, are wanted"
        )
    require_floats(x=x, y=y)
    if x.dtype != y.dtype:
        raise ValueError(f"x and y are of the types {x.dtype} and {y.dtype}, but one type is wanted".replace("torch.", ""))
    require_one_device(x=x, y=y)
    gammas = [float(gamma) for gamma in gammas]
    if not gammas or not all(0 < gamma < float("inf") for gamma in gammas):
        raise ValueError(f"gammas = {gammas} must be a list of at least one number, each above 0")
    if backend_of("mmd_loss", x.device, x.dtype, str(whole_number(x.shape[1])), backend) == "torch":
        loss: Tensor = _ByDistances.apply(x, y, gammas)
        return loss
    require_no_tangent(x, y)
    return mmd_loss_forward(x, y, gammas)


class _ByDistances(torch.autograd.Function):
    """PyTorch's own operators: each pair of rows once, in the condensed order of ``pdist``."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, gammas: list[float]) -> Tensor:
        rows, distance, pairs = _condensed(x, y)
        kernels = sum(torch.exp(-gamma * distance) for gamma in gammas)
        nothing = (rows * 0).sum()  # unless a row is infinite or NaN: its distance to itself is no number
        loss = len(gammas) * (1 / len(x) + 1 / len(y)) + 2 * (pairs * kernels).sum() + nothing
        return loss.to(rows.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, y, ctx.gammas = inputs
        ctx.save_for_backward(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        rows, distance, pairs = _condensed(x, y)
        weights = sum(gamma * torch.exp(-gamma * distance) for gamma in ctx.gammas)
        to_rows = (_pulled_on_a_cpu if rows.device.type == "cpu" else _pulled)(rows, distance, -4 * gradient * pairs * weights)
        to_x, to_y = to_rows.split([len(x), len(y)])
        to_x, to_y = (to.to(x.dtype) if wanted else None for to, wanted in zip((to_x, to_y), ctx.needs_input_grad))
        return to_x, to_y, None


def _condensed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All rows [N, K] in float32 or wider, and in float64 [N (N − 1) / 2] of each pair the squared distance and s_i s_j."""
    rows = torch.cat([x, y])
    rows = rows if rows.dtype == torch.float64 else rows.float()
    distance = F.pdist(rows).double().square().clamp_min(1e-30)
    share = torch.cat([distance.new_full((len(x),), 1 / len(x)), distance.new_full((len(y),), -1 / len(y))])
    first, second = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    return rows, distance, share[first] * share[second]


def _pulled_on_a_cpu(rows: Tensor, distance: Tensor, weights: Tensor) -> Tensor:
    """Σ_j w_ij (z_i − z_j) [N, K] of condensed weights, by PyTorch's gradient of distances."""
    length = distance.sqrt()  # its gradient is the difference by its length, so the length is multiplied in
    nothing = (distance <= 1e-30) | (weights == 0)  # nor is the length of what is infinitely far
    to_length = (weights * length).to(rows.dtype).masked_fill(nothing, 0)
    padded = F.pad(rows, (0, GAP))
    return torch.ops.aten._pdist_backward(to_length, padded, 2.0, length.to(rows.dtype))[:, : rows.shape[1]]


def _pulled(rows: Tensor, distance: Tensor, weights: Tensor) -> Tensor:
    """The same as products in float64, which keeps what they cancel; PyTorch's gradient on a GPU writes N · N · K numbers."""
    first, second = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    matrix = weights.new_zeros(len(rows), len(rows)).index_put_((first, second), weights.double())
    matrix = matrix + matrix.t()
    wide = rows.double()
    return torch.addmm(matrix.sum(dim=1, keepdim=True) * wide, matrix, wide, alpha=-1).to(rows.dtype)


# ------------------------------------------------------------------------------------------------------------------ operators
#
# Kernels count rows by place: those of x first, padded to whole tiles, then those of y, likewise. So a tile is of one of them.


@torch.library.custom_op("xkd_kernels::mmd_loss", mutates_args=())
@on_own_device
def mmd_loss_forward(x: Tensor, y: Tensor, gammas: list[float]) -> Tensor:
    """The loss, float32."""
    x, y = x.contiguous(), y.contiguous()
    launch = launch_of("mmd_loss_forward", x, _shape(x, y))
    tile = launch.meta["TILE"]
    split, places = _places(x, y, tile)
    grid = (places // tile, places // tile // 2 + 1)
    partial = torch.empty(grid, dtype=torch.float64, device=x.device)
    _mmd_loss_forward_kernel[grid](
        x, y, _constants(tuple(gammas), x.device), partial, split, len(x), len(y),
        WIDTH=x.shape[1], KERNELS=len(gammas), STAGES=launch.stages, **launch.options,
    )  # fmt: skip
    return partial.sum().float()


@mmd_loss_forward.register_fake
def _(x: Tensor, y: Tensor, gammas: list[float]) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=x.device)


@torch.library.custom_op("xkd_kernels::mmd_loss_backward", mutates_args=())
@on_own_device
def mmd_loss_backward(
    gradient: Tensor, x: Tensor, y: Tensor, gammas: list[float], of_x: bool, of_y: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x [n, K] and of y [m, K] in their type; empty where not wanted."""
    x, y = x.contiguous(), y.contiguous()
    to_x, to_y = (torch.empty_like(rows) if wanted else rows.new_empty(0) for rows, wanted in ((x, of_x), (y, of_y)))
    pairs, rows = (launch_of(f"mmd_loss_backward_{name}", x, _shape(x, y)) for name in ("weights", "gradient"))
    tile = pairs.meta["TILE"]
    unit = max(tile, rows.meta["ROWS"], rows.meta["STEP"])
    split, places = _places(x, y, unit)
    begin, end = 0 if of_x else split, places if of_y else split
    strip = min(end - begin, strip_places(places, unit))
    mirrored = strip == places  # both halves of all pairs are wanted at once
    weights = torch.empty(places, strip, dtype=torch.float32, device=x.device)
    constants, width, sizes = _constants(tuple(gammas), x.device), x.shape[1], (split, len(x), len(y))
    for first in range(begin, end, strip):
        own = min(strip, end - first)
        grid = (own // tile, places // tile // 2 + 1 if mirrored else places // tile)
        _mmd_loss_backward_weights_kernel[grid](
            x, y, constants, weights, first // tile, places // tile, strip, *sizes,
            WIDTH=width, KERNELS=len(gammas), MIRRORED=mirrored, STAGES=pairs.stages, **pairs.options,
        )  # fmt: skip
        grid = (own // rows.meta["ROWS"], triton.cdiv(width, rows.meta["BLOCK"]))
        _mmd_loss_backward_gradient_kernel[grid](
            gradient, x, y, weights, to_x, to_y, first, places, strip, *sizes,
            WIDTH=width, STAGES=rows.stages, **rows.options,
        )  # fmt: skip
    return to_x, to_y


@mmd_loss_backward.register_fake
def _(gradient: Tensor, x: Tensor, y: Tensor, gammas: list[float], of_x: bool, of_y: bool) -> tuple[Tensor, Tensor]:
    to_x, to_y = (rows.new_empty(rows.shape if wanted else 0) for rows, wanted in ((x, of_x), (y, of_y)))
    return to_x, to_y


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, ctx.gammas = inputs
    ctx.save_for_backward(x, y)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    of_x, of_y, _ = ctx.needs_input_grad
    to_x, to_y = mmd_loss_backward(gradient, *ctx.saved_tensors, ctx.gammas, of_x, of_y)
    return to_x if of_x else None, to_y if of_y else None, None


mmd_loss_forward.register_autograd(_differentiate, setup_context=_keep)


def strip_places(places: int, unit: int) -> int:
    """How many rows' weights are made at a time: a multiple of ``unit`` that keeps them within :data:`STRIP` bytes."""
    return max(unit, STRIP // (4 * places) // unit * unit)


def _places(x: Tensor, y: Tensor, unit: int) -> tuple[int, int]:
    """The place of the first row of y, and the number of all places."""
    split = triton.cdiv(len(x), unit) * unit
    return split, split + triton.cdiv(len(y), unit) * unit


def _shape(x: Tensor, y: Tensor) -> str:
    return f"{shape_class(len(x) + len(y))}x{x.shape[1]}"


@cache  # for good: a CUDA graph that was recorded goes on reading them
def _constants(gammas: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(gammas, dtype=torch.float64, device=device)


# -------------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _rows_at(place, x, y, split, n, m, COUNT: tl.constexpr):
    """Of ``COUNT`` places: tensor, rows in it (beyond its end the last one), which are there, its number of rows (−m for y)."""
    of_x = place < split
    rows = tl.where(of_x, place, place - split) + tl.arange(0, COUNT)
    count = tl.where(of_x, n, m)
    return tl.where(of_x, x, y), tl.minimum(rows, count - 1).to(tl.int64), rows < count, tl.where(of_x, count, -count)


@triton.jit
def _distances(first, second, WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Squared distances [TILE · TILE], float64, of the rows that begin at the pointers ``first`` and ``second``.

    A row's numbers lie across the threads: each sums its own of all pairs in registers, and the threads are summed at the end.
    """
    columns = tl.arange(0, BLOCK)
    first = first[:, None, None] + columns[None, None, :]
    second = second[None, :, None] + columns[None, None, :]
    squares = tl.zeros([TILE, TILE, BLOCK], tl.float32)
    for start in tl.range(0, WIDTH, BLOCK, num_stages=STAGES):
        if WIDTH % BLOCK == 0:
            difference = tl.load(first + start).to(tl.float32) - tl.load(second + start).to(tl.float32)
        else:
            inside = (start + columns < WIDTH)[None, None, :]
            difference = tl.load(first + start, mask=inside, other=0.0).to(tl.float32)
            difference -= tl.load(second + start, mask=inside, other=0.0).to(tl.float32)
        squares += difference * difference
    # Many threads have the same sums now, of which each would take all exponentials; gathered, a pair is one thread's alone.
    sums = tl.reshape(tl.sum(squares, axis=2), [TILE * TILE])
    return tl.gather(sums, tl.arange(0, TILE * TILE), 0).to(tl.float64)


@triton.jit
def _mmd_loss_forward_kernel(
    x, y, gammas, partial, split, n, m,
    WIDTH: tl.constexpr, KERNELS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program is a tile of rows and the one some tiles further on in the ring of all tiles, up to half way round."""
    tile, steps, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    partial += tile * tl.num_programs(1) + steps
    if (2 * steps == tiles) & (tile >= steps):  # half way round, the other one is here too
        tl.store(partial, 0.0)
        return
    x_rows, rows, there, count = _rows_at(tile * TILE, x, y, split, n, m, TILE)
    y_rows, columns, is_there, others = _rows_at((tile + steps) % tiles * TILE, x, y, split, n, m, TILE)
    distance = _distances(x_rows + rows * WIDTH, y_rows + columns * WIDTH, WIDTH, TILE, BLOCK, STAGES)
    distance = tl.where(distance < LEAST, LEAST, distance)
    kernels = tl.zeros([TILE * TILE], tl.float64)
    for number in range(KERNELS):
        kernels += tl.exp(-tl.load(gammas + number) * distance)
    valid = tl.reshape(there[:, None] & is_there[None, :], [TILE * TILE])
    total = tl.sum(tl.where(valid, kernels, 0.0), axis=0)
    total *= tl.where(steps == 0, 1.0, 2.0)  # two tiles stand for both of their orders
    tl.store(partial, total / (count.to(tl.float64) * others.to(tl.float64)))


@triton.jit
def _mmd_loss_backward_weights_kernel(
    x, y, gammas, weights, first, tiles, strip, split, n, m,
    WIDTH: tl.constexpr, KERNELS: tl.constexpr, MIRRORED: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Weights [all places, strip] of a strip of rows from tile ``first`` on; mirrored, both orders of each pair."""
    own = tl.program_id(0)
    if MIRRORED:  # noqa: SIM102
        if (2 * tl.program_id(1) == tiles) & (own >= tl.program_id(1)):
            return
    other = (first + own + tl.program_id(1)) % tiles
    x_rows, rows, there, _ = _rows_at((first + own) * TILE, x, y, split, n, m, TILE)
    y_rows, columns, is_there, _ = _rows_at(other * TILE, x, y, split, n, m, TILE)
    distance = _distances(x_rows + rows * WIDTH, y_rows + columns * WIDTH, WIDTH, TILE, BLOCK, STAGES)
    sums = tl.zeros([TILE * TILE], tl.float64)
    for number in range(KERNELS):
        gamma = tl.load(gammas + number)
        sums += gamma * tl.exp(-gamma * distance)
    valid = tl.reshape(there[:, None] & is_there[None, :], [TILE * TILE])
    found = tl.where((distance < LEAST) | ~valid, 0.0, sums).to(tl.float32)
    pair = tl.arange(0, TILE * TILE)
    across = (own * TILE + pair // TILE).to(tl.int64)
    along = (other * TILE + pair % TILE).to(tl.int64)
    tl.store(weights + along * strip + across, found)
    if MIRRORED:
        tl.store(weights + across * strip + along, found)


@triton.jit
def _pull(own, weights, rows, count, begin, end, strip, columns,
          WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Σ_j w_ij (z_i − z_j) [ROWS, BLOCK] over ``count`` ``rows``, whose weights are at the places from ``begin`` to ``end``."""
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(begin, end, STEP, num_stages=STAGES):
        place = start + tl.arange(0, STEP)
        weight = tl.load(weights + place.to(tl.int64)[:, None] * strip + tl.arange(0, ROWS)[None, :])
        where = tl.minimum(place - begin, count - 1).to(tl.int64)[:, None] * WIDTH + columns[None, :]
        if WIDTH % BLOCK == 0:
            other = tl.load(rows + where).to(tl.float32)
        else:
            other = tl.load(rows + where, mask=(columns < WIDTH)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(weight[:, :, None] * (own[None, :, :] - other[:, None, :]), axis=0)
    return total


@triton.jit
def _mmd_loss_backward_gradient_kernel(
    gradient, x, y, weights, to_x, to_y, first, places, strip, split, n, m,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program is some columns of some rows of the strip from place ``first`` on, held in registers while all rows pass by."""
    across = tl.program_id(0) * ROWS
    source, rows, there, count = _rows_at(first + across, x, y, split, n, m, ROWS)
    target, _, _, _ = _rows_at(first + across, to_x, to_y, split, n, m, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    where = rows[:, None] * WIDTH + columns[None, :]
    own = tl.load(source + where, mask=(columns < WIDTH)[None, :], other=0.0).to(tl.float32)
    weights += across
    pull = _pull(own, weights, y, m, split, places, strip, columns, WIDTH, ROWS, STEP, BLOCK, STAGES) / m
    pull -= _pull(own, weights, x, n, 0, split, strip, columns, WIDTH, ROWS, STEP, BLOCK, STAGES) / n
    pull *= 4.0 * tl.load(gradient) / count.to(tl.float32)
    tl.store(target + where, pull.to(to_x.dtype.element_ty), mask=there[:, None] & (columns < WIDTH)[None, :])
