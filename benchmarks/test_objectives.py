"""What heads, refinement and losses take of the step: time, launches and memory, by the reference's code and by ours.

Without ``--benchmark`` a smoke test at tiny sizes, which checks that all compute the same.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import measure, record, timing
from benchmarks.ablation import WITHOUT
from benchmarks.contestants import Fast
from benchmarks.objectives import Contestant, given
from benchmarks.race import too_late
from benchmarks.test_step import CLIPS, model_options, named_batches
from xkd_fast.data.views import MaskNoise
from xkd_fast.model.build import random_views
from xkd_kernels import obstacle

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALL = "heads, refinement and losses, all of these"
STEPS = 3  # of the whole fast model, for the share
CLOSE = {"float32": 2e-3, "bfloat16": 1e-1}  # of the largest number: twice as far as both are from float32
NAMES = {"plain": None, "torch": "torch", "kernels": "triton"}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """What was measured so far."""
    return []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Batch sizes and rounds as of the step's benchmark."""
    if "clips" in metafunc.fixturenames:
        measuring = metafunc.config.getoption("--benchmark")
        batches = named_batches(os.environ.get("XKD_BENCHMARK_CLIPS", CLIPS[DEVICE.type])) if measuring else [(3, 1)]
        metafunc.parametrize(("precision", "clips", "rounds"), [(p, *b) for p in ("bfloat16", "float32") for b in batches])


def contestants(dtype: torch.dtype, clips: int, *, tiny: bool) -> dict[str, Contestant]:
    """Who can run here; at the base model's sizes no interpreted kernels."""
    options = model_options("xkd", tiny=tiny)
    torch.manual_seed(0)
    batch = given(options, DEVICE, dtype, clips)
    runs = obstacle(DEVICE, dtype) is None and (tiny or DEVICE.type == "cuda")
    return {name: Contestant(options, batch, dtype, kernels) for name, kernels in NAMES.items() if runs or kernels != "triton"}


def step_seconds(dtype: torch.dtype, clips: int, rounds: int) -> dict[str, dict[str, float]]:
    """Of the fast model's whole step, with the reference's code at this place (``plain``) and as it is (``torch``)."""
    options = model_options("xkd", tiny=False)
    views = random_views(options, clips, DEVICE)
    masks = MaskNoise(*(torch.rand(clips, part.tokens, device=DEVICE) for part in (options.video, options.audio)))
    steps = {name: kind(options, DEVICE, dtype).step for name, kind in (("plain", WITHOUT[ALL]), ("torch", Fast))}
    works = {name: partial(step, views, masks) for name, step in steps.items()}
    return {name: record.spread(each) for name, each in timing.seconds(works, DEVICE, rounds).items()}


def test_objectives(measuring: bool, precision: str, clips: int, rounds: int, rows: list[dict[str, Any]]) -> None:
    """Times all in turns and counts what they launch and keep; fails if one computes something else."""
    title = f"objectives {precision} {clips} clips"
    if too_late():
        pytest.skip(f"{title}: not reached")
    dtype = getattr(torch, precision)
    found = contestants(dtype, clips, tiny=not measuring)
    expected = found["plain"].both_passes()
    for name, contestant in found.items():
        for mine, theirs in zip(contestant.both_passes(), expected, strict=True):
            off = (mine.float() - theirs.float()).abs().max() / theirs.float().abs().max()
            assert off < CLOSE[precision], f"{name} computes something else: off by {off:.1e} at shape {list(mine.shape)}"
    times = timing.seconds({name: contestant.both_passes for name, contestant in found.items()}, DEVICE, rounds)
    row: dict[str, Any] = {"precision": precision, "clips": clips}
    row["seconds"] = {name: record.spread(each) for name, each in times.items()}
    row["plain_against"] = {
        name: record.spread([other / own for other, own in zip(times["plain"], each)]) for name, each in times.items()
    }
    row["launches"] = {name: measure.launches(contestant.both_passes) for name, contestant in found.items()}
    row["saved_bytes"] = {name: measure.saved_bytes(contestant.forward) for name, contestant in found.items()}
    if measuring:
        found.clear()
        row["step_seconds"] = step_seconds(dtype, clips, STEPS)
        rows.append(row)
        gpu = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else None
        record.write(f"objectives_{record.place(DEVICE)}", {"gpu": gpu, "model": "xkd base", "rows": rows})
    print(told(title, row))


def told(title: str, row: dict[str, Any]) -> str:
    """A line for each contestant."""
    lines = [title]
    for name, seconds in row["seconds"].items():
        step = row.get("step_seconds", {}).get("plain" if name == "plain" else "torch")
        share = f" ({seconds['median'] / step['median']:.1%} of a step with it)" if step else ""
        faster, kept = row["plain_against"][name]["median"], row["saved_bytes"][name] / 2**20
        lines.append(
            f"  {name}: {1e3 * seconds['median']:.1f} ms{share}, {faster:.2f} × plain; {row['launches'][name]} launches, "
            f"{kept:.1f} MiB kept"
        )
    return "\n".join(lines)
