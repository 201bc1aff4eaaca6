"""What becomes of every source of a shard set: the options of ``xkd-fast prepare``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from xkd_fast.data.sources import MEDIA_SUFFIXES, VIDEO_SUFFIXES
from xkd_fast.data.video_codecs import CODECS, encoder_quality, quality_scales
from xkd_fast.model.options import FORBID_EXTRA, option, require


@dataclass(frozen=True)
class PrepareOptions:
    """What becomes of every source video."""

    __pydantic_config__ = FORBID_EXTRA

    codec: Literal["auto", "mjpeg", "h264", "vp9", "mosaic", "yuv"] = option(
        "auto",
        "video codec of the shards, all but h264 for CPUs too; auto = as the folder was begun, else one is chosen and named",
    )
    fps: float = option(8.0, "frames per second of the shards, constant")
    short_side: int = option(128, "shorter side of the frames, pixels, even; the aspect is kept")
    sample_rate: int = option(16000, "audio samples per second of the shards, mono")
    min_seconds: float = option(0.25, "videos shorter than this are skipped, seconds; 0 = none")
    quality: int | None = option(None, f"encoder quality, lower is better: {quality_scales()}; only with a codec by name")
    samples_per_shard: int = option(512, "sources per shard, before skipping")
    seed: int = option(0, "seed of the order of samples over shards")
    missing_audio: Literal["skip", "keep-as-video-only"] = option(
        "skip",
        "videos whose sound is missing or silent: left out, or kept for evaluation of video alone; never filled with zeros",
    )
    missing_video: Literal["skip", "keep-as-audio-only"] = option(
        "skip",
        "files without picture: left out, or kept for evaluation of sound alone; then sound files of a folder count too (.wav, "
        ".flac, .mp3, …)",
    )
    workers: int = option(0, "processes that convert; 0 = one per core")
    seconds_per_file: float = option(300.0, "time limit of one source, seconds; then it is skipped as timed_out")

    def __post_init__(self) -> None:
        require(
            self.codec == "auto" or self.codec in CODECS, f"codec = {self.codec!r} must be one of auto, {', '.join(CODECS)}"
        )
        require(0.1 <= self.fps <= 240, f"fps = {self.fps} must lie in 0.1-240")
        require(
            16 <= self.short_side <= 4096 and self.short_side % 2 == 0,
            f"short_side = {self.short_side} must be an even number of pixels in 16-4096",
        )
        require(8000 <= self.sample_rate <= 96000, f"sample_rate = {self.sample_rate} must lie in 8000-96000 Hz")
        require(0 <= self.min_seconds <= 86400, f"min_seconds = {self.min_seconds} must lie in 0-86400")
        if self.codec == "auto":
            problem = f"quality = {self.quality} needs a codec by name, since each has its own scale: {quality_scales()}"
            require(self.quality is None, problem)
        else:
            encoder_quality(self.codec, self.quality)
        require(self.samples_per_shard >= 1, f"samples_per_shard = {self.samples_per_shard} must be 1 or more")
        require(0 <= self.seed < 2**63, f"seed = {self.seed} must lie in 0-{2**63 - 1}")
        audio, video = ("skip", "keep-as-video-only"), ("skip", "keep-as-audio-only")
        require(self.missing_audio in audio, f"missing_audio = {self.missing_audio!r} must be {' or '.join(audio)}")
        require(self.missing_video in video, f"missing_video = {self.missing_video!r} must be {' or '.join(video)}")
        require(self.workers >= 0, f"workers = {self.workers} must be 0 or more")
        require(0 < self.seconds_per_file <= 86400, f"seconds_per_file = {self.seconds_per_file} must lie in 0-86400, above 0")

    @property
    def encoder_quality(self) -> int:
        """The quality given, or the codec's default; the codec has been chosen."""
        return encoder_quality(self.codec, self.quality)

    @property
    def suffixes(self) -> frozenset[str]:
        """Endings of the files in a folder that count: of videos, and of sounds where these are kept."""
        return VIDEO_SUFFIXES if self.missing_video == "skip" else MEDIA_SUFFIXES

    def content(self) -> dict[str, Any]:
        """The options that shape the shards: not how, or how fast, they are made. The codec has been chosen."""
        content = asdict(self) | {"quality": self.encoder_quality}
        return {name: content[name] for name in content if name not in ("workers", "seconds_per_file")}
