"""From sample numbers to decoded clips, around whatever is damaged: what to decode, and what takes a damaged sample's place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xkd_fast.data.decode import DecodedClip, DecodeRequest, UndecodableError
from xkd_fast.data.sampler import Sampler, clip_draw, replacement
from xkd_fast.data.shards import CorruptSampleError, EncodedSample, ShardSet
from xkd_fast.data.stage_times import StageTimes
from xkd_fast.data.views import AugmentOptions, ClipDraw, ClipShape, ViewShape
from xkd_fast.errors import UserError

MAX_REPLACEMENTS = 20  # damaged samples in a row, in the place of one


@dataclass(frozen=True)
class DamagedSample:
    """A sample that could not be used, and what was done about it."""

    sample: int
    key: str
    reason: str
    epoch: int
    replaced_by: int


@dataclass(frozen=True)
class FetchedClip:
    """One clip of a batch, decoded."""

    sample: int
    repeat: int  # number of the clip among those of its file in this epoch, from 0
    draw: ClipDraw
    decoded: DecodedClip  # shared by all clips of the file; its frames begin at `first`
    first: int

    def cut(self, shape: ViewShape) -> tuple[Tensor, Tensor]:
        """The clip's frames [T, H, W, 3] and sound [samples]."""
        frames = self.decoded.frames[self.draw.start_frame - self.first :][: shape.video.frames]
        return cut_clip(DecodedClip(frames, self.decoded.waveform), self.draw.start_sample, shape)


def clip_shape(shards: ShardSet, sample: int) -> ClipShape:
    """What the index says of a stored sample."""
    columns = shards.frames, shards.samples, shards.heights, shards.widths
    return ClipShape(*(int(column[sample]) for column in columns))


def cut_clip(decoded: DecodedClip, start_sample: int, shape: ViewShape) -> tuple[Tensor, Tensor]:
    """The clip's frames [T, H, W, 3] uint8, a short clip's repeated from their start, and its sound [samples] float32, a short
    one's padded with zeros."""
    frames, waveform = decoded.frames, decoded.waveform[start_sample : start_sample + shape.clip_samples]
    if len(frames) < shape.video.frames:
        frames = frames[torch.arange(shape.video.frames, device=frames.device) % len(frames)]
    if len(waveform) < shape.clip_samples:
        waveform = F.pad(waveform, (0, shape.clip_samples - len(waveform)))
    return frames, waveform


def encoded_request(shards: ShardSet, sample: int, start: int, frames: int) -> DecodeRequest:
    """The stored bytes of a sample, and which frames of it to decode.

    Raises:
        CorruptSampleError: naming shard and key.
    """
    encoded = shards.read(sample)
    return DecodeRequest(encoded.key, encoded.video, encoded.audio, start, frames)


def size_problem(clip: DecodedClip, stored: ClipShape) -> str | None:
    """In words, how a decoded clip differs from what the index says; None where it does not."""
    height, width = clip.frames.shape[1:3]
    if (height, width) != (stored.height, stored.width):
        return f"its frames are {height} × {width} pixels, where the index says {stored.height} × {stored.width}"
    return None


class Fetcher:
    """Reads and decodes the samples of a batch, once each, and lists those that are damaged.

    Attributes:
        damaged: each occurrence, as met so far.

    Args:
        shards: where samples are read.
        shape: sizes of the clip and its views.
        augment: how clips are drawn.
        sampler: whose seed and clips per file decide the draws.
        on_corrupt: ``replace`` or ``stop``.
        times: counts what reading and decoding take.
    """

    def __init__(
        self,
        shards: ShardSet,
        shape: ViewShape,
        augment: AugmentOptions,
        sampler: Sampler,
        on_corrupt: str,
        times: StageTimes,
    ) -> None:
        self.shards, self.shape, self.augment, self.sampler = shards, shape, augment, sampler
        self.damaged: list[DamagedSample] = []
        self._on_corrupt, self._times = on_corrupt, times

    def draws(self, epoch: int, sample: int) -> list[ClipDraw]:
        """The draws of all clips of a sample."""
        stored, repeats = clip_shape(self.shards, sample), range(self.sampler.clips_per_file)
        return [clip_draw(self.sampler.seed, epoch, sample, stored, self.shape, self.augment, repeat) for repeat in repeats]

    def request(self, encoded: EncodedSample, sample: int, draws: Sequence[ClipDraw]) -> DecodeRequest:
        """What to decode of a sample: one stretch of frames that holds all of its clips."""
        frames = min(self.shape.video.frames, int(self.shards.frames[sample]))
        starts = [draw.start_frame for draw in draws]
        return DecodeRequest(encoded.key, encoded.video, encoded.audio, min(starts), max(starts) + frames - min(starts))

    def __call__(
        self,
        epoch: int,
        wanted: Sequence[int],
        decode: Callable[[Sequence[DecodeRequest]], list[DecodedClip]],
        pool: ThreadPoolExecutor,
        take: Callable[[int, int], EncodedSample] | None = None,
    ) -> list[FetchedClip]:
        """The clips of the wanted samples, or of others where one is damaged.

        Args:
            epoch: of the draws.
            wanted: samples of a batch, one for each file.
            decode: decodes a batch of requests.
            pool: threads that read.
            take: gives a sample, by epoch and number, that was read ahead; None = read it now.

        Raises:
            UserError: a damaged sample where none may be, or none can be found in its place.
        """
        samples, attempts = list(wanted), [0] * len(wanted)
        requests: dict[int, DecodeRequest] = {}
        draws: dict[int, list[ClipDraw]] = {}

        def read(row: int) -> str | None:
            draws[row] = self.draws(epoch, samples[row])
            try:
                if take is not None and attempts[row] == 0:
                    encoded = take(epoch, samples[row])
                else:
                    encoded = self.shards.read(samples[row])
            except CorruptSampleError as error:
                return str(error)
            requests[row] = self.request(encoded, samples[row], draws[row])
            return None

        def replace(row: int, reason: str) -> None:
            attempts[row] += 1
            samples[row] = self._replace(epoch, wanted[row], samples[row], attempts[row], reason)

        rows, stale = range(len(samples)), list(range(len(samples)))
        while True:
            while stale:
                with self._times.of("read"):
                    problems = dict(zip(stale, pool.map(read, stale), strict=True))
                stale = [row for row, problem in problems.items() if problem]
                for row in stale:
                    replace(row, problems[row] or "")
            try:
                with self._times.of("decode"):
                    clips = decode([requests[row] for row in rows])
                problems = {row: size_problem(clips[row], clip_shape(self.shards, samples[row])) for row in rows}
                stale = [row for row in rows if problems[row]]
            except UndecodableError as error:
                problems, stale = dict(error.reasons), sorted(error.reasons)
            if not stale:
                return [
                    FetchedClip(samples[row], repeat, draw, clips[row], requests[row].start)
                    for row in rows
                    for repeat, draw in enumerate(draws[row])
                ]
            for row in stale:
                replace(row, f"sample {requests[row].key} cannot be decoded: {problems[row]}")

    def _replace(self, epoch: int, wanted: int, damaged: int, attempt: int, reason: str) -> int:
        if self._on_corrupt == "stop":
            raise UserError(
                f"{reason}; prepare the data again, or set data.on_corrupt=replace to train on another sample instead"
            )
        if len(self.shards) == 1 or attempt > MAX_REPLACEMENTS:
            raise UserError(f"{reason}; and {attempt - 1} samples drawn in its place are damaged too; prepare the data again")
        other = replacement(self.sampler.seed, epoch, wanted, attempt - 1, len(self.shards))
        self.damaged.append(DamagedSample(damaged, self.shards.keys[damaged], reason, epoch, other))
        return other
