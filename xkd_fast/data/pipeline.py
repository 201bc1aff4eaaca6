"""From shards to the model's views: DALI decodes the clip's own frames and its sound, torch augments them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xkd_fast.data.log_mel import MelOptions
from xkd_fast.model.options import FORBID_EXTRA, ModelOptions, option


@dataclass(frozen=True)
class DataOptions:
    """What a clip is, and how clips are fetched."""

    __pydantic_config__ = FORBID_EXTRA

    fps: float = option(8.0, "frames per second, of the shards and of the clip")
    sample_rate: int = option(16000, "audio samples per second, of the shards and of the clip")
    clip_seconds: float = option(4.0, "length of a clip, seconds; times fps it must be model.video.frames")
    local_audio_seconds: float = option(1.0, "length of a local audio view, seconds")
    threads: int = option(2, "threads that decode, and as many that augment, per process")
    prefetch: int = option(2, "finished micro-batches kept ahead of the step")
    on_corrupt: Literal["replace", "stop"] = option(
        "replace", "a damaged sample: another takes its place and it is listed, or stop"
    )

    def __post_init__(self) -> None:
        for name in ("fps", "sample_rate", "clip_seconds", "local_audio_seconds"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"data.{name} = {value} must be above 0")
        for name in ("threads", "prefetch"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"data.{name} = {value} must be 1 or more")
        if self.local_audio_seconds > self.clip_seconds:
            raise ValueError(
                f"data.local_audio_seconds = {self.local_audio_seconds} is longer than the clip; "
                f"it must be at most data.clip_seconds = {self.clip_seconds}"
            )

    @property
    def clip_samples(self) -> int:
        """Audio samples of a clip."""
        return round(self.clip_seconds * self.sample_rate)

    @property
    def local_samples(self) -> int:
        """Audio samples of a local audio view."""
        return round(self.local_audio_seconds * self.sample_rate)


def check_against_model(data: DataOptions, mel: MelOptions, model: ModelOptions) -> None:
    """Refuse sizes that cannot fit together.

    Raises:
        ValueError: naming the value, the rule it breaks and the key to change.
    """
    video, audio = model.video, model.audio
    frames = data.fps * data.clip_seconds
    if abs(frames - video.frames) > 1e-6:
        raise ValueError(
            f"data.fps × data.clip_seconds = {data.fps:g} × {data.clip_seconds:g} = {frames:g} frames must equal "
            f"model.video.frames = {video.frames}; set data.clip_seconds to {video.frames / data.fps:g}"
        )
    if video.channels != 3:
        raise ValueError(f"model.video.channels = {video.channels} must be 3: the frames are decoded as red, green, blue")
    views = [("data.clip_seconds", data.clip_samples, "model.audio.frames", audio.frames)]
    if audio.local_views:
        views.append(("data.local_audio_seconds", data.local_samples, "model.audio.local_frames", audio.local_frames))
    for key, samples, frames_key, needed in views:
        given, largest_hop = samples // mel.hop + 1, max(1, samples // max(1, needed - 1))
        if given < needed:
            raise ValueError(
                f"{key} gives {samples} samples, {given} spectrogram frames at mel.hop = {mel.hop}, but "
                f"{frames_key} = {needed} are needed; lengthen it, or set mel.hop to at most {largest_hop}"
            )
        if samples <= mel.n_fft // 2:
            raise ValueError(
                f"{key} gives {samples} samples; the centred STFT needs more than mel.n_fft / 2 = {mel.n_fft // 2}"
            )
    if mel.f_max > data.sample_rate / 2:
        raise ValueError(f"mel.f_max = {mel.f_max:g} Hz must be at most half of data.sample_rate = {data.sample_rate} Hz")
