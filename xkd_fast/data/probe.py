"""What one media file holds, without converting it. Runs in a worker process (`xkd_fast.data.workers`)."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any, Literal

import av
from av.stream import Disposition

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


def probe(path: str) -> Probe:
    """Open a file, decode its first picture, and its sound up to the first sample that is not zero.

    What shows only further in, such as a file that was cut short, is found by converting it alone.
    """
    if not os.path.isfile(path):
        return Probe("no regular file, or a link that leads nowhere")
    try:
        return _probe(os.path.abspath(path))
    except (av.error.FFmpegError, OSError) as error:
        return Probe(f"{type(error).__name__}: {error.strerror}")
    except (ValueError, EOFError) as error:
        return Probe(f"{type(error).__name__}: {error}")


def _probe(path: str) -> Probe:
    with av.open(path, metadata_errors="replace") as container:
        pictures = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        found: dict[str, Any] = {"container": container.format.name.split(",")[0]}
        if container.duration:
            found["seconds"] = container.duration / av.time_base
        if pictures:
            stream = pictures[0]
            stream.codec_context.thread_count = 1
            frame = next(iter(container.decode(stream)), None)
            if frame is None:
                return Probe("not one frame could be decoded")
            rate = stream.average_rate or stream.guessed_rate
            found |= {"video": stream.codec_context.name, "width": frame.width, "height": frame.height}
            found |= {"fps": float(rate) if rate else None, "pixels": frame.format.name}
        if not container.streams.audio and not pictures:
            return Probe("neither picture nor sound")
    return Probe(**found, **_sound_of(path))


def _sound_of(path: str) -> dict[str, Any]:
    """Codec, form, and whether anything is heard, by the same 16-bit mono samples as a shard would hold."""
    with av.open(path, metadata_errors="replace") as container:
        if not container.streams.audio:
            return {}
        stream = container.streams.audio[0]
        stream.codec_context.thread_count = 1
        found = {"audio": stream.codec_context.name, "sample_rate": stream.rate or 0, "channels": stream.channels or 0}
        form: Any = None
        resampler: Any = None
        for frame in container.decode(stream):
            if form != (frame.format.name, frame.layout.name, frame.sample_rate):  # it may change in mid-stream
                form = (frame.format.name, frame.layout.name, frame.sample_rate)
                resampler = av.AudioResampler(format="s16", layout="mono", rate=frame.sample_rate)
            if any(block.to_ndarray().any() for block in resampler.resample(frame)):
                return found | {"sound": "heard"}
        return found | {"sound": "none" if form is None else "silent"}


def digest(path: str) -> str:
    """BLAKE2 of a file's bytes, hexadecimal; raises ``OSError`` where it cannot be read."""
    with open(path, "rb") as file:
        total = hashlib.blake2b(digest_size=16)
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
