"""From raw clips to embedded tokens: only the patches that are looked at are ever copied, normalised and projected.

Legend: B clips, n tokens, D width, P numbers of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xkd_fast.data.views import MaskNoise, Views
from xkd_fast.model.options import AudioOptions, ModelOptions, VideoOptions
from xkd_fast.model.precision import product_dtype
from xkd_fast.model.products import through
from xkd_fast.reference import Encoder, interpolate_position, normalised_pixels, patchify
from xkd_kernels import gather_patches as kernel_gather
from xkd_kernels.gather_patches import gather_backend


def check_views(views: Views, masks: MaskNoise | None, options: ModelOptions) -> None:
    """Make sure that views and mask noise are those that the options describe, all of one batch.

    Raises:
        ValueError: naming the tensor, its shape, type or number, and what it should be.
    """
    clips: dict[str, VideoOptions | AudioOptions] = {"video": options.video, "audio": options.audio}
    batch = views.batch_size
    for name, clip in clips.items():
        whole, parts, may_be_bytes = getattr(views, f"{name}_global"), getattr(views, f"{name}_locals"), name == "video"
        _require_view(f"views.{name}_global", whole, (batch, *clip.shape), may_be_bytes=may_be_bytes)
        if len(parts) != clip.local_views:
            raise ValueError(f"views.{name}_locals holds {len(parts)} views, but the model's options say {clip.local_views}")
        for index, part in enumerate(parts):
            _require_view(f"views.{name}_locals[{index}]", part, (batch, *clip.local_shape), may_be_bytes=may_be_bytes)
        if masks is not None:
            _require_shape(f"masks.{name}", getattr(masks, name), (batch, clip.tokens))


def _require_view(name: str, view: Tensor, shape: tuple[int, ...], *, may_be_bytes: bool) -> None:
    if not (view.is_floating_point() or (may_be_bytes and view.dtype == torch.uint8)):
        wanted = "numbers in floating point" + (", or uint8 for grey levels," if may_be_bytes else "")
        raise ValueError(f"{name} is of {view.dtype}; {wanted} are wanted")
    _require_shape(name, view, shape)


def _require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        batch, *rest = shape
        raise ValueError(
            f"{name} has the shape {list(tensor.shape)}, but {list(shape)} is wanted: "
            f"{rest} by the model's options, {batch} as views.video_global has clips"
        )


def gather_patches(
    clip: Tensor, ids: Tensor, options: VideoOptions | AudioOptions, *, kernels: str, dtype: torch.dtype | None = None
) -> Tensor:
    """The patches ``ids`` of each clip, copied straight out of it; the other patches are never touched.

    Args:
        clip: video [B, C, T, H, W] or audio [B, 1, F, T], of any strides; a video of uint8 is normalised after the copy.
        ids: [B, n] token numbers in grid order.
        options: the patches' extent, and the pixels' mean and deviation.
        kernels: who computes, as ``model.kernels`` says it.
        dtype: of the result; None = that of the clip, float32 where it is uint8.

    Returns:
        [B, n, P], numbers in the order of ``reference.patchify``.
    """
    affine = options.affine(is_raw=clip.dtype == torch.uint8)
    return kernel_gather(clip, ids, options.patch, *affine, dtype=dtype or _own_dtype(clip), backend=kernels)


def all_patches(clip: Tensor, options: VideoOptions | AudioOptions, *, kernels: str, dtype: torch.dtype) -> Tensor:
    """Every patch of a clip, [B, N, P], as :func:`gather_patches` gives them."""
    if gather_backend(clip, options.patch, dtype, kernels) == "triton":
        count = math.prod(size // extent for size, extent in zip(clip.shape[2:], options.patch, strict=True))
        ids = torch.arange(count, device=clip.device).expand(len(clip), -1)
        return gather_patches(clip, ids, options, kernels="triton", dtype=dtype)
    patches = patchify(clip, options.patch)
    if isinstance(options, VideoOptions):
        patches = normalised_pixels(patches.unflatten(-1, (-1, clip.shape[1])), options, axis=-1).flatten(2)
    return patches.to(dtype)


def _own_dtype(clip: Tensor) -> torch.dtype:
    return torch.float32 if clip.dtype == torch.uint8 else clip.dtype


def resampled_position(table: Tensor, grid: Sequence[int], target: Sequence[int]) -> Tensor:
    """``reference.interpolate_position``, to the same numbers: [1, N, D] → [1, N', D].

    A GPU resamples the places of a picture side by side and its channels one after the other. Audio's table, whose mel axis
    stays as it is, is therefore one picture of a row per mel band and number of D, not a small one of D channels.
    """
    if tuple(grid) == tuple(target) or len(grid) != 2:
        return interpolate_position(table, grid, target)
    mel, time = grid
    rows = table.view(mel, time, -1).movedim(-1, 1).reshape(1, 1, -1, time)  # [1, 1, mel · D, T]
    scale = [1.0, (target[1] + 0.1) / time]
    resampled = F.interpolate(rows, scale_factor=scale, mode="bicubic", align_corners=False)
    return resampled.view(mel, table.shape[-1], -1).movedim(1, -1).reshape(1, -1, table.shape[-1])


def embed(encoder: Encoder, clips: Sequence[Tensor], visible: Tensor | None, *, kernels: str) -> list[Tensor]:
    """Tokens of several clips of one modality, embedded by one matrix product.

    Args:
        encoder: the embedding, positions and CLS token to use.
        clips: clips of one modality; sizes may differ.
        visible: [B, keep] tokens to take of the first clip; None = all.
        kernels: who copies patches, as ``model.kernels`` says it.

    Returns:
        One [B, (1 +) n, D] per clip.
    """
    first, width = int(encoder.has_cls), encoder.position.shape[-1]
    table, dtype = encoder.position[:, first:], product_dtype(encoder.position)  # patches enter a matrix product
    resampled: dict[tuple[int, ...], Tensor] = {}  # views of one shape share a table
    patches, positions = [], []
    for index, clip in enumerate(clips):
        if index == 0 and visible is not None:
            patches.append(gather_patches(clip, visible, encoder.clip, kernels=kernels, dtype=dtype))
            positions.append(F.embedding(visible, table[0]))
        else:
            grid = tuple(size // extent for size, extent in zip(clip.shape[2:], encoder.patch, strict=True))
            if grid not in resampled:
                resampled[grid] = resampled_position(table, encoder.grid, grid)
            patches.append(all_patches(clip, encoder.clip, kernels=kernels, dtype=dtype))
            positions.append(resampled[grid])
    rows = through(encoder.patch_embedding, torch.cat([part.flatten(0, 1) for part in patches]))
    embedded = []
    parts = rows.split([part.shape[0] * part.shape[1] for part in patches])
    for part, patch, position in zip(parts, patches, positions, strict=True):
        tokens = part.view(*patch.shape[:2], width) + position
        if encoder.has_cls:
            cls_token = (encoder.cls_token + encoder.position[:, :1]).to(tokens.dtype).expand(len(tokens), -1, -1)
            tokens = torch.cat([cls_token, tokens], dim=1)
        embedded.append(tokens)
    return embedded
