"""A model small enough for a test, and a batch for it."""

from __future__ import annotations

import torch

from xkd_fast.data.views import MaskNoise, Views
from xkd_fast.model.options import AudioOptions, DecoderOptions, EncoderOptions, HeadOptions, ModelOptions, VideoOptions


def tiny_options(**changes: object) -> ModelOptions:
    """Two blocks of width 24; 36 video and 16 audio tokens, 8 of either in a local view; video has two local views."""
    sizes: dict[str, object] = {
        "video": VideoOptions(8, 24, 2, 4, 16, 2, 8, mask_ratio=0.7),
        "audio": AudioOptions(16, 64, 1, 32, 4, 16, mask_ratio=0.6),
        "encoder": EncoderOptions(24, 2, 3),
        "decoder": DecoderOptions(16, 1, 2),
        "head": HeadOptions(20, 12, 40),
    }
    return ModelOptions(**(sizes | changes))  # type: ignore[arg-type]


def random_batch(
    options: ModelOptions, clips: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Views, MaskNoise]:
    """Random views and mask noise of the model's sizes."""
    video, audio = options.video, options.audio
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    views = Views(
        video_global=normal(clips, *video.shape),
        audio_global=normal(clips, *audio.shape),
        video_locals=[normal(clips, *video.local_shape) for _ in range(video.local_views)],
        audio_locals=[normal(clips, *audio.local_shape) for _ in range(audio.local_views)],
    )
    noise = [torch.rand(clips, part.tokens, generator=generator, dtype=torch.float64) for part in (video, audio)]
    return views, MaskNoise(*noise)


def part_of(views: Views, masks: MaskNoise, rows: slice) -> tuple[Views, MaskNoise]:
    """Some clips of a batch."""
    part = Views(
        views.video_global[rows],
        views.audio_global[rows],
        [view[rows] for view in views.video_locals],
        [view[rows] for view in views.audio_locals],
    )
    return part, MaskNoise(masks.video[rows], masks.audio[rows])
