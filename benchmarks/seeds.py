"""Does the fast model in bfloat16 train as the reference does in float32? The demo's run, several seeds of each.

``python -m benchmarks.seeds`` trains and evaluates what is missing under ``runs/seeds`` (on two CPU cores about six minutes a
run; a second call goes on) and writes ``benchmarks/results/seeds_cpu.json``. What differs between seeds of one kind is noise;
the two kinds must not differ by more. ``--kinds fast fp8`` compares two others, here the fast model with and without teachers
in FP8, and writes ``seeds_fast_fp8_cpu.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from benchmarks import record
from xkd_fast.config import load_config
from xkd_fast.data.rendered import ensure_rendered
from xkd_fast.demo import MODALITIES, NETWORK, SVM_C, TRAIN_CLIPS, finished_checkpoint, pretrain
from xkd_fast.errors import UserError
from xkd_fast.evaluate.svm import SvmOptions, evaluate_svm

KINDS = {
    "reference": ["model.implementation=reference", "train.precision=float32"],
    "fast": ["model.implementation=fast", "train.precision=bfloat16"],
    "fp8": ["model.implementation=fast", "train.precision=bfloat16", "model.teacher_precision=fp8"],
}
TERMS = ("total", "reconstruction", "distillation", "alignment")


def trained(kind: str, seed: int, root: Path, processes: int) -> tuple[list[dict[str, float]], dict[str, float]]:
    """One run: its metrics and its probe accuracies by modality; trained and evaluated if it is not there yet."""
    output = root / f"{kind}-{seed}"
    overrides = [*KINDS[kind], f"output={output}", f"seed={seed}"]
    result = output / "svm" / "svm.json"
    if not result.is_file():
        config, console = load_config("demo", overrides), Console()
        ensure_rendered(config, console, workers=os.cpu_count() or 1)
        if pretrain("demo", overrides, processes) is not None:
            raise UserError(f"{output}: stopped; the same command again goes on")
        assert config.data.demo is not None
        shards = Path(config.data.demo.shards)
        options = SvmOptions(
            checkpoint=finished_checkpoint(config),
            data=shards / "train",
            test_data=shards / "test",
            network=NETWORK,
            train_clips=TRAIN_CLIPS,
            svm_c=SVM_C,
            output=result.parent,
        )
        evaluate_svm(options, console=console)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return rows, json.loads(result.read_text())["top1"]


def compared(fast: NDArray[np.float64], plain: NDArray[np.float64]) -> dict[str, float]:
    """Two kinds of curves, each [seeds, points]; ``plain``: those that the others are held against.

    Returns:
        seed_noise: standard deviation between seeds of one kind, root mean square over points and kinds.
        difference: between the kinds' means, root mean square over points.
        expected_difference: what seed noise alone makes of it.
        paired_difference: between runs of one seed, root mean square over points and seeds.
    """
    variance = (fast.var(axis=0, ddof=1) + plain.var(axis=0, ddof=1)) / 2
    seeds = len(fast)
    return {
        "seed_noise": float(np.sqrt(variance.mean())),
        "difference": float(np.sqrt(((fast.mean(axis=0) - plain.mean(axis=0)) ** 2).mean())),
        "expected_difference": float(np.sqrt(2 * variance.mean() / seeds)),
        "paired_difference": float(np.sqrt(((fast - plain) ** 2).mean())),
    }


def summary(runs: dict[str, list[tuple[list[dict[str, float]], dict[str, float]]]]) -> dict[str, Any]:
    """Curves and accuracies of two kinds beside each other; the first is what the second is held against."""
    plain, other = runs

    def curves(kind: str, term: str) -> NDArray[np.float64]:
        return np.array([[row[term] for row in rows] for rows, _ in runs[kind]])

    def accuracies(kind: str, modality: str) -> NDArray[np.float64]:
        return np.array([[top1[modality]] for _, top1 in runs[kind]])

    return {
        "losses": {term: compared(curves(other, term), curves(plain, term)) for term in TERMS},
        "last_losses": {kind: {term: curves(kind, term)[:, -1].tolist() for term in TERMS} for kind in runs},
        "top1": {m: compared(accuracies(other, m), accuracies(plain, m)) for m in MODALITIES},
        "top1_by_seed": {kind: {m: accuracies(kind, m)[:, 0].tolist() for m in MODALITIES} for kind in runs},
    }


def main(arguments: list[str] | None = None) -> None:
    """Train, compare, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs=2, choices=KINDS, default=["reference", "fast"], help="the second against the first")
    parser.add_argument("--output", type=Path, default=Path("runs/seeds"), help="folder of the runs")
    parser.add_argument("--processes", type=int, default=2, help="training processes per run")
    given = parser.parse_args(arguments)
    if len(set(given.seeds)) < 2:
        parser.error(f"--seeds {' '.join(map(str, given.seeds))}: two different ones at least, or there is no noise to measure")
    if given.processes < 1:
        parser.error(f"--processes {given.processes} must be 1 or more")
    if len(set(given.kinds)) < 2:
        parser.error(f"--kinds {' '.join(given.kinds)}: two different ones, or there is nothing to compare")
    runs: dict[str, list[tuple[list[dict[str, float]], dict[str, float]]]] = {kind: [] for kind in given.kinds}
    for seed in given.seeds:
        for kind in given.kinds:
            runs[kind].append(trained(kind, seed, given.output, given.processes))
    kinds = {kind: KINDS[kind] for kind in given.kinds}
    result = {"kinds": kinds, "seeds": given.seeds, "processes": given.processes, **summary(runs)}
    print(json.dumps(result, indent=2))
    usual = given.kinds == parser.get_default("kinds")
    record.write("seeds_cpu" if usual else f"seeds_{'_'.join(given.kinds)}_cpu", result)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
