"""Small video files made by hand: every picture's time and every sample of the sound is the caller's."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from numpy.typing import NDArray

from xkd_fast.data.read_video import SCALING

GREY_STEP, GREY_FIRST = 4, 20  # grey levels apart, and of picture 0


def numbered(number: int, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A grey picture whose level tells its number, 0-58."""
    return np.full((height, width, 3), GREY_FIRST + GREY_STEP * number, np.uint8)


def number_of(picture: NDArray[np.uint8]) -> int:
    """The number of a :func:`numbered` picture, after whatever coding it went through."""
    return round((float(picture.mean()) - GREY_FIRST) / GREY_STEP)


def noise(seconds: float, rate: int = 16000, seed: int = 0) -> NDArray[np.int16]:
    """White noise [samples] int16, nowhere silent."""
    return np.random.default_rng(seed).integers(1, 8000, round(seconds * rate)).astype(np.int16)


def bursts(times: Sequence[float], seconds: float, rate: int) -> NDArray[np.int16]:
    """Silence with 50 ms of noise at each of ``times``: [samples] int16."""
    sound = np.zeros(round(seconds * rate), np.int16)
    for time in times:
        start = round(time * rate)
        piece = np.random.default_rng(start).integers(-16000, 16000, rate // 20)
        sound[start : start + len(piece)] = piece[: len(sound) - start]
    return sound


def burst_times(waveform: NDArray[Any], rate: int) -> NDArray[np.float64]:
    """When the bursts of a sound in [-1, 1] begin, seconds; bursts are more than 0.1 s apart."""
    loud = np.flatnonzero(np.abs(np.asarray(waveform, np.float64)) > 0.15) / rate
    return loud[np.diff(loud, prepend=-1.0) > 0.1]


def decoded_flac(data: Any) -> NDArray[np.int16]:
    """All samples of a FLAC file in memory."""
    with av.open(io.BytesIO(data)) as container:
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])


def stream_frames(data: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """All frames [T, H, W, 3] of a video stream in memory, by the matrix and range that it tells: what DALI leaves to GPUs."""
    with av.open(io.BytesIO(bytes(data))) as container:
        frames = [
            frame.reformat(
                format="rgb24",
                src_colorspace=int(frame.colorspace),
                src_color_range=int(frame.color_range),
                interpolation=SCALING,
            ).to_ndarray()
            for frame in container.decode(video=0)
        ]
    return np.stack(frames)


# Programs that measure themselves begin with this. The kernel's own maximum, ru_maxrss, begins with that of the process that
# started them.
PEAK = """
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
"""


@dataclass(frozen=True)
class Sound:
    """A sound track."""

    samples: NDArray[Any]  # [samples] or [channels, samples]; int16, or float32 in [-1, 1]
    rate: int = 16000
    layout: str = "mono"
    codec: str = "pcm_s16le"
    start: float = 0.0  # seconds
    pause: tuple[float, float] | None = None  # at this time of the sound, the time stamps jump by so many seconds
    default: bool | None = None  # whether it is marked as the one to play; None = as the container has it


def write_video(
    path: Path,
    pictures: Sequence[Any] = (),
    times: Sequence[float] | None = None,
    *,
    fps: float = 25.0,
    sound: NDArray[np.int16] | None = None,
    rate: int = 16000,
    sound_start: float = 0.0,
    pause: tuple[float, float] | None = None,
    sounds: Sequence[Sound] = (),
    codecs: tuple[str, str] = ("ffv1", "pcm_s16le"),
    pix_fmt: str | None = None,
    time_base: Fraction = Fraction(1, 12800),
    options: dict[str, str] | None = None,
    setup: Any = None,
    file: Any = None,
    form: str | None = None,
) -> Path:
    """Write a file.

    Args:
        path: where; its suffix tells the container.
        pictures: [H, W, 3] uint8 each, all of one size, or frames of PyAV in ``pix_fmt``.
        times: when each is shown, seconds; by default ``fps`` a second.
        fps: nominal frame rate.
        sound: [samples] int16, mono, with the ``rate``, ``sound_start`` and ``pause`` of a :class:`Sound`.
        sounds: further tracks.
        codecs: of the picture and of ``sound``; ffv1 with PCM is lossless.
        pix_fmt: of the coded pictures.
        time_base: unit of the pictures' time stamps, seconds.
        options: of the container.
        setup: called with the video stream before anything is encoded.
        file: written to instead of the path.
        form: container, if not as the path's suffix says.
    """
    packets: list[Any] = []
    shown = [k / fps for k in range(len(pictures))] if times is None else list(times)
    own = [] if sound is None else [Sound(sound, rate, codec=codecs[1], start=sound_start, pause=pause)]
    with av.open(file or str(path), "w", format=form, options=options or {}) as container:
        if len(pictures):
            first = pictures[0]
            video: Any = container.add_stream(codecs[0], rate=Fraction(fps).limit_denominator(1001))
            video.height, video.width = first.shape[:2] if isinstance(first, np.ndarray) else (first.height, first.width)
            video.pix_fmt = pix_fmt or ("bgr0" if codecs[0] == "ffv1" else "yuv420p")
            video.codec_context.time_base = time_base
            if codecs[0] == "libx264":
                video.options = {"crf": "4", "preset": "ultrafast", "bf": "0"}
            if setup is not None:
                setup(video)
        tracks = [(track, _sound_stream(container, track)) for track in (*own, *sounds)]
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24") if isinstance(picture, np.ndarray) else picture
            following = shown[number + 1] if number + 1 < len(shown) else shown[number] + 1 / fps
            frame.pts, frame.time_base = round(shown[number] / time_base), time_base
            frame.duration = round(following / time_base) - frame.pts
            packets += video.encode(frame)
        if len(pictures):
            packets += video.encode(None)
        for track, audio in tracks:
            packets += _sound_packets(track, audio)
        for packet in sorted(packets, key=lambda packet: (packet.dts or 0) * packet.time_base):
            container.mux(packet)
    return path


def _sound_stream(container: Any, track: Sound) -> Any:
    stream = container.add_stream(track.codec, rate=track.rate, layout=track.layout)
    if track.default is not None:
        stream.disposition = Disposition.default if track.default else Disposition(0)
    return stream


def _sound_packets(track: Sound, stream: Any) -> list[Any]:
    packets: list[Any] = []
    samples = np.atleast_2d(track.samples)
    cut = samples.shape[1] if track.pause is None else round(track.pause[0] * track.rate)
    later = track.start + (sum(track.pause) if track.pause else 0)
    for part, start in ((samples[:, :cut], track.start), (samples[:, cut:], later)):
        for begin in range(0, part.shape[1], 1024):
            piece = part[:, begin : begin + 1024]
            packets += stream.encode(_sound_frame(stream, piece, track, round(start * track.rate) + begin))
    return packets + stream.encode(None)


def _sound_frame(stream: Any, piece: NDArray[Any], track: Sound, place: int) -> Any:
    if piece.dtype == np.int16 and stream.codec_context.format.name.startswith("flt"):
        piece = piece.astype(np.float32) / 32768
    form = "s16" if piece.dtype == np.int16 else "flt"
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece.T).reshape(1, -1), format=form, layout=track.layout)
    frame.sample_rate, frame.pts, frame.time_base = track.rate, place, Fraction(1, track.rate)
    return frame
