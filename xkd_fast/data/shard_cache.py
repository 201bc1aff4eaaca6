"""A local cache of whole shards, shared by all processes of a machine, that never grows above its limit.

A shard is kept as ``DIGEST.tar``, where the digest is of its index, which holds the checksum of every sample: a set that has
changed has other names, and copies of one set at two addresses share theirs. A shard is written aside (at once as large as it
will be, so that it counts), flushed and renamed; whoever wants it meanwhile waits for it. Those used longest ago make room.

Locks are the kernel's (flock), which go with their process: ``.lock`` while files are counted and removed, a partial file's own
while it is written, a shard's own, shared, for the moment of a read and, exclusive, for that of its removal.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from xkd_fast.errors import UserError
from xkd_fast.files import aside
from xkd_fast.model.options import FORBID_EXTRA, option, require

_NAME = re.compile(r"[0-9a-f]{32}\.tar")
_PARTIAL = re.compile(r"\.[0-9a-f]{32}\.tar\.partial")
_REMOVED = re.compile(r"\.[0-9a-f]{32}\.tar\.removed")
TRIES = 4  # to find a shard that others bring and remove at the same time


@dataclass(frozen=True)
class CacheOptions:
    """Where copies of the shards of data.train are kept."""

    __pydantic_config__ = FORBID_EXTRA

    folder: str | None = option(None, "folder on a local disk for copies of whole shards, shared by all ranks; null = no cache")
    gib: float = option(100.0, "largest size of that folder, GiB; shards beyond it are read where they are")

    def __post_init__(self) -> None:
        require(self.folder != "", "data.cache.folder is empty; it must name a folder, or be null for no cache")
        require(0 < self.gib < 2**33, f"data.cache.gib = {self.gib} must be above 0, and below 2^33")

    @property
    def limit(self) -> int:
        """Largest size, bytes."""
        return int(self.gib * 2**30)


class ShardCache:
    """Copies of shards in a folder, which is made where it is missing. Threads and processes may share it.

    Raises:
        UserError: the folder cannot be written, or its file system knows no locks.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """``limit``: bytes of all copies together, those in the making included."""
        self.folder, self.limit = folder, limit
        with self._telling():
            folder.mkdir(parents=True, exist_ok=True)
            with self._sole():
                self._make_room(0)  # the limit may have been lowered, and a killed process may have left a part

    def read(self, digest: str, offset: int, size: int) -> bytes | None:
        """``size`` bytes at ``offset`` of a shard, fewer at its end; None where no copy is there."""
        with self._telling():
            try:
                descriptor = os.open(self._path(digest), os.O_RDONLY)
            except FileNotFoundError:
                return None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                if os.fstat(descriptor).st_nlink == 0:  # removed a moment ago
                    return None
                with suppress(PermissionError):  # of another user's copy
                    os.utime(descriptor, ns=(time.time_ns(),) * 2)  # its last use; the kernel's own clock ticks in milliseconds
                return os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)

    def bring(self, digest: str, size: int, copy: Callable[[IO[bytes]], None]) -> bool:
        """Have a copy of a shard made by ``copy``, unless another process or thread has just made it.

        Args:
            digest: 32 hexadecimal digits, of the shard's index.
            size: of the shard, bytes.
            copy: writes the shard to a file.

        Returns:
            Whether it is worth looking for the copy; False where there is no room, as others are making theirs.

        Raises:
            UserError: the folder cannot be written; or of ``copy``.
        """
        if size > self.limit:
            return False
        path = self._path(digest)
        with self._telling(), open(os.open(aside(path), os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # whoever writes it has it
            if not _is_at(file, aside(path)):  # finished, or given up, while this waited
                return True
            try:
                if path.exists():
                    return True
                with self._sole():
                    if not self._make_room(size):
                        return False
                    os.ftruncate(file.fileno(), size)
                copy(file)
                file.flush()
                os.fsync(file.fileno())
                if file.tell() != size:
                    raise UserError(f"{path} came to {file.tell()} bytes, not to {size}; copy or prepare its shard set again")
                os.replace(aside(path), path)
                self._flush_folder()
                return True
            finally:
                if _is_at(file, aside(path)):
                    aside(path).unlink()

    def discard(self, digest: str, offset: int, data: bytes) -> None:
        """Remove a copy that turned out to be damaged: one that does not hold ``data``, the right bytes, at ``offset``.

        Where several have met the damage, the copy that the first of them fetched anew stays.
        """
        with self._telling(), self._sole():
            if self.read(digest, offset, len(data)) != data:
                self._remove(self._path(digest))

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.tar"

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"data.cache.folder = {self.folder} cannot be used: {error.strerror}; name a folder of a local disk with room "
                f"for {self.limit / 2**30:.3g} GiB, lower data.cache.gib, or set data.cache.folder=null"
            ) from error

    @contextmanager
    def _sole(self) -> Iterator[None]:
        with open(self.folder / ".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> bool:
        """Remove what was used longest ago until ``size`` more bytes fit; False, with nothing removed, where they cannot."""
        kept: list[tuple[int, int, Path]] = []  # time of last use, size, path
        reserved = 0
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if _PARTIAL.fullmatch(entry.name):
                    reserved += 0 if _remove_if_orphaned(Path(entry.path)) else entry.stat().st_size
                elif _REMOVED.fullmatch(entry.name):  # by a process that was killed over it
                    _wait_and_unlink(Path(entry.path))
                elif _NAME.fullmatch(entry.name):
                    kept.append((entry.stat().st_mtime_ns, entry.stat().st_size, Path(entry.path)))
        if reserved + size > self.limit:
            return False
        total = reserved + sum(length for _, length, _ in kept)
        for _, length, path in sorted(kept):
            if total + size <= self.limit:
                break
            self._remove(path)
            total -= length
        return True

    def _remove(self, path: Path) -> None:
        with suppress(FileNotFoundError):
            removed = aside(path).with_suffix(".removed")
            os.replace(path, removed)  # from now on nobody new reads it
            _wait_and_unlink(removed)

    def _flush_folder(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _wait_and_unlink(path: Path) -> None:
    """Remove a file once nobody reads it: under a reader's hands the disk would hold it beyond the limit."""
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        path.unlink()


def _remove_if_orphaned(partial: Path) -> bool:
    """Remove a part whose writer was killed."""
    with open(partial, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if _is_at(file, partial):
            partial.unlink()
        return True
