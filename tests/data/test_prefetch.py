"""Working ahead: order, bounds, errors and shutdown of the background thread."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from xkd_fast.data.prefetch import Prefetcher, single_threaded_pool


def wait_until(condition: object, seconds: float = 5.0) -> bool:
    """Whether ``condition()`` becomes true in time."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return False


def test_all_items_in_order_then_the_end() -> None:
    # items lost, doubled or reordered between the threads
    prefetcher = Prefetcher(iter(range(50)), depth=3)
    assert list(prefetcher) == list(range(50))
    assert list(prefetcher) == []


def test_works_ahead_but_not_without_bound() -> None:
    # no work ahead of the step, or host memory that fills up while the step is slow
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            yield number

    prefetcher = Prefetcher(items(), depth=2)
    try:
        assert wait_until(lambda: len(made) == 3)  # two wait, one is finished and has no place yet
        time.sleep(0.3)
        assert len(made) == 3
        assert next(prefetcher) == 0
        assert wait_until(lambda: len(made) == 4)
    finally:
        prefetcher.close()


def test_an_error_reaches_the_consumer_after_the_items_before_it() -> None:
    # a thread that dies unheard, and a consumer that waits for ever
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    prefetcher = Prefetcher(items(), depth=2)
    assert next(prefetcher) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(prefetcher)
    assert not any(thread.name == "data" for thread in threading.enumerate())


def test_close_ends_the_thread_and_the_stream() -> None:
    # a thread left behind that waits for a place in the queue
    prefetcher = Prefetcher(itertools.count(), depth=1)
    assert next(prefetcher) == 0
    prefetcher.close()
    prefetcher.close()
    assert not any(thread.name == "data" for thread in threading.enumerate())
    assert list(prefetcher) == []


def test_close_wakes_a_waiting_consumer() -> None:
    # a consumer in another thread that waits for an item that will never come
    release, got = threading.Event(), []

    def items() -> Iterator[int]:
        release.wait(10)
        yield from ()

    prefetcher = Prefetcher(items(), depth=1)
    consumer = threading.Thread(target=lambda: got.append(list(prefetcher)))
    consumer.start()
    threading.Timer(0.1, release.set).start()
    prefetcher.close()
    consumer.join(5)
    assert got == [[]]


def test_pool_threads_use_one_core_each_and_others_as_before() -> None:
    # N workers × N threads each on N cores; or a main thread, or threads started later, slowed to one core for good
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with single_threaded_pool(2) as pool:
            assert {pool.submit(torch.get_num_threads).result() for _ in range(20)} == {1}
            later: list[int] = []
            thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert later == [3]
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
