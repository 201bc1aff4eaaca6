"""Which samples a step trains on, and every random choice made for them: pure functions of a few integers.

An epoch is a permutation of the samples by (seed, epoch). The clip at place p of an epoch belongs to
``p = step · global batch + micro · (ranks · micro batch) + rank · micro batch + i``, and what is drawn for it depends on (seed,
epoch, sample) alone. So the same steps see the same clips with the same draws at any number of ranks, any accumulation
and after any interruption. (Another order, for storage that is read front to back: `xkd_fast.data.sequential`.)

With k clips per file, k clips in a row are drawn from one sample, so that it is read and decoded once for all of them; they
differ in ``repeat``, 0 to k − 1. An epoch is still one pass over the samples, and so k times as many clips.

Numbers come from Philox, a counter-based generator: (seed, sample) is its key, (repeat, purpose, epoch) part of its counter.
Only its raw 64-bit words are used, whose order NumPy guarantees across versions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from xkd_fast.data.views import AugmentOptions, ClipDraw, ClipShape, ViewShape, draw_clip, draws_per_clip
from xkd_fast.errors import UserError


class Purpose(IntEnum):
    """What random words are for; each purpose has its own independent stream."""

    SHUFFLE = 0
    CLIP = 1
    MASK_NOISE = 2
    REPLACEMENT = 3
    EVALUATION = 4
    SHARDS = 5
    BUFFER = 6


def random_words(seed: int, epoch: int, sample: int, purpose: Purpose, count: int, repeat: int = 0) -> NDArray[np.uint64]:
    """``count`` random 64-bit words, the same for the same arguments on every machine."""
    key = np.array([seed, sample], dtype=np.uint64)
    counter = np.array([0, repeat, purpose, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def uniforms(seed: int, epoch: int, sample: int, purpose: Purpose, count: int, repeat: int = 0) -> NDArray[np.float64]:
    """``count`` numbers uniform in [0, 1), float64 with 53 random bits."""
    numbers = (random_words(seed, epoch, sample, purpose, count, repeat) >> np.uint64(11)).astype(np.float64)
    numbers *= 2.0**-53
    return numbers


@lru_cache(maxsize=2)
def epoch_permutation(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    """Order of the samples in an epoch, [samples] int64 (read-only; the last two are kept)."""
    order = np.argsort(random_words(seed, epoch, 0, Purpose.SHUFFLE, samples), kind="stable")
    order.setflags(write=False)
    return order


def check_clips_per_file(clips_per_file: int, micro_batch: int) -> None:
    """Refuse a number of clips per file that does not divide the clips of a rank's micro-batch.

    Raises:
        UserError: naming both, and the numbers that do.
    """
    if micro_batch % clips_per_file:
        fitting = ", ".join(str(number) for number in range(1, micro_batch + 1) if micro_batch % number == 0)
        raise UserError(
            f"data.clips_per_file = {clips_per_file} must divide the {micro_batch} clips of a rank's micro-batch, as all clips "
            f"of a file are made together; set it to one of {fitting}, or change train.micro_batch"
        )


@dataclass(frozen=True)
class Sampler:
    """Which samples each rank reads at each micro-batch of each step.

    Raises:
        UserError: a number out of range, or fewer samples than one step needs.
    """

    samples: int  # in the data set
    seed: int
    micro_batch: int  # clips per rank and micro-batch
    accumulation: int = 1  # micro-batches per step
    rank: int = 0
    world_size: int = 1
    clips_per_file: int = field(default=1, kw_only=True)  # drawn from a sample when it comes; must divide micro_batch

    def __post_init__(self) -> None:
        for name in ("micro_batch", "accumulation", "world_size", "clips_per_file"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} must be 1 or more")
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank = {self.rank} must lie in 0-{self.world_size - 1}, as there are {self.world_size} ranks")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed = {self.seed} must be 0 or more, and below 2^63")
        check_clips_per_file(self.clips_per_file, self.micro_batch)
        if self.samples < self.files_per_step:
            shared = f" / {self.clips_per_file} clips of each" if self.clips_per_file > 1 else ""
            raise UserError(
                f"the data set has {self.samples} samples, fewer than the {self.files_per_step} of one step "
                f"({self.micro_batch} per micro-batch × {self.accumulation} micro-batches × {self.world_size} ranks{shared}); "
                "use a smaller batch or more data"
            )

    @property
    def global_batch(self) -> int:
        """Clips per optimiser step, over all ranks and micro-batches."""
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def files_per_step(self) -> int:
        """Samples read per optimiser step, over all ranks and micro-batches."""
        return self.global_batch // self.clips_per_file

    @property
    def files_per_batch(self) -> int:
        """Samples that a rank reads for a micro-batch."""
        return self.micro_batch // self.clips_per_file

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps per epoch; the samples left over are dropped (others each epoch)."""
        return self.samples // self.files_per_step

    def check_place(self, epoch: int, step: int, micro: int) -> None:
        """Raise ``UserError`` for a micro-batch that no epoch has."""
        if epoch < 0 or not 0 <= step < self.steps_per_epoch or not 0 <= micro < self.accumulation:
            raise UserError(
                f"no micro-batch {micro} of step {step} of epoch {epoch}: an epoch has {self.steps_per_epoch} steps "
                f"of {self.accumulation} micro-batches"
            )

    def files(self, epoch: int, step: int, micro: int = 0) -> NDArray[np.int64]:
        """Sample numbers that this rank reads for its micro-batch, [files_per_batch] int64.

        Args:
            epoch: from 0.
            step: within the epoch, from 0.
            micro: within the step, from 0.
        """
        self.check_place(epoch, step, micro)
        start = step * self.files_per_step + (micro * self.world_size + self.rank) * self.files_per_batch
        return epoch_permutation(self.seed, epoch, self.samples)[start : start + self.files_per_batch]

    def ids(self, epoch: int, step: int, micro: int = 0) -> NDArray[np.int64]:
        """Sample number of each clip of this rank's micro-batch, [micro_batch] int64: `files`, each `clips_per_file` times."""
        return self.files(epoch, step, micro).repeat(self.clips_per_file)

    def reading(self, epoch: int, step: int) -> Iterator[tuple[int, int, int]]:
        """What this rank reads from ``step`` of ``epoch`` on, for ever, in the order of reading, which here is that of use.

        Yields:
            epoch, sample, and place: how many samples of this rank, from ``step`` on, are used before this one may be wanted.
        """
        places = itertools.count()
        for at in itertools.count(epoch * self.steps_per_epoch + step):
            for micro in range(self.accumulation):
                for sample in self.files(*divmod(at, self.steps_per_epoch), micro).tolist():
                    yield at // self.steps_per_epoch, sample, next(places)


def clip_draw(
    seed: int,
    epoch: int,
    sample: int,
    stored: ClipShape,
    shape: ViewShape,
    options: AugmentOptions,
    repeat: int = 0,
) -> ClipDraw:
    """Every random choice for clip number ``repeat`` of ``sample`` in ``epoch`` but its mask noise."""
    numbers = uniforms(seed, epoch, sample, Purpose.CLIP, draws_per_clip(shape), repeat)
    return draw_clip(numbers.tolist(), stored, shape, options)


def mask_noise(
    seed: int, epoch: int, sample: int, shape: ViewShape, repeat: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Noise that picks the masked tokens of clip number ``repeat`` of ``sample`` in ``epoch``.

    Returns:
        [video tokens] and [audio tokens], float64 in [0, 1): two tokens never tie (in float32 1 of 100 clips of 560 tokens
        would hold a tie).
    """
    noise = uniforms(seed, epoch, sample, Purpose.MASK_NOISE, shape.video.tokens + shape.audio.tokens, repeat)
    return noise[: shape.video.tokens], noise[shape.video.tokens :]


def replacement(seed: int, epoch: int, sample: int, attempt: int, samples: int) -> int:
    """The sample that takes the place of a damaged one, at the ``attempt``-th try from 0; never ``sample`` itself."""
    word = int(random_words(seed, epoch, sample, Purpose.REPLACEMENT, attempt + 1)[attempt])
    return (sample + 1 + word % (samples - 1)) % samples


def evaluation_starts(last_start: int, clips: int, *, random: bool, seed: int = 0, sample: int = 0) -> list[int]:
    """First frames of ``clips`` evaluation clips of a sample whose last possible start is ``last_start``.

    Uniform: evenly from 0 to ``last_start``, both included; one clip alone sits in the middle. Random: by (seed, sample).
    """
    if random:
        return [int(u * (last_start + 1)) for u in uniforms(seed, 0, sample, Purpose.EVALUATION, clips)]
    if clips == 1:
        return [last_start // 2]
    return [round(clip * last_start / (clips - 1)) for clip in range(clips)]
