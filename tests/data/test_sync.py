"""Clap and flash: what is seen and heard at the same instant of a source is so in the shards, to within a frame."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from tests.data.media import decoded_flac, stream_frames, write_video
from xkd_fast.data.decode import ClipDecoder, DecodeRequest
from xkd_fast.data.prepare import PrepareOptions, prepare
from xkd_fast.data.shards import ShardSet
from xkd_fast.data.video_codecs import CPU_CODECS

RATE = 16000
FLASH = 0.2  # seconds that a flash lasts at least
CLICK = 0.01  # seconds that a click lasts
SECONDS = 3.0
UNIT = Fraction(1, 60000)  # of the pictures' time stamps, seconds


@dataclass(frozen=True)
class Clip:
    """A source of clap-and-flash."""

    name: str
    shown: tuple[float, ...]  # when each picture is shown after the first, seconds
    sound_start: float  # of the sound after the first picture, seconds
    codecs: tuple[str, str]
    rate: int
    early: float = 0.0  # so much of both comes before the file's time 0 and is not to be shown, seconds

    @property
    def events(self) -> list[float]:
        """When it flashes and claps: at the pictures next to these times."""
        return [min(self.shown, key=lambda time: abs(time - near)) for near in (0.55, 1.3, 2.2)]

    @property
    def cut(self) -> float:
        """What is not shown of the pictures, seconds."""
        return max(0.0, self.early - max(0.0, -self.sound_start))


def constant(fps: float) -> tuple[float, ...]:
    return tuple(k / fps for k in range(round(SECONDS * fps)))


VARIABLE = tuple(float(time) for time in np.cumsum(np.random.default_rng(7).integers(17, 250, 22)) / 1000)
VARIABLE = tuple(time - VARIABLE[0] for time in VARIABLE)
RATES = {
    "5": constant(5),
    "23.976": constant(24000 / 1001),
    "25": constant(25),
    "30": constant(30),
    "60": constant(60),
    "variable": VARIABLE,
}
KINDS = [
    ("mkv", ("ffv1", "pcm_s16le"), 44100),
    ("mp4", ("libx264", "aac"), 48000),
    ("mov", ("libx264", "pcm_s16le"), 8000),
    ("mkv", ("libx264", "flac"), 96000),
    ("webm", ("libvpx", "libopus"), 48000),
    ("ts", ("libx264", "aac"), 44100),
    ("mp4", ("libx264", "aac"), 22050),
]
STARTS = (0.0, 0.73, -0.61)
CLIPS = [
    Clip(f"{fps} from {start} at {rate}.{suffix}", RATES[fps], start, codecs, rate)
    for row, fps in enumerate(RATES)
    for column, start in enumerate(STARTS)
    for suffix, codecs, rate in (KINDS[(row + column) % len(KINDS)], KINDS[(row + column + 3) % len(KINDS)])
]
# MP4 and MOV tell by an edit list that the beginning of what they hold is not to be shown: 13 pictures, or 8.
CLIPS += [
    Clip(f"edited {k}.{suffix}", RATES["25"], start, codecs, rate, early=0.52)
    for k, (start, (suffix, codecs, rate)) in enumerate((s, kind) for s in (0.0, -0.2) for kind in (KINDS[1], KINDS[2]))
]


def write(folder: Path, clip: Clip) -> None:
    lit = [any(event <= time < event + FLASH for event in clip.events) for time in clip.shown]
    lit = [now or any(time == event for event in clip.events) for now, time in zip(lit, clip.shown)]
    pictures = [np.full((48, 64, 3), 235 if on else 20, np.uint8) for on in lit]
    lead = max(0.0, -clip.sound_start) - clip.early  # where the sound is to come first, the picture comes later
    write_video(
        folder / clip.name,
        pictures,
        [lead + time for time in clip.shown],
        fps=1 / (clip.shown[-1] - clip.shown[-2]),
        sound=clicks([event - clip.sound_start for event in clip.events], SECONDS - clip.sound_start, clip.rate),
        rate=clip.rate,
        sound_start=lead + clip.sound_start,
        codecs=clip.codecs,
        time_base=UNIT,
    )


def clicks(times: Sequence[float], seconds: float, rate: int) -> NDArray[np.int16]:
    """Silence with a burst of noise at each of ``times``: [samples] int16."""
    sound = np.zeros(round(seconds * rate), np.int16)
    for time in times:
        if time >= 0:
            start = round(time * rate)
            burst = np.random.default_rng(0).choice([-20000, 20000], round(CLICK * rate))
            sound[start : start + len(burst)] = burst[: len(sound) - start]
    return sound


def onsets(loud: NDArray[Any], per_second: float) -> NDArray[np.float64]:
    """When something sets in, seconds, that was not there in the 0.1 s before."""
    times = np.flatnonzero(loud) / per_second
    return times[np.diff(times, prepend=-1.0) > max(0.1, 1.5 / per_second)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for clip in CLIPS:
        write(folder, clip)
    return folder


@pytest.fixture(scope="module", params=[(25.0, "auto"), (8.0, "auto"), (25.0, "h264"), (8.0, "mjpeg")], ids=str)
def prepared(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Frames a second of the shards, and every sample as training decodes it: name → frames, waveform."""
    destination = tmp_path_factory.mktemp("shards")
    fps, codec = request.param
    options = PrepareOptions(codec=codec, fps=fps, short_side=16, workers=2)
    prepare(folder, destination, options, console=Console(file=io.StringIO()))
    shards, decoded = ShardSet.open(destination), {}
    on_cpu = shards.codec in CPU_CODECS
    decoder = ClipDecoder(batch_size=1, threads=1, codec=shards.codec) if on_cpu else None
    for index in range(len(shards)):
        sample = shards.read(index)
        if decoder is None:
            found = stream_frames(sample.video), decoded_flac(sample.audio) / 32768
        else:
            (clip,) = decoder([DecodeRequest(sample.key, sample.video, sample.audio, 0, int(shards.frames[index]))])
            found = clip.frames.numpy(), clip.waveform.numpy()
        decoded[shards.details(index)["source"]] = found
    return {"fps": fps, **decoded}


@pytest.mark.parametrize("clip", CLIPS, ids=[clip.name for clip in CLIPS])
def test_claps_are_heard_when_flashes_are_seen(prepared: dict[str, Any], clip: Clip) -> None:
    """Red if picture or sound is a frame off its true time or off the other, or if one of them is longer."""
    fps, (frames, waveform) = prepared["fps"], prepared[clip.name]
    seen = onsets(frames.mean((1, 2, 3)) > 128, fps)
    heard = onsets(np.abs(waveform) > 0.15, RATE)
    events = [event - clip.cut for event in clip.events]
    audible = [event for event in events if event >= clip.sound_start]
    assert len(seen) == len(events) and len(heard) == len(audible)
    for flash, event in zip(seen, events):
        assert -1e-3 <= flash - event < 1 / fps, "a frame shows what was last to be seen at its instant"
    np.testing.assert_allclose(heard, audible, atol=0.003)
    for clap, event in zip(heard, audible):
        assert abs(clap - seen[events.index(event)]) < 1 / fps
    assert len(waveform) == round(len(frames) / fps * RATE)
    last = clip.shown[-1] - clip.shown[-2]  # how long the last picture stands; MPEG-TS does not tell
    assert abs(len(frames) / fps - (clip.shown[-1] + last - clip.cut)) <= 1 / fps + (last if clip.name.endswith(".ts") else 0)
