"""Where the files of a shard set are: what a shard set asks of a place, and the place that is a folder of this machine.

The other place, a server that speaks HTTP, is `xkd_fast.data.http_folder`.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import IO, Protocol

from xkd_fast.errors import UserError

MANIFEST = "manifest.json"
AGAIN = "copy or prepare the shards again"
MAX_OPEN_FILES = 128
BLOCK = 2**20  # bytes of a file copied at a time


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a place is an address rather than a folder."""
    return isinstance(place, str) and place.lower().startswith(("http://", "https://"))


def require_readable(place: str | os.PathLike[str]) -> None:
    """Refuse an address that is not spoken here.

    Raises:
        UserError: naming it and what to write.
    """
    if isinstance(place, str) and not is_url(place) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place):
        raise UserError(
            f"{shown(place)} is no place of shards: they are read from folders and by http:// or https://; name the https "
            "address of the store (a signed one may be used), or copy them"
        )


def shown(place: str | os.PathLike[str]) -> str:
    """A place as messages and records name it: without what may be secret, the query of an address."""
    return str(place).partition("?")[0] if is_url(place) else str(place)


class Storage(Protocol):
    """The files of one shard set, by name. All methods may be called from any thread."""

    is_local: bool  # whether bytes that were read wrongly once are read wrongly again

    def where(self, name: str = "") -> str:
        """A file's, or the whole set's, place as messages show it."""
        ...

    def check(self) -> None:
        """Raise ``UserError`` if this is plainly no place of a shard set."""
        ...

    def fetch(self, name: str, what: str) -> bytes:
        """A small file, whole.

        Raises:
            UserError: naming the file, ``what`` it is, the reason and what to do.
        """
        ...

    def expect(self, name: str, size: int) -> None:
        """Take note of the bytes that a tar must have; a place that can tell at once without cost does.

        Raises:
            UserError: it has another size, or is missing.
        """
        ...

    def read(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset`` of an expected tar; fewer at the end of a file that has shrunk.

        Raises:
            UserError: it cannot be read.
        """
        ...

    def copy(self, name: str, file: IO[bytes]) -> None:
        """Write the whole of an expected tar to ``file``, whose position is its start.

        Raises:
            UserError: it cannot be read.
            OSError: ``file`` cannot be written.
        """
        ...


class OpenFiles:
    """File descriptors by path; those used least recently are closed once there are many."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, _File] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path) -> _File:
        """The open file, opened now if it is not.

        Raises:
            UserError: it cannot be opened.
        """
        with self._lock:
            file = self._files.pop(path, None) or _File(path)
            self._files[path] = file
            if len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)  # closed when its last reader lets go of it
            return file


class _File:
    """A file descriptor that closes with its last reference."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path} cannot be opened: {error}") from error

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``; fewer at the end of the file."""
        data = os.pread(self._descriptor, size, offset)
        if len(data) in (0, size):
            return data
        parts = [data]  # Linux gives at most 2 GiB at a time
        while data and (left := size - sum(map(len, parts))):
            data = os.pread(self._descriptor, left, offset + size - left)
            parts.append(data)
        return b"".join(parts)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class LocalFolder:
    """A folder of this machine, or of a network file system: any byte range by pread."""

    is_local = True

    def __init__(self, directory: Path, files: OpenFiles) -> None:
        """``files``: shared by the folders of one shard set."""
        self.directory, self._files = directory, files

    def where(self, name: str = "") -> str:
        """See `Storage`."""
        return str(self.directory / name)

    def check(self) -> None:
        """See `Storage`."""
        if self.directory.is_file():
            raise UserError(f"{self.directory} is a file; name a folder of shards that `xkd-fast prepare VIDEOS FOLDER` made")
        if not (self.directory / MANIFEST).is_file():
            raise UserError(
                f"{self.directory} is no shard set: it has no {MANIFEST}. Make one with `xkd-fast prepare VIDEOS "
                f"{self.directory}` (an interrupted prepare goes on when it is called again)"
            )

    def fetch(self, name: str, what: str) -> bytes:
        """See `Storage`."""
        path = self.directory / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}, {what}, cannot be read: {error.strerror}; make it readable, or {AGAIN}") from error

    def expect(self, name: str, size: int) -> None:
        """See `Storage`."""
        tar = self.directory / name
        found = tar.stat().st_size if tar.is_file() else None
        if found != size:
            told = "is missing" if found is None else f"has {found} bytes"
            raise UserError(f"{tar} {told}, but its manifest says {size} bytes; {AGAIN}")

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See `Storage`."""
        path = self.directory / name
        try:
            return self._files.get(path).read(offset, size)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; look at the disk or network it is on") from error

    def copy(self, name: str, file: IO[bytes]) -> None:
        """See `Storage`."""
        offset = 0
        while block := self.read(name, offset, BLOCK):
            file.write(block)
            offset += len(block)
