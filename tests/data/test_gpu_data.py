"""Decoding and augmentation on a GPU beside the CPU's: the same draws give the same views, for every codec."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.data.clip_shards import FPS, GARBAGE, PLAIN, assert_same, damage, make, make_pictures, tensors_of, write_shards
from xkd_fast.data.encode import encode_video
from xkd_fast.data.pipeline import ViewPipeline
from xkd_fast.data.shards import NewSample, ShardSet
from xkd_fast.data.video_codecs import CODECS
from xkd_fast.data.views import AugmentOptions, MaskNoise, Views

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda", 0)
ENGINES = [codec for codec, about in CODECS.items() if about.engine]
BOTH = [codec for codec in ENGINES if CODECS[codec].on_cpu]
# Of pixels in [0, 1]: what NVDEC and nvJPEG round otherwise than FFmpeg and libjpeg-turbo, before augmentation spreads it.
WORST, MEAN = 9 / 255, 1.5 / 255


def written(path: Path, codec: str, garbage: int | None = None) -> Path:
    """The test samples at four times their size: NVDEC refuses VP9 below 128 pixels a side."""

    def enlarged(sample: int, new: NewSample) -> NewSample:
        pictures = make_pictures(sample).repeat(4, axis=1).repeat(4, axis=2)
        video = GARBAGE if sample == garbage else encode_video(list(pictures), codec, FPS, 2)
        return replace(new, video=video, height=4 * new.height, width=4 * new.width)

    return write_shards(path, enlarged, codec)


def opened(path: Path, codec: str) -> ShardSet:
    return ShardSet.open(written(path / codec, codec))


def on_cpu(batch: tuple[Views, MaskNoise]) -> tuple[Views, MaskNoise]:
    return batch[0].to("cpu"), batch[1].to("cpu")


def gpu_pipeline(shards: ShardSet, augment: AugmentOptions = PLAIN, **changed: object) -> ViewPipeline:
    return make(shards, augment, device=GPU, **{"decode": "gpu", **changed})


def assert_close(ours: tuple[Views, MaskNoise], theirs: tuple[Views, MaskNoise], worst: float, mean: float) -> None:
    """Pictures within rounding, sound within float32's, draws and labels the same."""
    (views, noise), (other, other_noise) = on_cpu(ours), theirs
    assert views.keys == other.keys and torch.equal(views.labels, other.labels)  # type: ignore[arg-type]
    assert torch.equal(noise.video, other_noise.video) and torch.equal(noise.audio, other_noise.audio)
    pictures = zip([views.video_global, *views.video_locals], [other.video_global, *other.video_locals], strict=True)
    for one, another in pictures:
        assert (one - another).abs().max() < worst and (one - another).abs().mean() < mean
    for one, another in zip([views.audio_global, *views.audio_locals], [other.audio_global, *other.audio_locals], strict=True):
        torch.testing.assert_close(one, another, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("codec", BOTH)
def test_pictures_are_the_cpus(codec: str, tmp_path: Path) -> None:
    """Red if a GPU gives another frame, range or colour matrix, or sound of another moment."""
    shards = opened(tmp_path, codec)
    with gpu_pipeline(shards) as ours, make(shards, PLAIN) as theirs:
        assert ours.decoding.device == GPU
        for step in range(3):
            batch = ours.batch(1, step)
            assert all(tensor.is_cuda for tensor in tensors_of(*batch))
            assert_close(batch, theirs.batch(1, step), WORST, MEAN)


def test_h264_is_decoded(tmp_path: Path) -> None:
    """Red if NVDEC gives other frames than the mjpeg shards of the same clips hold."""
    shards = opened(tmp_path, "h264")
    usual = opened(tmp_path, "mjpeg")
    with gpu_pipeline(shards) as ours, make(usual, PLAIN) as theirs:
        for step in range(3):
            assert_close(ours.batch(0, step), theirs.batch(0, step), 40 / 255, 4 / 255)


def test_augmentation_is_the_cpus(tmp_path: Path) -> None:
    """Red if a draw means something else on a GPU; decoded on the CPU, so that pixels are the same before it."""
    shards = opened(tmp_path, "mjpeg")
    with gpu_pipeline(shards, AugmentOptions(), decode="cpu") as ours, make(shards) as theirs:
        for step in range(3):
            assert_close(ours.batch(2, step), theirs.batch(2, step), 5e-3, 1e-4)


@pytest.mark.parametrize("codec", ENGINES)
def test_damage_on_a_gpu(codec: str, tmp_path: Path) -> None:
    """Red if a stream that the engines refuse ends the run, takes its neighbours with it, or is not listed."""
    path = written(tmp_path / "hurt", codec, garbage=8)
    damage(path, "clip4", "video")
    with gpu_pipeline(ShardSet.open(path)) as pipeline, gpu_pipeline(opened(tmp_path, codec)) as whole:
        for step in range(3):
            (ours, _), (theirs, _) = (on_cpu(each.batch(0, step)) for each in (pipeline, whole))
            for row, key in enumerate(theirs.keys):
                assert (ours.keys[row] == key) == (key not in ("clip8", "clip4"))
                if ours.keys[row] == key:  # not to the bit: which JPEGs go to the engine depends on the batch
                    error = (ours.video_global[row] - theirs.video_global[row]).abs()
                    assert error.max() < WORST and error.mean() < MEAN
        assert {each.key for each in pipeline.damaged} == {"clip8", "clip4"}


@pytest.mark.parametrize("codec", ENGINES)
def test_made_ahead_is_what_is_made_now(codec: str, tmp_path: Path) -> None:
    """Red if a batch is used before it is made, or its memory is given to a later one while the step still reads it."""
    shards = opened(tmp_path, codec)
    with gpu_pipeline(shards, clips_per_file=2) as pipeline, gpu_pipeline(shards, clips_per_file=2) as now:
        steps = pipeline.sampler.steps_per_epoch
        kept = []
        for place, batch in enumerate(itertools.islice(pipeline.batches(), 3 * steps)):
            busy = torch.ones(2048, 2048, device=GPU)
            for _ in range(20):
                busy = busy @ busy * 1e-4  # the step is behind with its work when the batch is read
            kept.append((place, (batch[0].map(torch.clone), batch[1].map(torch.clone))))
            del batch
        torch.cuda.synchronize()
        for place, batch in kept:
            assert_same(on_cpu((replace(batch[0]), batch[1])), on_cpu(now.batch(*divmod(place, steps))))
