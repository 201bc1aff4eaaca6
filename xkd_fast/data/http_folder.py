"""A shard set behind a web server or an object store that speaks HTTP: byte ranges over connections that are kept open.

Requests that fail in a way that may pass (no answer, a broken connection, an overloaded server) are tried again with growing
pauses. A query in the address, such as a signature for all files of a folder, goes with every request and into no error here.
"""

from __future__ import annotations

import http.client
import random
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, NoReturn, TypeVar
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from xkd_fast import __version__
from xkd_fast.data.http_connections import Connections
from xkd_fast.data.storage import AGAIN, BLOCK, MANIFEST
from xkd_fast.errors import UserError
from xkd_fast.model.options import FORBID_EXTRA, option, require

T = TypeVar("T")
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # answers after which the same request may succeed
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 5
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two tries; doubled after each


@dataclass(frozen=True)
class RemoteOptions:
    """How shards are read from http:// and https:// addresses."""

    __pydantic_config__ = FORBID_EXTRA

    timeout: float = option(30.0, "seconds without an answer, or without a further byte, after which a request is broken off")
    attempts: int = option(6, "tries of a request, with pauses of 0.5, 1, 2 … s between them, before the run ends; 1 = once")

    def __post_init__(self) -> None:
        require(self.timeout > 0, f"data.remote.timeout = {self.timeout} must be above 0")
        require(1 <= self.attempts <= 100, f"data.remote.attempts = {self.attempts} must lie in 1-100")


class _Refused(Exception):
    """An answer that is not what was asked for; ``passing`` if it may be another the next time."""

    def __init__(self, status: int, reason: str, *, passing: bool, pause: float = 0.0) -> None:
        super().__init__(f"the server answers {status} {reason}".rstrip())
        self.status, self.passing, self.pause = status, passing, pause


class _OtherSize(Exception):
    """The file has another size than its manifest says."""


class _NoRanges(Exception):
    """The server sends whole files where a part was asked for."""


class _NotWritten(Exception):
    """The copy cannot be written, which is not the server's fault."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class HttpFolder:
    """A folder behind an http:// or https:// address: its files are at ADDRESS/NAME.

    Raises:
        UserError: an address without a host.
    """

    is_local = False

    def __init__(self, url: str, options: RemoteOptions | None = None) -> None:
        self._options = options or RemoteOptions()
        try:
            self._url = urlsplit(url)
            valid = bool(self._url.hostname) and (self._url.port is None or self._url.port > 0)
        except ValueError:
            valid = False
        if not valid:
            shown = url.partition("?")[0].rpartition("@")[2]
            raise UserError(f"{shown} is no address of a shard set; write https://HOST/FOLDER, without {MANIFEST}")
        self._url = _quoted(self._url)
        if self._url.username is not None:
            raise UserError(
                f"{self.where()} is given with a user or password, which no request sends; name an address that is open to "
                "this machine or signed by its query (https://HOST/FOLDER?SIGNATURE)"
            )
        self._sizes: dict[str, int] = {}
        self._connections = Connections(self._options.timeout)
        self._random = random.Random()  # of pauses alone: a run's own generators stay as they are

    def where(self, name: str = "") -> str:
        """See `Storage`: without what may be secret, the query and the user."""
        host = self._url.netloc.rpartition("@")[2]
        return f"{self._url.scheme}://{host}{self._url.path.rstrip('/')}{'/' if name else ''}{name}"

    def check(self) -> None:
        """See `Storage`; the manifest's answer will tell."""

    def fetch(self, name: str, what: str) -> bytes:
        """See `Storage`."""

        def request() -> bytes:
            with self._get(name, {}) as response:
                if response.status != 200:
                    self._refuse(response)
                return response.read()

        return self._try(name, request, f", {what},")

    def expect(self, name: str, size: int) -> None:
        """See `Storage`: compared with the size that comes with each answer, so no request is spent on it."""
        self._sizes[name] = size

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See `Storage`."""
        if size == 0:
            return b""

        def request() -> bytes:
            with self._get(name, {"Range": f"bytes={offset}-{offset + size - 1}"}) as response:
                if response.status == 200 and (offset, size) != (0, self._sizes[name]):
                    raise _NoRanges
                self._check_part(name, response, offset, offset + size)
                return response.read()

        return self._try(name, request)

    def copy(self, name: str, file: IO[bytes]) -> None:
        """See `Storage`. What had come before a connection broke is kept, where the server can go on from there."""
        size = self._sizes[name]

        def request() -> None:
            offset = file.tell()
            with self._get(name, {"Range": f"bytes={offset}-"} if offset else {}) as response:
                if response.status == 200:
                    file.seek(offset := 0)
                self._check_part(name, response, offset, size)
                while block := response.read(BLOCK):
                    if file.tell() + len(block) > size:  # of an answer that tells no length
                        raise _OtherSize(f"has more bytes than the {size} that its manifest says")
                    try:
                        file.write(block)
                    except OSError as error:
                        raise _NotWritten(error) from error
            if file.tell() != size:
                raise http.client.IncompleteRead(b"", size - file.tell())

        if size:
            try:
                self._try(name, request)
            except _NotWritten as error:
                raise error.cause from error

    def _try(self, name: str, request: Callable[[], T], what: str = "") -> T:
        """What ``request`` gives, at the first of some tries or at a later one."""
        told = f"{self.where(name)}{what}"
        for attempt in range(1, self._options.attempts + 1):
            try:
                return request()
            except _OtherSize as error:
                raise UserError(f"{told} {error}; {AGAIN}") from error
            except _NoRanges as error:
                raise UserError(
                    f"{told} is sent whole where a part is asked for (answer 200 in place of 206): use a server that supports "
                    "range requests, or read whole shards into a local cache with data.cache.folder=FOLDER"
                ) from error
            except ssl.SSLCertVerificationError as error:
                raise UserError(
                    f"{told} cannot be read: the certificate of {self._url.hostname} is not trusted ({error.verify_message}); "
                    "install its authority's certificate, or name its file in SSL_CERT_FILE"
                ) from error
            except _Refused as error:
                if not error.passing:
                    raise UserError(f"{told} cannot be read: {error}; {_advice(error.status)}") from error
                reason, pause = str(error), error.pause
            except (http.client.InvalidURL, ValueError):  # whose words may hold the query
                raise UserError(f"{told} cannot be read: the address, or one that it leads to, is malformed") from None
            except (OSError, http.client.HTTPException) as error:
                reason, pause = _reason(error, self._options.timeout), 0.0
            if attempt < self._options.attempts:
                grown = FIRST_PAUSE * 2 ** (attempt - 1) * self._random.uniform(0.75, 1.25)  # not all ranks at once
                time.sleep(min(max(pause, grown), LONGEST_PAUSE))
        raise UserError(
            f"{told} cannot be read: {reason}, at the last of {self._options.attempts} attempts; look at the server and the "
            "network, or raise data.remote.attempts or data.remote.timeout"
        )

    def _address(self, name: str) -> SplitResult:
        return self._url._replace(path=f"{self._url.path.rstrip('/')}/{quote(name)}", fragment="")

    @contextmanager
    def _get(self, name: str, headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, at the end of any redirections."""
        url = self._address(name)
        usual = {"Accept-Encoding": "identity", "User-Agent": f"xkd-fast/{__version__}"}
        for _ in range(MAX_REDIRECTS + 1):
            with self._connections.get(url, {**usual, **headers}) as response:
                location = response.getheader("Location")
                if response.status not in REDIRECTS or not location:
                    yield response
                    return
                response.read()
                url = _quoted(urlsplit(urljoin(url.geturl(), location)))
            if url.scheme not in ("http", "https") or not url.hostname:
                raise _Refused(response.status, f"{response.reason} and leads to {url.scheme}://", passing=False)
        raise _Refused(response.status, f"{response.reason} {MAX_REDIRECTS + 1} times in a row", passing=False)

    def _refuse(self, response: http.client.HTTPResponse) -> NoReturn:
        after = response.getheader("Retry-After", "")
        pause = float(after) if after.isdecimal() else 0.0
        raise _Refused(response.status, response.reason, passing=response.status in PASSING, pause=pause)

    def _check_part(self, name: str, response: http.client.HTTPResponse, start: int, end: int) -> None:
        """Refuse an answer that does not hold bytes ``start`` to ``end`` of a file of the size expected."""
        size, length = self._sizes[name], _length(response)
        if response.status == 416:
            raise _OtherSize(f"ends before byte {start}, but its manifest says {size} bytes")
        if response.status == 200:
            if length is not None and length != size:
                raise _OtherSize(f"has {length} bytes, but its manifest says {size} bytes")
            return
        if response.status != 206:
            self._refuse(response)
        given, _, total = response.getheader("Content-Range", "").removeprefix("bytes ").partition("/")
        if total.isdecimal() and int(total) != size:
            raise _OtherSize(f"has {total} bytes, but its manifest says {size} bytes")
        if given != f"{start}-{end - 1}":
            raise http.client.HTTPException(f"bytes {given or '?'} come where {start}-{end - 1} were asked for")
        if length is not None and length != end - start:
            raise http.client.HTTPException(f"{length} bytes come where {end - start} were asked for")


def _length(response: http.client.HTTPResponse) -> int | None:
    """Bytes of an answer's body; None where it does not say.

    Raises:
        http.client.HTTPException: it says no number.
    """
    length = response.getheader("Content-Length")
    if length is None:
        return None
    if re.fullmatch(r"[0-9]{1,20}", length):
        return int(length)
    raise http.client.HTTPException(f"the server answers with Content-Length {length[:40]!r}, which is no number")


def _quoted(url: SplitResult) -> SplitResult:
    """An address as a request may carry it: blanks and letters beyond ASCII escaped, what is escaped already left as it is."""
    return url._replace(path=quote(url.path, safe="/%:@!$&'()*+,;=~"), query=quote(url.query, safe="/%:@!$&'()*+,;=~?"))


def _advice(status: int) -> str:
    """What to do about an answer that will not change by itself."""
    if status in (401, 403):
        return "make it readable for everyone, or sign the address (https://HOST/FOLDER?SIGNATURE, of all files of the folder)"
    if status in (404, 410):
        return "check the address: the folder of a shard set that `xkd-fast prepare` made, copied whole to the server"
    return "name an address that gives the file to a plain GET request"


def _reason(error: Exception, timeout: float) -> str:
    """Why a request came to nothing, in words."""
    if isinstance(error, TimeoutError):
        return f"no answer for {timeout:g} s"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended before the file did"
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return str(error) or type(error).__name__
