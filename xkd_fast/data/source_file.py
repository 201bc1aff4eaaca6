"""A source file: how it is opened, which of its streams count, and why it may give no sample."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
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
        av.error.FFmpegError: one in the middle cannot be decoded.
    """
    stream.codec_context.thread_count = 1  # the workers are the parallelism
    try:
        yield from frames_from(container, stream, first)
    except av.error.InvalidDataError:
        if _holds_more(container, stream):
            raise


def _holds_more(container: Any, stream: Any) -> bool:
    try:
        return any(packet.size for packet in container.demux(stream))
    except av.error.FFmpegError:
        return False


def promised_seconds(container: Any) -> float:
    """What a file says of its length; 0 if nothing."""
    promised = container.duration / av.time_base if container.duration else 0.0
    stream = video_stream(container)
    if container.format.name == "avi" and stream is not None and stream.average_rate:
        # FFmpeg itself goes by the size of what is left of the file
        promised = max(promised, float(stream.frames / stream.average_rate))
    return promised


def _preferred(streams: list[Any]) -> Any | None:
    marked = [stream for stream in streams if stream.disposition & Disposition.default]
    return next(iter(marked + streams), None)
