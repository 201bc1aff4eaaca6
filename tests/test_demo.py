"""What the demo refuses, and what it leaves alone. The whole of it runs as `make demo`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from xkd_fast.config import load_config
from xkd_fast.demo import finished_checkpoint
from xkd_fast.engine.checkpoint import TrainState
from xkd_fast.errors import UserError
from xkd_fast.train import make_ready


def stopped_at(output: Path, step: int) -> None:
    """A checkpoint of the demo's run after ``step`` steps: its state alone."""
    folder = output / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    state = TrainState(step=step, seed=0, samples=100, global_batch=32, world_size=2, zero_stage=1)
    (folder / "state.json").write_text(json.dumps(asdict(state)))


def test_a_half_trained_model_is_not_evaluated(tmp_path: Path) -> None:
    """Red if a run that a SIGTERM stopped early passes for the demo's result."""
    config = load_config("demo", [f"output={tmp_path}", "train.epochs=4"])  # 4 epochs of 3 steps
    stopped_at(tmp_path, 11)
    with pytest.raises(UserError, match=r"stopped after 11 of 12 steps; the same command again"):
        finished_checkpoint(config)
    stopped_at(tmp_path, 12)
    assert finished_checkpoint(config).name == "step-00000012"
    short = load_config("demo", [f"output={tmp_path}", "train.epochs=40", "train.stop_after_steps=12"])
    assert finished_checkpoint(short).name == "step-00000012"


def test_nothing_is_rendered_for_a_run_on_data_of_ones_own(tmp_path: Path) -> None:
    """Red if a run that names its shards still spends minutes on the demo's."""
    places = [f"data.demo.videos={tmp_path}/videos", f"data.demo.shards={tmp_path}/shards"]
    make_ready(load_config("demo", [*places, f"output={tmp_path}/run", "data.train=[somewhere]"]))
    assert not list(tmp_path.iterdir())
