"""Working ahead of the step: a background thread with a bounded queue, and a pool of single-threaded workers."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar, cast

import torch

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Runs an iterator in a background thread: ``depth`` finished items wait for the consumer while the next one is made.

    What the iterator raises is raised to the consumer, in its place. `close` stops the thread; it also stops when the
    interpreter exits.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._queue: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, args=(items,), name="data", daemon=True)
        self._thread.start()
        # before DALI's own exit handler, which was registered when DALI was imported: it frees what this thread uses
        atexit.register(self.close)

    def _produce(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put(True, item):
                    return
            self._put(False, StopIteration())
        except BaseException as error:  # the consumer's to deal with
            self._put(False, error)

    def _put(self, is_item: bool, content: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put((is_item, content), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        is_item, content = self._queue.get() if not self._stop.is_set() else (False, StopIteration())
        if is_item:
            return cast(T, content)
        self.close()
        raise content

    def close(self) -> None:
        """Stop the thread and wait for it: at most for the item in the making. Further items are not given."""
        self._stop.set()
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        if threading.current_thread() is not self._thread:
            self._thread.join()
            with contextlib.suppress(queue.Full):  # wakes a consumer that still waits in another thread
                self._queue.put_nowait((False, StopIteration()))
        atexit.unregister(self.close)


def _use_one_core() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # the first question makes the number this thread's own; unasked, it follows the process's


def single_threaded_pool(threads: int) -> ThreadPoolExecutor:
    """A pool whose threads each run torch operations on one core, whatever the rest of the process does.

    ``torch.set_num_threads`` acts on the calling thread and on the threads started later, so the latter is put back.
    """
    others = torch.get_num_threads()
    started = threading.Barrier(threads)
    pool = ThreadPoolExecutor(threads, "views", initializer=_use_one_core)
    for task in [pool.submit(started.wait) for _ in range(threads)]:
        task.result()
    restore = threading.Thread(target=torch.set_num_threads, args=(others,))
    restore.start()
    restore.join()
    return pool
