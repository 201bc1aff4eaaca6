"""One source into one sample: what is seen and heard at an instant, sizes, colours, and what is skipped for which reason."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import Colorspace
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.data.media import PEAK, Sound, burst_times, bursts, noise, number_of, numbered, write_video
from tests.data.zoo import overwrite_sound, set_display_matrix
from xkd_fast.data.convert import Converted, ConvertTask, Skipped, convert
from xkd_fast.data.decode import ClipDecoder, DecodeRequest
from xkd_fast.data.encode import encode_flac, encode_video
from xkd_fast.data.probe import ProbeTask, probe
from xkd_fast.data.read_video import target_size

RATE = 16000
H264 = ("libx264", "aac")


def run(path: Path, **changed: Any) -> Converted | Skipped:
    usual = {"codec": "mjpeg", "fps": 8.0, "short_side": 48, "sample_rate": RATE, "min_seconds": 0.25, "quality": 2}
    return convert(ConvertTask(str(path), **{**usual, **changed}))


def converted(path: Path, **changed: Any) -> Converted:
    result = run(path, **changed)
    assert isinstance(result, Converted), result
    return result


@pytest.fixture(scope="module")
def dali() -> ClipDecoder:
    return ClipDecoder(batch_size=1, threads=1)


def decode(dali: ClipDecoder, sample: Converted) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """All frames and the sound, as training decodes them."""
    video, audio = (np.frombuffer(data, np.uint8) for data in (sample.video, sample.audio))
    (clip,) = dali([DecodeRequest("key", video, audio, 0, sample.frames)])
    return clip.frames.numpy(), clip.waveform.numpy()


def numbers(dali: ClipDecoder, sample: Converted) -> list[int]:
    return [number_of(picture) for picture in decode(dali, sample)[0]]


def shown_at(times_ms: list[int], length_ms: float, fps: int) -> list[int]:
    """Which picture is to be seen at k / fps, in whole milliseconds so that nothing is rounded."""
    count = round(length_ms * fps / 1000)
    return [max(n for n, time in enumerate(times_ms) if (time - times_ms[0]) * fps <= k * 1000) for k in range(count)]


# ------------------------------------------------------------------------------------------------------------- frame times


VARIABLE = [int(time) for time in np.cumsum(np.random.default_rng(3).integers(17, 250, 22))]


@pytest.mark.parametrize("container", ["mkv", "mp4", "mov"])
@pytest.mark.parametrize(
    ("times_ms", "last_ms"),
    [
        ([40 * k for k in range(50)], 40),  # 25 frames/s
        ([200 * k for k in range(12)], 200),  # 5: each is shown several times
        (VARIABLE, 40),
        ([5000 + time for time in VARIABLE], 40),  # the first time stamp is not zero
        ([0, 40, 80, 1500, 1540], 40),  # a still
    ],
    ids=["25", "5", "variable", "late", "still"],
)
def test_a_frame_shows_what_is_seen_at_its_instant(
    tmp_path: Path, dali: ClipDecoder, container: str, times_ms: list[int], last_ms: int
) -> None:
    """Would catch frames taken by their count, by the nominal rate or to the nearest, and a first time stamp left in."""
    path = write_video(
        tmp_path / f"video.{container}",
        [numbered(k) for k in range(len(times_ms))],
        [time / 1000 for time in times_ms],
        fps=1000 / last_ms,
        sound=noise(times_ms[-1] / 1000 + 0.2),
        sound_start=times_ms[0] / 1000,
        codecs=("ffv1", "pcm_s16le") if container == "mkv" else ("libx264", "pcm_s16le" if container == "mov" else "aac"),
        time_base=Fraction(1, 1000),
    )
    sample = converted(path)
    assert numbers(dali, sample) == shown_at(times_ms, times_ms[-1] - times_ms[0] + last_ms, 8)
    assert sample.samples == sample.frames * RATE // 8


def test_time_stamps_rounded_to_milliseconds_move_no_frame(tmp_path: Path, dali: ClipDecoder) -> None:
    """Would catch frame 4 of 24 a second, at 167 ms in Matroska, missing the instant 1/6 s: a whole frame late."""
    pictures = [numbered(k) for k in range(48)]
    sample = converted(write_video(tmp_path / "video.mkv", pictures, fps=24, sound=noise(2)), fps=6.0)
    assert numbers(dali, sample) == list(range(0, 48, 4))


def test_frames_that_go_back_in_time_are_left_out(tmp_path: Path, dali: ClipDecoder) -> None:
    """Would catch a splice of two recordings that overlap stretching the film, or showing pictures at others' places."""
    path = splice(tmp_path, (1.0, 1.52), (16000, 16000))
    frames, waveform = decode(dali, converted(path, fps=25.0))
    assert [number_of(picture) for picture in frames] == [*range(25), *range(37, 50)]
    np.testing.assert_allclose(burst_times(waveform, RATE), [0.3, 0.7, 1.22], atol=0.1)


def test_absurd_time_stamps_do_not_make_a_film_of_hours(tmp_path: Path) -> None:
    """Would catch one frame a day later filling memory with 700 000 copies of the picture before."""
    times = [k / 10 for k in range(9)] + [86400.0]
    skipped = run(write_video(tmp_path / "video.mkv", [numbered(k) for k in range(10)], times, sound=noise(1)))
    assert (
        isinstance(skipped, Skipped) and skipped.reason == "unreadable" and "one picture stands for 86399 s" in skipped.detail
    )


# ------------------------------------------------------------------------------------------------------- picture and sound


@pytest.mark.parametrize(
    ("container", "codecs", "rate"),
    [
        ("mkv", ("ffv1", "pcm_s16le"), 44100),
        ("mkv", ("libx264", "flac"), 16000),
        ("mp4", ("libx264", "aac"), 44100),
        ("webm", ("libvpx", "libopus"), 48000),
        ("ts", ("libx264", "aac"), 48000),
        ("mov", ("libx264", "pcm_s16le"), 22050),
    ],
)
@pytest.mark.parametrize("start", [0.0, 0.7, -0.6])
def test_sound_keeps_its_place_under_the_picture(
    tmp_path: Path, dali: ClipDecoder, container: str, codecs: tuple[str, str], rate: int, start: float
) -> None:
    """Would catch sound laid at 0 whatever its time stamps say, a wrong sign, and an encoder's delay left in (23 ms of AAC)."""
    seen = [0.52, 1.24, 1.88]  # seconds after the first picture
    pictures = [np.full((48, 64, 3), 255 * any(0 <= k / 25 - time < 0.12 for time in seen), np.uint8) for k in range(60)]
    lead = max(0.0, -start)  # the picture comes later where the sound is to come first
    path = write_video(
        tmp_path / f"video.{container}",
        pictures,
        [lead + k / 25 for k in range(60)],
        sound=bursts([time - start for time in seen if time > start], 2.4 - start, rate),
        rate=rate,
        sound_start=lead + start,
        codecs=codecs,
        time_base=Fraction(1, 1000),
    )
    sample = converted(path, fps=25.0)
    frames, waveform = decode(dali, sample)
    lit = np.flatnonzero(np.diff((frames.mean((1, 2, 3)) > 128).astype(int), prepend=0) == 1) / 25
    np.testing.assert_allclose(lit, seen, atol=1e-6)
    np.testing.assert_allclose(burst_times(waveform, RATE), [time for time in seen if time > start], atol=0.004)
    assert sample.audio_offset == pytest.approx(start, abs=0.07)  # AAC in MPEG-TS begins with its encoder's delay
    assert len(waveform) == sample.samples == round(60 / 25 * RATE)


@pytest.mark.parametrize("seconds", [0.5, 0.06])
def test_a_pause_in_the_sound_is_kept(tmp_path: Path, dali: ClipDecoder, seconds: float) -> None:
    """Would catch everything after missing sound coming early by as much: it was laid end to end."""
    pictures, sound = [numbered(k) for k in range(50)], bursts([0.1, 0.4, 0.8], 1.4, RATE)
    path = write_video(tmp_path / "video.mkv", pictures, sound=sound, pause=(0.6, seconds))
    np.testing.assert_allclose(burst_times(decode(dali, converted(path))[1], RATE), [0.1, 0.4, 0.8 + seconds], atol=0.002)


def test_jitter_of_the_sounds_time_stamps_tears_no_holes(tmp_path: Path, dali: ClipDecoder) -> None:
    """Would catch a hiccup of 30 ms in the time stamps heard as a gap: many containers have them."""
    sound = noise(1.5)
    path = write_video(tmp_path / "video.mkv", [numbered(k) for k in range(40)], sound=sound, pause=(0.7, 0.03))
    waveform = decode(dali, converted(path))[1]
    np.testing.assert_array_equal(waveform[: len(sound)] * 32768, sound)


def splice(folder: Path, starts: tuple[float, float], rates: tuple[int, int]) -> Path:
    """Two recordings of a second, end to end in one file, with their own time stamps: pictures 0-24 and 25-49."""
    data = b""
    for number, (start, rate) in enumerate(zip(starts, rates, strict=True)):
        pictures, times = [numbered(k + 25 * number) for k in range(25)], [start + k / 25 for k in range(25)]
        part = folder / f"part{number}.ts"
        write_video(part, pictures, times, sound=bursts([0.3, 0.7], 1, rate), rate=rate, sound_start=start, codecs=H264)
        data += part.read_bytes()
    (folder / "video.ts").write_bytes(data)
    return folder / "video.ts"


def test_sound_that_changes_its_form_in_mid_stream(tmp_path: Path, dali: ClipDecoder) -> None:
    """Would catch a recording thrown away because its sound turns from 44.1 to 48 kHz half-way."""
    frames, waveform = decode(dali, converted(splice(tmp_path, (1.0, 2.0), (44100, 48000))))
    np.testing.assert_allclose(burst_times(waveform, RATE), [0.3, 0.7, 1.3, 1.7], atol=0.06)
    assert len(frames) == 16


@pytest.mark.parametrize(("seconds", "heard"), [(0.5, 0.5), (3.0, 2.0)])
def test_sound_is_padded_and_cut_to_the_picture(tmp_path: Path, dali: ClipDecoder, seconds: float, heard: float) -> None:
    """Would catch a sample whose sound ends before its picture or goes on after it."""
    path = write_video(tmp_path / "video.mkv", [numbered(k) for k in range(50)], sound=noise(seconds))
    waveform = decode(dali, converted(path))[1]
    assert len(waveform) == 2 * RATE
    np.testing.assert_array_equal(waveform != 0, np.arange(2 * RATE) < heard * RATE)


def test_flac_holds_sound_of_its_own_rate_to_the_bit(tmp_path: Path, dali: ClipDecoder) -> None:
    """Would catch dither, a lossy step, lost last samples, and a resampler that DALI runs again."""
    sound = noise(2.0)
    sample = converted(write_video(tmp_path / "video.mkv", [numbered(k) for k in range(50)], sound=sound))
    np.testing.assert_array_equal(decode(dali, sample)[1] * 32768, sound)


@pytest.mark.parametrize("samples", [1, 15, 4096, 4097, 40000])
def test_flac_of_any_length(samples: int) -> None:
    """Would catch a last block that is lost or padded."""
    sound = np.random.default_rng(samples).integers(-32768, 32768, samples).astype(np.int16)
    with av.open(io.BytesIO(encode_flac(sound, 22050))) as container:
        blocks = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
        assert container.streams.audio[0].rate == 22050
    np.testing.assert_array_equal(np.concatenate(blocks), sound)


# ------------------------------------------------------------------------------------------------------- sizes and colours


@given(st.integers(2, 5000), st.integers(2, 5000), st.integers(8, 256).map(lambda half: 2 * half))
def test_target_size(width: int, height: int, short_side: int) -> None:
    """Would catch odd sizes, which 4:2:0 cannot hold, and a short side that is rounded away."""
    new_width, new_height = target_size(width, height, short_side)
    assert min(new_width, new_height) == short_side
    assert new_width % 2 == new_height % 2 == 0
    assert abs(max(new_width, new_height) - short_side * max(width, height) / min(width, height)) <= 1


@pytest.mark.parametrize(
    ("height", "width", "aspect", "expected"),
    [(50, 66, None, (48, 64)), (90, 160, None, (48, 86)), (160, 90, None, (86, 48)), (48, 64, Fraction(3, 2), (48, 96))],
    ids=["landscape", "wide", "portrait", "anamorphic"],
)
def test_the_short_side_and_the_aspect(
    tmp_path: Path, dali: ClipDecoder, height: int, width: int, aspect: Fraction | None, expected: tuple[int, int]
) -> None:
    """Would catch sides swapped, a stretched picture, and pixels that are not square taken for square."""

    def setup(stream: Any) -> None:
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect

    pictures = [numbered(k, height, width) for k in range(20)]
    path = write_video(tmp_path / "video.mp4", pictures, sound=noise(1), codecs=H264, setup=setup)
    sample = converted(path)
    assert (sample.height, sample.width) == expected
    assert decode(dali, sample)[0].shape == (sample.frames, *expected, 3)


def quadrants(height: int, width: int) -> NDArray[np.uint8]:
    """Red, green / blue, white: upper left, upper right / lower left, lower right."""
    picture = np.zeros((height, width, 3), np.uint8)
    top, left = height // 2, width // 2
    picture[:top, :left, 0] = picture[:top, left:, 1] = picture[top:, :left, 2] = 230
    picture[top:, left:] = 230
    return picture


def colour_names(picture: NDArray[np.uint8]) -> str:
    height, width, _ = picture.shape
    found = ""
    for row in (height // 4, 3 * height // 4):
        for column in (width // 4, 3 * width // 4):
            red, green, blue = picture[row, column] > 120
            found += {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w"}[int(red), int(green), int(blue)]
    return found


@pytest.mark.parametrize(
    ("matrix", "expected", "size"),
    [
        ((1, 0, 0, 1), "rgbw", (48, 64)),
        ((0, 1, -1, 0), "brwg", (64, 48)),  # shown a quarter turn clockwise
        ((-1, 0, 0, -1), "wbgr", (48, 64)),
        ((0, -1, 1, 0), "gwrb", (64, 48)),  # anticlockwise
    ],
    ids=["0", "90", "180", "270"],
)
def test_pictures_of_turned_cameras_stand_upright(
    tmp_path: Path, dali: ClipDecoder, matrix: tuple[int, int, int, int], expected: str, size: tuple[int, int]
) -> None:
    """Would catch rotation ignored, or turned the wrong way: a quarter of what telephones record."""
    path = write_video(tmp_path / "video.mp4", [quadrants(96, 128)] * 10, sound=noise(1), codecs=H264)
    set_display_matrix(path, matrix)
    sample = converted(path)
    assert (sample.height, sample.width) == size
    assert {colour_names(picture) for picture in decode(dali, sample)[0]} == {expected}


COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (128, 128, 128), (255, 255, 255), (0, 0, 0), (230, 180, 150)]


@pytest.mark.parametrize("matrix", ["601", "709"])
def test_colours_survive(tmp_path: Path, dali: ClipDecoder, matrix: str) -> None:
    """Would catch red and blue swapped, limited range taken for full, another matrix than the file's, and 255 turned to 251."""
    codes = {"601": (Colorspace.ITU601, 6), "709": (Colorspace.ITU709, 1)}
    space, tag = codes[matrix]
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("libx264", rate=8, options={"crf": "1", "bf": "0"})
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        video.codec_context.colorspace, video.codec_context.color_range = tag, 1
        audio: Any = container.add_stream("aac", rate=RATE, layout="mono")
        for number, colour in enumerate(COLOURS):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), colour, np.uint8), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=space, dst_color_range=1)
            frame.pts, frame.time_base = number, Fraction(1, 8)
            container.mux(video.encode(frame))
        block = av.AudioFrame.from_ndarray(noise(1)[None].astype(np.float32) / 32768, format="fltp", layout="mono")
        block.sample_rate, block.pts = RATE, 0
        container.mux(audio.encode(block))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    frames, _ = decode(dali, converted(path, quality=4, short_side=32))
    means = frames.reshape(len(COLOURS), -1, 3).mean(1)
    np.testing.assert_allclose(means, COLOURS, atol=4)
    grey = means[3:5]
    np.testing.assert_allclose(grey, grey.mean(1, keepdims=True).repeat(3, 1), atol=1.1, err_msg="grey has a cast")
    np.testing.assert_allclose(means[4], 255, atol=1)


def test_h264_has_a_key_frame_a_second_and_the_same_frames() -> None:
    """Would catch key frames so rare that a clip's start costs seconds of decoding, and frames lost to the encoder's delay."""
    pictures = [numbered(k) for k in range(32)]
    with av.open(io.BytesIO(encode_video(pictures, "h264", 8.0, 18))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate, stream.height, stream.width) == ("h264", 8, 48, 64)
        frames = list(container.decode(stream))
    assert [number_of(frame.to_ndarray(format="rgb24")) for frame in frames] == list(range(32))
    assert [float(frame.time) for frame in frames] == [k / 8 for k in range(32)]
    keys = [k for k, frame in enumerate(frames) if frame.key_frame]
    assert keys[0] == 0 and max(np.diff([*keys, 32])) <= 8


def test_jpegs_do_not_depend_on_the_number_of_processors() -> None:
    """Would catch restart markers: an encoder with threads writes them, and the files differ from machine to machine."""
    picture = np.random.default_rng(0).integers(0, 256, (96, 128, 3)).astype(np.uint8)
    encoded = encode_video([picture] * 3, "mjpeg", 8.0, 4)
    assert encoded == encode_video([picture] * 3, "mjpeg", 8.0, 4)
    assert b"\xff\xdd\x00\x04" not in encoded


LONG = f"""
import sys
from xkd_fast.data.convert import ConvertTask, convert
{PEAK}
def run(path):
    return convert(ConvertTask(path, "mjpeg", 25.0, 128, 16000, 0.25, 31))
run(sys.argv[1])
before = peak()
sample = run(sys.argv[2])
print(sample.frames, peak() - before, len(sample.video) + len(sample.audio))
"""


def test_a_long_video_is_never_in_memory_as_pictures(tmp_path: Path) -> None:
    """Red if frames wait for the sound before they are encoded: 2000 of them are 131 MB."""
    pictures = [numbered(k) for k in range(50)]
    short = write_video(tmp_path / "short.mp4", pictures, sound=noise(2), codecs=H264)
    long = write_video(tmp_path / "long.mp4", pictures * 40, sound=noise(80), codecs=H264)
    command = [sys.executable, "-c", LONG, str(short), str(long)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent.parent)
    frames, more, size = map(int, done.stdout.split())
    assert frames == 2000
    assert more < 25e6 + 2.5 * size, f"{more / 1e6:.0f} MB for {size / 1e6:.1f} MB"


# ------------------------------------------------------------------------------------------------------------ what is skipped


PICTURES = [numbered(k) for k in range(50)]


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def textured() -> list[NDArray[np.uint8]]:
    """Pictures that do not compress, so that most of a file is picture."""
    return [np.random.default_rng(k).integers(0, 256, (48, 64, 3)).astype(np.uint8) for k in range(75)]


def audio_with_a_cover(path: Path) -> Path:
    def setup(stream: Any) -> None:
        stream.pix_fmt = "yuvj420p"
        stream.disposition = Disposition.attached_pic

    return write_video(path, PICTURES[:1], sound=noise(2), codecs=("mjpeg", "aac"), setup=setup)


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("unreadable", lambda path: path.with_suffix(".mp4").write_text("no video, though it is called one\n" * 100)),
        ("unreadable", lambda path: path.with_suffix(".mp4").write_bytes(b"")),
        ("unreadable", lambda path: os.symlink("nowhere", path.with_suffix(".mp4"))),
        ("unreadable", lambda path: os.mkfifo(path.with_suffix(".mp4"))),
        ("unreadable", lambda path: cut(write_video(path.with_suffix(".mp4"), PICTURES, sound=noise(2), codecs=H264), 0.7)),
        ("truncated", lambda path: cut(write_video(path.with_suffix(".mkv"), textured(), sound=noise(3)), 0.5)),
        ("no_audio", lambda path: write_video(path.with_suffix(".mkv"), PICTURES)),
        ("no_video", lambda path: write_video(path.with_suffix(".m4a"), sound=noise(2), codecs=H264)),
        ("no_video", lambda path: audio_with_a_cover(path.with_suffix(".mp4"))),
        ("silent_audio", lambda path: write_video(path.with_suffix(".mkv"), PICTURES, sound=np.zeros(32000, np.int16))),
        ("silent_audio", lambda path: write_video(path.with_suffix(".mkv"), PICTURES[:20], sound=noise(1), sound_start=0.9)),
        ("too_short", lambda path: write_video(path.with_suffix(".mkv"), PICTURES[:5], sound=noise(2))),
        (
            "too_narrow",
            lambda path: write_video(path.with_suffix(".mkv"), [numbered(k, 16, 640) for k in range(25)], sound=noise(1)),
        ),
    ],
    ids=[
        "text", "empty", "broken link", "pipe", "no moov", "cut", "no sound", "sound alone", "cover", "silence", "sound after",
        "short", "narrow",
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_skipped_for_its_reason(tmp_path: Path, reason: str, make: Any) -> None:
    """Would catch an exception, or a wait, in place of a reason, and silence or half a film passed off as a sample."""
    make(tmp_path / "video")
    (path,) = tmp_path.iterdir()
    result = run(path)
    assert isinstance(result, Skipped) and result.reason == reason, result
    assert str(tmp_path) not in result.detail, "the words must not depend on where the file lies"


def test_a_film_that_starts_at_its_index_and_was_cut_is_no_sample(tmp_path: Path) -> None:
    """Would catch the first half of an interrupted download, which plays without an error, taken for the whole."""
    path = write_video(tmp_path / "video.mp4", textured(), sound=noise(3), codecs=H264, options={"movflags": "+faststart"})
    assert isinstance(run(path), Converted)
    result = run(cut(path, 0.5))
    assert isinstance(result, Skipped) and result.reason in ("truncated", "unreadable")


def test_a_part_whose_sound_outlasts_its_picture_is_whole(tmp_path: Path) -> None:
    """Red if the end of a part is looked for in the picture alone: as a whole the same file is taken."""
    path = write_video(tmp_path / "video.mkv", PICTURES[:25], sound=noise(6))
    assert converted(path).frames == converted(path, start=0.0, end=6.0).frames == 8


def test_sound_that_begins_late_is_whole(tmp_path: Path) -> None:
    """Red if the end that Matroska promises is taken for a length: 2 s of sound from the 10th on are not 12 s cut short."""
    path = write_video(tmp_path / "sound.mka", sounds=[Sound(noise(2), start=10.0)])
    assert converted(path, without_picture=True).samples == converted(path, without_picture=True, start=0.0).samples == 2 * RATE


def test_damage_is_told_by_stream_and_second(tmp_path: Path) -> None:
    """Red if three bad packets in an hour are only known to be somewhere, or audit and prepare tell them differently."""
    words = "InvalidDataError: Invalid data found when processing input, in the "
    path = write_video(
        tmp_path / "sound.ts",
        PICTURES * 5,
        sound=noise(10),
        codecs=H264,
        times=[3 + k / 25 for k in range(250)],
        sound_start=3.0,
    )
    result = run(overwrite_sound(path, 0.5))
    assert isinstance(result, Skipped) and result.reason == "unreadable"
    assert result.detail in [f"{words}sound after {time} s" for time in (5.0, 5.1, 5.2)]
    assert probe(ProbeTask(str(path), 8.0, RATE)).problem == result.detail
    codecs = ("png", "pcm_s16le")
    path = write_video(tmp_path / "picture.mov", textured(), sound=noise(3), codecs=codecs, pix_fmt="rgb24")
    data = bytearray(path.read_bytes())
    place = data.index(b"\x89PNG", len(data) // 2)
    data[place : place + 2000] = bytes(2000)
    path.write_bytes(data)
    result = run(path)
    assert isinstance(result, Skipped) and re.search(r"Error: .*, in the picture after 1\.[3-7] s$", result.detail), result


@pytest.mark.parametrize("name", ["http:x.mkv", "plain.mkv", "ö\n%03d.mkv", os.fsdecode(b"\xff\xfe.mkv")])
def test_any_file_name_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Would catch a relative name taken for a network address, a pattern taken for a series of pictures, and bad UTF-8."""
    os.rename(write_video(tmp_path / "video.mkv", PICTURES[:10], sound=noise(1)), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert isinstance(run(Path(name)), Converted)
