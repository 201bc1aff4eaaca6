"""Segments of a packed matrix of tokens, and the table by which a kernel finds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from xkd_kernels.checks import whole_number

Runs = Sequence[tuple[int, int]]
"""Runs of segments of equal length, in the order of the rows: (number of segments, tokens of each)."""


def split_runs(segments: Runs, rows: int) -> tuple[list[int], list[int]]:
    """Numbers of segments and their lengths, run by run.

    Raises:
        ValueError: a run without tokens, or runs that do not make up ``rows`` tokens.
    """
    try:
        pairs = [(whole_number(count), whole_number(length)) for count, length in segments]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"segments = {segments!r} must be a list of pairs of whole numbers: (number of segments, tokens of each)"
        ) from error
    if not pairs:
        raise ValueError("segments is empty; give at least one run (number of segments, tokens of each)")
    segments, counts, lengths = pairs, [count for count, _ in pairs], [length for _, length in pairs]
    if any(count < 1 or length < 1 for count, length in zip(counts, lengths, strict=True)):
        raise ValueError(f"segments = {list(segments)}: each run is (number of segments, tokens of each), both at least 1")
    total = sum(count * length for count, length in zip(counts, lengths, strict=True))
    if total != rows:
        raise ValueError(f"segments = {list(segments)} make up {total} tokens, but there are {rows}; they must cover all rows")
    return counts, lengths


@dataclass(frozen=True)
class SegmentTable:
    """Segments that one launch treats alike.

    Attributes:
        places: [segments, 2] int32 on the device: first row and length.
        longest: tokens of the longest.
    """

    places: Tensor
    longest: int

    @property
    def block(self) -> int:
        """The power of two, 16 or more, that holds the longest."""
        return max(16, triton.next_power_of_2(self.longest))


@cache  # for good: a CUDA graph that was recorded goes on reading its tables
def segment_tables(
    counts: tuple[int, ...], lengths: tuple[int, ...], device: torch.device, limit: int
) -> tuple[SegmentTable, ...]:
    """One table for each power of two up to ``limit`` that holds a segment's tokens, and one for all the longer ones.

    Kept for good, 8 bytes of the device for each segment of every list that was ever seen. The first call with a list copies
    from the host, which waits for the device and cannot be recorded: run once before recording a CUDA graph.
    """
    places: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for count, length in zip(counts, lengths, strict=True):
        block = min(triton.next_power_of_2(length), limit + 1)
        for _ in range(count):
            places.setdefault(block, []).append((start, length))
            start += length
    return tuple(
        SegmentTable(torch.tensor(found, dtype=torch.int32, device=device), max(length for _, length in found))
        for _, found in sorted(places.items())
    )
