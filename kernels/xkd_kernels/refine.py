"""A teacher's patch tokens, weighted by how both modalities' teachers look at their patches, and pooled, in one pass.

    w_i = mean over heads of own[h, i] · mean_j(other[h, j]) / mean_i(own[h, i])     "mean"
    w_i = mean over heads of softmax_i(own[h, i] · mean_j(other[h, j]))              "softmax"
    pooled = s · mean_i(w_i f_i),   s = √(‖mean_i f_i‖² / ‖mean_i w_i f_i‖²)         so that the plain mean's energy is kept

The mean over the other's patches of the outer product of both looks is own · mean(other): no matrix is formed. Tokens are read
once. For teachers: the kernel has no gradient. Legend: B clips, N own and M other patches, h heads, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xkd_kernels.backends import backend_of
from xkd_kernels.checks import kernel_type, require_floats, require_no_tangent, require_one_device, whole_number
from xkd_kernels.configurations import launch_of, on_own_device

MODES = ("mean", "softmax")


def naive_refine(tokens: Tensor, own: Tensor, other: Tensor, mode: str = "mean") -> tuple[Tensor, Tensor]:
    """The definition, with the outer product of both looks and the weighted tokens; in float32, or wider where the input is."""
    tokens, own, other = _wide(tokens), _wide(own), _wide(other)
    averaged = (own.unsqueeze(3) * other.unsqueeze(2)).mean(dim=3)  # of [B, h, N, M]
    by_head = averaged.softmax(dim=-1) if mode == "softmax" else averaged / own.mean(dim=-1, keepdim=True)
    weights = by_head.mean(dim=1)
    plain, weighted = tokens.mean(dim=1), (weights.unsqueeze(-1) * tokens).mean(dim=1)
    energies = (x.square().sum(dim=-1, keepdim=True) for x in (plain, weighted))
    return (next(energies) / next(energies)).sqrt() * weighted, weights


def refine(tokens: Tensor, own: Tensor, other: Tensor, mode: str = "mean", *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Mean of re-weighted tokens with the energy of their plain mean, and the weights.

    Args:
        tokens: [B, N, D] patch tokens; any strides, read in place where the last is 1, such as a slice without CLS.
        own: [B, h, N] how much each head looks at each patch, of any strides.
        other: [B, h, M] the same of the other modality.
        mode: "mean" or "softmax", how looks become weights.
        backend: see :mod:`xkd_kernels.backends`. Where a gradient is wanted "auto" is "torch": the kernel has none.

    Returns:
        Pooled tokens [B, D] and weights [B, N], float32; float64 where the inputs are.

    Raises:
        ValueError: an unknown mode; shapes, types or devices that do not fit.
        NotImplementedError: a gradient is wanted of "triton".
        BackendError: a backend that cannot run here.
    """
    if mode not in MODES:
        raise ValueError(f"mode = {mode!r} is not one of {', '.join(MODES)}")
    fits = tokens.ndim == own.ndim == other.ndim == 3 and min(*tokens.shape, *own.shape, *other.shape) > 0
    if not fits or own.shape != (len(tokens), own.shape[1], tokens.shape[1]) or other.shape[:2] != own.shape[:2]:
        shapes = ", ".join(str(list(x.shape)) for x in (tokens, own, other))
        raise ValueError(f"tokens, own, other have the shapes {shapes}, but [B, N, D], [B, h, N] and [B, h, M] are wanted")
    require_floats(tokens=tokens, own=own, other=other)
    require_one_device(tokens=tokens, own=own, other=other)
    is_differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (tokens, own, other))
    if is_differentiated and backend == "auto":
        backend = "torch"
    if (
        backend_of("refine", tokens.device, kernel_type(tokens, own, other), str(whole_number(tokens.shape[-1])), backend)
        == "torch"
    ):
        with torch.autocast(tokens.device.type, enabled=False):  # in float32
            return _by_operators(tokens, own, other, mode)
    require_no_tangent(tokens, own, other)
    if is_differentiated:
        raise NotImplementedError("refine's kernel has no gradient: call it under torch.no_grad(), or take backend='torch'")
    return refine_forward(tokens, own, other, mode)


def _by_operators(tokens: Tensor, own: Tensor, other: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    tokens, own, other = _wide(tokens), _wide(own), _wide(other)
    averaged = own * other.mean(dim=-1, keepdim=True)
    by_head = averaged.softmax(dim=-1) if mode == "softmax" else averaged / own.mean(dim=-1, keepdim=True)
    weights = by_head.mean(dim=1)
    plain = tokens.mean(dim=1)
    weighted = (weights.to(tokens.dtype).unsqueeze(1) @ tokens).squeeze(1) / tokens.shape[1]
    energy = plain.square().sum(dim=-1, keepdim=True) / weighted.square().sum(dim=-1, keepdim=True)
    return energy.sqrt() * weighted, weights


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------------------------------------------------------------------------------- operator


@torch.library.custom_op("xkd_kernels::refine", mutates_args=())
@on_own_device
def refine_forward(tokens: Tensor, own: Tensor, other: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Pooled tokens [B, D] and weights [B, N], float32."""
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    batch, patches, width = tokens.shape
    heads = own.shape[1]
    pooled, weights = _empty_results(tokens)
    launch = launch_of("refine_forward", tokens, str(width))
    _refine_forward_kernel[(batch,)](
        tokens, own, other, pooled, weights, patches, other.shape[2], *tokens.stride()[:2], *own.stride(), *other.stride(),
        WIDTH=width, WIDTH_BLOCK=triton.next_power_of_2(width), HEADS=heads, HEADS_BLOCK=triton.next_power_of_2(heads),
        SOFTMAX=mode == "softmax", **launch.options,
    )  # fmt: skip
    return pooled, weights


@refine_forward.register_fake
def _(tokens: Tensor, own: Tensor, other: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    return _empty_results(tokens)


def _empty_results(tokens: Tensor) -> tuple[Tensor, Tensor]:
    batch, patches, width = tokens.shape
    pooled, weights = (torch.empty(batch, n, dtype=torch.float32, device=tokens.device) for n in (width, patches))
    return pooled, weights


# --------------------------------------------------------------------------------------------------------------------- kernel


@triton.jit
def _mean_looks(looks, heads, patches, stride_head, stride_patch, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr,
                COLUMNS: tl.constexpr):  # fmt: skip
    """The mean over patches of each head's looks, [HEADS_BLOCK]."""
    total = tl.zeros([HEADS_BLOCK, COLUMNS], tl.float32)
    for first in range(0, patches, COLUMNS):
        total += _load_looks(looks, heads, first + tl.arange(0, COLUMNS), patches, stride_head, stride_patch, HEADS)
    return tl.sum(total, axis=1) / patches


@triton.jit
def _load_looks(looks, heads, own, patches, stride_head, stride_patch, HEADS: tl.constexpr):
    """How much ``heads`` look at the patches ``own``, [heads, own] float32; 0 of what is none."""
    places = heads.to(tl.int64)[:, None] * stride_head + own.to(tl.int64)[None, :] * stride_patch
    return tl.load(looks + places, mask=(heads < HEADS)[:, None] & (own < patches)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _refine_forward_kernel(
    tokens, own, other, pooled, weights, patches, others, stride_clip, stride_token,
    own_clip, own_head, own_patch, other_clip, other_head, other_patch,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, SOFTMAX: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program is a clip: its looks first, which are few, then its tokens, of which both sums stay in registers."""
    clip = tl.program_id(0).to(tl.int64)
    tokens += clip * stride_clip
    own += clip * own_clip
    heads = tl.arange(0, HEADS_BLOCK)
    attended = _mean_looks(other + clip * other_clip, heads, others, other_head, other_patch, HEADS, HEADS_BLOCK, COLUMNS)
    if SOFTMAX:
        highest = tl.full([HEADS_BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([HEADS_BLOCK], tl.float32)
        for first in range(0, patches, COLUMNS):
            places = first + tl.arange(0, COLUMNS)
            scores = _load_looks(own, heads, places, patches, own_head, own_patch, HEADS) * attended[:, None]
            scores = tl.where((places < patches)[None, :], scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, axis=1))
            total = total * tl.exp(highest - higher) + tl.sum(tl.exp(scores - higher[:, None]), axis=1)
            highest = higher
        share = 1 / (total * HEADS)
    else:
        highest = attended
        mean = _mean_looks(own, heads, patches, own_head, own_patch, HEADS, HEADS_BLOCK, COLUMNS)
        share = attended / (tl.where(heads < HEADS, mean, 1.0) * HEADS)
    share = tl.where(heads < HEADS, share, 0.0)

    channels = tl.arange(0, WIDTH_BLOCK)
    plain = tl.zeros([TOKENS, WIDTH_BLOCK], tl.float32)
    weighted = tl.zeros([TOKENS, WIDTH_BLOCK], tl.float32)
    for first in tl.range(0, patches, TOKENS, num_stages=STAGES):
        places = first + tl.arange(0, TOKENS)
        inside = (places < patches)[:, None] & (channels < WIDTH)[None, :]
        rows = places.to(tl.int64)[:, None] * stride_token + channels[None, :]
        f = tl.load(tokens + rows, mask=inside, other=0.0).to(tl.float32)
        looks = _load_looks(own, heads, places, patches, own_head, own_patch, HEADS)
        if SOFTMAX:
            looks = tl.exp(looks * attended[:, None] - highest[:, None])
        w = tl.sum(looks * share[:, None], axis=0)
        tl.store(weights + clip * patches + places, w, mask=places < patches)
        plain += f
        weighted += w[:, None] * f
    mean = tl.sum(plain, axis=0) / patches
    refined = tl.sum(weighted, axis=0)  # as long as it likes: the scale sets its length
    scale = tl.sqrt(tl.sum(mean * mean, axis=0) / tl.sum(refined * refined, axis=0))
    tl.store(pooled + clip * WIDTH + channels, scale * refined, mask=channels < WIDTH)
