"""One source video into one sample: constant frame rate, small frames, 16 kHz mono sound, picture and sound in step.

Runs in a worker process (`xkd_fast.data.workers`), because a damaged file may hang or crash the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import av

from xkd_fast.data.encode import VideoEncoder
from xkd_fast.data.read_video import VideoReader
from xkd_fast.data.sound_track import SoundTrack, take_sound
from xkd_fast.data.source_file import (
    Promise,
    Skip,
    Skipped,
    audio_stream,
    open_source,
    others_end,
    promise_of,
    require_file,
    video_stream,
)
from xkd_fast.data.spool import CannotStore, NotStored, Payload, Spool


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
    spool: str | None = None  # long streams go into files whose paths begin like this; None = they stay in memory


@dataclass(frozen=True)
class Converted:
    """A sample's encoded streams and their sizes."""

    video: Payload | None  # None = the source has no picture; then frames, height and width are 0
    audio: Payload | None  # None = the source has no sound; then samples is 0
    frames: int
    samples: int  # of audio
    height: int
    width: int
    audio_offset: float  # seconds from the first frame to the source's first sound; what came before the picture was cut


def convert(task: ConvertTask) -> Converted | Skipped | NotStored:
    """Convert one source file; what is wrong with it comes back as :class:`Skipped`, what with the disk as `NotStored`."""
    try:
        return _convert(task)
    except CannotStore as failure:
        return failure.about
    except Skip as skip:
        return skip.skipped
    except (av.error.FFmpegError, OSError) as error:  # without the path, so that the words do not depend on it
        return Skipped("unreadable", f"{type(error).__name__}: {error.strerror}")
    except (ValueError, EOFError) as error:
        return Skipped("unreadable", f"{type(error).__name__}: {error}")


def _convert(task: ConvertTask) -> Converted:
    require_file(task.path)
    with open_source(task.path) as container:
        has_picture, has_sound = video_stream(container) is not None, audio_stream(container) is not None
        promise, origin = promise_of(container), (container.start_time or 0) / av.time_base
    if not has_picture and not (has_sound and task.without_picture):
        raise Skip("no_video")
    if not has_sound and not task.without_sound:
        raise Skip("no_audio")
    if not has_picture:
        return _convert_sound(task, promise, origin)
    reader = VideoReader(task.path, task.fps, task.short_side, task.start, task.end)
    film: VideoEncoder | None = None
    for picture, frames in reader:
        if film is None:
            height, width, _ = picture.shape
            film = VideoEncoder(task.codec, task.fps, task.quality, width, height, _spool(task, "video"))
        film.add(picture, frames)
    assert film is not None, "a reader without pictures raises"
    start, seconds = reader.start, reader.seconds
    if seconds < task.min_seconds:
        raise Skip("too_short", f"{seconds:.2f} s of picture, at least {task.min_seconds:g} s are asked for")
    sound = _sound_under(task, start, samples_of(film.frames, task.fps, task.sample_rate)) if has_sound else None
    if sound is None and not task.without_sound:
        raise Skip("no_audio", "the audio stream holds no sound")
    audio_start, audio_end = (start, start) if sound is None else (sound.start, sound.end)
    _require_whole(task, promise, max(seconds + start, audio_end), origin)
    heard = sound is not None and sound.heard
    if not heard and not task.without_sound:
        raise Skip("silent_audio", "no sample under the picture is above -80 dB of full scale")
    audio, samples = (sound.flac, sound.samples) if sound is not None and heard else (None, 0)
    offset = round(audio_start - start, 6)
    return Converted(film.finish(), audio, film.frames, samples, film.height, film.width, offset)


def samples_of(frames: int, fps: float, sample_rate: int) -> int:
    """How many samples of sound belong to so many frames."""
    return round(frames / fps * sample_rate)


def _spool(task: ConvertTask, name: str) -> Spool:
    return Spool(None if task.spool is None else f"{task.spool}.{name}")


def _sound_under(task: ConvertTask, begins: float, samples: int) -> SoundTrack | None:
    """The sound under the picture; None where there is none, or it is silent and that is no reason to skip the source."""
    spool = _spool(task, "audio")
    try:
        return take_sound(task.path, task.sample_rate, task.start, task.end, under=(begins, samples), spool=spool)
    except Skip as skip:
        if skip.skipped.reason != "silent_audio" or not task.without_sound:
            raise
        return None


def _convert_sound(task: ConvertTask, promise: Promise, origin: float) -> Converted:
    """A sample of a source without picture."""
    sound = take_sound(task.path, task.sample_rate, task.start, task.end, spool=_spool(task, "audio"))
    if sound is None:
        raise Skip("no_audio", "no sound lies in the part asked for, or in the audio stream")
    seconds = sound.samples / task.sample_rate
    if seconds < max(task.min_seconds, 1 / task.sample_rate):
        raise Skip("too_short", f"{seconds:.2f} s of sound, at least {task.min_seconds:g} s are asked for")
    _require_whole(task, promise, sound.end, origin)
    if not sound.heard:
        raise Skip("silent_audio", "no sample is above -80 dB of full scale")
    return Converted(None, sound.flac, 0, sound.samples, 0, 0, 0.0)


def _require_whole(task: ConvertTask, promise: Promise, end: float, origin: float) -> None:
    """Leave a file that ends long before it says; ``end`` of what was read and ``origin`` of the file by its clock, seconds.

    What it says of all its streams together may be true of those that are not read. They are asked then: if their packets reach
    the end that is promised, nothing was cut off.
    """
    begin, origin = task.start or 0.0, min(origin, 0.0)  # Matroska promises an end, not a length
    until = promise.seconds if task.end is None else min(promise.seconds, task.end)
    least = begin + 0.9 * (until - begin) - 0.5
    read = end - origin
    if read >= least or (promise.shared and others_end(task.path) - origin >= least):
        return
    raise Skip("truncated", f"{read - begin:.2f} s could be read of the {until - begin:.2f} s that the file promises")
