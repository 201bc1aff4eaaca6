"""Writing files so that an interruption never destroys the last good one: beside it first, then on disk, then renamed."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def aside(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(f".{path.name}.partial")


def write_aside(path: Path, data: bytes) -> None:
    """Write a file so that ``path`` is either the old one or the whole new one, on disk. Its folder must exist."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    replace_with(path, write)


def replace_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file under another name, then put it in the place of ``path`` in one step.

    If ``write`` fails, ``path`` stays as it was and nothing is left over. A link stays one: what it names is replaced.
    """
    path = Path(os.path.realpath(path))  # which does not fail where links run in a circle
    temporary = aside(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # some writers make their files private, whatever the umask
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            # such as a full disk: nobody could tell which file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


class InUse(OSError):
    """A folder that another process has for its own."""


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Lock an existing folder against a second user of this function; the lock goes with the process, however it ends.

    Raises:
        InUse: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise InUse(error.errno, "another process is writing there", str(folder)) from error
            # some network file systems lock no folders: then nothing guards
        yield
    finally:
        os.close(descriptor)
