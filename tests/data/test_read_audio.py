"""Sound as shards get it, against computed sounds: the right samples, level and place, of any rate and number of channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.data.media import Sound, decoded_flac, numbered, write_video
from xkd_fast.data.read_audio import mono_weights
from xkd_fast.data.sound_track import take_sound
from xkd_fast.data.source_file import Skip
from xkd_fast.data.spool import Spool

RATE = 16000
PICTURES = [numbered(k) for k in range(5)]
EDGE = 200  # samples at either end, where the filter meets silence


def read(folder: Path, *tracks: Sound, suffix: str = "mkv") -> NDArray[np.float64]:
    """The sound of a file with these tracks, full scale 1."""
    path = write_video(folder / f"video.{suffix}", PICTURES, sounds=tracks, codecs=("libx264", ""))
    track = take_sound(str(path), RATE, spool=Spool())
    assert track is not None and track.start == track.begins == tracks[0].start
    return decoded_flac(track.flac) / 32768


def sweep(seconds: float, rate: int, low: float, high: float, level: float = 0.5) -> NDArray[np.float32]:
    """A tone whose pitch rises evenly from ``low`` to ``high`` Hz: any rate samples the same sound."""
    time = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * (low * time + (high - low) * time**2 / (2 * seconds))
    return (level * np.sin(phase)).astype(np.float32)


def tone(hertz: float, rate: int, seconds: float = 1.0, level: float = 0.5) -> NDArray[np.float32]:
    return sweep(seconds, rate, hertz, hertz, level)


def decibel(sound: NDArray[Any], reference: NDArray[Any] | float) -> float:
    """How much stronger a sound is than another, by power."""
    inner = slice(EDGE, -EDGE)
    other = np.asarray(reference, np.float64)
    strength = np.mean(other[inner] ** 2) if other.ndim else other**2
    return float(10 * np.log10(np.mean(np.asarray(sound, np.float64)[inner] ** 2) / strength + 1e-30))


# --------------------------------------------------------------------------------------------------------------- resampling


@pytest.mark.parametrize("rate", [16000, 22050, 32000, 44100, 48000, 88200, 96000])
def test_a_sweep_comes_out_as_computed(tmp_path: Path, rate: int) -> None:
    """Red if resampling delays, colours or distorts: half a sample late, and it is 6 dB off at the upper end."""
    found = read(tmp_path, Sound(sweep(2.0, rate, 50, 7200), rate, codec="pcm_f32le"))
    true = sweep(2.0, RATE, 50, 7200)
    assert len(found) == len(true)
    assert decibel(found - true, true) < -70
    late = np.roll(true, 1)
    assert decibel(found - late, true) > -10, "the bound would not see a shift"


def test_a_sweep_of_a_lower_rate(tmp_path: Path) -> None:
    """Red if telephone sound gains images above its 4 kHz, or loses what is below."""
    found = read(tmp_path, Sound(sweep(2.0, 8000, 50, 3600), 8000, codec="pcm_f32le"))
    assert decibel(found - sweep(2.0, RATE, 50, 3600), found) < -70


@pytest.mark.parametrize("rate", [22050, 44100, 48000, 96000])
@pytest.mark.parametrize("hertz", [8250, 9000, 10500])
def test_what_is_too_high_is_gone(tmp_path: Path, rate: int, hertz: int) -> None:
    """Red if a tone above half the shards' rate is folded down: FFmpeg's default lets 8.5 kHz through at -26 dB."""
    found = read(tmp_path, Sound(tone(hertz, rate), rate, codec="pcm_f32le"))
    assert decibel(found, tone(hertz, rate)) < -70


@pytest.mark.parametrize(
    "codec", ["pcm_u8", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le", "flac"]
)
def test_every_form_of_samples_has_the_same_scale(tmp_path: Path, codec: str) -> None:
    """Red if a form is read with a wrong full scale, sign or zero: unsigned bytes lie around 128."""
    true = tone(440, RATE, level=0.5)
    found = read(tmp_path, Sound(true, codec=codec))
    assert len(found) == len(true) and abs(found.mean()) < 0.005
    assert decibel(found - true, true) < (-40 if codec == "pcm_u8" else -75)


@pytest.mark.parametrize(("suffix", "codec", "rate"), [("mkv", "libopus", 48000), ("mkv", "aac", 44100), ("mkv", "ac3", 48000)])
def test_lossy_sound_has_its_place_and_level(tmp_path: Path, suffix: str, codec: str, rate: int) -> None:
    """Red if an encoder's delay is left in, or its level changed."""
    found = read(tmp_path, Sound(sweep(2.0, rate, 100, 3000), rate, codec=codec), suffix=suffix)
    true = sweep(2.0, RATE, 100, 3000)
    count = min(len(found), len(true))
    # the lag at which both agree best, in samples
    spectrum = np.fft.rfft(found[:count], 2 * count) * np.conj(np.fft.rfft(true[:count], 2 * count))
    lag = int(np.argmax(np.fft.irfft(spectrum)))
    assert min(lag, 2 * count - lag) <= 1
    assert abs(decibel(found[:count], true[:count])) < 0.3


# ------------------------------------------------------------------------------------------------------------------ channels


LAYOUTS = {
    "mono": 1,
    "stereo": 2,
    "2.1": 3,
    "3.0": 3,
    "4.0": 4,
    "quad": 4,
    "5.0": 5,
    "5.1": 6,
    "5.1(side)": 6,
    "6.1": 7,
    "7.1": 8,
    "3 channels": 3,
    "6 channels": 6,
    "8 channels": 8,
}
DEEP = {"2.1": 2, "5.1": 3, "5.1(side)": 3, "6.1": 3, "7.1": 3, "6 channels": 3, "8 channels": 3}  # which channel is deep


def mixed(folder: Path, layout: str, channels: NDArray[np.float32]) -> NDArray[np.float64]:
    """The mono sound of such a file; MOV stores which channel stands where, and Matroska's PCM does not."""
    suffix = "mkv" if layout.endswith("channels") else "mov"
    return read(folder, Sound(channels, layout=layout, codec="pcm_f32le"), suffix=suffix)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_channel_is_lost_or_made_too_loud(tmp_path: Path, layout: str) -> None:
    """Red if what one loudspeaker alone plays is lost or louder than it was, but for a film's deep effects."""
    pitches = 400 + 100 * np.arange(LAYOUTS[layout])
    channels = np.stack([tone(hertz, RATE, level=0.1) for hertz in pitches])
    spectrum = np.abs(np.fft.rfft(mixed(tmp_path, layout, channels))) / (0.1 * RATE / 2)
    gains = np.round(20 * np.log10(spectrum[pitches] + 1e-9))
    deep = DEEP.get(layout, -1)
    heard = [gain for number, gain in enumerate(gains) if number != deep]
    assert all(-12 <= gain <= 0 for gain in heard), gains
    assert deep < 0 or gains[deep] < -60


@pytest.mark.parametrize(
    ("layout", "channel", "gain"),
    [
        ("mono", 0, 0),
        ("stereo", 0, -6),
        ("stereo", 1, -6),
        ("5.1", 2, -3),
        ("5.1", 0, -6),
        ("5.1", 4, -9),
        ("7.1", 7, -9),
        ("6 channels", 2, -3),
    ],
)
def test_each_channel_has_the_level_of_bs_775(tmp_path: Path, layout: str, channel: int, gain: float) -> None:
    """Red if speech in the centre of a film comes out at -11 dB, which is what FFmpeg makes of it to rule out clipping."""
    channels = np.zeros((LAYOUTS[layout], RATE // 2), np.float32)
    channels[channel] = tone(440, RATE, 0.5)
    assert decibel(mixed(tmp_path, layout, channels), channels[channel]) == pytest.approx(gain, abs=0.1)


def test_what_both_loudspeakers_play_keeps_its_level(tmp_path: Path) -> None:
    """Red if mono sound stored as stereo is louder or quieter than the same sound as mono: most of the web's is such."""
    true = tone(440, RATE, 0.5, level=0.9)
    assert decibel(mixed(tmp_path, "stereo", np.stack([true, true])), true) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("layout", ["stereo", "5.1", "7.1"])
def test_loud_channels_together_do_not_clip(tmp_path: Path, layout: str) -> None:
    """Red if peaks are cut off: all channels at full scale are turned down as a whole, and stay a pure tone."""
    true = tone(440, RATE, 0.5, level=1.0)
    found = mixed(tmp_path, layout, np.stack([true] * LAYOUTS[layout]))
    assert 0.98 < np.abs(found).max() <= 1
    scale = float(found @ true / (true @ true))
    assert decibel(found - scale * true, found) < -75


def test_one_wild_sample_does_not_silence_the_rest(tmp_path: Path) -> None:
    """Red if a damaged sample of 1e30, or one that is no number, makes all others zero or the file unreadable."""
    sound = tone(440, RATE, 0.5)
    sound[[100, 200, 300]] = 1e30, np.nan, np.inf
    found = read(tmp_path, Sound(sound, codec="pcm_f32le"))
    assert decibel(found[400:], tone(440, RATE, 0.5)[400:]) == pytest.approx(-12, abs=0.2)


@pytest.mark.parametrize("codec", ["pcm_s16le", "libopus"])
def test_opposite_channels_are_named(tmp_path: Path, codec: str) -> None:
    """Red if channels that cancel each other in mono, by wrong wiring, pass as a sample of silence or of coding noise."""
    rate = 48000
    sound = tone(440, rate)
    with pytest.raises(Skip) as caught:
        read(tmp_path, Sound(np.stack([sound, -sound]), rate, "stereo", codec))
    assert caught.value.skipped.reason == "silent_audio" and "cancel each other" in caught.value.skipped.detail


def test_nearly_opposite_channels_are_kept(tmp_path: Path) -> None:
    """Red if stereo that is only wide is refused."""
    left = tone(440, RATE)
    found = mixed(tmp_path, "stereo", np.stack([left, np.float32(-0.8) * left]))
    assert decibel(found, left) == pytest.approx(-20, abs=0.1)


@given(st.permutations(["FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR"]), st.integers(1, 8))
def test_weights(channels: list[str], count: int) -> None:
    """Red if a subset of loudspeakers mixes to nothing, or a channel has a negative or more than its own level."""
    weights = mono_weights(channels[:count])
    assert len(weights) == count and weights.any() and (weights >= 0).all() and (weights <= 1).all()


def test_of_sound_from_all_sides_the_middle_is_taken() -> None:
    """Red if ambisonics, whose other channels are differences between sides, is mixed as if each were a loudspeaker."""
    np.testing.assert_array_equal(mono_weights(["AMBI0", "AMBI1", "AMBI2", "AMBI3"]), [1, 0, 0, 0])


# ----------------------------------------------------------------------------------------------------------- which track plays


@pytest.mark.parametrize("marked", [0, 1, 2])
def test_the_track_marked_as_default_is_taken(tmp_path: Path, marked: int) -> None:
    """Red if the first track is taken where another one is marked: a commentary, or another language."""
    pitches = (300, 700, 1500)
    tracks = [Sound(tone(hertz, RATE), default=number == marked) for number, hertz in enumerate(pitches)]
    found = read(tmp_path, *tracks)
    strongest = np.argmax(np.abs(np.fft.rfft(found))) * RATE / len(found)
    assert strongest == pytest.approx(pitches[marked], abs=2)
