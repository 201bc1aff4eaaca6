"""Plain clips of every sample, centre-cropped and not augmented, for frozen features."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from xkd_fast.data.augment import ViewMaker
from xkd_fast.data.clip_options import ClipOptions, check_against_model, view_shape
from xkd_fast.data.decode import ClipDecoder, DecodedClip, DecodeRequest, UndecodableError, require_cpu_codec
from xkd_fast.data.decode_sound import SoundDecoder, placeholder_sound
from xkd_fast.data.fetch import clip_shape, cut_clip, encoded_request, size_problem
from xkd_fast.data.log_mel import MelOptions
from xkd_fast.data.pipeline import check_against_shards
from xkd_fast.data.prefetch import Prefetcher, single_threaded_pool
from xkd_fast.data.sampler import evaluation_starts
from xkd_fast.data.shards import CorruptSampleError, ShardSet
from xkd_fast.data.views import AugmentOptions, ClipShape, Views, ViewShape, last_start, plain_draw
from xkd_fast.errors import UserError
from xkd_fast.model.options import ModelOptions


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
    if "video" in modalities and shards.has_video.any():
        require_cpu_codec(shards.codec, "the data set")
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
            self.decoder = ClipDecoder(batch_size, data.own_threads, shards.codec)
        else:
            self.decoder = SoundDecoder(batch_size, data.own_threads)

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
        with single_threaded_pool(self.data.own_threads) as pool:
            prefetcher = Prefetcher(self._make(samples, pool), self.data.own_prefetch)
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
