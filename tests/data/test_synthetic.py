"""The rendered data set: reproducible, in sync, its classes told by motion and sound and not by colour or loudness."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import cross_val_score

from xkd_fast.data.synthetic import CLASSES, Clip, SyntheticOptions, clip_path, render_clip, render_dataset, write_clip
from xkd_fast.errors import UserError

# Nothing random but the event itself: what moves is the object, what sounds is its sound.
CLEAN = SyntheticOptions(background=0.0, video_noise=0.0, audio_noise=0.0, distractors=0.0, seconds=(3.0, 4.0))
TINY = SyntheticOptions(clips_per_class=2, classes=("flash", "slide"), seconds=(0.5, 0.6), fps=8, width=48, height=32)


def moving(frames: np.ndarray) -> np.ndarray:
    """Which pixels differ from what is mostly there: [T, H, W] bool."""
    still = np.median(frames, axis=0)
    return np.abs(frames - still).sum(-1) > 40


def centroids(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Column and row of the middle of what is set in each frame: [T], [T]; NaN in an empty frame."""
    _, h, w = mask.shape
    area = mask.sum((1, 2))
    with np.errstate(invalid="ignore"):
        return (mask * np.arange(w)).sum((1, 2)) / area, (mask * np.arange(h)[:, None]).sum((1, 2)) / area


def turning_frames(path: np.ndarray) -> np.ndarray:
    """Frames at which a path turns back: the extreme one of its neighbours."""
    step = np.diff(path)
    return np.flatnonzero(step[:-1] * step[1:] < 0) + 1


def visible_instants(name: str, clip: Clip, fps: int) -> np.ndarray:
    """When the eye sees something happen, found from the pixels alone; seconds, right to within a frame."""
    mask = moving(clip.frames)
    x, y = centroids(mask)
    if name == "bounce":  # low points, not the tops
        frames = np.array([k for k in turning_frames(y) if y[k] > np.median(y)])
    elif name == "ricochet":
        frames = np.union1d(turning_frames(x), turning_frames(y))
    elif name == "collide":  # the two together are most compact; seen against the corner, since they never leave the middle
        mask = np.abs(clip.frames - clip.frames[:, :1, :1].astype(float)).sum(-1) > 40
        width = [np.std(np.argwhere(picture), axis=0).sum() for picture in mask]
        frames = np.array([k for k in turning_frames(np.array(width)) if width[k] < np.median(width)])
    else:
        raise AssertionError(name)
    return frames / fps


def onsets(waveform: np.ndarray, rate: int) -> np.ndarray:
    """When a sound sets in after quiet, seconds: 5 ms windows that are 20 times as strong as the 15 ms before."""
    window = rate // 200
    power = (waveform[: len(waveform) // window * window].reshape(-1, window) ** 2).mean(1)
    loud = power > 0.01 * power.max()
    found = [k for k in range(3, len(power)) if loud[k] and power[k] > 20 * power[k - 3 : k].max()]
    return np.array([k * window / rate for k in found])


@pytest.mark.parametrize("name", ["bounce", "ricochet", "collide"])
@pytest.mark.parametrize("index", range(3))
def test_impacts_sound_when_they_are_seen(name: str, index: int) -> None:
    """Would catch a phase of the sound that is not the picture's, times in another unit, or an offset of a frame or more."""
    clip = render_clip(name, index, CLEAN)
    heard, seen = onsets(clip.waveform, CLEAN.sample_rate), visible_instants(name, clip, CLEAN.fps)
    last = (len(clip.frames) - 2) / CLEAN.fps  # a turn in the first or last frame cannot be seen
    heard = heard[(heard > 2 / CLEAN.fps) & (heard < last)]
    assert len(heard) >= 2
    for time in heard:
        assert np.abs(seen - time).min() <= 1 / CLEAN.fps + 0.005, f"heard at {time:.3f} s, seen at {seen}"
    for time in clip.events[(clip.events > 2 / CLEAN.fps) & (clip.events < last)]:
        assert np.abs(seen - time).min() <= 1 / CLEAN.fps


def loudness_per_frame(clip: Clip, options: SyntheticOptions) -> np.ndarray:
    """RMS of the sound while each frame is shown: [T]."""
    per_frame = options.sample_rate // options.fps
    return np.sqrt((clip.waveform[: len(clip.frames) * per_frame].reshape(-1, per_frame) ** 2).mean(1))


def pitch_per_frame(clip: Clip, options: SyntheticOptions) -> np.ndarray:
    """Frequency of the lowest strong partial around each frame, Hz: [T]."""
    size, hop = 2048, options.sample_rate // options.fps
    padded = np.pad(clip.waveform, (size // 2 - hop // 2, size))
    pitches = []
    for k in range(len(clip.frames)):
        spectrum = np.abs(np.fft.rfft(padded[k * hop : k * hop + size] * np.hanning(size)))
        pitches.append(np.flatnonzero(spectrum > 0.25 * spectrum.max())[0] * options.sample_rate / size)
    return np.array(pitches)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


@pytest.mark.parametrize("index", range(3))
class TestSoundFollowsTheEye:
    """Each would catch a sound made from another phase, direction or sign than the picture."""

    def test_flash_beeps_while_lit(self, index: int) -> None:
        clip = render_clip("flash", index, CLEAN)
        lit, loudness = moving(clip.frames).any((1, 2)), loudness_per_frame(clip, CLEAN)
        if lit.mean() > 0.5:  # then the median shows the object, and what differs is its absence
            lit = ~lit
        inner = lit[1:-1] & lit[:-2] & lit[2:]
        outer = ~lit[1:-1] & ~lit[:-2] & ~lit[2:]
        assert inner.any() and outer.any()
        quietest, loudest = sorted((loudness[1:-1][outer].max(), loudness[1:-1][inner].min()))
        assert loudest > 20 * quietest

    def test_pulse_is_high_when_small(self, index: int) -> None:
        clip = render_clip("pulse", index, CLEAN)
        corner = clip.frames[:, :1, :1].astype(float)  # the plain background
        area = (np.abs(clip.frames - corner).sum(-1) > 40).sum((1, 2))
        pitch = pitch_per_frame(clip, CLEAN)
        assert rank_correlation(area[2:-2], pitch[2:-2]) < -0.85

    def test_slide_rises_to_the_right(self, index: int) -> None:
        clip = render_clip("slide", index, CLEAN)
        mask = moving(clip.frames)
        x, _ = centroids(mask)
        whole = (mask.sum((1, 2)) > 0.9 * np.max(mask.sum((1, 2)))) & (np.arange(len(x)) > 1) & (np.arange(len(x)) < len(x) - 2)
        assert whole.sum() > 10
        assert rank_correlation(x[whole], pitch_per_frame(clip, CLEAN)[whole]) > 0.85

    def test_orbit_swells_at_the_top(self, index: int) -> None:
        clip = render_clip("orbit", index, CLEAN)
        _, y = centroids(moving(clip.frames))
        assert np.corrcoef(y, loudness_per_frame(clip, CLEAN))[0, 1] < -0.8

    def test_pendulum_is_windy_when_fast(self, index: int) -> None:
        clip = render_clip("pendulum", index, CLEAN)
        t = np.arange(len(clip.frames)) / CLEAN.fps
        ends = np.abs(t[:, None] - clip.events).min(1)  # 0 at a turn, largest when fastest
        windy = loudness_per_frame(clip, CLEAN)[ends > 1.5 / CLEAN.fps]
        assert rank_correlation(ends[ends > 1.5 / CLEAN.fps], windy) > 0.5


def decode(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Frames, their times, sound and when the sound starts, by PyAV."""
    with av.open(str(path)) as container:
        images = list(container.decode(video=0))
    with av.open(str(path)) as container:
        blocks = list(container.decode(audio=0))
    frames = np.stack([image.to_ndarray(format="rgb24") for image in images])
    times = np.array([float(image.time) for image in images])
    return frames, times, np.concatenate([block.to_ndarray()[0] for block in blocks]), float(blocks[0].time)


@pytest.mark.parametrize(("fps", "rate"), [(16, 16000), (24, 44100)])
def test_file_keeps_picture_and_sound_in_step(tmp_path: Path, fps: int, rate: int) -> None:
    """Would catch the encoder's delay (64 ms at 16 kHz) left in the file, dropped last frames, and wrong time stamps."""
    options = replace(CLEAN, fps=fps, sample_rate=rate, seconds=(2.0, 3.0))
    clip = render_clip("bounce", 1, options)
    write_clip(tmp_path / "clip.mp4", clip, fps=fps, sample_rate=rate)
    frames, times, sound, start = decode(tmp_path / "clip.mp4")
    assert frames.shape == clip.frames.shape
    np.testing.assert_allclose(times, np.arange(len(frames)) / fps, atol=1e-4)
    assert np.abs(frames.astype(float) - clip.frames).mean() < 6
    assert start == 0
    assert len(clip.waveform) <= len(sound) < len(clip.waveform) + 2048
    size = len(clip.waveform)
    spectra = np.fft.rfft(sound[:size], 2 * size) * np.conj(np.fft.rfft(clip.waveform, 2 * size))
    assert int(np.argmax(np.fft.irfft(spectra))) == 0, "the sound is shifted"
    error = sound[:size] - clip.waveform
    assert (error**2).mean() < 0.1 * (clip.waveform**2).mean()
    heard, rendered = onsets(sound, rate), onsets(clip.waveform, rate)
    for time in rendered[(rendered > 0.1)]:
        assert np.abs(heard - time).min() <= 1 / fps


@pytest.mark.parametrize("name", CLASSES)
def test_clip_has_the_promised_form(name: str) -> None:
    """Would catch lengths that do not go together at a rate that is no multiple, overflow, and a silent or empty class."""
    options = replace(TINY, seconds=(1.0, 2.0), fps=12, sample_rate=22050)
    clip = render_clip(name, 5, options)
    count, height, width, channels = clip.frames.shape
    assert (height, width, channels, clip.frames.dtype) == (32, 48, 3, np.uint8)
    assert 12 <= count <= 24
    assert clip.waveform.shape == (round(count * 22050 / 12),) and clip.waveform.dtype == np.float32
    assert np.isfinite(clip.waveform).all() and 0.03 < np.abs(clip.waveform).max() <= 1
    assert ((clip.events >= 0) & (clip.events <= count / 12)).all()
    assert np.abs(np.diff(clip.frames.astype(int), axis=0)).max() > 60, "nothing moves"


def test_light_saturation_and_radius_shape_the_picture() -> None:
    """Would catch an option that nothing reads: the demo's difficulty rests on them."""

    def renderings(**changes: object) -> np.ndarray:
        options = replace(CLEAN, seconds=(0.5, 0.5), **changes)  # type: ignore[arg-type]
        return np.stack([render_clip("orbit", index, options).frames for index in range(20)]).astype(float)

    plain = renderings()
    assert np.ptp(renderings(saturation=0.0), axis=-1).max() <= 1 < np.ptp(plain, axis=-1).mean()
    corner = np.s_[:, :, 0, 0]  # background alone
    assert renderings(background_light=0.5)[corner].mean() == pytest.approx(0.5 * plain[corner].mean(), abs=1)
    bright = (renderings(background_light=0.2, object_light=0.5) >= 125).all(-1).mean()
    larger = (renderings(background_light=0.2, object_light=0.5, radius=(0.25, 0.3)) >= 125).all(-1).mean()
    assert (renderings(background_light=0.2, object_light=0.0) >= 125).all(-1).mean() < 0.7 * bright < 0.4 * larger


@pytest.mark.parametrize("name", CLASSES)
def test_clip_too_short_for_an_event_is_a_clip(name: str) -> None:
    """Would catch a division by the loudness of a sound that never comes."""
    for index in range(12):
        clip = render_clip(name, index, replace(TINY, seconds=(0.5, 0.5)))
        assert np.isfinite(clip.waveform).all() and len(clip.waveform) == 8000


def test_clip_depends_on_seed_class_and_index_alone() -> None:
    """Would catch a random stream that runs on from clip to clip, or that is numbered by the subset of classes."""
    clip = render_clip("slide", 7, TINY)
    render_clip("bounce", 0, TINY)
    again = render_clip("slide", 7, replace(TINY, classes=("slide",), clips_per_class=9))
    np.testing.assert_array_equal(clip.frames, again.frames)
    np.testing.assert_array_equal(clip.waveform, again.waveform)
    for other in (render_clip("slide", 8, TINY), render_clip("slide", 7, replace(TINY, seed=1)), render_clip("orbit", 7, TINY)):
        assert other.frames.shape != clip.frames.shape or np.abs(other.frames.astype(int) - clip.frames).mean() > 5
        assert not np.array_equal(other.waveform, clip.waveform)


def test_class_is_not_told_by_colour_or_loudness() -> None:
    """Would catch a class that gives itself away: the demo would then measure colour statistics, not what was learnt."""
    options = replace(TINY, seconds=(1.5, 2.0))
    colours, levels, labels = [], [], []
    for label, name in enumerate(CLASSES):
        for index in range(25):
            clip = render_clip(name, index, options)
            colours.append(clip.frames.mean((0, 1, 2)))
            levels.append([np.log((clip.waveform**2).mean())])
            labels.append(label)
    chance = 1 / len(CLASSES)
    assert cross_val_score(LinearDiscriminantAnalysis(), np.array(colours), labels, cv=5).mean() < chance + 0.1
    assert cross_val_score(LinearDiscriminantAnalysis(), np.array(levels), labels, cv=5).mean() < chance + 0.1


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_data_set_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    """Would catch encoders whose output depends on threads, and clips numbered by worker."""
    calls: list[tuple[int, int]] = []
    assert render_dataset(tmp_path / "one", TINY, progress=lambda done, total: calls.append((done, total))) == 4
    assert calls == [(done, 4) for done in range(5)]
    assert render_dataset(tmp_path / "two", TINY, workers=2) == 4
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two")
    names = {"flash/clip_000000.mp4", "flash/clip_000001.mp4", "slide/clip_000000.mp4", "slide/clip_000001.mp4"}
    assert set(one) == {"dataset.json", *names}
    assert json.loads(one["dataset.json"])["labels"] == {"flash": 0, "slide": 1}


def test_interrupted_rendering_goes_on(tmp_path: Path) -> None:
    """Would catch rendering everything again, and half-written files that stay or count as clips."""
    render_dataset(tmp_path, TINY)
    before = contents(tmp_path)
    clip_path(tmp_path, "slide", 1).unlink()
    (tmp_path / "slide" / ".clip_000001.mp4.4711.part").write_bytes(b"half a file")
    kept = clip_path(tmp_path, "slide", 0).stat()
    assert render_dataset(tmp_path, TINY) == 1
    assert contents(tmp_path) == before
    assert clip_path(tmp_path, "slide", 0).stat() == kept
    assert render_dataset(tmp_path, TINY) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 3, "fps": 16}, r"fps = 8 \(now 16\), seed = 0 \(now 3\); name another or an empty folder"),
        ({"clips_per_class": 1}, r"clips_per_class = 2 \(now 1\); name another or an empty folder"),
        ({"classes": ("slide",)}, r"classes = \['flash', 'slide'\] \(now \['slide'\]\); name another"),
    ],
)
def test_clips_of_other_options_are_not_removed_unasked(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    """Would catch a rendering that is lost by calling the command with other options."""
    render_dataset(tmp_path, TINY)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))} holds clips rendered with {words}"):
        render_dataset(tmp_path, replace(TINY, **change))
    assert contents(tmp_path) == before


def test_other_options_are_rendered_anew(tmp_path: Path) -> None:
    """Would catch old clips passed off as clips of the new options."""
    render_dataset(tmp_path / "changed", replace(TINY, seed=3))
    assert render_dataset(tmp_path / "changed", TINY, replace=True) == 4
    render_dataset(tmp_path / "fresh", TINY)
    assert contents(tmp_path / "changed") == contents(tmp_path / "fresh")


def test_change_of_options_killed_in_the_middle_leaves_no_old_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a description that is renewed before the old clips are gone: the next run would keep them."""
    render_dataset(tmp_path / "changed", replace(TINY, seed=3))

    class Killed(Exception):
        pass

    def killed_after_two(path: Path, missing_ok: bool = False) -> None:
        removed.append(path)
        if len(removed) == 3:
            raise Killed
        unlink(path, missing_ok=missing_ok)

    removed: list[Path] = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", killed_after_two)
    with pytest.raises(Killed):
        render_dataset(tmp_path / "changed", TINY, replace=True)
    monkeypatch.undo()
    render_dataset(tmp_path / "changed", TINY, replace=True)
    render_dataset(tmp_path / "fresh", TINY)
    assert contents(tmp_path / "changed") == contents(tmp_path / "fresh")


def test_fewer_clips_leave_no_surplus_and_more_keep_the_old(tmp_path: Path) -> None:
    """Would catch a data set that is larger than asked for, and clips rendered twice."""
    render_dataset(tmp_path, TINY)
    assert render_dataset(tmp_path, replace(TINY, clips_per_class=1, classes=("slide",)), replace=True) == 0
    assert set(contents(tmp_path)) == {"dataset.json", "slide/clip_000000.mp4"}
    assert render_dataset(tmp_path, TINY) == 3


def test_a_disk_that_is_full_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a traceback for a user's full disk."""

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xkd_fast.data.synthetic.dataset.write_clip", full)
    with pytest.raises(UserError, match=r"clip_000000\.mp4 failed .*No space left.*make room"):
        render_dataset(tmp_path, TINY)


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    """Would catch rendering into, or deleting from, a folder of somebody's own videos."""
    mine = tmp_path / "slide" / "clip_000000.mp4"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    with pytest.raises(UserError, match=re.escape(str(tmp_path)) + ".*dataset.json.*empty"):
        render_dataset(tmp_path, TINY)
    assert mine.read_bytes() == b"mine"
    (tmp_path / "dataset.json").write_text('{"options": 3}')
    with pytest.raises(UserError, match=r"dataset\.json is not a data set description"):
        render_dataset(tmp_path, TINY)
    assert mine.read_bytes() == b"mine"


def test_failed_write_leaves_neither_file_nor_remains(tmp_path: Path) -> None:
    """Would catch a truncated clip under its final name: resuming would keep it for ever."""
    clip = render_clip("slide", 0, replace(CLEAN, seconds=(4.0, 4.0)))
    clip.waveform[-8000:] = np.nan  # the encoder refuses it, after seconds of good sound
    with pytest.raises(av.error.FFmpegError):
        write_clip(tmp_path / "clip_000000.mp4", clip, fps=CLEAN.fps, sample_rate=CLEAN.sample_rate)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": ("slide", "sleep")}, r"'sleep'.*one of: bounce"),
        ({"classes": ("slide", "slide")}, "twice"),
        ({"classes": ()}, "classes is empty"),
        ({"seconds": (3.0, 2.0)}, r"seconds = \[3.0, 2.0\]"),
        ({"width": 47}, "width = 47 .*even"),
        ({"sample_rate": 16001}, "sample_rate = 16001 .*16000"),
        ({"clips_per_class": 0}, "clips_per_class = 0"),
        ({"distractors": 1.5}, "distractors = 1.5"),
        ({"video_noise": -0.1}, "video_noise = -0.1"),
        ({"seed": -1}, "seed = -1"),
        ({"background_light": 0.0}, r"background_light = 0\.0"),
        ({"object_light": 1.5}, r"object_light = 1\.5"),
        ({"saturation": -1.0}, r"saturation = -1\.0"),
        ({"radius": (0.2, 0.1)}, r"radius = \[0\.2, 0\.1\]"),
    ],
)
def test_wrong_options_are_named(change: dict[str, object], words: str) -> None:
    """Would catch a wrong value that goes through, or an error that does not say which value and what is allowed."""
    with pytest.raises(ValueError, match=words):
        SyntheticOptions(**change)  # type: ignore[arg-type]


def test_unknown_class_and_workers_are_named() -> None:
    """Would catch a KeyError in place of an explanation."""
    with pytest.raises(UserError, match=r"'sleep'.*bounce"):
        render_clip("sleep", 0, TINY)
    with pytest.raises(UserError, match="workers = 0"):
        render_dataset("never-made", TINY, workers=0)
    assert not Path("never-made").exists()
