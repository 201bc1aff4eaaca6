"""From shards to the model's views: DALI decodes the clip's own frames and its sound, torch augments them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from xkd_fast.data.augment import ViewMaker
from xkd_fast.data.decode import ClipDecoder, DecodedClip, DecodeRequest, UndecodableError, require_cpu_codec
from xkd_fast.data.decode_sound import SoundDecoder, placeholder_sound
from xkd_fast.data.log_mel import MelOptions
from xkd_fast.data.prefetch import Prefetcher, single_threaded_pool
from xkd_fast.data.read_ahead import REMOTE_READERS, ReadAhead
from xkd_fast.data.sampler import Sampler, clip_draw, evaluation_starts, mask_noise, replacement
from xkd_fast.data.sequential import SequentialSampler
from xkd_fast.data.shards import CorruptSampleError, ShardSet
from xkd_fast.data.stage_times import StageTimes
from xkd_fast.data.views import AugmentOptions, ClipDraw, ClipShape, MaskNoise, Views, ViewShape, last_start, plain_draw
from xkd_fast.errors import UserError
from xkd_fast.model.options import FORBID_EXTRA, ModelOptions, option

if TYPE_CHECKING:
    from xkd_fast.config import Config

MAX_REPLACEMENTS = 20  # damaged samples in a row, in the place of one


@dataclass(frozen=True)
class ClipOptions:
    """What a clip is, and how clips are fetched."""

    __pydantic_config__ = FORBID_EXTRA

    fps: float = option(8.0, "frames per second, of the shards and of the clip")
    sample_rate: int = option(16000, "audio samples per second, of the shards and of the clip")
    clip_seconds: float = option(4.0, "length of a clip, seconds; times fps it must be model.video.frames")
    local_audio_seconds: float = option(1.0, "length of a local audio view, seconds")
    threads: int = option(2, "threads that decode, and as many that augment, per process")
    prefetch: int = option(2, "finished micro-batches kept ahead of the step")
    on_corrupt: Literal["replace", "stop"] = option(
        "replace", "a damaged sample: another takes its place and it is listed, or stop"
    )
    order: Literal["random", "sequential"] = option(
        "random", "random = one permutation of all clips; sequential = shards front to back, through a shuffle buffer"
    )
    shuffle_buffer: int = option(
        2048, "clips per rank that wait for their turn, encoded, in memory, where data.order = sequential; 1 = none, unshuffled"
    )

    def __post_init__(self) -> None:
        for name in ("fps", "sample_rate", "clip_seconds", "local_audio_seconds"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"data.{name} = {value} must be above 0")
        for name in ("threads", "prefetch"):
            value = getattr(self, name)
            if not 1 <= value <= 1024:
                raise ValueError(f"data.{name} = {value} must lie in 1-1024")
        if not 1 <= self.shuffle_buffer <= 2**24:
            raise ValueError(f"data.shuffle_buffer = {self.shuffle_buffer} must lie in 1-{2**24}")
        if self.local_audio_seconds > self.clip_seconds:
            raise ValueError(
                f"data.local_audio_seconds = {self.local_audio_seconds} is longer than the clip; "
                f"it must be at most data.clip_seconds = {self.clip_seconds}"
            )

    @property
    def clip_samples(self) -> int:
        """Audio samples of a clip."""
        return round(self.clip_seconds * self.sample_rate)

    @property
    def local_samples(self) -> int:
        """Audio samples of a local audio view."""
        return round(self.local_audio_seconds * self.sample_rate)


def check_against_model(data: ClipOptions, mel: MelOptions, model: ModelOptions) -> None:
    """Refuse sizes that cannot fit together.

    Raises:
        ValueError: naming the value, the rule it breaks and the key to change.
    """
    video, audio = model.video, model.audio
    frames = data.fps * data.clip_seconds
    if abs(frames - video.frames) > 1e-6:
        raise ValueError(
            f"data.fps × data.clip_seconds = {data.fps:g} × {data.clip_seconds:g} = {frames:g} frames must equal "
            f"model.video.frames = {video.frames}; set data.clip_seconds to {video.frames / data.fps:g}"
        )
    if video.channels != 3:
        raise ValueError(f"model.video.channels = {video.channels} must be 3: the frames are decoded as red, green, blue")
    views = [("data.clip_seconds", data.clip_samples, "model.audio.frames", audio.frames)]
    if audio.local_views:
        views.append(("data.local_audio_seconds", data.local_samples, "model.audio.local_frames", audio.local_frames))
    for key, samples, frames_key, needed in views:
        given, largest_hop = samples // mel.hop + 1, max(1, samples // max(1, needed - 1))
        if given < needed:
            raise ValueError(
                f"{key} gives {samples} samples, {given} spectrogram frames at mel.hop = {mel.hop}, but "
                f"{frames_key} = {needed} are needed; lengthen it, or set mel.hop to at most {largest_hop}"
            )
        if samples <= mel.n_fft // 2:
            raise ValueError(
                f"{key} gives {samples} samples; the centred STFT needs more than mel.n_fft / 2 = {mel.n_fft // 2}"
            )
    if mel.f_max > data.sample_rate / 2:
        raise ValueError(f"mel.f_max = {mel.f_max:g} Hz must be at most half of data.sample_rate = {data.sample_rate} Hz")


def view_shape(data: ClipOptions, model: ModelOptions) -> ViewShape:
    """Sizes of the clip and its views.

    Args:
        data: already checked against ``model``.
        model: as trained.
    """
    return ViewShape(data.fps, data.sample_rate, data.clip_samples, data.local_samples, model.video, model.audio)


def check_against_shards(data: ClipOptions, shards: ShardSet) -> None:
    """Refuse shards that were prepared for another clip, or that cannot be decoded here.

    Raises:
        UserError: naming the value, the rule and what to do.
    """
    if shards.has_video.any():
        require_cpu_codec(shards.codec, "the data set")
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


def clip_shape(shards: ShardSet, sample: int) -> ClipShape:
    """What the index says of a stored sample."""
    columns = shards.frames, shards.samples, shards.heights, shards.widths
    return ClipShape(*(int(column[sample]) for column in columns))


@dataclass(frozen=True)
class DamagedSample:
    """A sample that could not be used, and what was done about it."""

    sample: int
    key: str
    reason: str
    epoch: int
    replaced_by: int


def cut_clip(decoded: DecodedClip, start_sample: int, shape: ViewShape) -> tuple[Tensor, Tensor]:
    """The clip's frames [T, H, W, 3] and sound [samples]: short ones repeated from their start and padded with zeros."""
    frames, waveform = decoded.frames, decoded.waveform[start_sample : start_sample + shape.clip_samples]
    if len(frames) < shape.video.frames:
        frames = frames[torch.arange(shape.video.frames) % len(frames)]
    if len(waveform) < shape.clip_samples:
        waveform = F.pad(waveform, (0, shape.clip_samples - len(waveform)))
    return frames, waveform


class ViewPipeline:
    """Shards to batches of views: reads, decodes, augments, ahead of the step.

    What a batch holds is a pure function of (seed, epoch, step, rank, world size); `batches` can start anywhere.

    Attributes:
        times: where the time goes that batches take.

    Args:
        shards: what to train on.
        model: sizes of the views.
        augment: how views are drawn.
        mel: the log-mel front end.
        data: what a clip is, threads, prefetching, what to do about damaged samples.
        seed: of shuffling and of all draws.
        rank: of this process.
        world_size: number of processes.
        micro_batch: clips per process and micro-batch.
        accumulation: micro-batches per step.
        pinned: whether `batches` gives page-locked memory, from which a GPU copies without being waited for.

    Raises:
        ValueError: sizes that do not fit the model.
        UserError: shards that do not fit, samples without picture or without sound, or too few samples for one step.
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
        pinned: bool = False,
    ) -> None:
        check_against_model(data, mel, model)
        check_against_shards(data, shards)
        check_complete(shards)
        self.shards = shards
        self.augment = augment
        self.data = data
        place = (len(shards), seed, micro_batch, accumulation, rank, world_size)
        self.sampler = Sampler(*place)
        if data.order == "sequential":
            self.sampler = SequentialSampler(*place, shards.shard_sizes, data.shuffle_buffer)
        self.times = StageTimes()
        self.shape = view_shape(data, model)
        self.damaged: list[DamagedSample] = []  # each occurrence, as met by this process
        self._told = 0  # how many of them `damage` has given out
        self.pinned = pinned
        self._maker = ViewMaker(self.shape, augment, mel)
        self._decoder = ClipDecoder(micro_batch, data.threads, shards.codec)
        self._pool = single_threaded_pool(data.threads)
        self._prefetcher: Prefetcher[tuple[Views, MaskNoise]] | None = None
        self._read_ahead: ReadAhead | None = None  # while `batches` runs, where it helps

    @classmethod
    def from_config(cls, config: Config, shards: ShardSet, rank: int, world_size: int) -> ViewPipeline:
        """The pipeline of a training run; batches stay in host memory."""
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
            pinned=config.train.device != "cpu" and torch.cuda.is_available(),
        )

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
        prefetcher = self._prefetcher = Prefetcher(self._make(epoch, step), self.data.prefetch)
        try:
            yield from prefetcher
        finally:
            prefetcher.close()
            if ahead is not None:
                ahead.close()
            if self._read_ahead is ahead:
                self._read_ahead = None

    def _reading(self, epoch: int, step: int) -> ReadAhead | None:
        """Reads ahead from ``step`` of ``epoch`` on: where shards are read front to back, and where a server answers slowly."""
        sequential = self.data.order == "sequential"
        if self.shards.is_local and not sequential:
            return None
        wanted = self.sampler.reading(*divmod(epoch * self.sampler.steps_per_epoch + step, self.sampler.steps_per_epoch))
        ahead = self.sampler.micro_batch * (self.data.prefetch + 1)
        return ReadAhead(self.shards, wanted, ahead=ahead, threads=self.data.threads if sequential else REMOTE_READERS)

    def _make(self, epoch: int, step: int) -> Iterator[tuple[Views, MaskNoise]]:
        steps = self.sampler.steps_per_epoch
        for place in itertools.count(epoch * steps + step):
            for micro in range(self.sampler.accumulation):
                views, noise = self.batch(*divmod(place, steps), micro)
                if self.pinned:
                    with self.times.of("copy"):
                        views, noise = views.pin_memory(), noise.pin_memory()
                yield views, noise

    def batch(self, epoch: int, step: int, micro: int = 0) -> tuple[Views, MaskNoise]:
        """One micro-batch of this rank, made now, in host memory. Not while `batches` runs."""
        samples, draws, clips = self._fetch(epoch, self.sampler.ids(epoch, step, micro).tolist())
        views = self._maker.empty(len(samples))

        def augment(row: int) -> None:
            frames, waveform = cut_clip(clips[row], draws[row].start_sample, self.shape)
            self._maker.fill(views, slice(row, row + 1), [frames], [waveform], [draws[row]])

        with self.times.of("augment"):
            list(self._pool.map(augment, range(len(samples))))
        views.keys = [self.shards.keys[sample] for sample in samples]
        views.labels = torch.from_numpy(self.shards.labels[samples].astype(np.int64))
        noise = [mask_noise(self.sampler.seed, epoch, sample, self.shape) for sample in samples]
        video, audio = (torch.from_numpy(np.stack(rows)) for rows in zip(*noise, strict=True))
        self.times.made(len(samples))
        return views, MaskNoise(video=video, audio=audio)

    def _fetch(self, epoch: int, wanted: list[int]) -> tuple[list[int], list[ClipDraw], list[DecodedClip]]:
        # decoded clips of the wanted samples, or of others where one is damaged
        samples, attempts = list(wanted), [0] * len(wanted)
        requests: dict[int, DecodeRequest] = {}
        draws: dict[int, ClipDraw] = {}

        def read(row: int) -> str | None:
            stored = clip_shape(self.shards, samples[row])
            draws[row] = clip_draw(self.sampler.seed, epoch, samples[row], stored, self.shape, self.augment)
            frames = min(self.shape.video.frames, stored.frames)
            try:
                if self._read_ahead is not None and attempts[row] == 0:
                    encoded = self._read_ahead.take(epoch, samples[row])
                else:
                    encoded = self.shards.read(samples[row])
            except CorruptSampleError as error:
                return str(error)
            requests[row] = DecodeRequest(encoded.key, encoded.video, encoded.audio, draws[row].start_frame, frames)
            return None

        def replace(row: int, reason: str) -> None:
            attempts[row] += 1
            samples[row] = self._replace(epoch, wanted[row], samples[row], attempts[row], reason)

        stale = list(range(len(samples)))
        while True:
            while stale:
                with self.times.of("read"):
                    problems = dict(zip(stale, self._pool.map(read, stale), strict=True))
                stale = [row for row, problem in problems.items() if problem]
                for row in stale:
                    replace(row, problems[row] or "")
            rows = range(len(samples))
            try:
                with self.times.of("decode"):
                    clips = self._decoder([requests[row] for row in rows])
                problems = {row: size_problem(clips[row], clip_shape(self.shards, samples[row])) for row in rows}
                stale = [row for row in rows if problems[row]]
            except UndecodableError as error:
                problems, stale = dict(error.reasons), sorted(error.reasons)
            if not stale:
                return samples, [draws[row] for row in rows], clips
            for row in stale:
                replace(row, f"sample {requests[row].key} cannot be decoded: {problems[row]}")

    def _replace(self, epoch: int, wanted: int, damaged: int, attempt: int, reason: str) -> int:
        if self.data.on_corrupt == "stop":
            raise UserError(
                f"{reason}; prepare the data again, or set data.on_corrupt=replace to train on another sample instead"
            )
        if len(self.shards) == 1 or attempt > MAX_REPLACEMENTS:
            raise UserError(f"{reason}; and {attempt - 1} samples drawn in its place are damaged too; prepare the data again")
        other = replacement(self.sampler.seed, epoch, wanted, attempt - 1, len(self.shards))
        self.damaged.append(DamagedSample(damaged, self.shards.keys[damaged], reason, epoch, other))
        return other

    def _stop_prefetching(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        if self._read_ahead is not None:
            self._read_ahead.close()
            self._read_ahead = None

    def close(self) -> None:
        """Stop the background work and its threads."""
        self._stop_prefetching()
        self._pool.shutdown()

    def __enter__(self) -> ViewPipeline:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


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


@dataclass
class ClipBatch:
    """Plain clips of a few samples, for frozen features: global views only."""

    views: Views  # of R clips, without local views
    samples: NDArray[np.int64]  # [R] sample numbers
    clips: NDArray[np.int64]  # [R] number of the clip within its sample, from 0


def clips(
    shards: ShardSet,
    model: ModelOptions,
    mel: MelOptions,
    data: ClipOptions,
    *,
    per_sample: int,
    batch_size: int,
    random: bool = False,
    seed: int = 0,
    samples: Sequence[int] | None = None,
    modalities: Collection[str] = ("video", "audio"),
) -> Iterator[ClipBatch]:
    """``per_sample`` clips of every sample, centre-cropped and not augmented, in the samples' order, each exactly once.

    Args:
        shards: the data set.
        model: sizes of the views.
        mel: the log-mel front end.
        data: what a clip is, threads, prefetching.
        per_sample: clips per sample.
        batch_size: clips per batch; the last batch may hold fewer.
        random: random starts by (seed, sample), rather than evenly spaced ones.
        seed: of the random starts.
        samples: sample numbers; None = all.
        modalities: of ``video`` and ``audio``, what is decoded; the views of the other hold NaN.

    Raises:
        ValueError: sizes that do not fit the model.
        UserError: shards that do not fit, a sample without what is to be decoded, or a damaged sample (none is replaced here:
            features must stay in line with labels).
    """
    check_against_model(data, mel, model)
    check_against_shards(data, shards)
    for name, value in (("per_sample", per_sample), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} = {value} must be 1 or more")
    chosen = range(len(shards)) if samples is None else samples
    for modality, there in (("video", shards.has_video), ("audio", shards.has_audio)):
        lacking = int((~there[np.asarray(chosen, np.int64)]).sum())
        if modality in modalities and lacking:
            raise UserError(f"{lacking} of {len(chosen)} samples have no {modality}; leave it out, or prepare others")
    source = _PlainClips(shards, view_shape(data, model), mel, data, per_sample, batch_size, random, seed, modalities)
    return source.batches(chosen)


class _PlainClips:
    """The work behind `clips`."""

    def __init__(
        self,
        shards: ShardSet,
        shape: ViewShape,
        mel: MelOptions,
        data: ClipOptions,
        per_sample: int,
        batch_size: int,
        random: bool,
        seed: int,
        modalities: Collection[str],
    ) -> None:
        self.shards, self.shape, self.data = shards, shape, data
        self.per_sample, self.batch_size, self.random, self.seed = per_sample, batch_size, random, seed
        self.maker = ViewMaker(shape, AugmentOptions(short_side_first=True), mel)
        self.seen, self.heard = "video" in modalities, "audio" in modalities
        self.decoder: ClipDecoder | SoundDecoder
        if self.seen:
            self.decoder = ClipDecoder(batch_size, data.threads, shards.codec)
        else:
            self.decoder = SoundDecoder(batch_size, data.threads)

    def shape_of(self, sample: int) -> ClipShape:
        """What is stored of a sample; where it has no picture or no sound, as if that lasted as long as the other."""
        stored, shape = clip_shape(self.shards, sample), self.shape
        if not self.shards.has_video[sample]:
            frames = math.ceil(stored.samples * shape.fps / shape.sample_rate)
            return replace(stored, frames=frames, height=shape.video.size, width=shape.video.size)
        if not self.shards.has_audio[sample]:
            return replace(stored, samples=round(stored.frames * shape.sample_rate / shape.fps))
        return stored

    def batches(self, samples: Sequence[int]) -> Iterator[ClipBatch]:
        with single_threaded_pool(self.data.threads) as pool:
            prefetcher = Prefetcher(self._make(samples, pool), self.data.prefetch)
            try:
                yield from prefetcher
            finally:
                prefetcher.close()

    def _make(self, samples: Sequence[int], pool: ThreadPoolExecutor) -> Iterator[ClipBatch]:
        rows = len(samples) * self.per_sample
        for first in range(0, rows, self.batch_size):
            places = range(first, min(first + self.batch_size, rows))
            yield self._batch([(samples[place // self.per_sample], place % self.per_sample) for place in places], pool)

    def _batch(self, wanted: list[tuple[int, int]], pool: ThreadPoolExecutor) -> ClipBatch:
        # wanted: (sample, number of the clip); the clips of one sample follow each other
        frames = self.shape.video.frames
        starts = {}
        for sample in dict.fromkeys(sample for sample, _ in wanted):
            last = last_start(self.shape_of(sample), self.shape)
            starts[sample] = evaluation_starts(last, self.per_sample, random=self.random, seed=self.seed, sample=sample)
        # overlapping clips of a sample are decoded together, as one span of frames
        spans: list[tuple[int, int, int]] = []  # sample, first frame, end
        for sample in starts:
            for start in sorted(starts[sample][number] for owner, number in wanted if owner == sample):
                if spans and spans[-1][0] == sample and start <= spans[-1][2]:
                    spans[-1] = (sample, spans[-1][1], start + frames)
                else:
                    spans.append((sample, start, start + frames))

        def read(span: tuple[int, int, int]) -> DecodeRequest:
            sample, start, end = span
            request = encoded_request(self.shards, sample, start, min(end, self.shape_of(sample).frames) - start)
            return request if self.heard else replace(request, audio=placeholder_sound())

        try:
            requests = list(pool.map(read, spans))
        except CorruptSampleError as error:
            raise UserError(f"{error}; prepare the data again") from error
        try:
            decoded = self.decoder(requests)
        except UndecodableError as error:
            place, reason = next(iter(error.reasons.items()))
            raise UserError(f"sample {requests[place].key} cannot be decoded: {reason}; prepare the data again") from error

        views = self.maker.empty(len(wanted), local_views=False)
        for view, wished in ((views.video_global, self.seen), (views.audio_global, self.heard)):
            if not wished:
                view.fill_(math.nan)  # whoever uses it will notice

        def fill(row: int) -> None:
            sample, number = wanted[row]
            start, stored = starts[sample][number], self.shape_of(sample)
            place = next(i for i, (owner, first, end) in enumerate(spans) if owner == sample and first <= start < end)
            if self.seen and (problem := size_problem(decoded[place], stored)):
                raise UserError(f"sample {requests[place].key}: {problem}; prepare the data again")
            draw = plain_draw(stored, self.shape, start)
            own = decoded[place].frames[start - spans[place][1] :][:frames]
            clip = cut_clip(DecodedClip(own, decoded[place].waveform), draw.start_sample, self.shape)
            self.maker.fill(views, slice(row, row + 1), [clip[0]] * self.seen, [clip[1]] * self.heard, [draw])

        list(pool.map(fill, range(len(wanted))))
        samples = np.array([sample for sample, _ in wanted], np.int64)
        views.keys = [self.shards.keys[sample] for sample, _ in wanted]
        views.labels = torch.from_numpy(self.shards.labels[samples].astype(np.int64))
        return ClipBatch(views, samples, np.array([number for _, number in wanted], np.int64))
