"""Source files for the benchmarks of data: rendered once per place, H.264 and AAC in MP4, as people's piles hold them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from xkd_fast.data.synthetic import CLASSES, SyntheticOptions, render_clip

RENDERED_FPS = 25
NOISE = 6  # grey levels on the fine pattern that stands for what cameras see: rendered planes alone would be too easy to code


@dataclass(frozen=True)
class SourceKind:
    """What the files of a pile are."""

    name: str
    height: int
    width: int
    seconds: float
    sample_rate: int = 44100


KINETICS = SourceKind("340 × 256", 256, 340, 10.0)  # Kinetics-400 as it is passed around, short side 256
HD = SourceKind("1280 × 720", 720, 1280, 10.0)
TINY = SourceKind("96 × 64", 64, 96, 2.5)


def write_sources(folder: Path, kind: SourceKind, count: int, *, rendered: int | None = None, processes: int = 1) -> list[Path]:
    """``count`` files ``folder/CLASS/NUMBER.mp4`` of 25 frames a second, classes in turn; those that are there are kept.

    ``rendered``: how many of them differ, the others being further names of these; None = all. ``processes``: that render.
    """
    paths = [folder / CLASSES[number % len(CLASSES)] / f"{number:04d}.mp4" for number in range(count)]
    for parent in {path.parent for path in paths}:
        parent.mkdir(parents=True, exist_ok=True)
    different = paths[:rendered]
    missing = [(path, kind, number) for number, path in enumerate(different) if not path.exists()]
    if processes > 1 and len(missing) > 1:
        with ProcessPoolExecutor(min(processes, len(missing)), multiprocessing.get_context("spawn")) as pool:
            list(pool.map(write_source, *zip(*missing)))
    else:
        for arguments in missing:
            write_source(*arguments)
    for number, path in enumerate(paths):
        if not path.exists():
            os.link(different[number % len(different)], path)
    return paths


def folder(measuring: bool, temporary: Path) -> Path:
    """Where rendered files and what is made of them lie: XKD_BENCHMARK_MEDIA keeps them from one measurement to the next."""
    named = os.environ.get("XKD_BENCHMARK_MEDIA") if measuring else None
    return Path(named) if named else temporary


def write_source(path: Path, kind: SourceKind, number: int) -> None:
    """One file; a clip is rendered at half the size or 340 columns and enlarged, with a fine pattern that drifts."""
    width = min(kind.width // 4 * 2, 340)
    height = max(32, width * kind.height // kind.width // 2 * 2)
    options = SyntheticOptions(
        seconds=(kind.seconds, kind.seconds), fps=RENDERED_FPS, width=width, height=height, sample_rate=kind.sample_rate
    )
    clip = render_clip(CLASSES[number % len(CLASSES)], number, options)
    pattern = np.random.default_rng(number).integers(-NOISE, NOISE + 1, (2 * kind.height, 2 * kind.width, 3), np.int16)
    part = path.with_suffix(".part")
    with av.open(str(part), "w", format="mp4") as container:
        # a key frame every ten seconds at most, as x264 and YouTube's files have them
        video: Any = container.add_stream(
            "libx264", rate=RENDERED_FPS, options={"preset": "veryfast", "crf": "23", "threads": "1"}
        )
        video.width, video.height, video.pix_fmt = kind.width, kind.height, "yuv420p"
        audio: Any = container.add_stream("aac", rate=kind.sample_rate, layout="stereo")
        for place, picture in enumerate(_enlarged(clip.frames, kind)):
            row, column = 2 * place % kind.height, 3 * place % kind.width
            grain = pattern[row : row + kind.height, column : column + kind.width]
            image = (picture + grain).clip(0, 255).astype(np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode(None))
        block = av.AudioFrame.from_ndarray(np.stack([clip.waveform] * 2).astype(np.float32), format="fltp", layout="stereo")
        block.sample_rate, block.pts, block.time_base = kind.sample_rate, 0, Fraction(1, kind.sample_rate)
        container.mux(audio.encode(block))
        container.mux(audio.encode(None))
    part.replace(path)


def _enlarged(frames: NDArray[np.uint8], kind: SourceKind) -> Iterator[NDArray[np.int16]]:
    reformatter = av.video.reformatter.VideoReformatter()
    for frame in frames:
        small = av.VideoFrame.from_ndarray(frame, format="rgb24")
        yield reformatter.reformat(small, kind.width, kind.height, "rgb24").to_ndarray().astype(np.int16)
