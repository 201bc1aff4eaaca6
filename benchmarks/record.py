"""What every benchmark result says about itself, and how it is written."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xkd_fast.analysis.provenance import provenance

RESULTS = Path(os.environ.get("XKD_BENCHMARK_RESULTS") or Path(__file__).parent / "results")


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, extremes and number of the measurements."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "runs": len(seconds)}


def place(device: torch.device) -> str:
    """What a result's name says of where it was measured: the GPU's or the processor's name, such as ``amd_epyc_avx2``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else provenance()["device"].split(",")[0]
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def write(name: str, result: dict[str, Any]) -> Path:
    """Write ``results/NAME.json`` with its provenance; replaces the file in one step."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    aside = path.with_suffix(".json.partial")
    aside.write_text(json.dumps({**provenance(), **result}, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)
    return path
