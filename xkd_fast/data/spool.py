"""Encoded streams on their way from a worker to its caller: short ones as bytes, long ones as files."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

IN_MEMORY = 4 * 2**20  # bytes of a stream that are kept in memory, at most, where a file may take the rest
CHUNK = 1 << 20  # bytes read at once from a file


@dataclass(frozen=True)
class Stored:
    """A stream that lies in a file, or in a part of one."""

    path: str
    size: int  # bytes
    offset: int = 0  # where in the file it begins


Payload = bytes | Stored


def size_of(payload: Payload) -> int:
    """Bytes of a stream, wherever it lies."""
    return payload.size if isinstance(payload, Stored) else len(payload)


def chunks(payload: Payload) -> Iterator[bytes]:
    """The bytes of a stream, a file's in pieces."""
    if isinstance(payload, bytes):
        yield payload
        return
    with opened(payload) as file:
        left = payload.size
        while data := file.read(min(CHUNK, left)):
            left -= len(data)
            yield data


def opened(payload: Payload) -> BinaryIO:
    """A stream as a file, at its first byte; what follows after its last one belongs to others."""
    if not isinstance(payload, Stored):
        return io.BytesIO(payload)
    file = open(payload.path, "rb")  # noqa: SIM115
    file.seek(payload.offset)
    return file


def crc32_of(payload: Payload) -> int:
    """CRC-32 of a stream."""
    total = 0
    for data in chunks(payload):
        total = zlib.crc32(data, total)
    return total


def discard(payload: Payload | None) -> None:
    """Delete the file of a stream that has one for its own."""
    if isinstance(payload, Stored):
        with contextlib.suppress(OSError):
            os.unlink(payload.path)


@dataclass(frozen=True)
class NotStored:
    """Why a stream's file could not be written: its disk's fault, and not its source's."""

    errno: int
    strerror: str
    path: str


class CannotStore(Exception):
    """A stream's file cannot be written."""

    def __init__(self, about: NotStored) -> None:
        super().__init__(about.strerror)
        self.about = about


class Spool:
    """A file to write and to go back in: in memory up to ``IN_MEMORY`` bytes, then at ``path``; without a path in memory alone.

    The folder of ``path`` must exist, and no file at it. Writing raises `CannotStore` where the file cannot be written, and so
    does `take` after it, since an encoder in between may have dropped that exception.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._file: BinaryIO = io.BytesIO()
        self._failure: CannotStore | None = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except OSError as error:
            about = NotStored(error.errno or errno.EIO, error.strerror or str(error), self.path or "")
            self._failure = CannotStore(about)
            raise self._failure from error

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write at the place reached, as files do."""
        with self._writing():
            if self.path is not None and isinstance(self._file, io.BytesIO) and self._file.tell() + len(data) > IN_MEMORY:
                place, memory = self._file.tell(), self._file
                self._file = open(self.path, "xb+")  # noqa: SIM115
                self._file.write(memory.getbuffer())
                self._file.seek(place)
            return self._file.write(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place, as files do."""
        with self._writing():
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The place reached, bytes from the beginning."""
        return self._file.tell()

    def clear(self) -> None:
        """Begin again with nothing."""
        with self._writing():
            self._file.seek(0)
            self._file.truncate()

    def take(self) -> Payload:
        """What was written; nothing can be written any more."""
        with self._writing():
            if isinstance(self._file, io.BytesIO):
                return self._file.getvalue()
            assert self.path is not None
            self._file.close()
            return Stored(self.path, os.path.getsize(self.path))
