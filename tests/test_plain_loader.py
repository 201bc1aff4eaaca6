"""The plain DataLoader that `benchmarks/test_data.py` measures against makes the views that we make: it leaves nothing out.

Its views and ours are made of the same decoded frames and sound by the same draws, so that only float32 lies between them.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from benchmarks import media, plain_loader
from benchmarks.originals import pyav_frames, pyav_sound
from benchmarks.test_data import stored_shape
from xkd_fast.config import Config, load_config
from xkd_fast.data.augment import ViewMaker
from xkd_fast.data.clip_options import view_shape
from xkd_fast.data.sampler import clip_draw
from xkd_fast.data.views import ViewShape

DRAWS, FILES = 12, 2
# Normalised units, of which a grey level is 0.017 and a hundredth of a volume 0.0045. Rounding in float32, each side in its own
# order, comes to 3e-5 at most (base recipe, 20 clips, pictures by the compiled pass and by PyTorch's operators).
TOLERANCE = 1e-3
KIND = replace(media.TINY, seconds=6.0)  # more than a clip, so that clips begin anywhere


@pytest.fixture(scope="module")
def config() -> Config:
    """The released recipe."""
    return load_config("xkd_base_k400", ["data.train=[sources]"])


def small_shape(config: Config) -> ViewShape:
    """The recipe's with fewer, smaller pictures; every stage stays."""
    shape = view_shape(config.data, config.model)
    return replace(shape, video=replace(shape.video, frames=8, size=48, local_frames=4, local_size=32))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files with picture and sound."""
    return media.write_sources(tmp_path_factory.mktemp("sources"), KIND, FILES)


def dataset(module: ModuleType, config: Config, sources: list[Path]) -> plain_loader.PlainDataset:
    """The yardstick's, of a module that may have been edited."""
    return module.PlainDataset(sources, stored_shape(KIND), small_shape(config), config.augment, config.mel, clips=DRAWS)


@pytest.fixture(scope="module")
def ours(config: Config, sources: list[Path]) -> list[list[Tensor]]:
    """Our views of every clip, decoded as the yardstick decodes it."""
    shape, found = small_shape(config), []
    maker = ViewMaker(shape, config.augment, config.mel)
    for number in range(DRAWS):
        place, epoch = number % FILES, number // FILES
        draw = clip_draw(0, epoch, place, stored_shape(KIND), shape, config.augment)
        start = draw.start_frame / shape.fps
        frames = torch.from_numpy(pyav_frames(sources[place], start, shape.video.frames, shape.fps))
        sound = torch.from_numpy(pyav_sound(sources[place], start, shape.clip_samples, shape.sample_rate))
        views = maker.empty(1)
        maker.fill(views, slice(0, 1), [frames], [sound], [draw])
        tensors = [views.video_global, views.audio_global, *views.video_locals, *views.audio_locals]
        found.append([tensor[0] for tensor in tensors])
    return found


def difference(own: list[Tensor], other: list[Tensor]) -> float:
    """The largest of any view, which must have the same shapes."""
    assert [view.shape for view in own] == [view.shape for view in other]
    return max(float((one - another).abs().max()) for one, another in zip(own, other, strict=True))


def test_the_yardstick_makes_our_views(config: Config, sources: list[Path], ours: list[list[Tensor]]) -> None:
    """Red if the DataLoader's processes do less than we do, or something else."""
    plain = dataset(plain_loader, config, sources)
    for number in range(DRAWS):
        assert difference(ours[number], plain[number]) < TOLERANCE, f"clip {number}"


# What is left out when a stage is, as it would be typed; each key stands once in the module.
STAGES = {
    "short side": {'F.interpolate(video, smaller, mode="bilinear", antialias=True)': "video[:, :, : smaller[0], : smaller[1]]"},
    "crop": {"    video = video[:, :, top : top + crop_height, left : left + crop_width]\n": ""},
    "antialiasing of the crop": {
        '(video, (size, size), mode="bilinear", antialias=True)': '(video, (size, size), mode="bilinear")'
    },
    "flip": {"    if draw.flip:\n        video = video.flip(3)\n": ""},
    "brightness": {"(video * draw.brightness).clamp(0, 1)": "video"},
    "contrast": {"blend(video, grey(video).mean((2, 3), keepdim=True), draw.contrast)": "video"},
    "saturation": {"blend(video, grey(video), draw.saturation)": "video"},
    "hue": {"turn_hue(video, draw.hue)": "video"},
    "order of colours": {"in draw.order:": "in range(4):"},
    "greyscale": {"    if draw.grey:\n        video = grey(video).expand(-1, 3, -1, -1)\n": ""},
    "blur": {"    if draw.blur_sigma:\n        video = gaussian_blur(video, draw.blur_sigma, size)\n": ""},
    "normalise": {"((video - mean) / std).transpose": "video.transpose"},
    "moment of a local view": {"frames[draw.start : draw.start + count]": "frames[:count]"},
    "volume": {" * draw.volume": ""},
    "moment of a local sound": {"sound[draw.start : draw.start + samples]": "sound[:samples]"},
    "mel": {"bank @ spectrum[:, :frames].abs().square()": "spectrum[: len(bank), :frames].abs().square()"},
    "log": {"(energies + torch.finfo(torch.float32).eps).log()": "energies"},
    "normalise the spectrogram": {"(image - mel.mean) / mel.std": "image"},
    "spectrogram crop": {"    if draw.crop is not None:\n": "    if False:\n"},
}


def edited(edits: dict[str, str]) -> ModuleType:
    """The yardstick's module with changes."""
    text = inspect.getsource(plain_loader)
    for old, new in edits.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    module = ModuleType("edited_plain_loader")
    exec(compile(text, "plain_loader.py", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_left_out_shows(
    stage: str, config: Config, sources: list[Path], ours: list[list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red if the comparison above could not tell that a stage is missing."""
    monkeypatch.setitem(sys.modules, "edited_plain_loader", ModuleType("edited_plain_loader"))  # where dataclasses look
    plain = dataset(edited(STAGES[stage]), config, sources)
    assert any(difference(ours[number], plain[number]) >= TOLERANCE for number in range(DRAWS))
