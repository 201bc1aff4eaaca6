"""HTTP connections that are kept open between requests; through a proxy where the environment names one."""

from __future__ import annotations

import http.client
import select
import threading
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

MAX_IDLE = 32  # connections per host that are kept open


class Connections:
    """A pool of connections by host. Threads may share it."""

    def __init__(self, timeout: float) -> None:
        """``timeout``: seconds without an answer or a further byte."""
        self._timeout = timeout
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = defaultdict(list)
        self._lock = threading.Lock()

    @contextmanager
    def get(self, url: SplitResult, headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
        """The answer to a GET request; the connection is kept if the body is read to its end.

        Raises:
            OSError, http.client.HTTPException: no connection, or no proper answer.
        """
        key = url.scheme, url.netloc
        connection = self._take(key) or self._open(url)
        try:
            target, own = self._target(url)
            connection.request("GET", target, headers={**headers, **own})
            response = connection.getresponse()
            yield response
        except BaseException:
            connection.close()
            raise
        if response.isclosed() and not response.will_close:
            self._put(key, connection)
        else:
            connection.close()

    def _take(self, key: tuple[str, str]) -> http.client.HTTPConnection | None:
        while True:
            with self._lock:
                if not self._idle[key]:
                    return None
                connection = self._idle[key].pop()
            if connection.sock is not None and not _has_ended(connection):
                return connection
            connection.close()

    def _put(self, key: tuple[str, str], connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if len(self._idle[key]) < MAX_IDLE:
                self._idle[key].append(connection)
                return
        connection.close()

    def _open(self, url: SplitResult) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        proxy = _proxy(url)
        if proxy is None:
            return kind(url.hostname or "", url.port, timeout=self._timeout)
        connection = kind(proxy.hostname or "", proxy.port, timeout=self._timeout)
        if url.scheme == "https":
            connection.set_tunnel(url.hostname or "", url.port, headers=_credentials(proxy))
        return connection

    def _target(self, url: SplitResult) -> tuple[str, dict[str, str]]:
        """What is asked for, and the headers that go with it: a proxy passes on whole addresses, but for https://."""
        proxy = _proxy(url) if url.scheme == "http" else None
        if proxy is not None:
            return url._replace(fragment="").geturl(), _credentials(proxy)
        return url._replace(scheme="", netloc="", fragment="").geturl() or "/", {}


def _proxy(url: SplitResult) -> SplitResult | None:
    """The proxy that the environment (``http_proxy``, ``https_proxy``, ``no_proxy``) names for a host."""
    address = getproxies().get(url.scheme)
    if not address or proxy_bypass(url.netloc.rpartition("@")[2]):
        return None
    return urlsplit(address if "://" in address else f"http://{address}")


def _credentials(proxy: SplitResult) -> dict[str, str]:
    """The header for a proxy whose address holds a user and password (RFC 7617)."""
    if proxy.username is None:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {b64encode(pair.encode()).decode()}"}


def _has_ended(connection: http.client.HTTPConnection) -> bool:
    """Whether the server has closed an idle connection, or sent what nobody asked for."""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))
