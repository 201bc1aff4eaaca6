"""From real shards to views: what a batch holds, at any world size, after any interruption, around any damage."""

from __future__ import annotations

import io
import itertools
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from xkd_fast.data.augment import ViewMaker
from xkd_fast.data.decode import ClipDecoder, DecodeRequest
from xkd_fast.data.encode import encode_flac, encode_video
from xkd_fast.data.log_mel import LogMel, MelOptions
from xkd_fast.data.pipeline import ClipOptions, ViewPipeline, check_against_model, clips, view_shape
from xkd_fast.data.sampler import clip_draw, epoch_permutation, evaluation_starts, mask_noise, replacement
from xkd_fast.data.shards import FORMAT, MANIFEST, NewSample, ShardSet, ShardWriter
from xkd_fast.data.views import AudioViewOptions, AugmentOptions, ClipShape, MaskNoise, VideoViewOptions, Views
from xkd_fast.errors import UserError
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
DATA = ClipOptions(fps=FPS, sample_rate=RATE, clip_seconds=1.0, local_audio_seconds=0.25, threads=2)
STILL = VideoViewOptions((1.0, 1.0), (1.0, 1.0), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
QUIET = AudioViewOptions(0.0, (1.0, 1.0), (1.0, 1.0))
PLAIN = AugmentOptions(True, STILL, STILL, QUIET, QUIET)
SAMPLES = 12


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


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(write_shards(tmp_path_factory.mktemp("data") / "shards"))


def make(shards: ShardSet, augment: AugmentOptions | None = None, **changed: Any) -> ViewPipeline:
    """A pipeline over test shards."""
    data = replace(DATA, **{name: changed.pop(name) for name in ("on_corrupt", "threads", "prefetch") if name in changed})
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


def test_colours_come_out_as_they_went_in(shards: ShardSet) -> None:
    # limited for full range, red for blue, or another colour matrix
    sample = shards.keys.index("clip3")
    encoded, pictures = shards.read(sample), make_pictures(3)
    decoder = ClipDecoder(1, 1)
    clip = decoder([DecodeRequest("clip3", encoded.video, encoded.audio, 2, 6)])[0]
    difference = (clip.frames.float() - torch.from_numpy(pictures[2:8]).float()).abs()
    assert difference.mean() < 2
    assert difference.max() < 12


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


def test_a_damaged_sample_is_replaced_the_same_way_on_every_run(shards: ShardSet, tmp_path: Path) -> None:
    # a crash hours in; a replacement that depends on chance, on the rank, or moves other clips of the batch
    damage(path := write_shards(tmp_path / "shards"), "clip4", "video")
    damage(path, "clip7", "audio")
    hurt = ShardSet.open(path)
    with make(shards) as whole, make(hurt) as pipeline, make(hurt, micro_batch=1, accumulation=4) as other:
        usual = {
            key: [tensor[row] for tensor in tensors_of(views, noise)]
            for views, noise in epoch_of(whole, 0)
            for row, key in enumerate(views.keys)
        }
        for (views, _), (ours, our_noise) in zip(epoch_of(whole, 0), epoch_of(pipeline, 0), strict=True):
            for row, (key, our_key) in enumerate(zip(views.keys, ours.keys, strict=True)):
                if key in ("clip4", "clip7"):
                    sample, attempt = shards.keys.index(key), 0
                    while shards.keys[replacement(3, 0, sample, attempt, SAMPLES)] in ("clip4", "clip7"):
                        attempt += 1
                    assert our_key == shards.keys[replacement(3, 0, sample, attempt, SAMPLES)]
                else:
                    assert our_key == key
                # a stand-in is drawn as it would be in its own place
                for one, another in zip(usual[our_key], tensors_of(ours, our_noise), strict=True):
                    assert torch.equal(one, another[row])
        assert {(damaged.key, damaged.epoch) for damaged in pipeline.damaged} == {("clip4", 0), ("clip7", 0)}
        assert all("CRC" in damaged.reason and damaged.key in damaged.reason for damaged in pipeline.damaged)
        assert pipeline.damage() == pipeline.damaged and pipeline.damage() == []
        keys = [views.keys for views, _ in epoch_of(pipeline, 0)]
        assert keys == [[other.batch(0, step, micro)[0].keys[0] for micro in range(4)] for step in range(3)]


def test_a_damaged_sample_stops_the_run_where_asked(tmp_path: Path) -> None:
    damage(path := write_shards(tmp_path / "shards"), "clip4", "video")
    with make(ShardSet.open(path), on_corrupt="stop") as pipeline:
        message = r"shard-000000.tar, sample clip4, video: .*CRC.*data.on_corrupt=replace"
        with pytest.raises(UserError, match=message):
            epoch_of(pipeline, 0)
        with pytest.raises(UserError, match=message):  # from the background thread just so
            list(itertools.islice(pipeline.batches(), 3))


GARBAGE = np.random.default_rng(0).integers(0, 256, 4000, np.uint8).tobytes()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"video": GARBAGE}, "decode"),  # DALI refuses the whole batch
        ({"audio": GARBAGE}, "Format not recognised"),
        ({"video": encode_video(list(make_pictures(8)[:3]), "mjpeg", FPS, 2)}, "frames from frame"),  # fewer than promised
        ({"height": 30}, "index says 30 × "),
    ],
)
def test_what_cannot_be_decoded_is_found_and_replaced(
    shards: ShardSet, tmp_path: Path, change: dict[str, Any], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    # one stream with a right checksum but unknown content takes the whole batch, or the run, with it
    path = write_shards(tmp_path / "shards", lambda sample, new: replace(new, **change) if sample == 8 else new)
    with make(ShardSet.open(path)) as pipeline, make(shards) as whole:
        for epoch in range(3):
            for (views, noise), (ours, our_noise) in zip(epoch_of(whole, epoch), epoch_of(pipeline, epoch), strict=True):
                for row, key in enumerate(views.keys):
                    assert (ours.keys[row] == key) == (key != "clip8")
                    if key != "clip8":
                        for one, another in zip(tensors_of(views, noise), tensors_of(ours, our_noise), strict=True):
                            assert torch.equal(one[row], another[row])
        assert [(damaged.key, damaged.epoch) for damaged in pipeline.damaged] == [("clip8", epoch) for epoch in range(3)]
        assert all("clip8" in damaged.reason and reason in damaged.reason for damaged in pipeline.damaged)
    with (
        make(ShardSet.open(path), on_corrupt="stop") as pipeline,
        pytest.raises(UserError, match=f"sample clip8 cannot be decoded: .*{reason}"),
    ):
        epoch_of(pipeline, 0)


@pytest.mark.parametrize("codec", ["vp9", "mosaic", "yuv"])
def test_every_codec_gives_the_same_views(shards: ShardSet, tmp_path: Path, codec: str) -> None:
    # a decoder that is not told its codec, frames of another moment, and damage that only the first codec's decoder reports:
    # one video is noise, one is shorter than its index says, one of another size
    change: dict[int, dict[str, Any]] = {
        2: {"video": GARBAGE},
        7: {"video": encode_video(make_pictures(7)[:3], codec, FPS, 2)},
        8: {"height": 30},
    }
    path = write_shards(tmp_path / "shards", lambda sample, new: replace(new, **change.get(sample, {})), codec)
    with make(ShardSet.open(path), PLAIN) as pipeline, make(shards, PLAIN) as usual:
        for epoch in range(2):
            for (ours, _), (theirs, _) in zip(epoch_of(pipeline, epoch), epoch_of(usual, epoch), strict=True):
                for row, key in enumerate(theirs.keys):
                    if number_of(key) in change:
                        assert number_of(ours.keys[row]) not in change
                        continue
                    assert ours.keys[row] == key
                    difference = (ours.video_global[row] - theirs.video_global[row]).abs() * 255
                    assert difference.mean() < 2.5 and difference.mean((0, 2, 3)).max() < 4  # a frame's step is 10
                    assert torch.equal(ours.audio_global[row], theirs.audio_global[row])
        assert {(number_of(damaged.key), damaged.epoch) for damaged in pipeline.damaged} == {
            (k, e) for k in change for e in (0, 1)
        }
    (batch,) = clips(
        ShardSet.open(path),
        MODEL,
        MEL,
        DATA,
        per_sample=3,
        batch_size=6,
        samples=[shards.keys.index(f"clip{k}") for k in (3, 4)],
    )
    assert batch.views.video_global.shape[0] == 6


def test_when_all_is_damaged_the_search_ends(tmp_path: Path) -> None:
    # a loop without end, looking for a sample that is whole
    path = write_shards(tmp_path / "shards")
    for sample in range(SAMPLES):
        damage(path, f"clip{sample}", "audio")
    with make(ShardSet.open(path)) as pipeline, pytest.raises(UserError, match="20 samples drawn in its place are damaged too"):
        pipeline.batch(0, 0)


def test_read_errors_are_not_taken_for_damage(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    # a disk that fails is no reason to train on the samples that remain
    def fail(descriptor: int, size: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with make(shards) as pipeline, pytest.raises(UserError, match=r"shard-00000[0-9]\.tar cannot be read: Input/output error"):
        next(pipeline.batches())


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"codec": "h264"}, "h264 video, which DALI cannot decode on the CPU .* --codec mjpeg"),
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


def evaluate(shards: ShardSet, **changed: Any) -> Iterator[tuple[int, int, str, int, Tensor, Tensor]]:
    """Sample, clip, key, label, video and sound of every evaluation clip."""
    for batch in clips(shards, MODEL, MEL, DATA, **{"per_sample": 3, "batch_size": 5, **changed}):
        assert batch.views.video_locals == batch.views.audio_locals == []
        assert batch.views.labels is not None
        for row in range(batch.views.batch_size):
            yield (
                int(batch.samples[row]),
                int(batch.clips[row]),
                batch.views.keys[row],
                int(batch.views.labels[row]),
                batch.views.video_global[row],
                batch.views.audio_global[row],
            )


def test_evaluation_covers_every_sample_once_in_order(shards: ShardSet) -> None:
    # features out of line with labels; the last, smaller batch dropped; clips not spread over the whole video
    rows = list(evaluate(shards))
    assert [row[:2] for row in rows] == [(sample, clip) for sample in range(SAMPLES) for clip in range(3)]
    for sample, clip, key, label, video, _ in rows:
        assert key == shards.keys[sample]
        assert label == number_of(key) % 3
        last = max(0, length_of(number_of(key)) - FRAMES)
        first = (video[:, 0].mean() * 255 - 35) / 10
        assert abs(first - round(clip * last / 2)) < 0.5
        assert video.shape == (3, FRAMES, 32, 32)


def test_evaluation_does_not_depend_on_the_batches(shards: ShardSet) -> None:
    # clips of a sample decoded together in one batch and apart in another; random starts by place instead of by sample
    for random in (False, True):
        usual = list(evaluate(shards, random=random, seed=5))
        for size in (1, 36):
            for ours, theirs in zip(evaluate(shards, random=random, seed=5, batch_size=size), usual, strict=True):
                assert ours[:4] == theirs[:4]
                assert torch.equal(ours[4], theirs[4])
                assert torch.equal(ours[5], theirs[5])
        chosen = list(evaluate(shards, random=random, seed=5, samples=[7, 2]))
        assert [row[0] for row in chosen] == [7, 7, 7, 2, 2, 2]
        assert torch.equal(chosen[4][4], usual[7][4])


def test_random_evaluation_starts(shards: ShardSet) -> None:
    # the same fraction of every sample, or another one than (seed, sample) says
    for seed in (5, 6):
        for sample, clip, key, _, video, _ in evaluate(shards, random=True, seed=seed):
            last = max(0, length_of(number_of(key)) - FRAMES)
            start = evaluation_starts(last, 3, random=True, seed=seed, sample=sample)[clip]
            assert abs((video[:, 0].mean() * 255 - 35) / 10 - start) < 0.5


def test_evaluation_refuses_damage(tmp_path: Path) -> None:
    # a replaced sample would carry another one's label
    damage(path := write_shards(tmp_path / "shards"), "clip6", "audio")
    with pytest.raises(UserError, match=r"sample clip6, audio: .*CRC"):
        list(evaluate(ShardSet.open(path)))
    other = write_shards(tmp_path / "other", lambda sample, new: replace(new, video=GARBAGE) if sample == 6 else new)
    with pytest.raises(UserError, match="sample clip6 cannot be decoded"):
        list(evaluate(ShardSet.open(other)))
    with pytest.raises(UserError, match="per_sample = 0"):
        list(evaluate(ShardSet.open(other), per_sample=0))


def float_wav(sound: NDArray[np.float32]) -> bytes:
    """A WAV file of float32 samples at 16 kHz."""
    data = sound.tobytes()
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, RATE, RATE * 4, 4, 32)
    return struct.pack("<4sI4s", b"RIFF", 36 + len(data), b"WAVE") + form + struct.pack("<4sI", b"data", len(data)) + data


@pytest.mark.parametrize(("stored", "worst", "mean"), [("wav", 1e-5, 1e-6), ("flac", 2e-3, 1e-4)])
def test_log_mel_through_dali(stored: str, worst: float, mean: float) -> None:
    # sound that loses its level, its rate or its alignment in the decoder. FLAC holds 16 bits, as shards do: the rounding
    # alone moves the quietest band by 1.0e-3
    golden = load_file(Path(__file__).parent.parent / "golden" / "log_mel.safetensors")
    video = np.frombuffer(encode_video(list(make_pictures(0)), "mjpeg", FPS, 2), np.uint8)
    decoder = ClipDecoder(2, 1)
    requests = []
    for view in ("global", "local"):
        sound = golden[f"{view}.waveform"].numpy()
        whole = (sound.astype(np.float64) * 32768).round().clip(-32768, 32767).astype(np.int16)
        encoded = float_wav(sound) if stored == "wav" else encode_flac(whole, RATE)
        requests.append(DecodeRequest(view, video, np.frombuffer(encoded, np.uint8), 0, 1))
    for request, clip in zip(requests, decoder(requests), strict=True):
        error = (LogMel(MelOptions(), 80, RATE)(clip.waveform[None])[0] - golden[f"{request.key}.log_mel"]).abs()
        assert error.max() < worst
        assert error.mean() < mean


SCRIPT = """
import sys
from tests.data.test_pipeline import *
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


def model(**changed: Any) -> ModelOptions:
    return replace(MODEL, **{name: replace(getattr(MODEL, name), **fields) for name, fields in changed.items()})


@pytest.mark.parametrize(
    ("data", "mel", "options", "message"),
    [
        (
            {"clip_seconds": 2.0},
            {},
            MODEL,
            r"data.fps × data.clip_seconds = 8 × 2 = 16 .* model.video.frames = 8.*clip_seconds to 1",
        ),
        (
            {},
            {"hop": 300},
            MODEL,
            r"data.clip_seconds gives 16000 .* 54 .* mel.hop = 300.*model.audio.frames = 64.* at most 253",
        ),
        ({"local_audio_seconds": 0.1}, {}, MODEL, r"data.local_audio_seconds gives 1600 samples, 7 .*local_frames = 16"),
        (
            {"local_audio_seconds": 0.1},
            {"n_fft": 4096},
            model(audio={"local_frames": 4, "patch_frames": 4}),
            r"mel.n_fft / 2 = 2048",
        ),
        ({}, {"f_max": 9000.0}, MODEL, r"mel.f_max = 9000 Hz must be at most half of data.sample_rate = 16000"),
        ({}, {}, model(video={"channels": 1}), r"model.video.channels = 1 must be 3"),
    ],
)
def test_sizes_that_do_not_fit_together(data: dict[str, Any], mel: dict[str, Any], options: ModelOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_against_model(replace(DATA, **data), replace(MEL, **mel), options)


@pytest.mark.parametrize(
    ("field", "value"), [("fps", 0.0), ("clip_seconds", -1.0), ("threads", 0), ("prefetch", 0), ("local_audio_seconds", 2.0)]
)
def test_bad_data_options_name_the_key(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"data\.{field} = {value}"):
        replace(DATA, **{field: value})


def test_the_released_sizes_fit() -> None:
    # a rule that refuses the recipe itself: 448 and 112 frames of 64 000 and 16 000 samples at hop 143
    check_against_model(ClipOptions(), MelOptions(), ModelOptions())
