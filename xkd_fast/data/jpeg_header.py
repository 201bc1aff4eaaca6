"""The size of a JPEG, from a walk through its header: what DALI must not be given, for it ends the process over it."""

from __future__ import annotations

from xkd_fast.data.packed import PackedError

_START, _SCAN = 0xD8, 0xDA
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive; others are rare and not decoded by all
_WITH_LENGTH = frozenset({*range(0xC0, 0xD0), *range(0xDB, 0xE0), *range(0xE0, 0xF0), 0xFE}) - {0xC8}


def jpeg_size(data: bytes | memoryview) -> tuple[int, int]:
    """Height and width of a JPEG, pixels, whose header is whole up to the first scan.

    DALI 2.4's parser (of nvImageCodec) ends in a segmentation fault where threads find a broken header; damage behind the
    header raises an error.

    Raises:
        PackedError: saying what is wrong with the header.
    """
    if data[:2] != bytes((0xFF, _START)):
        raise PackedError("a JPEG begins with FF D8")
    place, size = 2, None
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            raise PackedError(f"a JPEG without a marker at byte {place} of its header")
        marker, length = data[place + 1], data[place + 2] << 8 | data[place + 3]
        if marker == _SCAN:
            if size is None:
                raise PackedError("a JPEG whose scan begins before its size is told")
            return size
        if marker not in _WITH_LENGTH or length < 2 or place + 2 + length > len(data):
            raise PackedError(f"a JPEG with the marker {marker:02X} of {length} bytes at byte {place} of its header")
        if marker in _FRAMES:
            if length < 8:
                raise PackedError(f"a JPEG with a frame header of {length} bytes")
            size = data[place + 5] << 8 | data[place + 6], data[place + 7] << 8 | data[place + 8]
        place += 2 + length
    raise PackedError("a JPEG that ends in its header")
