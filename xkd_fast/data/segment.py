"""Decoding of a part of a file: from a key frame before it on, so that nothing of it is missing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import av

WARM_UP = 1.0  # seconds of sound decoded before the part: codecs with overlapping blocks or a bit reservoir start wrong
STEPS_BACK = (0.0, 2.0, 10.0, 60.0)  # seconds before the part that are tried, where a search lands behind it
# Containers that are read from their beginning: time stamps after a search are a guess, or (AVI) count from the first picture.
UNINDEXED = frozenset(("aac", "ac3", "avi", "dts", "eac3", "mp3"))


def segment_bounds(container: Any, start: float | None, end: float | None) -> tuple[float, float]:
    """First and last instant of a part, in the container's time stamps, seconds; without a bound, infinity.

    ``start`` and ``end`` count from the container's beginning, as players do.
    """
    origin = (container.start_time or 0) / av.time_base
    return (-math.inf if start is None else origin + start), (math.inf if end is None else origin + end)


def frames_from(container: Any, stream: Any, first: float) -> Iterator[Any]:
    """Decoded frames of a stream, beginning with one that starts at ``first`` (in its time stamps, seconds) or before.

    Where the container leads to no such frame, all frames from the first one on; likewise where ``first`` is -infinity.
    """
    sound = stream.type == "audio"
    origin = (container.start_time or 0) / av.time_base
    if first <= origin or container.format.name in UNINDEXED:
        return container.decode(stream)
    for back in STEPS_BACK:
        target = first - back - (WARM_UP if sound else 0.0)
        if target <= origin:
            break
        try:
            container.seek(int(target / stream.time_base), stream=stream)
            frames = container.decode(stream)
            head = next(frames, None)
        except av.error.FFmpegError:
            break
        if head is not None and head.time is not None and head.time <= first:
            return itertools.chain([head], frames)
    container.seek(container.start_time or 0)
    return container.decode(stream)
