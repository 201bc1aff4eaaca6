"""Augmentation against independent statements of it: PIL, colorsys, a written-out convolution, interpolation by hand."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor

from xkd_fast.data.augment import (
    PIXELS_PER_PASS,
    ViewMaker,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    blur,
    blur_kernel_size,
    blur_matrix,
    crop_spectrogram,
    cut_audio,
    grey_of,
    jitter_colours,
    resize_crop,
    resize_matrix,
    shift_hue,
    to_grey,
    video_views,
)
from xkd_fast.data.log_mel import LogMel, MelOptions
from xkd_fast.data.sampler import clip_draw
from xkd_fast.data.views import AudioDraw, AugmentOptions, ClipShape, VideoDraw, ViewShape, plain_draw
from xkd_fast.model.options import AudioOptions, VideoOptions

PLAIN = VideoDraw(0, (0, 0, 40, 40), False, (0, 1, 2, 3), 1.0, 1.0, 1.0, 0.0, False, 0.0)


def picture(seed: int, height: int = 40, width: int = 40) -> NDArray[np.uint8]:
    """A smooth, colourful picture with some noise and some saturated corners: [height, width, 3]."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 40
    waves = [127 + 150 * np.sin(9 * x * random.random() + 9 * y * random.random() + 6 * random.random()) for _ in range(3)]
    return (np.stack(waves, -1) + random.normal(0, 6, (height, width, 3))).clip(0, 255).astype(np.uint8)


def as_video(*pictures: NDArray[np.uint8]) -> Tensor:
    """Pictures as one clip's frames: [1, 3, T, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2)[None].float().div(255)


def grey_levels(video: Tensor) -> NDArray[np.float64]:
    """[1, 3, T, H, W] in [0, 1] as [T, H, W, 3] in 0-255."""
    return video[0].permute(1, 2, 3, 0).double().numpy() * 255


@pytest.mark.parametrize("factor", [0.6, 0.93, 1.4])
@pytest.mark.parametrize(
    ("ours", "theirs", "levels"),
    [
        (adjust_brightness, ImageEnhance.Brightness, 1.01),  # PIL truncates to whole grey levels
        (adjust_contrast, ImageEnhance.Contrast, 1.5),  # and rounds the mean grey as well
        (adjust_saturation, ImageEnhance.Color, 1.5),  # and each pixel's grey
    ],
)
def test_colours_are_pils(
    ours: Callable[[Tensor, Tensor], Tensor],
    theirs: Callable[[Image.Image], ImageEnhance._Enhance],
    levels: float,
    factor: float,
) -> None:
    # the blend turned round, grey by the plain mean of the channels, or contrast about the clip's mean and not the frame's
    pictures = [picture(0), picture(1) // 3, 255 - picture(2) // 4]
    result = grey_levels(ours(as_video(*pictures), torch.tensor([factor])))
    for frame, image in zip(result, pictures, strict=True):
        expected = np.asarray(theirs(Image.fromarray(image)).enhance(factor)).astype(float)
        assert np.abs(frame - expected).max() <= levels


@pytest.mark.parametrize("turns", [-0.2, 0.07, 0.2, 0.5])
def test_hue_is_colorsys(turns: float) -> None:
    # a rotation in YIQ; hue in degrees or radians; grey, black, white and pure colours divided by a chroma of 0
    special = np.array(
        [[0, 0, 0], [255, 255, 255], [128, 128, 128], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255]]
    )
    pixels = np.concatenate([special, np.random.default_rng(0).integers(0, 256, (492, 3))]).astype(np.uint8)
    video = as_video(pixels.reshape(20, 25, 3)).double()
    result = grey_levels(shift_hue(video, torch.tensor([turns], dtype=torch.float64))).reshape(-1, 3)
    for pixel, ours in zip(pixels, result, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
        expected = colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)
        np.testing.assert_allclose(ours, np.array(expected) * 255, atol=1e-5)


def test_hue_is_pils_but_for_its_8_bit_hue() -> None:
    # torchvision shifts the hue channel of 8-bit images so. A step of 1/255 turn is up to 6 grey levels, and PIL truncates to
    # whole steps, of saturation too; a rotation in YIQ is 20 levels off on average
    image = picture(3)
    hue, saturation, value = (np.asarray(band) for band in Image.fromarray(image).convert("HSV").split())
    turned = [Image.fromarray(band) for band in ((hue.astype(int) + 32).astype(np.uint8), saturation, value)]
    expected = np.asarray(Image.merge("HSV", turned).convert("RGB")).astype(float)
    ours = grey_levels(shift_hue(as_video(image), torch.tensor([32 / 255])))[0]
    difference = np.abs(ours - expected)
    assert difference.mean() <= 1
    assert difference.max() <= 12


def test_grey() -> None:
    # the average of the channels instead of the luma
    image = picture(4)
    expected = np.asarray(Image.fromarray(image).convert("L")).astype(float)
    ours = grey_levels(to_grey(as_video(image)))[0]
    assert np.abs(ours - expected[..., None]).max() <= 1


def test_jitter_runs_in_the_drawn_order_for_each_clip_alone() -> None:
    # a fixed order; a batch whose clips share one order, one factor or one contrast mean; operations at their neutral value run
    clips = [as_video(picture(seed), picture(seed + 50)) for seed in range(24)]
    random = np.random.default_rng(0)
    draws = [
        replace(PLAIN, order=order, brightness=b, contrast=c, saturation=s, hue=h, grey=order[0] == 3 and order[1] == 0)
        for order, (b, c, s, h) in zip(permutations(range(4)), random.uniform(0.6, 1.4, (24, 4)) - [0, 0, 0, 1], strict=True)
    ]
    together = jitter_colours(torch.cat(clips), draws)
    single: list[Callable[[Tensor, VideoDraw], Tensor]] = [
        lambda video, draw: adjust_brightness(video, torch.tensor([draw.brightness])),
        lambda video, draw: adjust_contrast(video, torch.tensor([draw.contrast])),
        lambda video, draw: adjust_saturation(video, torch.tensor([draw.saturation])),
        lambda video, draw: shift_hue(video, torch.tensor([draw.hue])),
    ]
    for result, clip, draw in zip(together, clips, draws, strict=True):
        expected = clip.clone()
        for number in draw.order:
            expected = single[number](expected, draw)
        if draw.grey:
            expected = to_grey(expected)
        torch.testing.assert_close(result, expected[0], rtol=1e-5, atol=1e-6)
    untouched = torch.cat(clips)
    assert torch.equal(jitter_colours(untouched.clone(), [PLAIN] * 24), untouched)


@pytest.mark.parametrize(("size", "new_size"), [(40, 16), (37, 64), (50, 50), (170, 7), (1, 5)])
def test_resizing_is_antialiased_bilinear(size: int, new_size: int) -> None:
    # plain bilinear (aliases when shrinking), half-pixel offsets, weights that do not sum to 1
    matrix = resize_matrix(size, new_size)
    assert matrix.shape == (new_size, size)
    torch.testing.assert_close(matrix.sum(1), torch.ones(new_size))
    line = np.random.default_rng(0).random((1, size)).astype(np.float32)
    expected = np.asarray(Image.fromarray(line, mode="F").resize((new_size, 1), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(matrix.numpy() @ line[0], expected[0], atol=1e-5)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [(3, 10, 20, 26), (0, 0, 30, 39), (29, 38, 1, 1)])
@pytest.mark.parametrize("short_side", [0, 30])
def test_resize_crop_is_resize_then_crop_then_resize(short_side: int, crop: tuple[int, int, int, int], flip: bool) -> None:
    # rows and columns exchanged, the crop taken before the first resize, pixels outside the crop leaking in, flip upside down
    frames = torch.from_numpy(np.stack([picture(seed, 36, 48) for seed in range(2)]))
    ours = resize_crop(frames, crop, 24, short_side=short_side, flip=flip)
    assert ours.shape == (3, 2, 24, 24)
    for number, frame in enumerate(frames.numpy()):
        for channel in range(3):
            image = Image.fromarray(frame[..., channel].astype(np.float32), mode="F")
            if short_side:
                image = image.resize((40, 30), Image.Resampling.BILINEAR)
            top, left, height, width = crop
            image = image.crop((left, top, left + width, top + height)).resize((24, 24), Image.Resampling.BILINEAR)
            expected = np.asarray(image)[:, ::-1] if flip else np.asarray(image)
            np.testing.assert_allclose(ours[channel, number].numpy() * 255, expected, atol=2e-3)


@pytest.mark.parametrize("sigma", [0.1, 0.8, 2.0])
def test_blur_is_a_convolution_with_reflected_edges(sigma: float) -> None:
    # edges padded with zeros or repeated, a kernel of another width, weights that do not sum to 1
    assert (blur_kernel_size(96), blur_kernel_size(112), blur_kernel_size(19)) == (9, 11, 1)
    video = as_video(picture(5, 60, 60)).double().float()
    ours = blur(video.clone(), [sigma])[0, 1, 0].double().numpy()
    size, kernel = 60, 7
    weights = [math.exp(-((tap - 3) ** 2) / (2 * sigma**2)) for tap in range(kernel)]
    weights = [weight / sum(weights) for weight in weights]
    padded = np.pad(video[0, 1, 0].double().numpy(), 3, mode="reflect")
    expected = sum(weights[i] * weights[j] * padded[i : i + size, j : j + size] for i in range(kernel) for j in range(kernel))
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_blur_of_some_clips_only() -> None:
    # a blur of every clip once one is drawn, or with another clip's sigma
    videos = torch.cat([as_video(picture(seed, 60, 60)) for seed in range(3)])
    result = blur(videos.clone(), [0.0, 1.0, 2.0])
    assert torch.equal(result[0], videos[0])
    for clip, sigma in ((1, 1.0), (2, 2.0)):
        matrix = blur_matrix(60, 7, sigma)
        torch.testing.assert_close(result[clip], matrix @ videos[clip] @ matrix.T)
    assert torch.equal(blur(videos, [0.0] * 3), videos)


def by_hand(clip: Tensor, draw: VideoDraw, frames: int, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """A video view, step by step."""
    video = resize_crop(clip[draw.start : draw.start + frames], draw.crop, size, short_side=30, flip=draw.flip)[None]
    video = blur(jitter_colours(video, [draw]), [draw.blur_sigma])[0]
    return torch.stack([(channel - m) / s for channel, m, s in zip(video, mean, std, strict=True)])


def test_video_views() -> None:
    # a view that starts at the wrong frame, is normalised by another channel's mean, or depends on its neighbours in the batch
    clips = [torch.from_numpy(np.stack([picture(10 * n + t, 36, 48 + 4 * n) for t in range(12)])) for n in range(3)]
    draws = [
        VideoDraw(4, (2, 3, 20, 24), True, (3, 1, 0, 2), 1.2, 0.7, 1.3, 0.1, False, 1.5),
        VideoDraw(0, (0, 5, 30, 30), False, (0, 1, 2, 3), 0.8, 1.1, 0.6, -0.2, True, 0.0),
        VideoDraw(3, (9, 0, 10, 40), True, (2, 1, 3, 0), 1.0, 1.0, 1.0, 0.0, False, 0.4),
    ]
    statistics = {"pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.2, 0.3, 0.4)}
    arguments = {"frames": 8, "size": 40, "short_side": 30, **statistics}
    out = torch.full((3, 3, 8, 40, 40), float("nan"))
    assert video_views(clips, draws, out=out, **arguments) is out
    for result, clip, draw in zip(out, clips, draws, strict=True):
        expected = by_hand(clip, draw, 8, 40, *statistics.values())
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        alone = video_views([clip], [draw], **arguments)
        torch.testing.assert_close(result, alone[0], rtol=1e-5, atol=1e-6)


def test_passes_of_a_long_clip_change_nothing() -> None:
    # the clip's colours are worked on a few frames at a time: a frame left out, or done twice
    size = 112
    frames = 3 * (PIXELS_PER_PASS // size**2) + 1
    clip = torch.from_numpy(np.stack([picture(t, size, size) for t in range(frames)]))
    draw = replace(PLAIN, crop=(0, 0, size, size), brightness=1.3, contrast=0.6, hue=0.15, order=(1, 3, 0, 2))
    ours = video_views([clip], [draw], frames=frames, size=size, short_side=0, pixel_mean=(0, 0, 0), pixel_std=(1, 1, 1))
    whole = jitter_colours(resize_crop(clip, draw.crop, size)[None], [draw])
    torch.testing.assert_close(ours, whole)


@pytest.mark.parametrize("seed", range(4))
def test_views_are_pils_pictures(seed: int) -> None:
    """Red if a stage is left out, comes at another place or means something else than in PIL, which rounds after each.

    Short side, crop, resize, flip, then brightness, contrast, saturation and grey of 8-bit images; PIL's hue is too coarse for
    this (see above) and its Gaussian blur is another one.
    """
    random = np.random.default_rng(seed)
    frames = [picture(100 * seed + number, 128, 170) for number in range(4)]
    brightness, contrast, saturation = random.uniform(0.6, 1.4, 3)
    order = tuple(int(number) for number in random.permutation(4))
    crop = (int(random.integers(20)), int(random.integers(30)), 85, 96)
    draw = VideoDraw(0, crop, bool(seed % 2), order, brightness, contrast, saturation, 0.0, seed == 3, 0.0)
    unscaled = {"pixel_mean": (0.0, 0.0, 0.0), "pixel_std": (1.0, 1.0, 1.0)}
    clip = torch.from_numpy(np.stack(frames))
    ours = grey_levels(video_views([clip], [draw], frames=4, size=112, short_side=112, **unscaled))
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for frame, result in zip(frames, ours, strict=True):
        image = Image.fromarray(frame).resize((148, 112), Image.Resampling.BILINEAR)
        top, left, height, width = crop
        image = image.crop((left, top, left + width, top + height)).resize((112, 112), Image.Resampling.BILINEAR)
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.flip else image
        for number in order:
            if number < 3:
                image = enhancers[number](image).enhance((brightness, contrast, saturation)[number])
        image = image.convert("L").convert("RGB") if draw.grey else image
        difference = result - np.asarray(image).astype(float)
        assert 0 <= difference.mean() <= 1.5  # half a level for each of three enhancers, which truncate
        assert np.quantile(np.abs(difference - difference.mean()), 0.95) <= 2
        assert np.abs(difference).max() <= 4.5


def cubic(distance: float) -> float:
    """Keys' kernel with a = −0.75."""
    d = abs(distance)
    if d <= 1:
        return 1.25 * d**3 - 2.25 * d**2 + 1
    return -0.75 * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


@pytest.mark.parametrize("crop", [(0, 0, 8, 18), (1, 5, 7, 9), (0, 2, 5, 7)])
def test_spectrogram_crop_by_hand(crop: tuple[int, int, int, int]) -> None:
    # spectrogram at the canvas's edge rather than its middle, align_corners off, bilinear, time and mel exchanged
    spectrogram = torch.randn(8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = crop_spectrogram(spectrogram, crop, (8, 18)).numpy()
    canvas = np.zeros((8, 18))
    canvas[:, 3:15] = spectrogram.numpy()
    top, left, height, width = crop
    window = canvas[top : top + height, left : left + width]

    def along(length: int, new_length: int) -> NDArray[np.float64]:
        matrix = np.zeros((new_length, length))
        for place in range(new_length):
            source = place * (length - 1) / (new_length - 1)
            for tap in range(math.floor(source) - 1, math.floor(source) + 3):
                matrix[place, min(max(tap, 0), length - 1)] += cubic(source - tap)
        return matrix

    np.testing.assert_allclose(ours, along(height, 8) @ window @ along(width, 12).T, atol=1e-10)


def test_spectrogram_crop_of_the_same_size_is_the_spectrogram() -> None:
    spectrogram = torch.randn(8, 12)
    torch.testing.assert_close(crop_spectrogram(spectrogram, (0, 3, 8, 12), (8, 18)), spectrogram)


def test_local_audio_is_cut_and_scaled() -> None:
    # another second of the clip, or the volume applied after the log
    waveform = torch.arange(1000.0)
    assert torch.equal(cut_audio(waveform, AudioDraw(300, 0.5, None), 100), torch.arange(300.0, 400.0) * 0.5)


def test_all_views_of_a_batch() -> None:
    # views filled from another clip or draw, rows of the batch left unwritten, local views that share a draw
    shape = ViewShape(
        8.0,
        16000,
        32000,
        8000,
        VideoOptions(frames=16, size=32, local_views=2, local_frames=4, local_size=16, patch_size=16),
        AudioOptions(mel_bins=16, frames=64, local_views=2, local_frames=16),
    )
    options, mel = AugmentOptions(), MelOptions(hop=480)
    maker = ViewMaker(shape, options, mel)
    videos = [torch.from_numpy(np.stack([picture(100 * n + t, 36, 48) for t in range(16)])) for n in range(3)]
    waveforms = [torch.randn(32000, generator=torch.Generator().manual_seed(n)) * 0.1 for n in range(3)]
    draws = [clip_draw(0, 0, sample, ClipShape(40, 80_000, 36, 48), shape, options) for sample in range(3)]
    views = maker.empty(4)
    for tensor in (views.video_global, views.audio_global, *views.video_locals, *views.audio_locals):
        tensor.fill_(float("nan"))
    maker.fill(views, slice(0, 1), videos[:1], waveforms[:1], draws[:1])
    maker.fill(views, slice(1, 3), videos[1:], waveforms[1:], draws[1:])
    front_end = LogMel(mel, 16, 16000)
    video = {"pixel_mean": shape.video.pixel_mean, "pixel_std": shape.video.pixel_std, "short_side": 32}
    for row in range(3):
        one, draw = [videos[row]], draws[row]
        expected = video_views(one, [draw.video_global], frames=16, size=32, **video)[0]
        torch.testing.assert_close(views.video_global[row], expected)
        heard = cut_audio(waveforms[row], draw.audio_global, 32000)
        torch.testing.assert_close(views.audio_global[row], front_end(heard[None], 64))
        for n in range(2):
            expected = video_views(one, [draw.video_locals[n]], frames=4, size=16, **video)[0]
            torch.testing.assert_close(views.video_locals[n][row], expected)
            heard = front_end(cut_audio(waveforms[row], draw.audio_locals[n], 8000)[None], 16)[0]
            crop = draw.audio_locals[n].crop
            assert crop is not None
            torch.testing.assert_close(views.audio_locals[n][row, 0], crop_spectrogram(heard, crop, (16, 24)))
    for tensor in (views.video_global, views.audio_global, *views.video_locals, *views.audio_locals):
        assert tensor[:3].isfinite().all()
        assert tensor[3].isnan().all()
    assert not torch.equal(views.video_locals[0][:3], views.video_locals[1][:3])


def test_plain_views_are_the_centre_square() -> None:
    # frozen features from a corner, from a stretched frame or from an augmented clip
    unscaled = {"pixel_mean": (0.0, 0.0, 0.0), "pixel_std": (1.0, 1.0, 1.0)}
    video = VideoOptions(frames=4, size=32, local_frames=4, local_size=32, **unscaled)
    shape = ViewShape(8.0, 16000, 16000, 8000, video, AudioOptions(frames=112))
    frames = np.zeros((4, 64, 100, 3), np.uint8)
    frames[:, :, 18:82] = 255  # the centre square is white, what lies beside it black
    draw = plain_draw(ClipShape(4, 16000, 64, 100), shape, 0)
    maker = ViewMaker(shape, AugmentOptions(), MelOptions())
    views = maker.empty(1, local_views=False)
    assert views.video_locals == views.audio_locals == []
    maker.fill(views, slice(0, 1), [torch.from_numpy(frames)], [torch.zeros(16000)], [draw])
    assert views.video_global[..., 1:-1].min() > 0.999
    assert views.video_global.min() > 0.7


def test_grey_weights_sum_to_one() -> None:
    # white must stay white
    torch.testing.assert_close(grey_of(torch.ones(1, 3, 1, 2, 2)), torch.ones(1, 1, 1, 2, 2))
