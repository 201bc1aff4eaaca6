"""What a clip is made of: a scene, what moves in it, what it sounds like."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from xkd_fast.data.synthetic.options import SyntheticOptions


@dataclass(frozen=True)
class Clip:
    """A rendered clip: picture, sound and when things happen."""

    frames: np.ndarray  # [T, H, W, 3] uint8 RGB; frame k shows the instant k / fps
    waveform: np.ndarray  # [samples] float32 in [-1, 1]; samples = round(T · sample_rate / fps)
    events: np.ndarray  # [n] float64 seconds: impacts, turning points or onsets; empty where a class has none


@dataclass
class Scene:
    """What is drawn at random before a class gets its say. Lengths are in frame heights, times in seconds."""

    rng: np.random.Generator
    options: SyntheticOptions
    frame_times: np.ndarray  # [T]
    sample_times: np.ndarray  # [samples]
    size: float  # radius of the main object
    register: float  # 0 (largest object, lowest pitch) … 1 (smallest, highest), with a little jitter

    @property
    def aspect(self) -> float:
        """Width of the frame, in frame heights."""
        return self.options.width / self.options.height

    @property
    def seconds(self) -> float:
        """Length of the clip, seconds."""
        return len(self.frame_times) / self.options.fps

    def pitch(self, low: float, high: float) -> float:
        """A frequency in Hz from the size of the object: small is high."""
        return low * (high / low) ** self.register


@dataclass
class Motion:
    """One object over time; ``size`` 0 hides it."""

    x: np.ndarray  # [T] centre, frame heights from the left edge
    y: np.ndarray  # [T] centre, frame heights from the top edge
    size: np.ndarray  # [T] radius, frame heights


@dataclass
class Line:
    """Part of the scene's apparatus, which may move: a straight bar between two points, in frame heights."""

    x0: np.ndarray | float  # [T] or one place for the whole clip
    y0: np.ndarray | float
    x1: np.ndarray | float
    y1: np.ndarray | float


@dataclass
class Circle:
    """Part of the scene's apparatus: a round track, in frame heights."""

    x: float
    y: float
    radius: float


@dataclass
class Event:
    """What a class renders: its objects, its sound, its instants, and what the objects hang from, roll on or run in."""

    objects: list[Motion]
    sound: np.ndarray  # [samples] float, any scale
    times: np.ndarray  # [n] seconds
    apparatus: list[Line | Circle] = field(default_factory=list)


def fold(position: np.ndarray, low: float, high: float) -> np.ndarray:
    """Reflect a straight path between two walls."""
    span = high - low
    u = (position - low) % (2 * span)
    return low + np.where(u > span, 2 * span - u, u)
