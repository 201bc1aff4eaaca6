"""Log-mel spectrogram, in torch (XKD.md section 9): one definition for CPU and GPU, float32 and float64."""

from __future__ import annotations

from dataclasses import dataclass

from xkd_fast.model.options import FORBID_EXTRA, option


@dataclass(frozen=True)
class MelOptions:
    """How a waveform becomes a log-mel spectrogram; mel bins and frame counts are the model's (``model.audio``)."""

    __pydantic_config__ = FORBID_EXTRA

    n_fft: int = option(1024, "samples of an STFT window (periodic Hann, centred, reflect padding)")
    hop: int = option(143, "samples between spectrogram frames")
    f_min: float = option(0.0, "lower edge of the lowest mel band, Hz")
    f_max: float = option(8000.0, "upper edge of the highest mel band, Hz; at most half the sample rate")
    mean: float = option(-5.3688107, "subtracted from the natural log of the mel energies; 0 = off")
    std: float = option(4.410007, "divides the log-mel after the mean; 1 = off")

    def __post_init__(self) -> None:
        rules = {
            "n_fft": (self.n_fft >= 2 and self.n_fft % 2 == 0, "must be an even number of 2 or more"),
            "hop": (self.hop >= 1, "must be 1 or more"),
            "f_min": (self.f_min >= 0, "must be 0 or more"),
            "f_max": (self.f_max > self.f_min, f"must be above mel.f_min = {self.f_min:g}"),
            "std": (self.std > 0, "must be above 0"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"mel.{name} = {getattr(self, name)} {rule}")
