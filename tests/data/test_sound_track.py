"""Sound at its place on a track: block by block as if it were laid at once, in the memory of a block."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.media import PEAK, Sound, decoded_flac, noise, numbered, write_video
from xkd_fast.data import sound_track
from xkd_fast.data.encode import encode_flac
from xkd_fast.data.sound_track import Track, take_sound
from xkd_fast.data.spool import Spool, Stored, chunks

RATE = 16000
ROOT = Path(__file__).parent.parent.parent


@given(
    first=st.integers(-20, 30),
    pieces=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 25)), max_size=4),
    limit=st.none() | st.integers(0, 40),
)
def test_blocks_lie_where_they_belong(first: int, pieces: list[tuple[int, int]], limit: int | None) -> None:
    """Red if an offset wraps round (a negative index in numpy counts from the end), a pause is lost, or a limit passed."""
    track, expected, place = Track(7, 0.0, limit, spool := Spool()), [0] * 200, first
    for number, (pause, size) in enumerate(pieces):
        sound = np.arange(1, size + 1, dtype=np.int16) + 100 * number
        place += pause
        track.add(place, sound)
        for value in sound:
            if place >= 0:
                expected[place] = value
            place += 1
    reached = max(0, place) if pieces else 0
    track.finish(padded=limit is not None)
    length = reached if limit is None else limit
    assert track.samples == length and track.heard == any(value > 3 for value in expected[:length])
    if length:
        np.testing.assert_array_equal(decoded_flac(b"".join(chunks(spool.take()))), expected[:length])


def test_the_same_flac_in_blocks_of_any_size() -> None:
    """Red if where blocks end shapes the bytes: they would depend on how a container cuts its packets."""
    sound, files = noise(3.0), set()
    for size in (77, 999, 4096, 16000, 48000):
        track = Track(RATE, 0.0, None, Spool())
        for begin in range(0, sound.size, size):
            track.add(begin, sound[begin : begin + size])
        files.add(track.finish(padded=False))
    assert len(files) == 1
    np.testing.assert_array_equal(decoded_flac(files.pop()), sound)


def test_what_is_too_loud_only_at_its_end_is_turned_down_from_its_beginning(tmp_path: Path) -> None:
    """Red if the first blocks keep the level that they had before the peak was seen, or the file holds both tries."""
    sound = noise(16.0) / np.float32(32768)
    sound[-100] = 4.0  # so the first try is the longer file: two bits more a sample, but for the last second
    path = write_video(tmp_path / "video.mkv", [numbered(k % 50) for k in range(100)], sounds=[Sound(sound, codec="pcm_f32le")])
    track = take_sound(str(path), RATE, spool=Spool())
    assert track is not None
    expected = np.clip(np.rint(sound * 8192), -32768, 32767).astype(np.int16)
    np.testing.assert_array_equal(decoded_flac(track.flac), expected)
    assert track.flac == encode_flac(expected, RATE)


def test_a_stream_that_is_too_long_for_memory_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a stream that goes to disk on its way, and back in it for its header, differs from one in memory."""
    monkeypatch.setattr("xkd_fast.data.spool.IN_MEMORY", 20000)
    path = str(write_video(tmp_path / "video.mkv", [numbered(k) for k in range(50)], sound=noise(2.0)))
    inside, outside = take_sound(path, RATE, spool=Spool()), take_sound(path, RATE, spool=Spool(str(tmp_path / "0.audio")))
    assert inside is not None and outside is not None and isinstance(inside.flac, bytes) and isinstance(outside.flac, Stored)
    assert (outside.flac.path, outside.flac.size) == (str(tmp_path / "0.audio"), len(inside.flac))
    assert b"".join(chunks(outside.flac)) == inside.flac
    assert sound_track.SILENCE == 3


LONG = f"""
import sys
from xkd_fast.data.convert import ConvertTask, convert
{PEAK}
def run(path, spool):
    return convert(ConvertTask(path, "mosaic", 0.5, 16, 16000, 0.25, 4, spool=spool))
run(sys.argv[1], sys.argv[3] + "/0")
before = peak()
sample = run(sys.argv[2], sys.argv[3] + "/1")
print(sample.samples, sample.audio.size, peak() - before)
"""


@pytest.mark.parametrize("rate", [16000, pytest.param(44100, marks=pytest.mark.slow)])
def test_long_sound_is_never_whole_in_memory(tmp_path: Path, rate: int) -> None:
    """Red if the sound, or its FLAC, is held whole: 14 minutes more of it are 175 MB as blocks, and 26 MB as a file."""

    def film(minutes: int) -> Path:
        times = [10.0 * k for k in range(6 * minutes)]
        pictures, sound = [numbered(k % 50, 16, 16) for k in range(len(times))], noise(60, rate)
        sounds = [np.tile(sound, minutes)]
        return write_video(tmp_path / f"{minutes}.mkv", pictures, times, fps=0.1, sound=sounds[0], rate=rate)

    command = [sys.executable, "-c", LONG, str(film(1)), str(film(15)), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    samples, size, more = map(int, done.stdout.split())
    assert samples == 15 * 60 * RATE and size > 20e6
    assert more < 8e6, f"{more / 1e6:.1f} MB for 14 minutes more"
