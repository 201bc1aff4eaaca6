"""Frames and sound into the streams that shards hold. Same input, same bytes, however many processors there are.

Frames and sound are encoded as they come, and what is encoded lies in a file where it is long (`xkd_fast.data.spool`), so a
long video takes the memory of the few frames that an encoder looks ahead.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any, Protocol

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from xkd_fast.data.packed import aligned, mosaic_grid, mosaic_header, yuv_header
from xkd_fast.data.read_video import SCALING
from xkd_fast.data.spool import Payload, Spool, chunks, discard

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
        spool: takes the file; None = memory.
    """

    def __init__(self, codec: str, fps: float, quality: int, width: int, height: int, spool: Spool | None = None) -> None:
        assert width % 2 == height % 2 == 0, f"4:2:0 holds no {width} × {height}"
        self._pixels = LIMITED_RANGE if codec in ("h264", "vp9") else FULL_RANGE
        self.width, self.height = width, height
        self.frames = 0  # added so far
        self._reformatter = VideoReformatter()
        spool = spool or Spool()
        self._file: _Writer
        if codec == "mosaic":
            self._file = _MosaicWriter(fps, quality, width, height, spool)
        elif codec == "yuv":
            self._file = _YuvWriter(width, height, spool)
        else:
            self._file = _StreamWriter(codec, fps, quality, width, height, spool)

    def add(self, picture: NDArray[np.uint8], times: int = 1) -> None:
        """Append a frame [H, W, 3] uint8, red, green, blue, that is shown ``times`` times."""
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        self._file.add(self._reformatter.reformat(frame, format=self._pixels, interpolation=SCALING, threads=1), times)
        self.frames += times

    def finish(self) -> Payload:
        """The file: bytes, unless it was too long for memory; nothing can be added any more. There must be a frame."""
        return self._file.finish()


def encode_video(pictures: Iterable[NDArray[np.uint8]], codec: str, fps: float, quality: int) -> bytes:
    """Frames [H, W, 3] uint8, at least one, as a video file in memory; see :class:`VideoEncoder`."""
    encoder = None
    for picture in pictures:
        encoder = encoder or VideoEncoder(codec, fps, quality, picture.shape[1], picture.shape[0])
        encoder.add(picture)
    assert encoder is not None, "no frames"
    return _in_memory(encoder.finish())


def _in_memory(payload: Payload) -> bytes:
    assert isinstance(payload, bytes), "a spool without a path keeps all in memory"
    return payload


class _Writer(Protocol):
    def add(self, frame: Any, times: int) -> None: ...

    def finish(self) -> Payload: ...


class _StreamWriter:
    """MJPEG in AVI, H.264 in MP4, or VP9 in WebM, the latter two with a key frame a second."""

    def __init__(self, codec: str, fps: float, quality: int, width: int, height: int, spool: Spool) -> None:
        self._spool = spool
        self._rate = Fraction(fps).limit_denominator(1000)
        self._number = 0
        form = {"mjpeg": "avi", "h264": "mp4", "vp9": "webm"}[codec]
        # WebM's numbers of file and track are random without this flag
        self._container = av.open(spool, "w", format=form, options={"fflags": "+bitexact"} if codec == "vp9" else {})
        self._stream: Any
        if codec == "mjpeg":
            self._stream = self._container.add_stream("mjpeg", rate=self._rate)
            self._stream.codec_context.qmin = self._stream.codec_context.qmax = quality
        elif codec == "h264":
            # Without cpu-independent the same frames give other bytes on every run, a bug of x264's assembly code. Untagged,
            # chroma is taken to lie on left columns, and comes out a quarter of a pixel off: 33.4 dB where it is 34.3.
            options = {"preset": "medium", "crf": str(quality), "x264-params": "cpu-independent=1:chromaloc=1"}
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

    def finish(self) -> Payload:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._spool.take()


class _MosaicWriter:
    """JPEGs of many frames each, in the format of `xkd_fast.data.packed`."""

    def __init__(self, fps: float, quality: int, width: int, height: int, spool: Spool) -> None:
        self._spool = spool
        self._quality, self._width, self._height = quality, width, height
        self._grid = mosaic_grid(height, width, fps)
        self._frames = 0
        self._lengths: list[int] = []  # of the JPEGs, bytes; they come first in the file, so the JPEGs wait
        self._jpegs = Spool(None if spool.path is None else f"{spool.path}.jpegs")
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
        jpeg = _jpeg(canvas, self._quality)
        self._lengths.append(len(jpeg))
        self._jpegs.write(jpeg)
        self._tiles.clear()

    def finish(self) -> Payload:
        if self._tiles:
            self._end_jpeg()
        self._spool.write(mosaic_header(self._frames, self._height, self._width, self._grid, self._lengths))
        jpegs = self._jpegs.take()
        for data in chunks(jpegs):
            self._spool.write(data)
        discard(jpegs)
        return self._spool.take()


class _YuvWriter:
    """Raw planes, in the format of `xkd_fast.data.packed`."""

    def __init__(self, width: int, height: int, spool: Spool) -> None:
        self._width, self._height = width, height
        self._frames = 0
        self._spool = spool
        spool.write(yuv_header(0, height, width))

    def add(self, frame: Any, times: int) -> None:
        data = frame.to_ndarray().tobytes()
        for _ in range(times):
            self._spool.write(data)
            self._frames += 1

    def finish(self) -> Payload:
        self._spool.seek(0)
        self._spool.write(yuv_header(self._frames, self._height, self._width))
        return self._spool.take()


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


class FlacEncoder:
    """Encodes mono sound as a FLAC file, one block after the other."""

    def __init__(self, sample_rate: int, spool: Spool) -> None:
        self._spool, self._rate = spool, sample_rate
        self._container = av.open(spool, "w", format="flac")
        self._stream: Any = self._container.add_stream("flac", rate=sample_rate, layout="mono")
        self._samples = 0  # so far

    def add(self, sound: NDArray[np.int16]) -> None:
        """Append a block [samples] int16, at least one."""
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = self._rate, self._samples, Fraction(1, self._rate)
        self._container.mux(self._stream.encode(frame))
        self._samples += sound.size

    def finish(self) -> Payload:
        """The file; nothing can be added any more."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._spool.take()

    def abandon(self) -> None:
        """Give up: leave the spool empty, for another encoder."""
        self._container.close()  # now, and not when it is cleared away while another one writes
        self._spool.clear()


def encode_flac(waveform: NDArray[np.int16], sample_rate: int) -> bytes:
    """Mono sound [samples] int16 as a FLAC file in memory."""
    encoder = FlacEncoder(sample_rate, Spool())
    encoder.add(waveform)
    return _in_memory(encoder.finish())
