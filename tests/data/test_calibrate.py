"""Threads by measurement: on real shards, bounded, without an influence on what batches hold."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.data.clip_shards import DATA, GARBAGE, PLAIN, assert_same, damage, make, write_shards
from xkd_fast.data import calibrate
from xkd_fast.data.batch_maker import BatchMaker, Setting
from xkd_fast.data.calibrate import ENGINE_SHARES, Calibration, calibrated, depth, fastest, thread_counts
from xkd_fast.data.dali import CPU
from xkd_fast.data.pipeline import ViewPipeline
from xkd_fast.data.shards import NewSample, ShardSet


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(write_shards(tmp_path_factory.mktemp("data") / "shards"))


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Twelve samples are worth a measurement."""
    monkeypatch.setattr(calibrate, "MEASURED_FROM", 1)
    monkeypatch.setattr(calibrate, "SECONDS_OF_ONE", 0.02)
    yield


def automatic(shards: ShardSet, **changed: object) -> ViewPipeline:
    return make(shards, **{"threads": "auto", "prefetch": "auto", **changed})


def test_a_small_set_is_not_measured(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if every test and every tiny run pays for a measurement, or the reason is kept from the user."""
    monkeypatch.setattr(BatchMaker, "__init__", counting := Counting(BatchMaker.__init__))
    with automatic(shards) as pipeline:
        assert counting.calls == 1
        assert pipeline.setting == Setting(2, 2)
        assert "12 samples, fewer than 2000" in pipeline.describe()[1]


def test_what_is_asked_for_is_kept(shards: ShardSet, small_is_large: None) -> None:
    """Red if an explicit number is measured away."""
    with make(shards, threads=3, prefetch=5) as pipeline:
        assert pipeline.setting == Setting(3, 5) and pipeline.calibration.rates == {}
    with make(shards, threads=3, prefetch="auto") as pipeline:
        assert pipeline.setting.threads == 3 and 2 <= pipeline.setting.prefetch <= calibrate.MOST_AHEAD
        assert [tried.threads for tried in pipeline.calibration.rates] == [3]


def test_measured_on_real_shards(shards: ShardSet, small_is_large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if nothing is measured, the figures are not told, or the choice changes what batches hold."""
    monkeypatch.setattr(calibrate, "cores", lambda: 2)
    with automatic(shards) as pipeline, make(shards, threads=1, prefetch=1) as plain:
        calibration = pipeline.calibration
        assert [tried.threads for tried in calibration.rates] == [1, 2]
        assert all(rate > 1 for rate in calibration.rates.values())
        told = pipeline.describe()[1]
        assert all(f"{rate:.3g}" in told for rate in calibration.rates.values()) and "measured in" in told
        for step in range(3):
            assert_same(pipeline.batch(1, step), plain.batch(1, step))


def test_it_ends_in_time(shards: ShardSet, small_is_large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if many processors, or slow ones, make a run start late."""
    monkeypatch.setattr(calibrate, "SECONDS", 0.2)
    views = BatchMaker.views
    monkeypatch.setattr(BatchMaker, "views", lambda *args: (time.sleep(0.1), views(*args))[1])
    monkeypatch.setattr(calibrate, "cores", lambda: 512)
    begun = time.perf_counter()
    with automatic(shards) as pipeline:
        assert len(pipeline.calibration.rates) == 1, "the first takes 0.3 s"
        assert time.perf_counter() - begun < 5


def test_damage_is_left_to_training(small_is_large: None, tmp_path: Path) -> None:
    """Red if a damaged sample among the first stops the run, or is listed before it is trained on."""

    def change(sample: int, new: NewSample) -> NewSample:
        return replace(new, video=GARBAGE) if sample == 2 else new

    damage(path := write_shards(tmp_path / "shards", change), "clip0", "video")
    with automatic(ShardSet.open(path), on_corrupt="stop", threads=1) as pipeline:
        assert pipeline.damaged == [] and len(pipeline.calibration.rates) == 1
    assert pipeline.times.read()[1] == 0


def test_fewest_threads_of_the_fast_ones() -> None:
    """Red if more threads are taken for a gain that is noise, or the slower setting wins."""
    runs = {Setting(1, 2): [1.0, 1.0], Setting(2, 2): [0.5, 0.5], Setting(4, 2): [0.49, 0.49], Setting(8, 2): [0.7, 0.7]}
    assert fastest(runs) == Setting(2, 2)
    assert list(thread_counts(6)) == [1, 2, 4, 6] and list(thread_counts(1)) == [1]


def test_uneven_times_want_a_longer_queue() -> None:
    """Red if one slow batch in a few keeps the step waiting each time, or memory is filled without bound."""
    assert depth([1.0, 1.0, 1.0], 2) == 2
    assert depth([1.0, 1.0, 3.5], 2) == 5
    assert depth([1.0, 1.0, 100.0], 2) == calibrate.MOST_AHEAD


def test_the_engines_share_of_jpegs_is_measured(
    shards: ShardSet, small_is_large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red if on a GPU the share of its JPEG engine is left as it is; the decoders here are the CPU's, which have no engine."""
    with make(shards, PLAIN, threads=1, prefetch=1) as pipeline:
        asked: list[Setting] = []

        def maker(setting: Setting) -> BatchMaker:
            asked.append(setting)
            return BatchMaker(setting, 4, "mjpeg", CPU, CPU, pipeline.shape, PLAIN, pipeline._maker.maker.log_mel.options)

        found = calibrated(replace(DATA, prefetch="auto"), maker, pipeline._fetcher, torch.device("cuda", 0))
        assert [tried.engine_share for tried in asked] == [0.65, *ENGINE_SHARES]
        assert found.setting.engine_share in (0.65, *ENGINE_SHARES)
        assert "of JPEGs to the engine" in str(found)


def test_told_in_words() -> None:
    """Red if a figure is missing from the line."""
    found = Calibration(Setting(2, 3), "", {Setting(1, 2): 40.0, Setting(2, 2): 81.2}, 1.25)
    assert str(found) == "2 threads make batches, 3 ahead of the step (by threads: 1: 40, 2: 81.2 clips/s; measured in 1.2 s)"


class Counting:
    """Counts calls of a method."""

    def __init__(self, function: object) -> None:
        self.function, self.calls = function, 0

    def __get__(self, owner: object, kind: object) -> object:
        def call(*args: object) -> object:
            self.calls += 1
            return self.function(owner, *args)  # type: ignore[operator]

        return call
