"""The compiled pass that makes video views, against PyTorch's operators, whose meaning `test_augment` tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xkd_fast.data.augment import ViewMaker, video_views, view_backend
from xkd_fast.data.log_mel import MelOptions
from xkd_fast.data.native_view import obstacle
from xkd_fast.data.views import AugmentOptions, VideoDraw, ViewShape, short_side_size
from xkd_fast.model.options import AudioOptions, VideoOptions

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
UNSCALED = {"pixel_mean": (0.0, 0.0, 0.0), "pixel_std": (1.0, 1.0, 1.0)}
IMAGENET = {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}
PLAIN = VideoDraw(0, (0, 0, 24, 24), False, (0, 1, 2, 3), 1.0, 1.0, 1.0, 0.0, False, 0.0)
LEVEL = 1 / 255

needs_library = pytest.mark.skipif(obstacle(CPU) is not None, reason=str(obstacle(CPU)))


def clip_of(seed: int, frames: int, height: int, width: int) -> Tensor:
    """Noise with black, white and pure stretches: [frames, height, width, 3] uint8."""
    generator = torch.Generator().manual_seed(seed)
    clip = torch.randint(256, (frames, height, width, 3), dtype=torch.uint8, generator=generator)
    clip[:, : height // 4] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    clip[:, :, : width // 5] = 255 * (seed % 2)
    return clip


def both(
    clip: Tensor, draw: VideoDraw, frames: int, size: int, short_side: int, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A view by the compiled pass and by PyTorch's operators; into ``out`` and a tensor like it, where given."""
    statistics = UNSCALED if out is not None and out.dtype == torch.uint8 else IMAGENET
    arguments = {"frames": frames, "size": size, "short_side": short_side, **statistics}
    other = None if out is None else torch.empty_like(out)
    native = video_views([clip], [draw], out=out, backend="native", **arguments)
    return native, video_views([clip], [draw], out=other, backend="torch", **arguments)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, VideoDraw, int, int, int]:
    """A clip of any shape and any draw that fits it."""
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    size, short_side = draw(st.integers(1, 50)), draw(st.sampled_from([0, 0, 5, 17, 40]))
    resized = short_side_size(height, width, short_side) if short_side else (height, width)
    if min(resized) < 1:
        short_side, resized = 0, (height, width)
    crop_height, crop_width = draw(st.integers(1, resized[0])), draw(st.integers(1, resized[1]))
    top, left = draw(st.integers(0, resized[0] - crop_height)), draw(st.integers(0, resized[1] - crop_width))
    frames, start = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    factors = [draw(st.sampled_from([1.0, 1.0, 0.0, 0.6, 1.4, 0.93])) for _ in range(3)]
    hue = draw(st.sampled_from([0.0, 0.0, -0.5, 0.5, -0.2, 0.2, 0.07]))
    order, sigma = draw(st.sampled_from(list(permutations(range(4))))), draw(st.sampled_from([0.0, 0.0, 0.1, 0.8, 2.0]))
    drawn = VideoDraw(
        start, (top, left, crop_height, crop_width), draw(st.booleans()), order, *factors, hue, draw(st.booleans()), sigma
    )
    return clip_of(draw(st.integers(0, 9)), start + frames, height, width), drawn, frames, size, short_side


@needs_library
@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(["contiguous", "slice of a larger frame", "channels first", "every other frame"]))
def test_it_makes_pytorchs_numbers(case: tuple[Tensor, VideoDraw, int, int, int], memory: str) -> None:
    """Red if any step means something else, comes at another place, reads other pixels, or a size or stride goes wrong."""
    clip, draw, frames, size, short_side = case
    if memory == "slice of a larger frame":
        larger = torch.zeros(len(clip), clip.shape[1] + 3, clip.shape[2] + 5, 3, dtype=torch.uint8)
        larger[:, 1:-2, 2:-3] = clip
        clip = larger[:, 1:-2, 2:-3]
    elif memory == "channels first":
        clip = clip.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    elif memory == "every other frame":
        clip = torch.stack([clip, 255 - clip], 1).flatten(0, 1)[::2]
    native, expected = both(clip, draw, frames, size, short_side)
    difference = (native - expected).abs() * 0.229  # in [0, 1]
    assert difference.max() <= 0.1 * LEVEL
    assert difference.mean() <= 0.001 * LEVEL


@needs_library
@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans())
def test_grey_levels_are_pytorchs(case: tuple[Tensor, VideoDraw, int, int, int], channels_last: bool) -> None:
    """Red if grey levels are cut off rather than rounded, wrap round at 0 or 255, or channels-last memory is filled wrongly."""
    clip, draw, frames, size, short_side = case
    out = torch.full((1, 3, frames, size, size), 77, dtype=torch.uint8)
    if channels_last:
        out = out.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    native, by_torch = both(clip, draw, frames, size, short_side, out)
    assert native is out
    numbers = {"frames": frames, "size": size, "short_side": short_side, **UNSCALED}
    exact = video_views([clip], [draw], backend="torch", **numbers) * 255
    for levels in (native, by_torch):  # the nearest whole number; of a half, either
        assert (levels - exact).abs().max() <= 0.5 + 0.03


@needs_library
def test_all_strides_of_a_float_view() -> None:
    """Red if a view inside a larger tensor, or channels last, leaves its place: what lies beside it must stay as it is."""
    clip, draw = clip_of(0, 3, 30, 44), replace(PLAIN, contrast=0.7, hue=0.2, blur_sigma=1.0)
    whole = torch.full((1, 3, 5, 26, 60), float("nan"))
    within = whole[:, :, 1:4, 2:26, 5:53:2]
    native, expected = both(clip, draw, 3, 24, 0, within)
    torch.testing.assert_close(native, expected, rtol=0, atol=1e-4)
    assert whole.isfinite().sum() == within.numel()
    last = torch.empty(1, 3, 24, 24, 3).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(both(clip, draw, 3, 24, 0, last)[0], expected, rtol=0, atol=1e-4)


@needs_library
def test_the_recipes_views() -> None:
    """Red if real sizes lose precision: 112 pixels of 128 × 170, with everything drawn."""
    for seed, order in enumerate(permutations(range(4))):
        clip = clip_of(seed, 4, 128, 170)
        draw = VideoDraw(0, (4, 9, 80, 101), bool(seed % 2), order, 1.3, 0.65, 1.4, 0.19, seed % 5 == 0, 1.7 * (seed % 3 == 0))
        native, expected = both(clip, draw, 4, 112, 112)
        assert (native - expected).abs().max() <= 1e-4
        assert (native - expected).abs().mean() <= 3e-6


@needs_library
def test_calls_at_the_same_time() -> None:
    """Red if calls share memory: the pipeline makes clips in several threads."""
    clips = [clip_of(seed, 8, 64, 80) for seed in range(16)]
    draw = replace(PLAIN, crop=(3, 2, 50, 60), contrast=1.3, hue=0.1, blur_sigma=1.0)

    def make(clip: Tensor) -> Tensor:
        return video_views([clip], [draw], frames=8, size=48, short_side=0, backend="native", **IMAGENET)

    alone = [make(clip) for clip in clips]
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(one, other) for one, other in zip(alone, pool.map(make, clips * 4)))


@needs_library
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crop": (1, 0, 30, 44)}, "leaves its frame of 30 × 44"),
        ({"crop": (0, -1, 3, 3)}, "leaves its frame of 30 × 44"),
        ({"start": 1}, "3 frames from frame 1 on leave their clip of 3"),
        ({"start": -1}, "3 frames from frame -1 on leave their clip of 3"),
    ],
)
def test_nothing_outside_of_a_clip_is_read(change: dict[str, object], words: str) -> None:
    """Red if a draw that does not fit reaches the compiled code, which would read whatever lies there."""
    with pytest.raises(ValueError, match=words):
        both(clip_of(0, 3, 30, 44), replace(PLAIN, **change), 3, 24, 0)


def test_backends_are_taken_at_their_word() -> None:
    """Red if an unknown backend passes for one that is known, or one that cannot run is replaced in silence."""
    assert view_backend(CPU, "torch") == "torch"
    assert view_backend(torch.device("meta")) == "torch"
    with pytest.raises(ValueError, match="'numpy' of video views is not one of auto, native, torch"):
        view_backend(CPU, "numpy")
    with pytest.raises(ValueError, match="cannot run here: it is written for CPUs, not for meta"):
        view_backend(torch.device("meta"), "native")


@needs_library
def test_the_view_maker_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if training goes on by PyTorch's operators though the compiled pass is there."""
    shape = ViewShape(8.0, 16000, 32000, 8000, VideoOptions(), AudioOptions())
    assert ViewMaker(shape, AugmentOptions(), MelOptions()).backend == "native"
    assert ViewMaker(shape, AugmentOptions(), MelOptions(), backend="torch").backend == "torch"


PROGRAM = """
import json, torch, warnings
from xkd_fast.data.augment import video_views
from xkd_fast.data.views import VideoDraw
draw = VideoDraw(0, (0, 0, 8, 8), False, (0, 1, 2, 3), 0.5, 1.0, 1.0, 0.0, False, 0.0)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(2):
        view = video_views([torch.full((1, 8, 8, 3), 255, dtype=torch.uint8)], [draw], frames=1, size=8, short_side=0,
                           pixel_mean=(0, 0, 0), pixel_std=(1, 1, 1))
print(json.dumps([[str(each.message) for each in told], view.mean().item()]))
"""


def test_without_a_library_pytorch_makes_the_same_and_says_so_once(tmp_path: Path) -> None:
    """Red if a missing library is an error, is passed over in silence, or is told of at every clip."""
    environment = {**os.environ, "XKD_NATIVE": str(tmp_path), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    said, mean = json.loads(done.stdout.splitlines()[-1])
    assert mean == pytest.approx(0.5)
    assert len(said) == 1 and "made by PyTorch's operators" in said[0] and "has not been built" in said[0]
