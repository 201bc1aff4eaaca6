"""The codecs in which shards hold their frames: names, file endings, quality scales, and which one ``auto`` stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Codec:
    """What has to be known of a codec to store its files and to read them."""

    suffix: str  # of KEY.<suffix> in a shard
    quality: tuple[int, int, int] | None  # best, worst and default of the encoder's scale; None where nothing is lost to it
    on_cpu: bool  # whether the frames can be decoded without a GPU
    engine: Literal["NVDEC", "nvJPEG"] | None  # of a GPU, which decodes them there; None where there is nothing for one to do


CODECS: dict[str, Codec] = {
    "mjpeg": Codec("avi", (2, 31, 4), on_cpu=True, engine="nvJPEG"),
    "h264": Codec("mp4", (0, 51, 23), on_cpu=False, engine="NVDEC"),
    "vp9": Codec("webm", (0, 63, 28), on_cpu=True, engine="NVDEC"),
    "mosaic": Codec("mosaic", (2, 31, 4), on_cpu=True, engine="nvJPEG"),
    "yuv": Codec("yuv", None, on_cpu=True, engine=None),
}
AUTO: Literal["mosaic"] = "mosaic"
AUTO_REASON = (
    "which a CPU decodes faster than mjpeg and a GPU's JPEG engine in fewer calls (no decoding on GPUs is measured yet)"
)
CPU_CODECS = tuple(name for name, codec in CODECS.items() if codec.on_cpu)


def quality_scales() -> str:
    """In words, for help texts: ``mjpeg 2-31 (default 4), …``."""
    scales = {name: codec.quality for name, codec in CODECS.items()}
    told = [f"{name} {scale[0]}-{scale[1]} (default {scale[2]})" if scale else f"{name} none" for name, scale in scales.items()]
    return ", ".join(told)


def encoder_quality(codec: str, quality: int | None) -> int:
    """The encoder's setting: ``quality``, or the codec's default; 0 for a codec that has none.

    Raises:
        ValueError: naming the value, the rule and the codec.
    """
    scale = CODECS[codec].quality
    if scale is None:
        if quality is not None:
            raise ValueError(f"quality = {quality} means nothing for {codec}, which stores pixels as they are; leave it out")
        return 0
    best, worst, default = scale
    if quality is None:
        return default
    if not best <= quality <= worst:
        raise ValueError(f"quality = {quality} must lie in {best}-{worst} for {codec}")
    return quality
