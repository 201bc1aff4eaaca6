"""Floating-point operations of a training step, from the model's options alone, part by part.

Counted are matrix products, attention's included, two operations for each multiplication with its addition: what
``torch.utils.flop_counter`` counts, and what utilisation is measured against. :func:`flop_counter` is that counter, with the
CPU's fused attention, which it leaves out by itself. Left out here are the products by which a GPU that lacks our kernel pulls
MMD's rows apart: at 128 clips less than a hundredth of a per cent of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import xkd_kernels  # noqa: F401, its operators are looked up below
from xkd_fast.model.options import AudioOptions, ModelOptions, VideoOptions

PARTS = ("teachers", "students", "decoders", "heads")
EAGER_BACKWARD = 2.0  # products of attention's backward pass over those of its forward pass: probabilities kept
FUSED_BACKWARD = 2.5  # scores computed again


@dataclass(frozen=True)
class Flops:
    """Operations per clip."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Of both passes."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)


NOTHING = Flops(0, 0)


def _cpu_attention(q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _cpu_attention_backward(gradient: Any, q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, q, k, v))


def _packed_attention(qkv: Any, counts: list[int], lengths: list[int], *rest: Any, **named: Any) -> int:
    _, _, heads, width = qkv
    return 4 * heads * width * sum(count * length**2 for count, length in zip(counts, lengths, strict=True))


def _packed_attention_backward(
    gradient: Any, qkv: Any, out: Any, sums: Any, counts: list[int], lengths: list[int], *rest: Any, **named: Any
) -> int:
    """As of fused attention: scores once more; what streamed tiles make again in addition is no work of the model's."""
    return round(FUSED_BACKWARD * _packed_attention(qkv, counts, lengths))


def _cls_attention(qkv: Any, *rest: Any, **named: Any) -> int:
    rows, _, heads, width = qkv
    return int(2 * rows * heads * width)


OWN: dict[Any, Callable[..., int]] = {  # our kernels, likewise
    torch.ops.xkd_kernels.packed_attention: _packed_attention,
    torch.ops.xkd_kernels.packed_attention_backward: _packed_attention_backward,
    torch.ops.xkd_kernels.cls_attention: _cls_attention,
}
CPU_ATTENTION: dict[Any, Callable[..., int]] = {  # by the shapes of arguments and result
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


def flop_counter() -> FlopCounterMode:
    """A counter of what runs inside it."""
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION | OWN)


def linear(rows: int, inputs: int, outputs: int, *, first: bool = False) -> Flops:
    """A linear layer; the ``first`` one of a network has no gradient to its input."""
    product = 2 * rows * inputs * outputs
    return Flops(product, product if first else 2 * product)


def attention(queries: int, keys: int, width: int, backward: float) -> Flops:
    """Scores and their product with the values, all heads together."""
    forward = 4 * queries * keys * width
    return Flops(forward, round(backward * forward))


def block(queries: int, keys: int, width: int, hidden: int, backward: float) -> Flops:
    """A transformer block over ``keys`` tokens of which the last ``queries`` are wanted."""
    mixing = linear(keys, width, 3 * width) + attention(queries, keys, width, backward) + linear(queries, width, width)
    return mixing + linear(queries, width, hidden) + linear(queries, hidden, width)


def stack(depth: int, tokens: int, width: int, hidden: int, backward: float) -> Flops:
    """``depth`` blocks over one sequence."""
    one = block(tokens, tokens, width, hidden, backward)
    return Flops(depth * one.forward, depth * one.backward)


def head(rows: int, options: ModelOptions) -> Flops:
    """The projection head."""
    sizes = (options.encoder.width, options.head.hidden, options.head.hidden, options.head.bottleneck, options.head.prototypes)
    layers = (linear(rows, inputs, outputs) for inputs, outputs in pairwise(sizes))
    return sum(layers, NOTHING)


def step_flops(options: ModelOptions) -> dict[str, Flops]:
    """Operations per clip of every part of a model's step, for the implementation that ``options`` name.

    Without activation checkpointing, whose second forward pass is no work of the model's. Prototypes are taken to train.
    Attention ``auto`` is taken for fused, which it is but for short sequences in bfloat16 on a CPU: 0.3 % less of a base model.
    """
    is_fast = options.implementation == "fast"
    backward = FUSED_BACKWARD if is_fast and options.attention != "eager" else EAGER_BACKWARD
    width, depth, cls = options.encoder.width, options.encoder.depth, int(options.cls_token)
    hidden = int(width * options.mlp_ratio)
    parts = dict.fromkeys(PARTS, NOTHING)
    clips: tuple[VideoOptions | AudioOptions, ...] = (options.video, options.audio)
    for clip in clips:
        local, numbers, keep = math.prod(clip.local_grid), clip.patch_numbers, clip.keep
        embedded = (keep if is_fast else clip.tokens) + clip.local_views * local
        students = linear(embedded, numbers, width, first=True)
        for tokens in (keep, *[local] * clip.local_views):
            students += stack(depth, cls + tokens, width, hidden, backward)
        parts["students"] += students
        parts["decoders"] += decoder(options, clip, backward)
        parts["heads"] += head(1 + clip.local_views, options)
        parts["teachers"] += teacher(options, local if options.teacher_view == "local" else clip.tokens, numbers)
    return parts


def decoder(options: ModelOptions, clip: VideoOptions | AudioOptions, backward: float) -> Flops:
    """A modality's decoder; the fast one's last block and projection see masked tokens alone."""
    is_fast, cls = options.implementation == "fast", int(options.cls_token)
    width, depth = options.decoder.width, options.decoder.depth
    hidden, tokens = int(width * options.mlp_ratio), cls + clip.tokens
    wanted = clip.tokens - clip.keep
    whole = stack(depth - 1, tokens, width, hidden, backward)
    whole += block(wanted if is_fast else tokens, tokens, width, hidden, backward)
    if width != options.encoder.width:
        whole += linear(cls + clip.keep, options.encoder.width, width)
    if width != clip.patch_numbers:
        whole += linear(wanted if is_fast else clip.tokens, width, clip.patch_numbers)
    return whole


def teacher(options: ModelOptions, tokens: int, numbers: int) -> Flops:
    """A modality's teacher: no backward pass."""
    width, depth, length = options.encoder.width, options.encoder.depth, int(options.cls_token) + tokens
    forward = linear(tokens, numbers, width).forward
    forward += stack(depth, length, width, int(width * options.mlp_ratio), 0).forward + head(1, options).forward
    if options.implementation == "fast":
        queries = 1 if options.cls_token else length
        forward += 2 * queries * length * width  # the last block's probabilities of the patches
        forward += 2 * tokens * width  # the refined mean
    return Flops(forward, 0)


def savings(options: ModelOptions) -> dict[str, int]:
    """Operations per clip that the fast model leaves out, by reason; what it does in addition is negative.

    Together they are the difference between both implementations' steps.
    """
    plain, fast = (replace(options, implementation=name) for name in ("reference", "fast"))
    keeping = replace(fast, attention="eager")
    width, clips = options.encoder.width, (options.video, options.audio)
    steps = {name: step_flops(o) for name, o in (("plain", plain), ("fast", fast), ("keeping", keeping))}
    return {
        "masked patches are not embedded": sum(
            linear((clip.tokens - clip.keep), clip.patch_numbers, width, first=True).total for clip in clips
        ),
        "the decoders' last block and projection at visible positions": sum(
            (decoder(plain, clip, EAGER_BACKWARD).total - decoder(fast, clip, EAGER_BACKWARD).total) for clip in clips
        ),
        "scores computed again in the backward pass of fused attention": total(steps["keeping"]).total
        - total(steps["fast"]).total,
        "the teachers' probabilities and refined means as matrix products": steps["plain"]["teachers"].total
        - steps["fast"]["teachers"].total,
    }


def total(parts: dict[str, Flops]) -> Flops:
    """All parts together."""
    return sum(parts.values(), NOTHING)
