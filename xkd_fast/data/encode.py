"""Frames and sound into the streams that shards hold. Same input, same bytes, however many processors there are.

Frames are encoded as they come, so a long video takes the memory of its encoded bytes and of the few frames that an encoder
looks ahead.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, Protocol

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from xkd_fast.data.packed import aligned, mosaic_grid, pack_mosaic, yuv_header
from xkd_fast.data.read_video import SCALING

FULL_RANGE, LIMITED_RANGE = "yuvj420p", "yuv420p"  # BT.601, chroma of half the height and width
GREY = 128
BT601, LIMITED = 5, 1  # as streams name their matrix and range; untagged, 720 lines and more are taken for BT.709


class VideoEncoder:
    """Encodes frames of one size, one after the other.

    Args:
        codec: a name of `xkd_fast.data.video_codecs.CODECS`.
        fps: frames per second.
        quality: on the codec's own scale; ignored where it has none.
        width: of the frames, pixels, even.
        height: likewise.
    """

    def __init__(self, codec: str, fps: float, quality: int, width: int, height: int) -> None:
        assert width % 2 == height % 2 == 0, f"4:2:0 holds no {width} × {height}"
        self._pixels = LIMITED_RANGE if codec in ("h264", "vp9") else FULL_RANGE
        self.width, self.height = width, height
        self.frames = 0  # added so far
        self._reformatter = VideoReformatter()
        self._file: _Writer
        if codec == "mosaic":
            self._file = _MosaicWriter(fps, quality, width, height)
        elif codec == "yuv":
            self._file = _YuvWriter(width, height)
        else:
            self._file = _StreamWriter(codec, fps, quality, width, height)

    def add(self, picture: NDArray[np.uint8], times: int = 1) -> None:
        """Append a frame [H, W, 3] uint8, red, green, blue, that is shown ``times`` times."""
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        self._file.add(self._reformatter.reformat(frame, format=self._pixels, interpolation=SCALING, threads=1), times)
        self.frames += times

    def finish(self) -> bytes:
        """The file; nothing can be added any more. There must be a frame."""
        return self._file.finish()


def encode_video(pictures: Iterable[NDArray[np.uint8]], codec: str, fps: float, quality: int) -> bytes:
    """Frames [H, W, 3] uint8, at least one, as a video file in memory; see :class:`VideoEncoder`."""
    encoder = None
    for picture in pictures:
        encoder = encoder or VideoEncoder(codec, fps, quality, picture.shape[1], picture.shape[0])
        encoder.add(picture)
    assert encoder is not None, "no frames"
    return encoder.finish()


class _Writer(Protocol):
    def add(self, frame: Any, times: int) -> None: ...

    def finish(self) -> bytes: ...


class _StreamWriter:
    """MJPEG in AVI, H.264 in MP4, or VP9 in WebM, the latter two with a key frame a second."""

    def __init__(self, codec: str, fps: float, quality: int, width: int, height: int) -> None:
        self._buffer = io.BytesIO()
        self._rate = Fraction(fps).limit_denominator(1000)
        self._number = 0
        form = {"mjpeg": "avi", "h264": "mp4", "vp9": "webm"}[codec]
        # WebM's numbers of file and track are random without this flag
        self._container = av.open(self._buffer, "w", format=form, options={"fflags": "+bitexact"} if codec == "vp9" else {})
        self._stream: Any
        if codec == "mjpeg":
            self._stream = self._container.add_stream("mjpeg", rate=self._rate)
            self._stream.codec_context.qmin = self._stream.codec_context.qmax = quality
        elif codec == "h264":
            # without the last flag the same frames give other bytes on every run, a bug of x264's assembly code
            options = {"preset": "medium", "crf": str(quality), "x264-params": "cpu-independent=1"}
            self._stream = self._container.add_stream("libx264", rate=self._rate, options=options)
        else:
            # at 128 pixels a frame takes 1 ms, where deadline=good takes 4 ms for files that are a tenth smaller
            options = {"crf": str(quality), "b": "0", "deadline": "realtime", "cpu-used": "8", "row-mt": "0"}
            self._stream = self._container.add_stream("libvpx-vp9", rate=self._rate, options=options)
        if codec != "mjpeg":
            self._stream.codec_context.gop_size = max(1, round(fps))
            self._stream.codec_context.colorspace, self._stream.codec_context.color_range = BT601, LIMITED
        self._stream.pix_fmt = FULL_RANGE if codec == "mjpeg" else LIMITED_RANGE
        self._stream.width, self._stream.height = width, height
        # With more threads the JPEGs get restart markers and are a tenth larger, so the bytes would depend on the machine.
        self._stream.codec_context.thread_count = 1

    def add(self, frame: Any, times: int) -> None:
        for _ in range(times):
            frame.pts, frame.time_base = self._number, 1 / self._rate
            self._container.mux(self._stream.encode(frame))
            self._number += 1

    def finish(self) -> bytes:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._buffer.getvalue()


class _MosaicWriter:
    """JPEGs of many frames each, in the format of `xkd_fast.data.packed`."""

    def __init__(self, fps: float, quality: int, width: int, height: int) -> None:
        self._quality, self._width, self._height = quality, width, height
        self._grid = mosaic_grid(height, width, fps)
        self._frames = 0
        self._jpegs: list[bytes] = []
        self._tiles: list[tuple[NDArray[np.uint8], ...]] = []  # planes of those that wait for their JPEG

    def add(self, frame: Any, times: int) -> None:
        tile = tuple(
            np.pad(plane, ((0, height - plane.shape[0]), (0, width - plane.shape[1])), "edge")
            for plane, (height, width) in zip(
                planes(frame.to_ndarray()), plane_sizes(aligned(self._height), aligned(self._width)), strict=True
            )
        )
        for _ in range(times):
            self._tiles.append(tile)
            self._frames += 1
            if len(self._tiles) == self._grid[0] * self._grid[1]:
                self._end_jpeg()

    def _end_jpeg(self) -> None:
        columns = self._grid[0]
        height, width = -(-len(self._tiles) // columns) * aligned(self._height), columns * aligned(self._width)
        canvas = np.full((height * 3 // 2, width), GREY, np.uint8)
        for number, tile in enumerate(self._tiles):
            row, column = divmod(number, columns)
            for whole, part in zip(planes(canvas), tile, strict=True):
                tall, wide = part.shape
                whole[row * tall : (row + 1) * tall, column * wide : (column + 1) * wide] = part
        self._jpegs.append(_jpeg(canvas, self._quality))
        self._tiles.clear()

    def finish(self) -> bytes:
        if self._tiles:
            self._end_jpeg()
        return pack_mosaic(self._frames, self._height, self._width, self._grid, self._jpegs)


class _YuvWriter:
    """Raw planes, in the format of `xkd_fast.data.packed`."""

    def __init__(self, width: int, height: int) -> None:
        self._width, self._height = width, height
        self._frames = 0
        self._buffer = io.BytesIO(yuv_header(0, height, width))
        self._buffer.seek(0, io.SEEK_END)

    def add(self, frame: Any, times: int) -> None:
        data = frame.to_ndarray().tobytes()
        for _ in range(times):
            self._buffer.write(data)
            self._frames += 1

    def finish(self) -> bytes:
        self._buffer.seek(0)
        self._buffer.write(yuv_header(self._frames, self._height, self._width))
        return self._buffer.getvalue()


def plane_sizes(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """Height and width of the planes Y, U and V, pixels."""
    return (height, width), (height // 2, width // 2), (height // 2, width // 2)


def planes(frame: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], ...]:
    """Y [H, W], U and V [H/2, W/2] of a frame [H · 3/2, W], as views of it."""
    height, width = frame.shape[0] // 3 * 2, frame.shape[1]
    flat = frame.reshape(-1)
    sizes = plane_sizes(height, width)
    ends = np.cumsum([tall * wide for tall, wide in sizes]).tolist()
    return tuple(flat[end - tall * wide : end].reshape(tall, wide) for end, (tall, wide) in zip(ends, sizes, strict=True))


def _jpeg(canvas: NDArray[np.uint8], quality: int) -> bytes:
    """A canvas [H · 3/2, W] of planes as a JPEG file."""
    encoder: Any = av.CodecContext.create("mjpeg", "w")
    encoder.height, encoder.width = canvas.shape[0] // 3 * 2, canvas.shape[1]
    encoder.pix_fmt, encoder.time_base, encoder.thread_count = FULL_RANGE, Fraction(1), 1
    encoder.qmin = encoder.qmax = quality
    frame = av.VideoFrame.from_ndarray(canvas, format=FULL_RANGE)
    frame.pts = 0
    return b"".join(bytes(packet) for sent in (frame, None) for packet in encoder.encode(sent))


def encode_flac(waveform: NDArray[np.int16], sample_rate: int) -> bytes:
    """Mono int16 sound as a FLAC file in memory."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="flac") as container:
        stream: Any = container.add_stream("flac", rate=sample_rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(waveform[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = sample_rate, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()
