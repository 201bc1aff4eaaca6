"""How views are drawn: every distribution of the released recipe, its bounds and its "off" values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from xkd_fast.data.sampler import clip_draw
from xkd_fast.data.views import (
    DRAWS_PER_VIEW,
    AudioViewOptions,
    AugmentOptions,
    ClipDraw,
    ClipShape,
    MaskNoise,
    VideoDraw,
    VideoViewOptions,
    Views,
    ViewShape,
    draw_audio_view,
    draw_crop,
    draw_video_view,
    integer_below,
    last_start,
    plain_draw,
    short_side_size,
)
from xkd_fast.model.options import AudioOptions, VideoOptions

SHAPE = ViewShape(8.0, 16000, 64000, 16000, VideoOptions(local_views=2), AudioOptions(local_views=2))
STORED = ClipShape(frames=80, samples=160_000, height=128, width=170)
DRAWN = 6000


@pytest.fixture(scope="module")
def draws() -> list[ClipDraw]:
    """The released recipe, drawn for 6 000 clips."""
    return [clip_draw(0, 0, sample, STORED, SHAPE, AugmentOptions()) for sample in range(DRAWN)]


def assert_uniform(values: list[float], low: float, high: float) -> None:
    """All within bounds, and spread evenly: the Kolmogorov-Smirnov distance stays below its 1-in-10⁶ quantile."""
    places = np.sort((np.array(values) - low) / (high - low))
    assert places[0] >= 0
    assert places[-1] <= 1
    steps = np.arange(1, len(places) + 1) / len(places)
    distance = max(np.abs(places - steps).max(), np.abs(places - steps + 1 / len(places)).max())
    assert distance < 2.7 / np.sqrt(len(places)), f"distance {distance:.3f} from uniform in {low} – {high}"


def assert_same_distribution(values: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    """Two samples: the Kolmogorov-Smirnov distance stays below its 1-in-10⁶ quantile."""
    places = np.concatenate([values, expected])
    shares = [np.searchsorted(np.sort(sample), places, side="right") / len(sample) for sample in (values, expected)]
    distance = np.abs(shares[0] - shares[1]).max()
    assert distance < 2.7 * np.sqrt(1 / len(values) + 1 / len(expected)), f"distance {distance:.3f} from what is stated"


def assert_even_places(places: NDArray[np.int64], last: NDArray[np.int64]) -> None:
    """Each of 0 … ``last`` equally often, whatever ``last`` is: a number within its place makes the share uniform."""
    within = np.random.default_rng(1).random(len(places))
    assert_uniform(((places + within) / (last + 1)).tolist(), 0, 1)


def assert_even(values: list[int], expected: range) -> None:
    """All of ``expected`` and nothing else, equally often within 5 standard deviations."""
    counts = Counter(values)
    assert set(counts) == set(expected)
    mean = len(values) / len(expected)
    assert max(abs(count - mean) for count in counts.values()) < 5 * np.sqrt(mean) + 1


def assert_rate(flags: list[bool], probability: float) -> None:
    """As often true as the probability says, within 5 standard deviations."""
    assert abs(np.mean(flags) - probability) < 5 * np.sqrt(probability * (1 - probability) / len(flags))


def test_clip_starts_are_uniform_and_the_same_moment(draws: list[ClipDraw]) -> None:
    # a last possible start never drawn; sound from another moment than the picture
    assert_even([draw.start_frame for draw in draws], range(80 - 32 + 1))
    assert all(draw.start_sample == draw.start_frame * 2000 for draw in draws)


@pytest.mark.parametrize(
    ("stored", "last"),
    [
        ((80, 160_000), 48),
        ((32, 64_000), 0),
        ((20, 40_000), 0),  # shorter than the clip
        ((80, 100_000), 18),  # the sound ends first: at frame 50
        ((80, 159_999), 48),  # a sample short of the last frame's end
        ((40, 160_000), 8),
    ],
)
def test_last_start(stored: tuple[int, int], last: int) -> None:
    # clips that run past the end of the video or of its sound
    assert last_start(ClipShape(*stored, 128, 170), SHAPE) == last


def test_local_starts(draws: list[ClipDraw]) -> None:
    # local views outside the clip, off the 100-sample grid, or tied to each other
    assert_even([draw.video_locals[0].start for draw in draws], range(25))
    assert all(draw.video_global.start == 0 and draw.audio_global.start == 0 for draw in draws)
    starts = [draw.audio_locals[0].start for draw in draws]
    assert_even([start // 100 for start in starts], range(481))
    assert all(start % 100 == 0 for start in starts)
    pairs = [
        [draw.video_locals[0].start for draw in draws],
        [draw.video_locals[1].start for draw in draws],
        starts,
        [draw.audio_locals[1].start for draw in draws],
        [draw.start_frame for draw in draws],
    ]
    assert np.abs(np.corrcoef(pairs) - np.eye(5)).max() < 5 / np.sqrt(DRAWN)


def test_volume(draws: list[ClipDraw]) -> None:
    # local's range for global, or the other way round
    assert_uniform([draw.audio_global.volume for draw in draws], 0.9, 1.1)
    assert_uniform([draw.audio_locals[1].volume for draw in draws], 0.8, 1.2)


@pytest.mark.parametrize("view", ["global", "local"])
def test_colours(draws: list[ClipDraw], view: str) -> None:
    # a factor out of 0.6-1.4, hue in degrees or one-sided, an order that is always the same
    views = [draw.video_global if view == "global" else draw.video_locals[0] for draw in draws]
    for field, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.6, 1.4), ("hue", -0.2, 0.2)):
        assert_uniform([getattr(draw, field) for draw in views], low, high)
    orders = list(permutations(range(4)))
    assert_even([orders.index(draw.order) for draw in views], range(24))


def test_flip_grey_and_blur(draws: list[ClipDraw]) -> None:
    # greyscale or blur on global views, or a flip shared by all views of a clip
    assert_rate([draw.video_global.flip for draw in draws], 0.5)
    assert_rate([draw.video_locals[0].flip for draw in draws], 0.5)
    assert_rate([draw.video_global.flip == draw.video_locals[0].flip for draw in draws], 0.5)
    assert not any(draw.video_global.grey or draw.video_global.blur_sigma for draw in draws)
    assert_rate([draw.video_locals[0].grey for draw in draws], 0.2)
    sigmas = [draw.video_locals[0].blur_sigma for draw in draws]
    assert_rate([sigma > 0 for sigma in sigmas], 0.5)
    assert_uniform([sigma for sigma in sigmas if sigma], 0.1, 2.0)


@pytest.mark.parametrize(("view", "area"), [("global", (0.2, 1.0)), ("local", (0.08, 0.4))])
def test_crops(draws: list[ClipDraw], view: str, area: tuple[float, float]) -> None:
    # local areas for global crops; aspect inverted, or uniform rather than log-uniform
    height, width = short_side_size(128, 170, 112)
    assert (height, width) == (112, 148)
    views: list[VideoDraw] = [draw.video_global if view == "global" else draw.video_locals[0] for draw in draws]
    tops, lefts, heights, widths = np.array([draw.crop for draw in views]).T
    assert (tops >= 0).all()
    assert (lefts >= 0).all()
    assert (tops + heights <= height).all()
    assert (lefts + widths <= width).all()
    areas, aspects = heights * widths / (height * width), np.log(widths / heights)
    rounding = 0.03
    assert area[0] - rounding < areas.min() < area[0] + 0.05
    assert area[1] - 0.15 < areas.max() < area[1] + rounding
    assert np.abs(aspects).max() < np.log(4 / 3) + rounding
    if view == "local":  # every try fits, so both are uniform and the place is too
        assert_uniform((areas.clip(*area)).tolist(), *area)
        assert_uniform(aspects.clip(-np.log(4 / 3), np.log(4 / 3)).tolist(), -np.log(4 / 3), np.log(4 / 3))
        assert np.mean(tops / (height - heights)) == pytest.approx(0.5, abs=0.02)
        assert np.mean(lefts / (width - widths)) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("view", "area"), [("global", (0.2, 1.0)), ("local", (0.08, 0.4))])
def test_crops_are_those_of_the_statement(draws: list[ClipDraw], view: str, area: tuple[float, float]) -> None:
    """Red if a crop that does not fit is cut or drawn in another way, or lies anywhere but evenly: global crops often do not.

    Stated once more, without our code: tries until one fits, the area uniform, the aspect log-uniform, the place even.
    """
    random = np.random.default_rng(7)
    stated = []
    while len(stated) < 20_000:
        pixels = 112 * 148 * random.uniform(*area)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        width, height = np.rint(np.sqrt(pixels * aspect)), np.rint(np.sqrt(pixels / aspect))
        if width <= 148 and height <= 112:
            stated.append((height, width))
    expected = np.array(stated)
    views: list[VideoDraw] = [draw.video_global if view == "global" else draw.video_locals[0] for draw in draws]
    tops, lefts, heights, widths = np.array([draw.crop for draw in views]).T
    assert_same_distribution(heights * widths, expected[:, 0] * expected[:, 1])
    assert_same_distribution(widths / heights, expected[:, 1] / expected[:, 0])
    assert_even_places(tops, 112 - heights)
    assert_even_places(lefts, 148 - widths)


@pytest.mark.parametrize("view", ["global", "local"])
def test_choices_of_a_view_are_independent(draws: list[ClipDraw], view: str) -> None:
    """Red if two choices come from one number: a bright clip would then always be a saturated one, or flipped."""
    views: list[VideoDraw] = [draw.video_global if view == "global" else draw.video_locals[0] for draw in draws]
    heard = [draw.audio_global if view == "global" else draw.audio_locals[0] for draw in draws]
    columns = [[getattr(draw, name) for draw in views] for name in ("brightness", "contrast", "saturation", "hue", "flip")]
    columns += [[np.sqrt(draw.crop[2] * draw.crop[3]) for draw in views], [draw.crop[3] / draw.crop[2] for draw in views]]
    columns += [[draw.order.index(0) for draw in views], [draw.volume for draw in heard]]
    if view == "local":
        columns += [[draw.grey for draw in views], [draw.blur_sigma > 0 for draw in views], [draw.start for draw in views]]
        columns.append([draw.start for draw in heard])
    found = np.corrcoef(np.array(columns, np.float64)) - np.eye(len(columns))
    if view == "global":
        found[5, 6] = found[6, 5] = 0  # of crops that fit a wide frame, large ones are wide
    assert np.abs(found).max() < 5 / np.sqrt(DRAWN)


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_crops_lie_in_the_frame(height: int, width: int, area: list[float], aspect: list[float], seed: int) -> None:
    # an empty crop or one that sticks out, at frames as odd as 1 × 300
    numbers = iter(np.random.default_rng(seed).random(40).tolist())
    top, left, crop_height, crop_width = draw_crop(numbers, height, width, (area[0], area[1]), (aspect[0], aspect[1]))
    assert 0 <= top <= top + crop_height <= height
    assert 0 <= left <= left + crop_width <= width
    assert crop_height >= 1
    assert crop_width >= 1


def test_aspect_is_width_over_height() -> None:
    # the released range is symmetric, so an inverted aspect shows only with another one
    numbers = np.random.default_rng(0).random(4000)
    for start in range(0, 4000, 40):
        _, _, height, width = draw_crop(iter(numbers[start:]), 100, 100, (0.1, 0.2), (1.5, 2.0))
        assert 1.4 < width / height < 2.1


def test_crop_that_never_fits_is_the_largest_centred_one() -> None:
    # "off": the centre square of the frame, whatever its aspect
    for height, width, crop in ((100, 180, (0, 40, 100, 100)), (180, 100, (40, 0, 100, 100)), (64, 64, (0, 0, 64, 64))):
        assert draw_crop(iter([0.5] * 40), height, width, (1.0, 1.0), (1.0, 1.0)) == crop
    assert draw_crop(iter([0.5] * 40), 100, 300, (1.0, 1.0), (0.5, 2.0)) == (0, 50, 100, 200)


def test_spectrogram_crops(draws: list[ClipDraw]) -> None:
    # windows beyond the canvas (80 × 168), or sized by the canvas rather than by the spectrogram (80 × 112)
    assert all(draw.audio_global.crop is None for draw in draws)
    tops, lefts, heights, widths = np.array([draw.audio_locals[0].crop for draw in draws]).T
    assert (tops >= 0).all()
    assert (lefts >= 0).all()
    assert (tops + heights <= 80).all()
    assert (lefts + widths <= 168).all()
    assert heights.min() == 48
    assert heights.max() == 80
    assert np.mean(heights == 80) == pytest.approx(0.5 / 0.9, abs=0.04)  # 1.0-1.5 times 80 is cut to the canvas
    assert_even((widths).tolist(), range(67, 168))
    assert_even_places(tops, 80 - heights)
    assert_even_places(lefts, 168 - widths)
    shorter = heights[heights < 80]  # a factor of 0.6-1 times 80, truncated
    assert_even(shorter.tolist(), range(48, 80))


def test_off_values() -> None:
    # an option whose "off" value still changes the view
    still = VideoViewOptions((1.0, 1.0), (1.0, 1.0), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    quiet = AudioViewOptions(0.0, (1.0, 1.0), (1.0, 1.0))
    options = AugmentOptions(True, still, still, quiet, quiet)
    draw = clip_draw(0, 0, 0, STORED, SHAPE, options)
    plain = plain_draw(STORED, SHAPE, draw.start_frame)
    assert plain.video_global.crop == (0, 18, 112, 112) == draw.video_global.crop
    neutral = (False, 1.0, 1.0, 1.0, 0.0, False, 0.0)
    for view in (draw.video_global, *draw.video_locals, plain.video_global):
        assert (view.flip, view.brightness, view.contrast, view.saturation, view.hue, view.grey, view.blur_sigma) == neutral
    for heard in (draw.audio_global, *draw.audio_locals):
        assert (heard.volume, heard.crop) == (1.0, None)
    assert (plain.start_sample, plain.audio_global) == (draw.start_sample, draw.audio_global)


def test_a_view_takes_no_more_numbers_than_are_set_aside_for_it() -> None:
    """Red if a new choice runs out of numbers, or the comment on ``DRAWS_PER_VIEW`` counts wrongly."""

    def taken(view: Callable[[Iterator[float]], object]) -> int:
        numbers = iter([0.5] * 1000)
        view(numbers)
        return 1000 - len(list(numbers))

    never_fits = VideoViewOptions(crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0), blur=1.0)
    cropped = AudioViewOptions(crop_canvas=(1.0, 1.5))
    assert taken(lambda numbers: draw_video_view(numbers, never_fits, 100, 300, 32, 8)) == 40 + 12 <= DRAWS_PER_VIEW
    assert taken(lambda numbers: draw_audio_view(numbers, cropped, 80, 112, 64000, 16000, 100)) == 6 <= DRAWS_PER_VIEW


def test_views_do_not_move_each_other() -> None:
    # one more local view, or other options of one view, must not redraw the rest of the clip
    def drawn(local_views: int, options: AugmentOptions) -> ClipDraw:
        shape = ViewShape(8.0, 16000, 64000, 16000, VideoOptions(local_views=local_views), AudioOptions())
        return clip_draw(0, 0, 0, STORED, shape, options)

    usual = drawn(1, AugmentOptions())
    more = drawn(3, AugmentOptions())
    assert replace(more, video_locals=more.video_locals[:1]) == usual
    assert len(set(more.video_locals)) == 3
    blurred = drawn(1, AugmentOptions(video_global=VideoViewOptions(crop_area=(0.9, 1.0), crop_aspect=(0.5, 0.6), blur=1.0)))
    assert (blurred.audio_global, blurred.video_locals, blurred.audio_locals) == (
        usual.audio_global,
        usual.video_locals,
        usual.audio_locals,
    )


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 10_000))
@settings(max_examples=100, deadline=None)
def test_integers_stay_below_their_count(u: float, count: int) -> None:
    assert 0 <= integer_below(u, count) < count


def test_short_side_size() -> None:
    # the long side rounded up, or the wrong side resized
    assert short_side_size(128, 170, 112) == (112, 148)
    assert short_side_size(170, 128, 112) == (148, 112)
    assert short_side_size(112, 112, 112) == (112, 112)
    assert short_side_size(96, 128, 112) == (112, 149)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VideoViewOptions(crop_area=(0.0, 1.0)), r"crop_area = \[0, 1\]"),
        (lambda: VideoViewOptions(crop_area=(0.5, 1.5)), r"crop_area = \[0.5, 1.5\].*<= 1"),
        (lambda: VideoViewOptions(crop_aspect=(2.0, 1.0)), r"crop_aspect = \[2, 1\]"),
        (lambda: VideoViewOptions(flip=1.5), "flip = 1.5 must lie in 0-1"),
        (lambda: VideoViewOptions(flip=float("nan")), "flip = nan must lie in 0-1"),
        (lambda: VideoViewOptions(hue=0.6), "hue = 0.6 must lie in 0-0.5"),
        (lambda: VideoViewOptions(blur_sigma=(0.0, 2.0)), r"blur_sigma = \[0, 2\]"),
        (lambda: AudioViewOptions(volume=1.0), "volume = 1.0"),
        (lambda: AudioViewOptions(crop_canvas=(0.9, 1.5)), r"crop_canvas = \[0.9, 1.5\]"),
        (lambda: AudioViewOptions(crop_scale=(1.5, 0.6)), r"crop_scale = \[1.5, 0.6\]"),
        (lambda: AugmentOptions(audio_start_step=0), "augment.audio_start_step = 0"),
        (lambda: VideoOptions(pixel_std=(0.2, 0.0, 0.2)), r"model.video.pixel_std = \[0.2, 0.0, 0.2\]"),
    ],
)
def test_bad_options_name_value_and_rule(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_defaults_are_the_released_recipe() -> None:
    # XKD.md section 9, value by value
    options = AugmentOptions()
    video = {"crop_aspect": (0.75, 4 / 3), "flip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2}
    assert vars(options.video_global) == {**video, "crop_area": (0.2, 1.0), "greyscale": 0, "blur": 0, "blur_sigma": (0.1, 2.0)}
    assert vars(options.video_local) == {
        **video,
        "crop_area": (0.08, 0.4),
        "greyscale": 0.2,
        "blur": 0.5,
        "blur_sigma": (0.1, 2.0),
    }
    assert vars(options.audio_global) == {"volume": 0.1, "crop_canvas": (1.0, 1.0), "crop_scale": (1.0, 1.0)}
    assert vars(options.audio_local) == {"volume": 0.2, "crop_canvas": (1.0, 1.5), "crop_scale": (0.6, 1.5)}
    assert options.audio_start_step == 100
    assert (VideoOptions().pixel_mean, VideoOptions().pixel_std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_views_move_as_one() -> None:
    # a view, or the labels, left behind in another type or on another device
    views = Views(torch.zeros(2, 3, 4, 8, 8), torch.zeros(2, 1, 4, 4), [torch.zeros(2, 3, 2, 4, 4)], [torch.zeros(2, 1, 4, 2)])
    views.keys, views.labels = ["a", "b"], torch.tensor([1, -1])
    moved = views.map(lambda tensor: tensor + 1)
    assert moved.batch_size == 2
    tensors = [moved.video_global, moved.audio_global, *moved.video_locals, *moved.audio_locals]
    assert all((tensor == 1).all() for tensor in tensors)
    assert moved.keys == ["a", "b"]
    assert moved.labels is not None
    assert moved.labels.tolist() == [2, 0]
    noise = MaskNoise(torch.rand(2, 4), torch.rand(2, 3)).to("meta")
    assert noise.video.device.type == noise.audio.device.type == "meta"
