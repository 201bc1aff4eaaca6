"""``python -m benchmarks.adopt``: make what was measured the default.

Reads every ``benchmarks/results/kernels_*.json`` and writes ``kernels/xkd_kernels/measured.json`` (who computes an operator on
which device) and ``tuned.json`` (how its kernels are launched there). Triton computes where its forward and backward pass
together take less time than those of every rival by more than noise, or a time as short but for noise and less memory than
the fastest rival's; elsewhere PyTorch computes, and that rival is named. A launch is taken up where it was faster than the
default. Cases that share operator, type and shape class decide together. From GPUs' ``optimizer_*.json`` likewise: the
optimiser's compiled operator where it beats every rival. From their ``step_*_xkd_*.json`` it writes
``xkd_fast/model/measured_steps.json``: the switches of the fast model (compile, teacher_stream, cuda_graph) that make its step
the fastest, by device, precision and clips.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.tuning import GAIN
from xkd_fast.model.switches import MEASURED as MEASURED_STEPS
from xkd_kernels.adamw_ema import OPERATOR
from xkd_kernels.backends import MEASURED
from xkd_kernels.configurations import TUNED

Place = tuple[str, str, str, str]  # device, operator or kernel, type, shape class
Table = dict[str, dict[str, dict[str, dict[str, Any]]]]  # by device, operator or kernel, type, shape class


def winners(results: Iterable[dict[str, Any]]) -> Table:
    """Who is the fastest at each operator: "triton", "torch", or a rival that is neither, such as "compiled"."""
    passes: dict[Place, list[dict[str, float]]] = defaultdict(list)
    memory: dict[Place, list[dict[str, float]]] = defaultdict(list)
    for result in results:
        for row in result["rows"]:
            place = (result["gpu"], row["operator"], row["dtype"], row["shape"])
            memory[place].append(row["most_allocated"])
            for seconds in row["seconds"].values():
                passes[place].append({name: spread["median"] for name, spread in seconds.items()})
    best = {place: _best(_totals(seconds), _totals(memory[place])) for place, seconds in passes.items()}
    return _table({place: "triton" if name == "fused" else name for place, name in best.items()})


def _best(seconds: dict[str, float], memory: dict[str, float]) -> str:
    """The fastest, where our kernel has to be faster by more than noise, or as fast and to take less memory."""
    rivals = {name: total for name, total in seconds.items() if name != "fused"}
    rival = _least(rivals)
    if seconds["fused"] < GAIN * rivals[rival]:
        return "fused"
    is_as_fast = GAIN * seconds["fused"] <= rivals[rival]
    return "fused" if is_as_fast and memory.get("fused", math.inf) < memory.get(rival, 0) else rival


def optimizers(results: Iterable[dict[str, Any]]) -> Table:
    """Who computes the optimiser's step: "native" or "torch"."""
    found: dict[Place, str] = {}
    for result in results:
        wins = result["backend"] == "native" and all(rival["ratio"]["median"] > 1 for rival in result["rivals"].values())
        found[result["gpu"], OPERATOR, "float32", ""] = "native" if wins else "torch"
    return _table(found)


def switches(results: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, list[str]]]]:
    """The fast model's switches that are on in its fastest step, by device, precision and clips."""
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    for result in results:
        for row in result["rows"]:
            took = {
                name: ratio["median"]
                for name, ratio in row["fast_against"].items()
                if name.startswith("fast + ") and not row["allocation_retries"].get(name)
            }
            best = min(took, key=lambda name: took[name], default="fast")
            wins = best in took and took[best] < GAIN  # of the time that the plain one took
            batches = found.setdefault(result["gpu"], {}).setdefault(result["precision"], {})
            batches[str(row["clips"])] = best.split(" + ")[1:] if wins else []
    return found


def launches(results: Iterable[dict[str, Any]]) -> Table:
    """How kernels are launched where that is not the default."""
    cases: dict[Place, list[dict[str, float]]] = defaultdict(list)
    for result in results:
        for launch in (launch for row in result["rows"] for launch in row["launches"]):
            place = (result["gpu"], launch["kernel"], launch["dtype"], launch["shape"])
            cases[place].append({_written(attempt): attempt["seconds"] for attempt in launch["tried"]})
    found: dict[Place, Any] = {}
    for place, tried in cases.items():
        totals, default = _totals(tried), next(iter(tried[0]))
        if totals[best := _least(totals)] < GAIN * totals[default]:
            found[place] = json.loads(best)
    return _table(found)


def _written(attempt: dict[str, Any]) -> str:
    """A launch without its time."""
    return json.dumps({key: value for key, value in attempt.items() if key != "seconds"}, sort_keys=True)


def _totals(measured: list[dict[str, float]]) -> dict[str, float]:
    """Sums over all that share a place, by those who took part in each."""
    took_part = set.intersection(*(set(seconds) for seconds in measured))
    return {name: sum(seconds[name] for seconds in measured) for name in measured[0] if name in took_part}


def _least(totals: dict[str, float]) -> str:
    return min(totals, key=lambda name: totals[name])


def _table(found: dict[Place, Any]) -> Table:
    table: Table = {}
    for (gpu, name, dtype, shape), value in found.items():
        table.setdefault(gpu, {}).setdefault(name, {}).setdefault(dtype, {})[shape] = value
    return table


def tables(folder: Path) -> dict[Path, Any]:
    """What the package's files should hold, given a folder of results."""

    def read(pattern: str) -> list[dict[str, Any]]:
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(pattern))]

    def of_gpus(pattern: str) -> list[dict[str, Any]]:
        return [result for result in read(pattern) if result.get("gpu")]

    results = read("kernels_*.json")
    measured: Table = {}
    for table in (winners(results), optimizers(of_gpus("optimizer_*.json"))):
        for gpu, operators in table.items():
            measured.setdefault(gpu, {}).update(operators)
    return {MEASURED: measured, TUNED: launches(results), MEASURED_STEPS: switches(of_gpus("step_*_xkd_*.json"))}


def text(table: Any) -> str:
    """A table as it is written."""
    return json.dumps(table, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path, table in tables(record.RESULTS).items():
        aside = path.with_suffix(".partial")
        aside.write_text(text(table), encoding="utf-8")
        os.replace(aside, path)
        print(f"{path}: {', '.join(table) or 'nothing was measured'}")
