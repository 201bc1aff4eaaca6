"""From options to a model."""

from __future__ import annotations

import torch

from xkd_fast import reference
from xkd_fast.model.options import ModelOptions
from xkd_fast.model.xkd import XKD

IMPLEMENTATIONS: dict[str, type[reference.XKD]] = {"fast": XKD, "reference": reference.XKD}


def build_model(options: ModelOptions, *, seed: int) -> reference.XKD:
    """A freshly initialised model; the same seed gives the same weights and leaves torch's default generator untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return IMPLEMENTATIONS[options.implementation](options)
