"""Augmentation of video and audio views, batched in torch (XKD.md section 9); the same code on CPU and GPU.

Videos are [N, 3, T, H, W] float in [0, 1]: N clips, T frames, each clip with its own factor. Operations on colours mean what
PIL and torchvision mean by them, in floating point: clamped to [0, 1] after each, but not rounded to 8 bits. Crop and resize
are one pair of matrices per clip (antialiased triangle filter), so resizing the short side first, cropping, resizing and
flipping cost two matrix products together; so does the Gaussian blur.

On a CPU a video view is made in one compiled pass (`xkd_fast.data.native_view`) where there is a compiled library; what stands
here is its definition, and does the same work elsewhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from xkd_fast.data.beside import moved
from xkd_fast.data.log_mel import LogMel, MelOptions
from xkd_fast.data.native_view import native_view, obstacle
from xkd_fast.data.views import (
    AudioDraw,
    AudioViewOptions,
    AugmentOptions,
    ClipDraw,
    VideoDraw,
    Views,
    ViewShape,
    canvas_size,
    short_side_size,
)

GREY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green, blue (ITU-R 601-2 luma, as in PIL)
# A view is made of so many pixels at a time on CPU. Colours of 32 × 112 × 112 take 8.7 ms in passes of 50 176 pixels, 19 ms in
# one (one Xeon core, 2 MiB of L2 cache), while passes of 12 544 take 16 ms; a whole view 8.1 ms in passes of 100 000 pixels,
# 8.4-8.9 of 50 000, 80 000 or 150 000, and a third more in one (one core of an EPYC, 1 MiB).
PIXELS_PER_PASS = 100_000
ACROSS_BAND, DOWN_BAND = 16, 16  # output columns and rows of a resize that are computed at a time on CPU


@lru_cache(maxsize=128)
def resize_matrix(size: int, new_size: int) -> Tensor:
    """Bilinear resizing with antialiasing along one side, as a matrix: [new_size, size], float32, each row sums to 1.

    A triangle of half-width max(1, size / new_size) input pixels around each output pixel's centre, cut at the edges.
    """
    scale = size / new_size
    centres = (torch.arange(new_size, dtype=torch.float64) + 0.5) * scale
    pixels = torch.arange(size, dtype=torch.float64) + 0.5
    weights = (1 - (pixels - centres[:, None]).abs() / max(scale, 1.0)).clamp_min(0)
    return (weights / weights.sum(1, keepdim=True)).float()


@dataclass(frozen=True)
class _Band:
    # some rows of a matrix, and the columns outside of which they are zero
    rows: slice
    columns: slice
    weights: Tensor


def _bands(matrix: Tensor, rows: int) -> list[_Band]:
    # a resizing matrix, so many rows at a time: an output pixel reads two or three input pixels, not all
    lengths, found = matrix.shape[1], matrix != 0
    first = found.to(torch.uint8).argmax(1).tolist()
    last = (lengths - found.flip(1).to(torch.uint8).argmax(1)).tolist()
    bands = []
    for start in range(0, matrix.shape[0], rows):
        own = slice(start, min(start + rows, matrix.shape[0]))
        columns = slice(min(first[own]), max(last[own]))
        bands.append(_Band(own, columns, matrix[own, columns].contiguous()))
    return bands


class CropResize:
    """Cuts one crop out of every frame and resizes it, as a pair of matrices: `resize_crop` for many frames of a clip.

    On a CPU the matrices are applied a few rows at a time, each with the pixels that these read: 32 frames of 101 × 130 to
    112 × 112 take 3.2 ms so, four frames at a time, and 7.6 ms by whole matrices (one EPYC core). On a GPU they are applied
    whole, in two launches.

    Args:
        stored: height and width of the frames.
        crop, size, short_side, flip: as of `resize_crop`.
    """

    def __init__(
        self, stored: tuple[int, int], crop: tuple[int, int, int, int], size: int, *, short_side: int = 0, flip: bool = False
    ) -> None:
        resized = short_side_size(*stored, short_side) if short_side else stored
        top, left, height, width = crop
        self.size = size
        self._rows, self._down = _crop_matrix(stored[0], resized[0], top, height, size)
        self._columns, across = _crop_matrix(stored[1], resized[1], left, width, size)
        self._across = (across.flip(0) if flip else across) / 255
        self._bands: tuple[list[_Band], list[_Band]] | None = None

    def __call__(self, frames: Tensor) -> Tensor:
        """[T, H, W, 3] uint8 to [3, T, size, size] float32 in [0, 1]."""
        pixels = frames[:, self._rows, self._columns].permute(3, 0, 1, 2).contiguous().float()  # [3, T, h, w]
        if pixels.device.type != "cpu":
            return moved(self._down, pixels.device) @ (pixels @ moved(self._across, pixels.device).T)
        if self._bands is None:
            self._bands = _bands(self._across, ACROSS_BAND), _bands(self._down, DOWN_BAND)
        channels, count, height, width = pixels.shape
        narrowed = pixels.new_empty(channels * count * height, self.size)
        for band in self._bands[0]:
            torch.mm(pixels.view(-1, width)[:, band.columns], band.weights.T, out=narrowed[:, band.rows])
        images = narrowed.view(channels * count, height, self.size)
        result = pixels.new_empty(channels * count, self.size, self.size)
        for band in self._bands[1]:
            torch.bmm(band.weights.expand(channels * count, -1, -1), images[:, band.columns], out=result[:, band.rows])
        return result.view(channels, count, self.size, self.size)


def _crop_matrix(stored: int, resized: int, start: int, length: int, size: int) -> tuple[slice, Tensor]:
    # stored → resized → [start : start + length] → size, along one side; and the span of stored pixels that it reads
    matrix = resize_matrix(length, size)
    if resized == stored:
        return slice(start, start + length), matrix
    first = resize_matrix(stored, resized)[start : start + length]
    read = first.any(0).nonzero().flatten()
    span = slice(int(read[0]), int(read[-1]) + 1)
    return span, matrix @ first[:, span]


def resize_crop(
    frames: Tensor, crop: tuple[int, int, int, int], size: int, *, short_side: int = 0, flip: bool = False
) -> Tensor:
    """Cut one crop out of every frame and resize it.

    Args:
        frames: [T, H, W, 3] uint8, as decoded.
        crop: top, left, height, width; in pixels of the frames after their short side is ``short_side``.
        size: height and width of the result.
        short_side: resize the frames to this short side before the crop; 0 = crop the frames as they are.
        flip: mirror left and right.

    Returns:
        [3, T, size, size] float32 in [0, 1].
    """
    height, width = frames.shape[1:3]
    return CropResize((height, width), crop, size, short_side=short_side, flip=flip)(frames)


def _per_clip(factor: Tensor, like: Tensor) -> Tensor:
    return moved(factor.to(like.dtype), like.device).view(-1, *[1] * (like.dim() - 1))


def grey_of(video: Tensor) -> Tensor:
    """Luma of [N, 3, T, H, W]: [N, 1, T, H, W]."""
    red, green, blue = GREY_WEIGHTS
    return (video[:, :1] * red).add_(video[:, 1:2], alpha=green).add_(video[:, 2:], alpha=blue)


def adjust_brightness(video: Tensor, factor: Tensor) -> Tensor:
    """Multiply by ``factor`` [N], in place."""
    return video.mul_(_per_clip(factor, video)).clamp_(0, 1)


def adjust_contrast(video: Tensor, factor: Tensor) -> Tensor:
    """Blend with each frame's mean grey, ``factor`` [N] being the video's share, in place."""
    factor = _per_clip(factor, video)
    mean_grey = grey_of(video.mean((3, 4), keepdim=True))  # the mean of the grey is the grey of the mean
    return video.mul_(factor).add_(mean_grey * (1 - factor)).clamp_(0, 1)


def adjust_saturation(video: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey video, ``factor`` [N] being the video's share, in place."""
    factor = _per_clip(factor, video)
    grey = grey_of(video).mul_(1 - factor)
    return video.mul_(factor).add_(grey).clamp_(0, 1)


def shift_hue(video: Tensor, shift: Tensor) -> Tensor:
    """Turn the HSV hue by ``shift`` [N] full turns, value and saturation kept, in place.

    A channel is ``value - chroma · trapezoid(hue)``; red, green and blue differ by a third of a turn. Written without
    ``torch.where`` and ``remainder``, which are 5-14 times slower on a CPU than the arithmetic used here.
    """
    red, green, blue = video.unbind(1)
    value = torch.maximum(red, green)
    torch.maximum(value, blue, out=value)
    chroma = torch.minimum(red, green)
    torch.minimum(chroma, blue, out=chroma)
    torch.sub(value, chroma, out=chroma)
    sixfold = chroma * 6
    sixth = sixfold.clamp_min(1e-8).reciprocal_()  # hue in turns = difference · sixth + the leading channel's own hue
    third = torch.full((), 1 / 3, dtype=video.dtype, device=video.device)
    leads = torch.empty_like(value)
    hue = torch.addcmul(2 * third, red - green, sixth)
    hue.lerp_(torch.addcmul(third, blue - red, sixth), torch.eq(value, green, out=leads))
    hue.lerp_((green - blue).mul_(sixth), torch.eq(value, red, out=leads))
    hue.add_(_per_clip(shift, hue))
    base = value.sub_(chroma, alpha=2)
    turns, distance = leads, sixth
    for channel, own in enumerate((0.0, 1 / 3, 2 / 3)):
        # distance in turns from the hue opposite to this channel's: within 1/6 of it the channel is at its lowest, from 1/3 on
        # at its highest, and in between value - chroma · (2 - 6 · distance)
        torch.sub(hue, own + 0.5, out=distance)
        distance.sub_(torch.round(distance, out=turns)).abs_().clamp_(1 / 6, 1 / 3)
        torch.addcmul(base, sixfold, distance, out=video[:, channel])
    return video


def to_grey(video: Tensor) -> Tensor:
    """All three channels replaced by the luma, in place."""
    return video.copy_(grey_of(video).expand_as(video))


_COLOUR_OPERATIONS: tuple[tuple[Callable[[Tensor, Tensor], Tensor], str, float], ...] = (
    (adjust_brightness, "brightness", 1.0),  # function, field of the draw, value that changes nothing
    (adjust_contrast, "contrast", 1.0),
    (adjust_saturation, "saturation", 1.0),
    (shift_hue, "hue", 0.0),
)


@dataclass(frozen=True)
class _ColourStep:
    # an in-place operation on some clips of a batch
    operation: Callable[..., Tensor]
    clips: list[int]
    factors: tuple[Tensor, ...]


def _colour_steps(draws: Sequence[VideoDraw], dtype: torch.dtype) -> list[_ColourStep]:
    steps = []
    for place in range(len(_COLOUR_OPERATIONS)):
        for number in sorted({draw.order[place] for draw in draws}):
            operation, field, neutral = _COLOUR_OPERATIONS[number]
            clips = [n for n, draw in enumerate(draws) if draw.order[place] == number and getattr(draw, field) != neutral]
            if clips:
                factors = torch.tensor([getattr(draws[n], field) for n in clips], dtype=dtype)
                steps.append(_ColourStep(operation, clips, (factors,)))
    return [*steps, _ColourStep(to_grey, [n for n, draw in enumerate(draws) if draw.grey], ())]


def _apply_colours(video: Tensor, steps: Sequence[_ColourStep]) -> Tensor:
    for step in steps:
        _on_clips(video, step.clips, step.operation, *step.factors)
    return video


def jitter_colours(video: Tensor, draws: Sequence[VideoDraw]) -> Tensor:
    """Brightness, contrast, saturation, hue of [N, 3, T, H, W], each clip in its own order, then grey where drawn; in place."""
    return _apply_colours(video, _colour_steps(draws, video.dtype))


def _on_clips(video: Tensor, clips: list[int], operation: Callable[..., Tensor], *factors: Tensor) -> Tensor:
    # an in-place operation on some clips of a batch
    if len(clips) == video.shape[0]:
        operation(video, *factors)
    elif clips:
        index = moved(torch.tensor(clips), video.device)
        video[index] = operation(video[index], *factors)
    return video


def blur_kernel_size(size: int) -> int:
    """Width of the Gaussian kernel for a view of ``size`` pixels: 9 for 96."""
    return size // 20 * 2 + 1


@lru_cache(maxsize=64)
def _reflected(size: int, kernel: int) -> Tensor:
    # which pixel each tap of each output pixel reads, mirrored about the edge pixels' centres: [size, kernel]
    place = torch.arange(size)[:, None] + torch.arange(kernel) - kernel // 2
    return (size - 1) - ((size - 1) - place.abs()).abs()


def blur_matrix(size: int, kernel: int, sigma: float) -> Tensor:
    """Gaussian blur along one side with reflect padding, as a matrix: [size, size] float32."""
    taps = torch.arange(kernel, dtype=torch.float64) - kernel // 2
    weights = torch.exp(-0.5 * (taps / sigma) ** 2)
    weights = (weights / weights.sum()).expand(size, kernel)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, _reflected(size, kernel), weights).float()


def blur(video: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Gaussian blur of [N, 3, T, H, H], a sigma per clip in pixels (0 = none)."""
    clips = [n for n, sigma in enumerate(sigmas) if sigma > 0]
    if not clips:
        return video
    size = video.shape[-1]
    each = torch.stack([blur_matrix(size, blur_kernel_size(size), sigmas[n]) for n in clips])
    matrices = moved(each, video.device)[:, None, None]

    def both_sides(part: Tensor) -> Tensor:
        return matrices @ part @ matrices.transpose(-1, -2)

    if len(clips) == video.shape[0]:
        return both_sides(video)
    return _on_clips(video, clips, both_sides)


@lru_cache(maxsize=16)
def _per_channel(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    # for [N, 3, T, H, W]; kept, since each copy to a GPU waits for it
    return torch.tensor(numbers, device=device).view(3, 1, 1, 1)


@cache
def _tell_once(reason: str) -> None:
    warnings.warn(f"video views are made by PyTorch's operators, which takes several times as long: {reason}", stacklevel=4)


def view_backend(device: torch.device, backend: str = "auto") -> str:
    """Who makes video views on a device: ``native``, the compiled pass, or ``torch``, PyTorch's operators.

    Args:
        device: where the decoded clips are.
        backend: ``auto`` = ``native`` where it can run; on a CPU where it cannot, a warning says why, once.

    Raises:
        ValueError: ``backend`` is unknown, or ``native`` and cannot run here.
    """
    if backend not in ("auto", "native", "torch"):
        raise ValueError(f"backend '{backend}' of video views is not one of auto, native, torch")
    if backend == "torch":
        return "torch"
    reason = obstacle(device)
    if reason is None:
        return "native"
    if backend == "native":
        raise ValueError(f"backend native of video views cannot run here: {reason}; torch can")
    if device.type == "cpu":
        _tell_once(reason)
    return "torch"


def video_views(
    clips: Sequence[Tensor],
    draws: Sequence[VideoDraw],
    *,
    frames: int,
    size: int,
    short_side: int,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One video view of each of N clips.

    Args:
        clips: N of [T, H, W, 3] uint8, the whole clip as decoded; H and W may differ between clips.
        draws: N draws.
        frames: frames of the view.
        size: height and width of the view.
        short_side: resize the frames to this short side before the crop; 0 = crop the frames as they are.
        pixel_mean: of red, green, blue in [0, 1].
        pixel_std: of red, green, blue in [0, 1].
        out: [N, 3, frames, size, size] of any strides to write into, float32 (normalised) or uint8 (grey levels, rounded).
        backend: see `view_backend`.

    Returns:
        ``out``, or [N, 3, frames, size, size] float32, normalised.

    Raises:
        ValueError: ``backend`` is unknown or cannot run here; tensors and draws that do not fit together.
    """
    out = clips[0].new_empty(len(clips), 3, frames, size, size, dtype=torch.float32) if out is None else out
    if view_backend(out.device, backend) == "torch":
        return _torch_views(clips, draws, out, short_side, pixel_mean, pixel_std)
    taps = blur_kernel_size(size)
    for clip, draw, view in zip(clips, draws, out, strict=True):
        native_view(clip, draw, view, short_side=short_side, blur_taps=taps, pixel_mean=pixel_mean, pixel_std=pixel_std)
    return out


def _torch_views(
    clips: Sequence[Tensor],
    draws: Sequence[VideoDraw],
    out: Tensor,
    short_side: int,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
) -> Tensor:
    frames, size = out.shape[2], out.shape[3]
    cuts = [
        CropResize((clip.shape[1], clip.shape[2]), draw.crop, size, short_side=short_side, flip=draw.flip)
        for clip, draw in zip(clips, draws, strict=True)
    ]
    colours, sigmas = _colour_steps(draws, torch.float32), [draw.blur_sigma for draw in draws]
    mean, std = (_per_channel(tuple(numbers), out.device) for numbers in (pixel_mean, pixel_std))
    # Nothing here looks at another frame. On a CPU a few frames go through all of it while they are in its cache.
    per_pass = max(1, PIXELS_PER_PASS // (len(cuts) * size * size)) if out.device.type == "cpu" else frames
    for first in range(0, frames, per_pass):
        last = min(first + per_pass, frames)
        parts = [cut(clip[draw.start + first : draw.start + last]) for cut, clip, draw in zip(cuts, clips, draws, strict=True)]
        video = parts[0][None] if len(parts) == 1 else torch.stack(parts)
        video = blur(_apply_colours(video, colours), sigmas)
        part = out[:, :, first:last]
        if out.dtype == torch.uint8:
            part.copy_(video.mul_(255).round_().clamp_(0, 255))
        else:
            torch.sub(video, mean, out=part).div_(std)
    return out


def crop_spectrogram(spectrogram: Tensor, crop: tuple[int, int, int, int], canvas: tuple[int, int]) -> Tensor:
    """Random resize crop of one spectrogram [F, T]: a window of a zero canvas around it, back at the original size.

    Args:
        spectrogram: [F, T], normalised.
        crop: top, left, height, width of the window in the canvas.
        canvas: mel bins and frames of the canvas; the spectrogram lies in its middle.
    """
    mel_bins, frames = spectrogram.shape
    top, left, height, width = crop
    above, before = (canvas[0] - mel_bins) // 2, (canvas[1] - frames) // 2
    padded = F.pad(spectrogram, (before, canvas[1] - frames - before, above, canvas[0] - mel_bins - above))
    window = padded[None, None, top : top + height, left : left + width]
    return F.interpolate(window, (mel_bins, frames), mode="bicubic", align_corners=True)[0, 0]


def cut_audio(waveform: Tensor, draw: AudioDraw, samples: int) -> Tensor:
    """The part of a clip's waveform [samples of the clip] that a view hears, at its volume: [samples]."""
    return waveform[draw.start : draw.start + samples] * draw.volume


def crop_spectrograms(spectrograms: Tensor, draws: Sequence[AudioDraw], options: AudioViewOptions) -> Tensor:
    """`crop_spectrogram` for a batch [N, F, T], where drawn."""
    canvas = canvas_size(options, *spectrograms.shape[1:])
    return torch.stack(
        [
            spectrogram if draw.crop is None else crop_spectrogram(spectrogram, draw.crop, canvas)
            for spectrogram, draw in zip(spectrograms, draws, strict=True)
        ]
    )


class ViewMaker:
    """Makes all views of decoded clips.

    Args:
        shape: sizes of the clip and its views.
        options: what is not drawn: the spectrogram's canvas, whether the short side is resized first.
        mel: the log-mel front end.
        device: where the decoded clips are.
        backend: who makes video views, see `view_backend`.

    Raises:
        ValueError: ``backend`` is unknown or cannot run on ``device``.
    """

    def __init__(
        self,
        shape: ViewShape,
        options: AugmentOptions,
        mel: MelOptions,
        *,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> None:
        self.shape = shape
        self.options = options
        self.device = torch.device(device)
        self.backend = view_backend(self.device, backend)
        self.log_mel = LogMel(mel, shape.audio.mel_bins, shape.sample_rate, device=device)

    def empty(self, clips: int, *, local_views: bool = True) -> Views:
        """Room for the views of ``clips`` clips, not initialised: float32, but videos as ``augment.pixels`` says."""
        video, audio = self.shape.video, self.shape.audio
        pixels = getattr(torch, self.options.pixels)

        def videos(frames: int, size: int) -> Tensor:
            return torch.empty(clips, 3, frames, size, size, dtype=pixels, device=self.device)

        def audios(frames: int) -> Tensor:
            return torch.empty(clips, 1, audio.mel_bins, frames, device=self.device)

        return Views(
            video_global=videos(video.frames, video.size),
            audio_global=audios(audio.frames),
            video_locals=[videos(video.local_frames, video.local_size) for _ in range(video.local_views * local_views)],
            audio_locals=[audios(audio.local_frames) for _ in range(audio.local_views * local_views)],
        )

    def fill(
        self, out: Views, rows: slice, videos: Sequence[Tensor], waveforms: Sequence[Tensor], draws: Sequence[ClipDraw]
    ) -> None:
        """Write the views of N clips into ``rows`` of ``out``.

        Args:
            out: as made by `empty`; has the local views that ``draws`` has.
            rows: N rows of it.
            videos: N of [T, H, W, 3] uint8, the frames of the clip; none, and the video views stay as they are.
            waveforms: N of [samples of the clip] float; none, and the audio views stay as they are.
            draws: N draws.
        """
        video, audio = self.shape.video, self.shape.audio
        if videos:
            self._video(out.video_global[rows], videos, [draw.video_global for draw in draws], video.frames, video.size)
        for view, local in enumerate(out.video_locals if videos else ()):
            self._video(local[rows], videos, [draw.video_locals[view] for draw in draws], video.local_frames, video.local_size)
        if not waveforms:
            return
        whole = self.options.audio_global, self.shape.clip_samples, audio.frames
        self._audio(out.audio_global[rows], waveforms, [draw.audio_global for draw in draws], *whole)
        part = self.options.audio_local, self.shape.local_samples, audio.local_frames
        for view, local in enumerate(out.audio_locals):
            self._audio(local[rows], waveforms, [draw.audio_locals[view] for draw in draws], *part)

    def _video(self, out: Tensor, videos: Sequence[Tensor], draws: Sequence[VideoDraw], frames: int, size: int) -> None:
        video_views(
            videos,
            draws,
            frames=frames,
            size=size,
            short_side=self.shape.video.size if self.options.short_side_first else 0,
            pixel_mean=self.shape.video.pixel_mean,
            pixel_std=self.shape.video.pixel_std,
            out=out,
            backend=self.backend,
        )

    def _audio(
        self,
        out: Tensor,
        waveforms: Sequence[Tensor],
        draws: Sequence[AudioDraw],
        options: AudioViewOptions,
        samples: int,
        frames: int,
    ) -> None:
        heard = torch.stack([cut_audio(waveform, draw, samples) for waveform, draw in zip(waveforms, draws, strict=True)])
        out[:, 0] = crop_spectrograms(self.log_mel(heard, frames), draws, options)
