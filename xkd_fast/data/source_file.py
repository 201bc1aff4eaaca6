"""A source file: how it is opened, which of its streams count, and why it may give no sample."""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import av
from av.stream import Disposition

from xkd_fast.data.segment import frames_from

Reason = Literal[
    "unreadable",
    "no_video",
    "no_audio",
    "silent_audio",
    "too_short",
    "too_narrow",
    "truncated",
    "timed_out",
    "crashed",
    "missing",
]


@dataclass(frozen=True)
class Skipped:
    """Why a source gives no sample."""

    reason: Reason
    detail: str = ""


class Skip(Exception):
    """Leaves the conversion of a source with a reason."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason)
        self.skipped = Skipped(reason, detail)


PLAYLISTS = ("concat", "dash", "hls", "imf", "webm_dash_manifest")  # containers that name other files


def require_file(path: str) -> None:
    """Raise Skip unless there is a regular file."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise Skip("unreadable", "a link that leads nowhere, or a file that has gone") from None
    except OSError as error:
        raise Skip("unreadable", f"it cannot be reached: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise Skip("unreadable", "a folder, not a file; list the files in it, or name it as the source of its own")
    if not stat.S_ISREG(mode):
        raise Skip("unreadable", "no regular file")


def open_source(path: str) -> Any:
    """An input container of PyAV.

    Raises:
        av.error.FFmpegError, OSError, ValueError: it is no media file, or one that names others in its place.
    """
    # an absolute path: FFmpeg would take "http:x.mp4" for an address
    container = av.open(os.path.abspath(path), metadata_errors="replace", options={"protocol_whitelist": "file"})
    if not set(container.format.name.split(",")).isdisjoint(PLAYLISTS):
        container.close()
        raise ValueError("a list of other files, which are sources of their own")
    return container


def video_stream(container: Any) -> Any | None:
    """The stream of moving pictures that a player would show: the first one marked as default, or the first; no cover."""
    return _preferred([stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic])


def audio_stream(container: Any) -> Any | None:
    """The stream of sound that a player would play: the first one marked as default, or the first."""
    return _preferred(list(container.streams.audio))


def decoded(container: Any, stream: Any, first: float = -math.inf) -> Iterator[Any]:
    """The frames of a stream, without a last one within which the file ends; of those before ``first`` some are left out.

    ``first`` is an instant by the file's clock, seconds: the frames begin with one that starts then or before.

    Raises:
        Skip: one in the middle cannot be decoded; says of which stream, and how far into the file that one came.
        av.error.FFmpegError: the file cannot be read, or there is no memory.
    """
    stream.codec_context.thread_count = 1  # the workers are the parallelism
    reached: float | None = None
    try:
        for frame in frames_from(container, stream, first):
            if frame.time is not None:
                reached = frame.time + _seconds_of(frame)
            yield frame
    except av.error.FFmpegError as error:
        if isinstance(error, (OSError, MemoryError)):
            raise
        if not isinstance(error, av.error.InvalidDataError) or _holds_more(container, stream):
            where = _place(container, stream, reached)
            raise Skip("unreadable", f"{type(error).__name__}: {error.strerror}, in the {where}") from None


def _seconds_of(frame: Any) -> float:
    if isinstance(frame, av.AudioFrame):
        return float(frame.samples / frame.sample_rate)
    return float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0


def _place(container: Any, stream: Any, reached: float | None) -> str:
    """Where decoding stopped, in words; ``reached`` by the file's clock, seconds, and in words from the file's beginning."""
    kind = "sound" if stream.type == "audio" else "picture"
    if reached is None:
        return f"{kind} before anything of it was decoded"
    return f"{kind} after {max(0.0, reached - (container.start_time or 0) / av.time_base):.1f} s"


def _holds_more(container: Any, stream: Any) -> bool:
    try:
        return any(packet.size for packet in container.demux(stream))
    except av.error.FFmpegError:
        return False


# ----------------------------------------------------------------------------------- what a file says of its length

MATROSKA, OWN_LENGTHS = "matroska,webm", frozenset(("mov,mp4,m4a,3gp,3g2,mj2", "mxf"))
DURATION = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")  # Matroska's tag


@dataclass(frozen=True)
class Promise:
    """How long a file says that its picture and sound are.

    MP4, MXF and, by tags that many programs write, Matroska tell that of each stream. Others tell the length of the whole
    file. Where there are no other streams, that is the picture's or the sound's; otherwise it may be a second sound track's
    or a subtitle's, and proves nothing if packets of these reach it (:func:`others_end`).
    """

    seconds: float  # 0 = it says nothing
    shared: bool = False  # said of all streams, and others than picture and sound are among them


def promise_of(container: Any) -> Promise:
    """What a file says of the length of the picture and the sound that count."""
    whole = container.duration / av.time_base if container.duration else 0.0
    picture = video_stream(container)
    if container.format.name == "avi" and picture is not None and picture.average_rate:
        # FFmpeg itself goes by the size of what is left of the file
        whole = max(whole, float(picture.frames / picture.average_rate))
    if not other_streams(container):
        return Promise(whole)
    own = [_own_seconds(container, stream) for stream in (picture, audio_stream(container)) if stream is not None]
    return Promise(min(whole, max(own))) if own and all(own) else Promise(whole, shared=True)


def other_streams(container: Any) -> list[Any]:
    """The streams that last but do not count: further tracks of picture and sound, subtitles, data; no covers."""
    counting = {stream.index for stream in (video_stream(container), audio_stream(container)) if stream is not None}
    return [
        stream
        for stream in container.streams
        if stream.index not in counting
        and stream.type in ("video", "audio", "subtitle", "data")
        and not stream.disposition & Disposition.attached_pic
    ]


def _own_seconds(container: Any, stream: Any) -> float:
    """What a file says of a single stream: when it ends, seconds from the file's beginning; 0 if nothing."""
    if container.format.name == MATROSKA:
        told = DURATION.fullmatch(stream.metadata.get("DURATION", ""))
        return 0.0 if told is None else 3600 * int(told[1]) + 60 * int(told[2]) + float(told[3])
    if container.format.name not in OWN_LENGTHS or not stream.duration:
        return 0.0
    return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - (container.start_time or 0) / av.time_base


def packet_ends(container: Any, streams: list[Any]) -> Iterator[Fraction]:
    """When the packets of some streams end by the file's clock, seconds; nothing is decoded.

    Raises:
        av.error.FFmpegError: the file cannot be read.
    """
    for packet in container.demux(streams):
        begun = packet.dts if packet.pts is None else packet.pts
        if begun is not None and packet.size:
            lasts = packet.duration * packet.time_base if packet.duration else _usual_step(packet.stream)
            yield begun * packet.time_base + lasts


def _usual_step(stream: Any) -> Fraction:
    """How long a packet of a stream lasts that does not say so, seconds."""
    return 1 / (stream.average_rate or stream.guessed_rate or Fraction(25)) if stream.type == "video" else Fraction(0)


def others_end(path: str) -> float:
    """When the streams that do not count end by the file's clock, seconds, by the packets that are there; without, -infinity.

    Raises:
        av.error.FFmpegError, OSError, ValueError: the file cannot be opened.
    """
    end = -math.inf
    with open_source(path) as container:
        streams = other_streams(container)
        try:
            for each in packet_ends(container, streams) if streams else ():
                end = max(end, float(each))
        except av.error.FFmpegError:  # what is there was counted
            pass
    return end


def _preferred(streams: list[Any]) -> Any | None:
    marked = [stream for stream in streams if stream.disposition & Disposition.default]
    return next(iter(marked + streams), None)
