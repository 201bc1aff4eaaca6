"""The sequential order: every clip once an epoch, equally many for every rank, the same after any interruption."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xkd_fast.data.sequential import SequentialSampler, epoch_stream
from xkd_fast.errors import UserError

WORLDS = (1, 2, 3, 5)


def samplers(
    sizes: tuple[int, ...], seed: int, micro: int, accumulation: int, world: int, buffer: int
) -> list[SequentialSampler]:
    place = (sum(sizes), seed, micro, accumulation)
    return [SequentialSampler(*place, rank, world, sizes, buffer) for rank in range(world)]


def clips_of(sampler: SequentialSampler, epoch: int, step: int = 0) -> list[int]:
    """This rank's clips of an epoch from a step on."""
    micros = range(sampler.accumulation)
    places = itertools.product(range(step, sampler.steps_per_epoch), micros)
    return [sample for at, micro in places for sample in sampler.ids(epoch, at, micro).tolist()]


SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=8).map(tuple).filter(lambda sizes: sum(sizes) >= 30)


@given(SIZES, st.integers(0, 2**63 - 1), st.integers(0, 9), st.integers(1, 3), st.integers(1, 2), st.sampled_from(WORLDS))
@settings(max_examples=40, deadline=None)
def test_every_clip_once_and_equally_many(
    sizes: tuple[int, ...], seed: int, epoch: int, micro: int, accumulation: int, world: int
) -> None:
    """Red if ranks share a clip, a rank has fewer batches than another, or more clips are lost than make no whole step."""
    ranks = samplers(sizes, seed, micro, accumulation, world, buffer=7)
    every = [clips_of(rank, epoch) for rank in ranks]
    assert {len(clips) for clips in every} == {ranks[0].steps_per_epoch * micro * accumulation}
    seen = [sample for clips in every for sample in clips]
    assert len(seen) == len(set(seen)) == sum(sizes) // (micro * accumulation * world) * micro * accumulation * world
    assert set(seen) <= set(range(sum(sizes)))


@given(SIZES, st.integers(1, 50), st.integers(0, 6), st.sampled_from(WORLDS[:3]))
@settings(max_examples=40, deadline=None)
def test_reading_brings_each_clip_in_time_and_holds_few(sizes: tuple[int, ...], buffer: int, step: int, world: int) -> None:
    """Red if a clip is wanted before it may be read (training would wait for ever), one is read twice or after its use, or more
    than the buffer must be held; also from the middle of an epoch, and into the next ones."""
    sampler = samplers(sizes, 5, 2, 1, world, buffer)[world - 1]
    step %= sampler.steps_per_epoch
    used = [(1, sample) for sample in clips_of(sampler, 1, step)] + [(2, sample) for sample in clips_of(sampler, 2)]
    reading = sampler.reading(1, step)
    held: set[tuple[int, int]] = set()
    epoch, sample, place = next(reading)
    for taken, key in enumerate(used):
        while place <= taken:  # what may be read by now
            assert (epoch, sample) not in held
            held.add((epoch, sample))
            epoch, sample, place = next(reading)
        assert len(held) <= buffer
        held.remove(key)
    assert all(epoch >= 3 for epoch, _ in held)


def test_shards_are_read_front_to_back() -> None:
    """Red if the stream jumps within a shard, which is what the mode is for, or is the same every epoch."""
    sizes = (10, 0, 20, 30, 5)
    numbers = np.repeat(np.arange(5), sizes)
    streams = [epoch_stream(1, epoch, sizes) for epoch in range(4)]
    for stream in streams:
        assert sorted(stream.tolist()) == list(range(65))
        jumps = np.flatnonzero(np.diff(stream) != 1)
        assert len(jumps) <= 4 and np.diff(numbers[stream], prepend=-1)[jumps].size <= 4
    assert len({tuple(stream.tolist()) for stream in streams}) == 4


def test_the_buffer_shuffles_as_far_as_it_reaches() -> None:
    """Red if the buffer leaves clips in their order, or lets one out before it was read; with 1 nothing is shuffled."""
    sizes = (500,) * 4
    for buffer in (1, 100, 2000):
        (sampler,) = samplers(sizes, 3, 10, 1, 1, buffer)
        stretch = sampler.stretch(0)
        place_read = {sample: place for place, sample in enumerate(stretch.stream.tolist())}
        ahead = [place_read[sample] - place for place, sample in enumerate(stretch.order.tolist())]
        assert max(ahead) < buffer
        if buffer == 1:
            assert set(ahead) == {0}
        else:
            assert max(ahead) > 0.9 * buffer and len(set(ahead)) > buffer // 2
    # a buffer of all clips is a permutation of them: the first is any of them, 625 ± 5 standard deviations (117) over 8
    counts = np.zeros(8, int)
    for epoch in range(5000):
        (sampler,) = samplers((8,), 0, 8, 1, 1, 8)
        counts[sampler.ids(epoch, 0)[0]] += 1
    assert np.abs(counts - 625).max() < 117


def test_what_is_dropped_differs() -> None:
    """Red if the same clips are left out every epoch, or those at the start of a shard never are."""
    dropped = set()
    for epoch in range(200):
        (sampler,) = samplers((7, 7), 0, 4, 1, 1, 3)
        dropped |= set(range(14)) - set(clips_of(sampler, epoch))
    assert dropped == set(range(14))


def test_numbers_are_fixed() -> None:
    """Red if another generator, key or counter silently changes the order under a run that goes on."""
    (sampler,) = samplers((4, 4), 7, 2, 1, 1, 3)
    assert epoch_stream(7, 1, (4, 4)).tolist() == [5, 6, 7, 0, 1, 2, 3, 4]
    assert clips_of(sampler, 1) == [6, 7, 1, 0, 3, 2, 4, 5]


def test_impossible_ones_are_refused() -> None:
    """Red if a buffer of nothing, or a step that no epoch has, gives an empty batch."""
    with pytest.raises(UserError, match=r"data\.shuffle_buffer = 0 must be 1 or more"):
        samplers((8,), 0, 2, 1, 1, 0)
    with pytest.raises(UserError, match="an epoch has 4 steps of 1 micro-batches"):
        samplers((8,), 0, 2, 1, 1, 1)[0].ids(0, 4)
