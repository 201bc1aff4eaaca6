"""Pictures of a source file at a constant rate: small, upright, progressive RGB with square pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from av.filter import Graph
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from xkd_fast.data.segment import segment_bounds
from xkd_fast.data.source_file import Skip, decoded, open_source, packet_ends, video_stream

# Area averaging, accurate rounding, full chroma: swscale's numbers, of which PyAV before 18 names only the first. Without the
# last two it darkens a flat 255 to 253, and once more on the way to JPEG.
SCALING = 0x20 | 0x40000 | 0x2000
TIME_STAMP_ERROR = (1e-4, 1.1e-3)  # seconds; between them the unit of the file's time stamps, a millisecond in Matroska
LONGEST_STILL = 600.0  # seconds that one picture may stand; more comes from a damaged time stamp
MAX_ASPECT = 16  # long side : short side

# Number of a matrix in ITU-T H.273 → number by which swscale knows it; older PyAV has no name for the last. Others it refuses.
BT709, FCC, BT601, SMPTE240M, BT2020 = 1, 4, 5, 7, 9
MATRICES = {1: BT709, 4: FCC, 5: BT601, 6: BT601, 7: SMPTE240M, 9: BT2020, 10: BT2020}  # 10, constant luminance: nearly so
UNTAGGED = (0, 2, 3)  # RGB (said of YUV), unspecified, reserved


class VideoReader:
    """Frames of a source, each showing what is to be seen at its instant: frame k that of ``k / fps`` s after the first one."""

    def __init__(self, path: str, fps: float, short_side: int, start: float | None = None, end: float | None = None) -> None:
        """``short_side`` in pixels; ``start`` and ``end``, seconds from the file's beginning, bound the part that is read."""
        self._path, self._fps, self._short_side = path, fps, short_side
        self._part = start, end
        self.start = 0.0  # when the first frame is shown by the file's clock, seconds
        self.seconds = 0.0  # how long the pictures last; known once the last frame was taken

    def __iter__(self) -> Iterator[tuple[NDArray[np.uint8], int]]:
        """Yield pictures [H, W, 3] uint8, and how many frames each of them is; once.

        Raises:
            Skip: the pictures cannot be used, or not be decoded.
            av.error.FFmpegError: the file cannot be read.
        """
        shown = 0
        end = step = lost = 0.0
        held: Any = None

        def still(until: int) -> Iterator[tuple[NDArray[np.uint8], int]]:
            nonlocal shown
            if until - shown > LONGEST_STILL * self._fps:
                raise Skip("unreadable", f"by its time stamps one picture stands for {(until - shown) / self._fps:.0f} s")
            if until > shown:
                yield scaler(held), until - shown
                shown = until

        with open_source(self._path) as container:
            stream = video_stream(container)
            assert stream is not None
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            scaler = _Scaler(stream.sample_aspect_ratio or Fraction(1), self._short_side)
            slack = min(max(float(stream.time_base or 0), TIME_STAMP_ERROR[0]), TIME_STAMP_ERROR[1])
            first, last = segment_bounds(container, *self._part)
            for frame in _progressive(_presented(container, stream, first)):
                time = float(frame.time) if frame.time is not None else end
                if time >= last - slack:
                    break
                if held is None:
                    self.start = max(time, first)  # what is seen then may have begun before
                else:
                    if time <= end - step:  # a time stamp that goes back in time carries no information
                        lost += step
                        continue
                    # rounding of time stamps must not move a frame by a whole interval
                    yield from still(math.ceil((time - self.start - slack) * self._fps))
                step = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else float(1 / rate)
                held, end = frame, time + step
            if held is None and last == math.inf:
                raise Skip("unreadable", "not one frame could be decoded")
            if held is None or end <= first:
                raise Skip("too_short", "no picture lies in the part asked for")
            self.seconds = min(end, last) - self.start
            if lost > 0.1 * (self.seconds + lost) + 0.5:
                raise Skip(
                    "truncated",
                    f"{lost:.2f} s of pictures come after others whose time stamps are later, as where recordings were joined "
                    f"byte by byte, and {self.seconds:.2f} s could be read; join them anew, or split them",
                )
            yield from still(max(shown, frames_in(self.seconds, self._fps)))


def frames_in(seconds: float, fps: float) -> int:
    """How many frames pictures become that last so long; at least one."""
    return max(1, round(seconds * fps))


def picture_end(path: str) -> float:
    """When the pictures of a file end by its clock, seconds, as its packets tell: nothing is decoded."""
    with open_source(path) as container:
        stream = video_stream(container)
        assert stream is not None
        return float(max(packet_ends(container, [stream]), default=Fraction(0)))


def _presented(container: Any, stream: Any, start: float) -> Iterator[Any]:
    """The frames of a stream, from one at ``start`` or before on, with the time stamps by which they are shown.

    AVI has none. FFmpeg then takes the numbers of the packets, whose order is another where pictures are coded between others.
    When a picture came out tells its instant, less what the decoder held back before the first one.
    """
    first, held_back = stream.start_time or 0, None
    for frame in decoded(container, stream, start):
        if container.format.name == "avi":
            if held_back is None:
                held_back = (frame.dts or 0) - first if stream.codec_context.has_b_frames else 0
            frame.pts = None if frame.dts is None else frame.dts - held_back
        yield frame


def _progressive(frames: Iterable[Any]) -> Iterator[Any]:
    """The frames, those that are marked as interlaced made whole from their first field.

    They would otherwise show two instants at once, and swscale, which scales each field alone, would comb the small ones too.
    """
    graph: Graph | None = None
    form: Any = None
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        if graph is None or form != (frame.format.name, frame.width, frame.height):
            if graph is not None:
                yield from _drained(graph, None)
            form = (frame.format.name, frame.width, frame.height)
            graph = _deinterlacer(frame)
        yield from _drained(graph, frame)
    if graph is not None:
        yield from _drained(graph, None)


def _deinterlacer(frame: Any) -> Graph:
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")).configure()
    return graph


def _drained(graph: Graph, frame: Any) -> Iterator[Any]:
    graph.vpush(frame)
    while True:
        try:
            yield graph.vpull()
        except (BlockingIOError, EOFError):
            return


def target_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height with the shorter one ``short_side`` and the aspect kept, both even."""
    scale = short_side / min(width, height)
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))


def colour_matrix(frame: Any) -> int | None:
    """How a frame's YUV becomes RGB: as the file says; without a word BT.709 for HD and BT.601 below, as players guess.

    HD are more than 576 lines or at least 1280 columns. Wide gamut and HDR (PQ, HLG) are not mapped to BT.709: the shards keep
    the values as coded, in which HLG looks nearly as meant and PQ pale.

    Raises:
        Skip: a matrix that swscale does not know.
    """
    if frame.format.is_rgb:
        return None
    tag = int(frame.colorspace)
    if tag in UNTAGGED:
        return BT709 if frame.height > 576 or frame.width >= 1280 else BT601
    if tag not in MATRICES:
        raise Skip("unreadable", f"colours by matrix {tag} of ITU-T H.273, which cannot be converted")
    return MATRICES[tag]


class _Scaler:
    """Decoded frames as RGB [H, W, 3] uint8, upright, with square pixels, all of the size that the first one asks for.

    What is transparent is laid on black.
    """

    def __init__(self, anamorphic: Fraction, short_side: int) -> None:
        self._anamorphic, self._short_side = anamorphic, short_side
        self._size: tuple[int, int] | None = None  # before it is turned upright
        self._matrix = (1.0, 0.0, 0.0, 1.0)
        self._reformatter = VideoReformatter()  # one for all frames: frame.reformat() makes a new one each time, 4.5 ms for 0.9

    def __call__(self, frame: Any) -> NDArray[np.uint8]:
        if self._size is None:
            width = max(1, round(frame.width * self._anamorphic))
            if max(width, frame.height) > MAX_ASPECT * min(width, frame.height):
                raise Skip("too_narrow", f"a picture of {width} × {frame.height}; the sides may differ {MAX_ASPECT}-fold")
            self._size = target_size(width, frame.height, self._short_side)
            self._matrix = _display_matrix(frame)
        width, height = self._size
        see_through = any(component.is_alpha for component in frame.format.components)
        small = self._reformatter.reformat(
            frame,
            width,
            height,
            "rgba" if see_through else "rgb24",
            src_colorspace=colour_matrix(frame),
            interpolation=SCALING,
            threads=1,
        )
        picture: NDArray[Any] = small.to_ndarray()
        if see_through:
            alpha = picture[..., 3:].astype(np.uint16)
            picture = ((picture[..., :3] * alpha + 127) // 255).astype(np.uint8)
        return np.ascontiguousarray(upright(picture, self._matrix))


def upright(picture: NDArray[np.uint8], matrix: tuple[float, float, float, float]) -> NDArray[np.uint8]:
    """A picture [H, W, 3] turned and mirrored by the nearest quarter turn: its point (x, y) is shown at (ax + cy, bx + dy)."""
    a, b, c, d = matrix
    right, down = a, d
    if abs(b) + abs(c) > abs(a) + abs(d):
        picture, right, down = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]


def _display_matrix(frame: Any) -> tuple[float, float, float, float]:
    """(a, b, c, d) of :func:`upright`."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # a kind that PyAV has no number for, such as EXIF, hides all others; the angle it finds by itself
        angle = math.radians(frame.rotation)
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    if data is None:
        return 1.0, 0.0, 0.0, 1.0
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    return a, b, c, d
