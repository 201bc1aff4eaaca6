"""The sound of a sample: a source's sound at its place on a track of silence, whether it is heard, and as FLAC.

Blocks of a second are read, placed and encoded one after the other, so an hour takes the memory of a second. `prepare` and the
audit both ask here what is heard.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xkd_fast.data.encode import FlacEncoder
from xkd_fast.data.read_audio import SoundReader
from xkd_fast.data.spool import Payload, Spool

SILENCE = 3  # of 32768: peaks of coding noise in what was digital silence before a lossy encoder
LARGEST_PEAK = 4.0  # of full scale: a down-mix of eight channels alike reaches 3.1; louder samples come from damage
FULL_SCALE = 32768.0


@dataclass(frozen=True)
class SoundTrack:
    """What became of a source's sound."""

    start: float  # when the source's sound begins by the file's clock, seconds
    end: float  # when it ends
    begins: float  # when the track begins
    samples: int  # of the track
    heard: bool  # whether any sample of the track is above silence
    flac: Payload | None  # the track, if one was asked for


def take_sound(
    path: str,
    sample_rate: int,
    start: float | None = None,
    end: float | None = None,
    *,
    under: tuple[float, int] | None = None,
    spool: Spool | None = None,
) -> SoundTrack | None:
    """Read a source's sound onto a track; None where there is not one sample.

    Where samples would leave the range, the whole sound is turned down: then it is read a second time.

    Args:
        path: the file.
        sample_rate: of the track, Hz.
        start: of the part that is read, seconds from the file's beginning; None = from there.
        end: likewise; None = to the file's end.
        under: when the track begins by the file's clock, seconds, and how many samples it has: those under the picture.
            Without it the track is as long as the sound, as far as that lies in the part.
        spool: takes the track as FLAC; without it the sound is only listened to.

    Raises:
        Skip: ``silent_audio``: channels of opposite sign, of which mono keeps next to nothing; ``unreadable``: sound that
            cannot be decoded.
        av.error.FFmpegError: the file cannot be read.
    """
    peak = 1.0
    while True:
        reader = SoundReader(path, sample_rate, start, end)
        track: Track | None = None
        for begun, place, block in reader:
            if track is None:
                begins, limit = under or (max(reader.first, begun), reader.samples_from(max(reader.first, begun)))
                track = Track(sample_rate, begins, limit, spool)
            if reader.peak <= 1 or peak > 1:  # otherwise it is read again, and this time only its peak counts
                sound = np.clip(np.rint(block * (FULL_SCALE / peak)), -32768, 32767).astype(np.int16)
                track.add(round((begun - track.begins) * sample_rate) + place, sound)
        if track is None:
            return None
        if reader.peak <= 1 or peak > 1:
            flac = track.finish(padded=under is not None)
            return SoundTrack(reader.start, reader.end, track.begins, track.samples, track.heard, flac)
        peak = min(reader.peak, LARGEST_PEAK)
        track.abandon()


class Track:
    """Samples that come in order, silence between them."""

    def __init__(self, sample_rate: int, begins: float, limit: int | None, spool: Spool | None) -> None:
        self.begins, self._limit, self._second = begins, limit, sample_rate
        self.samples = 0  # so far
        self.heard = False
        self._encoder = FlacEncoder(sample_rate, spool) if spool is not None else None

    def add(self, place: int, sound: NDArray[np.int16]) -> None:
        """Lay a block at ``place``, samples from the track's beginning; what lies before what is there already is left out."""
        self._silence(place)
        end = place + sound.size if self._limit is None else min(place + sound.size, self._limit)
        sound = sound[self.samples - place : max(0, end - place)]
        if sound.size:
            self._append(sound)
            self.heard = self.heard or bool((np.abs(sound.astype(np.int32)) > SILENCE).any())

    def finish(self, *, padded: bool) -> Payload | None:
        """The FLAC file, if there is one, with silence up to the limit if ``padded``."""
        if padded:
            assert self._limit is not None
            self._silence(self._limit)
        return None if self._encoder is None else self._encoder.finish()

    def abandon(self) -> None:
        """Give up, so that another track can be written to the spool."""
        if self._encoder is not None:
            self._encoder.abandon()

    def _silence(self, until: int) -> None:
        until = until if self._limit is None else min(until, self._limit)
        while self.samples < until:
            self._append(np.zeros(min(self._second, until - self.samples), np.int16))

    def _append(self, sound: NDArray[np.int16]) -> None:
        self.samples += sound.size
        if self._encoder is not None:
            self._encoder.add(sound)
