"""Clips for frozen features: every sample once, in order, whatever the batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.data.clip_shards import (
    DATA,
    FRAMES,
    GARBAGE,
    MEL,
    MODEL,
    SAMPLES,
    damage,
    length_of,
    number_of,
    write_shards,
)
from xkd_fast.data.plain_clips import clips
from xkd_fast.data.sampler import evaluation_starts
from xkd_fast.data.shards import ShardSet
from xkd_fast.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(write_shards(tmp_path_factory.mktemp("data") / "shards"))


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
