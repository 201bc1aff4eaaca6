"""A small set of real clips, written as shards, and pipelines over it: what the tests of the data share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xkd_fast.data.clip_options import ClipOptions
from xkd_fast.data.encode import encode_flac, encode_video
from xkd_fast.data.log_mel import MelOptions
from xkd_fast.data.pipeline import ViewPipeline
from xkd_fast.data.shards import FORMAT, MANIFEST, NewSample, ShardSet, ShardWriter
from xkd_fast.data.views import AudioViewOptions, AugmentOptions, MaskNoise, VideoViewOptions, Views
from xkd_fast.model.options import AudioOptions, ModelOptions, VideoOptions

FPS, RATE, FRAMES = 8, 16000, 8  # a clip is one second
UNSCALED = {"pixel_mean": (0.0, 0.0, 0.0), "pixel_std": (1.0, 1.0, 1.0)}
MODEL = ModelOptions(
    video=VideoOptions(
        frames=FRAMES, size=32, local_views=2, local_frames=4, local_size=16, patch_size=8, mask_ratio=0.5, **UNSCALED
    ),
    audio=AudioOptions(mel_bins=16, frames=64, local_views=1, local_frames=16, mask_ratio=0.5),
)
MEL = MelOptions(hop=250)
DATA = ClipOptions(fps=FPS, sample_rate=RATE, clip_seconds=1.0, local_audio_seconds=0.25, threads=2, prefetch=2)
STILL = VideoViewOptions((1.0, 1.0), (1.0, 1.0), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
QUIET = AudioViewOptions(0.0, (1.0, 1.0), (1.0, 1.0))
PLAIN = AugmentOptions(True, STILL, STILL, QUIET, QUIET)
SAMPLES = 12
CLIP_FIELDS = ("on_corrupt", "threads", "prefetch", "clips_per_file", "decode", "order")


def length_of(sample: int) -> int:
    """Frames of a test sample: 1 to 2 s, but for number 5, which is shorter than a clip."""
    return 5 if sample == 5 else 9 + sample % 8


def make_pictures(sample: int) -> NDArray[np.uint8]:
    """Frames [T, H, W, 3]; frame t is about 10·t + 20 grey, with a coloured pattern that tells the samples apart."""
    height, width = ((36, 48), (48, 36), (36, 36))[sample % 3]
    y, x = np.mgrid[:height, :width]
    time = np.arange(length_of(sample))[:, None, None, None] * 10
    pattern = np.stack([np.sin(x / 9 + sample), np.cos(y / 7), np.sin((x + y) / 11 + sample)], -1) * 15
    return (time + 35 + pattern).clip(0, 255).astype(np.uint8)


def make_sound(sample: int) -> NDArray[np.int16]:
    """A tone [samples] whose loudness steps up with every frame."""
    place = np.arange(length_of(sample) * RATE // FPS)
    loudness = 0.02 + 0.05 * (place * FPS // RATE)
    return (np.sin(place * (0.1 + 0.02 * sample)) * loudness * 32767).clip(-32768, 32767).astype(np.int16)


def write_shards(
    path: Path, change: Callable[[int, NewSample], NewSample] = lambda _, s: s, codec: str = "mjpeg", **manifest: Any
) -> Path:
    """The test samples as two shards; ``change`` may alter a sample before it is stored."""
    path.mkdir()
    entries = []
    for shard in range(2):
        writer = ShardWriter(path, f"shard-{shard:06d}", codec)
        for sample in range(shard, SAMPLES, 2):
            pictures, sound = make_pictures(sample), make_sound(sample)
            video, audio = encode_video(pictures, codec, FPS, 2), encode_flac(sound, RATE)
            height, width = pictures.shape[1:3]
            new = NewSample(f"clip{sample}", sample % 3, video, audio, len(pictures), len(sound), height, width)
            writer.add(change(sample, new))
        writer.close()
        entries.append({"name": writer.path.name, "samples": SAMPLES // 2, "bytes": writer.path.stat().st_size})
    usual = {"format": FORMAT, "codec": codec, "fps": FPS, "sample_rate": RATE, "classes": ["a", "b", "c"], "shards": entries}
    (path / MANIFEST).write_text(json.dumps({**usual, **manifest}))
    return path


def make(shards: ShardSet, augment: AugmentOptions | None = None, **changed: Any) -> ViewPipeline:
    """A pipeline over test shards."""
    data = replace(DATA, **{name: changed.pop(name) for name in CLIP_FIELDS if name in changed})
    return ViewPipeline(shards, MODEL, augment or AugmentOptions(), MEL, data, **{"seed": 3, "micro_batch": 4, **changed})


def number_of(key: str) -> int:
    return int(key.removeprefix("clip"))


def tensors_of(views: Views, noise: MaskNoise) -> list[Tensor]:
    locals_ = [*views.video_locals, *views.audio_locals]
    assert views.labels is not None
    return [views.video_global, views.audio_global, *locals_, views.labels, noise.video, noise.audio]


def assert_same(ours: tuple[Views, MaskNoise], theirs: tuple[Views, MaskNoise]) -> None:
    """Equal to the last bit."""
    assert ours[0].keys == theirs[0].keys
    for one, other in zip(tensors_of(*ours), tensors_of(*theirs), strict=True):
        assert torch.equal(one, other)


def damage(path: Path, sample: str, part: str) -> None:
    """Flip a bit in the stored bytes of a sample."""
    for index in path.glob("*.index.json"):
        for row in json.loads(index.read_text())["samples"]:
            if row["key"] == sample:
                tar = index.with_name(index.name.replace(".index.json", ".tar"))
                with open(tar, "r+b") as file:
                    file.seek(row[part][0] + row[part][1] // 2)
                    byte = file.read(1)[0]
                    file.seek(-1, os.SEEK_CUR)
                    file.write(bytes([byte ^ 16]))
                return
    raise AssertionError(sample)


def epoch_of(pipeline: ViewPipeline, epoch: int) -> list[tuple[Views, MaskNoise]]:
    return [pipeline.batch(epoch, step) for step in range(pipeline.sampler.steps_per_epoch)]


GARBAGE = np.random.default_rng(0).integers(0, 256, 4000, np.uint8).tobytes()
