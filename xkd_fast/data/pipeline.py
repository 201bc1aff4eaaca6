"""From shards to the model's views: reads, decodes, augments, ahead of the step, on the device of the model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from xkd_fast.data.batch_maker import BatchMaker, Setting
from xkd_fast.data.beside import Beside, moved, seconds_between
from xkd_fast.data.calibrate import calibrated
from xkd_fast.data.clip_options import ClipOptions, check_against_model, view_shape
from xkd_fast.data.dali import CPU
from xkd_fast.data.decode import DecodedClip, DecodeRequest
from xkd_fast.data.decode_device import choose, decoding_obstacle
from xkd_fast.data.fetch import DamagedSample, FetchedClip, Fetcher
from xkd_fast.data.log_mel import MelOptions
from xkd_fast.data.prefetch import Prefetcher
from xkd_fast.data.read_ahead import REMOTE_READERS, ReadAhead, Stopped
from xkd_fast.data.sampler import Sampler, mask_noise
from xkd_fast.data.sequential import SequentialSampler
from xkd_fast.data.shards import ShardSet
from xkd_fast.data.stage_times import Stage, StageTimes
from xkd_fast.data.views import AugmentOptions, MaskNoise, Views
from xkd_fast.errors import UserError
from xkd_fast.model.options import ModelOptions

if TYPE_CHECKING:
    from xkd_fast.config import Config


def check_against_shards(data: ClipOptions, shards: ShardSet) -> None:
    """Refuse shards that were prepared for another clip.

    Raises:
        UserError: naming the value, the rule and what to do.
    """
    for name, stored, asked in (("fps", shards.fps, data.fps), ("sample_rate", shards.sample_rate, data.sample_rate)):
        if stored != asked:
            raise UserError(
                f"data.{name} = {asked:g}, but the shards hold {stored:g}; set data.{name}={stored:g}, or prepare them again"
            )
    if len(shards) == 0:
        raise UserError("the data set holds no samples; prepare shards that do")


def check_complete(shards: ShardSet) -> None:
    """Refuse to train on samples that lack one of the two.

    Raises:
        UserError: how many lack a picture, how many a sound, and what to do.
    """
    lacking = {"sound": int((~shards.has_audio).sum()), "picture": int((~shards.has_video).sum())}
    if any(lacking.values()):
        told = " and ".join(f"{count} samples without {what}" for what, count in lacking.items() if count)
        raise UserError(
            f"the data set holds {told}, among {len(shards)}, and training needs both; prepare them again with "
            "--missing-audio skip and --missing-video skip"
        )


def _close(ahead: ReadAhead | None, prefetcher: Prefetcher[Any] | None) -> None:
    """Stop a stream: reading first, as the thread that makes batches may wait for what a silent server does not send."""
    if ahead is not None:
        ahead.close()
    if prefetcher is not None:
        prefetcher.close()


@dataclass(frozen=True)
class _Making:
    """What a batch is made of, which must be kept until it is made, and how far that is."""

    STAGES: ClassVar[tuple[Stage, ...]] = ("decode", "copy", "augment")  # between the marks

    clips: list[FetchedClip]
    marks: list[Any]  # events before decoding and behind each of the stages


class ViewPipeline:
    """Shards to batches of views: reads, decodes, augments, ahead of the step.

    What a batch holds is a pure function of (seed, epoch, step, rank, world size); `batches` can start anywhere. CPU and
    GPU give the same but for the decoders' rounding.

    Attributes:
        times: where the time goes that batches take.
        decoding: who decodes, and why.
        calibration: how many threads do it, and why.

    Args:
        shards: what to train on.
        model: sizes of the views.
        augment: how views are drawn.
        mel: the log-mel front end.
        data: what a clip is, who decodes, threads, prefetching, what to do about damaged samples.
        seed: of shuffling and of all draws.
        rank: of this process.
        world_size: number of processes.
        micro_batch: clips per process and micro-batch.
        accumulation: micro-batches per step.
        device: where views are made and given.

    Raises:
        ValueError: sizes that do not fit the model.
        UserError: shards that do not fit or cannot be decoded, samples without picture or without sound, too few samples for
            one step, or clips per file that do not divide a micro-batch.
    """

    def __init__(
        self,
        shards: ShardSet,
        model: ModelOptions,
        augment: AugmentOptions,
        mel: MelOptions,
        data: ClipOptions,
        *,
        seed: int,
        micro_batch: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device = CPU,
    ) -> None:
        check_against_model(data, mel, model)
        check_against_shards(data, shards)
        check_complete(shards)
        self.shards = shards
        self.augment = augment
        self.data = data
        self.device = device
        place = (len(shards), seed, micro_batch, accumulation, rank, world_size)
        self.sampler = Sampler(*place, clips_per_file=data.clips_per_file)
        if data.order == "sequential":
            order = shards.shard_sizes, data.shuffle_buffer
            self.sampler = SequentialSampler(*place, *order, clips_per_file=data.clips_per_file)
        self.times = StageTimes()
        self.shape = shape = view_shape(data, model)
        self._fetcher = Fetcher(shards, shape, augment, self.sampler, data.on_corrupt, self.times)
        self._told = 0  # how many damaged samples `damage` has given out
        self.decoding = choose(data.decode, shards.codec, device, lambda where: decoding_obstacle(shards, where))

        def make(setting: Setting) -> BatchMaker:
            files = self.sampler.files_per_batch
            return BatchMaker(setting, files, shards.codec, self.decoding.device, device, shape, augment, mel)

        self.calibration = calibrated(data, make, self._fetcher, self.decoding.device)
        self.setting = self.calibration.setting
        self._maker = make(self.setting)
        self._beside = Beside(device)
        self._prefetcher: Prefetcher[tuple[Views, MaskNoise, Any]] | None = None
        self._read_ahead: ReadAhead | None = None  # while `batches` runs, where it helps

    @classmethod
    def from_config(
        cls, config: Config, shards: ShardSet, rank: int, world_size: int, device: torch.device = CPU
    ) -> ViewPipeline:
        """The pipeline of a training run, whose model is on ``device``."""
        return cls(
            shards,
            config.model,
            config.augment,
            config.mel,
            config.data,
            seed=config.seed,
            micro_batch=config.train.clips_per_pass(world_size),
            accumulation=config.train.accumulation(world_size),
            rank=rank,
            world_size=world_size,
            device=device,
        )

    def describe(self) -> list[str]:
        """Who makes batches, in two lines."""
        engine = "a GPU" if self.decoding.device.type == "cuda" else "the CPU"
        return [f"{self.shards.codec} decoded by {engine} ({self.decoding.reason})", str(self.calibration)]

    @property
    def damaged(self) -> list[DamagedSample]:
        """Each occurrence of a damaged sample, as met by this process."""
        return self._fetcher.damaged

    def damage(self) -> list[DamagedSample]:
        """Samples found damaged by this process since the last call."""
        new = self.damaged[self._told :]
        self._told += len(new)
        return new

    def batches(self, epoch: int = 0, step: int = 0) -> Iterator[tuple[Views, MaskNoise]]:
        """Micro-batches from ``step`` of ``epoch`` on, for ever, made ahead in the background.

        Only one stream runs at a time: starting another stops the one before. ``step`` may exceed the epoch.
        """
        self._stop_prefetching()
        ahead = self._read_ahead = self._reading(epoch, step)
        prefetcher = self._prefetcher = Prefetcher(self._make(epoch, step), self.setting.prefetch)
        try:
            for views, noise, made in prefetcher:
                yield self._beside.hand_over(views, noise, made)
        finally:
            _close(ahead, prefetcher)
            if self._read_ahead is ahead:
                self._read_ahead = None

    def _reading(self, epoch: int, step: int) -> ReadAhead | None:
        """Reads ahead from ``step`` of ``epoch`` on: where shards are read front to back, and where a server answers slowly."""
        sequential = self.data.order == "sequential"
        if self.shards.is_local and not sequential:
            return None
        wanted = self.sampler.reading(*divmod(epoch * self.sampler.steps_per_epoch + step, self.sampler.steps_per_epoch))
        ahead = self.sampler.files_per_batch * (self.setting.prefetch + 1)
        threads = self.setting.threads if sequential else REMOTE_READERS
        return ReadAhead(self.shards, wanted, ahead=ahead, threads=threads)

    def _make(self, epoch: int, step: int) -> Iterator[tuple[Views, MaskNoise, Any]]:
        steps = self.sampler.steps_per_epoch
        before: _Making | None = None
        with self._beside.work(), suppress(Stopped):
            for place in itertools.count(epoch * steps + step):
                for micro in range(self.sampler.accumulation):
                    views, noise, making = self._batch(*divmod(place, steps), micro)
                    if before is not None:
                        self._finish(before)
                    before = making if self._beside.asynchronous else None
                    yield views, noise, making.marks[-1]

    def batch(self, epoch: int, step: int, micro: int = 0) -> tuple[Views, MaskNoise]:
        """One micro-batch of this rank, made now. Not while `batches` runs."""
        views, noise, making = self._batch(epoch, step, micro)
        self._finish(making)
        return views, noise

    def _finish(self, making: _Making) -> None:
        """Wait until a batch is made."""
        if self._beside.asynchronous:
            with self.times.of_waiting(lambda: dict(zip(_Making.STAGES, seconds_between(making.marks), strict=True))):
                making.marks[-1].synchronize()

    def _batch(self, epoch: int, step: int, micro: int) -> tuple[Views, MaskNoise, _Making]:
        marks: list[Any] = []

        def decode(requests: Sequence[DecodeRequest]) -> list[DecodedClip]:
            marks[:] = [self._beside.mark()]
            return self._maker.decoder(requests)

        files = self.sampler.files(epoch, step, micro).tolist()
        take = None if self._read_ahead is None else self._read_ahead.take
        clips = self._fetcher(epoch, files, decode, self._maker.pool, take)
        marks.append(self._beside.mark())
        with self.times.of("copy"):
            cut = self._maker.moved([clip.cut(self.shape) for clip in clips])
        marks.append(self._beside.mark())
        with self.times.of("augment"):
            views = self._maker.views(cut, [clip.draw for clip in clips])
        samples = [clip.sample for clip in clips]
        views.keys = [self.shards.keys[sample] for sample in samples]
        rows = [mask_noise(self.sampler.seed, epoch, clip.sample, self.shape, clip.repeat) for clip in clips]
        video, audio = (torch.from_numpy(np.stack(noise)) for noise in zip(*rows, strict=True))
        with self.times.of("copy"):
            views.labels = moved(torch.from_numpy(self.shards.labels[samples].astype(np.int64)), self.device)
            noise = MaskNoise(moved(video, self.device), moved(audio, self.device))
        marks.append(self._beside.mark())
        self.times.made(len(samples))
        return views, noise, _Making(clips, marks)

    def _stop_prefetching(self) -> None:
        _close(self._read_ahead, self._prefetcher)
        self._read_ahead = self._prefetcher = None  # only now: what is still in the making must not read by itself

    def close(self) -> None:
        """Stop the background work and its threads."""
        self._stop_prefetching()
        self._maker.close()

    def __enter__(self) -> ViewPipeline:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
