"""Clips straight from source files, as one decodes them without shards: by PyAV, by torchcodec, and what DALI says of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.audio.resampler import AudioResampler
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from xkd_fast.data.decode import ClipDecoder, DecodeRequest, UndecodableError
from xkd_fast.data.decode_sound import placeholder_sound

AREA_AVERAGING = 0x20  # of swscale


def pyav_frames(path: Path, start: float, count: int, fps: float, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """``count`` pictures, ``fps`` a second, from ``start`` seconds on: [T, H, W, 3]; of height and width ``size`` where given.

    The decoder starts at the key frame before, and only pictures that are wanted are converted.
    """
    pictures: list[NDArray[np.uint8]] = []
    reformatter = VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # the threads or processes around it are the parallelism
        half = float(1 / (stream.average_rate or 25)) / 2
        container.seek(int(start / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time + half < start + len(pictures) / fps:
                continue
            height, width = size or (frame.height, frame.width)
            small = reformatter.reformat(frame, width, height, "rgb24", interpolation=AREA_AVERAGING)
            pictures.append(small.to_ndarray())
            if len(pictures) == count:
                break
    return np.stack([pictures[place % len(pictures)] for place in range(count)])


def pyav_sound(path: Path, start: float, samples: int, rate: int) -> NDArray[np.float32]:
    """``samples`` mono samples from ``start`` seconds on, padded with zeros: [samples]."""
    resampler = AudioResampler(format="flt", layout="mono", rate=rate)
    blocks: list[NDArray[np.float32]] = []
    begun: float | None = None
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        container.seek(int(start / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            begun = float(frame.time) if begun is None else begun
            blocks += [block.to_ndarray()[0] for block in resampler.resample(frame)]
            if begun + sum(map(len, blocks)) / rate >= start + samples / rate:
                break
    heard = np.concatenate(blocks)[max(0, round((start - (begun or 0.0)) * rate)) :][:samples]
    return np.pad(heard, (0, samples - len(heard))).astype(np.float32)


Reader = Callable[[Path, float, int, float, tuple[int, int], int, int], tuple[Tensor, Tensor]]


def read_by_pyav(
    path: Path, start: float, count: int, fps: float, size: tuple[int, int], samples: int, rate: int
) -> tuple[Tensor, Tensor]:
    """Frames [T, H, W, 3] uint8 and sound [samples] float32 of a clip."""
    frames, sound = pyav_frames(path, start, count, fps, size), pyav_sound(path, start, samples, rate)
    return torch.from_numpy(frames), torch.from_numpy(sound)


def torchcodec_reader() -> Reader | str:
    """The same by torchcodec, or why it is not to be had here."""
    try:
        import torchcodec
        from torchcodec.decoders import AudioDecoder, VideoDecoder
        from torchcodec.transforms import Resize
    except (ImportError, OSError, RuntimeError) as error:
        words = " ".join(str(error).split())
        return f"torchcodec cannot be used: {type(error).__name__}: {words[:160]}"

    def read(
        path: Path, start: float, count: int, fps: float, size: tuple[int, int], samples: int, rate: int
    ) -> tuple[Tensor, Tensor]:
        video = VideoDecoder(
            path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate", transforms=[Resize(size)]
        )
        end = float(video.metadata.end_stream_seconds or math.inf)
        times = [start + place / fps for place in range(count)]
        inside = [time for time in times if time < end]
        frames = video.get_frames_played_at(inside).data
        frames = frames[torch.arange(count) % len(frames)]
        sound = AudioDecoder(path, sample_rate=rate, num_channels=1)
        heard = sound.get_samples_played_in_range(start, start + samples / rate).data[0][:samples]
        return frames, torch.nn.functional.pad(heard, (0, samples - len(heard)))

    read.__doc__ = f"By torchcodec {torchcodec.__version__}."
    return read


def dali_refusal(path: Path) -> str | None:
    """What DALI's decoder for video streams says of a source file's picture on a CPU; None if it decodes it."""
    video = np.fromfile(path, np.uint8)
    try:
        ClipDecoder(1, 1, "vp9")([DecodeRequest(os.fspath(path), video, placeholder_sound(), 0, 8)])
    except UndecodableError as error:
        return str(error.reasons[0])
    return None


def versions() -> dict[str, Any]:
    """Of what decodes source files here."""
    found: dict[str, Any] = {"av": av.__version__, "libavcodec": ".".join(map(str, av.library_versions["libavcodec"]))}
    reader = torchcodec_reader()
    return found | {"torchcodec": reader if isinstance(reader, str) else str(reader.__doc__)}
