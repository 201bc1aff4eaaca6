"""How many threads decode and augment fastest here: a short measurement at the start of a run, on its own shards.

It chooses speed alone: what batches hold does not depend on it. All ranks of a machine measure at the same time, so each sees
the cores that the others leave it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import cycle, islice

import torch

from xkd_fast.data.batch_maker import BatchMaker, Setting
from xkd_fast.data.clip_options import ClipOptions
from xkd_fast.data.decode import ENGINE_SHARE, DecodeRequest, UndecodableError
from xkd_fast.data.fetch import FetchedClip, Fetcher, clip_shape, size_problem
from xkd_fast.data.shards import CorruptSampleError
from xkd_fast.data.video_codecs import CODECS

MEASURED_FROM = 2000  # samples; smaller sets are trained on before a measurement has paid
FILES = 16  # decoded again and again, at least so many at a time
FILES_PER_THREAD = 2  # at least, as far as a micro-batch has them; with fewer, threads would wait for each other
SECONDS = 5.0  # no setting is begun later than this
SECONDS_OF_ONE = 0.5  # that a setting is repeated for, at least twice
GOOD_ENOUGH = 0.95  # of the best speed: fewer threads that reach it leave cores to others
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
        by_threads = sorted((tried.threads, rate) for tried, rate in self.rates.items() if tried.engine_share == ENGINE_SHARE)
        measured = ", ".join(f"{threads}: {rate:.3g}" for threads, rate in by_threads)
        shares = ", ".join(
            f"{t.engine_share:g}: {rate:.3g}" for t, rate in self.rates.items() if t.engine_share != ENGINE_SHARE
        )
        shares = f"; of JPEGs to the engine {setting.engine_share:g}, others: {shares} clips/s" if shares else ""
        return f"{told} (by threads: {measured} clips/s{shares}; measured in {self.seconds:.1f} s)"


def cores() -> int:
    """Processors that this process may use, shared among the machine's processes of the run."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def thread_counts(most: int) -> Iterator[int]:
    """``most``, and the powers of 2 below it, from the largest: where the time is short, few threads are left out."""
    yield most
    for exponent in reversed(range((most - 1).bit_length())):
        yield 2**exponent


def calibrated(
    data: ClipOptions, make: Callable[[Setting], BatchMaker], fetcher: Fetcher, decode_on: torch.device, most: int | None = None
) -> Calibration:
    """The setting for a run: what ``data`` says, and where ``data.threads`` is ``auto`` the fastest number of threads.

    Args:
        data: options.
        make: makes a batch maker of a setting.
        fetcher: whose samples are decoded; nothing of it changes.
        decode_on: where pictures are decoded.
        most: threads that are tried; None = as many as there are processors.
    """
    setting = Setting(data.own_threads, data.own_prefetch)
    if data.threads != "auto":
        return Calibration(setting, "as the options say")
    samples = len(fetcher.shards)
    if samples < MEASURED_FROM:
        return Calibration(setting, f"not measured: {samples} samples, fewer than {MEASURED_FROM}")
    begun = time.perf_counter()
    work = _Work(fetcher)
    rates: dict[Setting, float] = {}

    def try_out(tried: Setting) -> None:
        if work.files and (not rates or time.perf_counter() - begun < SECONDS):
            with closing(make(tried)) as maker:
                if (rate := work.rate(maker)) is not None:
                    rates[tried] = rate

    for threads in thread_counts(most or cores()):
        try_out(replace(setting, threads=threads))
    if not rates:
        return Calibration(setting, f"not measured: the first {min(FILES, samples)} samples are damaged")
    setting = fastest(rates)
    if decode_on.type == "cuda" and CODECS[fetcher.shards.codec].engine == "nvJPEG":
        for share in ENGINE_SHARES:
            try_out(replace(setting, engine_share=share))
        setting = max([tried for tried in rates if tried.threads == setting.threads], key=lambda tried: rates[tried])
    return Calibration(setting, "", rates, time.perf_counter() - begun)


def fastest(rates: dict[Setting, float]) -> Setting:
    """The setting of the fewest threads that is about as fast as the fastest; ``rates`` are in clips/s."""
    best = max(rates.values())
    return min((setting for setting, rate in rates.items() if rate >= GOOD_ENOUGH * best), key=lambda s: s.threads)


@dataclass(frozen=True)
class _File:
    """A sample, read."""

    sample: int
    request: DecodeRequest


class _Work:
    """The same few files, decoded and augmented with any setting.

    Attributes:
        files: those that are whole, as far as is known. What is damaged is left to training, which tells and replaces it.
    """

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self.files: list[_File] = []
        for sample in range(min(FILES, len(fetcher.shards))):
            try:
                encoded = fetcher.shards.read(sample)
            except CorruptSampleError:
                continue
            self.files.append(_File(sample, fetcher.request(encoded, sample, fetcher.draws(0, sample))))

    def rate(self, maker: BatchMaker) -> float | None:
        """Clips/s, the median of some repetitions; None where no file is left."""
        count = min(maker.decoder.batch_size, max(FILES, FILES_PER_THREAD * maker.decoder.threads))
        while batch := list(islice(cycle(self.files), count)):
            damaged = self._run(maker, batch)
            if not damaged:
                return len(batch) * self._fetcher.sampler.clips_per_file / self._seconds(maker, batch)
            self.files = [file for file in self.files if file.sample not in damaged]
        return None

    def _seconds(self, maker: BatchMaker, batch: Sequence[_File]) -> float:
        taken: list[float] = []
        while len(taken) < 2 or sum(taken) < SECONDS_OF_ONE:
            begun = time.perf_counter()
            self._run(maker, batch)
            taken.append(time.perf_counter() - begun)
        return statistics.median(taken)

    def _run(self, maker: BatchMaker, batch: Sequence[_File]) -> set[int]:
        """Make one batch; where it holds samples that training would replace, give these, and make none."""
        try:
            decoded = maker.decoder([file.request for file in batch])
        except UndecodableError as error:
            return {batch[place].sample for place in error.reasons}
        shards = self._fetcher.shards
        damaged = {
            file.sample
            for file, clip in zip(batch, decoded, strict=True)
            if size_problem(clip, clip_shape(shards, file.sample)) is not None
        }
        if damaged:
            return damaged
        clips = [
            FetchedClip(file.sample, repeat, draw, clip, file.request.start)
            for file, clip in zip(batch, decoded, strict=True)
            for repeat, draw in enumerate(self._fetcher.draws(0, file.sample))
        ]
        cut = maker.moved([clip.cut(self._fetcher.shape) for clip in clips])
        maker.views(cut, [clip.draw for clip in clips])
        torch.get_device_module(maker.device).synchronize()
        return set()
