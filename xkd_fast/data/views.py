"""What a batch of views is: the one contract between data and model; and how a view is drawn (XKD.md section 9).

Dimension names: B clips, C channels, T frames, H height, W width, F mel bins; lower case for a local view's own sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xkd_fast.model.options import FORBID_EXTRA, option

Range = tuple[float, float]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_range(key: str, bounds: Range, lowest: float, highest: float = float("inf")) -> None:
    low, high = bounds
    _require(
        lowest < low <= high <= highest,
        f"{key} = [{low:g}, {high:g}] must be [low, high] with {lowest:g} < low <= high"
        + (f" <= {highest:g}" if highest < float("inf") else ""),
    )


@dataclass(frozen=True)
class VideoViewOptions:
    """How one kind of video view is drawn: one draw per view, the same for all its frames."""

    __pydantic_config__ = FORBID_EXTRA

    crop_area: Range = option(
        (0.2, 1.0), "share of the frame's area a random crop covers, 0-1; [1, 1] with crop_aspect [1, 1] = centre square"
    )
    crop_aspect: Range = option((3 / 4, 4 / 3), "width over height of a random crop, log-uniform; [1, 1] = square")
    flip: float = option(0.5, "probability of a horizontal flip, 0-1; 0 = off")
    brightness: float = option(0.4, "brightness factor uniform in 1 ± this; 0 = off")
    contrast: float = option(0.4, "contrast factor, about each frame's mean grey, uniform in 1 ± this; 0 = off")
    saturation: float = option(0.4, "saturation factor uniform in 1 ± this; 0 = off")
    hue: float = option(0.2, "hue shift uniform in ± this share of a full turn, 0-0.5; 0 = off")
    greyscale: float = option(0.0, "probability of turning grey, 0-1; 0 = off")
    blur: float = option(0.0, "probability of a Gaussian blur, 0-1; 0 = off")
    blur_sigma: Range = option(
        (0.1, 2.0), "standard deviation of the blur, pixels of the view; its kernel is size // 20 * 2 + 1 wide"
    )

    def __post_init__(self) -> None:
        key = "video view"
        _require_range(f"{key} crop_area", self.crop_area, 0.0, 1.0)
        _require_range(f"{key} crop_aspect", self.crop_aspect, 0.0)
        _require_range(f"{key} blur_sigma", self.blur_sigma, 0.0)
        for name in ("flip", "greyscale", "blur", "brightness", "contrast", "saturation"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{key} {name} = {value} must lie in 0-1")
        _require(0 <= self.hue <= 0.5, f"{key} hue = {self.hue} must lie in 0-0.5 (of a full turn)")


@dataclass(frozen=True)
class AudioViewOptions:
    """How one kind of audio view is drawn."""

    __pydantic_config__ = FORBID_EXTRA

    volume: float = option(0.1, "waveform scaled by a factor uniform in 1 ± this; 0 = off")
    crop_canvas: Range = option(
        (1.0, 1.0), "zero canvas around the spectrogram, (mel bins, frames) over the view's own; [1, 1] = none"
    )
    crop_scale: Range = option(
        (1.0, 1.0), "height and width of the spectrogram crop over the view's own; [1, 1] with crop_canvas [1, 1] = off"
    )

    def __post_init__(self) -> None:
        key = "audio view"
        _require(0 <= self.volume < 1, f"{key} volume = {self.volume} must lie in 0-1, below 1")
        _require(min(self.crop_canvas) >= 1, f"{key} crop_canvas = {list(self.crop_canvas)} must be two numbers of 1 or more")
        _require_range(f"{key} crop_scale", self.crop_scale, 0.0)

    @property
    def crops(self) -> bool:
        """Whether the spectrogram is cropped and resized at all."""
        return self.crop_canvas != (1.0, 1.0) or self.crop_scale != (1.0, 1.0)


def _video_local() -> VideoViewOptions:
    return VideoViewOptions(crop_area=(0.08, 0.4), greyscale=0.2, blur=0.5)


def _audio_local() -> AudioViewOptions:
    return AudioViewOptions(volume=0.2, crop_canvas=(1.0, 1.5), crop_scale=(0.6, 1.5))


@dataclass(frozen=True)
class AugmentOptions:
    """Augmentation of the four kinds of views (defaults: the released recipe, XKD.md section 9)."""

    __pydantic_config__ = FORBID_EXTRA

    short_side_first: bool = option(
        True, "resize the frames' short side to model.video.size before cropping; false = crop the stored frames"
    )
    video_global: VideoViewOptions = field(default_factory=VideoViewOptions, metadata={"doc": "the whole clip's video view"})
    video_local: VideoViewOptions = field(
        default_factory=_video_local, metadata={"doc": "video views of a few consecutive frames"}
    )
    audio_global: AudioViewOptions = field(default_factory=AudioViewOptions, metadata={"doc": "the whole clip's audio view"})
    audio_local: AudioViewOptions = field(default_factory=_audio_local, metadata={"doc": "audio views of a part of the clip"})
    audio_start_step: int = option(100, "local audio views start at multiples of this many samples into the clip; 1 = anywhere")
    pixel_mean: tuple[float, float, float] = option(
        (0.485, 0.456, 0.406), "subtracted from red, green, blue in 0-1; [0, 0, 0] = off"
    )
    pixel_std: tuple[float, float, float] = option(
        (0.229, 0.224, 0.225), "divides red, green, blue after the mean; [1, 1, 1] = off"
    )

    def __post_init__(self) -> None:
        _require(self.audio_start_step >= 1, f"augment.audio_start_step = {self.audio_start_step} must be 1 or more")
        _require(min(self.pixel_std) > 0, f"augment.pixel_std = {list(self.pixel_std)} must be three numbers above 0")


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
        return MaskNoise(self.video.to(device, non_blocking=non_blocking), self.audio.to(device, non_blocking=non_blocking))
