"""Names for the parts of a step, seen by profilers (as ranges) and by whoever listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch.profiler import record_function


class Listener(Protocol):
    """Is told where each part of a step begins and ends."""

    def enter(self, name: str) -> None:
        """A part begins."""

    def leave(self, name: str) -> None:
        """The part that began last ends."""


_listeners: list[Listener] = []


@contextmanager
def component(name: str) -> Iterator[None]:
    """Mark a part of the step: a range ``xkd::NAME`` in torch.profiler's traces, and in NVTX under ``emit_nvtx``."""
    with record_function(f"xkd::{name}"):
        for listener in _listeners:
            listener.enter(name)
        try:
            yield
        finally:
            for listener in _listeners:
                listener.leave(name)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell ``listener`` of every part while this is open."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
