"""A run of a tiny model, as a checkpoint holds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tests.tiny import tiny_options
from xkd_fast.config import Config, DataOptions, render_config
from xkd_fast.data.log_mel import MelOptions
from xkd_fast.model.build import build_model
from xkd_fast.reference import XKD
from xkd_fast.weights import write_safetensors

CLIPS_PER_CLASS = 4  # of the rendered shards


def tiny_config() -> Config:
    """A run of the tests' tiny model."""
    data = DataOptions(fps=8, clip_seconds=1, local_audio_seconds=0.5)
    return replace(Config(), seed=3, model=tiny_options(), data=data, mel=MelOptions(n_fft=256, hop=200))


def trained_model(config: Config) -> XKD:
    """The model of a run whose networks have all left their initial weights."""
    model = build_model(config.model, seed=config.seed)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def write_checkpoint(folder: Path, config: Config, model: XKD, step: int = 120) -> Path:
    """A folder that holds what evaluation reads of a checkpoint."""
    folder.mkdir(parents=True)
    write_safetensors(model.state_dict(), folder / "model.safetensors", {"config": render_config(config), "step": str(step)})
    return folder
