"""From options to a model."""

from __future__ import annotations

import torch
from torch import Tensor

from xkd_fast import reference
from xkd_fast.data.views import Views
from xkd_fast.model.options import ModelOptions
from xkd_fast.model.xkd import XKD

IMPLEMENTATIONS: dict[str, type[reference.XKD]] = {"fast": XKD, "reference": reference.XKD}


def build_model(options: ModelOptions, *, seed: int) -> reference.XKD:
    """A freshly initialised model; the same seed gives the same weights and leaves torch's default generator untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return IMPLEMENTATIONS[options.implementation](options)


def random_views(options: ModelOptions, clips: int, device: torch.device) -> Views:
    """Views of the model's sizes filled with noise."""
    video, audio = options.video, options.audio

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(clips, *shape, device=device)

    return Views(
        video_global=noise(video.shape),
        audio_global=noise(audio.shape),
        video_locals=[noise(video.local_shape) for _ in range(video.local_views)],
        audio_locals=[noise(audio.local_shape) for _ in range(audio.local_views)],
    )
