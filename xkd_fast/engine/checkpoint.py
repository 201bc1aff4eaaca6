"""Checkpoints: everything a run needs to go on exactly, written so that a crash never harms the last good one.

``checkpoints/step-00000120/`` holds DeepSpeed's files (trainable weights, optimiser shards), ``model.safetensors`` (the whole
model in our state names: what evaluation reads), ``state.json`` (position in the data and what it depends on),
``options.json`` and one file of random-number states per rank. A checkpoint is written in a directory whose name ends in
``.partial``, flushed to disk and renamed; only whole ones carry the plain name.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from xkd_fast.config import Config, render_config
from xkd_fast.data.shards import ShardSet
from xkd_fast.engine.engine import Engine
from xkd_fast.engine.launch import every_rank, first_rank_first
from xkd_fast.engine.zero import partitions_apart, whole
from xkd_fast.errors import UserError
from xkd_fast.weights import read_safetensors, write_safetensors

REPLACED = ".replaced"  # ending of a checkpoint's name while a new one of the same step takes its place
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class TrainState:
    """Where a run stands, and what that position depends on."""

    step: int  # optimiser steps taken
    seed: int
    samples: int  # size of the training set
    data_crc32: int  # of its samples, their bytes and their order
    global_batch: int
    world_size: int
    zero_stage: int
    skipped: int = 0  # steps not taken because gradients overflowed; their clips are spent
    clips_per_file: int = 1  # drawn from a sample when it comes

    @property
    def batches(self) -> int:
        """Global batches of clips spent."""
        return self.step + self.skipped

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return self.samples // (self.global_batch // self.clips_per_file)

    @classmethod
    def start(cls, config: Config, shards: ShardSet, *, world_size: int) -> TrainState:
        """A run before its first step."""
        train = config.train
        place = (len(shards), shards.crc32, train.global_batch, world_size, train.zero_stage)
        return cls(0, config.seed, *place, clips_per_file=config.data.clips_per_file)

    def after_step(self, *, applied: bool = True) -> TrainState:
        """The state one global batch later, from which a step was taken or, if not ``applied``, was not."""
        return replace(self, step=self.step + applied, skipped=self.skipped + (not applied))

    def check_same(self, other: TrainState, path: Path) -> None:
        """Raise ``UserError`` if a run in state ``other`` cannot go on from this checkpoint exactly."""
        keys = {
            "seed": "seed",
            "samples": "data.train (the number of samples)",
            "data_crc32": "data.train (the checksum of the samples, in their order)",
            "global_batch": "train.global_batch",
            "zero_stage": "train.zero_stage",
            "world_size": "the number of processes",
        }
        for name, key in keys.items():
            saved, now = getattr(self, name), getattr(other, name)
            if saved != now:
                raise UserError(f"{path} was written with {key} = {saved}, this run has {now}; resume with the same value")


class CannotWrite(UserError):
    """A part of a checkpoint cannot be written; the message is the reason alone."""


@contextmanager
def _writing() -> Iterator[None]:
    """Turn the errors of writing files into :class:`CannotWrite`; to be left before a rank waits for another."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # of the device, not of the disk
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer tells of a full disk as a RuntimeError
        raise CannotWrite(" ".join(str(error).split())[:200]) from error


@contextmanager
def _errors_after_barriers(deepspeed: Any) -> Iterator[None]:
    """Let DeepSpeed save; what it cannot write is told once all ranks are through its barriers, where none waits in vain.

    Nor does it leave a copy of its conversion script in the folder.
    """
    engine, errors = deepspeed.checkpoint_engine, []
    save = engine.save

    def attempt(state_dict: object, path: str) -> None:
        try:
            with _writing():
                save(state_dict, path)
        except CannotWrite as error:
            errors.append(error)

    engine.save, deepspeed._copy_recovery_script = attempt, lambda path: None
    try:
        yield
    finally:
        del engine.save, deepspeed._copy_recovery_script
    if errors:
        raise errors[0]


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, *, keep: int = 0, every_steps: int = 0) -> None:
        """``keep``: newest checkpoints kept, 0 = all; ``every_steps``: optimiser steps between two, 0 = none is due."""
        self.directory, self.keep, self.every_steps = directory, keep, every_steps

    @classmethod
    def from_config(cls, config: Config) -> Checkpoints:
        """The checkpoints of the run that ``config`` describes, in ``OUTPUT/checkpoints``."""
        options = config.checkpoint
        return cls(Path(config.output) / "checkpoints", keep=options.keep, every_steps=options.every_steps)

    def due(self, step: int) -> bool:
        """Whether a checkpoint belongs after ``step`` steps."""
        return self.every_steps > 0 and step % self.every_steps == 0

    def found(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())

    def recover(self) -> None:
        """Undo a replacement that an interruption cut in two: the old checkpoint counts until the new one is in its place."""
        for replaced in self.directory.glob(f"step-*{REPLACED}"):
            final = replaced.with_name(replaced.name.removesuffix(REPLACED))
            if final.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(final)

    def save(self, engine: Engine, state: TrainState, config: Config) -> Path:
        """Write a checkpoint; every rank takes part.

        Raises:
            UserError: it cannot be written. Older checkpoints stand, and nothing is left of this one.
        """
        final = self.directory / f"step-{state.step:08d}"
        partial = self.directory / f"{final.name}.partial"
        try:
            first_rank_first(lambda: self._begin(partial))
            every_rank(lambda: self._write(engine, state, config, partial))
            first_rank_first(lambda: self._publish(partial, final))
        except CannotWrite as error:
            if not error.is_told:
                self.recover()
            whole = self.found()
            standing = f"{whole[-1]} stands, --resume auto goes on from there" if whole else "no checkpoint was written before"
            told = UserError(
                f"{final} cannot be written ({error}); make room or name another output, then call again: {standing}"
            )
            told.is_told = error.is_told
            if not told.is_told:
                shutil.rmtree(partial, ignore_errors=True)
            raise told from error
        first_rank_first(lambda: self._prune(final))
        return final

    def _begin(self, partial: Path) -> None:
        with _writing():
            self.recover()
            for leftover in self.directory.glob("step-*.partial"):
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)

    def _write(self, engine: Engine, state: TrainState, config: Config, partial: Path) -> None:
        with _errors_after_barriers(engine.deepspeed), partitions_apart(engine.deepspeed):
            engine.deepspeed.save_checkpoint(
                str(self.directory),
                tag=partial.name,
                save_latest=False,
                exclude_frozen_parameters=True,
                client_state={"loss_scale": asdict(engine.loss_scale)},
            )
        with whole(list(engine.module.parameters())), _writing():
            torch.save(random_states(), partial / f"random-{dist.get_rank():05d}.pt")
            if dist.get_rank() == 0:
                metadata = {"step": str(state.step), "config": render_config(config.shareable())}
                write_safetensors(engine.module.state_dict(), partial / "model.safetensors", metadata)
                (partial / "options.json").write_text(json.dumps(config.shareable().as_dict(), indent=2), encoding="utf-8")
                (partial / "state.json").write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")

    def _publish(self, partial: Path, final: Path) -> None:
        with _writing():
            flush_to_disk(partial)
            replaced = self.directory / f"{final.name}{REPLACED}"
            if final.exists():
                final.rename(replaced)
            partial.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
            flush_directory(self.directory)

    def _prune(self, newest: Path) -> None:
        older = [path for path in self.found() if path.name <= newest.name]
        for path in older[: -self.keep] if self.keep else []:
            try:
                shutil.rmtree(path)
            except OSError as error:
                raise UserError(
                    f"{path}, older than checkpoint.keep = {self.keep} allows, cannot be removed ({error.strerror}); remove it "
                    f"by hand, then go on with --resume auto: {newest} is whole"
                ) from error

    def resolve(self, resume: str) -> Path | None:
        """The checkpoint that ``resume`` (``none``, ``auto`` or a path) names; None to start afresh.

        Raises:
            UserError: if a path is given that is no checkpoint.
        """
        if resume == "none":
            return None
        if resume == "auto":
            found = self.found()
            return found[-1] if found else None
        path = Path(resume)
        if not (path / "state.json").is_file():
            inside = Checkpoints(path / "checkpoints" if (path / "checkpoints").is_dir() else path).found()
            if not inside:
                raise UserError(f"checkpoint.resume = {resume} holds no checkpoint (a directory step-… with state.json in it)")
            path = inside[-1]
        return path

    @staticmethod
    def load(engine: Engine, path: Path, current: TrainState, config: Config) -> TrainState:
        """Restore a checkpoint into ``engine``, which must be in the situation ``current`` describes but for the step.

        Raises:
            UserError: if it is damaged, or was written by a run that differs in what decides its course.
        """
        with _damage_named(path):
            state = read_state(path)
            options = read_options(path)
        state.check_same(current, path)
        check_same_options(options, config, path)
        random_file = path / f"random-{dist.get_rank():05d}.pt"
        own: dict[str, Any] = {}

        def read() -> None:
            with _damage_named(path):
                own.update(model=read_safetensors(path / "model.safetensors"))
                own.update(random=torch.load(random_file, weights_only=True))

        every_rank(read)
        with _damage_named(path):
            loaded, client = engine.deepspeed.load_checkpoint(str(path.parent), tag=path.name, load_module_strict=False)
            if loaded is None:
                raise FileNotFoundError("no DeepSpeed state in it")
            engine.restored(own["model"], client["loss_scale"])
            restore_random_states(own["random"])
        return state


# What may change between a run and its continuation without changing its course.
FREE_OPTIONS = frozenset(
    {
        "output",
        "log",
        "checkpoint",
        "model.checkpointing",
        "model.compile",
        "model.teacher_stream",
        "model.cuda_graph",
        "train.threads",
        "train.device",
        "train.stop_after_steps",
        "data.threads",
        "data.prefetch",
        "data.decode",
        "data.demo",
        "data.train",
        "data.on_corrupt",
        "data.remote",
        "data.cache",
    }
)


# What checkpoints from before an option existed were trained with.
EARLIER: dict[str, Any] = {
    "data.order": "random",
    "data.shuffle_buffer": 2048,
    "data.clips_per_file": 1,
    "augment.pixels": "float32",
}


def flat_options(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by dotted key, those of :data:`FREE_OPTIONS` left out."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        key = f"{prefix}{name}"
        if key not in FREE_OPTIONS:
            flat |= flat_options(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return flat


def read_options(path: Path) -> dict[str, Any]:
    """The options that a checkpoint's run was started with, by dotted key, without the free ones.

    Raises:
        UserError: if they are missing or malformed.
    """
    try:
        return flat_options(json.loads((path / "options.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path / 'options.json'} cannot be read: {error}; is {path} a whole checkpoint?") from error


def check_same_options(saved: dict[str, Any], config: Config, path: Path) -> None:
    """Raise ``UserError`` naming every option in which this run differs from the ``saved`` ones of the checkpoint."""
    now, saved = flat_options(config.as_dict()), EARLIER | saved
    if saved["data.order"] == now["data.order"] == "random":  # the buffer is sequential order's alone
        saved.pop("data.shuffle_buffer")
        now.pop("data.shuffle_buffer")
    different = [
        f"{key} = {saved.get(key)} (now {now.get(key)})" for key in sorted(saved | now) if saved.get(key) != now.get(key)
    ]
    if different:
        raise UserError(
            f"{path} was written with {', '.join(different)}; resume with the same values, "
            "or start a new run in another output folder"
        )


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes its reader raise into an error about the checkpoint."""
    try:
        yield
    except (
        OSError,
        EOFError,
        pickle.UnpicklingError,
        RuntimeError,
        KeyError,
        ValueError,
        AttributeError,
        AssertionError,
        TypeError,
        IndexError,
        UserError,
    ) as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())[:300]
        older = [other for other in Checkpoints(path.parent).found() if other.name < path.name]
        advice = (
            f"resume from the one before, checkpoint.resume={older[-1]}" if older else "there is no older one to resume from"
        )
        raise UserError(f"{path} is damaged or incomplete ({kind}{reason}); {advice}") from error


def read_state(path: Path) -> TrainState:
    """The ``state.json`` of a checkpoint.

    Raises:
        UserError: if it is missing or malformed.
    """
    try:
        state = TrainState(**json.loads((path / "state.json").read_text(encoding="utf-8")))
        wrong = [name for name, value in asdict(state).items() if type(value) is not int or value < 0]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} must be whole numbers of 0 or more")
        return state
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path / 'state.json'} cannot be read: {error}; is {path} a whole checkpoint?") from error


def random_states() -> dict[str, Any]:
    """States of every random-number generator of this process, in types that load without unpickling code."""
    version, python_state, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": (version, python_state, gauss),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """The inverse of :func:`random_states`."""
    version, python_state, gauss = states["python"]
    random.setstate((version, tuple(python_state), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])


def flush_to_disk(directory: Path) -> None:
    """fsync every file below ``directory``, and the directories."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            flush_directory(path)
    flush_directory(directory)


def flush_directory(directory: Path) -> None:
    """fsync a directory's entries."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
