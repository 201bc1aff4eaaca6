"""The eight classes: how each moves, and the sound that follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from xkd_fast.data.synthetic.scene import Circle, Event, Line, Motion, Scene, fold
from xkd_fast.data.synthetic.sounds import add_at, click, coloured_noise, partials, ping, ramp, thud, tone


def _contacts(phase: float, period: float, seconds: float) -> np.ndarray:
    """The instants k·period − phase·period inside the clip."""
    first = math.ceil(phase)
    return (np.arange(first, math.floor(seconds / period + phase) + 1) - phase) * period


def _impacts(scene: Scene, times: np.ndarray, grain: np.ndarray) -> np.ndarray:
    sound = np.zeros(len(scene.sample_times))
    add_at(sound, times, grain, scene.rng.uniform(0.8, 1.0, len(times)), scene.options.sample_rate)
    return sound


def _bounce(scene: Scene) -> Event:
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
    ground = Line(-1.0, floor + 0.02, 9.0, floor + 0.02)
    return Event([Motion(x, y, np.full(len(t), scene.size))], _impacts(scene, times, thud(scene)), times, [ground])


def _ricochet(scene: Scene) -> Event:
    """A ball at constant speed between the frame's four walls; a click at each contact."""
    rng, t = scene.rng, scene.frame_times
    times: list[np.ndarray] = []
    paths = []
    wall = rng.uniform(0.03, 0.09)
    for extent in (scene.aspect, 1.0):
        low, high = wall + scene.size, extent - wall - scene.size
        speed = rng.uniform(0.5, 1.0) * rng.choice((-1.0, 1.0))
        start = rng.uniform(low, high)
        paths.append(fold(start + speed * t, low, high))
        walls = (start + speed * np.array([0.0, scene.seconds]) - low) / (high - low)
        crossed = np.arange(math.ceil(walls.min()), math.floor(walls.max()) + 1)
        times.append((low + crossed * (high - low) - start) / speed)
    instants = np.sort(np.concatenate(times))
    motion = Motion(paths[0], paths[1], np.full(len(t), scene.size))
    left, right, top, bottom = wall - 0.02, scene.aspect - wall + 0.02, wall - 0.02, 1.02 - wall
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    walls_drawn: list[Line | Circle] = [Line(*a, *b) for a, b in pairwise(corners)]
    return Event([motion], _impacts(scene, instants, click(scene)), instants, walls_drawn)


def _flash(scene: Scene) -> Event:
    """An object that blinks; a beep while it is lit, higher for a smaller object."""
    rng, rate = scene.rng, scene.options.sample_rate
    period, phase, duty = rng.uniform(0.45, 1.0), rng.uniform(), rng.uniform(0.35, 0.6)
    x, y = _place(scene)
    lit = (scene.frame_times / period + phase) % 1.0 < duty
    sounding = (scene.sample_times / period + phase) % 1.0 < duty
    song = tone(np.full(len(sounding), scene.pitch(250, 1000)), rate, partials(rng))
    n = len(scene.frame_times)
    motion = Motion(np.full(n, x), np.full(n, y), np.where(lit, scene.size, 0.0))
    return Event([motion], song * ramp(sounding.astype(float), rate), _contacts(phase, period, scene.seconds))


def _pulse(scene: Scene) -> Event:
    """An object that grows and shrinks; the pitch of its tone glides inversely with its size."""
    rng = scene.rng
    frequency, phase, depth = rng.uniform(0.5, 1.2), rng.uniform(), rng.uniform(0.4, 0.55)
    x, y = _place(scene)

    def size(t: np.ndarray) -> np.ndarray:
        return scene.size * (1 + depth * np.sin(2 * np.pi * (t * frequency + phase)))

    pitch = scene.pitch(250, 1000) * scene.size / size(scene.sample_times)
    n = len(scene.frame_times)
    motion = Motion(np.full(n, x), np.full(n, y), size(scene.frame_times))
    return Event([motion], tone(pitch, scene.options.sample_rate, partials(rng)), np.empty(0))


def _orbit(scene: Scene) -> Event:
    """An object on a circle; a hum that swells and rises a little toward the top of the circle."""
    rng = scene.rng
    frequency = rng.uniform(0.5, 1.1) * rng.choice((-1.0, 1.0))
    phase, radius = rng.uniform(), rng.uniform(0.24, 0.36)
    cx = rng.uniform(radius + scene.size, scene.aspect - radius - scene.size)
    cy = rng.uniform(min(0.45, radius + scene.size), max(0.55, 1 - radius - scene.size))
    angle = 2 * np.pi * (scene.frame_times * frequency + phase)
    height = np.sin(2 * np.pi * (scene.sample_times * frequency + phase))  # -1 bottom … 1 top
    song = tone(scene.pitch(250, 1000) * 2 ** (0.12 * height), scene.options.sample_rate, partials(rng))
    n = len(scene.frame_times)
    motion = Motion(cx + radius * np.cos(angle), cy - radius * np.sin(angle), np.full(n, scene.size))
    return Event([motion], song * (0.52 + 0.48 * height) ** 1.5, np.empty(0), [Circle(cx, cy, radius)])


def _pendulum(scene: Scene) -> Event:
    """A bob that swings below a pivot; wind that follows its speed, a tick where it turns."""
    rng, rate = scene.rng, scene.options.sample_rate
    period, phase = rng.uniform(1.1, 2.0), rng.uniform()
    length, swing = rng.uniform(0.55, 0.7), math.radians(rng.uniform(40, 65))
    px, py = rng.uniform(0.5, scene.aspect - 0.5), rng.uniform(0.1, 0.25)
    angle = swing * np.cos(2 * np.pi * (scene.frame_times / period + phase))
    speed = np.abs(np.sin(2 * np.pi * (scene.sample_times / period + phase)))  # 0 at the ends … 1 at the bottom
    n = len(scene.sample_times)
    # White noise carried by a tone that rises with the speed: a whoosh around that pitch, a few hundred hertz wide.
    narrow = coloured_noise(rng, n, 2.0)
    phase_of_carrier = 2 * np.pi * np.cumsum(scene.pitch(400, 1000) * (0.5 + speed)) / rate
    whoosh = narrow * np.cos(phase_of_carrier) * speed**2
    times = _contacts(2 * phase, period / 2, scene.seconds)
    tick = click(scene)
    sound = 0.25 * whoosh + 0.8 * _impacts(scene, times, tick)
    x, y = px + length * np.sin(angle), py + length * np.cos(angle)
    beam = Line(px - 0.3, py, px + 0.3, py)
    return Event([Motion(x, y, np.full(len(angle), scene.size))], sound, times, [beam, Line(px, py, x, y)])


def _slide(scene: Scene) -> Event:
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
    motion = Motion(place(scene.frame_times) * span - scene.size, np.full(n, y), np.full(n, scene.size))
    wraps = _contacts(phase if direction > 0 else 1 - phase, crossing, scene.seconds)
    gap = scene.size + 0.03
    rails: list[Line | Circle] = [Line(-1.0, y + side * gap, 9.0, y + side * gap) for side in (-1, 1)]
    return Event([motion], tone(pitch, scene.options.sample_rate, partials(rng)), wraps, rails)


def _collide(scene: Scene) -> Event:
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
        objects.append(Motion(cx + distance * math.cos(tilt), cy + distance * math.sin(tilt), np.full(len(t), size)))
    times = _contacts(phase, period, scene.seconds)
    return Event(objects, _impacts(scene, times, ping(scene)), times)


EVENTS: dict[str, Callable[[Scene], Event]] = {
    "bounce": _bounce,
    "collide": _collide,
    "flash": _flash,
    "orbit": _orbit,
    "pendulum": _pendulum,
    "pulse": _pulse,
    "ricochet": _ricochet,
    "slide": _slide,
}


def _place(scene: Scene) -> tuple[float, float]:
    """A random place for an object that stays where it is."""
    margin = 1.3 * scene.size
    return scene.rng.uniform(margin, scene.aspect - margin), scene.rng.uniform(margin, 1 - margin)
