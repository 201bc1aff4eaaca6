"""Frames out of the codecs that are no video streams: mosaics by DALI's JPEG decoder, raw planes by swscale."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from xkd_fast.data.encode import FULL_RANGE, SCALING
from xkd_fast.data.packed import Mosaic, PackedError, aligned, parse_mosaic, parse_yuv

if TYPE_CHECKING:
    from xkd_fast.data.decode import DecodeRequest

JPEGS_PER_CLIP = 8  # that one run of the decoder takes, at most, times the batch size


class Unpacker(Protocol):
    """Frames [T, H, W, 3] uint8, red, green, blue, of each request; fewer than wanted where its file ends before.

    Raises:
        PackedError: a file is not what its format promises.
        RuntimeError: one cannot be decoded; the unpacker must be made anew.
    """

    def __call__(self, requests: Sequence[DecodeRequest]) -> list[Tensor]: ...


class MosaicUnpacker:
    """Decodes the JPEGs that hold wanted frames, those of the whole batch together, and cuts them apart."""

    def __init__(self, batch_size: int, threads: int) -> None:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        self._at_once = JPEGS_PER_CLIP * batch_size
        self._pipeline: Any = Pipeline(
            batch_size=self._at_once, num_threads=threads, device_id=None, prefetch_queue_depth=1, exec_dynamic=True
        )
        with self._pipeline:
            jpegs = fn.external_source(name="jpegs", ndim=1, dtype=types.DALIDataType.UINT8)
            self._pipeline.set_outputs(fn.decoders.image(jpegs, adjust_orientation=False))
        self._pipeline.build()

    def __call__(self, requests: Sequence[DecodeRequest]) -> list[Tensor]:
        mosaics = [parse_mosaic(request.video) for request in requests]
        both = list(zip(mosaics, requests, strict=True))
        ranges = [mosaic.holding(request.start, request.frames) for mosaic, request in both]
        places = [(place, jpeg) for place, numbers in enumerate(ranges) for jpeg in numbers]
        clips = [
            np.empty((max(0, min(request.frames, mosaic.frames - request.start)), mosaic.height, mosaic.width, 3), np.uint8)
            for mosaic, request in both
        ]
        for first in range(0, len(places), self._at_once):
            some = places[first : first + self._at_once]
            self._pipeline.feed_input("jpegs", [mosaics[place].jpegs[jpeg] for place, jpeg in some])
            (pictures,) = self._pipeline.run()
            for number, (place, jpeg) in enumerate(some):
                _cut(torch.from_dlpack(pictures[number]).numpy(), mosaics[place], jpeg, requests[place].start, clips[place])
        return [torch.from_numpy(clip) for clip in clips]


def _cut(picture: NDArray[np.uint8], mosaic: Mosaic, jpeg: int, start: int, clip: NDArray[np.uint8]) -> None:
    """Copy what a decoded JPEG [h, w, 3] holds of a clip [T, H, W, 3] that begins at frame ``start``.

    By numpy: PyTorch would wake its threads for every frame, which on busy processors took a hundred times as long.
    """
    size = mosaic.size(jpeg)
    if picture.shape != (*size, 3):
        raise PackedError(f"JPEG {jpeg} has {list(picture.shape)} numbers, where the header promises {[*size, 3]}")
    height, width = aligned(mosaic.height), aligned(mosaic.width)
    tiles = picture.reshape(-1, height, mosaic.columns, width, 3).swapaxes(1, 2)  # [rows, columns, height, width, 3]
    begin = jpeg * mosaic.tiles
    for frame in range(max(start, begin), min(start + len(clip), begin + mosaic.tiles)):
        row, column = divmod(frame - begin, mosaic.columns)
        clip[frame - start] = tiles[row, column, : mosaic.height, : mosaic.width]


class YuvUnpacker:
    """Converts raw planes with the matrix and range that they were written with, chroma interpolated."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="yuv")

    def __call__(self, requests: Sequence[DecodeRequest]) -> list[Tensor]:
        return list(self._pool.map(_convert, requests))


def _convert(request: DecodeRequest) -> Tensor:
    stored = parse_yuv(request.video)[request.start : request.start + request.frames]
    clip = np.empty((len(stored), stored.shape[1] // 3 * 2, stored.shape[2], 3), np.uint8)
    reformatter = VideoReformatter()
    for frame, picture in zip(stored, clip, strict=True):
        planes = av.VideoFrame.from_ndarray(frame, format=FULL_RANGE)
        picture[:] = reformatter.reformat(planes, format="rgb24", interpolation=SCALING, threads=1).to_ndarray()
    return torch.from_numpy(clip)
