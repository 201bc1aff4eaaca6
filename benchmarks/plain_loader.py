"""The yardstick of the data benchmarks: what the released recipe does for a clip, in a torch DataLoader, said plainly.

Every sample is decoded from its source file by PyAV and augmented in its worker process by PyTorch's operators, one view after
the other, picture and sound. Draws are those of the sampler, so the views are the same as ours up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.originals import pyav_frames, pyav_sound
from xkd_fast.data.log_mel import MelOptions, mel_filterbank
from xkd_fast.data.sampler import clip_draw
from xkd_fast.data.views import AudioDraw, AudioViewOptions, AugmentOptions, ClipShape, VideoDraw, ViewShape, canvas_size

LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)


def grey(video: Tensor) -> Tensor:
    """[T, 3, H, W] to [T, 1, H, W]."""
    return (video * LUMA).sum(1, keepdim=True)


def blend(video: Tensor, other: Tensor, factor: float) -> Tensor:
    """As PIL's ImageEnhance."""
    return (factor * video + (1 - factor) * other).clamp(0, 1)


def turn_hue(video: Tensor, shift: float) -> Tensor:
    """RGB to HSV, the hue shifted, and back."""
    red, green, blue = video.unbind(1)
    value, lowest = video.amax(1), video.amin(1)
    chroma = value - lowest
    divisor = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = (hue / 6 + shift) % 1
    saturation = torch.where(
        value == 0, torch.zeros_like(value), chroma / torch.where(value == 0, torch.ones_like(value), value)
    )
    sector = (hue * 6).floor()
    part = hue * 6 - sector
    low, falling, rising = (value * (1 - saturation * share) for share in (torch.ones_like(part), part, 1 - part))
    cases = [(value, rising, low), (falling, value, low), (low, value, rising), (low, falling, value), (rising, low, value)]
    cases.append((value, low, falling))
    index = sector.long() % 6
    return torch.stack([torch.stack([case[channel] for case in cases]).gather(0, index[None])[0] for channel in range(3)], 1)


def gaussian_blur(video: Tensor, sigma: float, size: int) -> Tensor:
    """A convolution along both sides, mirrored at the edges."""
    kernel = size // 20 * 2 + 1
    taps = torch.exp(-0.5 * ((torch.arange(kernel) - kernel // 2) / sigma) ** 2)
    taps = (taps / taps.sum()).expand(3, 1, -1)
    padded = F.pad(video, [kernel // 2] * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, taps[:, :, None], groups=3), taps[..., None], groups=3)


def video_view(frames: Tensor, draw: VideoDraw, count: int, size: int, shape: ViewShape) -> Tensor:
    """[T, H, W, 3] uint8 to [3, count, size, size]."""
    video = frames[draw.start : draw.start + count].permute(0, 3, 1, 2).float() / 255
    height, width = video.shape[2:]
    short = shape.video.size
    smaller = (short, short * width // height) if height <= width else (short * height // width, short)
    video = F.interpolate(video, smaller, mode="bilinear", antialias=True)
    top, left, crop_height, crop_width = draw.crop
    video = video[:, :, top : top + crop_height, left : left + crop_width]
    video = F.interpolate(video, (size, size), mode="bilinear", antialias=True)
    if draw.flip:
        video = video.flip(3)
    steps: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda video: (video * draw.brightness).clamp(0, 1),
        lambda video: blend(video, grey(video).mean((2, 3), keepdim=True), draw.contrast),
        lambda video: blend(video, grey(video), draw.saturation),
        lambda video: turn_hue(video, draw.hue),
    )
    for number in draw.order:
        video = steps[number](video)
    if draw.grey:
        video = grey(video).expand(-1, 3, -1, -1)
    if draw.blur_sigma:
        video = gaussian_blur(video, draw.blur_sigma, size)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (shape.video.pixel_mean, shape.video.pixel_std))
    return ((video - mean) / std).transpose(0, 1)


def audio_view(
    sound: Tensor, draw: AudioDraw, samples: int, frames: int, options: AudioViewOptions, mel: MelOptions, bank: Tensor
) -> Tensor:
    """[samples of the clip] to [1, mel bins, frames]."""
    heard = sound[draw.start : draw.start + samples] * draw.volume
    window = torch.hann_window(mel.n_fft)
    spectrum = torch.stft(heard, mel.n_fft, mel.hop, window=window, center=True, pad_mode="reflect", return_complex=True)
    energies = bank @ spectrum[:, :frames].abs().square()
    image = (energies + torch.finfo(torch.float32).eps).log()
    image = (image - mel.mean) / mel.std
    if draw.crop is not None:
        bins, width = canvas_size(options, *image.shape)
        canvas = torch.zeros(bins, width)
        above, before = (bins - image.shape[0]) // 2, (width - image.shape[1]) // 2
        canvas[above : above + image.shape[0], before : before + image.shape[1]] = image
        top, left, height, length = draw.crop
        part = canvas[None, None, top : top + height, left : left + length]
        image = F.interpolate(part, tuple(image.shape), mode="bicubic", align_corners=True)[0, 0]
    return image[None]


@dataclass
class PlainDataset(Dataset):
    """A sample is a clip with all its views: [video global, audio global, video local …, audio local …].

    Attributes:
        paths: source files.
        stored: what the draws take for the files' sizes; they are those of the shards.
        clips: how many there are; clip ``n`` is of file ``n % len(paths)``, with the draws of epoch ``n // len(paths)``.
    """

    paths: Sequence[Path]
    stored: ClipShape
    shape: ViewShape
    augment: AugmentOptions
    mel: MelOptions
    clips: int

    def __post_init__(self) -> None:
        self._bank = mel_filterbank(self.mel, self.shape.audio.mel_bins, self.shape.sample_rate).float()

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, number: int) -> list[Tensor]:
        place, epoch = number % len(self.paths), number // len(self.paths)
        shape, draw = self.shape, clip_draw(0, epoch, place, self.stored, self.shape, self.augment)
        start = draw.start_frame / shape.fps
        frames = torch.from_numpy(pyav_frames(self.paths[place], start, shape.video.frames, shape.fps))
        sound = torch.from_numpy(pyav_sound(self.paths[place], start, shape.clip_samples, shape.sample_rate))
        return self.views(frames, sound, draw)

    def views(self, frames: Tensor, sound: Tensor, draw: Any) -> list[Tensor]:
        """All views of a decoded clip."""
        shape, video, audio = self.shape, self.shape.video, self.shape.audio
        whole, part = (shape.clip_samples, audio.frames), (shape.local_samples, audio.local_frames)
        made = [video_view(frames, draw.video_global, video.frames, video.size, shape)]
        made.append(audio_view(sound, draw.audio_global, *whole, self.augment.audio_global, self.mel, self._bank))
        made += [video_view(frames, view, video.local_frames, video.local_size, shape) for view in draw.video_locals]
        made += [audio_view(sound, view, *part, self.augment.audio_local, self.mel, self._bank) for view in draw.audio_locals]
        return made


def plain_loader(dataset: PlainDataset, batch_size: int, workers: int) -> DataLoader:
    """As people write it; the processes stay between epochs and are idle there."""
    return DataLoader(
        dataset, batch_size, num_workers=workers, persistent_workers=True, multiprocessing_context="spawn", drop_last=True
    )
