"""From real shards to views: what a batch holds, at any world size, after any interruption."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.data.clip_shards import (
    DATA,
    FPS,
    FRAMES,
    MEL,
    MODEL,
    PLAIN,
    RATE,
    SAMPLES,
    assert_same,
    make,
    make_sound,
    number_of,
    tensors_of,
    write_shards,
)
from xkd_fast.data.augment import ViewMaker
from xkd_fast.data.clip_options import view_shape
from xkd_fast.data.plain_clips import clips
from xkd_fast.data.sampler import clip_draw, epoch_permutation, mask_noise
from xkd_fast.data.shards import ShardSet
from xkd_fast.data.views import AugmentOptions, ClipShape
from xkd_fast.errors import UserError
from xkd_fast.model.build import build_model


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(write_shards(tmp_path_factory.mktemp("data") / "shards"))


def decode_with_pyav(encoded: NDArray[np.uint8]) -> Tensor:
    """All frames of a stored video by another decoder's front end: [T, H, W, 3] uint8."""
    with av.open(io.BytesIO(encoded.tobytes())) as container:
        return torch.from_numpy(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))


def test_a_batch_by_hand(shards: ShardSet) -> None:
    # frames or sound of another moment, of another sample, or drawn for another epoch; labels or noise of another clip
    with make(shards, PLAIN) as pipeline:
        views, noise = pipeline.batch(2, 1)
    wanted = epoch_permutation(3, 2, SAMPLES)[4:8]
    assert views.keys == [shards.keys[sample] for sample in wanted]
    assert views.labels is not None
    assert views.labels.tolist() == [number_of(key) % 3 for key in views.keys]
    shape = view_shape(DATA, MODEL)
    maker = ViewMaker(shape, PLAIN, MEL)
    expected = maker.empty(4)
    for row, sample in enumerate(wanted.tolist()):
        number = number_of(shards.keys[sample])
        pictures, sound = decode_with_pyav(shards.read(sample).video), torch.from_numpy(make_sound(number) / 32768).float()
        draw = clip_draw(3, 2, sample, ClipShape(len(pictures), len(sound), *pictures.shape[1:3]), shape, PLAIN)
        frames = [(draw.start_frame + t) % len(pictures) for t in range(FRAMES)]
        heard = torch.zeros(RATE)
        own = sound[draw.start_frame * RATE // FPS :][:RATE]
        heard[: len(own)] = own
        maker.fill(expected, slice(row, row + 1), [pictures[frames]], [heard], [draw])
        video, audio = mask_noise(3, 2, sample, shape)
        assert torch.equal(noise.video[row], torch.from_numpy(video))
        assert torch.equal(noise.audio[row], torch.from_numpy(audio))
    # FFmpeg's colour conversion differs by some grey levels between the two, never by a frame's 10
    for ours, theirs in zip(
        [views.video_global, *views.video_locals], [expected.video_global, *expected.video_locals], strict=True
    ):
        assert (ours - theirs).abs().max() < 9 / 255
        assert (ours - theirs).abs().mean() < 3 / 255
    for ours, theirs in zip(
        [views.audio_global, *views.audio_locals], [expected.audio_global, *expected.audio_locals], strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["fast", "reference"])
def test_grey_levels_are_the_same_pictures(shards: ShardSet, implementation: Literal["fast", "reference"]) -> None:
    """Red if grey levels are cut off instead of rounded, are another draw's, or the model takes them for normalised numbers."""
    (views, noise), (grey, same) = (make(shards, AugmentOptions(pixels=pixels)).batch(0, 0) for pixels in ("float32", "uint8"))
    assert torch.equal(noise.video, same.video) and torch.equal(views.audio_global, grey.audio_global)
    std, mean = (torch.tensor(each).view(3, 1, 1, 1) for each in (MODEL.video.pixel_std, MODEL.video.pixel_mean))
    for one, other in zip((views.video_global, *views.video_locals), (grey.video_global, *grey.video_locals), strict=True):
        assert (one.dtype, other.dtype) == (torch.float32, torch.uint8)
        assert ((one * std + mean) * 255 - other).abs().max() < 0.501
    model = build_model(replace(MODEL, implementation=implementation), seed=0)
    with torch.no_grad():
        expected, got = model(views, noise).total, model(grey, noise).total
    assert expected != got and abs(expected - got) < 1e-4 * expected


def test_picture_and_sound_are_the_same_moment(shards: ShardSet) -> None:
    # both say which frame it is: the picture by its grey, the sound by its loudness
    steps = []
    with make(shards, PLAIN) as pipeline:
        for epoch in range(4):
            views, _ = pipeline.batch(epoch, 0)
            for row, key in enumerate(views.keys):
                if key == "clip5":  # repeats
                    continue
                grey = views.video_global[row].mean((0, 2, 3)) * 255
                energy = ((views.audio_global[row, 0] * MEL.std + MEL.mean).exp()).sum(0)
                loudness = [energy[frame * 8 + 2 : frame * 8 + 6].mean().sqrt() for frame in range(FRAMES)]
                seen, heard = grey[-1] / grey[0], loudness[-1] / loudness[0]
                first_seen = (grey[0].item() - 35) / 10
                first_heard = (0.05 * 7 / (heard.item() - 1) - 0.02) / 0.05  # loudness = 0.02 + 0.05·frame
                steps.append((round(first_seen), first_heard))
                assert seen > 1
    assert len({first for first, _ in steps}) > 3
    for first_seen, first_heard in steps:
        assert abs(first_seen - first_heard) < 0.5


def test_short_clips_are_repeated_and_padded(shards: ShardSet) -> None:
    # the last frame held, black frames, or noise where the sound has ended
    number = shards.keys.index("clip5")
    for batch in clips(shards, MODEL, MEL, DATA, per_sample=1, batch_size=4, samples=[number]):
        video, audio = batch.views.video_global[0], batch.views.audio_global[0, 0]
    assert torch.equal(video[:, 5:], video[:, :3])
    assert not torch.equal(video[:, 1], video[:, 0])
    floor = (torch.tensor(2.0**-23).log() - MEL.mean) / MEL.std
    ends = 5 * RATE // FPS // MEL.hop + MEL.n_fft // 2 // MEL.hop + 1  # windows beyond it hear nothing
    torch.testing.assert_close(audio[:, ends:], floor.expand(16, 64 - ends))
    assert (audio[:, : ends - 6].amax(0) > floor + 0.5).all()


def union(shards: ShardSet, world: int, micro_batch: int, epoch: int, step: int) -> dict[str, list[Tensor]]:
    """Tensors of each clip of a step, over all ranks and micro-batches."""
    clips: dict[str, list[Tensor]] = {}
    accumulation = 4 // (world * micro_batch)
    for rank in range(world):
        with make(shards, rank=rank, world_size=world, micro_batch=micro_batch, accumulation=accumulation) as pipeline:
            for micro in range(accumulation):
                views, noise = pipeline.batch(epoch, step, micro)
                for row, key in enumerate(views.keys):
                    assert key not in clips
                    clips[key] = [tensor[row] for tensor in tensors_of(views, noise)]
    return clips


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 1), (2, 2), (2, 1), (4, 1)])
def test_a_step_holds_the_same_clips_at_any_world_size(shards: ShardSet, world: int, micro_batch: int) -> None:
    # draws by place in the batch, by rank, or from a generator that runs on
    alone, spread = union(shards, 1, 4, 1, 2), union(shards, world, micro_batch, 1, 2)
    assert alone.keys() == spread.keys()
    for key, tensors in alone.items():
        for one, other in zip(tensors, spread[key], strict=True):
            assert torch.equal(one, other), key


def test_resuming_gives_the_same_batches(shards: ShardSet) -> None:
    # a start that replays, skips, or forgets the epoch; an epoch's end that repeats or drops a step
    with make(shards, micro_batch=2, accumulation=2) as pipeline:
        whole = list(itertools.islice(pipeline.batches(), 14))  # 3 steps of 2 an epoch: beyond the second
    for epoch, step, first in ((0, 2, 4), (1, 0, 6), (0, 3, 6), (1, 1, 8)):
        with make(shards, micro_batch=2, accumulation=2, threads=1, prefetch=1) as pipeline:
            for ours, theirs in zip(pipeline.batches(epoch, step), whole[first:], strict=False):
                assert_same(ours, theirs)
    seen = [key for views, _ in whole[:6] for key in views.keys]
    assert sorted(seen) == sorted(shards.keys)
    assert seen != [key for views, _ in whole[6:12] for key in views.keys]


def test_a_second_stream_ends_the_first(shards: ShardSet) -> None:
    # two threads in one DALI pipeline
    with make(shards) as pipeline:
        first = pipeline.batches()
        next(first)
        second = pipeline.batches(1, 0)
        views, _ = next(second)
        assert views.keys == [shards.keys[sample] for sample in epoch_permutation(3, 1, SAMPLES)[:4]]
        assert list(first) == []
        assert sum(thread.name == "data" for thread in threading.enumerate()) == 1
    assert not any(thread.name == "data" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"codec": "h264"}, "h264 video, which DALI cannot decode on the CPU.* --codec mjpeg"),
        ({"fps": 4}, "data.fps = 8, but the shards hold 4; set data.fps=4"),
        ({"sample_rate": 44100}, "data.sample_rate = 16000, but the shards hold 44100"),
    ],
)
def test_shards_that_do_not_fit_are_refused(tmp_path: Path, manifest: dict[str, Any], message: str) -> None:
    # clips at the wrong speed, or a decoder that fails at the first step with a traceback
    wrong = ShardSet.open(write_shards(tmp_path / "shards", **manifest))
    with pytest.raises(UserError, match=message):
        make(wrong)
    with pytest.raises(UserError, match=message):
        clips(wrong, MODEL, MEL, DATA, per_sample=1, batch_size=1)


def test_too_few_samples_are_refused(shards: ShardSet) -> None:
    with pytest.raises(UserError, match="12 samples, fewer than the 16 of one step"):
        make(shards, micro_batch=4, world_size=4)


SCRIPT = """
import sys
from tests.data.clip_shards import *
from xkd_fast.errors import UserError
pipeline = make(ShardSet.open(sys.argv[1]))
stream = pipeline.batches()
next(stream)
print("ready", flush=True)
if sys.argv[2] == "raise":
    raise UserError("stop here")
"""


def test_the_interpreter_exits_while_the_thread_works(shards: ShardSet) -> None:
    # a hang at exit, or a crash of DALI's threads while the interpreter is taken down, with an error under way or without
    root = Path(__file__).parent.parent.parent
    path = str(Path(shards.record(0).shard).parent)
    pipe = subprocess.PIPE
    started = {
        how: subprocess.Popen([sys.executable, "-c", SCRIPT, path, how], cwd=root, stdout=pipe, stderr=pipe, text=True)
        for how in ("end", "raise")
    }
    try:
        ended = {how: (process.communicate(timeout=60), process.returncode) for how, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
    assert ended["end"] == (("ready\n", ""), 0)
    (output, errors), code = ended["raise"]
    assert (output, code) == ("ready\n", 1)
    assert errors.strip().endswith("stop here")


def test_nothing_is_left_open(shards: ShardSet) -> None:
    # file descriptors or threads that grow with every batch
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    with make(shards) as pipeline:
        stream = pipeline.batches()
        for _ in range(3):
            next(stream)
        files, threads = open_files(), threading.active_count()
        for _ in range(20):
            next(stream)
        assert open_files() <= files
        assert threading.active_count() == threads
