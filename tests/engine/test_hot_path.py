"""Between two rows of metrics the host never waits for the device."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import pytest
import torch

from tests.distributed import run_ranks
from tests.engine.engine_ranks import Cell
from tests.host_traffic import HostTraffic

CELLS = [
    *(Cell(stage, precision="bfloat16") for stage in range(4)),
    Cell(1, accumulation=2),
    Cell(0, update="torch"),
    Cell(1, implementation="reference"),
    Cell(1, precision="float16"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By cell, where the host would have waited."""
    folder = tmp_path_factory.mktemp("traffic")
    (folder / "cells.json").write_text(json.dumps([asdict(cell) for cell in CELLS]))
    run_ranks(["-m", "tests.engine.traffic_ranks", str(folder)], world_size=1)
    return json.loads((folder / "places.json").read_text())


@pytest.mark.parametrize("cell", CELLS, ids=[cell.name for cell in CELLS])
def test_nothing_waits_between_two_rows(cell: Cell, places: dict[str, list[str]]) -> None:
    """Red if clipping, an update, a teacher, a metric or DeepSpeed reads a value back; float16 may, once per step."""
    # At ZeRO 3 DeepSpeed looks at the norm that it did not have to compute: a constant in the host's memory.
    found = [place for place in places[cell.name] if not (cell.stage == 3 and "/deepspeed/runtime/utils.py" in place)]
    expected = 3 if cell.precision == "float16" else 0  # three steps were watched: whether their gradients overflowed
    assert len(found) == expected, Counter(found)


def test_a_wait_is_noticed() -> None:
    """Red if the watch itself sees nothing."""
    with HostTraffic() as traffic:
        float(torch.ones(()).sum())
    assert traffic.met == ["_local_scalar_dense"] and "test_hot_path" in traffic.places[0]
