"""Sounds: grains, tones and noise, and the mix of a clip's sound."""

from __future__ import annotations

import math

import numpy as np

from xkd_fast.data.synthetic.scene import Event, Scene

_SILENCE = 1e-4  # sounds are cut where their envelope falls below this


def add_at(sound: np.ndarray, times: np.ndarray, grain: np.ndarray, gains: np.ndarray, rate: int) -> None:
    """Add ``grain`` to ``sound`` starting at each of ``times``."""
    for time, gain in zip(times, gains, strict=True):
        start = round(time * rate)
        if 0 <= start < len(sound):
            stop = min(start + len(grain), len(sound))
            sound[start:stop] += gain * grain[: stop - start]


def _decay(rate: int, seconds: float) -> np.ndarray:
    """Times of a grain that decays with the time constant ``seconds``, to inaudible."""
    return np.arange(max(1, round(rate * seconds * -math.log(_SILENCE)))) / rate


def ramp(gain: np.ndarray, rate: int, seconds: float = 0.004) -> np.ndarray:
    """Smooth the steps of an envelope by a moving average that looks back only, so that no sound precedes its cause."""
    width = max(1, round(rate * seconds))
    total = np.cumsum(np.concatenate([np.zeros(width), gain]))
    return (total[width:] - total[:-width]) / width


def tone(frequency: np.ndarray, rate: int, amplitudes: np.ndarray) -> np.ndarray:
    """A harmonic tone of time-varying ``frequency`` [samples] Hz; partials above 0.45 of the rate are left out."""
    phase = 2 * np.pi * np.cumsum(frequency) / rate
    sound = np.zeros_like(phase)
    for number, amplitude in enumerate(amplitudes, start=1):
        if number * frequency.max() < 0.45 * rate:
            sound += amplitude * np.sin(number * phase)
    return sound


def partials(rng: np.random.Generator) -> np.ndarray:
    """Amplitudes of 1 to 4 harmonics: a random timbre, drawn alike by every class that sings."""
    count = int(rng.integers(1, 5))
    return rng.uniform(0.3, 1.0, count) * rng.uniform(0.3, 0.8) ** np.arange(count)


def thud(scene: Scene) -> np.ndarray:
    """A dull impact [samples] float64, some 0.4-0.8 s at ``sample_rate``: falls to 110-320 Hz, lower for a larger object."""
    rate, rng = scene.options.sample_rate, scene.rng
    t = _decay(rate, rng.uniform(0.04, 0.09))
    decay = len(t) / rate / -math.log(_SILENCE)
    frequency = scene.pitch(110, 320) * (1 + 0.8 * np.exp(-t / 0.02))
    knock = rng.normal(size=len(t)) * np.exp(-t / 0.004)
    return np.exp(-t / decay) * np.cos(2 * np.pi * np.cumsum(frequency) / rate) + 0.3 * knock


def click(scene: Scene) -> np.ndarray:
    """A hard impact [samples] float64, some 0.06-0.14 s at ``sample_rate``: 1200-4200 Hz, lower for a larger object; noise."""
    rate, rng = scene.options.sample_rate, scene.rng
    t = _decay(rate, rng.uniform(0.006, 0.015))
    decay = len(t) / rate / -math.log(_SILENCE)
    frequency = min(scene.pitch(1200, 4200), 0.4 * rate)
    return np.exp(-t / decay) * (np.cos(2 * np.pi * frequency * t) + 0.7 * rng.normal(size=len(t)))


def ping(scene: Scene) -> np.ndarray:
    """Metal: partials of a free bar, which are in no harmonic ratio, the higher ones shorter."""
    rate, rng = scene.options.sample_rate, scene.rng
    t = _decay(rate, rng.uniform(0.07, 0.16))
    decay = len(t) / rate / -math.log(_SILENCE)
    base, sound = scene.pitch(500, 1500), np.zeros(len(t))
    for ratio, amplitude in ((1.0, 1.0), (2.756, 0.7), (5.404, 0.45)):
        if base * ratio < 0.45 * rate:
            sound += amplitude * np.exp(-t * ratio**0.5 / decay) * np.cos(2 * np.pi * base * ratio * t)
    return sound


def coloured_noise(rng: np.random.Generator, samples: int, exponent: float) -> np.ndarray:
    """Noise of unit RMS whose power falls as frequency^-exponent (0 white, 1 pink, 2 brown)."""
    spectrum = np.fft.rfft(rng.normal(size=samples))
    bins = np.maximum(np.arange(len(spectrum)), 20.0 * samples / 16000)  # flat below ~20 Hz at 16 kHz
    noise = np.fft.irfft(spectrum * bins ** (-exponent / 2), n=samples)
    return noise / max(float(np.sqrt(np.mean(noise**2))), 1e-12)


def _faint_sounds(scene: Scene) -> np.ndarray:
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
        add_at(sound, rng.uniform(0, scene.seconds, 1), grain, np.ones(1), rate)
    return sound


def render_sound(scene: Scene, event: Event) -> np.ndarray:
    """The clip's sound [samples] float32 in [-1, 1] at ``sample_rate``; draws from ``scene.rng``, at a random level."""
    rng, options = scene.rng, scene.options
    # A random RMS level: at a random peak, loudness alone would tell hums from clicks.
    level = 10 ** (-rng.uniform(20, 34) / 20)
    sound = event.sound * (level / max(float(np.sqrt(np.mean(event.sound**2))), 1e-9))
    sound *= min(1.0, 0.9 / max(float(np.abs(sound).max()), 1e-9))  # a short clip may hold no impact
    peak = float(np.abs(sound).max())
    if rng.uniform() < options.distractors:
        sound = sound + rng.uniform(0.05, 0.2) * peak * _faint_sounds(scene)
    noise = coloured_noise(rng, len(sound), rng.uniform(0, 2)) * 2 ** rng.uniform(-1.5, 1)
    return np.clip(sound + options.audio_noise * noise, -1, 1).astype(np.float32)
