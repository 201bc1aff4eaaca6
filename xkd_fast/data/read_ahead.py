"""Reads samples ahead of their use, in the order in which they lie in their shards, many of them with one read."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from xkd_fast.data.shards import CorruptSampleError, EncodedSample, ShardSet

READ_BYTES = 8 * 2**20  # of one read, about
REMOTE_READERS = 16  # threads that wait for a server's answers, where each brings one sample
LONGEST_CLOSE = 1.0  # seconds; a server that does not answer is asked for minutes
READ_GAP = 64 * 2**10  # bytes between two samples, at most, that are read along rather than asked for apart


@dataclass(frozen=True)
class Read:
    """Samples that one read brings."""

    shard: int
    start: int  # first byte
    end: int
    samples: list[tuple[int, int]]  # epoch and sample
    place: int  # how many samples are taken before one of these may be wanted first; see `Sampler.reading`


def grouped(shards: ShardSet, wanted: Iterator[tuple[int, int, int]], size: int = READ_BYTES) -> Iterator[Read]:
    """Reads of at most ``size`` bytes (or of one sample) that bring the ``wanted`` (epoch, sample, place) in their order."""
    group: list[tuple[int, int]] = []
    number = start = end = first = 0
    for epoch, sample, place in wanted:
        own, begin, until = shards.place(sample)
        if group and (own != number or not end <= begin <= end + READ_GAP or until - start > size):
            yield Read(number, start, end, group, first)
            group = []
        if not group:
            number, start, first = own, begin, place
        end = until
        group.append((epoch, sample))
    if group:
        yield Read(number, start, end, group, first)


class Stopped(Exception):
    """Reading ahead has been ended, and nothing more is wanted."""


class ReadAhead:
    """Threads that read what is wanted next and hold it until it is taken; how far ahead they go is bounded.

    Args:
        shards: what is read.
        wanted: (epoch, sample, place) in the order of reading; see `Sampler.reading`.
        ahead: samples read beyond those that may be wanted next; at least as many as are taken at a time.
        threads: that read.
        size: of one read, bytes, about.
    """

    def __init__(
        self, shards: ShardSet, wanted: Iterator[tuple[int, int, int]], *, ahead: int, threads: int, size: int = READ_BYTES
    ) -> None:
        self._shards, self._reads, self._ahead = shards, grouped(shards, wanted, size), ahead
        self._held: dict[tuple[int, int], bytes] = {}
        self._taken = 0
        self._stopped = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()  # guards all of the above
        self._order = threading.Lock()  # of taking the next read
        self._threads = [threading.Thread(target=self._work, name="read ahead", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def held(self) -> int:
        """Samples that were read and not yet taken."""
        with self._changed:
            return len(self._held)

    def take(self, epoch: int, sample: int) -> EncodedSample:
        """A sample that is wanted, once it is there. Every one must be taken once, in about the order of its place.

        Raises:
            CorruptSampleError: as `ShardSet.read`.
            UserError: what kept any sample from being read.
            Stopped: `close` was called, before or while this waits.
        """
        key = epoch, sample
        with self._changed:
            self._changed.wait_for(lambda: key in self._held or self._error is not None or self._stopped)
            if self._stopped:
                raise Stopped
            if self._error is not None:
                raise self._error
            data = self._held.pop(key, None)
            self._taken += 1
            self._changed.notify_all()
        if data is not None:
            try:
                return self._shards.unpack(sample, data)
            except CorruptSampleError:
                pass  # on its way, perhaps
        return self._shards.read(sample)

    def close(self) -> None:
        """Stop the threads, and whoever waits in `take`.

        Threads are waited for, but for those whose read takes long: they end with it, by themselves.
        """
        with self._changed:
            self._stopped = True
            self._held.clear()
            self._changed.notify_all()
        until = time.monotonic() + LONGEST_CLOSE
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        try:
            while (read := self._next()) is not None:
                data = memoryview(self._shards.read_range(read.shard, read.start, read.end - read.start))
                apart = {}
                for key in read.samples:
                    _, start, end = self._shards.place(key[1])
                    apart[key] = bytes(data[start - read.start : end - read.start])  # a view would keep the whole read
                with self._changed:
                    if self._stopped:
                        return
                    self._held |= apart
                    self._changed.notify_all()
        except BaseException as error:  # the taker's to deal with
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _next(self) -> Read | None:
        """The next read, once it is due; None at the end."""
        with self._order:
            read = next(self._reads, None)
            if read is None:
                return None
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopped or self._error is not None or read.place <= self._taken + self._ahead
                )
                return None if self._stopped or self._error is not None else read
