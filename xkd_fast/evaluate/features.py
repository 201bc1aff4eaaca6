"""Frozen features of clips: a checkpoint's encoder, the mean of its patch tokens (XKD.md section 10)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from xkd_fast.config import Config, load_config
from xkd_fast.data.plain_clips import ClipBatch
from xkd_fast.engine.checkpoint import Checkpoints
from xkd_fast.errors import UserError
from xkd_fast.model.build import build_model
from xkd_fast.reference import XKD
from xkd_fast.weights import read_safetensors

Role = Literal["teacher", "student"]
MODEL_FILE = "model.safetensors"
USABLE = "name a whole checkpoint, such as RUN/checkpoints/step-00000120, or a RUN whose newest one is whole"


@dataclass(frozen=True)
class TrainedModel:
    """A model as a checkpoint holds it."""

    file: Path
    step: int  # optimiser steps taken; 0 = at initialisation
    config: Config  # of the run that wrote it
    model: XKD


@dataclass(frozen=True)
class ClipFeatures:
    """Features of n clips, some of the same sample, by modality."""

    samples: NDArray[np.int64]  # [n]: which sample each clip was taken from
    values: dict[str, NDArray[np.float32]]  # "video", "audio": [n, width]

    def of(self, modality: str) -> NDArray[np.float32]:
        """[n, width] of ``video`` or ``audio``; ``both``: [n, 2·width], each L2-normalised, side by side."""
        if modality != "both":
            return self.values[modality]
        return np.concatenate([normalise(self.values[name]) for name in ("video", "audio")], axis=1)


def normalise(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of L2 norm 1; a row of zeros stays one."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.maximum(norms, np.finfo(np.float32).tiny)).astype(np.float32)


def find_model_file(checkpoint: Path) -> Path:
    """The file that a checkpoint's name means: itself, the one in a checkpoint, or the one in a run's newest checkpoint.

    Raises:
        UserError: if there is none.
    """
    if checkpoint.is_file():
        return checkpoint
    if not checkpoint.exists():
        raise UserError(f"checkpoint {checkpoint} does not exist; {USABLE}")
    inside = checkpoint / "checkpoints"
    newest = Checkpoints(inside if inside.is_dir() else checkpoint).found()[-1:]
    for folder in (checkpoint, *newest):
        if (folder / MODEL_FILE).is_file():
            return folder / MODEL_FILE
    raise UserError(f"{folder} holds no {MODEL_FILE}; {USABLE}")


def load_model(checkpoint: Path, *, untrained: bool = False) -> TrainedModel:
    """Rebuild a model from its checkpoint, in evaluation mode on the CPU.

    Args:
        checkpoint: a ``model.safetensors``, a checkpoint's folder, or a run's folder (its newest checkpoint).
        untrained: leave the weights as the run began with them; the checkpoint only says which model it is.

    Raises:
        UserError: if there is no such checkpoint, or its weights do not fit the model that its configuration describes.
    """
    file = find_model_file(checkpoint)
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors: {error}; {USABLE}") from error
    if "config" not in metadata:
        raise UserError(f"{file} holds no configuration; only files written by `xkd-fast train` say which model they are of")
    config = read_config(metadata["config"], file)
    model = build_model(config.model, seed=config.seed)
    if not untrained:
        try:
            model.load_state_dict(read_safetensors(file))
        except RuntimeError as error:
            raise UserError(f"{file} does not fit the model of its own configuration: {error}") from error
    return TrainedModel(file, 0 if untrained else int(metadata.get("step", 0)), config, model.eval())


def read_config(text: str, file: Path) -> Config:
    """The configuration that ``file`` holds as ``text``; a ``UserError`` names the file."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "config.yaml"
        written.write_text(text, encoding="utf-8")
        try:
            return load_config(written)
        except UserError as error:
            raise UserError(
                f"{file} was written with other options: {str(error).replace(str(written), 'configuration')}"
            ) from None


@torch.inference_mode()
def extract_features(
    model: XKD,
    role: Role,
    modalities: Sequence[str],
    batches: Iterable[ClipBatch],
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda clips: None,
) -> ClipFeatures:
    """Features of every clip, in float32.

    Args:
        model: on ``device``.
        role: whose encoder.
        modalities: of ``video`` and ``audio``.
        batches: clips, of which the global views are used.
        device: where the encoder runs.
        progress: called with the number of clips of each batch.
    """
    network = model.teacher if role == "teacher" else model.student
    samples: list[NDArray[np.int64]] = []
    values: Mapping[str, list[NDArray[np.float32]]] = {modality: [] for modality in modalities}
    for batch in batches:
        samples.append(batch.samples)
        for modality, rows in values.items():
            clips = batch.views.video_global if modality == "video" else batch.views.audio_global
            rows.append(network(modality).features(clips.to(device)).float().cpu().numpy())
        progress(len(batch.samples))
    if not samples:
        raise ValueError("no clips to extract features of")
    return ClipFeatures(np.concatenate(samples), {modality: np.concatenate(rows) for modality, rows in values.items()})
