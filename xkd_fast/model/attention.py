"""Attention of packed sequences: one small interface, its backends, and the choice between them."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xkd_fast.errors import UserError
from xkd_fast.model.kernels import wants
from xkd_fast.model.options import AudioOptions, ModelOptions, VideoOptions
from xkd_fast.model.packing import Group, heads_of, joined, unpack
from xkd_fast.model.precision import as_written
from xkd_fast.model.products import matmul, multiplied_in
from xkd_kernels import cls_attention, obstacle, packed_attention
from xkd_kernels.backends import choose as choose_kernel
from xkd_kernels.backends import shape_class

# q: [B, h, n, d], k and v: [B, h, N, d] → [B, n, h·d]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# qkv as the linear layer wrote it: [M, 3·h·d], its groups of sequences, h → [M, h·d]
PackedAttend = Callable[[Tensor, Sequence[Group], int], Tensor]

SHORT = 640  # tokens up to which keeping the matrix of probabilities costs little
KEY_TILE = 32  # keys that PyTorch's attention on a CPU likes to see whole in bfloat16
QUERY_TILE = 64  # queries whose scores are held at once where CLS is off
HAS_MATRIX_UNIT = torch.cpu._is_amx_tile_supported()  # of this processor, for bfloat16: PyTorch's attention makes use of it
CACHED_TILE = 128  # queries whose scores of all heads stay in a processor's cache at the base model's lengths


@dataclass(frozen=True)
class Attention:
    """A backend, and why it was chosen.

    Attributes:
        attend: of sequences of one length, with as many queries as one likes.
        attend_packed: of packed sequences of several lengths, each to itself.
    """

    name: str
    reason: str
    attend: Attend
    attend_packed: PackedAttend


def group_by_group(attend: Attend) -> PackedAttend:
    """Packed attention by one call per group of sequences of equal length."""

    def attend_packed(qkv: Tensor, groups: Sequence[Group], heads: int) -> Tensor:
        return joined([attend(*heads_of(part, heads)).flatten(0, 1) for part in unpack(qkv, groups)])

    return attend_packed


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With the matrix of probabilities in memory."""
    return (_probabilities(_scaled(q), k).to(v.dtype) @ v).transpose(1, 2).flatten(2)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fused attention: flash or cuDNN on a GPU, tiled on the CPU."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _sdpa_of_whole_tiles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``sdpa`` with keys filled up to whole tiles and masked: at 141, 254, 393 or 785 tokens half the time on a Xeon.

    At other lengths it takes between 30 % less and 15 % more.
    """
    missing = -k.shape[2] % KEY_TILE
    mask = F.pad(q.new_zeros(1, 1, 1, k.shape[2]), (0, missing), value=-torch.inf).expand(-1, -1, q.shape[2], -1)
    k, v = F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def _tile_by_tile(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``eager`` for a tile of queries at a time, forward alone: no whole matrix, and 561 tokens in 0.7 of sdpa's time."""
    q, k, v = _scaled(q).contiguous(), k.contiguous(), v.contiguous()
    tiles = [_probabilities(tile, k) @ v for tile in q.split(CACHED_TILE, dim=2)]
    return torch.cat(tiles, dim=2).transpose(1, 2).flatten(2)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = _scaled(q).contiguous(), k.contiguous(), v.contiguous()  # products of strided heads would copy them again
        ctx.save_for_backward(q, k, v)
        with as_written(q.device):
            return (_probabilities(q, k) @ v).transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        with as_written(q.device):
            gradient = gradient.unflatten(-1, (q.shape[1], -1)).transpose(1, 2).contiguous()
            probabilities = _probabilities(q, k)
            to_probabilities = gradient @ v.transpose(-2, -1)
            to_scores = torch.ops.aten._softmax_backward_data(to_probabilities, probabilities, -1, q.dtype)
            to_v = probabilities.transpose(-2, -1) @ gradient
            return _scaled(to_scores @ k), to_scores.transpose(-2, -1) @ q, to_v


def _scaled(q: Tensor) -> Tensor:
    """Queries in place of their scores, of which there are more."""
    return q * q.shape[-1] ** -0.5


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(dim=-1)


def recompute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With the matrix of probabilities made twice, in the forward and in the backward pass, and never kept."""
    return _Recompute.apply(q, k, v)  # type: ignore[no-any-return]


class _Widened(torch.autograd.Function):
    """Keeps what enters it, of which the matrix of all projections has a copy already, and not what is made of it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        with as_written(q.device):
            return sdpa(q.float(), k.float(), v.float()).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        wide = [each.float().requires_grad_() for each in ctx.saved_tensors]
        with as_written(gradient.device), torch.enable_grad():
            gradients = torch.autograd.grad(sdpa(*wide), wide, gradient.float())
        return tuple(each.to(gradient.dtype) for each in gradients)


def widened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``sdpa`` in float32 of numbers in bfloat16, computed again in the backward pass."""
    if torch.compiler.is_compiling():
        with as_written(q.device):
            return sdpa(q.float(), k.float(), v.float()).to(q.dtype)
    return _Widened.apply(q, k, v)  # type: ignore[no-any-return]


PLAIN: dict[str, Attend] = {"sdpa": sdpa, "recompute": recompute, "eager": eager}


def automatic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``sdpa``; in bfloat16 on a CPU, to be differentiated, ``eager`` if short and ``recompute`` if not, else in tiles.

    A base model's attention, forward and backward of 2 clips on two cores (benchmarks/results/attention_*.json): in bfloat16
    sdpa takes twice the time of eager, whose products run on the matrix unit of a Xeon; in float32 about half. Eager keeps
    every matrix, 12 MB a clip in the students and 45 MB in the decoders, elsewhere far more; recompute lies between. The
    teachers' forward pass takes half the time in sdpa where there is a matrix unit, in bfloat16 at most lengths only of whole
    tiles; where there is none, products of a tile of queries at a time are faster. A processor that multiplies bfloat16 in
    float32 (``products``) takes sdpa in float32.
    """
    if multiplied_in(q.dtype, q.device) != q.dtype:
        return widened(q, k, v)
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return sdpa(q, k, v)
    if not q.requires_grad:
        return (_sdpa_of_whole_tiles if HAS_MATRIX_UNIT else _tile_by_tile)(q, k, v)
    return eager(q, k, v) if k.shape[2] <= SHORT else recompute(q, k, v)


def block_diagonal(operators: Any) -> tuple[Attend, PackedAttend]:
    """xformers' attention, given its ``xformers.ops``: packed sequences in one call, under a block-diagonal mask."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        arguments = (x.transpose(1, 2) for x in (q, k, v))
        return operators.memory_efficient_attention(*arguments).flatten(2)  # type: ignore[no-any-return]

    @cache
    def mask(groups: tuple[Group, ...], device: torch.device) -> Any:
        lengths = [group.length for group in groups for _ in range(group.sequences)]
        return operators.fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=device)

    def attend_packed(qkv: Tensor, groups: Sequence[Group], heads: int) -> Tensor:
        q, k, v = qkv.view(1, len(qkv), 3, heads, -1).unbind(dim=2)
        mixed = operators.memory_efficient_attention(q, k, v, attn_bias=mask(tuple(groups), qkv.device))
        return mixed.flatten(2).squeeze(0)  # type: ignore[no-any-return]

    return attend, attend_packed


def _xformers() -> tuple[Attend, PackedAttend]:
    """xformers' attention, tried once on the GPU it shall run on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operators = importlib.import_module("xformers.ops")
    if not torch.cuda.is_available():
        raise RuntimeError("it has no operator for the CPU")
    attend, attend_packed = block_diagonal(operators)
    x = torch.zeros(16, 3 * 64, device="cuda", dtype=torch.bfloat16)
    attend_packed(x, [Group(2, 5), Group(1, 6)], 1)
    return attend, attend_packed


def by_our_kernel(qkv: Tensor, groups: Sequence[Group], heads: int) -> Tensor:
    """Packed attention by ``xkd_kernels``, which reads the projection's output in place and takes all groups in one call."""
    return packed_attention(qkv.view(len(qkv), 3, heads, -1), _segments(groups), backend="triton")


def _segments(groups: Sequence[Group]) -> list[tuple[int, int]]:
    return [(group.sequences, group.length) for group in groups]


def _shape(groups: Sequence[Group], width: int) -> str:
    return f"{shape_class(max(group.length for group in groups))}x{width}"


_automatic_by_group = group_by_group(automatic)


def automatic_packed(qkv: Tensor, groups: Sequence[Group], heads: int) -> Tensor:
    """Our kernel where it was measured to be the fastest on this device at this shape, otherwise :func:`automatic`."""
    if wants("packed_attention", "auto", qkv, _shape(groups, qkv.shape[-1] // (3 * heads))):
        return by_our_kernel(qkv, groups, heads)
    return _automatic_by_group(qkv, groups, heads)


def _triton() -> Attention:
    """Our own kernels; sdpa where there are fewer queries than keys."""
    reason = obstacle(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16)
    if reason:
        raise UserError(f"model.attention = triton cannot run here: {reason}; use sdpa or auto")
    return Attention("triton", "asked for", sdpa, by_our_kernel)


def choose(name: str) -> Attention:
    """The backend ``name``; ``auto`` takes :func:`automatic_packed`.

    Raises:
        UserError: a backend that is unknown, or that cannot run here; says why, and what can.
    """
    if name == "auto":
        reason = (
            "but for bfloat16 on a CPU, where eager (short sequences) and recompute are measured to be faster than it, "
            "and for the GPUs and lengths where our kernel is"
        )
        return Attention("sdpa", reason, automatic, automatic_packed)
    if name in PLAIN:
        return Attention(name, "asked for", PLAIN[name], group_by_group(PLAIN[name]))
    if name == "triton":
        return _triton()
    if name == "xformers":
        try:
            return Attention(name, "asked for", *_xformers())
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"model.attention = xformers cannot run here ({type(error).__name__}: {reason}); use sdpa or auto"
            ) from error
    raise UserError(f"model.attention = {name} is not one of auto, {', '.join(PLAIN)}, triton, xformers")


def described(attention: Attention, options: ModelOptions, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Who computes attention on ``device`` with products in ``dtype``, and why: ``auto`` answers for each shape on a GPU."""
    if attention.attend_packed is not automatic_packed or device.type != "cuda":
        return [f"attention: {attention.name}, {attention.reason}"]
    answers: dict[str, list[str]] = {}
    for shape in _packed_shapes(options):
        choice = choose_kernel("packed_attention", device, dtype, shape)
        name = "triton" if choice.backend == "triton" else attention.name
        answers.setdefault(f"{name}, {choice.reason}", []).append(shape)
    return [f"attention: {answer}: {', '.join(shapes)}" for answer, shapes in answers.items()]


def _packed_shapes(options: ModelOptions) -> list[str]:
    """Shape classes of everything that the model attends in packed form: students, teachers, decoders."""
    clips: dict[str, VideoOptions | AudioOptions] = {"video": options.video, "audio": options.audio}
    first = int(options.cls_token)
    local = {name: math.prod(clip.local_grid) for name, clip in clips.items()}
    seen = {name: max(clip.keep, local[name] if clip.local_views else 0) for name, clip in clips.items()}
    whole = {name: clip.tokens for name, clip in clips.items()}
    taught = local if options.teacher_view == "local" else whole
    encoder, decoder = (part.width // part.heads for part in (options.encoder, options.decoder))
    found: dict[str, None] = {}
    for tokens, width, together in (
        (seen, encoder, options.variant in ("mas", "mats")),
        (taught, encoder, options.variant == "mats"),
        (whole if options.decoder.depth > 1 else {}, decoder, False),  # a decoder's last block asks for some tokens alone
    ):
        for longest in [max(tokens.values())] if together else tokens.values():
            found[f"{shape_class(first + longest)}x{width}"] = None
    return list(found)


def patch_probabilities(q: Tensor, k: Tensor, *, has_cls: bool) -> Tensor:
    """How much each head looks at each patch: the CLS row of the attention without its own column, [B, h, N].

    Without CLS the mean over all queries, taken in tiles, so that the N × N matrix never exists. q, k: [B, h, (1 +) N, d].
    Softmax in float32 or wider.
    """
    scale = q.shape[-1] ** -0.5
    transposed = k.transpose(-2, -1)
    dtype = q.dtype if q.dtype == torch.float64 else torch.float32
    if has_cls:
        return (matmul(q[:, :, :1], transposed) * scale).softmax(dim=-1, dtype=dtype)[:, :, 0, 1:]
    total = torch.zeros(*k.shape[:-1], dtype=dtype, device=k.device)
    for tile in q.split(QUERY_TILE, dim=2):
        total += (matmul(tile, transposed) * scale).softmax(dim=-1, dtype=dtype).sum(dim=2)
    return total / q.shape[2]


def packed_patch_probabilities(
    qkv: Tensor, groups: Sequence[Group], heads: int, kernels: str, *, has_cls: bool
) -> list[Tensor]:
    """:func:`patch_probabilities` of each group of a packed projection [M, 3·h·d]: [sequences, h, N] each.

    ``kernels``: who computes, as ``model.kernels`` says it; our kernel knows the CLS row only.
    """
    width = qkv.shape[-1] // (3 * heads)
    if has_cls and wants("cls_attention", kernels, qkv, _shape(groups, width)):
        looks = cls_attention(qkv.view(len(qkv), 3, heads, width), _segments(groups), backend="triton")
        parts = looks.split([group.rows for group in groups], dim=1)
        return [
            part.unflatten(1, (group.sequences, group.length)).transpose(0, 1)[:, :, 1:]
            for part, group in zip(parts, groups, strict=True)
        ]
    found = []
    for part in unpack(qkv, groups):
        q, k, _ = heads_of(part, heads)
        found.append(patch_probabilities(q, k, has_cls=has_cls))
    return found
