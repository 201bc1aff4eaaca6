"""The rank side of test_hot_path: takes steps between two rows of metrics and writes what would wait for a GPU."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from tests.engine.engine_ranks import BATCH, Cell, cell_config, moment
from tests.host_traffic import HostTraffic
from tests.tiny import part_of, random_batch
from xkd_fast.engine.checkpoint import TrainState
from xkd_fast.engine.engine import Engine
from xkd_fast.engine.launch import start_deepspeed
from xkd_fast.engine.reporter import Reporter, StepCost
from xkd_fast.engine.schedule import Schedule
from xkd_fast.model.build import build_model

WARM_UP, STEPS = 2, 5  # the first steps fill states and caches, and DeepSpeed's record of ZeRO 3


def places(cell: Cell, deepspeed: Any) -> list[str]:
    """Where the host would wait in the steps after the first ones."""
    config = cell_config(cell, 1)
    engine = Engine(build_model(config.model, seed=1), config, deepspeed)
    state = TrainState(0, 0, BATCH, 0, BATCH, 1, cell.stage)
    traffic = HostTraffic()
    with Reporter(config, engine, state, Schedule(config, 100), StepCost(1.0, 1.0)) as reporter:
        for step in range(STEPS):
            views, masks = random_batch(config.model, BATCH, seed=step, dtype=torch.float32)
            size = BATCH // cell.accumulation
            parts = [part_of(views, masks, slice(micro * size, (micro + 1) * size)) for micro in range(engine.accumulation)]
            with traffic if step >= WARM_UP else nullcontext():
                engine.prepare(moment(step + 1))
                for part in parts:
                    reporter.add(engine.forward_backward(*part))
                    engine.step()
                reporter.end_step(step + 1, moment(step + 1), list, is_last=False)
    return traffic.places


def watch_waiting() -> None:
    """From now on whoever waits for a device, an event or a stream is noted by the :class:`HostTraffic` that is active."""
    from deepspeed.accelerator import get_accelerator

    waits = (
        (get_accelerator(), "synchronize"),
        (torch.cuda, "synchronize"),
        (torch.cuda.Event, "synchronize"),
        (torch.cuda.Stream, "synchronize"),
    )
    for owner, name in waits:
        setattr(owner, name, lambda *_, **__: HostTraffic.note("synchronize"))


def main(folder: Path) -> None:
    """Write the places of every cell that ``cells.json`` lists."""
    deepspeed = start_deepspeed()
    watch_waiting()
    cells = [Cell(**values) for values in json.loads((folder / "cells.json").read_text())]
    (folder / "places.json").write_text(json.dumps({cell.name: places(cell, deepspeed) for cell in cells}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
