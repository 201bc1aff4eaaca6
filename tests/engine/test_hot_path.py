"""Between two rows of metrics the host never waits for the device."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

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
    Cell(1, offload=True),
    Cell(1, variant="mats", precision="bfloat16"),
]
SLOW = [
    *(Cell(stage, offload=True) for stage in (2, 3)),
    *(Cell(stage, variant=variant, precision="bfloat16") for stage in (0, 3) for variant in ("mas", "mats")),
]
# What is made of numbers in the host's memory, and stays there or leaves it pinned; by operator, the files that may.
ON_THE_HOST = {"lift_fresh": ("xkd_fast/engine/groups.py",)}
# At ZeRO 3 DeepSpeed looks at the norm that it did not have to compute: a constant in the host's memory.
ON_THE_HOST_AT_3 = {name: ("/deepspeed/runtime/utils.py",) for name in ("lift_fresh", "_local_scalar_dense")}


@pytest.fixture(scope="module")
def places(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By cell, where the host would have waited."""
    folder = tmp_path_factory.mktemp("traffic")
    cells = [item.callspec.params["cell"] for item in request.session.items if item.path == request.path and "[" in item.name]
    (folder / "cells.json").write_text(json.dumps([asdict(cell) for cell in cells]))
    run_ranks(["-m", "tests.engine.traffic_ranks", str(folder)], world_size=1)
    return json.loads((folder / "places.json").read_text())


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, id=cell.name, marks=pytest.mark.slow if cell in SLOW else ()) for cell in (*CELLS, *SLOW)],
)
def test_nothing_waits_between_two_rows(cell: Cell, places: dict[str, list[str]]) -> None:
    """Red if clipping, an update, a teacher, a metric or DeepSpeed reads a value back or waits; float16 may, once per step."""
    found = [place for place in places[cell.name] if not is_of_the_host(place, cell)]
    expected = 3 if cell.precision == "float16" else 0  # three steps were watched: whether their gradients overflowed
    assert len(found) == expected, Counter(found)


def is_of_the_host(place: str, cell: Cell) -> bool:
    """Whether what was met is known to concern the host's memory alone."""
    name, file = place.rpartition(":")[0].split(" ", 1)
    allowed = ON_THE_HOST.get(name, ()) + (ON_THE_HOST_AT_3.get(name, ()) if cell.stage == 3 else ())
    return file.endswith(allowed) if allowed else False


def test_a_wait_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if the watch itself sees nothing: a value read back, a tensor made of the host's numbers, a device waited for."""
    from tests.engine import traffic_ranks

    for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
        monkeypatch.setattr(owner, "synchronize", owner.synchronize)  # to be restored
    accelerator = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: accelerator)
    traffic_ranks.watch_waiting()
    with HostTraffic() as traffic:
        float(torch.ones(()).sum())
        torch.tensor([1.0])
        torch.cuda.synchronize()
        accelerator.synchronize()
    assert traffic.met == ["_local_scalar_dense", "lift_fresh", "synchronize", "synchronize"]
    assert all("test_hot_path" in place for place in traffic.places)
    assert not any(is_of_the_host(place, Cell(3)) for place in traffic.places)
    torch.cuda.synchronize()
    assert len(traffic.met) == 4, "noted where nobody watches"
