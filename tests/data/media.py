"""Small video files made by hand: every picture's time and every sample of the sound is the caller's."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

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


# Programs that measure themselves begin with this. The kernel's own maximum, ru_maxrss, begins with that of the process that
# started them.
PEAK = """
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
"""


def write_video(
    path: Path,
    pictures: Sequence[NDArray[np.uint8]] = (),
    times: Sequence[float] | None = None,
    *,
    fps: float = 25.0,
    sound: NDArray[np.int16] | None = None,
    rate: int = 16000,
    sound_start: float = 0.0,
    pause: tuple[float, float] | None = None,
    codecs: tuple[str, str] = ("ffv1", "pcm_s16le"),
    time_base: Fraction = Fraction(1, 12800),
    options: dict[str, str] | None = None,
    setup: Any = None,
) -> Path:
    """Write a file.

    Args:
        path: where; its suffix tells the container.
        pictures: [H, W, 3] uint8 each, all of one size.
        times: when each is shown, seconds; by default ``fps`` a second.
        fps: nominal frame rate.
        sound: [samples] int16, mono.
        rate: samples per second.
        sound_start: when the sound begins, seconds.
        pause: at this time of the sound, the time stamps jump by so many seconds.
        codecs: of the picture and of the sound; ffv1 with PCM is lossless.
        time_base: unit of the pictures' time stamps, seconds.
        options: of the container.
        setup: called with the video stream before anything is encoded.
    """
    packets: list[Any] = []
    shown = [k / fps for k in range(len(pictures))] if times is None else list(times)
    with av.open(str(path), "w", options=options or {}) as container:
        if len(pictures):
            video: Any = container.add_stream(codecs[0], rate=Fraction(fps).limit_denominator(1001))
            video.height, video.width = pictures[0].shape[:2]
            video.pix_fmt = "bgr0" if codecs[0] == "ffv1" else "yuv420p"
            video.codec_context.time_base = time_base
            if codecs[0] == "libx264":
                video.options = {"crf": "4", "preset": "ultrafast", "bf": "0"}
            if setup is not None:
                setup(video)
        if sound is not None:
            audio: Any = container.add_stream(codecs[1], rate=rate, layout="mono")
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            following = shown[number + 1] if number + 1 < len(shown) else shown[number] + 1 / fps
            frame.pts, frame.time_base = round(shown[number] / time_base), time_base
            frame.duration = round(following / time_base) - frame.pts
            packets += video.encode(frame)
        if len(pictures):
            packets += video.encode(None)
        if sound is not None:
            cut = len(sound) if pause is None else round(pause[0] * rate)
            for part, start in ((sound[:cut], sound_start), (sound[cut:], sound_start + (sum(pause) if pause else 0))):
                for begin in range(0, len(part), 1024):
                    packets += audio.encode(_sound_frame(audio, part[begin : begin + 1024], rate, round(start * rate) + begin))
            packets += audio.encode(None)
        for packet in sorted(packets, key=lambda packet: (packet.dts or 0) * packet.time_base):
            container.mux(packet)
    return path


def _sound_frame(stream: Any, piece: NDArray[np.int16], rate: int, place: int) -> Any:
    planar = stream.codec_context.format.name.startswith("flt")
    data = piece.astype(np.float32) / 32768 if planar else piece
    frame = av.AudioFrame.from_ndarray(data[None], format="fltp" if planar else "s16", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = rate, place, Fraction(1, rate)
    return frame
