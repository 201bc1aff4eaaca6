"""Sound of a source file: mono, of one sample rate, block by block, each with its time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from av.filter import Graph
from numpy.typing import NDArray

from xkd_fast.data.segment import segment_bounds
from xkd_fast.data.source_file import Skip, audio_stream, decoded, open_source

AUDIO_GAP = 0.04  # seconds; a longer jump of the sound's time stamps is a pause or an overlap, a shorter one is jitter
# FFmpeg's default of 32 taps lets a tone of 8.5 kHz through to 16 kHz at -26 dB; this lets 8.2 kHz through at -94 dB and takes
# 0.1 dB from 7.5 kHz. One second of sound costs 2-4 ms instead of 1.2.
RESAMPLING = "filter_size=128:cutoff=0.97"
# ITU-R BS.775's down-mix to mono, 3 dB lower: then what both loudspeakers play alike keeps its level. The deep effects of films
# are left out, as there. Names that are not here are surrounds.
WEIGHTS = dict.fromkeys(("FL", "FR", "FLC", "FRC", "DL", "DR", "BC", "TC"), 0.5) | {"FC": 0.5**0.5, "LFE": 0.0, "LFE2": 0.0}
WEIGHTS |= {"AMBI0": 1.0} | {f"AMBI{k}": 0.0 for k in range(1, 64)}  # ambisonics: the middle, and differences between sides
SURROUND = 0.5**1.5
UNNAMED = "NONE"  # some PCM does not say where its channels stand; then as players guess
USUAL = {6: ("FL", "FR", "FC", "LFE", "BL", "BR"), 8: ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR")}
CANCELLED = 1e-3  # of the channels' power: sound below it has cancelled itself in the down-mix


class SoundReader:
    """The mono sound of a file in blocks of a second or less, which know where they belong.

    ``start`` and ``end``, seconds from the file's beginning, bound the part that is read; a block that lies across a bound is
    read whole.

    Attributes:
        first, last: bounds of the part by the file's clock, seconds; without a bound, infinity.
        start, end: when the sound begins and ends by the file's clock, seconds, as far as it was read.
        peak: of what was read, full scale 1.
    """

    def __init__(self, path: str, sample_rate: int, start: float | None = None, end: float | None = None) -> None:
        self._path, self._rate, self._part = path, sample_rate, (start, end)
        self.first, self.last = -math.inf, math.inf
        self.start = self.end = self.peak = 0.0

    def samples_from(self, start: float) -> int | None:
        """How many samples lie between an instant and the end of the part; None where that has none."""
        return None if self.last == math.inf else round((self.last - start) * self._rate)

    def __iter__(self) -> Iterator[tuple[float, int, NDArray[np.float32]]]:
        """Yield when a piece without pauses begins, how many of its samples came before, and samples [samples]; once.

        Raises:
            Skip: channels of opposite sign, of which mono keeps next to nothing; or sound that cannot be decoded.
            av.error.FFmpegError: the file cannot be read.
        """
        begun, before, any_yet = 0.0, 0, False
        kept = there = 0.0  # power after the down-mix, and before
        for begins, weights, channels in self._pieces():
            if begins is not None:
                begun, before = begins, 0
            mono = weights @ channels
            kept += float(np.square(mono, dtype=np.float64).sum())
            there += float(weights**2 @ np.square(channels, dtype=np.float64).sum(1))
            if not mono.size:
                continue
            if not any_yet:
                self.start, any_yet = begun, True
            self.peak = max(self.peak, float(np.abs(mono).max()))
            self.end = begun + (before + mono.size) / self._rate
            yield begun, before, mono
            before += mono.size
        if kept < CANCELLED * there:
            raise Skip("silent_audio", "the channels cancel each other: mono would keep less than -30 dB of them")

    def _pieces(self) -> Iterator[tuple[float | None, NDArray[np.float32], NDArray[np.float32]]]:
        """When a piece begins, seconds, or None where it goes on; the weights of its channels, and [channels, samples]."""
        resampler: _Resampler | None = None
        form: Any = None
        begins: float | None = None
        heard = 0.0

        with open_source(self._path) as container:
            stream = audio_stream(container)
            assert stream is not None
            self.first, self.last = segment_bounds(container, *self._part)
            for frame in decoded(container, stream, self.first):
                time = float(frame.time) if frame.time is not None else heard
                if time >= self.last:
                    break
                if time + frame.samples / frame.sample_rate <= self.first:
                    continue
                if form is not None and time < heard - AUDIO_GAP:
                    continue  # spliced recordings overlap; pictures that go back in time are left out as well
                pause = form is not None and time > heard + AUDIO_GAP
                changed = form != (frame.format.name, frame.layout.name, frame.sample_rate)  # it may change in mid-stream
                if resampler is not None and (pause or changed):
                    for block in resampler.rest():
                        yield begins, resampler.weights, block
                        begins = None
                if form is None or pause:
                    begins = heard = time
                if pause or changed:
                    form = (frame.format.name, frame.layout.name, frame.sample_rate)
                    resampler = _Resampler(frame, self._rate)
                assert resampler is not None
                heard += frame.samples / frame.sample_rate
                for block in resampler.resample(frame):
                    yield begins, resampler.weights, block
                    begins = None
            if resampler is not None:
                for block in resampler.rest():
                    yield begins, resampler.weights, block
                    begins = None


class _Resampler:
    """Sound of one form into [channels, samples] float32 of another rate."""

    def __init__(self, frame: Any, sample_rate: int) -> None:
        self.weights = mono_weights([channel.name for channel in frame.layout.channels])
        self._graph = Graph()
        source = self._graph.add_abuffer(
            sample_rate=frame.sample_rate, format=frame.format, layout=frame.layout, time_base=frame.time_base
        )
        nodes = [source, self._graph.add("aformat", f"sample_fmts=flt:sample_rates={sample_rate}")]
        if frame.sample_rate != sample_rate:
            nodes.insert(1, self._graph.add("aresample", f"{sample_rate}:{RESAMPLING}"))
        nodes.append(self._graph.add("abuffersink"))
        self._graph.link_nodes(*nodes).configure()
        self._graph.set_audio_frame_size(sample_rate)  # blocks of a second: twice as fast as one for each frame

    def resample(self, frame: Any) -> Iterator[NDArray[np.float32]]:
        """What is ready after one more frame."""
        self._graph.push(frame)
        while True:
            try:
                # interleaved: of eight planes PyAV finds a ninth
                block = self._graph.pull().to_ndarray().reshape(-1, len(self.weights)).T
            except (BlockingIOError, EOFError):
                return
            yield np.nan_to_num(block, posinf=0.0, neginf=0.0)  # float files may hold what is no number

    def rest(self) -> Iterator[NDArray[np.float32]]:
        """What the filter still holds, at the end."""
        return self.resample(None)


def mono_weights(channels: Sequence[str]) -> NDArray[np.float32]:
    """What each channel, by FFmpeg's names, adds to mono; the mean of a single one, or of those of which nothing is known."""
    if UNNAMED in channels:
        channels = USUAL.get(len(channels), channels)
    weights = np.array([WEIGHTS.get(name, SURROUND) for name in channels], np.float32)
    if len(channels) == 1 or UNNAMED in channels or not weights.any():
        weights[:] = 1 / len(channels)
    return weights
