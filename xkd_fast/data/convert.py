"""One source video into one sample: constant frame rate, small frames, 16 kHz mono sound, picture and sound in step.

Runs in a worker process (`xkd_fast.data.workers`), because a damaged file may hang or crash the decoder.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from xkd_fast.data.encode import SCALING, VideoEncoder, encode_flac

Reason = Literal[
    "unreadable", "no_video", "no_audio", "silent_audio", "too_short", "too_narrow", "truncated", "timed_out", "crashed"
]

TIME_STAMP_ERROR = (1e-4, 1.1e-3)  # seconds; between them the unit of the file's time stamps, a millisecond in Matroska
LONGEST_STILL = 600.0  # seconds that one picture may stand; more comes from a damaged time stamp
AUDIO_GAP = 0.1  # seconds; a longer jump of the sound's time stamps is a pause or an overlap, a shorter one is jitter
MAX_ASPECT = 16  # long side : short side


@dataclass(frozen=True)
class Skipped:
    """Why a source gives no sample."""

    reason: Reason
    detail: str = ""


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
    except (av.error.FFmpegError, OSError) as error:  # without the path, so that the words do not depend on it
        return Skipped("unreadable", f"{type(error).__name__}: {error.strerror}")
    except (ValueError, EOFError) as error:
        return Skipped("unreadable", f"{type(error).__name__}: {error}")


def _convert(task: ConvertTask) -> Converted:
    if not os.path.isfile(task.path):
        raise _Skip("unreadable", "no regular file, or a link that leads nowhere")
    with _open(task) as container:
        if not _pictures_of(container):
            raise _Skip("no_video")
        if not container.streams.audio:
            raise _Skip("no_audio")
        promised = container.duration / av.time_base if container.duration else 0.0
    film, start, seconds = _read_frames(task)
    if seconds < task.min_seconds:
        raise _Skip("too_short", f"{seconds:.2f} s of picture, at least {task.min_seconds:g} s are asked for")
    pieces = _read_audio(task)
    if not pieces:
        raise _Skip("no_audio", "the audio stream holds no sound")
    audio_start = pieces[0][0]
    audio_end = pieces[-1][0] + pieces[-1][1].size / task.sample_rate
    read = max(seconds + start, audio_end) - min(start, audio_start, 0.0)  # Matroska promises an end, not a length
    if read < 0.9 * promised - 0.5:
        raise _Skip("truncated", f"{read:.2f} s could be read of the {promised:.2f} s that the file promises")
    samples = round(film.frames / task.fps * task.sample_rate)
    waveform = place_sound([(round((time - start) * task.sample_rate), sound) for time, sound in pieces], samples)
    if not waveform.any():
        raise _Skip("silent_audio", "every sample under the picture is zero")
    video, audio = film.finish(), encode_flac(waveform, task.sample_rate)
    return Converted(video, audio, film.frames, samples, film.height, film.width, round(audio_start - start, 6))


def _open(task: ConvertTask) -> Any:
    # an absolute path: FFmpeg would take "http:x.mp4" for an address
    return av.open(os.path.abspath(task.path), metadata_errors="replace")


def _pictures_of(container: Any) -> list[Any]:
    """The video streams but for cover pictures."""
    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def target_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height with the shorter one ``short_side`` and the aspect kept, both even."""
    scale = short_side / min(width, height)
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))


def _read_frames(task: ConvertTask) -> tuple[VideoEncoder, float, float]:
    """An encoder with all frames at the constant rate; when the first is shown, and how long all are, seconds."""
    film: VideoEncoder | None = None
    shown = 0
    start = end = 0.0
    held: Any = None
    step = 0.0
    with _open(task) as container:
        stream = _pictures_of(container)[0]
        stream.codec_context.thread_count = 1  # the workers are the parallelism
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        scaler = _Scaler(stream.sample_aspect_ratio or Fraction(1), task.short_side)

        slack = min(max(float(stream.time_base or 0), TIME_STAMP_ERROR[0]), TIME_STAMP_ERROR[1])

        def show(until: int) -> None:
            nonlocal shown, film
            if until - shown > LONGEST_STILL * task.fps:
                raise _Skip("unreadable", f"by its time stamps one picture stands for {(until - shown) / task.fps:.0f} s")
            if until > shown:
                picture = scaler(held)
                film = film or VideoEncoder(task.codec, task.fps, task.quality, picture.shape[1], picture.shape[0])
                film.add(picture, until - shown)
                shown = until

        for frame in container.decode(stream):
            time = float(frame.time) if frame.time is not None else end
            if held is None:
                start = time
            else:
                if time <= end - step:  # a time stamp that goes back in time carries no information
                    continue
                # rounding of time stamps must not move a frame by a whole interval
                show(math.ceil((time - start - slack) * task.fps))
            step = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else float(1 / rate)
            held, end = frame, time + step
        if held is None:
            raise _Skip("unreadable", "not one frame could be decoded")
        show(max(shown, 1, round((end - start) * task.fps)))
    assert film is not None
    return film, start, end - start


class _Scaler:
    """Decoded frames as RGB [H, W, 3] uint8, upright, with square pixels, all of the size that the first one asks for."""

    def __init__(self, anamorphic: Fraction, short_side: int) -> None:
        self._anamorphic, self._short_side = anamorphic, short_side
        self._size: tuple[int, int] | None = None
        self._turns = 0
        self._reformatter = VideoReformatter()  # one for all frames: frame.reformat() makes a new one each time, 4.5 ms for 0.9

    def __call__(self, frame: Any) -> NDArray[np.uint8]:
        if self._size is None:
            width = max(1, round(frame.width * self._anamorphic))
            if max(width, frame.height) > MAX_ASPECT * min(width, frame.height):
                raise _Skip("too_narrow", f"a picture of {width} × {frame.height}; the sides may differ {MAX_ASPECT}-fold")
            self._size = target_size(width, frame.height, self._short_side)
            self._turns = round(getattr(frame, "rotation", 0) / 90) % 4
        width, height = self._size
        small = self._reformatter.reformat(frame, width, height, "rgb24", interpolation=SCALING, threads=1)
        picture: NDArray[Any] = small.to_ndarray()
        return np.ascontiguousarray(np.rot90(picture, self._turns)) if self._turns else picture


def _read_audio(task: ConvertTask) -> list[tuple[float, NDArray[np.int16]]]:
    """The sound in pieces without pauses: when each begins, seconds, and its mono samples, int16."""
    pieces: list[tuple[float, NDArray[np.int16]]] = []
    blocks: list[NDArray[Any]] = []
    resampler: Any = None
    form: Any = None
    begun = heard = 0.0

    def drain() -> None:
        if resampler is not None:
            blocks.extend(block.to_ndarray().reshape(-1) for block in resampler.resample(None))

    def end_piece() -> None:
        nonlocal blocks
        drain()
        sound = np.concatenate(blocks).astype(np.int16, copy=False) if blocks else np.empty(0, np.int16)
        if sound.size:
            pieces.append((begun, sound))
        blocks = []

    with _open(task) as container:
        stream = container.streams.audio[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            time = float(frame.time) if frame.time is not None else heard
            if form is not None and time < heard - AUDIO_GAP:
                continue  # spliced recordings overlap; pictures that go back in time are left out as well
            if form is None or time > heard + AUDIO_GAP:
                end_piece()
                begun = heard = time
                form = None
            if form != (frame.format.name, frame.layout.name, frame.sample_rate):  # it may change in mid-stream
                if form is not None:
                    drain()
                form = (frame.format.name, frame.layout.name, frame.sample_rate)
                resampler = av.AudioResampler(format="s16", layout="mono", rate=task.sample_rate)
            heard += frame.samples / frame.sample_rate
            blocks += [block.to_ndarray().reshape(-1) for block in resampler.resample(frame)]
        end_piece()
    return pieces


def place_sound(pieces: list[tuple[int, NDArray[np.int16]]], samples: int) -> NDArray[np.int16]:
    """Sounds that begin so many samples after the picture (before it, if negative) on a silent track of ``samples``."""
    placed = np.zeros(samples, np.int16)
    for offset, sound in pieces:
        first, source = max(offset, 0), max(-offset, 0)
        count = max(0, min(samples - first, sound.size - source))
        placed[first : first + count] = sound[source : source + count]
    return placed
