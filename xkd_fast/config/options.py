"""Every option of a run, by section: its default, documentation and checks."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from xkd_fast.data.clip_options import ClipOptions, check_against_model
from xkd_fast.data.http_folder import RemoteOptions
from xkd_fast.data.log_mel import MelOptions
from xkd_fast.data.shard_cache import CacheOptions
from xkd_fast.data.storage import shown
from xkd_fast.data.synthetic import SyntheticOptions
from xkd_fast.data.views import AugmentOptions
from xkd_fast.errors import UserError
from xkd_fast.model.options import FORBID_EXTRA, ModelOptions, option, require, section

MAX_THREADS = 1024  # of one process


@dataclass(frozen=True)
class DemoData:
    """A rendered data set to train on, made where it is missing."""

    __pydantic_config__ = FORBID_EXTRA

    videos: str = option("runs/demo/videos", "folder of the rendered videos; train/ and test/ are made in it")
    shards: str = option("runs/demo/shards", "folder of the shards made of them; train/ and test/ are made in it")
    short_side: int = option(64, "short side of the frames in the shards, pixels, even")
    test_clips_per_class: int = option(25, "test clips rendered per class, of another seed than render's")
    render: SyntheticOptions = section(SyntheticOptions, "what is rendered")

    def __post_init__(self) -> None:
        for name in ("videos", "shards"):
            require(getattr(self, name) != "", f"data.demo.{name} is empty; it must name a folder")
        require(
            self.short_side >= 16 and self.short_side % 2 == 0,
            f"data.demo.short_side = {self.short_side} must be an even number of 16 or more",
        )
        clips = self.test_clips_per_class
        require(clips >= 1, f"data.demo.test_clips_per_class = {clips} must be 1 or more")


@dataclass(frozen=True)
class DataOptions(ClipOptions):
    """What is trained on, what a clip is, and how clips are fetched."""

    train: tuple[str, ...] = option(
        (), "folders or http(s):// addresses of shards to train on, made by `xkd-fast prepare`; [] = those of data.demo"
    )
    remote: RemoteOptions = section(RemoteOptions, "how http(s):// addresses are read")
    cache: CacheOptions = section(CacheOptions, "copies of shards on a local disk")
    demo: DemoData | None = option(None, "rendered data set for a first run; null = none")

    def __post_init__(self) -> None:
        super().__post_init__()
        require("" not in self.train, f"data.train = {list(self.train)} holds an empty name; each must name a folder of shards")


@dataclass(frozen=True)
class TrainOptions:
    """Length, batch and precision of a run."""

    __pydantic_config__ = FORBID_EXTRA

    epochs: int = option(800, "passes over the training clips")
    global_batch: int = option(256, "clips per optimiser step, over all ranks and accumulated micro-batches")
    micro_batch: int | None = option(
        32,
        "clips per rank and forward pass; global_batch / (micro_batch × ranks) are accumulated; null = each rank takes its "
        "share in one pass",
    )
    precision: Literal["float32", "bfloat16", "float16"] = option(
        "bfloat16",
        "precision of matrix products; bfloat16 = autocast, with float32 parameters, losses and optimiser; float16 the same, "
        "with dynamic loss scaling, for GPUs without bfloat16",
    )
    zero_stage: Literal[0, 1, 2, 3] = option(
        1,
        "DeepSpeed ZeRO: 1 shares optimiser states between the ranks, 2 gradients too, 3 weights too (between passes); 0 = off",
    )
    offload_optimizer: bool = option(
        False, "keep optimiser states in host memory and update there; needs zero_stage 1 or more; saves GPU memory, costs time"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where the model lives; auto = a GPU where there is one")
    threads: int = option(0, "torch threads per process; 0 = this machine's cores shared by its processes")
    stop_after_steps: int | None = option(
        None, "optimiser steps after which a run ends early, with all schedules as they are; null = off"
    )

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch", "micro_batch"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"train.{name} = {value} must be 1 or more")
        require(
            self.micro_batch is None or self.global_batch % self.micro_batch == 0,
            f"train.global_batch = {self.global_batch} must be a multiple of train.micro_batch = {self.micro_batch}",
        )
        require(
            not self.offload_optimizer or self.zero_stage > 0,
            "train.offload_optimizer = true needs train.zero_stage = 1 or more; this run has 0",
        )
        require(0 <= self.threads <= MAX_THREADS, f"train.threads = {self.threads} must lie in 0-{MAX_THREADS}")
        require(
            self.stop_after_steps is None or self.stop_after_steps >= 1,
            f"train.stop_after_steps = {self.stop_after_steps} must be 1 or more, or null",
        )

    def clips_per_pass(self, world_size: int) -> int:
        """Clips per rank and forward pass on this many ranks; raises as :meth:`accumulation` does."""
        return self.global_batch // (world_size * self.accumulation(world_size))

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per rank and optimiser step.

        Raises:
            UserError: the global batch is no whole number of micro-batches on this many ranks.
        """
        if self.micro_batch is None:
            if self.global_batch % world_size:
                raise UserError(
                    f"train.global_batch = {self.global_batch} must be a multiple of the number of ranks, {world_size}; "
                    f"set it to {max(1, round(self.global_batch / world_size)) * world_size}, or start another number of ranks"
                )
            return 1
        per_pass = self.micro_batch * world_size
        if self.global_batch % per_pass:
            fitting = [size for size in range(1, self.global_batch + 1) if self.global_batch % (size * world_size) == 0]
            advice = (
                f"set train.micro_batch to {min(fitting, key=lambda size: abs(size * world_size - per_pass))}"
                if fitting
                else f"set train.global_batch to {max(1, round(self.global_batch / per_pass)) * per_pass}"
            )
            raise UserError(
                f"train.global_batch = {self.global_batch} must be a multiple of train.micro_batch × ranks = "
                f"{self.micro_batch} × {world_size} = {per_pass}; {advice}, or start another number of ranks"
            )
        return self.global_batch // per_pass


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW and its schedules (XKD.md section 8)."""

    __pydantic_config__ = FORBID_EXTRA

    implementation: Literal["auto", "xkd", "torch", "deepspeed_cpu", "deepspeed_fused", "apex"] = option(
        "auto",
        "who computes AdamW, always with the same result: xkd = this project's operator; torch, DeepSpeed's CPUAdam or "
        "FusedAdam, NVIDIA apex's FusedAdam; auto = xkd compiled or, where it is not or a GPU has no measurement, by PyTorch",
    )
    lr: float = option(1e-4, "peak learning rate for lr_batch clips per step; scaled linearly with train.global_batch")
    lr_batch: int = option(256, "clips per step that lr is meant for")
    betas: tuple[float, float] = option((0.9, 0.95), "decay of AdamW's two moments per step")
    eps: float = option(1e-8, "added to the root of AdamW's second moment")
    weight_decay: float = option(0.3, "decoupled weight decay, none on biases and 1-D tensors; 0 = off")
    clip_norm: float | None = option(0.3, "largest L2 norm of each encoder and head gradient, per parameter tensor; null = off")
    warmup_epochs: int = option(30, "epochs of linear warm-up from 0, at most all of them; then cosine to 0; 0 = off")
    freeze_last_layer_epochs: int = option(0, "first epochs in which the heads' last layer stands still; 0 = off")

    def __post_init__(self) -> None:
        for name in ("lr", "lr_batch", "eps"):
            value = getattr(self, name)
            require(value > 0, f"optimizer.{name} = {value} must be above 0")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas = {list(self.betas)} must be two numbers, 0 or more and below 1",
        )
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optimizer.clip_norm = {self.clip_norm} must be above 0, or null for off",
        )
        for name in ("weight_decay", "warmup_epochs", "freeze_last_layer_epochs"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name} = {value} must be 0 or more")


@dataclass(frozen=True)
class EmaOptions:
    """How the teachers follow their students: teacher ← m · teacher + (1 − m) · student after every step."""

    __pydantic_config__ = FORBID_EXTRA

    video_start: float = option(0.997, "momentum m of the video teacher at the first step")
    video_end: float = option(1.0, "momentum of the video teacher at the end of training, approached along a cosine")
    audio_start: float = option(0.997, "momentum m of the audio teacher at the first step")
    audio_end: float = option(1.0, "momentum of the audio teacher at the end of training, approached along a cosine")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(0 <= value <= 1, f"ema.{field.name} = {value} must lie in 0-1")


@dataclass(frozen=True)
class CheckpointOptions:
    """When the whole state of a run is written, and where a run starts."""

    __pydantic_config__ = FORBID_EXTRA

    every_steps: int = option(1000, "optimiser steps between checkpoints; 0 = only at the end")
    keep: int = option(3, "newest checkpoints kept; 0 = all")
    resume: str = option("none", "none = start afresh; auto = go on from the newest checkpoint, if any; or the path of one")

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep"):
            value = getattr(self, name)
            require(value >= 0, f"checkpoint.{name} = {value} must be 0 or more")
        require(self.resume != "", "checkpoint.resume is empty; it must be none, auto or the path of a checkpoint")


@dataclass(frozen=True)
class LogOptions:
    """What a run tells about itself."""

    __pydantic_config__ = FORBID_EXTRA

    every_steps: int = option(10, "optimiser steps between two records of the metrics")
    tensorboard: bool = option(True, "write TensorBoard events; false = off")
    jsonl: bool = option(True, "write the metrics as JSON lines; false = off")
    progress: bool = option(True, "tell how the run goes, with a progress bar on a terminal; false = print nothing but errors")
    wandb: bool = option(False, "send the metrics to Weights & Biases (needs the package wandb); false = off")

    data_wait_alarm: float | None = option(
        0.1,
        "share of the time between two records, 0-1, above which waiting for data is warned of, once for each slow stage of "
        "read, decode, augment and copy; null = off",
    )
    stragglers: bool = option(False, "time every rank's forward passes and log the slowest rank; false = off")
    memory_snapshot: int | None = option(
        None, "step after which the GPU's allocations since the start are written for pytorch.org/memory_viz; null = off"
    )

    def __post_init__(self) -> None:
        require(
            self.memory_snapshot is None or self.memory_snapshot >= 1,
            f"log.memory_snapshot = {self.memory_snapshot} must be 1 or more, or null for off",
        )
        require(
            self.data_wait_alarm is None or 0 < self.data_wait_alarm <= 1,
            f"log.data_wait_alarm = {self.data_wait_alarm} must be above 0 and at most 1, or null for off",
        )
        require(self.every_steps >= 1, f"log.every_steps = {self.every_steps} must be 1 or more")


@dataclass(frozen=True)
class Config:
    """Everything that defines a run. Defaults are the released Kinetics-400 recipe of XKD, base model."""

    __pydantic_config__ = FORBID_EXTRA

    seed: int = option(0, "seed of initialisation, order of clips, augmentation and masks")
    output: str = option("runs/xkd", "folder of the run: checkpoints, metrics, the resolved configuration")
    model: ModelOptions = section(ModelOptions, "the model and its objectives")
    data: DataOptions = section(DataOptions, "the clips")
    augment: AugmentOptions = section(AugmentOptions, "how views are drawn from a clip")
    mel: MelOptions = section(MelOptions, "how sound becomes a log-mel spectrogram")
    train: TrainOptions = section(TrainOptions, "length, batch and precision")
    optimizer: OptimizerOptions = section(OptimizerOptions, "AdamW and its schedules")
    ema: EmaOptions = section(EmaOptions, "how the teachers follow their students")
    checkpoint: CheckpointOptions = section(CheckpointOptions, "when the state of the run is written, and where it starts")
    log: LogOptions = section(LogOptions, "metrics and progress")

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"seed = {self.seed} must lie in 0 to 2**63 - 1")
        require(self.output != "", "output is empty; it must name a folder")
        check_against_model(self.data, self.mel, self.model)
        require(
            not (self.train.zero_stage == 3 and self.model.cuda_graph is True),
            "model.cuda_graph = true records weights at fixed places, which train.zero_stage = 3 does not keep; set "
            "model.cuda_graph=false, or a lower train.zero_stage",
        )
        require(
            not (self.train.precision == "float16" and self.model.cuda_graph is True),
            "model.cuda_graph = true records the backward pass of a loss that is not scaled, which small gradients of "
            "train.precision = float16 do not survive; set model.cuda_graph=false, or train.precision=bfloat16",
        )
        require(
            self.train.precision == "bfloat16" or self.model.teacher_precision != "fp8",
            f"model.teacher_precision = fp8 needs train.precision = bfloat16, which such products give; it is "
            f"{self.train.precision}",
        )
        waits = "train.zero_stage = 3" if self.train.zero_stage == 3 else "model.objective.mmd_scope = global"
        require(
            not self.log.stragglers or (self.train.zero_stage < 3 and self.model.objective.mmd_scope == "rank"),
            f"log.stragglers = true times forward passes that wait for no other rank, but with {waits} every rank waits for "
            "the slowest in them; set log.stragglers=false, or train.zero_stage below 3 and model.objective.mmd_scope=rank",
        )

    def as_dict(self) -> dict[str, Any]:
        """Nested dicts, lists and plain values, as JSON or YAML hold them."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def shareable(self) -> Config:
        """The same without the signatures of addresses, for what leaves the run's folder: weights, records, dashboards."""
        train = tuple(shown(place) for place in self.data.train)
        return dataclasses.replace(self, data=dataclasses.replace(self.data, train=train))
