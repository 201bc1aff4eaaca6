"""Frames into every codec and out again: the right ones, the right colours, the same bytes, in little memory."""

from __future__ import annotations

import hashlib
import io
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.data.media import PEAK, noise, number_of, numbered, stream_frames
from xkd_fast.data.decode import ClipDecoder, DecodeRequest, UndecodableError
from xkd_fast.data.encode import VideoEncoder, encode_flac, encode_video
from xkd_fast.data.packed import PackedError, mosaic_grid, pack_mosaic, parse_mosaic, parse_yuv
from xkd_fast.data.video_codecs import CODECS, CPU_CODECS, encoder_quality

SOUND = np.frombuffer(encode_flac(noise(0.5), 16000), np.uint8)


def scene(frames: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """A moving picture [T, H, W, 3]: coloured waves that drift, a disc that crosses them, some grey noise."""
    rng = np.random.default_rng(seed)
    y, x, time = np.mgrid[:height, :width, :frames].astype(np.float32)
    channels = []
    for _ in range(3):
        total = np.full(y.shape, 128, np.float32)
        for _ in range(4):
            along_y, along_x, drift, phase = *rng.uniform(-0.25, 0.25, 2), *rng.uniform(0, 0.3, 2)
            total += 22 * np.sin(along_y * y + along_x * x + drift * time + 20 * phase)
        channels.append(total)
    disc = (y - height / 2) ** 2 + (x - width * (0.2 + 0.6 * time / frames)) ** 2 < (height / 5) ** 2
    picture = np.stack(channels, -1)
    picture[disc] = (220, 180, 60)
    picture += rng.normal(0, 0.7, y.shape).astype(np.float32)[..., None]
    return np.ascontiguousarray(np.moveaxis(picture, 2, 0).clip(0, 255).astype(np.uint8))


def encoded(pictures: NDArray[np.uint8] | list[NDArray[np.uint8]], codec: str, quality: int | None = None) -> NDArray[np.uint8]:
    return np.frombuffer(encode_video(pictures, codec, 8.0, encoder_quality(codec, quality)), np.uint8)


def decoded(video: NDArray[np.uint8], codec: str, spans: list[tuple[int, int]]) -> list[NDArray[np.uint8]]:
    """The frames of each (first, number of frames), decoded in one batch as training does; those of h264 by PyAV."""
    if codec not in CPU_CODECS:
        return [stream_frames(video)[first : first + number] for first, number in spans]
    decoder = ClipDecoder(len(spans), 2, codec)
    return [clip.frames.numpy() for clip in decoder([DecodeRequest("key", video, SOUND, *span) for span in spans])]


def psnr(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio, decibels."""
    return float(10 * np.log10(255**2 / np.mean((found.astype(float) - expected) ** 2)))


# --------------------------------------------------------------------------------------------------------- frames and colours


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("height", "width"), [(48, 64), (36, 50)])
def test_the_frames_that_are_asked_for(codec: str, height: int, width: int) -> None:
    """Red if a decoder seeks to a key frame and not beyond, a tile is taken for another, or a JPEG's rows are miscounted."""
    frames = 53  # 8 a second: neither whole groups of pictures nor whole mosaics
    video = encoded([numbered(k, height, width) for k in range(frames)], codec)
    spans = [(0, 53), (0, 1), (1, 1), (7, 2), (8, 8), (9, 32), (15, 17), (21, 32), (40, 13), (52, 1)]
    for (start, count), clip in zip(spans, decoded(video, codec, spans), strict=True):
        assert clip.shape == (count, height, width, 3) and clip.dtype == np.uint8
        assert [number_of(picture) for picture in clip] == list(range(start, start + count)), (start, count)


# Decibels at the default quality, 0.4 below what was measured. The scene's colours are finer than chroma of half the size, all
# that yuv loses.
PSNR = {"h264": 33.90, "mjpeg": 33.96, "vp9": 33.51, "mosaic": 33.61, "yuv": 35.99}


@pytest.mark.parametrize("codec", CODECS)
def test_pictures_survive(codec: str) -> None:
    """Red if quality is lost on its way to the encoder, chroma is shifted, or range or matrix differ between the ends."""
    pictures = scene(24, 96, 128)
    (clip,) = decoded(encoded(pictures, codec), codec, [(0, 24)])
    found = psnr(clip, pictures)
    shift = np.abs((clip.astype(float) - pictures).mean((0, 1, 2)))
    print(f"{codec}: {found:.2f} dB, mean shift {shift.round(2)}")
    assert found > PSNR[codec]
    assert (shift < 1).all()
    worst = min(psnr(one, other) for one, other in zip(clip, pictures, strict=True))
    assert worst > PSNR[codec] - 1.5, "single frames are worse"


@pytest.mark.parametrize("codec", [codec for codec in CODECS if CODECS[codec].quality])
def test_quality_is_heeded(codec: str) -> None:
    """Red if the option does not reach the encoder: files of the same size."""
    pictures = scene(16, 64, 80)
    best, worst, _ = CODECS[codec].quality or (0, 0, 0)
    fine, usual, coarse = (encoded(pictures, codec, quality) for quality in (best, None, worst))
    assert fine.size > 1.2 * usual.size and usual.size > 1.2 * coarse.size
    ratios = [psnr(decoded(video, codec, [(0, 16)])[0], pictures) for video in (fine, usual, coarse)]
    assert ratios == sorted(ratios, reverse=True)


COLOURS = [
    *((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)),  # saturated
    *((0, 0, 0), (128, 128, 128), (255, 255, 255), (200, 30, 30), (30, 200, 30), (30, 30, 200), (230, 180, 150)),
]


@pytest.mark.parametrize("codec", CODECS)
def test_flat_colours(codec: str) -> None:
    """Red if limited range is taken for full, BT.709 for BT.601, or 255 comes out as 253."""
    pictures = [np.full((36, 50, 3), colour, np.uint8) for colour in COLOURS]
    (clip,) = decoded(encoded(pictures, codec), codec, [(0, len(pictures))])
    inner = clip[:, 2:-2, 2:-2].reshape(len(COLOURS), -1, 3)
    np.testing.assert_allclose(inner.mean(1), COLOURS, atol=2.0 if codec in ("h264", "vp9") else 1.1)
    means = clip.reshape(len(COLOURS), -1, 3).mean((0, 1)) - np.mean(COLOURS, 0)
    assert np.abs(means).max() < 1


def test_tiles_keep_to_themselves() -> None:
    """Red if a block of a JPEG holds two frames, or chroma is halved over the edge between them."""
    for one, other in (((0, 0, 0), (255, 255, 255)), ((255, 0, 0), (0, 0, 255))):
        for height, width in ((48, 64), (36, 50)):
            pictures = [np.full((height, width, 3), colour, np.uint8) for colour in (one, other) * 8]
            (clip,) = decoded(encoded(pictures, "mosaic"), "mosaic", [(0, 16)])
            error = np.abs(clip.astype(int) - pictures)
            assert error[:, 1:-1, 1:-1].max() <= 1
            assert error.max() <= (1 if one == (0, 0, 0) else 80), "some of the neighbour's chroma, nothing of its brightness"


@pytest.mark.parametrize(
    ("height", "width", "fps", "grid"),
    [
        (128, 170, 8, (2, 4)),
        (128, 176, 8.0, (2, 4)),
        (128, 228, 0.1, (1, 1)),
        (16, 22, 240, (11, 22)),
        (4096, 65536, 30, (1, 2)),
    ],
)
def test_a_mosaic_holds_a_second_and_is_no_ribbon(height: int, width: int, fps: float, grid: tuple[int, int]) -> None:
    """Red if a JPEG of a high frame rate outgrows what decoders take, or holds less than a second though it is small."""
    assert mosaic_grid(height, width, fps) == grid


# ------------------------------------------------------------------------------------------------------- the same every time


@pytest.mark.parametrize("codec", CODECS)
def test_a_still_is_as_many_frames(codec: str) -> None:
    """Red if a picture that stands is stored once, or coded in another way than the same picture handed in again."""
    pictures, stands = scene(5, 36, 50), (1, 4, 1, 12, 2)
    encoder = VideoEncoder(codec, 8.0, encoder_quality(codec, None), 50, 36)
    for picture, times in zip(pictures, stands, strict=True):
        encoder.add(picture, times)
    assert encoder.frames == 20
    again = [picture for picture, times in zip(pictures, stands, strict=True) for _ in range(times)]
    assert encoder.finish() == encoded(again, codec).tobytes()


SCRIPT = """
import hashlib, json, os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np
from xkd_fast.data.encode import encode_video
from xkd_fast.data.video_codecs import CODECS, encoder_quality
film = np.load(sys.argv[1])
for codec in CODECS:
    print(hashlib.sha256(encode_video(film, codec, 8.0, encoder_quality(codec, None))).hexdigest())
"""


def test_the_same_bytes_on_one_processor_and_on_all(tmp_path: Path) -> None:
    """Red if threads, random file numbers, or memory that was never written shape the bytes: a resumed run ends with others."""
    film = scene(24, 128, 200)  # which x264 without its flag encodes in another way every time
    np.save(tmp_path / "film.npy", film)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "film.npy")]
    alone = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    for codec, digest in zip(CODECS, alone, strict=True):
        assert {hashlib.sha256(encoded(film, codec)).hexdigest() for _ in range(5)} == {digest}, codec


ROOT = Path(__file__).parent.parent.parent
LONG = f"""
import sys
import numpy as np
from xkd_fast.data.encode import VideoEncoder
from xkd_fast.data.video_codecs import encoder_quality
{PEAK}
codec = sys.argv[1]
y, x = np.mgrid[:128, :170]
def film(frames):
    encoder = VideoEncoder(codec, 8.0, encoder_quality(codec, None), 170, 128)
    for k in range(frames):
        encoder.add(np.repeat((x + y + k).astype(np.uint8)[..., None] // 4, 3, -1))
    return len(encoder.finish())
film(100)
before = peak()
size = film(3000)
print(peak() - before, size)
"""


@pytest.mark.parametrize("codec", CODECS)
def test_a_long_video_takes_the_memory_of_its_bytes(codec: str) -> None:
    """Red if frames are kept until the end: 3000 of them are 196 MB."""
    done = subprocess.run([sys.executable, "-c", LONG, codec], capture_output=True, text=True, check=True, cwd=ROOT)
    more, size = map(int, done.stdout.split())
    assert more < 30e6 + 2.5 * size, f"{more / 1e6:.0f} MB for {size / 1e6:.0f} MB"


# ------------------------------------------------------------------------------------------------------------------- damage


def damaged_headers(codec: str) -> Iterator[tuple[str, bytes]]:
    """What is wrong, and a file of which that is true."""
    good = encoded(scene(20, 36, 50), codec).tobytes()
    header = 28 if codec == "mosaic" else 20
    places = {"frames": 8, "height": 12, "width": 16} | ({"columns": 20, "rows": 24} if codec == "mosaic" else {})
    for cut in (0, 7, 8, header - 1, header, header + 3, len(good) // 2, len(good) - 1):
        yield f"cut after {cut} bytes", good[:cut]
    yield "a byte too many", good + b"\0"
    yield "another's magic", b"RIFF" + good[4:]
    for name, place in places.items():
        for value in (0, 1, 3, 2**31, 2**32 - 1):
            yield f"{name} = {value}", good[:place] + struct.pack("<I", value) + good[place + 4 :]


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_streams_tell_their_matrix_and_range(codec: str) -> None:
    """Red if they do not: players, and decoders of GPUs, take untagged pictures of 720 lines and more for BT.709."""
    with av.open(io.BytesIO(encoded(scene(2, 36, 50), codec).tobytes())) as container:
        frame = next(container.decode(video=0))
    assert (int(frame.colorspace), int(frame.color_range)) == (5, 1)  # BT.470BG, which is BT.601's matrix; limited


def test_a_header_that_asks_for_all_memory_is_damage() -> None:
    """Red if a sample that claims to be huge ends the run."""
    good = encoded(scene(20, 36, 50), "mosaic")
    jpegs = parse_mosaic(good).jpegs
    huge = np.frombuffer(pack_mosaic(20, 65520, 65520, (1, 1), [jpegs[0].tobytes()] * 20), np.uint8)  # of 240 GiB
    decoder = ClipDecoder(2, 1, "mosaic")
    with pytest.raises(UndecodableError) as caught:
        decoder([DecodeRequest("a", good, SOUND, 0, 20), DecodeRequest("b", huge, SOUND, 0, 20)])
    assert list(caught.value.reasons) == [1]


@pytest.mark.parametrize("codec", ["mosaic", "yuv"])
def test_damaged_headers_are_found(codec: str) -> None:
    """Red if one is believed, or ends in anything but the error that a pipeline takes for damage."""
    decoder = ClipDecoder(2, 1, codec)
    good = encoded(scene(20, 36, 50), codec)
    for what, data in damaged_headers(codec):
        requests = [DecodeRequest("a", np.frombuffer(data, np.uint8), SOUND, 0, 20), DecodeRequest("b", good, SOUND, 3, 9)]
        with pytest.raises(UndecodableError) as caught:
            decoder(requests)
        assert list(caught.value.reasons) == [0] and caught.value.reasons[0], what
        assert len(decoder(requests[1:])[0].frames) == 9, "the decoder must go on"


@pytest.mark.parametrize(("codec", "parse"), [("mosaic", parse_mosaic), ("yuv", parse_yuv)])
@given(data=st.data())
def test_no_bytes_crash_the_parsers(codec: str, parse: object, data: st.DataObject) -> None:
    """Red if a length is used before it is checked: another exception than PackedError, or memory by the gigabyte."""
    good = bytearray(SMALL_FILES[codec])
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, min(len(good) - 1, 45)))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    for changed in (bytes(good), bytes(good[:cut])):
        try:
            found = parse(np.frombuffer(changed, np.uint8))  # type: ignore[operator]
        except PackedError:
            continue
        assert sum(map(len, found.jpegs)) < len(changed) if codec == "mosaic" else found.size < len(changed)


SMALL_FILES = {codec: encode_video([numbered(k, 16, 16) for k in range(3)], codec, 1.0, 4) for codec in ("mosaic", "yuv")}


def test_a_damaged_jpeg_of_a_mosaic_is_found() -> None:
    """Red if a JPEG that is none, or is of another size than its place promises, ends the process or passes for frames."""
    decoder = ClipDecoder(2, 1, "mosaic")
    good = encoded(scene(20, 36, 50), "mosaic")
    first = parse_mosaic(good).jpegs[0]
    begin = good.tobytes().index(first.tobytes())
    broken = good.copy()
    broken[begin : begin + 400] = 7
    narrow = good.copy()
    height = good.tobytes().index(b"\xff\xc0", begin) + 5  # after marker, length and precision
    narrow[height : height + 2] = (0, 16)
    for video, words in ((broken, "request 0"), (narrow, "where the file's header promises")):
        request = DecodeRequest("a", video, SOUND, 0, 5)
        with pytest.raises(UndecodableError, match=words):
            decoder([request, DecodeRequest("b", good, SOUND, 0, 20)])
        assert len(decoder([DecodeRequest("a", video, SOUND, 16, 4)])[0].frames) == 4, "only JPEGs that are needed are decoded"


@pytest.mark.parametrize("codec", CPU_CODECS)
def test_more_frames_than_there_are(codec: str) -> None:
    """Red if frames are made up where a file ends before its index says: black ones, or the last one held."""
    video = encoded(scene(20, 36, 50), codec)
    with pytest.raises(UndecodableError):
        decoded(video, codec, [(10, 11)])
    with pytest.raises(UndecodableError):
        decoded(video, codec, [(20, 1)])
