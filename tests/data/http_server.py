"""A web server for tests, in a thread: serves a folder with byte ranges, and misbehaves as it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


class Server(ThreadingHTTPServer):
    """What it was asked for, and how it answers.

    Attributes:
        requests: (path with query, value of the Range header or "") of each request, in their order.
        connections: how many were opened.
        most: how many requests were under way at the same time, at most.
        misbehave: called with the handler before a request is answered; True = it was answered, or never will be.
        delay: seconds before each answer.
        ranges: whether parts are sent where parts are asked for.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.requests, self.connections = folder, list[tuple[str, str]](), 0
        self.misbehave: Callable[[Handler], bool] = lambda handler: False
        self.delay, self.ranges = 0.0, True
        self.active = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Address of the folder."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self, ending: str) -> list[str]:
        """Range headers of the requests for files with such a name."""
        return [part for path, part in self.requests if urlsplit(path).path.endswith(ending)]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no error of the test's."""


class Handler(BaseHTTPRequestHandler):
    """One connection, kept open."""

    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections += 1

    def log_message(self, format: str, *values: object) -> None:
        pass

    def do_GET(self) -> None:
        part = self.headers.get("Range", "")
        with self.server.lock:
            self.server.requests.append((self.path, part))
            self.server.active += 1
            self.server.most = max(self.server.most, self.server.active)
        try:
            self.respond(part)
        finally:
            with self.server.lock:
                self.server.active -= 1

    def respond(self, part: str) -> None:
        """Answer, or misbehave."""
        time.sleep(self.server.delay)
        if self.server.misbehave(self):
            return
        path = self.server.folder / urlsplit(self.path).path.lstrip("/")
        if not path.is_file():
            self.answer(404, b"not here")
            return
        data = path.read_bytes()
        if not (part and self.server.ranges):
            self.answer(200, data)
            return
        first, _, last = part.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(data)) + 1, len(data))
        if start >= len(data):
            self.answer(416, b"")
        else:
            self.answer(206, data[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        """Send a whole answer."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve a folder while inside."""
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
