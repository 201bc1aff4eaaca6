"""The order of clips for storage that is read front to back: shards in random order, samples through a shuffle buffer.

An epoch is the shards in an order by (seed, epoch), one after the other as one stream, which begins at a random sample of
the first. Each rank has its own stretch of the stream, all equally long, and what is left over at the end is dropped (other
samples each epoch). A rank fills a buffer with the first samples of its stretch; each clip is one of those in the buffer, by
chance, and the stretch's next sample takes its place. All of it follows from the number of samples in each shard, so a run that
goes on in the middle of an epoch knows what its buffer held, and reads that.

What this gives up against one permutation of all samples: samples that lie in the same shard (in an order that `xkd-fast
prepare` shuffled once) meet in the same step far more often than others, in every epoch; one that lies at the end of a rank's
stretch comes late in the epoch; and what a step sees depends on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from xkd_fast.data.sampler import Purpose, Sampler, random_words
from xkd_fast.errors import UserError


@lru_cache(maxsize=2)
def epoch_stream(seed: int, epoch: int, shard_sizes: tuple[int, ...]) -> NDArray[np.int64]:
    """All samples in the order in which an epoch's shards are read, [samples] int64 (read-only; the last two are kept)."""
    words = random_words(seed, epoch, 0, Purpose.SHARDS, len(shard_sizes) + 1)
    ends = np.cumsum(shard_sizes)
    numbers = np.argsort(words[:-1], kind="stable")
    stream = np.concatenate([np.arange(ends[number] - shard_sizes[number], ends[number]) for number in numbers])
    stream = np.roll(stream.astype(np.int64), -int(words[-1] % np.uint64(max(1, len(stream)))))
    stream.setflags(write=False)
    return stream


def shuffled(stream: NDArray[np.int64], buffer: int, words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """What comes out of a shuffle buffer.

    Args:
        stream: [n] what goes in, in its order.
        buffer: how many wait in it, 1 or more; 1 = nothing is shuffled.
        words: [n] random words.

    Returns:
        [n] ``stream`` in another order; what comes out at place i stood before place i + ``buffer``.
    """
    source, n = stream.tolist(), len(stream)
    held = source[:buffer]
    sizes = np.minimum(len(held), n - np.arange(n)).astype(np.uint64)  # at the end nothing comes in, and the buffer empties
    out = []
    for place, slot in enumerate((words % np.maximum(sizes, 1)).tolist(), start=len(held)):
        out.append(held[slot])
        if place < n:
            held[slot] = source[place]
        else:
            held[slot] = held[-1]
            held.pop()
    return np.array(out, np.int64)


@dataclass(frozen=True)
class Stretch:
    """One rank's part of an epoch."""

    stream: NDArray[np.int64]  # [samples of the rank] as they are read
    order: NDArray[np.int64]  # [samples of the rank] as they are used


@lru_cache(maxsize=4)
def _stretch(sampler: SequentialSampler, epoch: int) -> Stretch:
    count = sampler.steps_per_epoch * sampler.own_files_per_step
    stream = epoch_stream(sampler.seed, epoch, sampler.shard_sizes)[sampler.rank * count :][:count]
    words = random_words(sampler.seed, epoch, sampler.rank, Purpose.BUFFER, count)
    order = shuffled(stream, sampler.buffer, words)
    order.setflags(write=False)
    return Stretch(stream, order)


@dataclass(frozen=True)
class SequentialSampler(Sampler):
    """Which samples this rank uses at each micro-batch of each step, and in which order it reads them.

    Raises:
        UserError: as `Sampler`, or a buffer of no samples.
    """

    shard_sizes: tuple[int, ...] = ()  # samples of each shard, in their order
    buffer: int = 1  # samples among which the next one is picked; 1 = each as it is read

    def __post_init__(self) -> None:
        super().__post_init__()
        assert sum(self.shard_sizes) == self.samples
        if self.buffer < 1:
            raise UserError(f"data.shuffle_buffer = {self.buffer} must be 1 or more")

    @property
    def own_files_per_step(self) -> int:
        """Samples that this rank reads per optimiser step."""
        return self.files_per_batch * self.accumulation

    def stretch(self, epoch: int) -> Stretch:
        """This rank's part of an epoch."""
        return _stretch(self, epoch)

    def files(self, epoch: int, step: int, micro: int = 0) -> NDArray[np.int64]:
        """Sample numbers that this rank reads for its micro-batch, [files_per_batch] int64; see `Sampler.files`."""
        self.check_place(epoch, step, micro)
        start = step * self.own_files_per_step + micro * self.files_per_batch
        return self.stretch(epoch).order[start : start + self.files_per_batch]

    def reading(self, epoch: int, step: int) -> Iterator[tuple[int, int, int]]:
        """As `Sampler.reading`, but front to back in each shard. Samples used before ``step`` are left out."""
        done = step * self.own_files_per_step
        before = -done  # places of the first epoch begin in the past
        while True:
            stretch = self.stretch(epoch)
            used = set(stretch.order[:done].tolist())
            for place, sample in enumerate(stretch.stream.tolist()):
                if sample not in used:
                    yield epoch, sample, before + place - self.buffer + 1
            before += len(stretch.stream)
            epoch, done = epoch + 1, 0
