"""Frames out of the codecs that are decoded picture by picture: JPEGs by DALI, raw planes by swscale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from xkd_fast.data.avi import parse_avi
from xkd_fast.data.dali import HandFed, encoded_input, placed
from xkd_fast.data.encode import FULL_RANGE, SCALING
from xkd_fast.data.jpeg_header import jpeg_size
from xkd_fast.data.packed import Mosaic, PackedError, parse_mosaic, parse_yuv

if TYPE_CHECKING:
    from xkd_fast.data.decode import DecodeRequest

JPEGS_PER_CLIP = {"mosaic": 8, "mjpeg": 32}  # that one run of the decoder takes, at most, times the batch size
PARSERS: dict[str, Callable[[NDArray[np.uint8]], Mosaic]] = {"mosaic": parse_mosaic, "mjpeg": parse_avi}


class Unpacker(Protocol):
    """Frames [T, H, W, 3] uint8, red, green, blue, of each request; fewer than wanted where its file ends before.

    And on a GPU the pictures that they are cut from, which must be kept until that is done.

    Raises:
        PackedError: a file is not what its format promises.
        RuntimeError: one cannot be decoded; the unpacker must be made anew.
    """

    def __call__(self, requests: Sequence[DecodeRequest]) -> tuple[list[Tensor], list[Tensor]]: ...


class JpegUnpacker:
    """Decodes the JPEGs that hold wanted frames, those of the whole batch together, and cuts them apart.

    Args:
        batch_size: requests of a call, at most.
        threads: that decode.
        codec: ``mosaic``, or ``mjpeg``: one frame a JPEG.
        device: where JPEGs are decoded and frames lie then.
        engine_share: of JPEGs, 0-1, that go to a GPU's JPEG engine where it has one.
    """

    def __init__(self, batch_size: int, threads: int, codec: str, device: torch.device, engine_share: float) -> None:
        self._parse, self._device, self._engine_share = PARSERS[codec], device, engine_share
        self._at_once = JPEGS_PER_CLIP[codec] * batch_size
        self._pipeline = HandFed(self._outputs, self._at_once, threads, device)

    def _outputs(self) -> list[Any]:
        from nvidia.dali import fn

        # chroma is interpolated as libjpeg-turbo does it, so that GPU and CPU give the same pixels but for rounding
        how: dict[str, Any] = {
            "adjust_orientation": False,
            "jpeg_fancy_upsampling": True,
            "hw_decoder_load": self._engine_share,
        }
        return [fn.decoders.image(encoded_input("jpegs"), **how, **placed(self._device))]

    def __call__(self, requests: Sequence[DecodeRequest]) -> tuple[list[Tensor], list[Tensor]]:
        mosaics = [self._parse(request.video) for request in requests]
        both = list(zip(mosaics, requests, strict=True))
        ranges = [mosaic.holding(request.start, request.frames) for mosaic, request in both]
        places = [(place, jpeg) for place, numbers in enumerate(ranges) for jpeg in numbers]
        sizes = [
            (max(0, min(request.frames, mosaic.frames - request.start)), mosaic.height, mosaic.width, 3)
            for mosaic, request in both
        ]
        clips = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]
        for place, jpeg in places:
            _check(mosaics[place], jpeg)
        targets = [_pixels(clip) for clip in clips]
        kept: list[Tensor] = []
        for first in range(0, len(places), self._at_once):
            some = places[first : first + self._at_once]
            (pictures,) = self._pipeline({"jpegs": [mosaics[place].jpegs[jpeg] for place, jpeg in some]})
            for picture, (place, jpeg) in zip(pictures, some, strict=True):
                _cut(_pixels(picture), mosaics[place], jpeg, requests[place].start, targets[place])
            if self._device.type == "cuda":
                kept += pictures
        return clips, kept


def _pixels(picture: Tensor) -> Any:
    """The same memory to copy pixels from and to: a NumPy array on a CPU, where PyTorch would wake its threads for every frame,
    which on busy processors took a hundred times as long; a tensor on a GPU."""
    return picture.numpy() if picture.device.type == "cpu" else picture


def _check(mosaic: Mosaic, jpeg: int) -> None:
    height, width = jpeg_size(mosaic.jpegs[jpeg].data)
    if (height, width) != mosaic.size(jpeg):
        promised = " × ".join(map(str, mosaic.size(jpeg)))
        raise PackedError(f"JPEG {jpeg} has {height} × {width} pixels, where the file's header promises {promised}")


def _cut(picture: Any, mosaic: Mosaic, jpeg: int, start: int, clip: Any) -> None:
    """Copy what a decoded JPEG [h, w, 3] holds of a clip [T, H, W, 3] that begins at frame ``start``; arrays or tensors."""
    height, width = mosaic.tile
    tiles = picture.reshape(-1, height, mosaic.columns, width, 3).swapaxes(1, 2)  # [rows, columns, height, width, 3]
    tiles = tiles[:, :, : mosaic.height, : mosaic.width]
    begin = jpeg * mosaic.tiles
    frame, end = max(start, begin), min(start + len(clip), begin + mosaic.tiles)
    while frame < end:  # a row of tiles at a time
        row, column = divmod(frame - begin, mosaic.columns)
        count = min(mosaic.columns - column, end - frame)
        clip[frame - start : frame - start + count] = tiles[row, column : column + count]
        frame += count


class YuvUnpacker:
    """Converts raw planes with the matrix and range that they were written with, chroma interpolated."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="yuv")

    def __call__(self, requests: Sequence[DecodeRequest]) -> tuple[list[Tensor], list[Tensor]]:
        return list(self._pool.map(_convert, requests)), []


def _convert(request: DecodeRequest) -> Tensor:
    stored = parse_yuv(request.video)[request.start : request.start + request.frames]
    clip = np.empty((len(stored), stored.shape[1] // 3 * 2, stored.shape[2], 3), np.uint8)
    reformatter = VideoReformatter()
    for frame, picture in zip(stored, clip, strict=True):
        planes = av.VideoFrame.from_ndarray(frame, format=FULL_RANGE)
        picture[:] = reformatter.reformat(planes, format="rgb24", interpolation=SCALING, threads=1).to_ndarray()
    return torch.from_numpy(clip)
