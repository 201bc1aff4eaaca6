"""Threads by measurement: on real shards, bounded, without an influence on what batches hold."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.clip_shards import (
    DATA,
    FPS,
    GARBAGE,
    PLAIN,
    SAMPLES,
    assert_same,
    damage,
    make,
    make_pictures,
    write_shards,
)
from xkd_fast.data import calibrate
from xkd_fast.data.batch_maker import BatchMaker, Setting
from xkd_fast.data.calibrate import ENGINE_SHARES, Calibration, calibrated, fastest, thread_counts
from xkd_fast.data.dali import CPU
from xkd_fast.data.decode import ClipDecoder, DecodedClip, DecodeRequest
from xkd_fast.data.encode import encode_video
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
        assert pipeline.setting == Setting(3, 2) and pipeline.calibration.rates == {}
    with make(shards, threads="auto", prefetch=5) as pipeline:
        assert pipeline.setting.prefetch == 5 and len(pipeline.calibration.rates) > 0


def test_measured_on_real_shards(shards: ShardSet, small_is_large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if nothing is measured, the figures are not told, or the choice changes what batches hold."""
    monkeypatch.setattr(calibrate, "cores", lambda: 2)
    with automatic(shards) as pipeline, make(shards, threads=1, prefetch=1) as plain:
        calibration = pipeline.calibration
        assert [tried.threads for tried in calibration.rates] == [2, 1] and calibration.setting.prefetch == 2
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
    monkeypatch.setattr(calibrate, "cores", lambda: 64)
    begun = time.perf_counter()
    with automatic(shards) as pipeline:
        assert [tried.threads for tried in pipeline.calibration.rates] == [64], (
            "the first takes 0.3 s; few threads starve a step"
        )
        assert time.perf_counter() - begun < 5


def test_every_thread_has_two_files(shards: ShardSet, small_is_large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if many threads find nothing to do and seem no faster than few, or more is decoded than training ever decodes."""
    decode, counts = ClipDecoder.__call__, dict[int, set[int]]()

    def counting(decoder: ClipDecoder, requests: list[DecodeRequest]) -> list[DecodedClip]:
        counts.setdefault(decoder.threads, set()).add(len(requests))
        return decode(decoder, requests)

    monkeypatch.setattr(ClipDecoder, "__call__", counting)
    monkeypatch.setattr(calibrate, "FILES", 3)
    monkeypatch.setattr(calibrate, "cores", lambda: 8)
    with automatic(shards, micro_batch=12) as pipeline:
        assert counts == {8: {12}, 4: {8}, 2: {4}, 1: {3}}
        assert len(pipeline.calibration.rates) == 4


SHORT = encode_video(list(make_pictures(8)[:3]), "mjpeg", FPS, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {2: {"video": GARBAGE}},
        {2: {"video": GARBAGE}, 4: {"video": SHORT}},  # of which the first hides the second
        {2: {"height": 300}, 4: {"height": 30}},
        {2: {"audio": GARBAGE}, 4: {"video": SHORT}, 8: {"width": 300}, 10: {"video": GARBAGE}},
    ],
)
def test_damage_is_left_to_training(small_is_large: None, tmp_path: Path, wrong: dict[int, dict[str, Any]]) -> None:
    """Red if damaged samples among the first stop the run, are listed before they are trained on, or are timed."""

    def change(sample: int, new: NewSample) -> NewSample:
        return replace(new, **wrong.get(sample, {}))

    damage(path := write_shards(tmp_path / "shards", change), "clip0", "video")
    with automatic(ShardSet.open(path), on_corrupt="stop", micro_batch=12) as pipeline:
        assert pipeline.damaged == [] and len(pipeline.calibration.rates) > 0
    assert pipeline.times.read()[1] == 0


def test_damage_alone_is_not_measured(small_is_large: None, tmp_path: Path) -> None:
    """Red if a set whose first samples are all damaged ends in a traceback before training has told which."""
    undecodable = write_shards(tmp_path / "undecodable", lambda _, new: replace(new, video=GARBAGE))
    unreadable = write_shards(tmp_path / "unreadable")
    for sample in range(SAMPLES):
        damage(unreadable, f"clip{sample}", "audio")
    for path in (undecodable, unreadable):
        with automatic(ShardSet.open(path)) as pipeline:
            assert pipeline.setting == Setting(2, 2) and pipeline.damaged == []
            assert "not measured: the first 12 samples are damaged" in pipeline.describe()[1]


def test_fewest_threads_of_the_fast_ones() -> None:
    """Red if more threads are taken for a gain that is noise, or the slower setting wins."""
    rates = {Setting(8, 2): 140.0, Setting(4, 2): 204.0, Setting(2, 2): 200.0, Setting(1, 2): 100.0}
    assert fastest(rates) == Setting(2, 2)
    assert list(thread_counts(6)) == [6, 4, 2, 1] and list(thread_counts(4)) == [4, 2, 1] and list(thread_counts(1)) == [1]


def test_the_engines_share_of_jpegs_is_measured(
    shards: ShardSet, small_is_large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red if on a GPU the share of its JPEG engine is left as it is; the decoders here are the CPU's, which have no engine."""
    with make(shards, PLAIN, threads=1, prefetch=1) as pipeline:
        asked: list[Setting] = []

        def maker(setting: Setting) -> BatchMaker:
            asked.append(setting)
            return BatchMaker(setting, 4, "mjpeg", CPU, CPU, pipeline.shape, PLAIN, pipeline._maker.maker.log_mel.options)

        found = calibrated(replace(DATA, threads="auto"), maker, pipeline._fetcher, torch.device("cuda", 0), most=1)
        assert [tried.engine_share for tried in asked] == [0.65, *ENGINE_SHARES]
        assert found.setting.engine_share in (0.65, *ENGINE_SHARES)
        assert "of JPEGs to the engine" in str(found)


def test_told_in_words() -> None:
    """Red if a figure is missing from the line."""
    found = Calibration(Setting(2, 3), "", {Setting(2, 2): 81.2, Setting(1, 2): 40.0}, 1.25)
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
