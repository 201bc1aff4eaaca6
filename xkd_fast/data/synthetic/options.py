"""What a rendered data set holds and how hard it is."""

from __future__ import annotations

from dataclasses import dataclass

from xkd_fast.model.options import FORBID_EXTRA, option, require

CLASSES = ("bounce", "collide", "flash", "orbit", "pendulum", "pulse", "ricochet", "slide")
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


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
        require(0 <= self.seed < 2**63, f"seed = {self.seed} must lie in 0-{2**63 - 1}")
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
