"""Several clips of a file: read and decoded once, drawn apart, at any number of ranks, counted in the epoch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.data.clip_shards import DATA, MODEL, SAMPLES, assert_same, damage, make, tensors_of, write_shards
from xkd_fast.data.clip_options import view_shape
from xkd_fast.data.decode import DecodeRequest
from xkd_fast.data.fetch import cut_clip
from xkd_fast.data.sampler import Sampler, clip_draw, mask_noise
from xkd_fast.data.sequential import SequentialSampler
from xkd_fast.data.shards import ShardSet
from xkd_fast.data.views import AugmentOptions, ClipShape
from xkd_fast.errors import UserError

SHAPE = view_shape(DATA, MODEL)
STORED = ClipShape(16, 32000, 36, 48)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(write_shards(tmp_path_factory.mktemp("data") / "shards"))


@given(st.sampled_from((1, 2, 4)), st.integers(0, 9), st.integers(8, 90), st.sampled_from((1, 2, 4)))
@settings(max_examples=40, deadline=None)
def test_an_epoch_is_each_file_once(repeats: int, epoch: int, samples: int, world: int) -> None:
    """Red if an epoch counts clips where it should count files, a file comes twice, or its clips go to two ranks or steps."""
    micro = 4
    ranks = (
        [Sampler(samples, 3, micro, 2, rank, world, clips_per_file=repeats) for rank in range(world)]
        if (samples * repeats >= micro * 2 * world)
        else []
    )
    for sampler in ranks:
        assert sampler.files_per_step * repeats == sampler.global_batch == micro * 2 * world
        assert sampler.steps_per_epoch == samples // (sampler.global_batch // repeats)
    seen: list[int] = []
    for rank in ranks:
        for step, part in itertools.product(range(rank.steps_per_epoch), range(2)):
            files, ids = rank.files(epoch, step, part).tolist(), rank.ids(epoch, step, part).tolist()
            assert ids == [file for file in files for _ in range(repeats)] and len(ids) == micro
            seen += files
    assert len(seen) == len(set(seen)) and (not ranks or len(seen) == ranks[0].steps_per_epoch * ranks[0].files_per_step)


def test_reading_brings_each_file_once() -> None:
    """Red if reading ahead waits for as many takes as there are clips: training would then wait for ever, or hold too much."""
    sizes = (13, 20)
    for sampler in (
        Sampler(33, 5, 4, 2, clips_per_file=2),
        SequentialSampler(33, 5, 4, 2, 0, 1, sizes, 6, clips_per_file=2),
    ):
        files = [
            file for step in range(sampler.steps_per_epoch) for micro in range(2) for file in sampler.files(0, step, micro)
        ]
        reading = list(itertools.islice(sampler.reading(0, 0), len(files)))
        assert sorted(sample for _, sample, _ in reading) == sorted(files)
        for place, (_, sample, wanted) in enumerate(reading):
            assert wanted <= files.index(sample) and wanted <= place


def test_clips_of_a_file_are_drawn_apart() -> None:
    """Red if they are the same clip twice, the first is another than without the option, or crops, starts, volumes or masks of
    two clips hang together."""
    draws = [[clip_draw(3, 1, sample, STORED, SHAPE, AugmentOptions(), repeat) for repeat in range(2)] for sample in range(300)]
    assert [own[0] for own in draws] == [clip_draw(3, 1, s, STORED, SHAPE, AugmentOptions()) for s in range(300)]

    def correlation(values: list[list[float]]) -> float:
        return float(torch.corrcoef(torch.tensor(values, dtype=torch.float64).T)[0, 1].abs())

    assert correlation([[d.start_frame for d in own] for own in draws]) < 0.25
    assert correlation([[d.video_global.brightness for d in own] for own in draws]) < 0.25
    assert correlation([[d.audio_locals[0].volume for d in own] for own in draws]) < 0.25
    noise = [[float(mask_noise(3, 1, sample, SHAPE, repeat)[0][0]) for repeat in range(2)] for sample in range(300)]
    assert correlation(noise) < 0.25


def step_clips(shards: ShardSet, world: int, micro_batch: int, step: int) -> list[tuple[str, list[Tensor]]]:
    """Key and tensors of every clip of a step, over all ranks and micro-batches."""
    found, accumulation = [], 8 // (world * micro_batch)
    for micro, rank in itertools.product(range(accumulation), range(world)):
        options = {"rank": rank, "world_size": world, "micro_batch": micro_batch, "accumulation": accumulation}
        with make(shards, clips_per_file=2, **options) as pipeline:
            views, noise = pipeline.batch(1, step, micro)
        found += [(key, [tensor[row] for tensor in tensors_of(views, noise)]) for row, key in enumerate(views.keys)]
    return found


def test_a_step_is_the_same_at_any_number_of_ranks(shards: ShardSet) -> None:
    """Red if what a file gives depends on the rank, the world or the accumulation."""
    alone = step_clips(shards, 1, 8, 1)
    assert [key for key, _ in alone][::2] == [key for key, _ in alone][1::2]
    for world, micro_batch in ((2, 4), (2, 2), (4, 2)):
        for (key, ours), (other, theirs) in zip(alone, step_clips(shards, world, micro_batch, 1), strict=True):
            assert key == other and all(torch.equal(one, another) for one, another in zip(ours, theirs, strict=True))


def test_one_decode_gives_what_several_would(shards: ShardSet) -> None:
    """Red if a clip is cut at another place of the shared frames, masked as another, or decoded by itself."""
    asked: list[DecodeRequest] = []
    with make(shards, clips_per_file=4, micro_batch=8) as pipeline:
        decode = pipeline._maker.decoder

        def counted(requests: list[DecodeRequest]) -> object:
            asked.extend(requests)
            return decode(requests)

        pipeline._maker.decoder = counted  # type: ignore[assignment]
        views, noise = pipeline.batch(2, 0)
        assert len(asked) == 2
        # each clip by itself: its own frames alone
        for row, sample in enumerate(pipeline.sampler.ids(2, 0).tolist()):
            draw = pipeline._fetcher.draws(2, sample)[row % 4]
            request = pipeline._fetcher.request(shards.read(sample), sample, [draw])
            assert request.frames <= MODEL.video.frames
            (clip,) = decode([request])
            ours = pipeline._maker.views([cut_clip(clip, draw.start_sample, SHAPE)], [draw])
            assert torch.equal(ours.video_global[0], views.video_global[row])
            assert torch.equal(ours.audio_global[0], views.audio_global[row])
            video, audio = mask_noise(3, 2, sample, SHAPE, row % 4)
            assert np.array_equal(noise.video[row], video) and np.array_equal(noise.audio[row], audio)


def test_resuming_and_damage(shards: ShardSet, tmp_path: Path) -> None:
    """Red if a run that goes on sees other clips, the clips of a damaged file get different stand-ins, or are counted twice."""
    damage(path := write_shards(tmp_path / "shards"), "clip4", "video")
    hurt = ShardSet.open(path)
    with make(hurt, clips_per_file=2) as pipeline:
        steps = pipeline.sampler.steps_per_epoch
        assert steps == SAMPLES // 2
        whole = list(itertools.islice(pipeline.batches(), steps + 2))
        assert [each.key for each in pipeline.damaged if each.epoch == 0] == ["clip4"]
        for views, _ in whole:
            assert views.keys[::2] == views.keys[1::2] and "clip4" not in views.keys
    with make(hurt, clips_per_file=2, threads=1, prefetch=1) as pipeline:
        for ours, theirs in zip(itertools.islice(pipeline.batches(0, 3), steps - 1), whole[3:], strict=True):
            assert_same(ours, theirs)


def test_numbers_that_do_not_divide_are_refused(shards: ShardSet) -> None:
    """Red if a file's clips are split between two batches, or the message does not say which numbers fit."""
    with pytest.raises(UserError, match=r"data\.clips_per_file = 3 must divide the 4 clips .* set it to one of 1, 2, 4,"):
        make(shards, clips_per_file=3)
    with pytest.raises(UserError, match=r"12 samples, fewer than the 16 of one step .* / 2 clips of each"):
        make(shards, clips_per_file=2, micro_batch=32)
    with pytest.raises(ValueError, match=r"data\.clips_per_file = 0 must lie in 1-1024"):
        replace(DATA, clips_per_file=0)
