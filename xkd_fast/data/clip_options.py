"""What a clip is and how clips are fetched: the options, and whether they fit the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xkd_fast.data.log_mel import MelOptions
from xkd_fast.data.views import ViewShape
from xkd_fast.model.options import FORBID_EXTRA, ModelOptions, option

DEFAULT_THREADS, DEFAULT_PREFETCH = 2, 2  # where nothing is measured


@dataclass(frozen=True)
class ClipOptions:
    """What a clip is, and how clips are fetched."""

    __pydantic_config__ = FORBID_EXTRA

    fps: float = option(8.0, "frames per second, of the shards and of the clip")
    sample_rate: int = option(16000, "audio samples per second, of the shards and of the clip")
    clip_seconds: float = option(4.0, "length of a clip, seconds; times fps it must be model.video.frames")
    local_audio_seconds: float = option(1.0, "length of a local audio view, seconds")
    decode: Literal["auto", "cpu", "gpu"] = option(
        "auto", "where pictures are decoded; auto = by the GPU's engines where the model is on one that can, else by the CPU"
    )
    threads: int | Literal["auto"] = option(
        "auto", "threads that decode, and as many that augment, per process; auto = the fastest in a short measurement"
    )
    prefetch: int | Literal["auto"] = option("auto", "finished micro-batches kept ahead of the step; auto = 2")
    clips_per_file: int = option(
        1, "clips drawn from each file when it is read and decoded, so often more steps an epoch of files; 1 = off"
    )
    on_corrupt: Literal["replace", "stop"] = option(
        "replace", "a damaged sample: another takes its place and it is listed, or stop"
    )
    order: Literal["random", "sequential"] = option(
        "random", "random = one permutation of all clips; sequential = shards front to back, through a shuffle buffer"
    )
    shuffle_buffer: int = option(
        2048, "clips per rank that wait for their turn, encoded, in memory, where data.order = sequential; 1 = none, unshuffled"
    )

    def __post_init__(self) -> None:
        for name in ("fps", "sample_rate", "clip_seconds", "local_audio_seconds"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"data.{name} = {value} must be above 0")
        for name in ("threads", "prefetch"):
            value = getattr(self, name)
            if value != "auto" and not 1 <= value <= 1024:
                raise ValueError(f"data.{name} = {value} must lie in 1-1024, or be auto")
        if not 1 <= self.clips_per_file <= 1024:
            raise ValueError(f"data.clips_per_file = {self.clips_per_file} must lie in 1-1024")
        if not 1 <= self.shuffle_buffer <= 2**24:
            raise ValueError(f"data.shuffle_buffer = {self.shuffle_buffer} must lie in 1-{2**24}")
        if self.local_audio_seconds > self.clip_seconds:
            raise ValueError(
                f"data.local_audio_seconds = {self.local_audio_seconds} is longer than the clip; "
                f"it must be at most data.clip_seconds = {self.clip_seconds}"
            )

    @property
    def own_threads(self) -> int:
        """Threads where nothing is measured."""
        return DEFAULT_THREADS if self.threads == "auto" else self.threads

    @property
    def own_prefetch(self) -> int:
        """Finished micro-batches kept ahead where nothing is measured."""
        return DEFAULT_PREFETCH if self.prefetch == "auto" else self.prefetch

    @property
    def clip_samples(self) -> int:
        """Audio samples of a clip."""
        return round(self.clip_seconds * self.sample_rate)

    @property
    def local_samples(self) -> int:
        """Audio samples of a local audio view."""
        return round(self.local_audio_seconds * self.sample_rate)


def check_against_model(data: ClipOptions, mel: MelOptions, model: ModelOptions) -> None:
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


def view_shape(data: ClipOptions, model: ModelOptions) -> ViewShape:
    """Sizes of the clip and its views.

    Args:
        data: already checked against ``model``.
        model: as trained.
    """
    return ViewShape(data.fps, data.sample_rate, data.clip_samples, data.local_samples, model.video, model.audio)
