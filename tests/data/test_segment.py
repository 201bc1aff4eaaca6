"""Parts of files: exactly what is seen and heard between two instants, wherever key frames and the container's index lie."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.data.media import burst_times, bursts, noise, number_of, numbered, write_video
from xkd_fast.data.convert import Converted, ConvertTask, Skipped, convert
from xkd_fast.data.decode import ClipDecoder, DecodeRequest
from xkd_fast.data.segment import frames_from

FPS, RATE = 10, 16000
SECONDS = 5.6  # of every film: 56 numbered pictures
HEARD = [0.5, 1.7, 2.6, 3.4, 4.5]  # when bursts begin, seconds after the first picture


def film(path: Path, codecs: tuple[str, str], *, gop: int = 12, first: float = 0.0) -> Path:
    """Numbered pictures with bursts of sound, the first at time stamp ``first``."""

    def setup(stream: Any) -> None:
        stream.codec_context.gop_size = gop
        if codecs[0] in ("libvpx", "mpeg4"):  # whose usual rates blur one number into the next
            stream.codec_context.bit_rate = 8_000_000

    count = round(SECONDS * FPS)
    return write_video(
        path,
        [numbered(k) for k in range(count)],
        [first + k / FPS for k in range(count)],
        fps=FPS,
        sound=bursts(HEARD, SECONDS, 48000),
        rate=48000,
        sound_start=first,
        codecs=codecs,
        time_base=Fraction(1, 1000),
        setup=setup,
    )


def run(path: Path, start: float | None, end: float | None, **changed: Any) -> Converted | Skipped:
    usual = {"codec": "mjpeg", "fps": FPS, "short_side": 48, "sample_rate": RATE, "min_seconds": 0.25, "quality": 2}
    return convert(ConvertTask(str(path), **{**usual, **changed}, start=start, end=end))


@pytest.fixture(scope="module")
def dali() -> ClipDecoder:
    return ClipDecoder(batch_size=1, threads=1)


CONTAINERS = [
    ("mkv", ("ffv1", "pcm_s16le"), 0.0),
    ("mp4", ("libx264", "aac"), 0.0),
    ("mkv", ("libx264", "flac"), 0.0),
    ("webm", ("libvpx", "libopus"), 0.0),
    ("ts", ("libx264", "aac"), 3.0),  # time stamps that begin at 3 s, the sound's 21 ms earlier: a part counts from there
    ("mov", ("mpeg4", "pcm_s16le"), 0.0),
]


@pytest.mark.parametrize(("container", "codecs", "first"), CONTAINERS)
@pytest.mark.parametrize(("start", "end"), [(2.35, 4.05), (None, 1.18), (4.24, None), (0.05, 9.0), (3.35, 3.65)])
def test_a_part_shows_and_sounds_what_lies_in_it(
    tmp_path: Path,
    dali: ClipDecoder,
    container: str,
    codecs: tuple[str, str],
    first: float,
    start: float | None,
    end: float | None,
) -> None:
    """Red if a part begins at the next key frame, a frame early or late, or its sound elsewhere than its picture."""
    sample = run(film(tmp_path / f"film.{container}", codecs, first=first), start, end)
    assert isinstance(sample, Converted), sample
    video, audio = (np.frombuffer(data or b"", np.uint8) for data in (sample.video, sample.audio))
    (clip,) = dali([DecodeRequest("key", video, audio, 0, sample.frames)])
    begin, stop = start or 0.0, min(end or SECONDS, SECONDS)
    expected = [int((begin + k / FPS) * FPS + 1e-6) for k in range(round((stop - begin) * FPS))]
    shown = [number_of(picture) for picture in clip.frames.numpy()]
    assert shown == expected
    heard = [time - begin for time in HEARD if begin < time < stop - 0.03]
    np.testing.assert_allclose(burst_times(clip.waveform.numpy(), RATE), heard, atol=0.03)
    assert len(clip.waveform) == sample.samples == round(sample.frames / FPS * RATE)


def test_a_part_without_key_frames_is_decoded_from_the_last_one_before(tmp_path: Path, dali: ClipDecoder) -> None:
    """Red if a search that lands behind the start is taken: with one key frame in the film, nothing would be shown."""
    sample = run(film(tmp_path / "film.mp4", ("libx264", "aac"), gop=1000), 3.05, 4.05)
    assert isinstance(sample, Converted)
    (clip,) = dali(
        [DecodeRequest("key", *(np.frombuffer(data or b"", np.uint8) for data in (sample.video, sample.audio)), 0, 10)]
    )
    assert [number_of(picture) for picture in clip.frames.numpy()] == list(range(30, 40))


@pytest.mark.parametrize(("container", "codecs"), [("mp4", ("libx264", "aac")), ("mkv", ("ffv1", "pcm_s16le"))])
def test_only_what_is_needed_is_decoded(tmp_path: Path, container: str, codecs: tuple[str, str]) -> None:
    """Red if every part of an hour's film decodes it from its beginning."""
    with av.open(str(film(tmp_path / f"film.{container}", codecs))) as opened:
        times = [frame.time for frame in frames_from(opened, opened.streams.video[0], 4.05)]
    assert 2.6 < times[0] <= 4.05 and times[-1] == pytest.approx(5.5)


@pytest.mark.parametrize(
    ("start", "end", "reason"),
    [(7.0, 9.0, "too_short"), (5.5, 9.0, "too_short"), (2.0, 2.2, "too_short"), (2.7, 3.3, "silent_audio")],
)
def test_parts_that_hold_too_little_are_skipped(tmp_path: Path, start: float, end: float, reason: str) -> None:
    """Red if a part beyond the end gives the last picture, or silence within a film that is heard elsewhere passes."""
    result = run(film(tmp_path / "film.mkv", ("ffv1", "pcm_s16le")), start, end)
    assert isinstance(result, Skipped) and result.reason == reason, result


def test_a_part_of_a_file_that_was_cut_short(tmp_path: Path) -> None:
    """Red if a whole part is refused for what comes after it, or one that the cut goes through is taken."""
    pictures = [np.random.default_rng(k).integers(0, 256, (48, 64, 3)).astype(np.uint8) for k in range(60)]
    path = write_video(tmp_path / "film.mkv", pictures, fps=FPS, sound=noise(6.0))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert isinstance(run(path, 0.5, 2.0), Converted)
    result = run(path, 1.0, 5.5)
    assert isinstance(result, Skipped) and result.reason == "truncated", result
