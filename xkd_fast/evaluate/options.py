"""What an evaluation by linear SVMs is asked for: options, and their arguments on the command line."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import torch

from xkd_fast.data.shards import shard_place
from xkd_fast.data.storage import shown
from xkd_fast.errors import UserError
from xkd_fast.evaluate.features import Role

Features = Literal["video", "audio", "both"]
MODALITIES: tuple[Features, ...] = get_args(Features)
DEFAULT_C: dict[str, tuple[float, ...]] = {
    "video": (1e-3, 1e-2, 1e-1, 1.0),
    "audio": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    "both": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),
}
DEVICES = ("auto", "cpu", "cuda")


def require(condition: bool, message: str) -> None:
    """Raise ``UserError`` with ``message`` unless ``condition``."""
    if not condition:
        raise UserError(message)


def _resolved(place: Path | str) -> str:
    return place.rstrip("/") if isinstance(place, str) else str(place.resolve())


@dataclass(frozen=True)
class SvmOptions:
    """What is evaluated by linear SVMs, and how.

    Raises:
        UserError: naming a value, the rule it breaks and the argument to change.
    """

    checkpoint: Path  # a checkpoint's folder, its model.safetensors, or a run's folder
    data: Path | str  # shards to train the SVMs on, and to test them on where test_data is None; an address is a str
    test_data: Path | str | None = None
    network: Role = "teacher"  # whose encoder
    modalities: tuple[str, ...] = MODALITIES
    train_clips: int = 25  # random clips per training sample
    test_clips: int = 3  # clips per test sample, evenly spaced, scores averaged
    svm_c: tuple[float, ...] | None = None  # None = the sweep of DEFAULT_C
    test_fraction: float = 0.25  # share of each class's samples tested where test_data is None
    validation_fraction: float = 0.2  # share of each class's training samples on which C is chosen
    seed: int = 0  # of the splits, the random clips and the solver
    untrained: bool = False  # the same model as its run began with it
    output: Path | None = None  # folder for the report; None = write nothing
    batch: int = 16  # clips encoded at a time
    device: str = "auto"  # auto = a GPU where there is one

    def __post_init__(self) -> None:
        require(self.network in get_args(Role), f"--network {self.network} must be one of {', '.join(get_args(Role))}")
        unknown = [name for name in self.modalities if name not in MODALITIES]
        require(
            bool(self.modalities) and not unknown,
            f"--modalities {shlex.quote(','.join(self.modalities))} must name some of {', '.join(MODALITIES)}, "
            "separated by commas",
        )
        for name in ("train_clips", "test_clips", "batch"):
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')} {value} must be 1 or more")
        for name in ("test_fraction", "validation_fraction"):
            value = getattr(self, name)
            require(0 < value < 1, f"--{name.replace('_', '-')} {value} must lie between 0 and 1")
        require(
            self.svm_c is None or (len(self.svm_c) > 0 and all(0 < c < float("inf") for c in self.svm_c)),
            f"--svm-c {','.join(f'{c:g}' for c in self.svm_c or ())} must be finite numbers above 0, such as 1e-3,1e-2,1e-1,1",
        )
        require(self.device in DEVICES, f"--device {self.device} must be one of {', '.join(DEVICES)}")
        require(
            self.device != "cuda" or torch.cuda.is_available(),
            "--device cuda needs a GPU, and torch sees none here; use auto or cpu",
        )
        require(0 <= self.seed < 2**32, f"--seed {self.seed} must lie in 0-{2**32 - 1}")
        require(
            self.test_data is None or _resolved(self.test_data) != _resolved(self.data),
            f"--test-data {shown(self.data)} is the same folder as --data; leave it out to split --data into training and test",
        )

    def c_values(self, modality: str) -> tuple[float, ...]:
        """The C sweep of a modality, ascending."""
        return tuple(sorted(set(self.svm_c or DEFAULT_C[modality])))


def parse_c(text: str) -> tuple[float, ...]:
    """``1e-3,1e-2`` as numbers.

    Raises:
        UserError: if it is no list of numbers.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--svm-c {shlex.quote(text)} must be numbers separated by commas, such as 1e-3,1e-2,1e-1,1") from None


def add_arguments(parser: argparse.ArgumentParser, report: str) -> None:
    """One argument for each of :class:`SvmOptions`; ``report`` is the name of the file that is written."""
    add, default = parser.add_argument, SvmOptions(Path("checkpoint"), Path("data"))
    add("--checkpoint", type=Path, required=True, metavar="PATH", help="a checkpoint, its model.safetensors, or a run's folder")
    add("--data", type=shard_place, required=True, metavar="SHARDS",
        help="labelled shards to train the SVMs on: a folder, or an http(s):// address of one")  # fmt: skip
    add("--test-data", type=shard_place, metavar="SHARDS", help="shards to test on (default: a part of --data)")
    add("--network", choices=get_args(Role), default=default.network, help=f"whose encoder (default: {default.network})")
    add("--modalities", default=",".join(MODALITIES), metavar="LIST", help="of video, audio, both (default: all three)")
    add(
        "--train-clips",
        type=int,
        default=default.train_clips,
        metavar="N",
        help="random clips per training sample (default: 25)",
    )
    add("--test-clips", type=int, default=default.test_clips, metavar="N", help="uniform clips per test sample (default: 3)")
    add("--svm-c", metavar="LIST", help="values of C to choose from (default: 1e-3,1e-2,1e-1,1; audio and both from 1e-5)")
    add("--test-fraction", type=float, default=default.test_fraction, metavar="X",
        help="share of --data's samples tested on, without --test-data (default: 0.25)")  # fmt: skip
    add("--validation-fraction", type=float, default=default.validation_fraction, metavar="X",
        help="share of the training samples on which C is chosen (default: 0.2)")  # fmt: skip
    add("--seed", type=int, default=default.seed, metavar="N", help="of splits and random clips (default: 0)")
    add("--untrained", action="store_true", help="evaluate the same model at initialisation, the baseline")
    add("--batch", type=int, default=default.batch, metavar="N", help="clips encoded at a time (default: 16)")
    add("--device", choices=DEVICES, default=default.device, help="auto, cpu or cuda (default: auto)")
    add("--output", type=Path, metavar="DIR", help=f"write {report} there (default: the table is printed, nothing is written)")


def read_arguments(args: argparse.Namespace) -> SvmOptions:
    """The options that arguments describe.

    Raises:
        UserError: a value that breaks a rule.
    """
    given = {field.name: getattr(args, field.name) for field in fields(SvmOptions)}
    given["modalities"] = tuple(dict.fromkeys(name.strip() for name in args.modalities.split(",")))
    given["svm_c"] = None if args.svm_c is None else parse_c(args.svm_c)
    return SvmOptions(**given)
