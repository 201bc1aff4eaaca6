"""The JPEGs of a Motion JPEG file in AVI: a RIFF of nested lists of chunks, one chunk a frame."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from xkd_fast.data.packed import LARGEST_JPEG, Mosaic, PackedError

_CHUNK = struct.Struct("<4sI")  # name, bytes of what follows; padded to an even number
_LISTS = (b"RIFF", b"LIST")
_SIZE_AT = 32  # of width and height in the file's header chunk, bytes


def parse_avi(data: NDArray[np.uint8]) -> Mosaic:
    """The frames of an AVI file [bytes] uint8, as a mosaic of one tile a JPEG; the JPEGs, views of it, are not looked into.

    Raises:
        PackedError: what is no AVI file, is cut off, or holds no frames.
    """
    if data[:4].tobytes() != b"RIFF" or data[8:12].tobytes() != b"AVI ":
        raise PackedError("an AVI file begins with RIFF and AVI")
    size, jpegs = (0, 0), []
    for name, content in _chunks(data):
        if name == b"avih" and content.size >= _SIZE_AT + 8:
            width, height = struct.unpack_from("<2I", content[_SIZE_AT : _SIZE_AT + 8].tobytes())
            size = height, width
        elif name == b"00dc" and content.size:
            jpegs.append(content)
    if not jpegs:
        raise PackedError("an AVI file without frames")
    if not all(1 <= side <= LARGEST_JPEG for side in size):
        raise PackedError(f"an AVI file of {size[0]} × {size[1]} pixels")
    return Mosaic(len(jpegs), *size, columns=1, rows=1, jpegs=jpegs, block=1)


def _chunks(data: NDArray[np.uint8]) -> Iterator[tuple[bytes, NDArray[np.uint8]]]:
    """Name and content of every chunk that is no list."""
    place = 0
    while place + _CHUNK.size <= len(data):
        name, length = _CHUNK.unpack_from(data.data, place)
        place += _CHUNK.size
        if name in _LISTS:
            place += 4  # the list's own name; its chunks follow
            continue
        if place + length > len(data):
            raise PackedError(f"an AVI file of {len(data)} bytes, where a chunk ends at {place + length}")
        yield name, data[place : place + length]
        place += length + length % 2
