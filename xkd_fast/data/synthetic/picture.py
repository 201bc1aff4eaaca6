"""Pictures: background, apparatus, objects and noise of a clip's frames."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from xkd_fast.data.synthetic.options import SyntheticOptions
from xkd_fast.data.synthetic.scene import Circle, Event, Line, Motion, Scene, fold

SHAPES = ("disc", "square", "triangle", "ring")


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


def _draw(frames: np.ndarray, motion: Motion, shape: str, colour: np.ndarray, turn: float) -> None:
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


def _draw_apparatus(frames: np.ndarray, parts: Sequence[Line | Circle], colour: np.ndarray, thickness: float) -> None:
    """Paint bars and tracks onto frames [T, H, W, 3] float32 (0–255), in place; ``thickness`` in frame heights."""
    _, h, w, _ = frames.shape
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    paint = colour.astype(np.float32) * 255
    for part in parts:
        if isinstance(part, Circle):
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


def _distractor(scene: Scene) -> Motion:
    """An unrelated object: smaller, silent; still, or drifting slowly."""
    rng, t = scene.rng, scene.frame_times
    size = rng.uniform(0.05, 0.1)
    speed = rng.uniform(-0.15, 0.15, 2) * rng.integers(2)
    x = fold(rng.uniform(0, scene.aspect) + speed[0] * t, size, scene.aspect - size)
    y = fold(rng.uniform(0, 1) + speed[1] * t, size, 1 - size)
    return Motion(x, y, np.full(len(t), size))


def render_frames(scene: Scene, event: Event) -> np.ndarray:
    """The clip's pictures [T, H, W, 3] uint8 RGB, one per instant of ``scene.frame_times``; draws from ``scene.rng``."""
    rng, options = scene.rng, scene.options
    background = _background(rng, options)
    count, h, w = len(scene.frame_times), options.height, options.width
    frames = np.empty((count, h, w, 3), np.float32)
    thickness, fixture_colour = rng.uniform(0.025, 0.045), _contrasting_colour(rng, background, options.saturation)
    moving = [part for part in event.apparatus if isinstance(part, Line) and isinstance(part.x1, np.ndarray)]
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
