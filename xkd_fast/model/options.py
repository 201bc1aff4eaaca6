"""What a model is: frozen dataclasses that need nothing but Python.

Every field carries its documentation in ``metadata["doc"]``; ``xkd-fast train --print-config`` prints it. Values are checked
where they are made, so a wrong one raises ``ValueError`` naming the value, the rule and the key to change. Defaults are the
released Kinetics-400 recipe of XKD (AAAI 2024), base model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

FORBID_EXTRA = {"extra": "forbid"}  # read by pydantic where options come from a file; inert otherwise

Variant = Literal["xkd", "mas", "mats"]
TeacherView = Literal["global", "local"]
Refinement = Literal["mean", "softmax"]
MmdScope = Literal["rank", "global"]
Switch = Literal["auto", True, False]  # auto: as measured for the device, see model/switches.py

DEFAULT_GAMMAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)


def option(default: Any, doc: str) -> Any:
    """A dataclass field with a default and its one-line documentation (unit and "off" value included)."""
    return field(default=default, metadata={"doc": doc})


def section(factory: type, doc: str) -> Any:
    """A dataclass field that holds a nested options dataclass."""
    return field(default_factory=factory, metadata={"doc": doc})


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless the condition holds; messages name the value, the rule and the key."""
    if not condition:
        raise ValueError(message)


def _require_multiple(key: str, value: int, patch_key: str, patch: int) -> None:
    require(
        patch >= 1 and value >= patch and value % patch == 0,
        f"{key} = {value} must be a positive multiple of {patch_key} = {patch}",
    )


def kept_tokens(tokens: int, mask_ratio: float) -> int:
    """How many of ``tokens`` stay visible: round(N·(1 − ratio)) (XKD.md section 4)."""
    return round(tokens * (1 - mask_ratio))


def _require_mask(key: str, mask_ratio: float, tokens: int) -> None:
    keep = kept_tokens(tokens, mask_ratio)
    require(
        0 < keep < tokens,
        f"{key} = {mask_ratio} keeps {keep} of {tokens} tokens visible; a ratio must keep at least 1 and mask at least 1",
    )


@dataclass(frozen=True)
class VideoOptions:
    """Sizes of the video views and of their patches (released values: 32 × 112 × 112, patches 4 × 16 × 16)."""

    __pydantic_config__ = FORBID_EXTRA

    frames: int = option(32, "frames of the global view")
    size: int = option(112, "height and width of the global view, pixels")
    local_views: int = option(1, "number of local views per clip; 0 = none")
    local_frames: int = option(8, "frames of a local view, consecutive")
    local_size: int = option(96, "height and width of a local view, pixels")
    patch_frames: int = option(4, "frames of a patch")
    patch_size: int = option(16, "height and width of a patch, pixels")
    mask_ratio: float = option(0.85, "share of the global view's tokens hidden from the student, 0-1")
    channels: int = option(3, "colour channels")
    pixel_mean: tuple[float, float, float] = option(
        (0.485, 0.456, 0.406), "subtracted from red, green, blue in 0-1; [0, 0, 0] = off"
    )
    pixel_std: tuple[float, float, float] = option(
        (0.229, 0.224, 0.225), "divides red, green, blue after the mean; [1, 1, 1] = off"
    )

    def __post_init__(self) -> None:
        key = "model.video"
        _require_multiple(f"{key}.frames", self.frames, f"{key}.patch_frames", self.patch_frames)
        _require_multiple(f"{key}.local_frames", self.local_frames, f"{key}.patch_frames", self.patch_frames)
        _require_multiple(f"{key}.size", self.size, f"{key}.patch_size", self.patch_size)
        _require_multiple(f"{key}.local_size", self.local_size, f"{key}.patch_size", self.patch_size)
        require(
            self.local_frames <= self.frames,
            f"{key}.local_frames = {self.local_frames} must be at most the clip's, {key}.frames = {self.frames}",
        )
        require(self.local_views >= 0, f"{key}.local_views = {self.local_views} must be 0 or more")
        require(self.channels >= 1, f"{key}.channels = {self.channels} must be 1 or more")
        require(min(self.pixel_std) > 0, f"{key}.pixel_std = {list(self.pixel_std)} must be three numbers above 0")
        _require_mask(f"{key}.mask_ratio", self.mask_ratio, self.tokens)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Patch extent (frames, height, width)."""
        return self.patch_frames, self.patch_size, self.patch_size

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """One global view: (channels, frames, height, width)."""
        return self.channels, self.frames, self.size, self.size

    @property
    def local_shape(self) -> tuple[int, int, int, int]:
        """One local view: (channels, frames, height, width)."""
        return self.channels, self.local_frames, self.local_size, self.local_size

    @property
    def grid(self) -> tuple[int, int, int]:
        """Token grid of the global view: (time, height, width)."""
        return self.frames // self.patch_frames, self.size // self.patch_size, self.size // self.patch_size

    @property
    def local_grid(self) -> tuple[int, int, int]:
        """Token grid of a local view: (time, height, width)."""
        side = self.local_size // self.patch_size
        return self.local_frames // self.patch_frames, side, side

    @property
    def tokens(self) -> int:
        """Tokens of the global view, CLS not counted."""
        t, h, w = self.grid
        return t * h * w

    @property
    def keep(self) -> int:
        """Visible tokens of the masked global view."""
        return kept_tokens(self.tokens, self.mask_ratio)

    @property
    def patch_numbers(self) -> int:
        """Numbers in one patch."""
        return self.patch_frames * self.patch_size * self.patch_size * self.channels

    def affine(self, *, is_raw: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation by which a view's pixels are still to be normalised; of 8-bit (raw) pixels alone."""
        return (self.pixel_mean, self.pixel_std) if is_raw else ((), ())


@dataclass(frozen=True)
class AudioOptions:
    """Sizes of the log-mel views and of their patches (released values: 80 × 448, patches 4 × 16)."""

    __pydantic_config__ = FORBID_EXTRA

    mel_bins: int = option(80, "mel bins of every audio view")
    frames: int = option(448, "spectrogram frames of the global view")
    local_views: int = option(1, "number of local views per clip; 0 = none")
    local_frames: int = option(112, "spectrogram frames of a local view")
    patch_bins: int = option(4, "mel bins of a patch")
    patch_frames: int = option(16, "spectrogram frames of a patch")
    mask_ratio: float = option(0.8, "share of the global view's tokens hidden from the student, 0-1")

    def __post_init__(self) -> None:
        key = "model.audio"
        _require_multiple(f"{key}.mel_bins", self.mel_bins, f"{key}.patch_bins", self.patch_bins)
        _require_multiple(f"{key}.frames", self.frames, f"{key}.patch_frames", self.patch_frames)
        _require_multiple(f"{key}.local_frames", self.local_frames, f"{key}.patch_frames", self.patch_frames)
        require(
            self.local_frames <= self.frames,
            f"{key}.local_frames = {self.local_frames} must be at most the clip's, {key}.frames = {self.frames}",
        )
        require(self.local_views >= 0, f"{key}.local_views = {self.local_views} must be 0 or more")
        _require_mask(f"{key}.mask_ratio", self.mask_ratio, self.tokens)

    @property
    def patch(self) -> tuple[int, int]:
        """Patch extent (mel bins, frames)."""
        return self.patch_bins, self.patch_frames

    @property
    def shape(self) -> tuple[int, int, int]:
        """One global view: (1, mel bins, frames)."""
        return 1, self.mel_bins, self.frames

    @property
    def local_shape(self) -> tuple[int, int, int]:
        """One local view: (1, mel bins, frames)."""
        return 1, self.mel_bins, self.local_frames

    @property
    def grid(self) -> tuple[int, int]:
        """Token grid of the global view: (mel, time)."""
        return self.mel_bins // self.patch_bins, self.frames // self.patch_frames

    @property
    def local_grid(self) -> tuple[int, int]:
        """Token grid of a local view: (mel, time)."""
        return self.mel_bins // self.patch_bins, self.local_frames // self.patch_frames

    @property
    def tokens(self) -> int:
        """Tokens of the global view, CLS not counted."""
        return self.grid[0] * self.grid[1]

    @property
    def keep(self) -> int:
        """Visible tokens of the masked global view."""
        return kept_tokens(self.tokens, self.mask_ratio)

    @property
    def patch_numbers(self) -> int:
        """Numbers in one patch."""
        return self.patch_bins * self.patch_frames

    def affine(self, *, is_raw: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """None: spectrograms are taken as they are."""
        return (), ()


def _check_transformer(key: str, width: int, depth: int, heads: int) -> None:
    require(depth >= 1, f"{key}.depth = {depth} must be 1 or more")
    require(
        heads >= 1 and width >= heads and width % heads == 0,
        f"{key}.width = {width} must be a positive multiple of {key}.heads = {heads}",
    )


@dataclass(frozen=True)
class EncoderOptions:
    """Shape of an encoder; base is 768 × 12 × 12, large is 1024 × 24 × 16."""

    __pydantic_config__ = FORBID_EXTRA

    width: int = option(768, "numbers per token")
    depth: int = option(12, "transformer blocks")
    heads: int = option(12, "attention heads; must divide the width")

    def __post_init__(self) -> None:
        _check_transformer("model.encoder", self.width, self.depth, self.heads)


@dataclass(frozen=True)
class DecoderOptions:
    """Shape of a decoder; base is 384 × 4 × 12, large is 512 × 8 × 16."""

    __pydantic_config__ = FORBID_EXTRA

    width: int = option(384, "numbers per token")
    depth: int = option(4, "transformer blocks")
    heads: int = option(12, "attention heads; must divide the width")

    def __post_init__(self) -> None:
        _check_transformer("model.decoder", self.width, self.depth, self.heads)


@dataclass(frozen=True)
class HeadOptions:
    """Shape of the projection head."""

    __pydantic_config__ = FORBID_EXTRA

    hidden: int = option(2048, "width of the two hidden layers")
    bottleneck: int = option(256, "width before the prototypes")
    prototypes: int = option(8192, "outputs of the head, the classes of distillation")

    def __post_init__(self) -> None:
        for name in ("hidden", "bottleneck", "prototypes"):
            value = getattr(self, name)
            require(value >= 1, f"model.head.{name} = {value} must be 1 or more")


@dataclass(frozen=True)
class TemperatureOptions:
    """A teacher temperature: linear from ``start`` to ``end`` over the first epochs, both ends included, then constant."""

    __pydantic_config__ = FORBID_EXTRA

    start: float = option(0.1, "temperature in the first epoch")
    end: float = option(0.1, "temperature after the warm-up")
    warmup_epochs: int = option(0, "epochs from start to end; 0 = constant at end")

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            require(value > 0, f"teacher temperature {name} = {value} must be above 0")
        require(self.warmup_epochs >= 0, f"teacher temperature warmup_epochs = {self.warmup_epochs} must be 0 or more")


def _audio_temperature() -> TemperatureOptions:
    return TemperatureOptions(start=0.07, end=0.07)


@dataclass(frozen=True)
class ObjectiveOptions:
    """Weights and constants of the three objectives (XKD.md sections 1, 4, 6 and 7)."""

    __pydantic_config__ = FORBID_EXTRA

    reconstruction_weight: float = option(5.0, "weight of masked reconstruction in the total; 0 = off")
    distillation_weight: float = option(1.0, "weight of cross-modal distillation; 0 = off")
    alignment_weight: float = option(1.0, "weight of domain alignment (MMD); 0 = off")
    video_teacher_temperature: TemperatureOptions = section(TemperatureOptions, "temperature of the video teacher's softmax")
    audio_teacher_temperature: TemperatureOptions = field(
        default_factory=_audio_temperature, metadata={"doc": "temperature of the audio teacher's softmax"}
    )
    student_temperature: float = option(0.1, "temperature of the students' softmax")
    centre_momentum: float = option(0.9, "share of the old centre kept per optimiser step, 0-1")
    mmd_gammas: tuple[float, ...] = option(DEFAULT_GAMMAS, "widths of the MMD's Gaussian kernels")
    mmd_scope: MmdScope = option("rank", "rows the MMD compares: each rank's own (rank, as released) or all ranks' (global)")

    def __post_init__(self) -> None:
        key = "model.objective"
        weights = {name: getattr(self, name) for name in ("reconstruction_weight", "distillation_weight", "alignment_weight")}
        for name, value in weights.items():
            require(value >= 0, f"{key}.{name} = {value} must be 0 or more")
        require(sum(weights.values()) > 0, f"{key}: at least one of {', '.join(weights)} must be above 0")
        require(self.student_temperature > 0, f"{key}.student_temperature = {self.student_temperature} must be above 0")
        require(0 <= self.centre_momentum <= 1, f"{key}.centre_momentum = {self.centre_momentum} must lie in 0-1")
        require(
            len(self.mmd_gammas) > 0 and all(gamma > 0 for gamma in self.mmd_gammas),
            f"{key}.mmd_gammas = {list(self.mmd_gammas)} must be a non-empty list of numbers above 0",
        )


FP8_MULTIPLE = 16  # what a GPU's products of 8-bit floats want of inputs and outputs
FAST_ONLY = ("compile", "checkpointing", "teacher_stream", "cuda_graph")
"""Switches of the fast implementation that the reference, being plain, refuses."""


@dataclass(frozen=True)
class ModelOptions:
    """Everything that defines an XKD model."""

    __pydantic_config__ = FORBID_EXTRA

    implementation: Literal["fast", "reference"] = option(
        "fast", "which code computes the model: fast, or the plain reference it is measured against"
    )
    attention: Literal["auto", "sdpa", "recompute", "triton", "xformers", "eager"] = option(
        "auto", "attention of the fast implementation; auto chooses and says why"
    )
    kernels: Literal["auto", "triton", "torch"] = option(
        "auto",
        "who computes all but attention and matrix products of the fast implementation, norms, GELU, patches, heads and losses "
        "among it: our Triton kernels or PyTorch; auto takes what was measured to be faster on the device",
    )
    compile: Switch = option(
        "auto", "pass the fast implementation's blocks through torch.compile; auto = where that was measured to be faster"
    )
    checkpointing: bool = option(
        False, "keep only each block's input and compute the block again in the backward pass: less memory, more time"
    )
    teacher_stream: Switch = option(
        "auto", "on a GPU, run the teachers beside the students, on a stream of their own; auto as for compile"
    )
    cuda_graph: Switch = option(
        "auto", "on a GPU, record forward and backward pass once and launch them as one CUDA graph; auto as for compile"
    )
    teacher_precision: Literal["autocast", "fp8"] = option(
        "autocast",
        "products of the teachers' blocks: as train.precision says (autocast), or in 8-bit floats, checked against that on the "
        "first batch (fp8; GPUs of compute capability 8.9 or more, slowly emulated on a CPU)",
    )
    variant: Variant = option("xkd", "xkd: a stack per modality; mas: students share one; mats: teachers share one too")
    teacher_view: TeacherView = option(
        "global", "what the teachers see: the global view (paper) or first local view (released code)"
    )
    refinement: Refinement = option("mean", "cross-modal feature refinement mode")
    cls_token: bool = option(True, "prepend a CLS token; false: refinement uses the mean attention over all queries")
    mlp_ratio: float = option(4.0, "hidden width of a block's MLP over the block's width")
    video: VideoOptions = section(VideoOptions, "video views, patches and masking")
    audio: AudioOptions = section(AudioOptions, "audio views, patches and masking")
    encoder: EncoderOptions = section(EncoderOptions, "the encoders, students' and teachers' alike")
    decoder: DecoderOptions = section(DecoderOptions, "the masked autoencoders' decoders")
    head: HeadOptions = section(HeadOptions, "the projection heads")
    objective: ObjectiveOptions = section(ObjectiveOptions, "loss weights, temperatures, centre and MMD")

    def __post_init__(self) -> None:
        for name in FAST_ONLY:
            require(
                self.implementation == "fast" or getattr(self, name) is not True,
                f"model.{name} = true needs model.implementation = fast; the reference is plain",
            )
        is_fp8, width = self.teacher_precision == "fp8", self.encoder.width
        require(
            self.implementation == "fast" or not is_fp8,
            "model.teacher_precision = fp8 needs model.implementation = fast; the reference is plain",
        )
        for name, size in (("width", width), ("width × model.mlp_ratio", int(width * self.mlp_ratio))):
            require(
                size % FP8_MULTIPLE == 0 or not is_fp8,
                f"model.encoder.{name} = {size} must be a multiple of {FP8_MULTIPLE} for model.teacher_precision = fp8",
            )
        require(
            not (self.compile is True and self.attention == "xformers"),
            "model.compile = true cannot compile model.attention = xformers, whose mask is made in Python; use auto or sdpa",
        )
        require(
            not (self.cuda_graph is True and self.objective.mmd_scope == "global"),
            "model.cuda_graph = true needs model.objective.mmd_scope = rank: gathering rows from other ranks is not recorded",
        )
        for name, width in (("encoder", self.encoder.width), ("decoder", self.decoder.width)):
            require(
                int(width * self.mlp_ratio) >= 1,
                f"model.mlp_ratio = {self.mlp_ratio} leaves no hidden number at model.{name}.width = {width}; "
                f"it must be at least {1 / width:.3g}",
            )
        if self.teacher_view == "local":
            for name, views in (("video", self.video.local_views), ("audio", self.audio.local_views)):
                require(
                    views >= 1,
                    f"model.teacher_view = 'local' needs a local view per modality, but model.{name}.local_views = {views}; "
                    "use teacher_view 'global' or add a local view",
                )

    def as_reference(self) -> ModelOptions:
        """The same model computed by the reference."""
        plain: dict[str, Any] = dict.fromkeys(FAST_ONLY, False)
        return replace(self, implementation="reference", teacher_precision="autocast", **plain)
