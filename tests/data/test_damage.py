"""Damaged samples: each is replaced the same way on every run, and listed, around any reason."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.clip_shards import (
    DATA,
    FPS,
    GARBAGE,
    MEL,
    MODEL,
    PLAIN,
    SAMPLES,
    damage,
    epoch_of,
    make,
    make_pictures,
    number_of,
    tensors_of,
    write_shards,
)
from xkd_fast.data.encode import encode_video
from xkd_fast.data.plain_clips import clips
from xkd_fast.data.sampler import replacement
from xkd_fast.data.shards import ShardSet
from xkd_fast.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(write_shards(tmp_path_factory.mktemp("data") / "shards"))


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


# every JPEG of the file ends in its header
BROKEN = re.sub(rb"\xff\xda", b"\xff\xd9", encode_video(list(make_pictures(8)), "mjpeg", FPS, 2))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"video": GARBAGE}, "an AVI file begins with RIFF"),
        ({"video": BROKEN}, "the marker D9"),  # DALI crashes over it
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
