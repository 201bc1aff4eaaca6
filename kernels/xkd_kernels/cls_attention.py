"""How much each segment's first token looks at every token: one row of attention per head, without the matrix.

    p[h, j] = softmax_j(q[first, h] · k[j, h] / √d)     float32

The keys are read twice, once for the softmax's maximum and sum and once for its values; the second time they come out of the
cache. Legend: M tokens of all segments together, h heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xkd_kernels.backends import backend_of, shape_class
from xkd_kernels.checks import require_no_tangent, whole_number
from xkd_kernels.configurations import launch_of, on_own_device
from xkd_kernels.packed_attention import LOG2_E, checked_runs, in_place, load_rows, store_rows
from xkd_kernels.segments import Runs, segment_tables


def naive_cls_attention(qkv: Tensor, segments: Runs) -> Tensor:
    """The definition: the first row of each segment's matrix of probabilities; in float32, or wider where the input is."""
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    found = []
    for part, (count, length) in zip(qkv.split([c * n for c, n in segments]), segments, strict=True):
        q, k, _ = part.unflatten(0, (count, length)).to(dtype).permute(2, 0, 3, 1, 4)
        scores = q[:, :, :1] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        found.append(scores.softmax(dim=-1).squeeze(2).transpose(0, 1).flatten(1))
    return torch.cat(found, dim=1)


def cls_attention(qkv: Tensor, segments: Runs, *, backend: str = "auto") -> Tensor:
    """Attention probabilities of each segment's first token.

    Args:
        qkv: [M, 3, h, d] queries, keys and values as a linear layer wrote them; any strides, read in place where the last is 1.
            d up to 128, beyond which ``torch`` alone computes.
        segments: (number of segments, tokens of each) in the order of the rows.
        backend: see :mod:`xkd_kernels.backends`.

    Returns:
        [h, M] float32 (float64 of a float64 input), which sums to 1 over each segment.

    Raises:
        ValueError: segments that do not make up M tokens, or a shape other than [M, 3, h, d].
        BackendError: a backend that cannot run here.
    """
    counts, lengths = checked_runs(qkv, segments)
    shape = f"{shape_class(max(lengths))}x{whole_number(qkv.shape[-1])}"
    if backend_of("cls_attention", qkv.device, qkv.dtype, shape, backend) == "torch":
        with torch.autocast(qkv.device.type, enabled=False):  # in float32
            return naive_cls_attention(qkv, list(zip(counts, lengths)))
    require_no_tangent(qkv)
    return cls_attention_forward(qkv, counts, lengths)


# ------------------------------------------------------------------------------------------------------------------ operators


@torch.library.custom_op("xkd_kernels::cls_attention", mutates_args=())
@on_own_device
def cls_attention_forward(qkv: Tensor, counts: list[int], lengths: list[int]) -> Tensor:
    """Probabilities [h, M] float32."""
    qkv, (rows, _, heads, width) = in_place(qkv), qkv.shape
    probabilities = torch.empty(heads, rows, dtype=torch.float32, device=qkv.device)
    for table in segment_tables(tuple(counts), tuple(lengths), qkv.device, 0):
        launch = launch_of("cls_attention_forward", qkv, f"{table.block}x{width}")
        _cls_attention_forward_kernel[(len(table.places), heads)](
            qkv, probabilities, table.places, width**-0.5 * LOG2_E, rows, *qkv.stride()[:3],
            WIDTH=width, WIDTH_BLOCK=triton.next_power_of_2(width), **launch.options,
        )  # fmt: skip
    return probabilities


@cls_attention_forward.register_fake
def _(qkv: Tensor, counts: list[int], lengths: list[int]) -> Tensor:
    return torch.empty(qkv.shape[2], qkv.shape[0], dtype=torch.float32, device=qkv.device)


@torch.library.custom_op("xkd_kernels::cls_attention_backward", mutates_args=())
@on_own_device
def cls_attention_backward(
    gradient: Tensor, qkv: Tensor, probabilities: Tensor, counts: list[int], lengths: list[int]
) -> Tensor:
    """The gradient [M, 3, h, d] of qkv: of the first tokens' queries and of all keys; the rest is 0."""
    qkv, gradient, (rows, _, heads, width) = in_place(qkv), gradient.contiguous(), qkv.shape
    to_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    for table in segment_tables(tuple(counts), tuple(lengths), qkv.device, 0):
        launch = launch_of("cls_attention_backward", qkv, f"{table.block}x{width}")
        _cls_attention_backward_kernel[(len(table.places), heads)](
            qkv, probabilities, gradient, to_qkv, table.places, width**-0.5, rows, *qkv.stride()[:3],
            WIDTH=width, WIDTH_BLOCK=triton.next_power_of_2(width), **launch.options,
        )  # fmt: skip
    return to_qkv


@cls_attention_backward.register_fake
def _(gradient: Tensor, qkv: Tensor, probabilities: Tensor, counts: list[int], lengths: list[int]) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _keep(ctx: Any, inputs: tuple[Tensor, list[int], list[int]], output: Tensor) -> None:
    qkv, ctx.counts, ctx.lengths = inputs
    ctx.save_for_backward(qkv, output)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return cls_attention_backward(gradient, *ctx.saved_tensors, ctx.counts, ctx.lengths), None, None


cls_attention_forward.register_autograd(_differentiate, setup_context=_keep)


# -------------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _cls_attention_forward_kernel(
    qkv, probabilities, places, scale_log2, rows, stride_token, stride_part, stride_head,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    segment, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, length = tl.load(places + 2 * segment).to(tl.int64), tl.load(places + 2 * segment + 1)
    channels = tl.arange(0, WIDTH_BLOCK)
    q_part = qkv + head * stride_head
    k_part = q_part + stride_part
    q = tl.load(q_part + start * stride_token + channels, mask=channels < WIDTH, other=0.0).to(tl.float32) * scale_log2

    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for first_key in range(0, length, K_BLOCK):
        keys = first_key + tl.arange(0, K_BLOCK)
        k = load_rows(k_part, start + keys, keys < length, stride_token, channels, WIDTH).to(tl.float32)
        scores = tl.where(keys < length, tl.sum(k * q[None, :], axis=1), float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=0))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(scores - higher), axis=0)
        highest = higher
    for first_key in range(0, length, K_BLOCK):
        keys = first_key + tl.arange(0, K_BLOCK)
        k = load_rows(k_part, start + keys, keys < length, stride_token, channels, WIDTH).to(tl.float32)
        scores = tl.sum(k * q[None, :], axis=1)
        tl.store(probabilities + head * rows + start + keys, tl.exp2(scores - highest) / total, mask=keys < length)


@triton.jit
def _cls_attention_backward_kernel(
    qkv, probabilities, gradient, to_qkv, places, scale, rows, stride_token, stride_part, stride_head,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    segment, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, length = tl.load(places + 2 * segment).to(tl.int64), tl.load(places + 2 * segment + 1)
    channels = tl.arange(0, WIDTH_BLOCK)
    q_part = qkv + head * stride_head
    k_part = q_part + stride_part
    probabilities += head * rows
    gradient += head * rows
    part = tl.num_programs(1) * WIDTH  # strides of the packed gradient
    token = 3 * part
    q_grad = to_qkv + head * WIDTH
    q = tl.load(q_part + start * stride_token + channels, mask=channels < WIDTH, other=0.0).to(tl.float32)

    shift = tl.zeros([1], tl.float32)
    for first_key in range(0, length, K_BLOCK):
        keys = first_key + tl.arange(0, K_BLOCK)
        own = tl.load(probabilities + start + keys, mask=keys < length, other=0.0)
        shift += tl.sum(own * tl.load(gradient + start + keys, mask=keys < length, other=0.0), axis=0)
    to_q = tl.zeros([WIDTH_BLOCK], tl.float32)
    nothing = tl.zeros([K_BLOCK, WIDTH_BLOCK], tl.float32)
    for first_key in range(0, length, K_BLOCK):
        keys = first_key + tl.arange(0, K_BLOCK)
        inside, key_rows = keys < length, start + keys
        own = tl.load(probabilities + key_rows, mask=inside, other=0.0)
        to_scores = own * (tl.load(gradient + key_rows, mask=inside, other=0.0) - shift) * scale
        k = load_rows(k_part, key_rows, inside, stride_token, channels, WIDTH).to(tl.float32)
        to_q += tl.sum(to_scores[:, None] * k, axis=0)
        store_rows(q_grad + part, key_rows, inside, token, channels, to_scores[:, None] * q[None, :], WIDTH)
        store_rows(q_grad + 2 * part, key_rows, inside, token, channels, nothing, WIDTH)
        store_rows(q_grad, key_rows, inside & (keys > 0), token, channels, nothing, WIDTH)
    tl.store(q_grad + start * token + channels, to_q.to(to_qkv.dtype.element_ty), mask=channels < WIDTH)
