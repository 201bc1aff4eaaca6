"""The codecs of shards on this machine's CPU: size, fidelity, and how fast clips of them are decoded, in turns.

A clip is 32 frames from anywhere in a video of ten seconds, with the whole video's sound, as training asks for it. The videos
are rendered, so sizes and fidelity are those of drawings with a little noise, not of what cameras see.
"""

from __future__ import annotations

import io
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import record, timing
from xkd_fast.data.decode import ClipDecoder, DecodedClip, DecodeRequest
from xkd_fast.data.encode import encode_flac, encode_video
from xkd_fast.data.synthetic import CLASSES, Clip, SyntheticOptions, render_clip
from xkd_fast.data.video_codecs import CODECS, CPU_CODECS, encoder_quality

FPS, RATE = 8, 16000
ROUNDS = 15
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    videos: int
    seconds: float
    height: int
    width: int
    frames: int  # of a clip


FULL = Size(videos=32, seconds=10.0, height=128, width=170, frames=32)
TINY = Size(videos=2, seconds=2.0, height=32, width=44, frames=8)


def render(size: Size) -> list[Clip]:
    """Videos of all classes in turn."""
    length = (size.seconds, size.seconds)
    options = SyntheticOptions(
        seconds=length, fps=FPS, width=size.width, height=size.height, sample_rate=RATE, video_noise=0.01
    )
    return [render_clip(CLASSES[number % len(CLASSES)], number, options) for number in range(size.videos)]


def psnr(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio, decibels."""
    return float(10 * np.log10(255**2 / np.mean((found.astype(np.float32) - expected) ** 2)))


class Contestant:
    """The same videos in one codec, and what decodes clips of them."""

    def __init__(self, codec: str, videos: list[Clip], size: Size, threads: int) -> None:
        self.codec, self.videos, self.size = codec, videos, size
        self.quality = encoder_quality(codec, None)
        begun = time.process_time()
        encoded = [encode_video(video.frames, codec, FPS, self.quality) for video in videos]
        self.encode_seconds = (time.process_time() - begun) / sum(len(video.frames) for video in videos)
        self.bytes = sum(map(len, encoded)) / sum(len(video.frames) for video in videos) * size.frames
        self.encoded = [np.frombuffer(data, np.uint8) for data in encoded]
        sounds = [encode_flac((video.waveform * 32767).astype(np.int16), RATE) for video in videos]
        self.sounds = [np.frombuffer(sound, np.uint8) for sound in sounds]
        self.starts = _starts(size, videos)
        self.decoder = ClipDecoder(len(videos), threads, codec) if codec in CPU_CODECS else None

    def decode(self) -> list[DecodedClip]:
        """A clip of every video, from other frames on each call, the same for all contestants."""
        assert self.decoder is not None
        parts = zip(self.encoded, self.sounds, next(self.starts), strict=True)
        return self.decoder([DecodeRequest("", video, sound, start, self.size.frames) for video, sound, start in parts])

    def psnr(self) -> float:
        """Of all frames, decibels; mean over the videos."""
        return float(np.mean([psnr(self._all(place), video.frames) for place, video in enumerate(self.videos)]))

    def _all(self, place: int) -> NDArray[np.uint8]:
        if self.decoder is None:
            with av.open(io.BytesIO(self.encoded[place].tobytes())) as container:
                return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        frames = len(self.videos[place].frames)
        (clip,) = self.decoder([DecodeRequest("", self.encoded[place], self.sounds[place], 0, frames)])
        return clip.frames.numpy()


def _starts(size: Size, videos: list[Clip]) -> Iterator[list[int]]:
    random = np.random.default_rng(0)
    while True:
        yield [int(random.integers(len(video.frames) - size.frames + 1)) for video in videos]


def test_codecs(measuring: bool) -> None:
    """Encodes the same videos in every codec and decodes clips of them; fails if a codec gives another picture."""
    size = FULL if measuring else TINY
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    videos = render(size)
    found = [Contestant(codec, videos, size, threads) for codec in CODECS]
    works: dict[str, Callable[[], object]] = {each.codec: each.decode for each in found if each.decoder is not None}
    seconds = timing.seconds(works, CPU, ROUNDS if measuring else 1)
    rows: list[dict[str, Any]] = []
    for each in found:
        row: dict[str, Any] = {"codec": each.codec, "quality": each.quality, "bytes_per_clip": round(each.bytes)}
        row |= {"psnr": round(each.psnr(), 2), "encode_seconds_per_frame": each.encode_seconds}
        assert row["psnr"] > 25, f"{each.codec} gives another picture: {row['psnr']} dB"
        if each.codec in seconds:
            times = seconds[each.codec]
            row["clips_per_second"] = record.spread([size.videos / time for time in times])
            row["against_mjpeg"] = record.spread([a / b for a, b in zip(seconds["mjpeg"], times, strict=True)])
        rows.append(row)
    print(
        "\n".join(
            itertools.chain([f"{size.frames}-frame clips of {size.height} × {size.width}, {threads} threads"], map(told, rows))
        )
    )
    if measuring:
        result = {"height": size.height, "width": size.width, "fps": FPS, "frames": size.frames, "threads": threads}
        record.write(f"codecs_{record.place(CPU)}", {**result, "videos": size.videos, "rows": rows})


def told(row: dict[str, Any]) -> str:
    """A line for a codec."""
    line = f"  {row['codec']}: {row['bytes_per_clip'] / 1e3:.0f} kB a clip, {row['psnr']:.1f} dB, "
    line += f"encoded at {1e3 * row['encode_seconds_per_frame']:.2f} ms a frame"
    if "clips_per_second" not in row:
        return line + ", decodes on GPUs only"
    return line + f", {row['clips_per_second']['median']:.0f} clips/s decoded, {row['against_mjpeg']['median']:.2f} × mjpeg"
