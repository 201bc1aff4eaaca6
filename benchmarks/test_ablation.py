"""What every technique of the fast model is worth: its step without one of them, in turns with the whole of it.

Ratios are of a contestant's time to the fast model's: above 1, a technique that is left out had made the step faster by so
much, and one that is added makes it slower. Without ``--benchmark`` a smoke test, which checks that every contestant computes
the fast model's losses.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from benchmarks import record
from benchmarks.ablation import FP8, WITHOUT, added_techniques
from benchmarks.race import Race, report, too_late
from benchmarks.test_step import CLIPS, CLOSE, model_options, named_batches
from xkd_fast.model.options import Variant

FAR = 0.2  # the most that a term of the loss may differ where teachers are rounded to 8 bits
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    """What was measured so far, by precision."""
    return {"bfloat16": [], "float32": []}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Batch sizes and rounds as of the step's benchmark."""
    if "clips" in metafunc.fixturenames:
        measuring = metafunc.config.getoption("--benchmark")
        batches = named_batches(os.environ.get("XKD_BENCHMARK_CLIPS", CLIPS[DEVICE.type])) if measuring else [(4, 1)]
        metafunc.parametrize(("precision", "clips", "rounds"), [(p, *b) for p in ("bfloat16", "float32") for b in batches])


def test_ablation(measuring: bool, precision: str, clips: int, rounds: int, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Times XKD's step without one technique after the other, and with those that are off by default."""
    title = f"ablation {precision} {clips} clips"
    if too_late():
        pytest.skip(f"{title}: not reached")
    variant: Variant = "xkd"
    race = Race(model_options(variant, tiny=not measuring), DEVICE, getattr(torch, precision), clips)
    rows[precision].append(race.row)
    more = added_techniques(DEVICE, precision)
    if not measuring:
        more.pop("fast + compile")  # half a minute for nothing: tests/model/test_structure.py compares compiled steps
    gpu = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else None
    result = {"gpu": gpu, "model": "xkd base", "precision": precision, "without": list(WITHOUT), "with": list(more)}
    for _ in race.run({**WITHOUT, **more}, rounds, counted=WITHOUT):
        if measuring:
            record.write(f"ablation_{record.place(DEVICE)}_{precision}", {**result, "rows": rows[precision]})
    report(title, race.row)
    if race.errors:
        raise race.errors[0]
    for name, difference in race.row["disagreement"].items():
        close = FAR if FP8 in name else CLOSE[precision]
        assert difference < close, f"{name}'s loss is not the fast model's: {race.row['disagreement']}"
    assert race.row["fast_against"].keys() == {*WITHOUT, *more}
