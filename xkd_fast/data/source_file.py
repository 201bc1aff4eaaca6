"""A source file: how it is opened, which of its streams count, and why it may give no sample."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import av
from av.stream import Disposition

Reason = Literal[
    "unreadable", "no_video", "no_audio", "silent_audio", "too_short", "too_narrow", "truncated", "timed_out", "crashed"
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


def open_source(path: str) -> Any:
    """An input container of PyAV.

    Raises:
        av.error.FFmpegError, OSError, ValueError: it is no media file.
    """
    # an absolute path: FFmpeg would take "http:x.mp4" for an address
    return av.open(os.path.abspath(path), metadata_errors="replace")


def video_stream(container: Any) -> Any | None:
    """The stream of moving pictures that a player would show: the first one marked as default, or the first; no cover."""
    return _preferred([stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic])


def audio_stream(container: Any) -> Any | None:
    """The stream of sound that a player would play: the first one marked as default, or the first."""
    return _preferred(list(container.streams.audio))


def _preferred(streams: list[Any]) -> Any | None:
    marked = [stream for stream in streams if stream.disposition & Disposition.default]
    return next(iter(marked + streams), None)
