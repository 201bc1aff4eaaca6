"""What a batch of views is: the one contract between data and model.

Dimension names: B clips, C channels, T frames, H height, W width, F mel bins; lower case for a local view's own sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Views:
    """Global and local views of B audio-visual clips."""

    video_global: Tensor  # [B, 3, T, H, W]
    audio_global: Tensor  # [B, 1, F, T]
    video_locals: list[Tensor] = field(default_factory=list)  # n_v of [B, 3, t, h, w]
    audio_locals: list[Tensor] = field(default_factory=list)  # n_a of [B, 1, F, t]
    keys: list[str] = field(default_factory=list)  # B sample keys, for error messages and reports
    labels: Tensor | None = None  # [B] int64 class numbers, -1 where unknown

    @property
    def batch_size(self) -> int:
        """Clips in the batch."""
        return self.video_global.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> Views:
        """The same batch with ``function`` applied to every view tensor and to the labels."""
        return Views(
            video_global=function(self.video_global),
            audio_global=function(self.audio_global),
            video_locals=[function(view) for view in self.video_locals],
            audio_locals=[function(view) for view in self.audio_locals],
            keys=self.keys,
            labels=None if self.labels is None else function(self.labels),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Views:
        """The batch on ``device``; asynchronous from pinned memory."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Views:
        """The batch in page-locked host memory."""
        return self.map(lambda tensor: tensor.pin_memory())


@dataclass
class MaskNoise:
    """Uniform noise that decides which tokens of the global views are masked: the ``keep`` smallest per row stay visible."""

    video: Tensor  # [B, video tokens], in [0, 1)
    audio: Tensor  # [B, audio tokens], in [0, 1)

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> MaskNoise:
        """The noise on ``device``."""
        return MaskNoise(
            self.video.to(device, non_blocking=non_blocking), self.audio.to(device, non_blocking=non_blocking)
        )
