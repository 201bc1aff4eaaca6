"""Pictures as shards get them, against rendered ones: the right instant, place, colour and shape."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.data.media import noise, stream_frames, write_video
from tests.data.truth import MATRIX_TAG, RANGE_TAG, psnr, scaled, scene, woven, yuv_frame
from tests.data.zoo import set_display_matrix
from xkd_fast.data.convert import Converted, ConvertTask, convert
from xkd_fast.data.decode import ClipDecoder, DecodeRequest
from xkd_fast.data.read_video import VideoReader
from xkd_fast.data.source_file import Skip
from xkd_fast.data.video_codecs import CODECS, CPU_CODECS

HEIGHT, WIDTH, SHORT = 192, 256, 48
SECOND = [scene(k / 25, HEIGHT, WIDTH) for k in range(25)]
INNER = (slice(2, -2), slice(2, -2))  # without the edges, where scalers differ in what they take to lie outside


def read(path: Path, fps: float = 25.0, short_side: int = SHORT) -> list[NDArray[np.uint8]]:
    return [picture for picture, frames in VideoReader(str(path), fps, short_side) for _ in range(frames)]


def options(**given: str) -> Callable[[Any], None]:
    def setup(stream: Any) -> None:
        stream.options = given

    return setup


def tagged(matrix: int, limits: int, **given: str) -> Callable[[Any], None]:
    def setup(stream: Any) -> None:
        stream.options = given
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, limits

    return setup


# ------------------------------------------------------------------------------------------------------------ place and time


LOSSLESS = {"qp": "0", "preset": "ultrafast"}


@pytest.mark.parametrize(
    ("suffix", "codec", "pix_fmt", "encoding", "least"),
    [
        ("mkv", "ffv1", "bgr0", {}, 55),
        ("mp4", "libx264", "yuv420p", LOSSLESS, 53),
        ("mp4", "libx264", "yuv444p", LOSSLESS, 54),
        ("mkv", "libx264", "yuv420p10le", {"crf": "4", "preset": "ultrafast"}, 51),
        ("mp4", "libx265", "yuv420p", {"x265-params": "lossless=1:log-level=none", "preset": "ultrafast"}, 53),
    ],
)
@pytest.mark.parametrize("short_side", [48, 110])
def test_frames_equal_what_was_rendered(
    tmp_path: Path, suffix: str, codec: str, pix_fmt: str, encoding: dict[str, str], least: float, short_side: int
) -> None:
    """Red if a frame is one off, shifted by half a pixel of the source, has channels swapped, or is scaled by another rule."""
    pictures = [np.rint(p).astype(np.uint8) if codec == "ffv1" else yuv_frame(p, pix_fmt, "601", "limited") for p in SECOND]
    path = write_video(tmp_path / f"video.{suffix}", pictures, codecs=(codec, ""), pix_fmt=pix_fmt, setup=options(**encoding))
    found = read(path, short_side=short_side)
    height, width = found[0].shape[:2]
    truth = [scaled(picture, height, width) for picture in SECOND]
    assert len(found) == 25
    assert min(psnr(f[INNER], t[INNER]) for f, t in zip(found, truth)) > least
    # what the bound tells apart
    frame, source = found[5], SECOND[5]
    half = (source + np.roll(source, 1, 1)) / 2
    for wrong in (SECOND[4], SECOND[6], source[..., ::-1], half, (source + np.roll(source, 1, 0)) / 2):
        assert psnr(frame[INNER], scaled(wrong, height, width)[INNER]) < least


def decoded(sample: Converted, codec: str) -> NDArray[np.uint8]:
    """All frames of a sample, as training decodes them; those of h264, which no CPU trains on, by PyAV."""
    video, audio = (np.frombuffer(data, np.uint8) for data in (sample.video, sample.audio))
    if codec not in CPU_CODECS:
        return stream_frames(video)
    (clip,) = ClipDecoder(batch_size=1, threads=1, codec=codec)([DecodeRequest("key", video, audio, 0, sample.frames)])
    return clip.frames.numpy()


# Each at nearly its best, so that what else goes wrong shows: a shift of half a pixel is below 38 dB.
QUALITY = {"mjpeg": 2, "mosaic": 2, "h264": 4, "vp9": 0, "yuv": 0}


@pytest.mark.parametrize("codec", CODECS)
def test_shards_hold_these_frames(tmp_path: Path, codec: str) -> None:
    """Red if encoding or decoding moves a frame, a pixel or a colour: JPEG at quality 2 costs 41 dB and more."""
    pictures = [yuv_frame(picture, "yuv420p", "601", "limited") for picture in SECOND]
    path = write_video(tmp_path / "video.mp4", pictures, sound=noise(1), codecs=("libx264", "aac"), setup=options(**LOSSLESS))
    sample = convert(ConvertTask(str(path), codec, 25.0, 96, 16000, 0.25, QUALITY[codec]))
    assert isinstance(sample, Converted)
    found = decoded(sample, codec)
    truth = [scaled(picture, 96, 128) for picture in SECOND]
    assert len(found) == 25
    assert min(psnr(f[INNER], t[INNER]) for f, t in zip(found, truth)) > 38
    half = [(t + np.roll(t, 1, 1)) / 2 for t in truth]
    assert max(psnr(f[INNER], t[INNER]) for f, t in zip(found, half)) < 38


@pytest.mark.parametrize(("container", "codec"), [("avi", "mpeg4"), ("avi", "libx264"), ("mkv", "mpeg4"), ("mp4", "libx264")])
def test_reordered_pictures_come_in_their_order(tmp_path: Path, container: str, codec: str) -> None:
    """Red if pictures come in the order in which they are stored: AVI has no time stamps, and some lie behind later ones."""

    def setup(stream: Any) -> None:
        stream.codec_context.max_b_frames = 2
        stream.options = {"bf": "2", "crf": "4"} if codec == "libx264" else {"bf": "2", "qmin": "1", "qmax": "2"}

    path = write_video(
        tmp_path / f"video.{container}",
        [yuv_frame(picture, "yuv420p", "601", "limited") for picture in SECOND],
        codecs=(codec, ""),
        setup=setup,
        time_base=Fraction(1, 25),
    )
    found = read(path)
    assert abs(len(found) - 25) <= 2
    truth = np.array([scaled(picture, SHORT, 64) for picture in SECOND])
    nearest = [int(np.argmax([psnr(frame, true) for true in truth])) for frame in found]
    assert nearest[-20:] == list(range(nearest[-20], nearest[-20] + 20))


# -------------------------------------------------------------------------------------------------------------------- colours


COLOURS = [
    (200, 30, 30),
    (30, 200, 30),
    (30, 30, 200),
    (0, 200, 200),
    (128, 128, 128),
    (255, 255, 255),
    (0, 0, 0),
    (230, 180, 150),
]
PATCHES = np.repeat(np.repeat(np.array(COLOURS, np.uint8).reshape(2, 4, 3), 32, 0), 32, 1)


def patches(picture: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The mean colours of the eight patches' middles: [8, 3]."""
    height, width = picture.shape[0] // 2, picture.shape[1] // 4
    cells = picture.reshape(2, height, 4, width, 3).swapaxes(1, 2)
    return cells[:, :, height // 4 : -height // 4, width // 4 : -width // 4].mean((2, 3)).reshape(8, 3)


def patch_video(path: Path, height: int, matrix: str, limits: str, pix_fmt: str, tags: tuple[int, int]) -> Path:
    picture = np.repeat(np.repeat(PATCHES, height // 64, 0), height // 64, 1)
    pictures = [yuv_frame(picture, pix_fmt, matrix, limits)] * 2
    setup = tagged(*tags, crf="1", preset="ultrafast")
    return write_video(path, pictures, fps=2, sound=noise(1), codecs=("libx264", "aac"), pix_fmt=pix_fmt, setup=setup)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize("limits", ["limited", "full"])
@pytest.mark.parametrize("matrix", ["601", "709", "2020"])
def test_tagged_colours_are_kept(tmp_path: Path, matrix: str, limits: str, pix_fmt: str) -> None:
    """Red if the file's matrix or range is not heeded: the wrong one is off by 10 to 40 grey levels."""
    path = patch_video(tmp_path / "video.mp4", 64, matrix, limits, pix_fmt, (MATRIX_TAG[matrix], RANGE_TAG[limits]))
    np.testing.assert_allclose(patches(read(path)[0]), COLOURS, atol=1.6)


@pytest.mark.parametrize(("height", "matrix"), [(64, "601"), (576, "601"), (640, "709"), (768, "709")])
@pytest.mark.parametrize("tag", [2, 3])
def test_untagged_colours_are_guessed_as_players_do(tmp_path: Path, height: int, matrix: str, tag: int) -> None:
    """Red if HD without tags (2; 3 means nothing) is not taken for BT.709, or SD not for BT.601, of limited range."""
    path = patch_video(tmp_path / "video.mp4", height, matrix, "limited", "yuv420p", (tag, 0))
    np.testing.assert_allclose(patches(read(path)[0]), COLOURS, atol=1.6)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("tags", [("601", "limited"), ("601", "full"), ("709", "limited"), ("709", "full")])
def test_shards_keep_colours(tmp_path: Path, tags: tuple[str, str], codec: str) -> None:
    """Red if the way through encoder and decoder shifts colours, or flat 255 becomes 253."""
    path = patch_video(tmp_path / "video.mp4", 128, *tags, "yuv444p", (MATRIX_TAG[tags[0]], RANGE_TAG[tags[1]]))
    sample = convert(ConvertTask(str(path), codec, 2.0, 64, 16000, 0.25, QUALITY[codec]))
    assert isinstance(sample, Converted)
    np.testing.assert_allclose(patches(decoded(sample, codec)[0]), COLOURS, atol=2.6)


def test_a_matrix_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    """Red if colours of YCgCo are converted by another matrix, or the file is only said to be unreadable."""
    path = patch_video(tmp_path / "video.mp4", 64, "601", "limited", "yuv444p", (8, 1))
    with pytest.raises(Skip) as caught:
        read(path)
    assert caught.value.skipped.reason == "unreadable" and "matrix 8 of ITU-T H.273" in caught.value.skipped.detail


def test_hdr_keeps_its_values(tmp_path: Path) -> None:
    """Red if PQ or HLG turn into something else than stated: their coded values, by the matrix of BT.2020."""

    def setup(stream: Any) -> None:
        tagged(MATRIX_TAG["2020"], 1, crf="1", preset="ultrafast")(stream)
        stream.codec_context.color_trc, stream.codec_context.color_primaries = transfer, 9

    for transfer in (16, 18):
        pictures = [yuv_frame(PATCHES, "yuv420p10le", "2020", "limited")] * 2
        path = write_video(tmp_path / "video.mp4", pictures, fps=2, codecs=("libx264", ""), pix_fmt="yuv420p10le", setup=setup)
        with av.open(str(path)) as container:
            assert next(container.decode(video=0)).color_trc == transfer
        np.testing.assert_allclose(patches(read(path, 2.0)[0]), COLOURS, atol=1.6)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix"), [("png", "rgba", "mov"), ("qtrle", "argb", "mov"), ("ffv1", "bgra", "mkv")]
)
def test_what_is_transparent_is_black(tmp_path: Path, codec: str, pix_fmt: str, suffix: str) -> None:
    """Red if pixels that nobody was to see appear, such as the white under a transparent background."""
    picture = np.full((48, 64, 4), 255, np.uint8)
    picture[:, 32:, 3] = 0
    picture[24:, :32, :3] = (200, 100, 50)
    picture[24:, :32, 3] = 128
    frame = av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format=pix_fmt)
    path = write_video(tmp_path / f"video.{suffix}", [frame] * 2, fps=2, codecs=(codec, ""), pix_fmt=pix_fmt)
    found = read(path, 2.0, 24)[0]
    assert found[3:9, 3:12].min() == 255 and found[:, 20:].max() == 0
    np.testing.assert_allclose(found[15:21, 3:12].mean((0, 1)), np.array([200, 100, 50]) * 128 / 255, atol=1)


# ---------------------------------------------------------------------------------------------------------------------- shape


@pytest.mark.parametrize("first", ["upper", "lower"])
@pytest.mark.parametrize("codec", ["mpeg2video", "libx264"])
def test_fields_are_not_mixed(tmp_path: Path, codec: str, first: str) -> None:
    """Red if an interlaced picture comes out combed or doubled: its two fields are 20 ms apart."""

    def setup(stream: Any) -> None:
        if codec == "libx264":
            stream.options = {"crf": "4", "x264-params": "tff=1" if first == "upper" else "bff=1"}
        else:
            stream.options = {"flags": "+ilme+ildct", "qmin": "1", "qmax": "2"}

    pictures = []
    for number in range(12):
        upper, lower = (number / 25 + (0.02 if late else 0) for late in (first == "lower", first == "upper"))
        fields = (scene(upper, HEIGHT, WIDTH)[0::2], scene(lower, HEIGHT, WIDTH)[1::2])
        pictures.append(woven(*(yuv_frame(field, "yuv420p", "601", "limited") for field in fields), first))
    path = write_video(
        tmp_path / "video.ts", pictures, codecs=(codec, ""), setup=setup, time_base=Fraction(1, 25), pix_fmt="yuv420p"
    )
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    found = read(path)
    assert len(found) == 12
    for number, frame in enumerate(found):
        assert psnr(frame[INNER], scaled(scene(number / 25, HEIGHT, WIDTH), SHORT, 64)[INNER]) > 30


MATRICES = {
    "upright": (1, 0, 0, 1),
    "clockwise": (0, 1, -1, 0),
    "half": (-1, 0, 0, -1),
    "anticlockwise": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "mirrored, clockwise": (0, 1, 1, 0),
    "mirrored, anticlockwise": (0, -1, -1, 0),
}


@pytest.mark.parametrize("name", MATRICES)
def test_pictures_stand_upright(tmp_path: Path, name: str) -> None:
    """Red if a turned or mirrored picture is left so, or is turned the other way: a mirror read as an angle is a half turn."""
    a, b, c, d = MATRICES[name]
    stored = scene(0, HEIGHT, WIDTH)
    path = write_video(
        tmp_path / "video.mp4", [yuv_frame(stored, "yuv420p", "601", "limited")] * 2, fps=2, codecs=("libx264", "")
    )
    set_display_matrix(path, (a, b, c, d))
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    right, down = a * x + c * y, b * x + d * y
    expected = np.zeros((np.ptp(down) + 1, np.ptp(right) + 1, 3))
    expected[down - down.min(), right - right.min()] = stored
    found = read(path, 2.0)[0]
    assert found.shape[:2] == ((64, 48) if a == 0 else (48, 64))
    assert psnr(found[INNER], scaled(expected, *found.shape[:2])[INNER]) > 40


def test_jpegs_that_tell_how_they_were_held(tmp_path: Path) -> None:
    """Red if EXIF in the frames, of which PyAV knows no number, makes a film unreadable, or is not heeded."""
    orientation = b"II*\0\x08\0\0\0\x01\0" + b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + b"\0\0\0\0"  # 6: turn it clockwise
    segment = b"Exif\0\0" + orientation
    stored = scene(0, HEIGHT, WIDTH)
    frame = yuv_frame(stored, "yuvj444p", "601", "full")
    path = tmp_path / "video.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mjpeg", rate=2)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj444p"
        stream.codec_context.qmin = stream.codec_context.qmax = 1
        for number in range(2):
            frame.pts, frame.time_base = number, Fraction(1, 2)
            (packet,) = stream.encode(frame)
            data = bytes(packet)
            held = av.Packet(data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:])
            held.stream, held.pts, held.dts, held.time_base = stream, packet.pts, packet.dts, packet.time_base
            held.is_keyframe = True
            container.mux(held)
    found = read(path, 2.0)[0]
    assert found.shape[:2] == (64, 48)
    assert psnr(found[INNER], scaled(np.rot90(stored, -1), 64, 48)[INNER]) > 38
