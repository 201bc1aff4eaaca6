"""How long a computation takes at least: what it moves through device memory, what it computes, and a device's limits.

:class:`Traffic` watches operators being dispatched, on tensors that may be fake: then no GPU is needed, nothing is computed.
An operator is taken to read each of its inputs from memory once and to write each output once; memory is moved in sectors of
32 bytes. What a cache keeps between two operators is not credited, so a chain of small tensors may run below its floor.

    time ≥ max(sectors · 32 B / bandwidth, matrix products / matrix rate + other operations / scalar rate)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from xkd_fast.analysis.flops import CPU_ATTENTION
from xkd_kernels.packed_attention import longest_whole

SECTOR = 32  # bytes that device memory is read and written in


@dataclass(frozen=True)
class Device:
    """What a GPU can do at most, by its maker's data sheet.

    Attributes:
        bandwidth: of its memory, bytes/s.
        matrix: dense matrix products of half precision, FLOP/s.
        scalar: float32 operations outside of matrix units, FLOP/s.
    """

    bandwidth: float
    matrix: float
    scalar: float


DEVICES = {
    "A100": Device(2.039e12, 312e12, 19.5e12),  # SXM, 80 GB
    "H100": Device(3.35e12, 989e12, 67e12),  # SXM
    "H200": Device(4.8e12, 989e12, 67e12),
}
# What torch calls the devices of these data sheets; an H100 PCIe, an A100 of 40 GB or a GH200 has another.
SHEETS = {"NVIDIA A100-SXM4-80GB": "A100", "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200"}


@dataclass(frozen=True)
class Cost:
    """What an operator moves and computes.

    Attributes:
        bytes: that it needs to read or to write.
        sectors: of :data:`SECTOR` bytes that it must touch for them.
        products: operations in matrix products, two for each multiplication with its addition.
        others: operations elsewhere; one for each number of an elementwise operator.
    """

    bytes: int = 0
    sectors: int = 0
    products: int = 0
    others: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.bytes + other.bytes,
            self.sectors + other.sectors,
            self.products + other.products,
            self.others + other.others,
        )

    def seconds(self, device: Device) -> float:
        """The least time that this takes on a device."""
        computing = self.products / device.matrix + self.others / device.scalar
        return max(self.sectors * SECTOR / device.bandwidth, computing)


def total(costs: Iterable[Cost]) -> Cost:
    """All of them together."""
    return sum(costs, Cost())


def touched(starts: Iterable[int], length: int) -> int:
    """Sectors that runs of ``length`` bytes from ``starts`` touch, each run by itself."""
    return sum((start + length - 1) // SECTOR - start // SECTOR + 1 for start in starts)


class Traffic(TorchDispatchMode):
    """Adds up the cost of every operator that is dispatched while it is open; views are free.

    Attributes:
        costs: by the operator's name, such as "aten.add" or "xkd_kernels.bias_gelu".
    """

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[str, Cost] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or torch.Tag.inplace_view in func.tags or func.namespace == "prim" or func._opname in FREE:
            return out
        name = f"{func.namespace}.{func._opname}"
        self.costs[name] = self.costs.get(name, Cost()) + _cost(func, args, kwargs or {}, out)
        return out

    @property
    def total(self) -> Cost:
        """Everything that was dispatched."""
        return total(self.costs.values())


# Operators that touch no memory, that do not read what they write to, and that read of their first tensor what they copy alone.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh"}
OVERWRITING = {"copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_"}
SELECTING = {"index", "index_select", "gather", "embedding"}


def cost(work: Callable[[], object]) -> Cost:
    """Of all that ``work`` dispatches."""
    with Traffic() as traffic:
        work()
    return traffic.total


def _cost(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Cost:
    own = OPERATORS.get(f"{func.namespace}.{func._opname}")
    if own:
        return own(*args, out=out, **kwargs)
    if func._opname in OVERWRITING:
        read = _moved([args[1:], kwargs])
    elif func._opname in SELECTING:
        read = _moved(args[1:]) + _moved(out)
    else:
        read = _moved([args, kwargs])
    moved = read + _moved(out)
    formula = flop_registry.get(func.overloadpacket)
    if formula:
        return moved + Cost(products=formula(*args, **kwargs, out_val=out))
    attention = CPU_ATTENTION.get(func.overloadpacket)
    if attention:
        sizes = [x.shape if isinstance(x, Tensor) else x for x in args]
        return moved + Cost(products=attention(*sizes))
    return moved + Cost(others=max((x.numel() for x in _tensors([args, kwargs, out])), default=0))


def _tensors(found: Any) -> list[Tensor]:
    return list({id(x): x for x in tree_leaves(found) if isinstance(x, Tensor)}.values())


def _moved(found: Any) -> Cost:
    """Every different tensor of ``found`` moved once."""
    return total(_whole(x) for x in _tensors(found))


def _whole(x: Tensor) -> Cost:
    """All numbers of a tensor; what a stride of 0 repeats is one number in memory."""
    numbers = math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
    amount = x.element_size() * numbers
    return Cost(amount, math.ceil(amount / SECTOR))


# -------------------------------------------------------------------------------------------------------------- our operators


def _segments(counts: Sequence[int], lengths: Sequence[int]) -> int:
    """The sum of the segments' squared lengths."""
    return sum(count * length**2 for count, length in zip(counts, lengths, strict=True))


def _attention(qkv: Tensor, counts: Sequence[int], lengths: Sequence[int], *, out: Any) -> Cost:
    scores = qkv.shape[2] * _segments(counts, lengths)
    return _moved(qkv) + _moved(out) + Cost(products=4 * scores * qkv.shape[3], others=4 * scores)


def _attention_backward(
    gradient: Tensor, qkv: Tensor, mixed: Tensor, sums: Tensor, counts: Sequence[int], lengths: Sequence[int], *, out: Any
) -> Cost:
    """Five products of whole rows of scores; streamed tiles make scores and their gradients twice."""
    heads, width, limit = qkv.shape[2], qkv.shape[3], longest_whole(qkv)
    every = heads * _segments(counts, lengths)
    streamed = heads * sum(count * length**2 for count, length in zip(counts, lengths, strict=True) if length > limit)
    products = (10 * (every - streamed) + 14 * streamed) * width
    return _moved([gradient, qkv, mixed, sums, out]) + Cost(products=products, others=8 * every + 4 * streamed)


def _cls_attention(qkv: Tensor, counts: Sequence[int], lengths: Sequence[int], *, out: Tensor) -> Cost:
    """Reads all keys and the first queries; values stay where they are."""
    rows, _, heads, width = qkv.shape
    return _moved([qkv[:, 1], out]) + _first_queries(qkv, counts) + Cost(others=(2 * width + 4) * heads * rows)


def _cls_attention_backward(
    gradient: Tensor, qkv: Tensor, probabilities: Tensor, counts: Sequence[int], lengths: Sequence[int], *, out: Tensor
) -> Cost:
    """Reads the same and the probabilities; writes gradients of all three parts, most of them zeros."""
    rows, _, heads, width = qkv.shape
    moved = _moved([gradient, probabilities, qkv[:, 1], out]) + _first_queries(qkv, counts)
    return moved + Cost(others=(3 * width + 5) * heads * rows)


def _first_queries(qkv: Tensor, counts: Sequence[int]) -> Cost:
    """Reading the query of each segment's first token."""
    amount = qkv.element_size() * qkv.shape[2] * qkv.shape[3] * sum(counts)
    return Cost(amount, math.ceil(amount / SECTOR))


def _elementwise(each: int) -> Callable[..., Cost]:
    """Of an operator that takes ``each`` operations for a number of its largest tensor."""

    def found(*args: Any, out: Any, **kwargs: Any) -> Cost:
        largest = max(x.numel() for x in _tensors([args, out]))
        return _moved([args, kwargs, out]) + Cost(others=each * largest)

    return found


def _gather(clip: Tensor, ids: Tensor, patch: Sequence[int], *rest: Any, out: Tensor) -> Cost:
    return _moved([ids, out]) + patches_read(clip, ids.numel(), patch) + Cost(others=2 * out.numel())


def _gather_backward(gradient: Tensor, ids: Tensor, clip: Tensor, patch: Sequence[int], std: Any, *, out: Tensor) -> Cost:
    """Fills a float32 clip with zeros, adds the patches to it in place, and casts it where the clip's type is another."""
    sums = torch.empty(clip.shape, dtype=torch.float32, device="meta")
    added = patches_read(sums, ids.numel(), patch)
    cast = Cost() if clip.dtype == torch.float32 else _whole(sums) + _whole(out) + Cost(others=out.numel())
    return _moved([gradient, ids]) + _whole(sums) + added + added + cast + Cost(others=2 * gradient.numel())


def _masked_patch_loss(predicted: Tensor, clip: Tensor, ids: Tensor, patch: Sequence[int], *rest: Any, out: Any) -> Cost:
    """Targets are made of what is read: normalised, summed and centred, squared and summed, scaled; then the error."""
    return _moved([predicted, ids, out]) + patches_read(clip, ids.numel(), patch) + Cost(others=12 * predicted.numel())


def _masked_patch_loss_backward(
    gradient: Tensor, predicted: Tensor, clip: Tensor, ids: Tensor, averages: Tensor, inverse_deviations: Tensor,
    patch: Sequence[int], *rest: Any, out: Any,
) -> Cost:  # fmt: skip
    moved = _moved([gradient, predicted, ids, averages, inverse_deviations, out])
    return moved + patches_read(clip, ids.numel(), patch) + Cost(others=7 * predicted.numel())


def _refine(tokens: Tensor, own: Tensor, other: Tensor, mode: str, *, out: Any) -> Cost:
    """Every token into two sums; every look into a head's mean, and once more into a weight."""
    return _moved([tokens, own, other, out]) + Cost(others=3 * tokens.numel() + 6 * own.numel() + other.numel())


def patches_read(clip: Tensor, count: int, patch: Sequence[int]) -> Cost:
    """What reading ``count`` patches of a clip costs, on average over where they lie.

    Args:
        clip: [B, C, T, H, W] or [B, C, F, T], of any strides.
        count: patches of all clips together.
        patch: its extent along each axis of the grid.
    """
    size, channels = clip.element_size(), clip.shape[1]
    numbers = channels * math.prod(patch)
    strides, sizes = clip.stride(), clip.shape
    # Rows along the last axis of neighbouring channels are one run where channels are last, and one each where they are first.
    together = strides[1] == 1 and channels > 1
    run = patch[-1] * size * (channels if together else 1)
    firsts = range(0, sizes[-1], patch[-1])
    lines = [line * strides[-2] for line in range(sizes[-2])]
    starts = [size * (line + first * strides[-1]) for line in lines for first in firsts]
    each = touched(starts, run) / len(starts)
    runs = count * math.prod(patch[:-1]) * (1 if together else channels)
    return Cost(count * numbers * size, round(each * runs))


def _mmd(x: Tensor, y: Tensor, gammas: Sequence[float], *, out: Tensor) -> Cost:
    """Of every pair of rows once: for each number a difference and its square added."""
    rows = len(x) + len(y)
    pairs = rows * (rows + 1) // 2
    return _moved([x, y, out]) + Cost(others=pairs * (3 * x.shape[1] + 3 * len(gammas)))


def _mmd_backward(gradient: Tensor, x: Tensor, y: Tensor, gammas: Sequence[float], of_x: bool, of_y: bool, *, out: Any) -> Cost:
    """The distances of the pairs in which a wanted row takes part, and a weighted difference for each of the row's numbers."""
    rows, wanted = len(x) + len(y), len(x) * of_x + len(y) * of_y
    pairs = wanted * (wanted + 1) // 2 + wanted * (rows - wanted)
    others = pairs * (3 * x.shape[1] + 4 * len(gammas)) + 3 * wanted * rows * x.shape[1]
    return _moved([gradient, x, y, out]) + Cost(others=others)


OPERATORS: dict[str, Callable[..., Cost]] = {
    "xkd_kernels.packed_attention": _attention,
    "xkd_kernels.packed_attention_backward": _attention_backward,
    "xkd_kernels.cls_attention": _cls_attention,
    "xkd_kernels.cls_attention_backward": _cls_attention_backward,
    "xkd_kernels.residual_layer_norm": _elementwise(8),
    "xkd_kernels.residual_layer_norm_backward": _elementwise(14),
    "xkd_kernels.bias_gelu": _elementwise(12),
    "xkd_kernels.bias_gelu_backward": _elementwise(24),
    "xkd_kernels.gather_patches": _gather,
    "xkd_kernels.gather_patches_backward": _gather_backward,
    "xkd_kernels.distillation_loss": _elementwise(24),
    "xkd_kernels.distillation_loss_backward": _elementwise(12),
    "xkd_kernels.unit_rows": _elementwise(4),
    "xkd_kernels.unit_rows_backward": _elementwise(7),
    "xkd_kernels.mmd_loss": _mmd,
    "xkd_kernels.mmd_loss_backward": _mmd_backward,
    "xkd_kernels.masked_patch_loss": _masked_patch_loss,
    "xkd_kernels.masked_patch_loss_backward": _masked_patch_loss_backward,
    "xkd_kernels.refine": _refine,
    "xkd_kernels.quantise_rows": _elementwise(8),
    "xkd_kernels.residual_layer_norm_fp8": _elementwise(16),
    "xkd_kernels.bias_gelu_fp8": _elementwise(20),
}
