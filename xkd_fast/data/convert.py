"""One source video into one sample: constant frame rate, small frames, 16 kHz mono sound, picture and sound in step.

Runs in a worker process (`xkd_fast.data.workers`), because a damaged file may hang or crash the decoder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray

from xkd_fast.data.encode import VideoEncoder, encode_flac
from xkd_fast.data.read_audio import place_sound, read_audio
from xkd_fast.data.read_video import VideoReader
from xkd_fast.data.segment import segment_bounds
from xkd_fast.data.source_file import Skip, Skipped, audio_stream, open_source, promised_seconds, video_stream

# Peaks of coding noise in what was digital silence before a lossy encoder.
SILENCE = 3  # of 32768


@dataclass(frozen=True)
class ConvertTask:
    """A source and what is to become of it."""

    path: str
    codec: str  # a name of `xkd_fast.data.video_codecs.CODECS`
    fps: float
    short_side: int  # pixels
    sample_rate: int
    min_seconds: float
    quality: int  # of the encoder, on the codec's scale
    start: float | None = None  # seconds of the source's own time line; None = from its beginning
    end: float | None = None  # seconds; None = to its end
    without_sound: bool = False  # a video without sound becomes a sample without audio, instead of being skipped
    without_picture: bool = False  # a sound without picture becomes a sample without video, instead of being skipped


@dataclass(frozen=True)
class Converted:
    """A sample's encoded streams and their sizes."""

    video: bytes | None  # None = the source has no picture; then frames, height and width are 0
    audio: bytes | None  # None = the source has no sound; then samples is 0
    frames: int
    samples: int  # of audio
    height: int
    width: int
    audio_offset: float  # seconds from the first frame to the source's first sound; what came before the picture was cut


def convert(task: ConvertTask) -> Converted | Skipped:
    """Convert one source file; what is wrong with it comes back as :class:`Skipped`."""
    try:
        return _convert(task)
    except Skip as skip:
        return skip.skipped
    except (av.error.FFmpegError, OSError) as error:  # without the path, so that the words do not depend on it
        return Skipped("unreadable", f"{type(error).__name__}: {error.strerror}")
    except (ValueError, EOFError) as error:
        return Skipped("unreadable", f"{type(error).__name__}: {error}")


def _convert(task: ConvertTask) -> Converted:
    if not os.path.isfile(task.path):
        raise Skip("unreadable", "no regular file, or a link that leads nowhere")
    with open_source(task.path) as container:
        has_picture, has_sound = video_stream(container) is not None, audio_stream(container) is not None
        promised = promised_seconds(container)
        first, last = segment_bounds(container, task.start, task.end)
    if not has_picture and not (has_sound and task.without_picture):
        raise Skip("no_video")
    if not has_sound and not task.without_sound:
        raise Skip("no_audio")
    partial = task.start is not None or task.end is not None
    part = (promised if task.end is None else min(promised, task.end)) - (task.start or 0.0)
    if not has_picture:
        return _convert_sound(task, first, last, part)
    reader = VideoReader(task.path, task.fps, task.short_side, task.start, task.end)
    film: VideoEncoder | None = None
    for picture, frames in reader:
        film = film or VideoEncoder(task.codec, task.fps, task.quality, picture.shape[1], picture.shape[0])
        film.add(picture, frames)
    assert film is not None, "a reader without pictures raises"
    start, seconds = reader.start, reader.seconds
    if seconds < task.min_seconds:
        raise Skip("too_short", f"{seconds:.2f} s of picture, at least {task.min_seconds:g} s are asked for")
    pieces = _sound_of(task) if has_sound else []
    if not pieces and not task.without_sound:
        raise Skip("no_audio", "the audio stream holds no sound")
    audio_start = pieces[0][0] if pieces else start
    audio_end = pieces[-1][0] + pieces[-1][1].size / task.sample_rate if pieces else start
    # Matroska promises an end, not a length
    read = seconds if partial else max(seconds + start, audio_end) - min(start, audio_start, 0.0)
    _require_whole(read, part)
    samples = round(film.frames / task.fps * task.sample_rate)
    waveform = place_sound([(round((time - start) * task.sample_rate), sound) for time, sound in pieces], samples)
    heard = _is_heard(waveform)
    if not heard and not task.without_sound:
        raise Skip("silent_audio", "no sample under the picture is above -80 dB of full scale")
    audio, offset = encode_flac(waveform, task.sample_rate) if heard else None, round(audio_start - start, 6)
    return Converted(film.finish(), audio, film.frames, samples if heard else 0, film.height, film.width, offset)


def _sound_of(task: ConvertTask) -> list[tuple[float, NDArray[np.int16]]]:
    """The sound's pieces; none where it is silent and that is no reason to skip the source."""
    try:
        return read_audio(task.path, task.sample_rate, task.start, task.end)
    except Skip as skip:
        if skip.skipped.reason != "silent_audio" or not task.without_sound:
            raise
        return []


def _convert_sound(task: ConvertTask, first: float, last: float, promised: float) -> Converted:
    """A sample of a source without picture: its sound from ``first`` to ``last``, by the file's clock."""
    pieces = read_audio(task.path, task.sample_rate, task.start, task.end)
    if not pieces:
        raise Skip("no_audio", "no sound lies in the part asked for, or in the audio stream")
    start = max(first, pieces[0][0])
    seconds = min(last, pieces[-1][0] + pieces[-1][1].size / task.sample_rate) - start
    if seconds < max(task.min_seconds, 1 / task.sample_rate):
        raise Skip("too_short", f"{seconds:.2f} s of sound, at least {task.min_seconds:g} s are asked for")
    _require_whole(seconds, promised)
    places = [(round((time - start) * task.sample_rate), sound) for time, sound in pieces]
    waveform = place_sound(places, round(seconds * task.sample_rate))
    if not _is_heard(waveform):
        raise Skip("silent_audio", "no sample is above -80 dB of full scale")
    return Converted(None, encode_flac(waveform, task.sample_rate), 0, waveform.size, 0, 0, 0.0)


def _require_whole(read: float, promised: float) -> None:
    if read < 0.9 * promised - 0.5:
        raise Skip("truncated", f"{read:.2f} s could be read of the {promised:.2f} s that the file promises")


def _is_heard(waveform: NDArray[np.int16]) -> bool:
    return bool((np.abs(waveform.astype(np.int32)) > SILENCE).any())
