"""The whole training step of several contestants in one process, in turns: the figure that every claim of speed rests on."""

from __future__ import annotations

import gc
import os
import statistics
import time
from typing import Any

import pytest
import torch

from benchmarks import measure, record
from benchmarks.contestants import (
    Contestant,
    Fast,
    FastCompiled,
    FastCompiledGraph,
    FastGraph,
    Released,
    Strong,
    autocast,
)
from xkd_fast.data.views import MaskNoise, Views
from xkd_fast.model.build import random_views
from xkd_fast.model.options import (
    AudioOptions,
    DecoderOptions,
    EncoderOptions,
    HeadOptions,
    ModelOptions,
    Variant,
    VideoOptions,
)

TINY = {
    "video": VideoOptions(frames=8, size=32, local_frames=4, local_size=16),
    "audio": AudioOptions(mel_bins=16, frames=64, local_frames=32),
    "encoder": EncoderOptions(32, 2, 2),
    "decoder": DecoderOptions(16, 1, 2),
    "head": HeadOptions(32, 16, 64),
}
ROUNDS = 7
BATCHES = {"cuda": (32, 128), "cpu": (2,)}


def model_options(variant: Variant, *, tiny: bool) -> ModelOptions:
    """The base model of a variant with the released recipe's local views, or one of its structure that takes no time."""
    sizes: dict[str, Any] = dict(TINY) if tiny else {}
    if variant != "xkd":
        sizes["video"] = VideoOptions(8, 32, 3, 4, 16) if tiny else VideoOptions(local_views=3)
    return ModelOptions(variant=variant, **sizes)


def timed(contestant: Contestant, views: Views, masks: MaskNoise) -> tuple[float, float]:
    """Seconds of one whole step, and its loss."""
    start = time.perf_counter()
    loss = contestant.step(views, masks).item()  # waits for the device
    return time.perf_counter() - start, loss


def counted(contestant: Contestant, views: Views, masks: MaskNoise) -> dict[str, float]:
    """What one step costs beside time. Outside of the timed rounds: counting slows a step down."""
    clips = views.batch_size

    def forward() -> torch.Tensor:
        with autocast(contestant.device, contestant.dtype):
            return contestant.model(views, masks).total

    kept = measure.saved_bytes(forward)
    gflop = measure.flops(lambda: forward().backward()) / clips / 1e9
    contestant.model.zero_grad()
    return {
        "saved_bytes": kept,
        "gflop_per_clip": gflop,
        "launches": measure.launches(lambda: contestant.step(views, masks)),
    }


def peak_bytes(
    kind: type[Contestant], options: ModelOptions, device: torch.device, dtype: torch.dtype, views: Views, masks: MaskNoise
) -> int:
    """GPU memory that one contestant reserves by itself for model, optimiser and three steps; a graph's own pool counts."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    entrant = kind(options, device, dtype)
    for _ in range(3):
        entrant.step(views, masks).item()
    taken = torch.cuda.max_memory_reserved() - before
    del entrant
    gc.collect()
    torch.cuda.empty_cache()
    return taken


def contestants(options: ModelOptions, device: torch.device, dtype: torch.dtype, *, compiled: bool) -> list[Contestant]:
    """All of them, on equal weights."""
    kinds: list[type[Contestant]] = [Fast]
    if device.type == "cuda":
        kinds += [FastGraph, *((FastCompiled, FastCompiledGraph) if compiled else ())]
    plain = [Released(options, device, dtype), Strong(options, device, dtype, compiled=compiled)]
    return [*plain, *(kind(options, device, dtype) for kind in kinds)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["xkd", "mas", "mats"])
def test_step(measuring: bool, variant: Variant, precision: str) -> None:
    """Times the base model's step; at smoke size checks that all contestants compute the same and learn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, options = getattr(torch, precision), model_options(variant, tiny=not measuring)
    compiled = measuring and os.environ.get("XKD_BENCHMARK_COMPILE", "1") == "1"
    rows = []
    for clips in BATCHES[device.type] if measuring else (4,):
        torch.manual_seed(0)
        views = random_views(options, clips, device)
        entrants = contestants(options, device, dtype, compiled=compiled)
        masks = entrants[0].model.draw_masks(views)
        seconds: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
        losses: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
        for _ in range(ROUNDS if measuring else 3):
            for entrant in entrants:  # in turns, so that a slow minute of the machine falls on all
                taken, loss = timed(entrant, views, masks)
                seconds[entrant.name].append(taken)
                losses[entrant.name].append(loss)
        first = [losses[name][0] for name in losses]
        assert max(first) - min(first) < (1e-3 if precision == "float32" else 0.1) * first[0], losses
        countable = {"reference", "fast"} | (set() if compiled else {"strong"})
        costs = {entrant.name: counted(entrant, views, masks) for entrant in entrants if entrant.name in countable}
        del entrant, entrants
        torch._dynamo.reset()  # compiled programs hold on to their models
        gc.collect()
        peak = {}
        if device.type == "cuda":
            peak = {kind.name: peak_bytes(kind, options, device, dtype, views, masks) for kind in (Released, Fast, FastGraph)}
        rows.append(row(clips, seconds, costs, peak))
        report(variant, precision, rows[-1])
    if measuring:
        result = {"model": f"{variant} base", "precision": precision, "strong_is_compiled": compiled, "rows": rows}
        record.write(f"step_{device.type}_{variant}_{precision}", result)


def row(
    clips: int, seconds: dict[str, list[float]], costs: dict[str, dict[str, float]], peak: dict[str, int]
) -> dict[str, Any]:
    """One batch size's figures; the ratios are taken round by round, the first round (warm-up) left out."""
    warm = {name: times[min(2, len(times) - 1) :] for name, times in seconds.items()}
    ratios = {
        name: record.spread([other / own for other, own in zip(times, warm["fast"], strict=True)])
        for name, times in warm.items()
        if name != "fast"
    }
    return {
        "clips": clips,
        "seconds": {name: record.spread(times) for name, times in warm.items()},
        "clips_per_second": {name: clips / statistics.median(times) for name, times in warm.items()},
        "fast_against": ratios,
        "costs": costs,
        "peak_bytes": peak,
    }


def report(variant: str, precision: str, figures: dict[str, Any]) -> None:
    """Print a row."""
    speeds = ", ".join(f"{name} {speed:.2f}" for name, speed in figures["clips_per_second"].items())
    ratios = ", ".join(
        f"{ratio['median']:.2f} × {name} ({ratio['min']:.2f}-{ratio['max']:.2f})"
        for name, ratio in figures["fast_against"].items()
    )
    print(f"{variant} {precision} {figures['clips']} clips: clips/s {speeds}; fast = {ratios}")
    for name, costs in figures["costs"].items():
        print(
            f"  {name}: {costs['saved_bytes'] / 2**20:.0f} MiB kept, {costs['launches']} launches, "
            f"{costs['gflop_per_clip']:.1f} GFLOP/clip"
        )
