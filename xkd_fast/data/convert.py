"""One source video into one sample: constant frame rate, small frames, 16 kHz mono sound, picture and sound in step.

Runs in a worker process (`xkd_fast.data.workers`), because a damaged file may hang or crash the decoder.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import av
import numpy as np
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

Reason = Literal["unreadable", "no_video", "no_audio", "silent_audio", "too_short", "truncated", "timed_out", "crashed"]


@dataclass(frozen=True)
class Skipped:
    """Why a source gives no sample."""

    reason: Reason
    detail: str = ""


@dataclass(frozen=True)
class ConvertTask:
    """A source and what is to become of it."""

    path: str
    codec: Literal["mjpeg", "h264"]
    fps: float
    short_side: int  # pixels
    sample_rate: int
    min_seconds: float
    quality: int


@dataclass(frozen=True)
class Converted:
    """A sample's encoded streams and their sizes."""

    video: bytes
    audio: bytes
    frames: int
    samples: int  # of audio
    height: int
    width: int
    audio_offset: float  # seconds from the first frame to the source's first sound; what came before the picture was cut


class _Skip(Exception):
    """Leaves the conversion with a reason."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason)
        self.skipped = Skipped(reason, detail)


def convert(task: ConvertTask) -> Converted | Skipped:
    """Convert one source file; what is wrong with it comes back as :class:`Skipped`."""
    try:
        return _convert(task)
    except _Skip as skip:
        return skip.skipped
    except (av.error.FFmpegError, OSError, ValueError, EOFError) as error:
        return Skipped("unreadable", f"{type(error).__name__}: {error}")


def _convert(task: ConvertTask) -> Converted:
    with av.open(task.path, metadata_errors="replace") as container:
        if not container.streams.video:
            raise _Skip("no_video")
        if not container.streams.audio:
            raise _Skip("no_audio")
        promised = container.duration / av.time_base if container.duration else 0.0
    pictures, start, seconds = _read_frames(task)
    if seconds < task.min_seconds:
        raise _Skip("too_short", f"{seconds:.2f} s of picture, at least {task.min_seconds:g} s are asked for")
    waveform, audio_start = _read_audio(task)
    if waveform.size == 0:
        raise _Skip("no_audio", "the audio stream holds no sound")
    read = max(seconds + start, waveform.size / task.sample_rate + audio_start) - min(start, audio_start)
    if read < 0.9 * promised - 0.5:
        raise _Skip("truncated", f"{read:.2f} s could be read of the {promised:.2f} s that the file promises")
    samples = round(len(pictures) / task.fps * task.sample_rate)
    waveform = place_sound(waveform, round((audio_start - start) * task.sample_rate), samples)
    if not waveform.any():
        raise _Skip("silent_audio", "every sample under the picture is zero")
    height, width, _ = pictures[0].shape
    video, audio = encode_video(pictures, task.codec, task.fps, task.quality), encode_flac(waveform, task.sample_rate)
    return Converted(video, audio, len(pictures), samples, height, width, round(audio_start - start, 6))


def target_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height with the shorter one ``short_side`` and the aspect kept, both even."""
    scale = short_side / min(width, height)
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))


def _read_frames(task: ConvertTask) -> tuple[list[NDArray[np.uint8]], float, float]:
    """Frames [H, W, 3] uint8 at the constant rate; when the first is shown, and how long all are, seconds."""
    pictures: list[NDArray[np.uint8]] = []
    shown = 0
    start = end = 0.0
    held: Any = None
    step = 0.0
    with av.open(task.path, metadata_errors="replace") as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        anamorphic = stream.sample_aspect_ratio or Fraction(1)

        def show(until: int) -> None:
            nonlocal shown
            if until > shown:
                picture = _small_picture(held, anamorphic, task.short_side)
                pictures.extend([picture] * (until - shown))
                shown = until

        for frame in container.decode(stream):
            time = float(frame.time) if frame.time is not None else end
            if held is None:
                start = time
            else:
                if time <= end - step:  # a time stamp that goes back in time carries no information
                    continue
                # rounding of time stamps must not move a frame by a whole interval, hence the slack
                show(math.ceil((time - start - 1e-4) * task.fps))
            step = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else float(1 / rate)
            held, end = frame, time + step
        if held is None:
            raise _Skip("unreadable", "not one frame could be decoded")
        show(max(shown, 1, round((end - start) * task.fps)))
    return pictures, start, end - start


def _small_picture(frame: Any, anamorphic: Fraction, short_side: int) -> NDArray[np.uint8]:
    """A decoded frame as RGB [H, W, 3], upright, with square pixels, its short side ``short_side``."""
    width, height = target_size(round(frame.width * anamorphic), frame.height, short_side)
    small = frame.reformat(width=width, height=height, format="rgb24", interpolation=Interpolation.AREA)
    picture = small.to_ndarray()
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture


def _read_audio(task: ConvertTask) -> tuple[NDArray[np.int16], float]:
    """The sound, mono [samples] int16, and when it begins, seconds."""
    blocks: list[NDArray[Any]] = []
    start: float | None = None
    with av.open(task.path, metadata_errors="replace") as container:
        stream = container.streams.audio[0]
        resampler = av.AudioResampler(format="s16", layout="mono", rate=task.sample_rate)
        for frame in container.decode(stream):
            if start is None:
                start = float(frame.time) if frame.time is not None else 0.0
            blocks += [block.to_ndarray().reshape(-1) for block in resampler.resample(frame)]
        blocks += [block.to_ndarray().reshape(-1) for block in resampler.resample(None)]
    return (np.concatenate(blocks).astype(np.int16, copy=False) if blocks else np.empty(0, np.int16)), start or 0.0


def place_sound(waveform: NDArray[np.int16], offset: int, samples: int) -> NDArray[np.int16]:
    """Sound that begins ``offset`` samples after the picture (before it, if negative), cut and padded to ``samples``."""
    placed = np.zeros(samples, np.int16)
    first, source = max(offset, 0), max(-offset, 0)
    count = max(0, min(samples - first, waveform.size - source))
    placed[first : first + count] = waveform[source : source + count]
    return placed


def encode_video(pictures: list[NDArray[np.uint8]], codec: str, fps: float, quality: int) -> bytes:
    """Frames [H, W, 3] uint8 as a video file in memory: MJPEG in AVI, or H.264 in MP4 with a key frame a second."""
    height, width, _ = pictures[0].shape
    buffer = io.BytesIO()
    rate = Fraction(fps).limit_denominator(1000)
    with av.open(buffer, "w", format="avi" if codec == "mjpeg" else "mp4") as container:
        stream: Any
        if codec == "mjpeg":
            stream = container.add_stream("mjpeg", rate=rate)
            stream.pix_fmt = "yuvj420p"
            stream.codec_context.qmin = stream.codec_context.qmax = quality
        else:
            options = {"preset": "medium", "crf": str(quality), "threads": "1"}
            stream = container.add_stream("libx264", rate=rate, options=options)
            stream.pix_fmt = "yuv420p"
            stream.codec_context.gop_size = max(1, round(fps))
        stream.width, stream.height = width, height
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def encode_flac(waveform: NDArray[np.int16], sample_rate: int) -> bytes:
    """Mono int16 sound as a FLAC file in memory."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="flac") as container:
        stream: Any = container.add_stream("flac", rate=sample_rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(waveform[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = sample_rate, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()
