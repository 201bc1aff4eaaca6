"""SIGTERM, by which schedulers and service managers end a process, taken like Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def terminated_like_interrupted() -> Iterator[list[str]]:
    """Let SIGTERM raise ``KeyboardInterrupt``; the list then names it. A second one ends the process at once.

    Where SIGTERM is ignored, and outside of the main thread, all stays as it is.
    """
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield received
        return

    def receive(number: int, _: object) -> None:
        received.append(signal.Signals(number).name)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGTERM, receive)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, earlier)
