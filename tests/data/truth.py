"""What shards should hold, by plain arithmetic: rendered pictures, the matrices of colours, exact scaling by areas."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.filter import Graph
from numpy.typing import NDArray

KR_KB = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593)}
MATRIX_TAG = {"601": 6, "709": 1, "2020": 9}  # of ITU-T H.273; 2 = none
RANGE_TAG = {"limited": 1, "full": 2}  # of FFmpeg; 0 = none


def scene(seconds: float, height: int, width: int) -> NDArray[np.float64]:
    """A smooth coloured picture [H, W, 3], 0-255, all of which moves: 1.3 of its widths a second."""
    y, x = np.mgrid[:height, :width].astype(float)
    y, x = (y + 0.5) / height, (x + 0.5) / width
    waves = [
        np.sin(2 * np.pi * (3 * x + 1 * y - 4.1 * seconds)),
        np.sin(2 * np.pi * (2 * x - 2 * y - 3.3 * seconds) + 1),
        np.sin(2 * np.pi * (1 * x + 3 * y + 2.9 * seconds) + 2),
    ]
    return 127.5 + 95 * np.stack(waves, -1)


def scaled(picture: NDArray[Any], height: int, width: int) -> NDArray[np.float64]:
    """A picture [h, w, ...] as [height, width, ...]: each pixel the mean of the area that it covers."""
    rows, columns = _areas(picture.shape[0], height), _areas(picture.shape[1], width)
    return np.einsum("ir,jc,rc...->ij...", rows, columns, picture.astype(float), optimize=True)


def _areas(source: int, target: int) -> NDArray[np.float64]:
    edges = np.arange(target + 1) * source / target
    cells = np.arange(source)
    share = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return np.clip(share, 0, None) * target / source


def psnr(found: NDArray[Any], true: NDArray[Any]) -> float:
    """Of pictures in 0-255, dB."""
    return float(10 * np.log10(255**2 / np.mean((found.astype(float) - true.astype(float)) ** 2)))


def yuv_frame(picture: NDArray[Any], pix_fmt: str, matrix: str, limits: str) -> Any:
    """RGB [H, W, 3], 0-255, as a frame without tags: 4:4:4 or 4:2:0 (chroma between rows, on left columns), 8 or 10 bits."""
    kr, kb = KR_KB[matrix]
    red, green, blue = np.moveaxis(picture.astype(float) / 255, -1, 0)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = [(blue - luma) / (2 * (1 - kb)), (red - luma) / (2 * (1 - kr))]
    if "420" in pix_fmt:
        chroma = [_left_sited(plane) for plane in chroma]
    bits = 10 if pix_fmt.endswith("10le") else 8
    unit = 2 ** (bits - 8)
    if limits == "limited":
        planes = [(16 + 219 * luma) * unit, *((128 + 224 * plane) * unit for plane in chroma)]
    else:
        planes = [luma * (256 * unit - 1), *(128 * unit + plane * (256 * unit - 1) for plane in chroma)]
    frame = av.VideoFrame(picture.shape[1], picture.shape[0], pix_fmt)
    for plane, values in zip(frame.planes, planes):
        stored = np.clip(np.rint(values), 0, 256 * unit - 1).astype("<u2" if bits == 10 else np.uint8)
        line = np.zeros((plane.height, plane.line_size // stored.itemsize), stored.dtype)
        line[:, : stored.shape[1]] = stored
        plane.update(line.tobytes())
    return frame


def _left_sited(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    rows = (plane[0::2] + plane[1::2]) / 2
    left = np.concatenate([rows[:, :1], rows[:, 1:-1:2]], 1)
    return (left + 2 * rows[:, 0::2] + rows[:, 1::2]) / 4


def woven(upper: Any, lower: Any, first: str) -> Any:
    """Two fields as one frame, marked as interlaced: lines of ``upper`` on even rows, of ``lower`` between."""
    frame = av.VideoFrame(upper.width, 2 * upper.height, upper.format.name)
    for plane, even, odd in zip(frame.planes, upper.planes, lower.planes):
        lines = np.stack([np.frombuffer(bytes(field), np.uint8).reshape(field.height, -1) for field in (even, odd)], 1)
        lines = lines.reshape(plane.height, -1)
        padded = np.zeros((plane.height, plane.line_size), np.uint8)
        padded[:, : plane.width] = lines[:, : plane.width]
        plane.update(padded.tobytes())
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25))
    mark = graph.add("setfield", {"upper": "tff", "lower": "bff"}[first])
    graph.link_nodes(source, mark, graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull()
