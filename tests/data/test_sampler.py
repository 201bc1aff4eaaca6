"""Which samples and which draws: the same at any number of ranks and after any interruption."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xkd_fast.data.sampler import (
    Purpose,
    Sampler,
    clip_draw,
    epoch_permutation,
    evaluation_starts,
    mask_noise,
    random_words,
    replacement,
    uniforms,
)
from xkd_fast.data.views import AugmentOptions, ClipShape, ViewShape
from xkd_fast.errors import UserError
from xkd_fast.model.options import AudioOptions, VideoOptions

SHAPE = ViewShape(8.0, 16000, 64000, 16000, VideoOptions(), AudioOptions())
STORED = ClipShape(frames=80, samples=160_000, height=128, width=170)


def step_clips(samples: int, seed: int, epoch: int, step: int, batch: int, world: int, micro_batch: int) -> list[int]:
    """Samples of one step over all ranks and micro-batches."""
    accumulation = batch // (world * micro_batch)
    ids: list[int] = []
    for micro in range(accumulation):
        for rank in range(world):
            sampler = Sampler(samples, seed, micro_batch, accumulation, rank, world)
            assert sampler.global_batch == batch
            ids += sampler.ids(epoch, step, micro).tolist()
    return ids


@given(st.integers(0, 2**63 - 1), st.integers(0, 50), st.integers(16, 200), st.integers(0, 11))
@settings(max_examples=50, deadline=None)
def test_a_step_is_the_same_at_any_world_size(seed: int, epoch: int, samples: int, step: int) -> None:
    # ranks that shuffle on their own, or stride through the epoch differently at another world size
    step %= samples // 16
    alone = step_clips(samples, seed, epoch, step, 16, 1, 16)
    for world, micro_batch in ((1, 4), (2, 8), (2, 2), (4, 4), (4, 1)):
        assert step_clips(samples, seed, epoch, step, 16, world, micro_batch) == alone
    assert len(set(alone)) == 16


@given(st.integers(8, 100), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_an_epoch_visits_each_sample_at_most_once(samples: int, epoch: int) -> None:
    # repeated samples, or a last batch that is not dropped and so differs in size
    sampler = Sampler(samples, 3, micro_batch=4, accumulation=2)
    seen = [i for step in range(sampler.steps_per_epoch) for micro in range(2) for i in sampler.ids(epoch, step, micro)]
    assert len(seen) == len(set(seen)) == samples // 8 * 8
    assert set(seen) <= set(range(samples))


def test_epochs_and_seeds_shuffle_differently() -> None:
    # one order for all epochs; the samples dropped at the end of an epoch would then never be seen
    orders = [tuple(epoch_permutation(seed, epoch, 100)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(100)) for order in orders)
    last = {int(i) for epoch in range(200) for i in epoch_permutation(0, epoch, 100)[96:]}
    assert last == set(range(100))


def test_permutations_are_uniform() -> None:
    # a biased shuffle: the place of sample 0 over 5 000 epochs, 8 places, each 625 ± 5 standard deviations (117)
    counts = np.bincount([int(np.argmin(epoch_permutation(0, epoch, 8))) for epoch in range(5000)], minlength=8)
    assert np.abs(counts - 625).max() < 117


def test_numbers_are_fixed() -> None:
    # a change of generator, key or counter would silently change every resumed run
    assert random_words(1, 2, 3, Purpose.CLIP, 2).tolist() == [9788262020101625396, 10680956809858985705]
    assert epoch_permutation(7, 1, 8).tolist() == [2, 5, 7, 1, 3, 4, 0, 6]


def test_streams_are_independent() -> None:
    # neighbours in seed, epoch, sample or purpose that share or overlap their numbers
    streams = [
        uniforms(seed, epoch, sample, purpose, 500)
        for seed in (0, 1)
        for epoch in (0, 1)
        for sample in (0, 1)
        for purpose in Purpose
    ]
    numbers = np.concatenate(streams)
    assert len(np.unique(numbers)) == len(numbers)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    correlation = np.corrcoef(np.stack(streams)) - np.eye(len(streams))
    assert np.abs(correlation).max() < 5 / np.sqrt(500)


def test_draws_depend_on_seed_epoch_and_sample() -> None:
    # the same augmentation in every epoch, or for every clip
    draws = [clip_draw(*place, STORED, SHAPE, AugmentOptions()) for place in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len(set(draws)) == 4
    assert clip_draw(0, 0, 0, STORED, SHAPE, AugmentOptions()) == draws[0]


def test_mask_noise() -> None:
    # noise shared between clips, epochs or modalities masks the same tokens everywhere
    noise = [mask_noise(*place, SHAPE) for place in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    for video, audio in noise:
        assert video.shape == (392,)
        assert audio.shape == (560,)
        assert len(np.unique(np.concatenate([video, audio]))) == 952
    assert len({video[0] for video, _ in noise}) == 4
    rows = np.stack([mask_noise(0, 0, sample, SHAPE)[0] for sample in range(2000)])
    kept = (np.argsort(rows, 1)[:, :59]).ravel()  # every place equally often: 2000 · 59 / 392 = 301, ± 5 standard deviations
    assert np.abs(np.bincount(kept, minlength=392) - 301).max() < 5 * 16


def test_replacement_is_another_sample() -> None:
    # a damaged sample replaced by itself, for ever; or all damaged samples replaced by the same one
    for samples in (2, 3, 50):
        chosen = {replacement(0, 0, 1, attempt, samples) for attempt in range(800)}
        assert chosen == set(range(samples)) - {1}
    assert replacement(0, 0, 4, 0, 1000) == replacement(0, 0, 4, 0, 1000) != replacement(0, 1, 4, 0, 1000)


def test_evaluation_starts() -> None:
    # uniform clips that leave out the video's end, or run past it
    assert evaluation_starts(48, 3, random=False) == [0, 24, 48]
    assert evaluation_starts(48, 1, random=False) == [24]
    assert evaluation_starts(0, 3, random=False) == [0, 0, 0]
    starts = evaluation_starts(4, 500, random=True, seed=1, sample=2)
    assert set(starts) == {0, 1, 2, 3, 4}
    assert starts == evaluation_starts(4, 500, random=True, seed=1, sample=2)
    assert starts != evaluation_starts(4, 500, random=True, seed=1, sample=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 15}, r"15 samples, fewer than the 16 of one step \(4 per micro-batch × 2 micro-batches × 2 ranks\)"),
        ({"rank": 2}, r"rank = 2 must lie in 0-1"),
        ({"micro_batch": 0}, r"micro_batch = 0 must be 1 or more"),
        ({"seed": -1}, r"seed = -1 must be 0 or more"),
    ],
)
def test_impossible_samplers_are_refused(arguments: dict[str, int], message: str) -> None:
    usual = {"samples": 64, "seed": 0, "micro_batch": 4, "accumulation": 2, "rank": 0, "world_size": 2}
    with pytest.raises(UserError, match=message):
        Sampler(**{**usual, **arguments})


@pytest.mark.parametrize("place", [(-1, 0, 0), (0, 4, 0), (0, -1, 0), (0, 0, 2)])
def test_a_step_outside_the_epoch_is_refused(place: tuple[int, int, int]) -> None:
    # a slice past the permutation's end would be a short or an empty batch
    with pytest.raises(UserError, match="an epoch has 4 steps of 2 micro-batches"):
        Sampler(64, 0, 8, 2).ids(*place)


def test_drawing_is_cheap() -> None:
    # 100 µs a clip is the aim; ten times that would show in the step. The best of several tries, as the machine is shared.
    options, best = AugmentOptions(), float("inf")
    for attempt in range(10):
        start = time.perf_counter()
        for sample in range(100):
            clip_draw(0, attempt, sample, STORED, SHAPE, options)
        best = min(best, (time.perf_counter() - start) / 100)
    assert best < 500e-6


def test_reading_is_what_is_used_next() -> None:
    # clips of steps that are over, of other ranks or of another epoch read in place of those that are wanted
    sampler = Sampler(50, 3, 4, 2, rank=1, world_size=2)
    used = [
        (epoch, sample) for epoch, step in ((1, 2), (2, 0)) for micro in (0, 1) for sample in sampler.ids(epoch, step, micro)
    ]
    wanted = list(itertools.islice(sampler.reading(1, 2), len(used)))
    assert [(epoch, sample) for epoch, sample, _ in wanted] == used and [place for *_, place in wanted] == list(range(16))
