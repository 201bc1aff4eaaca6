"""A zoo of source files: one of every kind that a pile of videos may hold, each with what `prepare` is to make of it.

All are made by PyAV in a few milliseconds, and are the same each time but for what an encoder's version changes.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from numpy.typing import NDArray

from tests.data.media import Sound, noise, numbered, write_video

H264 = ("libx264", "aac")
SECOND = [numbered(k) for k in range(25)]  # 25 pictures, 48 lines of 64
VARIABLE = [int(time) / 1000 for time in np.cumsum(np.random.default_rng(3).integers(17, 250, 22))]  # seconds
SECONDS_PER_FILE = 6.0  # more than any file of the zoo takes, but for the one that is made to take too long


@dataclass(frozen=True)
class Animal:
    """A source file and what is to become of it."""

    name: str  # below the folder; its folder is its class
    verdict: str  # "written", or the reason why it is skipped
    make: Callable[[Path], Any]  # writes the file; the path has the name's suffix, but a plain name
    frames: int | None = None  # of a written sample, at 8 a second
    size: tuple[int, int] | None = None  # height and width of its frames, the shorter one 16


def channels(count: int, seconds: float = 1.0, rate: int = 16000) -> NDArray[np.int16]:
    """Independent noise on each channel: [channels, samples] int16."""
    return np.stack([noise(seconds, rate, seed) for seed in range(count)])


def in_format(picture: NDArray[np.uint8], pix_fmt: str) -> Any:
    return av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)


def video(**given: Any) -> Callable[[Path], Any]:
    """A second of numbered pictures and of noise, but for what is given."""
    return lambda path: write_video(path, **{"pictures": SECOND, "sound": noise(1), **given})


def h264(**given: Any) -> Callable[[Path], Any]:
    return video(codecs=H264, **given)


def mpeg(**given: Any) -> Callable[[Path], Any]:
    """Codecs that know few frame rates."""
    return video(**{"codecs": ("mpeg2video", "mp2"), "time_base": Fraction(1, 25), **given})


def heard(*tracks: Sound) -> Callable[[Path], Any]:
    """A second of pictures with these tracks of sound."""

    def make(path: Path) -> None:
        codec = {".mov": "libx264", ".mp4": "libx264", ".avi": "mjpeg"}.get(path.suffix, "ffv1")
        write_video(path, SECOND, sounds=tracks, codecs=(codec, ""), pix_fmt="yuvj420p" if codec == "mjpeg" else None)

    return make


def coded(pix_fmt: str, codec: str, pictures: list[NDArray[np.uint8]] = SECOND) -> Callable[[Path], Any]:
    """Pictures coded in another form of pixels."""
    sound_codec = {"webm": "libopus", "mp4": "aac"}

    def make(path: Path) -> None:
        scheduling = os.sched_getscheduler(0), os.sched_getparam(0)
        write_video(
            path,
            [in_format(picture, pix_fmt) for picture in pictures],
            sound=noise(1, 48000),
            rate=48000,
            codecs=(codec, sound_codec.get(path.suffix[1:], "pcm_s16le")),
            pix_fmt=pix_fmt,
            setup=spacious if codec == "libvpx" else None,
        )
        os.sched_setscheduler(0, *scheduling)  # SVT-AV1 gives its caller, run by root, real-time priority, and so all children

    return make


def displayed(a: int, b: int, c: int, d: int) -> Callable[[Path], Any]:
    """A film whose header says how it is to be turned, as telephones do."""

    def make(path: Path) -> None:
        set_display_matrix(h264()(path), (a, b, c, d))

    return make


def set_display_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Put (a, b, c, d) into the display matrix of an MP4's first track: a point (x, y) is shown at (ax + cy, bx + dy)."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # after version and flags, times, number, duration, layer, group and volume
    assert struct.unpack_from(">9i", data, place) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", data, place, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(data))
    return path


def anamorphic(numerator: int, denominator: int) -> Callable[[Any], None]:
    def setup(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(numerator, denominator)

    return setup


def interlaced(stream: Any) -> None:
    """MPEG-2 of two fields a picture, the upper one first."""
    stream.options = {"flags": "+ilme+ildct", "b": "4M"}


def spacious(stream: Any) -> None:
    """So many bits that grey levels survive."""
    stream.bit_rate = 4_000_000


def textured(count: int) -> list[NDArray[np.uint8]]:
    """Pictures that do not compress, so that most of a file is picture."""
    return [np.random.default_rng(k).integers(0, 256, (48, 64, 3)).astype(np.uint8) for k in range(count)]


def cut(share: float, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """The first part of a file."""

    def cut_off(path: Path) -> None:
        make(path)
        os.truncate(path, int(path.stat().st_size * share))

    return cut_off


def flipped(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """A file in whose middle third one byte of 100 is another one."""

    def damage(path: Path) -> None:
        make(path)
        data = np.frombuffer(path.read_bytes(), np.uint8).copy()
        data[len(data) // 3 : 2 * len(data) // 3 : 100] ^= 0x55
        path.write_bytes(data.tobytes())

    return damage


def piped(form: str, codecs: tuple[str, str]) -> Callable[[Path], Any]:
    """A file written to where nothing can be gone back to, so that its header tells no duration."""

    class Pipe:
        def __init__(self) -> None:
            self.data = io.BytesIO()

        def write(self, data: bytes) -> int:
            return self.data.write(data)

    def make(path: Path) -> None:
        pipe = Pipe()
        write_video(path, SECOND, sound=noise(1), codecs=codecs, file=pipe, form=form)
        path.write_bytes(pipe.data.getvalue())

    return make


def with_cover(path: Path) -> None:
    """A second of sound with a picture that belongs to it."""

    def setup(stream: Any) -> None:
        stream.pix_fmt = "yuvj420p"
        stream.disposition = Disposition.attached_pic

    write_video(path, SECOND[:1], sound=noise(1), codecs=("mjpeg", "aac"), setup=setup)


def cover_first(path: Path) -> None:
    """A film whose first stream of pictures is its cover."""
    with av.open(str(path), "w") as container:
        cover: Any = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 48, 64, "yuvj420p", Disposition.attached_pic
        film: Any = container.add_stream("libx264", rate=25, options={"bf": "0"})
        film.width, film.height, film.pix_fmt = 64, 48, "yuv420p"
        sound: Any = container.add_stream("aac", rate=16000, layout="mono")
        container.mux(cover.encode(in_format(numbered(50, 64, 48), "yuvj420p")))
        container.mux(cover.encode(None))
        for number, picture in enumerate(SECOND):
            frame = in_format(picture, "yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(film.encode(frame))
        block = av.AudioFrame.from_ndarray(noise(1)[None].astype(np.float32) / 32768, format="fltp", layout="mono")
        block.sample_rate, block.pts = 16000, 0
        for stream, last in ((sound, block), (film, None), (sound, None)):
            container.mux(stream.encode(last))


def endless(path: Path) -> None:
    """6 MB that take a decoder half a minute or more: one packet of a large picture, 200 times."""
    with av.open(str(path), "w") as container:
        film: Any = container.add_stream("ffv1", rate=25)
        film.width, film.height, film.pix_fmt = 4000, 4000, "bgr0"
        (packet,) = [*film.encode(av.VideoFrame(4000, 4000, "bgr0")), *film.encode(None)]
        data = bytes(packet)
        sound: Any = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        block = av.AudioFrame.from_ndarray(noise(1)[None], format="s16", layout="mono")
        block.sample_rate, block.pts = 16000, 0
        container.mux(sound.encode(block))
        for number in range(200):
            again = av.Packet(data)
            again.stream, again.time_base = film, Fraction(1, 25)
            again.pts = again.dts = number
            again.is_keyframe = True
            container.mux(again)


def joined(*makes: Callable[[Path], Any], plain: bool = False) -> Callable[[Path], Any]:
    """The streams of several files in one; ``plain`` = Matroska that says nothing of the lengths of single streams."""

    def make(path: Path) -> None:
        parts = [path.with_name(f"{path.stem}-{number}.{suffix_of(path, part)}") for number, part in enumerate(makes)]
        for part, part_of in zip(parts, makes, strict=True):
            part_of(part)
        with contextlib.ExitStack() as stack, av.open(str(path), "w") as container:
            sources = [stack.enter_context(av.open(str(part))) for part in parts]
            packets = []
            for source in sources:
                copies = [container.add_stream_from_template(stream) for stream in source.streams]
                packets += [(packet, copies[packet.stream.index]) for packet in source.demux() if packet.dts is not None]
            for packet, copy in sorted(packets, key=lambda found: found[0].dts * found[0].time_base):
                packet.stream = copy
                container.mux(packet)
        for part in parts:
            part.unlink()
        if plain:
            path.write_bytes(path.read_bytes().replace(b"DURATION", b"NO TIMES"))

    return make


def suffix_of(path: Path, make: Callable[[Path], Any]) -> str:
    return "srt" if make is subtitle else path.suffix[1:]


def subtitle(path: Path) -> None:
    """Words that stand from half a second to 6 s."""
    path.write_text("1\n00:00:00,500 --> 00:00:06,000\nlong after the picture\n", encoding="utf-8")


def glued(path: Path) -> None:
    """Two recordings one after the other, byte by byte: time stamps begin again."""
    h264(**LONG)(path)
    path.write_bytes(2 * path.read_bytes())


def spliced(path: Path) -> None:
    """MPEG-TS of 2 s with packets of its sound overwritten at about half."""
    write_video(path, [numbered(k) for k in range(50)], sound=noise(2), codecs=H264)
    overwrite_sound(path, 0.5)


def overwrite_sound(path: Path, share: float, count: int = 3) -> Path:
    """Overwrite what some packets of an MPEG-TS hold of its AAC, from a share of them on, but for the headers of blocks."""
    data = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 188).copy()
    numbers = (data[:, 1] & 0x1F).astype(int) * 256 + data[:, 2]
    places = np.flatnonzero(numbers == 257)  # the number that FFmpeg gives to the second stream
    for place in places[int(len(places) * share) :][:count]:
        header = data[place].tobytes().find(b"\xff\xf1")
        begin = header + 7 if header >= 0 else 4
        data[place, begin : begin + 60] = 0xE5
    path.write_bytes(data.tobytes())
    return path


def timed(path: Path) -> None:
    """A film of 3 s with the time code of a camera: a stream of one packet, which lasts as long as the film."""

    def setup(stream: Any) -> None:
        stream.metadata["timecode"] = "01:00:00:00"

    write_video(path, textured(75), sound=noise(3), codecs=("libx264", "pcm_s16le"), options=FAST_START, setup=setup)


def link(target: str) -> Callable[[Path], Any]:
    return lambda path: path.symlink_to(target)


def wrapping(path: Path) -> None:
    """MPEG-TS whose time stamps of 33 bits start over half-way through."""
    start = 2**33 / 90000 - 0.5
    write_video(path, SECOND, [start + k / 25 for k in range(25)], sound=noise(1), sound_start=start, codecs=H264)


def late(path: Path) -> None:
    """MPEG-TS recorded a day after its clock was started."""
    times = [80000 + k / 25 for k in range(25)]
    write_video(path, SECOND, times, sound=noise(1), sound_start=80000.0, codecs=H264)


W = "written"
MPEG_SOUNDS = [Sound(noise(1), codec="aac", default=True), Sound(noise(6), codec="aac", default=False)]
MKV_SOUNDS = [Sound(noise(1), default=True), Sound(noise(6), default=False)]
SIX_SECONDS = {"pictures": SECOND * 6, "sound": None}
FAST_START = {"movflags": "+faststart"}
LONG = {"pictures": textured(75), "sound": noise(3)}
PUNCTURED = np.where(np.arange(16000) % 100, 0.1, np.nan).astype(np.float32)
ZOO = [
    # frame rates
    *(
        Animal(f"rates/{name}.{suffix}", W, make(pictures=pictures, times=times, fps=fps, sound=noise(seconds)), frames)
        for suffix, make in (("mkv", video), ("mp4", h264))
        for name, pictures, times, fps, seconds, frames in (
            ("variable 17-250 ms", [numbered(k) for k in range(22)], VARIABLE, 25, 3, 18),
            ("5", [numbered(k) for k in range(5)], None, 5, 1, 8),
            ("23.976", [numbered(k) for k in range(24)], None, 24000 / 1001, 1, 8),
            ("60", [numbered(k // 2) for k in range(60)], None, 60, 1, 8),
        )
    ),
    Animal("rates/one long picture.mkv", W, video(pictures=SECOND[:1], fps=1), 8),
    Animal("rates/one picture.mp4", "too_short", h264(pictures=SECOND[:1])),
    # shapes
    Animal("shapes/90.mp4", W, displayed(0, 1, -1, 0), 8, (22, 16)),
    Animal("shapes/180.mp4", W, displayed(-1, 0, 0, -1), 8, (16, 22)),
    Animal("shapes/270.mp4", W, displayed(0, -1, 1, 0), 8, (22, 16)),
    Animal("shapes/mirrored.mp4", W, displayed(-1, 0, 0, 1), 8, (16, 22)),
    Animal("shapes/odd.mkv", W, video(pictures=[numbered(k, 51, 67) for k in range(25)]), 8, (16, 22)),
    Animal("shapes/odd.mp4", W, coded("yuv444p", "libx264", pictures=[numbered(k, 51, 67) for k in range(25)]), 8, (16, 22)),
    Animal("shapes/dot.mkv", W, video(pictures=[numbered(k, 2, 2) for k in range(25)]), 8, (16, 16)),
    Animal("shapes/anamorphic.mp4", W, h264(setup=anamorphic(3, 2)), 8, (16, 32)),
    Animal("shapes/narrow pixels.mp4", W, h264(setup=anamorphic(1, 2)), 8, (24, 16)),
    Animal("shapes/ribbon.mkv", "too_narrow", video(pictures=[numbered(k, 8, 256) for k in range(25)])),
    # pixels
    *(
        Animal(f"pixels/{codec} {pix_fmt}.{suffix}", W, coded(pix_fmt, codec), 8, (16, 22))
        for codec, pix_fmt, suffix in (
            ("libx264", "yuv420p10le", "mkv"),
            ("libx264", "yuv444p", "mp4"),
            ("libx264", "yuv422p10le", "mkv"),
            ("libx265", "yuv420p10le", "mp4"),
            ("prores_ks", "yuv422p10le", "mov"),
            ("libvpx-vp9", "yuva420p", "webm"),
            ("libvpx-vp9", "yuv444p", "webm"),
            ("libvpx", "yuv420p", "webm"),
            ("libsvtav1", "yuv420p", "webm"),
            ("qtrle", "argb", "mov"),
            ("png", "rgba", "mov"),
            ("ffv1", "gray", "mkv"),
            ("ffv1", "yuva444p", "mkv"),
            ("ffv1", "gbrp16le", "mkv"),
            ("mjpeg", "yuvj422p", "avi"),
        )
    ),
    Animal("pixels/interlaced.ts", W, mpeg(setup=interlaced), 8, (16, 22)),
    # containers and codecs
    Animal("containers/mpeg4 mp3.avi", W, mpeg(codecs=("mpeg4", "mp3")), 9),  # of 27 pictures: MP3 delays
    Animal("containers/wmv.wmv", W, video(codecs=("wmv2", "mp3"), setup=spacious), 8),
    Animal("containers/flash.flv", W, video(codecs=("flv1", "mp3"), rate=22050, sound=noise(1, 22050)), 8),
    Animal("containers/dvd.mpg", W, mpeg(), 8),
    Animal("containers/flash.mp4", "unreadable", lambda path: path.write_text("ffconcat version 1.0\nfile 'flash.flv'\n")),
    Animal("containers/list.mp4", "unreadable", lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\nflash.flv\n")),
    Animal("containers/telephone.3gp", W, h264(), 8),
    Animal("containers/fragments.mp4", W, h264(options={"movflags": "frag_keyframe+delay_moov"}), 8),
    Animal("containers/piped.mkv", W, piped("matroska", ("ffv1", "pcm_s16le")), 8),
    Animal("containers/piped.ts", W, piped("mpegts", H264), 8),
    Animal("containers/a day late.ts", W, late, 8),
    Animal("containers/wrapping.ts", W, wrapping, 8),
    # sound
    Animal("sound/late.mkv", W, video(sound_start=0.5), 8),
    Animal("sound/late.mp4", W, h264(sound_start=0.5), 8),
    Animal("sound/early.mkv", W, video(times=[0.5 + k / 25 for k in range(25)], sound=noise(1.5)), 8),
    Animal("sound/early.mp4", W, h264(times=[0.5 + k / 25 for k in range(25)], sound=noise(1.5)), 8),
    Animal("sound/shorter.mp4", W, h264(sound=noise(0.3)), 8),
    Animal("sound/longer.mp4", W, h264(sound=noise(3)), 8),
    Animal("sound/after the pictures.mkv", "silent_audio", video(sound_start=1.2)),
    Animal("sound/silent.mkv", "silent_audio", video(sound=np.zeros(16000, np.int16))),
    Animal("sound/silent.mp4", "silent_audio", h264(sound=np.zeros(16000, np.int16))),
    Animal("sound/second of two.mkv", W, heard(*(Sound(noise(1) * k, default=bool(k)) for k in (0, 1))), 8),
    Animal("sound/second of two.mp4", W, heard(*(Sound(noise(1) * k, codec="aac", default=bool(k)) for k in (0, 1))), 8),
    # streams that are longer than the picture and sound that count
    Animal("longer/second sound.mkv", W, heard(*MKV_SOUNDS), 8),
    Animal("longer/second sound.mp4", W, heard(*MPEG_SOUNDS), 8),
    Animal("longer/second sound.ts", W, h264(sound=None, sounds=MPEG_SOUNDS), 8),
    Animal("longer/second sound, plain.mkv", W, joined(heard(*MKV_SOUNDS), plain=True), 8),
    Animal("longer/second film.mp4", W, joined(h264(), h264(**SIX_SECONDS)), 8),
    Animal("longer/second film.mkv", W, joined(video(), video(**SIX_SECONDS)), 8),
    Animal("longer/subtitle.mkv", W, joined(video(), subtitle), 8),
    Animal("longer/subtitle, plain.mkv", W, joined(video(), subtitle, plain=True), 8),
    *(
        Animal(f"sound/{layout} {codec}.{suffix}", W, heard(Sound(channels(count), 48000, layout, codec)), 8)
        for layout, count, codec, suffix in (
            ("mono", 1, "flac", "mkv"),
            ("stereo", 2, "libopus", "mkv"),
            ("3.0", 3, "flac", "mkv"),
            ("quad", 4, "flac", "mkv"),
            ("5.1", 6, "ac3", "mkv"),
            ("5.1", 6, "aac", "mp4"),
            ("7.1", 8, "flac", "mkv"),
            ("7.1", 8, "pcm_s16le", "mov"),
            ("6 channels", 6, "pcm_s16le", "mkv"),
        )
    ),
    Animal("sound/opposite.mkv", "silent_audio", heard(Sound(np.stack([noise(1), -noise(1)]), layout="stereo"))),
    *(
        Animal(f"sound/{rate} Hz.mkv", W, heard(Sound(noise(1, rate), rate)), 8)
        for rate in (8000, 11025, 22050, 32000, 44100, 48000, 88200, 96000)
    ),
    *(
        Animal(f"sound/{codec}.{suffix}", W, heard(Sound(noise(1) / np.float32(32768), codec=codec)), 8)
        for codec, suffix in (
            ("pcm_u8", "avi"),
            ("pcm_f32le", "mov"),
            ("pcm_f64le", "mkv"),
            ("pcm_s24le", "mov"),
            ("pcm_s32be", "mov"),
            ("pcm_alaw", "avi"),
            ("adpcm_ima_wav", "avi"),
            ("alac", "mov"),
            ("libopus", "mkv"),
        )
    ),
    Animal("sound/no numbers.mkv", W, heard(Sound(PUNCTURED, codec="pcm_f32le")), 8),
    # what is missing
    Animal("missing/sound.mp4", "no_audio", h264(sound=None)),
    Animal("missing/sound.m2v", "no_audio", mpeg(sound=None)),
    Animal("missing/pictures.m4a", "no_video", lambda path: write_video(path, sound=noise(1), codecs=H264)),
    Animal("missing/all but a cover.mp4", "no_video", with_cover),
    Animal("missing/nothing, the cover comes first.mp4", W, cover_first, 8, (16, 22)),
    Animal("missing/most.mp4", "too_short", h264(pictures=SECOND[:5])),
    # what is broken
    Animal("broken/empty.mp4", "unreadable", lambda path: path.write_bytes(b"")),
    Animal("broken/text.mp4", "unreadable", lambda path: path.write_text("no video, though it is called one\n" * 100)),
    Animal("broken/zeros.mp4", "unreadable", lambda path: path.write_bytes(bytes(10000))),
    Animal("broken/noise.mp4", "unreadable", lambda path: path.write_bytes(np.random.default_rng(0).bytes(10000))),
    Animal("broken/a page.mp4", "unreadable", lambda path: path.write_text("<!DOCTYPE html><html><body>404</body></html>")),
    Animal("broken/cut.mp4", "unreadable", cut(0.7, h264(**LONG))),
    Animal("broken/cut after its index.mp4", "truncated", cut(0.5, h264(**LONG, options=FAST_START))),
    Animal("broken/cut.mkv", "truncated", cut(0.5, video(**LONG))),
    Animal("broken/cut.avi", "truncated", cut(0.5, mpeg(codecs=("mpeg4", "pcm_s16le"), **LONG))),
    Animal("broken/cut.ts", W, cut(0.5, h264(**LONG))),
    Animal("broken/cut, of two sounds.mkv", "truncated", cut(0.5, video(**LONG, sounds=MKV_SOUNDS[1:]))),
    Animal("broken/cut, plain.mkv", "truncated", cut(0.5, joined(video(**LONG, sounds=MKV_SOUNDS[1:]), plain=True))),
    Animal("broken/cut, of two sounds.mp4", "truncated", cut(0.5, h264(**LONG, sounds=MPEG_SOUNDS[1:], options=FAST_START))),
    Animal("broken/cut, with a time code.mov", "truncated", cut(0.5, timed)),
    Animal("broken/sound.ts", "unreadable", spliced),
    Animal("broken/joined.ts", "truncated", glued),
    Animal("broken/cut early.mkv", "unreadable", cut(0.001, video(**LONG))),
    Animal("broken/bytes.mkv", "unreadable", flipped(video(pictures=textured(25)))),
    Animal("broken/bytes.mp4", "unreadable", flipped(h264(pictures=textured(25)))),
    Animal("broken/without end.mkv", "timed_out", endless),
    Animal("broken/pipe.mp4", "unreadable", os.mkfifo),
    # links and names
    Animal("names/to a film.mkv", W, link("../shapes/odd.mkv"), 8),
    Animal("names/to nothing.mkv", "unreadable", link("nowhere.mkv")),
    Animal("names/to itself.mkv", "unreadable", link("to itself.mkv")),
    *(
        Animal(f"names/{name}.mkv", W, video(), 8)
        for name in (
            "ö 鳥 – птица",
            "new\nline",
            os.fsdecode(b"\xff\xfe"),
            "%03d",
            'a,"b"',
            "x" * 240,
            "-v",
            "C:\\evil",
            "a\\..\\..\\evil",
            "http:",
            "00000001.flac",
            "~",
        )
    ),
]  # fmt: skip


def fill(folder: Path) -> Path:
    """Let all animals in."""
    for number, animal in enumerate(ZOO):
        path = folder / animal.name
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = path.with_name(f"{number}{path.suffix}")
        animal.make(plain)
        os.rename(plain, path)
    return folder
