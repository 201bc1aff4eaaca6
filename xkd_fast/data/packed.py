"""Two file formats for frames that no video container serves: mosaics of JPEGs, and raw planes. Both describe themselves.

All numbers are unsigned, 32 bits, little-endian; a frame is H × W pixels, both even. Colours are those of JPEG: BT.601, full
range, with chroma of half the height and width, sited in the middle of its four pixels.

``KEY.mosaic``: JPEGs that each hold the same number of consecutive frames, a second of them or more, tiled row by row.

====================  =====================================================================================
``XKDMOS01``          8 bytes
frames                in the whole file, 1 or more
height, width         of a frame, pixels
columns, rows         of tiles in a JPEG; a tile is a frame, its last row and column repeated up to the next multiple of 16
length × JPEGs        bytes of each JPEG; there are ⌈frames / (columns · rows)⌉
JPEGs                 4:2:0; the last has only as many rows of tiles as it needs, and grey where no frame is left
====================  =====================================================================================

No block of a JPEG holds two frames. A decoder that interpolates chroma mixes a quarter of the neighbour's colour (in a corner
7/16), nothing of its brightness, into the outermost pixels where frames touch: on the left and above, on the right and below
where a side is a multiple of 16. Neighbours are a frame or a few apart in time, so their edges are mostly of the same colours.

``KEY.yuv``: frames as they are.

====================  =====================================================================================
``XKDYUV01``          8 bytes
frames                1 or more
height, width         of a frame, pixels
planes × frames       Y [H, W], U [H/2, W/2], V [H/2, W/2], one frame after the other
====================  =====================================================================================
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 16  # pixels; a block of 4:2:0 JPEG
LONGEST_SIDE = 8192  # pixels of a JPEG of several tiles
LARGEST_JPEG = 65535  # pixels a side, by the JPEG format
_MOSAIC, _MOSAIC_HEADER = b"XKDMOS01", struct.Struct("<8s5I")
_YUV, _YUV_HEADER = b"XKDYUV01", struct.Struct("<8s3I")


class PackedError(ValueError):
    """A file that is not what its format promises."""


def aligned(side: int, block: int = BLOCK) -> int:
    """A side of the tile that holds a frame's side, pixels."""
    return -(-side // block) * block


def mosaic_grid(height: int, width: int, fps: float) -> tuple[int, int]:
    """Columns and rows of tiles so that a JPEG is about square and holds at least a second, if that is not too large."""
    tile_height, tile_width = aligned(height), aligned(width)
    second = max(1, math.ceil(fps))
    columns = min(max(1, round(math.sqrt(second * tile_height / tile_width))), second, max(1, LONGEST_SIDE // tile_width))
    rows = min(math.ceil(second / columns), max(1, LONGEST_SIDE // tile_height))
    return columns, rows


@dataclass(frozen=True)
class Mosaic:
    """A mosaic file's parts."""

    frames: int
    height: int
    width: int
    columns: int
    rows: int
    jpegs: Sequence[NDArray[np.uint8]]  # the bytes of each
    block: int = BLOCK  # pixels, of which a tile's sides are multiples

    @property
    def tile(self) -> tuple[int, int]:
        """Height and width of a tile, pixels."""
        return aligned(self.height, self.block), aligned(self.width, self.block)

    @property
    def tiles(self) -> int:
        """Frames of a JPEG, but perhaps for the last."""
        return self.columns * self.rows

    def size(self, jpeg: int) -> tuple[int, int]:
        """Height and width of a JPEG, pixels."""
        held = min(self.tiles, self.frames - jpeg * self.tiles)
        return -(-held // self.columns) * self.tile[0], self.columns * self.tile[1]

    def holding(self, start: int, count: int) -> range:
        """Numbers of the JPEGs that hold ``count`` frames from ``start`` on, as far as there are any."""
        end = min(start + count, self.frames)
        return range(start // self.tiles, -(-end // self.tiles)) if start < end else range(0)


def pack_mosaic(frames: int, height: int, width: int, grid: tuple[int, int], jpegs: Sequence[bytes]) -> bytes:
    """A mosaic file of ``jpegs``, tiled as ``grid`` = (columns, rows) says."""
    return b"".join([mosaic_header(frames, height, width, grid, [len(jpeg) for jpeg in jpegs]), *jpegs])


def mosaic_header(frames: int, height: int, width: int, grid: tuple[int, int], lengths: Sequence[int]) -> bytes:
    """What stands before JPEGs of these lengths, bytes."""
    return _MOSAIC_HEADER.pack(_MOSAIC, frames, height, width, *grid) + struct.pack(f"<{len(lengths)}I", *lengths)


def parse_mosaic(data: NDArray[np.uint8]) -> Mosaic:
    """The parts of a mosaic file [bytes] uint8, as views of it; the JPEGs are not looked into.

    Raises:
        PackedError: saying which promise of the format is broken.
    """
    magic, frames, height, width, columns, rows = _header(data, _MOSAIC_HEADER, "mosaic")
    _check(magic == _MOSAIC, f"a mosaic begins with {_MOSAIC!r}, not {magic!r}")
    _check_frames(frames, height, width)
    _check(columns >= 1 and rows >= 1, f"a grid of {columns} × {rows} tiles")
    longest = max(rows * aligned(height), columns * aligned(width))
    _check(longest <= LARGEST_JPEG, f"a JPEG of {longest} pixels a side, where {LARGEST_JPEG} is the most")
    number = -(-frames // (columns * rows))
    begin = _MOSAIC_HEADER.size + 4 * number
    _check(begin <= data.size, f"{data.size} bytes, too few for the lengths of {number} JPEGs")
    lengths = np.frombuffer(data[_MOSAIC_HEADER.size : begin], "<u4").astype(np.int64)
    _check(bool((lengths > 0).all()), "an empty JPEG")
    _check(begin + int(lengths.sum()) == data.size, f"{data.size} bytes, where the header promises {begin + lengths.sum()}")
    ends = begin + np.cumsum(lengths)
    jpegs = [data[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]
    return Mosaic(frames, height, width, columns, rows, jpegs)


def yuv_header(frames: int, height: int, width: int) -> bytes:
    """What stands before the planes."""
    return _YUV_HEADER.pack(_YUV, frames, height, width)


def parse_yuv(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The frames of a yuv file [bytes] uint8, as a view of it: [T, H · 3/2, W] uint8, the planes of each below each other.

    Raises:
        PackedError: saying which promise of the format is broken.
    """
    magic, frames, height, width = _header(data, _YUV_HEADER, "yuv file")
    _check(magic == _YUV, f"a yuv file begins with {_YUV!r}, not {magic!r}")
    _check_frames(frames, height, width)
    promised = _YUV_HEADER.size + frames * height * width * 3 // 2
    _check(data.size == promised, f"{data.size} bytes, where the header promises {promised}")
    return data[_YUV_HEADER.size :].reshape(frames, height * 3 // 2, width)


def _header(data: NDArray[np.uint8], header: struct.Struct, what: str) -> tuple[Any, ...]:
    _check(data.size >= header.size, f"{data.size} bytes, too few for the header of a {what}")
    return header.unpack(data[: header.size].tobytes())


def _check_frames(frames: int, height: int, width: int) -> None:
    sound = frames >= 1 and height >= 2 and width >= 2 and height % 2 == width % 2 == 0
    _check(sound, f"{frames} frames of {height} × {width} pixels, where at least one of even sides is needed")


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise PackedError(problem)
