"""Clips straight from source files, as one decodes them without shards: by PyAV, by torchcodec, by DALI on a GPU."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.audio.resampler import AudioResampler
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from xkd_fast.data.dali import HandFed, encoded_input, placed
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


class DaliFiles:
    """Batches of clips by DALI: pictures by its decoder for video streams, resized where they are, and sound by PyAV meanwhile.

    DALI reads no AAC. Frame rates and numbers of frames are looked up once, before anything is timed.

    Args:
        paths: files of a constant frame rate that begin at 0 seconds.
        size: height and width of the frames.
        count: frames of a clip.
        fps: of the clip's frames.
        samples: of the clip's sound.
        rate: of the sound, Hz.
        batch_size: clips of a call, at most.
        threads: that decode sound; and videos, of which a GPU decodes as many at the same time.
        device: where pictures are decoded.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: tuple[int, int],
        count: int,
        fps: float,
        samples: int,
        rate: int,
        batch_size: int,
        threads: int,
        device: torch.device,
    ) -> None:
        self._size, self._count, self._fps, self._samples, self._rate = size, count, fps, samples, rate
        self._device, self._pool = device, ThreadPoolExecutor(threads)
        self._timing = {path: _rate_and_frames(path) for path in paths}
        self._pipeline = HandFed(self._outputs, batch_size, threads, device)

    def _outputs(self) -> list[Any]:
        from nvidia.dali import fn, types

        numbers = fn.external_source(name="numbers", ndim=1, dtype=types.DALIDataType.INT32)
        video = fn.decoders.video(encoded_input("video"), frames=numbers, **placed(self._device))
        return [fn.resize(video, size=self._size, device="cpu" if self._device.type == "cpu" else "gpu")]

    def __call__(self, paths: Sequence[Path], starts: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        """Frames [T, H, W, 3] uint8 where they were decoded, and sound [samples] float32 in the host's memory, of each clip.

        Work on frames belongs on the caller's current stream, and they must be kept until it is done.

        Raises:
            RuntimeError: DALI cannot decode one of them.
        """
        heard = [self._pool.submit(pyav_sound, *clip, self._samples, self._rate) for clip in zip(paths, starts, strict=True)]
        chosen = [
            frame_numbers(*self._timing[path], start, self._count, self._fps) for path, start in zip(paths, starts, strict=True)
        ]
        videos = list(self._pool.map(lambda path: np.fromfile(path, np.uint8), paths))
        (frames,) = self._pipeline({"video": videos, "numbers": chosen})
        return [(seen, torch.from_numpy(sound.result())) for seen, sound in zip(frames, heard, strict=True)]

    def close(self) -> None:
        """End its threads."""
        self._pool.shutdown()


def _rate_and_frames(path: Path) -> tuple[float, int]:
    # frames a second and their number; where the header does not say that, as in WebM, by reading all packets
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        return float(stream.average_rate or 25), frames


def frame_numbers(rate: float, frames: int, start: float, count: int, fps: float) -> NDArray[np.int32]:
    """Which of ``frames`` frames, ``rate`` a second, `pyav_frames` takes: [count]; from the first again where they end."""
    wanted = np.ceil((start + np.arange(count) / fps) * rate - 0.5).clip(0).astype(np.int32)
    inside = wanted[wanted < frames]
    return inside[np.arange(count) % len(inside)]


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
