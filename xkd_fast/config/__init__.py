"""Every option of a run: YAML files and dotted overrides, checked here once; inside the program, frozen dataclasses.

A file holds sections (``train:``, ``model:`` …); what it leaves out keeps its default, and a ``base: OTHER.yaml`` at its top
names a file to start from. Overrides are ``key.path=value`` with the value in YAML. Numbers are read as YAML 1.2 reads them
(``1e-4`` is a number, ``yes`` is text). All that is wrong is reported at once, as one ``UserError``.
"""

from xkd_fast.config.load import load_config, shipped_configs
from xkd_fast.config.options import (
    CheckpointOptions,
    Config,
    DataOptions,
    DemoData,
    EmaOptions,
    LogOptions,
    OptimizerOptions,
    TrainOptions,
)
from xkd_fast.config.render import render_config

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
