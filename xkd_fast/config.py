"""Every option of a run: YAML files and dotted overrides, checked here once; inside the program, frozen dataclasses.

A file holds sections (``train:``, ``model:`` …); what it leaves out keeps its default, and a ``base: OTHER.yaml`` at its top
names a file to start from. Overrides are ``key.path=value`` with the value in YAML. Numbers are read as YAML 1.2 reads them
(``1e-4`` is a number, ``yes`` is text). All that is wrong is reported at once, as one ``UserError``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from xkd_fast.data.http_folder import RemoteOptions
from xkd_fast.data.log_mel import MelOptions
from xkd_fast.data.pipeline import ClipOptions, check_against_model
from xkd_fast.data.shard_cache import CacheOptions
from xkd_fast.data.storage import shown
from xkd_fast.data.synthetic import SyntheticOptions
from xkd_fast.data.views import AugmentOptions
from xkd_fast.errors import UserError
from xkd_fast.model.options import FORBID_EXTRA, ModelOptions, option, require, section
from xkd_fast.yaml_text import InvalidYaml, parse_yaml, shorten, yaml_value

__all__ = [
    "CheckpointOptions",
    "Config",
    "DataOptions",
    "DemoData",
    "EmaOptions",
    "LogOptions",
    "OptimizerOptions",
    "TrainOptions",
    "load_config",
    "render_config",
    "shipped_configs",
]


# ------------------------------------------------------------------------------------------------------------- the options


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


# ------------------------------------------------------------------------------------------------------ what options there are


@dataclass(frozen=True)
class _Field:
    """An option, or a section of options, by its place in the configuration."""

    key: str  # dotted path
    kind: Any  # its type
    doc: str
    inner: type | None  # the dataclass of a section


def _section_type(kind: Any) -> type | None:
    candidates = typing.get_args(kind) if _is_union(kind) else (kind,)
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _is_optional(kind: Any) -> bool:
    return _is_union(kind) and type(None) in typing.get_args(kind)


def _members(owner: type, prefix: str = "") -> Iterator[_Field]:
    hints = typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        kind = hints[field.name]
        yield _Field(f"{prefix}{field.name}", kind, field.metadata.get("doc", ""), _section_type(kind))


@cache
def _all_fields() -> Mapping[str, _Field]:
    """Every option and section by its dotted path."""

    def walk(owner: type, prefix: str) -> Iterator[_Field]:
        for member in _members(owner, prefix):
            yield member
            if member.inner is not None:
                yield from walk(member.inner, f"{member.key}.")

    return {member.key: member for member in walk(Config, "")}


@cache
def _adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config)


LEAST_LIKENESS = 0.6  # of two names, 0-1: below it one is no slip of the other


def _likeness(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second).ratio()


def _nearest(key: str) -> str | None:
    """The option that ``key`` was most probably meant to be: of the same name in any section, of a like one in a like section.

    None where there is none.
    """
    section_name, _, name = key.rpartition(".")

    def is_alike(candidate: str) -> bool:
        place, _, last = candidate.rpartition(".")
        near = not section_name or _likeness(section_name, place) >= LEAST_LIKENESS
        return name == last or (near and _likeness(name, last) >= LEAST_LIKENESS)

    def rank(candidate: str) -> tuple[float, float]:
        whole, last = _likeness(key, candidate), candidate.rpartition(".")[2]
        return max(whole, 0.95 if name == last else 0.85 * _likeness(name, last)), whole  # of equal names the nearest section

    return max(filter(is_alike, _all_fields()), key=rank, default=None)


def _choices(key: str) -> str:
    """What stands in the innermost section on the way to ``key``, in words."""
    owner: type = Config
    place = ""
    for name in key.split(".")[:-1]:
        member = _all_fields().get(f"{place}{name}")
        if member is None or member.inner is None:
            break
        owner, place = member.inner, f"{member.key}."
    return f"{place[:-1] or 'a configuration'} holds {', '.join(field.name for field in dataclasses.fields(owner))}"


def _unknown(key: str) -> str:
    if key in _all_fields():
        section_name, _, name = key.rpartition(".")
        return f"{key} is written with dots, which only overrides are; in a file, write {name} inside {section_name}"
    nearest = _nearest(key)
    return f"{key} is not an option; " + (f"the nearest one is {nearest}" if nearest else _choices(key))


def _expected(kind: Any) -> str:
    """A type in words."""
    if _is_union(kind):
        return " or ".join(_expected(part) for part in typing.get_args(kind))
    if kind is type(None):
        return "null"
    if _section_type(kind) is not None:
        return "a section with options of its own"
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(yaml_value(value) for value in arguments)
    if typing.get_origin(kind) is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list, each item {_expected(arguments[0])}"
        return f"a list of {len(arguments)}, each item {_expected(arguments[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


# --------------------------------------------------------------------------------------------------------------- reading files


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``: sections are merged, everything else is replaced."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def shipped_configs() -> Path:
    """Folder of the configurations that come with the package: inside an installed one, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _find(path: str | Path, beside: Path) -> Path:
    """The file that ``path`` means: as it is, or the name of a shipped configuration."""
    given = beside / path
    if given.is_file():
        return given
    shipped = sorted(shipped_configs().glob("*.yaml"))
    if len(Path(path).parts) == 1:
        for candidate in shipped:
            if str(path) in (candidate.name, candidate.stem):
                return candidate
    names = ", ".join(candidate.stem for candidate in shipped)
    problem = "is a folder" if given.is_dir() else "does not exist"
    raise UserError(f"configuration file {path} {problem}; name a YAML file, or one of the shipped ones: {names}")


def _read_file(path: Path, opened: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """A file's mapping laid over its base's, and where each dotted key stands."""
    if path.resolve() in opened:
        raise UserError(f"{path}: base leads back to this file; remove it from one of {', '.join(map(str, opened))}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration file {path} cannot be read: {error}") from error
    try:
        data, lines = parse_yaml(text)
    except InvalidYaml as error:
        raise UserError(f"{path}{f':{error.line}' if error.line else ''}: {error}") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: a configuration is a mapping of options, such as `seed: 0`, not {yaml_value(data)}")
    origins = {key: f"{path}:{line}" for key, line in lines.items()}
    base = data.pop("base", None)
    if base is None:
        return data, origins
    if not isinstance(base, str):
        raise UserError(f"{origins['base']}: base = {yaml_value(base)} must be the name of a configuration file")
    below, below_origins = _read_file(_find(base, path.parent), (*opened, path.resolve()))
    return _merge(below, data), below_origins | origins


def _read_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"{override!r} is not an override; write key.path=value, such as train.epochs=2")
    try:
        return key, parse_yaml(text)[0]
    except InvalidYaml as error:
        raise UserError(f"{override!r}: {error}") from error


# ------------------------------------------------------------------------------------------------------------------- checking


def _drop_unknown(data: dict[str, Any], owner: type, prefix: str, unknown: list[str]) -> dict[str, Any]:
    """``data`` without keys that are no option (their paths go to ``unknown``) and without sections left empty."""
    members = {member.key: member for member in _members(owner, prefix)}
    kept: dict[str, Any] = {}
    for name, value in data.items():
        key = f"{prefix}{name}"
        if key not in members:
            unknown.append(key)
            continue
        member = members[key]
        if member.inner is not None and isinstance(value, dict):
            value = _drop_unknown(value, member.inner, f"{key}.", unknown)
        if member.inner is not None and value is None and not _is_optional(member.kind):
            continue  # `log:` with every option commented out
        kept[name] = value
    return kept


def _blame(message: str, where: str) -> tuple[str, str]:
    """The option that a section's own check speaks of, and the message, which names it in full."""
    prefix = f"{where}." if where else ""
    named = re.match(r"[a-z_.]*[a-z_]", message)
    if named is not None and named.group().startswith(prefix) and named.group() in _all_fields():
        return named.group(), message
    for word in re.findall(r"[a-z_]+", message):
        if f"{prefix}{word}" in _all_fields():
            return f"{prefix}{word}", f"{prefix}{word}: {message}"
    return where, f"{where}: {message}" if where else message


def _problems(error: ValidationError, data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong, as (key, sentence); a wrong list is named once, whichever of its items are wrong."""
    named: set[str] = set()
    for item in error.errors():
        if item["type"] == "value_error":  # from a dataclass's own check
            yield _blame(str(item["ctx"]["error"]), ".".join(map(str, item["loc"])))
            continue

        value: Any = data
        path: list[str] = []
        for step in item["loc"]:
            if ".".join([*path, str(step)]) not in _all_fields():
                break
            path.append(str(step))
            value = value.get(step) if isinstance(value, dict) else None
        key_path = ".".join(path)
        if key_path not in named:
            named.add(key_path)
            yield key_path, f"{key_path} = {yaml_value(value)} must be {_expected(_all_fields()[key_path].kind)}"


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read, merge and check a configuration.

    Args:
        path: YAML file, or the name of a shipped one (``demo``, ``xkd_base_k400``, …); None = defaults alone.
        overrides: ``key.path=value`` each, applied in order; a value is YAML, and a section's mapping is merged into it.

    Raises:
        UserError: naming every wrong value with its key, the rule it breaks and the place it stands.
    """
    data: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if path is not None:
        data, origins = _read_file(_find(path, Path()))
    problems: list[tuple[str, str]] = []  # (key, sentence)
    for override in overrides:
        key, value = _read_override(override)
        origins[key] = f"override {shorten(override)}"
        if key not in _all_fields():
            problems.append((key, _unknown(key)))
            continue
        for name in reversed(key.split(".")):
            value = {name: value}
        data = _merge(data, value)
    unknown: list[str] = []
    data = _drop_unknown(data, Config, "", unknown)
    data = _merge(Config().as_dict(), data)  # a section's defaults are its own: audio's and video's differ

    problems += [(key, _unknown(key)) for key in unknown]
    config = None
    try:
        config = _adapter().validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems += _problems(error, data)
    if config is not None and not problems:
        return config
    lines = [f"{sentence} ({origins[key]})" if key in origins else sentence for key, sentence in problems]
    source = "the configuration" if path is None else str(path)
    if len(lines) == 1:
        raise UserError(f"{source}: {lines[0]}")
    raise UserError(f"{source}: {len(lines)} errors\n" + "\n".join(f"  - {line}" for line in lines))


# -------------------------------------------------------------------------------------------------------------------- writing


def render_config(config: Config) -> str:
    """The whole configuration as a YAML file with a comment per option; ``load_config`` reads it back as an equal one."""
    lines = [f"# {Config.__doc__ or ''}".rstrip()]
    _render_section(config, "", 0, lines)
    return "\n".join(lines) + "\n"


def _render_section(owner: Any, prefix: str, depth: int, lines: list[str]) -> None:
    indent = "  " * depth
    members = list(_members(type(owner), prefix))
    plain: dict[str, str] = {}
    for member in members:
        name = member.key.rpartition(".")[2]
        value = getattr(owner, name)
        if not dataclasses.is_dataclass(value):
            plain[member.key] = f"{indent}{name}: {yaml_value(value)}"
    column = max((len(text) for text in plain.values() if len(text) <= 40), default=0) + 2
    for member in members:
        name = member.key.rpartition(".")[2]
        if member.key not in plain:
            if depth == 0:
                lines.append("")
            lines.append(f"{indent}{name}:  # {member.doc}")
            _render_section(getattr(owner, name), f"{member.key}.", depth + 1, lines)
            continue
        text = f"{plain[member.key]:<{column}}# {member.doc}" if len(plain[member.key]) < column else ""
        if text and len(text) <= 140:
            lines.append(text)
        else:
            lines += textwrap.wrap(member.doc, 120, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            lines.append(plain[member.key])
