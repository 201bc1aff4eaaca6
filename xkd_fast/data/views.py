"""What a batch of views is: the one contract between data and model; and how a view is drawn (XKD.md section 9).

Dimension names: B clips, C channels, T frames, H height, W width, F mel bins; lower case for a local view's own sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from xkd_fast.model.options import FORBID_EXTRA, AudioOptions, VideoOptions, option, require


def _require_range(key: str, bounds: tuple[float, float], lowest: float, highest: float = float("inf")) -> None:
    low, high = bounds
    require(
        lowest < low <= high <= highest,
        f"{key} = [{low:g}, {high:g}] must be [low, high] with {lowest:g} < low <= high"
        + (f" <= {highest:g}" if highest < float("inf") else ""),
    )


@dataclass(frozen=True)
class VideoViewOptions:
    """How one kind of video view is drawn: one draw per view, the same for all its frames."""

    __pydantic_config__ = FORBID_EXTRA

    crop_area: tuple[float, float] = option(
        (0.2, 1.0), "share of the frame's area a random crop covers, 0-1; [1, 1] with crop_aspect [1, 1] = centre square"
    )
    crop_aspect: tuple[float, float] = option(
        (3 / 4, 4 / 3), "width over height of a random crop, log-uniform; [1, 1] = square"
    )
    flip: float = option(0.5, "probability of a horizontal flip, 0-1; 0 = off")
    brightness: float = option(0.4, "brightness factor uniform in 1 ± this; 0 = off")
    contrast: float = option(0.4, "contrast factor, about each frame's mean grey, uniform in 1 ± this; 0 = off")
    saturation: float = option(0.4, "saturation factor uniform in 1 ± this; 0 = off")
    hue: float = option(0.2, "hue shift uniform in ± this share of a full turn, 0-0.5; 0 = off")
    greyscale: float = option(0.0, "probability of turning grey, 0-1; 0 = off")
    blur: float = option(0.0, "probability of a Gaussian blur, 0-1; 0 = off")
    blur_sigma: tuple[float, float] = option(
        (0.1, 2.0), "standard deviation of the blur, pixels of the view; its kernel is size // 20 * 2 + 1 wide"
    )

    def __post_init__(self) -> None:
        key = "video view"
        _require_range(f"{key} crop_area", self.crop_area, 0.0, 1.0)
        _require_range(f"{key} crop_aspect", self.crop_aspect, 0.0)
        _require_range(f"{key} blur_sigma", self.blur_sigma, 0.0)
        for name in ("flip", "greyscale", "blur", "brightness", "contrast", "saturation"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{key} {name} = {value} must lie in 0-1")
        require(0 <= self.hue <= 0.5, f"{key} hue = {self.hue} must lie in 0-0.5 (of a full turn)")


@dataclass(frozen=True)
class AudioViewOptions:
    """How one kind of audio view is drawn."""

    __pydantic_config__ = FORBID_EXTRA

    volume: float = option(0.1, "waveform scaled by a factor uniform in 1 ± this; 0 = off")
    crop_canvas: tuple[float, float] = option(
        (1.0, 1.0), "zero canvas around the spectrogram, (mel bins, frames) over the view's own; [1, 1] = none"
    )
    crop_scale: tuple[float, float] = option(
        (1.0, 1.0), "height and width of the spectrogram crop over the view's own; [1, 1] with crop_canvas [1, 1] = off"
    )

    def __post_init__(self) -> None:
        key = "audio view"
        require(0 <= self.volume < 1, f"{key} volume = {self.volume} must lie in 0-1, below 1")
        require(min(self.crop_canvas) >= 1, f"{key} crop_canvas = {list(self.crop_canvas)} must be two numbers of 1 or more")
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
    pixels: Literal["float32", "uint8"] = option(
        "float32", "of video views: float32, normalised; uint8 = grey levels, a quarter of the bytes, normalised in the model"
    )

    def __post_init__(self) -> None:
        require(self.audio_start_step >= 1, f"augment.audio_start_step = {self.audio_start_step} must be 1 or more")


@dataclass
class Views:
    """Global and local views of B audio-visual clips."""

    video_global: Tensor  # [B, 3, T, H, W] normalised, or uint8 grey levels
    audio_global: Tensor  # [B, 1, F, T]
    video_locals: list[Tensor] = field(default_factory=list)  # n_v of [B, 3, t, h, w], likewise
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


@dataclass
class MaskNoise:
    """Uniform noise that decides which tokens of the global views are masked: the ``keep`` smallest per row stay visible."""

    video: Tensor  # [B, video tokens] float64, in [0, 1)
    audio: Tensor  # [B, audio tokens] float64, in [0, 1)

    def map(self, function: Callable[[Tensor], Tensor]) -> MaskNoise:
        """The same noise with ``function`` applied to both tensors."""
        return MaskNoise(function(self.video), function(self.audio))

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> MaskNoise:
        """The noise on ``device``; asynchronous from pinned memory."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class VideoDraw:
    """The random choices of one video view, the same for all its frames."""

    start: int  # first frame of the view, counted within the clip
    crop: tuple[int, int, int, int]  # top, left, height, width in the (resized) frame, pixels
    flip: bool
    order: tuple[int, ...]  # order in which brightness 0, contrast 1, saturation 2 and hue 3 are applied
    brightness: float  # factor
    contrast: float  # factor
    saturation: float  # factor
    hue: float  # shift, in turns
    grey: bool
    blur_sigma: float  # pixels of the view; 0 = no blur


@dataclass(frozen=True)
class AudioDraw:
    """The random choices of one audio view."""

    start: int  # first sample of the view, counted within the clip
    volume: float  # factor
    crop: tuple[int, int, int, int] | None  # top, left, height, width in the spectrogram's canvas; None = no crop


@dataclass(frozen=True)
class ClipDraw:
    """Every random choice of one clip but its mask noise."""

    start_frame: int  # of the stored video
    start_sample: int  # of the stored audio: the same moment
    video_global: VideoDraw
    audio_global: AudioDraw
    video_locals: tuple[VideoDraw, ...]
    audio_locals: tuple[AudioDraw, ...]


@dataclass(frozen=True)
class ClipShape:
    """What a stored sample holds, as far as drawing a clip from it must know."""

    frames: int
    samples: int  # of audio
    height: int  # pixels
    width: int  # pixels


@dataclass(frozen=True)
class ViewShape:
    """Sizes of a clip and of its views, gathered from the model's and the data's options."""

    fps: float
    sample_rate: int
    clip_samples: int  # audio samples of the clip
    local_samples: int  # audio samples of a local audio view
    video: VideoOptions
    audio: AudioOptions


DRAWS_PER_VIEW = 64  # uniforms set aside for a view: 10 tries at a crop take 40, the other choices 12


def uniform_between(u: float, low: float, high: float) -> float:
    """``u`` in [0, 1) stretched to [low, high)."""
    return low + (high - low) * u


def integer_below(u: float, count: int) -> int:
    """``u`` in [0, 1) as one of 0 … count − 1, evenly."""
    return min(int(u * count), count - 1)


def short_side_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width of a frame resized so that its shorter side is ``short_side`` pixels (the longer one truncated)."""
    if height <= width:
        return short_side, short_side * width // height
    return short_side * height // width, short_side


def draw_crop(
    uniforms: Iterator[float], height: int, width: int, area: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A random crop (top, left, height, width) whose share of the area is uniform and whose aspect is log-uniform.

    Ten tries at a crop that fits; failing that, the largest centred crop whose aspect lies within bounds.
    """
    for _ in range(10):
        pixels = height * width * uniform_between(next(uniforms), *area)
        ratio = math.exp(uniform_between(next(uniforms), math.log(aspect[0]), math.log(aspect[1])))
        u_top, u_left = next(uniforms), next(uniforms)
        crop_height, crop_width = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = integer_below(u_top, height - crop_height + 1)
            left = integer_below(u_left, width - crop_width + 1)
            return top, left, crop_height, crop_width
    ratio = min(max(width / height, aspect[0]), aspect[1])
    crop_height = min(height, max(1, round(width / ratio)))
    crop_width = min(width, max(1, round(height * ratio)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _draw_order(uniforms: Iterator[float]) -> tuple[int, ...]:
    # Fisher-Yates over the four colour operations
    order = [0, 1, 2, 3]
    for last in (3, 2, 1):
        other = integer_below(next(uniforms), last + 1)
        order[last], order[other] = order[other], order[last]
    return tuple(order)


def draw_video_view(
    uniforms: Iterator[float], options: VideoViewOptions, height: int, width: int, clip_frames: int, view_frames: int
) -> VideoDraw:
    """One video view of frames ``height`` × ``width`` pixels; takes at most `DRAWS_PER_VIEW` numbers from ``uniforms``."""

    def factor(strength: float) -> float:
        return uniform_between(next(uniforms), 1 - strength, 1 + strength)

    return VideoDraw(
        start=integer_below(next(uniforms), clip_frames - view_frames + 1),
        flip=next(uniforms) < options.flip,
        order=_draw_order(uniforms),
        brightness=factor(options.brightness),
        contrast=factor(options.contrast),
        saturation=factor(options.saturation),
        hue=uniform_between(next(uniforms), -options.hue, options.hue),
        grey=next(uniforms) < options.greyscale,
        blur_sigma=uniform_between(next(uniforms), *options.blur_sigma) if next(uniforms) < options.blur else 0.0,
        crop=draw_crop(uniforms, height, width, options.crop_area, options.crop_aspect),
    )


def canvas_size(options: AudioViewOptions, mel_bins: int, frames: int) -> tuple[int, int]:
    """Mel bins and frames of the zero canvas around a spectrogram (truncated)."""
    return int(options.crop_canvas[0] * mel_bins), int(options.crop_canvas[1] * frames)


def draw_audio_view(
    uniforms: Iterator[float],
    options: AudioViewOptions,
    mel_bins: int,
    frames: int,
    clip_samples: int,
    view_samples: int,
    start_step: int,
) -> AudioDraw:
    """One audio view of ``mel_bins`` × ``frames``; takes at most `DRAWS_PER_VIEW` numbers from ``uniforms``."""
    start = start_step * integer_below(next(uniforms), (clip_samples - view_samples) // start_step + 1)
    volume = uniform_between(next(uniforms), 1 - options.volume, 1 + options.volume)
    crop = None
    if options.crops:
        canvas_bins, canvas_frames = canvas_size(options, mel_bins, frames)
        height = max(1, min(int(mel_bins * uniform_between(next(uniforms), *options.crop_scale)), canvas_bins))
        width = max(1, min(int(frames * uniform_between(next(uniforms), *options.crop_scale)), canvas_frames))
        top = integer_below(next(uniforms), canvas_bins - height + 1)
        left = integer_below(next(uniforms), canvas_frames - width + 1)
        crop = top, left, height, width
    return AudioDraw(start=start, volume=volume, crop=crop)


def last_start(stored: ClipShape, shape: ViewShape) -> int:
    """The last frame a whole clip can start at: both modalities must last. 0 where the sample is shorter than the clip."""
    heard = math.ceil(stored.samples * shape.fps / shape.sample_rate)
    return max(0, min(stored.frames, heard) - shape.video.frames)


def sample_of_frame(frame: int, shape: ViewShape) -> int:
    """The audio sample that is heard when ``frame`` is first seen."""
    return round(frame * shape.sample_rate / shape.fps)


def draw_clip(uniforms: Sequence[float], stored: ClipShape, shape: ViewShape, options: AugmentOptions) -> ClipDraw:
    """One clip and all its views from ``uniforms`` in [0, 1).

    Each view reads its own `DRAWS_PER_VIEW` numbers, so neither the options of a view nor how many there are moves what
    another one draws. `draws_per_clip` says how many numbers are needed.
    """
    video, audio = shape.video, shape.audio
    height, width = stored.height, stored.width
    if options.short_side_first:
        height, width = short_side_size(height, width, video.size)

    def numbers(block: int) -> Iterator[float]:
        first = 1 + block * DRAWS_PER_VIEW
        return iter(uniforms[first : first + DRAWS_PER_VIEW])

    def video_view(block: int, view: VideoViewOptions, frames: int) -> VideoDraw:
        return draw_video_view(numbers(block), view, height, width, video.frames, frames)

    def audio_view(block: int, view: AudioViewOptions, frames: int, samples: int) -> AudioDraw:
        sizes = audio.mel_bins, frames, shape.clip_samples, samples
        return draw_audio_view(numbers(block), view, *sizes, options.audio_start_step)

    start = integer_below(uniforms[0], last_start(stored, shape) + 1)
    return ClipDraw(
        start_frame=start,
        start_sample=sample_of_frame(start, shape),
        video_global=video_view(0, options.video_global, video.frames),
        audio_global=audio_view(1, options.audio_global, audio.frames, shape.clip_samples),
        video_locals=tuple(video_view(2 + 2 * n, options.video_local, video.local_frames) for n in range(video.local_views)),
        audio_locals=tuple(
            audio_view(3 + 2 * n, options.audio_local, audio.local_frames, shape.local_samples)
            for n in range(audio.local_views)
        ),
    )


def plain_draw(stored: ClipShape, shape: ViewShape, start_frame: int) -> ClipDraw:
    """The clip that starts at ``start_frame``, centre-cropped (short side resized first) and not augmented; no local views."""
    size = shape.video.size
    height, width = short_side_size(stored.height, stored.width, size)
    centre = (height - size) // 2, (width - size) // 2, size, size
    return ClipDraw(
        start_frame=start_frame,
        start_sample=sample_of_frame(start_frame, shape),
        video_global=VideoDraw(0, centre, False, (0, 1, 2, 3), 1.0, 1.0, 1.0, 0.0, False, 0.0),
        audio_global=AudioDraw(start=0, volume=1.0, crop=None),
        video_locals=(),
        audio_locals=(),
    )


def draws_per_clip(shape: ViewShape) -> int:
    """How many uniforms `draw_clip` reads from."""
    return 1 + DRAWS_PER_VIEW * 2 * (1 + max(shape.video.local_views, shape.audio.local_views))
