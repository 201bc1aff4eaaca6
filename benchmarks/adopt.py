"""``python -m benchmarks.adopt``: make what was measured the default.

Reads every ``benchmarks/results/kernels_*.json`` and writes ``kernels/xkd_kernels/measured.json`` (who computes an operator on
which device) and ``tuned.json`` (how its kernels are launched there). Triton computes where its forward and backward pass
together take less time than those of every rival; a launch is taken up where it was faster than the default.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.tuning import GAIN
from xkd_kernels.backends import MEASURED
from xkd_kernels.configurations import TUNED

Table = dict[str, dict[str, dict[str, dict[str, Any]]]]  # by device, operator or kernel, type, shape class


def winners(results: Iterable[dict[str, Any]]) -> Table:
    """Who computes each operator: "triton" or "torch"."""
    found: Table = {}
    for result in results:
        for row in result["rows"]:
            contestants = set.intersection(*(set(seconds) for seconds in row["seconds"].values()))
            total = {name: sum(seconds[name]["median"] for seconds in row["seconds"].values()) for name in contestants}
            fastest = min(total, key=lambda name: total[name])
            place = found.setdefault(result["gpu"], {}).setdefault(row["operator"], {}).setdefault(row["dtype"], {})
            place[row["shape"]] = "triton" if fastest == "fused" else "torch"
    return found


def launches(results: Iterable[dict[str, Any]]) -> Table:
    """How kernels are launched where that is not the default."""
    found: Table = {}
    for result in results:
        for launch in (launch for row in result["rows"] for launch in row["launches"]):
            default, best = launch["tried"][0], min(launch["tried"], key=lambda attempt: attempt["seconds"])
            if best["seconds"] < GAIN * default["seconds"]:
                place = found.setdefault(result["gpu"], {}).setdefault(launch["kernel"], {}).setdefault(launch["dtype"], {})
                place[launch["shape"]] = {key: value for key, value in best.items() if key != "seconds"}
    return found


def tables(folder: Path) -> dict[Path, Table]:
    """What the package's files should hold, given a folder of results."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("kernels_*.json"))]
    return {MEASURED: winners(results), TUNED: launches(results)}


def text(table: Table) -> str:
    """A table as it is written."""
    return json.dumps(table, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    for path, table in tables(record.RESULTS).items():
        aside = path.with_suffix(".partial")
        aside.write_text(text(table), encoding="utf-8")
        os.replace(aside, path)
        print(f"{path}: {', '.join(table) or 'nothing was measured'}")
