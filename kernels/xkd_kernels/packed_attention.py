"""Attention of packed segments, each to itself, straight from the projection's output: [M, 3, h, d] → [M, h·d].

    for each segment and head:
        P = softmax(q kᵀ / √d)          float32
        out = P v

Two regimes. Of a segment of up to 128 tokens all keys and values are on the chip at once: its rows of scores are whole, and the
backward pass makes each again from q and k, so that nothing but the input is kept. Longer segments are streamed tile by tile
with a running maximum and sum (Milakov and Gimelshein 2018; Dao et al. 2022), and keep the output and one number per row and
head. Either way the backward pass is a single kernel that writes the packed gradient.

Whole rows end at 128 because a tile's sides are powers of two: 561 scores would take a row of 1024, nearly half of it padding,
and 141 one of 256; tiles of 64 waste 3 % and 27 %. What longer rows would take of a GPU stands in CONTRIBUTING.md.

Legend: M tokens of all segments together, h heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from xkd_kernels.backends import backend_of, shape_class
from xkd_kernels.checks import require_floats, require_no_tangent, whole_number
from xkd_kernels.configurations import launch_of, on_own_device
from xkd_kernels.segments import Runs, SegmentTable, segment_tables, split_runs

LOG2_E = 1.4426950408889634
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


def naive_packed_attention(qkv: Tensor, segments: Runs) -> Tensor:
    """The definition, with every matrix in memory; in float32, or wider where the input is."""
    wide = qkv if qkv.dtype == torch.float64 else qkv.float()
    mixed = []
    for part, (count, length) in zip(wide.split([c * n for c, n in segments]), segments, strict=True):
        q, k, v = part.view(count, length, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
        probabilities = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        mixed.append((probabilities @ v).transpose(1, 2).reshape(count * length, -1))
    return torch.cat(mixed).to(qkv.dtype)


def packed_attention(qkv: Tensor, segments: Runs, *, backend: str = "auto") -> Tensor:
    """Attention of packed segments, each to itself.

    Args:
        qkv: [M, 3, h, d] queries, keys and values as a linear layer wrote them; any strides, read in place where the last is 1.
            d up to 128, beyond which ``torch`` alone computes.
        segments: (number of segments, tokens of each) in the order of the rows.
        backend: see :mod:`xkd_kernels.backends`.

    Returns:
        [M, h·d] in the type of ``qkv``.

    Raises:
        ValueError: segments that do not make up M tokens, or a shape other than [M, 3, h, d].
        BackendError: a backend that cannot run here.
    """
    counts, lengths = checked_runs(qkv, segments)
    shape = f"{shape_class(max(lengths))}x{whole_number(qkv.shape[-1])}"
    if backend_of("packed_attention", qkv.device, qkv.dtype, shape, backend) == "torch":
        with torch.autocast(qkv.device.type, enabled=False):  # the result is in the type of qkv
            return _by_sdpa(qkv, list(zip(counts, lengths)))
    require_no_tangent(qkv)
    return packed_attention_forward(qkv, counts, lengths)[0]


def checked_runs(qkv: Tensor, segments: Runs) -> tuple[list[int], list[int]]:
    """Numbers and lengths of the segments of a packed projection.

    Raises:
        ValueError: a type that is not floating, a shape other than [M, 3, h, d], or segments that do not make up M tokens.
    """
    require_floats(qkv=qkv)
    if qkv.ndim != 4 or qkv.shape[1] != 3 or 0 in qkv.shape[2:]:
        raise ValueError(f"qkv has the shape {list(qkv.shape)}, but [tokens, 3, heads, head width] is wanted")
    return split_runs(segments, qkv.shape[0])


def _by_sdpa(qkv: Tensor, segments: Runs) -> Tensor:
    mixed = []
    for part, (count, length) in zip(qkv.split([c * n for c, n in segments]), segments, strict=True):
        q, k, v = part.unflatten(0, (count, length)).permute(2, 0, 3, 1, 4)
        mixed.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(mixed) if len(mixed) > 1 else mixed[0]


# ------------------------------------------------------------------------------------------------------------------ operators


def longest_whole(qkv: Tensor) -> int:
    """Tokens of the longest segment whose keys and values are held whole on the chip.

    In float32 products run on the ordinary arithmetic units, on operands in registers, and leave less room.
    """
    if qkv.dtype == torch.float32:
        return 32
    return 128 if qkv.shape[-1] <= 64 else 64


@torch.library.custom_op("xkd_kernels::packed_attention", mutates_args=())
@on_own_device
def packed_attention_forward(qkv: Tensor, counts: list[int], lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Mixed values [M, h·d] and, where segments are streamed, each row's log2 of its sum of exponentials [h, M] float32."""
    qkv, (rows, _, heads, width) = in_place(qkv), qkv.shape
    out = qkv.new_empty(rows, heads * width)
    log_sums = _log_sums(qkv, lengths)
    for table in _tables(qkv, counts, lengths):
        launch = launch_of("packed_attention_forward", qkv, f"{table.block}x{width}")
        tiles = triton.cdiv(table.longest, launch.meta["Q_BLOCK"])
        _packed_attention_forward_kernel[(len(table.places) * tiles, heads)](
            qkv, out, log_sums, table.places, width**-0.5 * LOG2_E, rows, tiles, *qkv.stride()[:3],
            **width_constants(qkv), KEEPS_SUMS=log_sums.numel() > 0, **launch.options,
        )  # fmt: skip
    return out, log_sums


@packed_attention_forward.register_fake
def _(qkv: Tensor, counts: list[int], lengths: list[int]) -> tuple[Tensor, Tensor]:
    rows, _, heads, width = qkv.shape
    return qkv.new_empty(rows, heads * width), _log_sums(qkv, lengths)


def _log_sums(qkv: Tensor, lengths: list[int]) -> Tensor:
    rows = qkv.shape[0] if max(lengths) > longest_whole(qkv) else 0
    return torch.empty(qkv.shape[2], rows, dtype=torch.float32, device=qkv.device)


@torch.library.custom_op("xkd_kernels::packed_attention_backward", mutates_args=())
@on_own_device
def packed_attention_backward(
    gradient: Tensor, qkv: Tensor, out: Tensor, log_sums: Tensor, counts: list[int], lengths: list[int]
) -> Tensor:
    """The gradient [M, 3, h, d] of qkv, from the one of the mixed values; ``out`` matters where segments are streamed."""
    qkv, gradient, out = in_place(qkv), gradient.contiguous(), out.contiguous()
    rows, _, heads, width = qkv.shape
    scale, limit = width**-0.5, longest_whole(qkv)
    to_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    for table in _tables(qkv, counts, lengths):
        if table.longest <= limit:
            launch = launch_of("packed_attention_whole_backward", qkv, f"{table.block}x{width}")
            _packed_attention_whole_backward_kernel[(len(table.places), heads)](
                qkv, gradient, to_qkv, table.places, scale, scale * LOG2_E, *qkv.stride()[:3],
                **width_constants(qkv), BLOCK=table.block, **launch.options,
            )  # fmt: skip
        else:
            launch = launch_of("packed_attention_streamed_backward", qkv, f"{table.block}x{width}")
            tiles = triton.cdiv(table.longest, launch.meta["BLOCK"])
            _packed_attention_streamed_backward_kernel[(len(table.places) * tiles, heads)](
                qkv, out, log_sums, gradient, to_qkv, table.places, scale, scale * LOG2_E, rows, tiles, *qkv.stride()[:3],
                **width_constants(qkv), **launch.options,
            )  # fmt: skip
    return to_qkv


@packed_attention_backward.register_fake
def _(gradient: Tensor, qkv: Tensor, out: Tensor, log_sums: Tensor, counts: list[int], lengths: list[int]) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _keep(ctx: Any, inputs: tuple[Tensor, list[int], list[int]], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.counts, ctx.lengths = inputs
    out, log_sums = output
    ctx.save_for_backward(qkv, out if log_sums.numel() else out.new_empty(0), log_sums)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None]:
    if gradient is None:
        return None, None, None
    return packed_attention_backward(gradient, *ctx.saved_tensors, ctx.counts, ctx.lengths), None, None


packed_attention_forward.register_autograd(_differentiate, setup_context=_keep)


def in_place(qkv: Tensor) -> Tensor:
    """``qkv`` as the kernels read it: any strides but for the last, which is 1."""
    return qkv if qkv.stride(-1) == 1 else qkv.contiguous()


def width_constants(qkv: Tensor) -> dict[str, Any]:
    """What every attention kernel is compiled for. A tile's width is a power of two, and a product's at least 16."""
    width = qkv.shape[-1]
    exact = "ieee" if qkv.dtype == torch.float32 else None  # never TF32
    return {"WIDTH": width, "WIDTH_BLOCK": max(16, triton.next_power_of_2(width)), "PRECISION": exact}


def _tables(qkv: Tensor, counts: list[int], lengths: list[int]) -> tuple[SegmentTable, ...]:
    return segment_tables(tuple(counts), tuple(lengths), qkv.device, longest_whole(qkv))


# -------------------------------------------------------------------------------------------------------------------- kernels
#
# A program is one head (axis 1) of one tile of one segment (axis 0). Row numbers are multiplied by strides in 64 bits.


@triton.jit
def load_rows(matrix, rows, inside, stride, channels, WIDTH: tl.constexpr):
    """Rows [n, width] of a matrix; zero where not ``inside`` and beyond the width."""
    places = matrix + rows[:, None] * stride + channels[None, :]
    return tl.load(places, mask=inside[:, None] & (channels < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(matrix, rows, inside, stride, channels, values, WIDTH: tl.constexpr):
    """Write rows [n, width] where ``inside``."""
    places = matrix + rows[:, None] * stride + channels[None, :]
    tl.store(places, values.to(matrix.dtype.element_ty), mask=inside[:, None] & (channels < WIDTH)[None, :])


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a · b, summed in float32. The interpreter multiplies bfloat16 as if it were whole numbers, hence the cast there."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _packed_attention_forward_kernel(
    qkv, out, log_sums, places, scale_log2, rows, tiles, stride_token, stride_part, stride_head,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, PRECISION: tl.constexpr, KEEPS_SUMS: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    segment, first_query = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * Q_BLOCK
    head = tl.program_id(1)
    start, length = tl.load(places + 2 * segment).to(tl.int64), tl.load(places + 2 * segment + 1)
    if first_query < length:
        channels = tl.arange(0, WIDTH_BLOCK)
        queries = first_query + tl.arange(0, Q_BLOCK)
        q_part = qkv + head.to(tl.int64) * stride_head
        k_part = q_part + stride_part
        v_part = k_part + stride_part  # twice the stride may not fit 32 bits
        q = load_rows(q_part, start + queries, queries < length, stride_token, channels, WIDTH)

        highest = tl.full([Q_BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([Q_BLOCK], tl.float32)
        mixed = tl.zeros([Q_BLOCK, WIDTH_BLOCK], tl.float32)
        for first_key in range(0, length, K_BLOCK):
            keys = first_key + tl.arange(0, K_BLOCK)
            k = load_rows(k_part, start + keys, keys < length, stride_token, channels, WIDTH)
            v = load_rows(v_part, start + keys, keys < length, stride_token, channels, WIDTH)
            scores = product(q, tl.trans(k), PRECISION) * scale_log2
            scores = tl.where((keys < length)[None, :], scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, axis=1))
            exponentials = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(highest - higher)
            total = total * shrink + tl.sum(exponentials, axis=1)
            mixed = mixed * shrink[:, None] + product(exponentials.to(v.dtype), v, PRECISION)
            highest = higher
        mixed = mixed / total[:, None]
        inside = queries < length
        row_width = tl.num_programs(1) * WIDTH
        store_rows(out + head * WIDTH, start + queries, inside, row_width, channels, mixed, WIDTH)
        if KEEPS_SUMS:
            tl.store(log_sums + head.to(tl.int64) * rows + start + queries, highest + tl.log2(total), mask=inside)


@triton.jit
def _packed_attention_whole_backward_kernel(
    qkv, gradient, to_qkv, places, scale, scale_log2, stride_token, stride_part, stride_head,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """All keys and values of a segment at once, its queries STEP at a time: each row of probabilities is made only once."""
    segment, head = tl.program_id(0), tl.program_id(1)
    start, length = tl.load(places + 2 * segment).to(tl.int64), tl.load(places + 2 * segment + 1)
    channels, keys = tl.arange(0, WIDTH_BLOCK), tl.arange(0, BLOCK)
    inside, key_rows = keys < length, start + keys
    q_part = qkv + head.to(tl.int64) * stride_head
    row_width = tl.num_programs(1) * WIDTH
    q_grad = to_qkv + head * WIDTH
    part, token = row_width, 3 * row_width  # strides of the packed gradient
    k_part = q_part + stride_part
    k = load_rows(k_part, key_rows, inside, stride_token, channels, WIDTH)
    v = load_rows(k_part + stride_part, key_rows, inside, stride_token, channels, WIDTH)
    to_k = tl.zeros([BLOCK, WIDTH_BLOCK], tl.float32)
    to_v = tl.zeros([BLOCK, WIDTH_BLOCK], tl.float32)
    for first_query in range(0, length, STEP):
        queries = first_query + tl.arange(0, STEP)
        asked, query_rows = queries < length, start + queries
        q = load_rows(q_part, query_rows, asked, stride_token, channels, WIDTH)
        to_mixed = load_rows(gradient + head * WIDTH, query_rows, asked, row_width, channels, WIDTH)
        scores = product(q, tl.trans(k), PRECISION) * scale_log2
        scores = tl.where(inside[None, :], scores, float("-inf"))
        probabilities = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
        probabilities = probabilities / tl.sum(probabilities, axis=1)[:, None]
        to_v += product(tl.trans(probabilities.to(v.dtype)), to_mixed, PRECISION)
        to_probabilities = product(to_mixed, tl.trans(v), PRECISION)
        shift = tl.sum(probabilities * to_probabilities, axis=1)
        to_scores = (probabilities * (to_probabilities - shift[:, None])).to(q.dtype)
        to_k += product(tl.trans(to_scores), q, PRECISION)
        to_q = product(to_scores, k, PRECISION) * scale
        store_rows(q_grad, query_rows, asked, token, channels, to_q, WIDTH)
    store_rows(q_grad + part, key_rows, inside, token, channels, to_k * scale, WIDTH)
    store_rows(q_grad + 2 * part, key_rows, inside, token, channels, to_v, WIDTH)


@triton.jit
def _packed_attention_streamed_backward_kernel(
    qkv, out, log_sums, gradient, to_qkv, places, scale, scale_log2, rows, tiles, stride_token, stride_part, stride_head,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK tokens: first its keys' and values' gradients, over all queries, then its queries', over all keys."""
    segment, first = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BLOCK
    head = tl.program_id(1)
    start, length = tl.load(places + 2 * segment).to(tl.int64), tl.load(places + 2 * segment + 1)
    if first < length:
        channels, tokens = tl.arange(0, WIDTH_BLOCK), first + tl.arange(0, BLOCK)
        inside, own_rows = tokens < length, start + tokens
        q_part = qkv + head.to(tl.int64) * stride_head
        k_part = q_part + stride_part
        v_part = k_part + stride_part  # twice the stride may not fit 32 bits
        row_width = tl.num_programs(1) * WIDTH
        out += head * WIDTH
        gradient += head * WIDTH
        log_sums += head.to(tl.int64) * rows
        q_grad = to_qkv + head * WIDTH
        part, token = row_width, 3 * row_width  # strides of the packed gradient

        k = load_rows(k_part, own_rows, inside, stride_token, channels, WIDTH)
        v = load_rows(v_part, own_rows, inside, stride_token, channels, WIDTH)
        to_k = tl.zeros([BLOCK, WIDTH_BLOCK], tl.float32)
        to_v = tl.zeros([BLOCK, WIDTH_BLOCK], tl.float32)
        for first_query in range(0, length, STEP):
            queries = first_query + tl.arange(0, STEP)
            asked, query_rows = queries < length, start + queries
            query = load_rows(q_part, query_rows, asked, stride_token, channels, WIDTH)
            to_result = load_rows(gradient, query_rows, asked, row_width, channels, WIDTH)
            result = load_rows(out, query_rows, asked, row_width, channels, WIDTH)
            correction = tl.sum(result.to(tl.float32) * to_result.to(tl.float32), axis=1)
            log_total = tl.load(log_sums + query_rows, mask=asked, other=0.0)
            scores = product(k, tl.trans(query), PRECISION) * scale_log2  # transposed: [BLOCK, STEP]
            probabilities = tl.where(inside[:, None] & asked[None, :], tl.exp2(scores - log_total[None, :]), 0.0)
            to_v += product(probabilities.to(v.dtype), to_result, PRECISION)
            to_probabilities = product(v, tl.trans(to_result), PRECISION)
            to_scores = probabilities * (to_probabilities - correction[None, :])
            to_k += product(to_scores.to(query.dtype), query, PRECISION)
        store_rows(q_grad + part, own_rows, inside, token, channels, to_k * scale, WIDTH)
        store_rows(q_grad + 2 * part, own_rows, inside, token, channels, to_v, WIDTH)

        q = load_rows(q_part, own_rows, inside, stride_token, channels, WIDTH)
        to_mixed = load_rows(gradient, own_rows, inside, row_width, channels, WIDTH)
        mixed = load_rows(out, own_rows, inside, row_width, channels, WIDTH)
        shift = tl.sum(mixed.to(tl.float32) * to_mixed.to(tl.float32), axis=1)
        log_sum = tl.load(log_sums + own_rows, mask=inside, other=0.0)
        to_q = tl.zeros([BLOCK, WIDTH_BLOCK], tl.float32)
        for first_key in range(0, length, STEP):
            keys = first_key + tl.arange(0, STEP)
            seen, key_rows = keys < length, start + keys
            key = load_rows(k_part, key_rows, seen, stride_token, channels, WIDTH)
            value = load_rows(v_part, key_rows, seen, stride_token, channels, WIDTH)
            scores = product(q, tl.trans(key), PRECISION) * scale_log2
            probabilities = tl.where(inside[:, None] & seen[None, :], tl.exp2(scores - log_sum[:, None]), 0.0)
            to_probabilities = product(to_mixed, tl.trans(value), PRECISION)
            to_scores = probabilities * (to_probabilities - shift[:, None])
            to_q += product(to_scores.to(key.dtype), key, PRECISION)
        store_rows(q_grad, own_rows, inside, token, channels, to_q * scale, WIDTH)
