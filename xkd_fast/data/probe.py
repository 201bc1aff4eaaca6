"""What one media file holds, without converting it. Runs in a worker process (`xkd_fast.data.workers`)."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any, Literal

import av
import numpy as np

from xkd_fast.data.convert import SILENCE
from xkd_fast.data.read_audio import mono_weights
from xkd_fast.data.source_file import audio_stream, decoded, open_source, promised_seconds, video_stream

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
    """Open a file, decode its first picture, and its sound up to the first sample that is heard.

    What shows only further in, such as a file that was cut short, is found by converting it alone.
    """
    if not os.path.isfile(path):
        return Probe("no regular file, or a link that leads nowhere")
    try:
        return _probe(path)
    except (av.error.FFmpegError, OSError) as error:
        return Probe(f"{type(error).__name__}: {error.strerror}")
    except (ValueError, EOFError) as error:
        return Probe(f"{type(error).__name__}: {error}")


def _probe(path: str) -> Probe:
    with open_source(path) as container:
        picture, sound = video_stream(container), audio_stream(container)
        found: dict[str, Any] = {
            "container": container.format.name.split(",")[0],
            "seconds": promised_seconds(container) or None,
        }
        if picture is not None:
            frame = next(decoded(container, picture), None)
            if frame is None:
                return Probe("not one frame could be decoded")
            rate = picture.average_rate or picture.guessed_rate
            found |= {"video": picture.codec_context.name, "width": frame.width, "height": frame.height}
            found |= {"fps": float(rate) if rate else None, "pixels": frame.format.name}
        elif sound is None:
            return Probe("neither picture nor sound")
    return Probe(**found, **({} if sound is None else _sound_of(path)))


def _sound_of(path: str) -> dict[str, Any]:
    """Codec, form, and whether anything is heard, by the measure of what a shard would hold."""
    with open_source(path) as container:
        stream = audio_stream(container)
        assert stream is not None
        found = {"audio": stream.codec_context.name, "sample_rate": stream.rate or 0, "channels": stream.channels or 0}
        form: Any = None
        for frame in decoded(container, stream):
            if form != (frame.format.name, frame.layout.name, frame.sample_rate):  # it may change in mid-stream
                form = (frame.format.name, frame.layout.name, frame.sample_rate)
                weights = mono_weights([channel.name for channel in frame.layout.channels])
                resampler = av.AudioResampler(format="flt", layout=frame.layout, rate=frame.sample_rate)
            for block in resampler.resample(frame):
                mono = weights @ block.to_ndarray().reshape(-1, len(weights)).T
                if (np.abs(mono) * 32768 > SILENCE).any():
                    return found | {"sound": "heard"}
        return found | {"sound": "none" if form is None else "silent"}


def digest(path: str) -> str:
    """BLAKE2 of a file's bytes, hexadecimal; raises ``OSError`` where it cannot be read."""
    with open(path, "rb") as file:
        total = hashlib.blake2b(digest_size=16)
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
