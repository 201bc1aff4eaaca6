"""Labelled audio-visual events, rendered to real video files.

Eight classes of motion, each with a sound that follows from what is seen: an impact sounds at the instant it happens, pitch
follows size or place, rhythm follows motion. What does *not* tell the class is drawn at random: colours, shapes, sizes, tempo,
pitch register, loudness, background texture, noise in picture and sound, an unrelated object, an unrelated faint sound. So the
class can be learnt from either modality, but not read off an average colour, a loudness or a background.

A clip is a function of (seed, class name, index) and of the options that shape it, and of nothing else: neither the number of
workers nor the subset of classes changes it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from xkd_fast.data.workers import Outcome, require_workers, run_tasks
from xkd_fast.errors import UserError
from xkd_fast.files import write_aside
from xkd_fast.model.options import FORBID_EXTRA, option, require

CLASSES = ("bounce", "collide", "flash", "orbit", "pendulum", "pulse", "ricochet", "slide")
SHAPES = ("disc", "square", "triangle", "ring")
DATASET_FILE = "dataset.json"
RENDERER = 2  # raise whenever a clip of unchanged options would look or sound different

_CLIP_NAME = re.compile(r"^clip_\d{6}\.mp4$")
_PART_NAME = re.compile(r"^\.clip_\d{6}\.mp4\.\d+\.part$")
_SILENCE = 1e-4  # sounds are cut where their envelope falls below this


@dataclass(frozen=True)
class SyntheticOptions:
    """What the rendered data set holds and how hard it is."""

    __pydantic_config__ = FORBID_EXTRA

    clips_per_class: int = option(100, "clips rendered per class")
    classes: tuple[str, ...] = option(CLASSES, "names of the classes to render, any of: " + ", ".join(CLASSES))
    seconds: tuple[float, float] = option((4.0, 6.0), "shortest and longest clip, seconds; uniform between them")
    fps: int = option(16, "frames per second of the files")
    width: int = option(128, "frame width, pixels; even")
    height: int = option(96, "frame height, pixels; even")
    sample_rate: int = option(16000, "audio sample rate of the files, Hz; one that AAC knows")
    seed: int = option(0, "random seed; other seeds give other clips of the same classes")
    background: float = option(0.5, "contrast of the background's texture, 0-1; 0 = a plain colour")
    background_light: float = option(1.0, "light on the background, which multiplies its colours, above 0 to 1; 1 = full light")
    object_light: float = option(0.0, "smallest channel of an object's colour, share of full scale, 0-1; 0 = any colour")
    saturation: float = option(1.0, "how colourful background and objects are, 0-1; 0 = grey")
    radius: tuple[float, float] = option((0.13, 0.21), "smallest and largest radius of the main object, frame heights")
    video_noise: float = option(0.03, "standard deviation of the pixel noise, share of full scale; 0 = off")
    audio_noise: float = option(0.02, "typical RMS level of the background noise, full scale = 1; 0 = off")
    distractors: float = option(0.5, "probability of an unrelated object, and of unrelated faint sounds, in a clip; 0 = none")

    def __post_init__(self) -> None:
        require(self.clips_per_class >= 1, f"clips_per_class = {self.clips_per_class} must be 1 or more")
        require(len(self.classes) >= 1, "classes is empty; name at least one of: " + ", ".join(CLASSES))
        for name in self.classes:
            require(name in CLASSES, f"classes holds {name!r}; every class must be one of: " + ", ".join(CLASSES))
        require(len(set(self.classes)) == len(self.classes), f"classes = {list(self.classes)} names a class twice")
        low, high = self.seconds
        require(
            0.5 <= low <= high <= 600, f"seconds = {list(self.seconds)} must be two numbers, 0.5 <= shortest <= longest <= 600"
        )
        require(4 <= self.fps <= 60, f"fps = {self.fps} must lie in 4-60")
        for name in ("width", "height"):
            value = getattr(self, name)
            require(32 <= value <= 1024 and value % 2 == 0, f"{name} = {value} must be an even number of pixels in 32-1024")
        require(self.width >= self.height, f"width = {self.width} must be at least height = {self.height}")
        require(
            self.sample_rate in AAC_RATES, f"sample_rate = {self.sample_rate} must be one of {', '.join(map(str, AAC_RATES))}"
        )
        require(self.seed >= 0, f"seed = {self.seed} must be 0 or more")
        low, high = self.radius
        require(
            0.05 <= low < high <= 0.3, f"radius = {list(self.radius)} must be two numbers, 0.05 <= smallest < largest <= 0.3"
        )
        for name in ("background", "object_light", "saturation", "distractors"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} = {value} must lie in 0-1")
        require(0 < self.background_light <= 1, f"background_light = {self.background_light} must lie above 0, up to 1")
        require(0 <= self.video_noise <= 0.5, f"video_noise = {self.video_noise} must lie in 0-0.5")
        require(0 <= self.audio_noise <= 0.5, f"audio_noise = {self.audio_noise} must lie in 0-0.5")


AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


@dataclass(frozen=True)
class Clip:
    """A rendered clip: picture, sound and when things happen."""

    frames: np.ndarray  # [T, H, W, 3] uint8 RGB; frame k shows the instant k / fps
    waveform: np.ndarray  # [samples] float32 in [-1, 1]; samples = round(T · sample_rate / fps)
    events: np.ndarray  # [n] float64 seconds: impacts, turning points or onsets; empty where a class has none


@dataclass
class _Scene:
    """What is drawn at random before a class gets its say. Lengths are in frame heights, times in seconds."""

    rng: np.random.Generator
    options: SyntheticOptions
    frame_times: np.ndarray  # [T]
    sample_times: np.ndarray  # [samples]
    size: float  # radius of the main object
    register: float  # 0 (largest object, lowest pitch) … 1 (smallest, highest), with a little jitter

    @property
    def aspect(self) -> float:
        return self.options.width / self.options.height

    @property
    def seconds(self) -> float:
        return len(self.frame_times) / self.options.fps

    def pitch(self, low: float, high: float) -> float:
        """A frequency in Hz from the size of the object: small is high."""
        return low * (high / low) ** self.register


@dataclass
class _Motion:
    """One object over time; ``size`` 0 hides it."""

    x: np.ndarray  # [T] centre, frame heights from the left edge
    y: np.ndarray  # [T] centre, frame heights from the top edge
    size: np.ndarray  # [T] radius, frame heights


@dataclass
class _Line:
    """Part of the scene's apparatus, which may move: a straight bar between two points, in frame heights."""

    x0: np.ndarray | float  # [T] or one place for the whole clip
    y0: np.ndarray | float
    x1: np.ndarray | float
    y1: np.ndarray | float


@dataclass
class _Circle:
    """Part of the scene's apparatus: a round track, in frame heights."""

    x: float
    y: float
    radius: float


@dataclass
class _Event:
    """What a class renders: its objects, its sound, its instants, and what the objects hang from, roll on or run in."""

    objects: list[_Motion]
    sound: np.ndarray  # [samples] float, any scale
    times: np.ndarray  # [n] seconds
    apparatus: list[_Line | _Circle] = field(default_factory=list)


# --------------------------------------------------------------------------------------------------------------- sounds


def _add_at(sound: np.ndarray, times: np.ndarray, grain: np.ndarray, gains: np.ndarray, rate: int) -> None:
    """Add ``grain`` to ``sound`` starting at each of ``times``."""
    for time, gain in zip(times, gains, strict=True):
        start = round(time * rate)
        if 0 <= start < len(sound):
            stop = min(start + len(grain), len(sound))
            sound[start:stop] += gain * grain[: stop - start]


def _decay(rate: int, seconds: float) -> np.ndarray:
    """Times of a grain that decays with the time constant ``seconds``, to inaudible."""
    return np.arange(max(1, round(rate * seconds * -math.log(_SILENCE)))) / rate


def _ramp(gain: np.ndarray, rate: int, seconds: float = 0.004) -> np.ndarray:
    """Smooth the steps of an envelope by a moving average that looks back only, so that no sound precedes its cause."""
    width = max(1, round(rate * seconds))
    total = np.cumsum(np.concatenate([np.zeros(width), gain]))
    return (total[width:] - total[:-width]) / width


def _tone(frequency: np.ndarray, rate: int, partials: np.ndarray) -> np.ndarray:
    """A harmonic tone of time-varying ``frequency`` [samples] Hz; partials above 0.45 of the rate are left out."""
    phase = 2 * np.pi * np.cumsum(frequency) / rate
    tone = np.zeros_like(phase)
    for number, amplitude in enumerate(partials, start=1):
        if number * frequency.max() < 0.45 * rate:
            tone += amplitude * np.sin(number * phase)
    return tone


def _partials(rng: np.random.Generator) -> np.ndarray:
    """Amplitudes of 1 to 4 harmonics: a random timbre, drawn alike by every class that sings."""
    count = int(rng.integers(1, 5))
    return rng.uniform(0.3, 1.0, count) * rng.uniform(0.3, 0.8) ** np.arange(count)


def _thud(scene: _Scene) -> np.ndarray:
    rate, rng = scene.options.sample_rate, scene.rng
    t = _decay(rate, rng.uniform(0.04, 0.09))
    decay = len(t) / rate / -math.log(_SILENCE)
    frequency = scene.pitch(110, 320) * (1 + 0.8 * np.exp(-t / 0.02))
    knock = rng.normal(size=len(t)) * np.exp(-t / 0.004)
    return np.exp(-t / decay) * np.cos(2 * np.pi * np.cumsum(frequency) / rate) + 0.3 * knock


def _click(scene: _Scene) -> np.ndarray:
    rate, rng = scene.options.sample_rate, scene.rng
    t = _decay(rate, rng.uniform(0.006, 0.015))
    decay = len(t) / rate / -math.log(_SILENCE)
    frequency = min(scene.pitch(1200, 4200), 0.4 * rate)
    return np.exp(-t / decay) * (np.cos(2 * np.pi * frequency * t) + 0.7 * rng.normal(size=len(t)))


def _ping(scene: _Scene) -> np.ndarray:
    """Metal: partials of a free bar, which are in no harmonic ratio, the higher ones shorter."""
    rate, rng = scene.options.sample_rate, scene.rng
    t = _decay(rate, rng.uniform(0.07, 0.16))
    decay = len(t) / rate / -math.log(_SILENCE)
    base, ping = scene.pitch(500, 1500), np.zeros(len(t))
    for ratio, amplitude in ((1.0, 1.0), (2.756, 0.7), (5.404, 0.45)):
        if base * ratio < 0.45 * rate:
            ping += amplitude * np.exp(-t * ratio**0.5 / decay) * np.cos(2 * np.pi * base * ratio * t)
    return ping


def _coloured_noise(rng: np.random.Generator, samples: int, exponent: float) -> np.ndarray:
    """Noise of unit RMS whose power falls as frequency^-exponent (0 white, 1 pink, 2 brown)."""
    spectrum = np.fft.rfft(rng.normal(size=samples))
    ramp = np.maximum(np.arange(len(spectrum)), 20.0 * samples / 16000)  # flat below ~20 Hz at 16 kHz
    noise = np.fft.irfft(spectrum * ramp ** (-exponent / 2), n=samples)
    return noise / max(float(np.sqrt(np.mean(noise**2))), 1e-12)


# -------------------------------------------------------------------------------------------------------------- classes


def _contacts(phase: float, period: float, seconds: float) -> np.ndarray:
    """The instants k·period − phase·period inside the clip."""
    first = math.ceil(phase)
    return (np.arange(first, math.floor(seconds / period + phase) + 1) - phase) * period


def _impacts(scene: _Scene, times: np.ndarray, grain: np.ndarray) -> np.ndarray:
    sound = np.zeros(len(scene.sample_times))
    _add_at(sound, times, grain, scene.rng.uniform(0.8, 1.0, len(times)), scene.options.sample_rate)
    return sound


def _bounce(scene: _Scene) -> _Event:
    """A ball under gravity; a thud at each contact with the floor, lower for a larger ball."""
    rng, t = scene.rng, scene.frame_times
    period, phase = rng.uniform(0.5, 0.95), rng.uniform()
    floor = rng.uniform(0.65, 0.94)
    height = rng.uniform(0.45, 0.95) * (floor - 2 * scene.size)
    u = (t / period + phase) % 1.0
    sway = rng.uniform(0.0, 0.2) * np.sin(2 * np.pi * (t * rng.uniform(0.1, 0.3) + rng.uniform()))
    x = rng.uniform(0.4, scene.aspect - 0.4) + sway
    y = floor - scene.size - 4 * height * u * (1 - u)
    times = _contacts(phase, period, scene.seconds)
    ground = _Line(-1.0, floor + 0.02, 9.0, floor + 0.02)
    return _Event([_Motion(x, y, np.full(len(t), scene.size))], _impacts(scene, times, _thud(scene)), times, [ground])


def _fold(position: np.ndarray, low: float, high: float) -> np.ndarray:
    """Reflect a straight path between two walls."""
    span = high - low
    u = (position - low) % (2 * span)
    return low + np.where(u > span, 2 * span - u, u)


def _ricochet(scene: _Scene) -> _Event:
    """A ball at constant speed between the frame's four walls; a click at each contact."""
    rng, t = scene.rng, scene.frame_times
    times: list[np.ndarray] = []
    paths = []
    wall = rng.uniform(0.03, 0.09)
    for extent in (scene.aspect, 1.0):
        low, high = wall + scene.size, extent - wall - scene.size
        speed = rng.uniform(0.5, 1.0) * rng.choice((-1.0, 1.0))
        start = rng.uniform(low, high)
        paths.append(_fold(start + speed * t, low, high))
        walls = (start + speed * np.array([0.0, scene.seconds]) - low) / (high - low)
        crossed = np.arange(math.ceil(walls.min()), math.floor(walls.max()) + 1)
        times.append((low + crossed * (high - low) - start) / speed)
    instants = np.sort(np.concatenate(times))
    motion = _Motion(paths[0], paths[1], np.full(len(t), scene.size))
    left, right, top, bottom = wall - 0.02, scene.aspect - wall + 0.02, wall - 0.02, 1.02 - wall
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    walls_drawn: list[_Line | _Circle] = [_Line(*a, *b) for a, b in pairwise(corners)]
    return _Event([motion], _impacts(scene, instants, _click(scene)), instants, walls_drawn)


def _flash(scene: _Scene) -> _Event:
    """An object that blinks; a beep while it is lit, higher for a smaller object."""
    rng, rate = scene.rng, scene.options.sample_rate
    period, phase, duty = rng.uniform(0.45, 1.0), rng.uniform(), rng.uniform(0.35, 0.6)
    x, y = _place(scene)
    lit = (scene.frame_times / period + phase) % 1.0 < duty
    sounding = (scene.sample_times / period + phase) % 1.0 < duty
    tone = _tone(np.full(len(sounding), scene.pitch(250, 1000)), rate, _partials(rng))
    n = len(scene.frame_times)
    motion = _Motion(np.full(n, x), np.full(n, y), np.where(lit, scene.size, 0.0))
    return _Event([motion], tone * _ramp(sounding.astype(float), rate), _contacts(phase, period, scene.seconds))


def _pulse(scene: _Scene) -> _Event:
    """An object that grows and shrinks; the pitch of its tone glides inversely with its size."""
    rng = scene.rng
    frequency, phase, depth = rng.uniform(0.5, 1.2), rng.uniform(), rng.uniform(0.4, 0.55)
    x, y = _place(scene)

    def size(t: np.ndarray) -> np.ndarray:
        return scene.size * (1 + depth * np.sin(2 * np.pi * (t * frequency + phase)))

    pitch = scene.pitch(250, 1000) * scene.size / size(scene.sample_times)
    n = len(scene.frame_times)
    motion = _Motion(np.full(n, x), np.full(n, y), size(scene.frame_times))
    return _Event([motion], _tone(pitch, scene.options.sample_rate, _partials(rng)), np.empty(0))


def _orbit(scene: _Scene) -> _Event:
    """An object on a circle; a hum that swells and rises a little toward the top of the circle."""
    rng = scene.rng
    frequency = rng.uniform(0.5, 1.1) * rng.choice((-1.0, 1.0))
    phase, radius = rng.uniform(), rng.uniform(0.24, 0.36)
    cx = rng.uniform(radius + scene.size, scene.aspect - radius - scene.size)
    cy = rng.uniform(min(0.45, radius + scene.size), max(0.55, 1 - radius - scene.size))
    angle = 2 * np.pi * (scene.frame_times * frequency + phase)
    height = np.sin(2 * np.pi * (scene.sample_times * frequency + phase))  # -1 bottom … 1 top
    tone = _tone(scene.pitch(250, 1000) * 2 ** (0.12 * height), scene.options.sample_rate, _partials(rng))
    n = len(scene.frame_times)
    motion = _Motion(cx + radius * np.cos(angle), cy - radius * np.sin(angle), np.full(n, scene.size))
    return _Event([motion], tone * (0.52 + 0.48 * height) ** 1.5, np.empty(0), [_Circle(cx, cy, radius)])


def _pendulum(scene: _Scene) -> _Event:
    """A bob that swings below a pivot; wind that follows its speed, a tick where it turns."""
    rng, rate = scene.rng, scene.options.sample_rate
    period, phase = rng.uniform(1.1, 2.0), rng.uniform()
    length, swing = rng.uniform(0.55, 0.7), math.radians(rng.uniform(40, 65))
    px, py = rng.uniform(0.5, scene.aspect - 0.5), rng.uniform(0.1, 0.25)
    angle = swing * np.cos(2 * np.pi * (scene.frame_times / period + phase))
    speed = np.abs(np.sin(2 * np.pi * (scene.sample_times / period + phase)))  # 0 at the ends … 1 at the bottom
    n = len(scene.sample_times)
    # White noise carried by a tone that rises with the speed: a whoosh around that pitch, a few hundred hertz wide.
    narrow = _coloured_noise(rng, n, 2.0)
    phase_of_carrier = 2 * np.pi * np.cumsum(scene.pitch(400, 1000) * (0.5 + speed)) / rate
    whoosh = narrow * np.cos(phase_of_carrier) * speed**2
    times = _contacts(2 * phase, period / 2, scene.seconds)
    tick = _click(scene)
    sound = 0.25 * whoosh + 0.8 * _impacts(scene, times, tick)
    x, y = px + length * np.sin(angle), py + length * np.cos(angle)
    beam = _Line(px - 0.3, py, px + 0.3, py)
    return _Event([_Motion(x, y, np.full(len(angle), scene.size))], sound, times, [beam, _Line(px, py, x, y)])


def _slide(scene: _Scene) -> _Event:
    """An object on rails that crosses the frame and comes back in on the other side; its pitch follows its place."""
    rng = scene.rng
    crossing, phase = rng.uniform(1.0, 2.0), rng.uniform()
    direction = rng.choice((-1.0, 1.0))
    y = rng.uniform(scene.size + 0.05, 0.95 - scene.size)

    def place(t: np.ndarray) -> np.ndarray:
        return (direction * t / crossing + phase) % 1.0  # 0 just out of sight on the left … 1 on the right

    span = scene.aspect + 2 * scene.size
    octaves = rng.uniform(1.0, 1.6)
    pitch = scene.pitch(250, 1000) * 2 ** (octaves * (place(scene.sample_times) - 0.5))
    n = len(scene.frame_times)
    motion = _Motion(place(scene.frame_times) * span - scene.size, np.full(n, y), np.full(n, scene.size))
    wraps = _contacts(phase if direction > 0 else 1 - phase, crossing, scene.seconds)
    gap = scene.size + 0.03
    rails: list[_Line | _Circle] = [_Line(-1.0, y + side * gap, 9.0, y + side * gap) for side in (-1, 1)]
    return _Event([motion], _tone(pitch, scene.options.sample_rate, _partials(rng)), wraps, rails)


def _collide(scene: _Scene) -> _Event:
    """Two objects that meet, part and come again; a metallic ping at each contact."""
    rng, t = scene.rng, scene.frame_times
    period, phase = rng.uniform(0.75, 1.5), rng.uniform()
    tilt = math.radians(rng.uniform(-30, 30))
    other = scene.size * rng.uniform(0.8, 1.2)
    cx, cy = scene.aspect / 2 + rng.uniform(-0.12, 0.12), 0.5 + rng.uniform(-0.25, 0.25)
    apart = rng.uniform(0.25, 0.4) * np.abs(((t / period + phase + 0.5) % 1.0) - 0.5) * 2  # 0 at contact
    objects = []
    for side, size in ((-1.0, scene.size), (1.0, other)):
        distance = side * (apart + size)
        objects.append(_Motion(cx + distance * math.cos(tilt), cy + distance * math.sin(tilt), np.full(len(t), size)))
    times = _contacts(phase, period, scene.seconds)
    return _Event(objects, _impacts(scene, times, _ping(scene)), times)


_RENDERERS: dict[str, Callable[[_Scene], _Event]] = {
    "bounce": _bounce,
    "collide": _collide,
    "flash": _flash,
    "orbit": _orbit,
    "pendulum": _pendulum,
    "pulse": _pulse,
    "ricochet": _ricochet,
    "slide": _slide,
}


def _place(scene: _Scene) -> tuple[float, float]:
    """A random place for an object that stays where it is."""
    margin = 1.3 * scene.size
    return scene.rng.uniform(margin, scene.aspect - margin), scene.rng.uniform(margin, 1 - margin)


# -------------------------------------------------------------------------------------------------------------- picture


def _background(rng: np.random.Generator, options: SyntheticOptions) -> np.ndarray:
    """A texture between two random colours: gradient, stripes, smooth noise or checks. [H, W, 3] float, 0–1."""
    h, w = options.height, options.width
    y, x = np.mgrid[0:h, 0:w].astype(np.float32) / h
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = -x * np.sin(angle) + y * np.cos(angle)
    kind, waves = int(rng.integers(4)), rng.uniform(2, 8)
    if kind == 0:
        texture = (along - along.min()) / (along.max() - along.min())
    elif kind == 1:
        texture = 0.5 + 0.5 * np.sin(2 * np.pi * (waves * along + rng.uniform()))
    elif kind == 2:
        texture = _smooth_noise(rng, x * waves, y * waves)
    else:
        texture = 0.5 + 0.5 * np.tanh(4 * np.sin(2 * np.pi * waves / 2 * along) * np.sin(2 * np.pi * waves / 2 * across))
    first = rng.uniform(0.15, 0.85, 3)
    second = first + options.background * (rng.uniform(0.1, 0.9, 3) - first)
    return options.background_light * _muted(first + (second - first) * texture[..., None], options.saturation)


def _muted(colour: np.ndarray, saturation: float) -> np.ndarray:
    """Colours [..., 3] drawn toward the grey of their mean."""
    grey = colour.mean(-1, keepdims=True)
    return grey + saturation * (colour - grey)


def _smooth_noise(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Random values on a unit lattice, interpolated smoothly."""
    lattice = rng.uniform(size=(int(y.max()) + 2, int(x.max()) + 2)).astype(np.float32)
    column, row = x.astype(int), y.astype(int)
    u, v = x - column, y - row
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    top = lattice[row, column] * (1 - u) + lattice[row, column + 1] * u
    bottom = lattice[row + 1, column] * (1 - u) + lattice[row + 1, column + 1] * u
    return top * (1 - v) + bottom * v


def _coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray, turn: float) -> np.ndarray:
    """Antialiased coverage, 0–1, of a shape of ``radius`` pixels at pixel offsets (x, y) from its centre."""
    if shape in ("square", "triangle"):
        x, y = x * math.cos(turn) + y * math.sin(turn), -x * math.sin(turn) + y * math.cos(turn)
    if shape == "disc":
        distance = np.sqrt(x * x + y * y) - radius
    elif shape == "ring":
        distance = np.abs(np.sqrt(x * x + y * y) - 0.72 * radius) - 0.28 * radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius
    else:
        slope = math.sqrt(3) / 2
        distance = np.maximum(np.maximum(slope * x - 0.5 * y, -slope * x - 0.5 * y), y) - 0.6 * radius
    return np.clip(0.5 - distance, 0, 1) * (radius > 0)


def _draw(frames: np.ndarray, motion: _Motion, shape: str, colour: np.ndarray, turn: float) -> None:
    """Paint an object onto frames [T, H, W, 3] float32 (0–255), in place."""
    _, h, w, _ = frames.shape
    cx, cy, radius = motion.x * h - 0.5, motion.y * h - 0.5, motion.size * h
    half = math.ceil(float(radius.max()) * 1.25) + 2
    left, top = np.floor(cx).astype(int) - half, np.floor(cy).astype(int) - half
    offsets = np.arange(2 * half + 2, dtype=np.float32)
    x = (left - cx).astype(np.float32)[:, None, None] + offsets[None, None, :]
    y = (top - cy).astype(np.float32)[:, None, None] + offsets[None, :, None]
    alpha = _coverage(shape, x, y, radius.astype(np.float32)[:, None, None], turn)[..., None]
    paint = colour.astype(np.float32) * 255
    for k in range(len(frames)):
        x0, y0 = max(left[k], 0), max(top[k], 0)
        x1, y1 = min(left[k] + len(offsets), w), min(top[k] + len(offsets), h)
        if radius[k] > 0 and x0 < x1 and y0 < y1:
            cover = alpha[k, y0 - top[k] : y1 - top[k], x0 - left[k] : x1 - left[k]]
            patch = frames[k, y0:y1, x0:x1]
            patch += cover * (paint - patch)


def _draw_apparatus(frames: np.ndarray, parts: Sequence[_Line | _Circle], colour: np.ndarray, thickness: float) -> None:
    """Paint bars and tracks onto frames [T, H, W, 3] float32 (0–255), in place; ``thickness`` in frame heights."""
    _, h, w, _ = frames.shape
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    paint = colour.astype(np.float32) * 255
    for part in parts:
        if isinstance(part, _Circle):
            distance = np.abs(np.hypot(x + 0.5 - part.x * h, y + 0.5 - part.y * h) - part.radius * h)[None]
        else:
            ends = (np.asarray(place, np.float32).reshape(-1, 1, 1) * h - 0.5 for place in (part.x0, part.y0, part.x1, part.y1))
            x0, y0, x1, y1 = ends
            dx, dy = x1 - x0, y1 - y0
            along = np.clip(((x - x0) * dx + (y - y0) * dy) / np.maximum(dx * dx + dy * dy, 1e-6), 0, 1)
            distance = np.hypot(x - x0 - along * dx, y - y0 - along * dy)
        cover = np.clip(0.5 + thickness * h / 2 - distance, 0, 1)[..., None]
        frames += cover * (paint - frames)


def _contrasting_colour(rng: np.random.Generator, background: np.ndarray, saturation: float) -> np.ndarray:
    """A random colour that can be told from the background's mean: of several draws the farthest."""
    draws = _muted(rng.uniform(0, 1, (6, 3)), saturation)
    return draws[np.argmax(np.abs(draws - background.mean((0, 1))).sum(1))]


def _distractor(scene: _Scene) -> _Motion:
    """An unrelated object: smaller, silent; still, or drifting slowly."""
    rng, t = scene.rng, scene.frame_times
    size = rng.uniform(0.05, 0.1)
    speed = rng.uniform(-0.15, 0.15, 2) * rng.integers(2)
    x = _fold(rng.uniform(0, scene.aspect) + speed[0] * t, size, scene.aspect - size)
    y = _fold(rng.uniform(0, 1) + speed[1] * t, size, 1 - size)
    return _Motion(x, y, np.full(len(t), size))


def _render_frames(scene: _Scene, event: _Event) -> np.ndarray:
    rng, options = scene.rng, scene.options
    background = _background(rng, options)
    count, h, w = len(scene.frame_times), options.height, options.width
    frames = np.empty((count, h, w, 3), np.float32)
    thickness, fixture_colour = rng.uniform(0.025, 0.045), _contrasting_colour(rng, background, options.saturation)
    moving = [part for part in event.apparatus if isinstance(part, _Line) and isinstance(part.x1, np.ndarray)]
    still = [part for part in event.apparatus if not any(part is other for other in moving)]
    scenery = background.astype(np.float32)[None] * 255
    _draw_apparatus(scenery, still, fixture_colour, thickness)
    frames[:] = scenery
    if rng.uniform() < options.distractors:
        colour = _muted(rng.uniform(0, 1, 3), options.saturation)
        _draw(frames, _distractor(scene), str(rng.choice(SHAPES)), colour, rng.uniform(0, 2 * np.pi))
    _draw_apparatus(frames, moving, fixture_colour, thickness)
    for motion in event.objects:
        colour = options.object_light + (1 - options.object_light) * _contrasting_colour(rng, background, options.saturation)
        _draw(frames, motion, str(rng.choice(SHAPES)), colour, rng.uniform(0, 2 * np.pi))
    if options.video_noise > 0:
        # One tile of noise, cut out at another place for every frame: a tenth of the time of fresh noise.
        tile = rng.normal(0, 255 * options.video_noise, (h + 64, w + 64, 3)).astype(np.float32)
        for k, (dy, dx) in enumerate(rng.integers(0, 65, (count, 2))):
            frames[k] += tile[dy : dy + h, dx : dx + w]
    np.clip(frames, 0, 255, out=frames)
    return np.rint(frames, out=frames).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------- sound


def _faint_sounds(scene: _Scene) -> np.ndarray:
    """One to three unrelated sounds at random instants: a beep, a chirp or a burst of noise."""
    rng, rate = scene.rng, scene.options.sample_rate
    sound = np.zeros(len(scene.sample_times))
    for _ in range(int(rng.integers(1, 4))):
        t = np.arange(round(rate * rng.uniform(0.05, 0.4))) / rate
        kind, start, stop = int(rng.integers(3)), *rng.uniform(200, 3000, 2)
        if kind == 2:
            grain = rng.normal(size=len(t))
        else:
            frequency = np.linspace(start, stop if kind else start, len(t))
            grain = np.sin(2 * np.pi * np.cumsum(frequency) / rate)
        grain *= np.sin(np.pi * (np.arange(len(t)) + 0.5) / len(t)) ** 2
        _add_at(sound, rng.uniform(0, scene.seconds, 1), grain, np.ones(1), rate)
    return sound


def _render_sound(scene: _Scene, event: _Event) -> np.ndarray:
    rng, options = scene.rng, scene.options
    # A random RMS level: at a random peak, loudness alone would tell hums from clicks.
    level = 10 ** (-rng.uniform(20, 34) / 20)
    sound = event.sound * (level / max(float(np.sqrt(np.mean(event.sound**2))), 1e-9))
    sound *= min(1.0, 0.9 / max(float(np.abs(sound).max()), 1e-9))  # a short clip may hold no impact
    peak = float(np.abs(sound).max())
    if rng.uniform() < options.distractors:
        sound = sound + rng.uniform(0.05, 0.2) * peak * _faint_sounds(scene)
    noise = _coloured_noise(rng, len(sound), rng.uniform(0, 2)) * 2 ** rng.uniform(-1.5, 1)
    return np.clip(sound + options.audio_noise * noise, -1, 1).astype(np.float32)


def render_clip(class_name: str, index: int, options: SyntheticOptions) -> Clip:
    """Render one clip in memory.

    Args:
        class_name: one of ``CLASSES``.
        index: number of the clip within its class, 0 or more.
        options: sizes, rates, seed and difficulty; ``clips_per_class`` and ``classes`` have no influence.

    Returns:
        Clip: frames [T, H, W, 3] uint8, waveform [samples] float32, event times in seconds.

    Raises:
        UserError: unknown class name.
    """
    if class_name not in CLASSES:
        raise UserError(f"class {class_name!r} is not one of: {', '.join(CLASSES)}")
    rng = np.random.default_rng([options.seed, CLASSES.index(class_name), index])
    frames = round(rng.uniform(*options.seconds) * options.fps)
    low, high = options.radius
    size = rng.uniform(low, high)
    scene = _Scene(
        rng=rng,
        options=options,
        frame_times=np.arange(frames) / options.fps,
        sample_times=np.arange(round(frames * options.sample_rate / options.fps)) / options.sample_rate,
        size=size,
        register=float(np.clip((high - size) / (high - low) + rng.normal(0, 0.08), 0, 1)),
    )
    event = _RENDERERS[class_name](scene)
    return Clip(_render_frames(scene, event), _render_sound(scene, event), np.asarray(event.times, np.float64))


# ---------------------------------------------------------------------------------------------------------------- files


# With pixel noise a clip of 95 frames takes 0.05 s to encode so, against 0.13 s at x264's "veryfast" and crf 20.
_H264 = {"preset": "superfast", "crf": "24", "threads": "1"}


def write_clip(path: str | os.PathLike[str], clip: Clip, *, fps: int, sample_rate: int) -> None:
    """Write a clip as H.264 and AAC in an MP4 file; sound and picture start together.

    Args:
        path: the file; it appears only when it is complete.
        clip: frames [T, H, W, 3] uint8 and waveform [samples] float32.
        fps: frames per second.
        sample_rate: audio samples per second.
    """
    import av

    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    _, height, width, _ = clip.frames.shape
    try:
        with av.open(str(part), "w", format="mp4") as container:
            video: Any = container.add_stream("libx264", rate=fps, options=_H264)
            video.width, video.height, video.pix_fmt = width, height, "yuv420p"
            audio: Any = container.add_stream("aac", rate=sample_rate, layout="mono", options={"aac_coder": "fast"})
            audio.bit_rate = 64000
            for second in range(math.ceil(len(clip.frames) / fps)):  # interleaved a second at a time
                for image in clip.frames[second * fps : (second + 1) * fps]:
                    container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                start = second * sample_rate
                sound = clip.waveform[start : start + sample_rate]
                if len(sound):
                    block = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound)[None], format="fltp", layout="mono")
                    block.sample_rate, block.pts = sample_rate, start
                    container.mux(audio.encode(block))
            container.mux(video.encode(None))
            container.mux(audio.encode(None))
        with open(part, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def render_file(task: tuple[str, str, int, SyntheticOptions]) -> None:
    """Render one clip to a file; the task is (path, class name, index, options). Runs in a worker process."""
    path, class_name, index, options = task
    write_clip(path, render_clip(class_name, index, options), fps=options.fps, sample_rate=options.sample_rate)


def clip_path(root: str | os.PathLike[str], class_name: str, index: int) -> Path:
    """Where ``render_dataset`` puts a clip."""
    return Path(root) / class_name / f"clip_{index:06d}.mp4"


def _description(options: SyntheticOptions) -> dict[str, Any]:
    described = {
        "renderer": RENDERER,
        "options": asdict(options),
        "labels": {name: i for i, name in enumerate(sorted(options.classes))},
    }
    return json.loads(json.dumps(described))


def _same_clips(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two descriptions give the same clip for the same class and index."""

    def shaping(description: dict[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in description.get("options", {}).items() if k not in ("clips_per_class", "classes")}
        return {"renderer": description.get("renderer"), **kept}

    return shaping(first) == shaping(second)


def _read_description(root: Path) -> dict[str, Any] | None:
    path = root / DATASET_FILE
    if not path.exists():
        if root.exists() and any(not p.name.startswith(".") for p in root.iterdir()):
            raise UserError(
                f"{root} holds files but no {DATASET_FILE}, so it was not rendered by xkd-fast; choose an empty folder"
            )
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(stored, dict) and isinstance(stored["options"], dict)
        return stored
    except (ValueError, KeyError, AssertionError) as error:
        raise UserError(
            f"{path} is not a data set description ({error}); choose an empty folder, or delete this one"
        ) from error


def _written_files(root: Path) -> Iterator[Path]:
    """Files in ``root`` that a renderer wrote: clips and leftovers of interrupted writes."""
    for name in CLASSES:
        if (root / name).is_dir():
            yield from (p for p in (root / name).iterdir() if _CLIP_NAME.match(p.name) or _PART_NAME.match(p.name))


def render_dataset(
    root: str | os.PathLike[str],
    options: SyntheticOptions,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Render a data set of class folders: ``root/CLASS/clip_000000.mp4`` and ``root/dataset.json``.

    Complete files of the same options are kept, so an interrupted rendering goes on where it stopped. Clips of other options
    are removed and rendered anew; surplus clips (fewer classes or clips than before) are removed.

    Args:
        root: folder to write; made where missing. It must be empty or hold a rendered data set.
        options: what to render.
        workers: processes; 1 renders in this process. The clips are the same for any number.
        progress: called with (clips done, clips in all), the clips that were there already included.

    Returns:
        Number of clips rendered now.

    Raises:
        UserError: ``root`` holds something else, or ``workers`` is below 1.
    """
    require_workers(workers)
    root = Path(root)
    wanted, stored = _description(options), _read_description(root)
    planned = {
        clip_path(root, name, index): (name, index)
        for index in range(options.clips_per_class)
        for name in sorted(options.classes)
    }
    keep = planned if stored is not None and _same_clips(stored, wanted) else {}
    for path in _written_files(root):  # before the description changes, so that an old clip never passes for a new one
        if path not in keep:
            path.unlink()
    for name in set(CLASSES) - set(options.classes):
        if (root / name).is_dir() and not any((root / name).iterdir()):
            (root / name).rmdir()
    if stored != wanted:
        root.mkdir(parents=True, exist_ok=True)
        write_aside(root / DATASET_FILE, (json.dumps(wanted, indent=2) + "\n").encode())
    for name in options.classes:
        (root / name).mkdir(exist_ok=True)
    tasks = [(str(path), name, index, options) for path, (name, index) in planned.items() if not path.exists()]
    present = len(planned) - len(tasks)
    if progress is not None:
        progress(present, len(planned))
    for count, outcome in enumerate(_outcomes(tasks, workers), start=1):
        if outcome.failure is not None:
            raise RuntimeError(f"rendering {tasks[outcome.index][0]} failed ({outcome.failure}): {outcome.detail}")
        if progress is not None:
            progress(present + count, len(planned))
    return len(tasks)


def _outcomes(tasks: list[tuple[str, str, int, SyntheticOptions]], workers: int) -> Iterator[Outcome]:
    if workers == 1:
        for index, task in enumerate(tasks):
            render_file(task)
            yield Outcome(index)
    else:
        yield from run_tasks("xkd_fast.data.synthetic:render_file", tasks, workers=workers, seconds=300.0)
