"""What one media file holds, without converting it. Runs in a worker process (`xkd_fast.data.workers`)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import av

from xkd_fast.data.convert import samples_of
from xkd_fast.data.read_video import frames_in, picture_end
from xkd_fast.data.sound_track import take_sound
from xkd_fast.data.source_file import Skip, audio_stream, decoded, open_source, promise_of, require_file, video_stream

Sound = Literal["heard", "silent", "none"]


@dataclass(frozen=True)
class Probe:
    """What a file holds; of a file that cannot be read, ``problem`` alone counts."""

    problem: str | None = None  # why it cannot be read
    container: str = ""
    seconds: float | None = None  # by the file's header; None where that does not say
    video: str | None = None  # codec of its first picture stream; None = no picture
    width: int = 0  # pixels, as stored
    height: int = 0
    fps: float | None = None
    pixels: str | None = None  # their format
    audio: str | None = None  # codec of its first sound stream; None = no sound
    sample_rate: int = 0  # Hz
    channels: int = 0
    sound: Sound = "none"


@dataclass(frozen=True)
class ProbeTask:
    """A file, and what the shards would be like."""

    path: str
    fps: float
    sample_rate: int  # Hz


def probe(task: ProbeTask) -> Probe:
    """Open a file, decode its first picture, and listen to all of its sound as `prepare` would.

    Pictures that are damaged or lacking further in are found by converting the file alone.
    """
    try:
        return _probe(task)
    except Skip as skip:
        return Probe(skip.skipped.detail or skip.skipped.reason)
    except (av.error.FFmpegError, OSError) as error:
        return Probe(f"{type(error).__name__}: {error.strerror}")
    except (ValueError, EOFError) as error:
        return Probe(f"{type(error).__name__}: {error}")


def _probe(task: ProbeTask) -> Probe:
    require_file(task.path)
    under: tuple[float, int] | None = None
    with open_source(task.path) as container:
        picture, sound = video_stream(container), audio_stream(container)
        found: dict[str, Any] = {
            "container": container.format.name.split(",")[0],
            "seconds": promise_of(container).seconds or None,
        }
        if sound is not None:
            found |= {"audio": sound.codec_context.name, "sample_rate": sound.rate or 0, "channels": sound.channels or 0}
        if picture is not None:
            frame = next(decoded(container, picture), None)
            if frame is None:
                return Probe("not one frame could be decoded")
            rate = picture.average_rate or picture.guessed_rate
            found |= {"video": picture.codec_context.name, "width": frame.width, "height": frame.height}
            found |= {"fps": float(rate) if rate else None, "pixels": frame.format.name}
            start = float(frame.time or 0.0)
        elif sound is None:
            return Probe("neither picture nor sound")
    if sound is not None:
        if picture is not None:
            frames = frames_in(picture_end(task.path) - start, task.fps)
            under = start, samples_of(frames, task.fps, task.sample_rate)
        found["sound"] = _sound_of(task, under)
    return Probe(**found)


def _sound_of(task: ProbeTask, under: tuple[float, int] | None) -> Sound:
    """Whether anything is heard on the track that a shard would hold."""
    try:
        track = take_sound(task.path, task.sample_rate, under=under)
    except Skip as skip:
        if skip.skipped.reason != "silent_audio":  # the channels cancel each other
            raise
        return "silent"
    return "none" if track is None else "heard" if track.heard else "silent"


def digest(path: str) -> str:
    """BLAKE2 of a file's bytes, hexadecimal; raises ``OSError`` where it cannot be read."""
    with open(path, "rb") as file:
        total = hashlib.blake2b(digest_size=16)
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
