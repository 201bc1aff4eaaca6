"""How many threads decode and augment fastest here: a short measurement at the start of a run, on its own shards.

It chooses speed alone: what batches hold does not depend on it. All ranks of a machine measure at the same time, so each sees
the cores that the others leave it.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch

from xkd_fast.data.batch_maker import BatchMaker, Setting
from xkd_fast.data.clip_options import ClipOptions
from xkd_fast.data.decode import DecodeRequest, UndecodableError
from xkd_fast.data.fetch import FetchedClip, Fetcher
from xkd_fast.data.shards import CorruptSampleError
from xkd_fast.data.video_codecs import CODECS

MEASURED_FROM = 2000  # samples; smaller sets are trained on before a measurement has paid
FILES = 16  # decoded again and again
SECONDS = 5.0  # no setting is begun later than this
SECONDS_OF_ONE = 0.5  # that a setting is repeated for, at least twice
GOOD_ENOUGH = 0.95  # of the best speed: fewer threads that reach it leave cores to others
MOST_AHEAD = 8  # micro-batches
ENGINE_SHARES = (0.0, 1.0)  # tried beside the default, where a GPU decodes JPEGs


@dataclass(frozen=True)
class Calibration:
    """The setting that a run takes, and how it was found."""

    setting: Setting
    reason: str  # why nothing was measured; empty where something was
    rates: dict[Setting, float] = field(default_factory=dict)  # clips/s of what was measured, in its order
    seconds: float = 0.0  # that it took

    def __str__(self) -> str:
        setting = self.setting
        told = f"{setting.threads} thread{'s' * (setting.threads > 1)} make batches, {setting.prefetch} ahead of the step"
        if not self.rates:
            return f"{told} ({self.reason})"
        by_threads = {tried: rate for tried, rate in self.rates.items() if tried.engine_share == Setting(1, 1).engine_share}
        measured = ", ".join(f"{tried.threads}: {rate:.3g}" for tried, rate in by_threads.items())
        shares = ", ".join(f"{tried.engine_share:g}: {r:.3g}" for tried, r in self.rates.items() if tried not in by_threads)
        shares = f"; of JPEGs to the engine {setting.engine_share:g}, others: {shares} clips/s" if shares else ""
        return f"{told} (by threads: {measured} clips/s{shares}; measured in {self.seconds:.1f} s)"


def cores() -> int:
    """Processors that this process may use, shared among the machine's processes of the run."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def thread_counts(most: int) -> Iterator[int]:
    """1, 2, 4 … and ``most``."""
    count = 1
    while count < most:
        yield count
        count *= 2
    yield most


def calibrated(
    data: ClipOptions, make: Callable[[Setting], BatchMaker], fetcher: Fetcher, decode_on: torch.device, most: int | None = None
) -> Calibration:
    """The setting for a run: what ``data`` says, and where it says ``auto`` the fastest.

    Args:
        data: options.
        make: makes a batch maker of a setting.
        fetcher: whose samples are decoded; nothing of it changes.
        decode_on: where pictures are decoded.
        most: threads that are tried; None = as many as there are processors.
    """
    setting = Setting(data.own_threads, data.own_prefetch)
    if data.threads != "auto" and data.prefetch != "auto":
        return Calibration(setting, "as the options say")
    samples = len(fetcher.shards)
    if samples < MEASURED_FROM:
        return Calibration(setting, f"not measured: {samples} samples, fewer than {MEASURED_FROM}")
    begun = time.perf_counter()
    work = _Work(fetcher)
    if not work.requests:
        return Calibration(setting, f"not measured: the first {FILES} samples are damaged")
    runs: dict[Setting, list[float]] = {}  # seconds a clip

    def try_out(tried: Setting) -> None:
        if not runs or time.perf_counter() - begun < SECONDS:
            with closing(make(tried)) as maker:
                runs[tried] = work.time(maker)

    for threads in thread_counts(most or cores()) if data.threads == "auto" else [setting.threads]:
        try_out(replace(setting, threads=threads))
    setting = fastest(runs)
    if decode_on.type == "cuda" and CODECS[fetcher.shards.codec].engine == "nvJPEG":
        for share in ENGINE_SHARES:
            try_out(replace(setting, engine_share=share))
        setting = max([tried for tried in runs if tried.threads == setting.threads], key=lambda tried: rate_of(runs[tried]))
    rates = {tried: rate_of(seconds) for tried, seconds in runs.items()}
    if data.prefetch == "auto":
        setting = replace(setting, prefetch=depth(runs[setting], setting.prefetch))
    return Calibration(setting, "", rates, time.perf_counter() - begun)


def rate_of(seconds: Sequence[float]) -> float:
    """Clips/s, the median."""
    return 1 / statistics.median(seconds)


def fastest(runs: dict[Setting, list[float]]) -> Setting:
    """The setting of the fewest threads that is about as fast as the fastest; ``runs`` holds seconds a clip."""
    best = max(rate_of(seconds) for seconds in runs.values())
    return min((s for s, seconds in runs.items() if rate_of(seconds) >= GOOD_ENOUGH * best), key=lambda s: s.threads)


def depth(seconds: Sequence[float], least: int) -> int:
    """Micro-batches to keep ahead, so that one that takes as long as the slowest so far does not keep the step waiting."""
    return min(MOST_AHEAD, max(least, math.ceil(max(seconds) / statistics.median(seconds)) + 1))


class _Work:
    """The same few files, decoded and augmented with any setting."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self._samples: list[int] = []
        self.requests: list[DecodeRequest] = []
        for sample in range(min(FILES, fetcher.sampler.files_per_batch, len(fetcher.shards))):
            try:
                encoded = fetcher.shards.read(sample)
            except CorruptSampleError:
                continue  # met, told and replaced when it is trained on
            self.requests.append(fetcher.request(encoded, sample, fetcher.draws(0, sample)))
            self._samples.append(sample)

    def time(self, maker: BatchMaker) -> list[float]:
        """Seconds a clip of some repetitions."""
        try:
            self._run(maker)
        except UndecodableError as error:  # as above
            for place in sorted(error.reasons, reverse=True):
                del self.requests[place], self._samples[place]
            self._run(maker)
        taken: list[float] = []
        while len(taken) < 2 or sum(taken) < SECONDS_OF_ONE:
            begun = time.perf_counter()
            self._run(maker)
            taken.append(time.perf_counter() - begun)
        return [seconds / max(1, len(self.requests) * self._fetcher.sampler.clips_per_file) for seconds in taken]

    def _run(self, maker: BatchMaker) -> None:
        decoded = maker.decoder(self.requests)
        clips = [
            FetchedClip(sample, repeat, draw, clip, request.start)
            for sample, clip, request in zip(self._samples, decoded, self.requests, strict=True)
            for repeat, draw in enumerate(self._fetcher.draws(0, sample))
        ]
        cut = maker.moved([clip.cut(self._fetcher.shape) for clip in clips])
        maker.views(cut, [clip.draw for clip in clips])
        torch.get_device_module(maker.device).synchronize()
