"""The whole training step of several contestants in one process, in turns: the figure that every claim of speed rests on."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
from xkd_fast.model.build import build_model, random_views
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
ROUNDS, WARM_UP = 7, 2
STARTED = time.perf_counter()
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


class Pair:
    """One contestant and the fast model, the only ones on the device while they are timed.

    Attributes:
        seconds: of every timed step, by name.
        losses: of the first step, by name and term.
        peak_bytes: device memory that each reserved by itself for model, optimiser and two steps; empty on a CPU.
    """

    def __init__(self, kinds: list[Callable[[], Contestant]], device: torch.device) -> None:
        self.device = device
        self.entrants: list[Contestant] = []
        self.seconds: dict[str, list[float]] = {}
        self.losses: dict[str, list[float]] = {}
        self.peak_bytes: dict[str, int] = {}
        self._kinds = kinds

    def enter(self, views: Views, masks: MaskNoise) -> None:
        """Build them one after the other; each warms up alone, with its memory watched."""
        for kind in self._kinds:
            before = torch.cuda.memory_reserved() if self.device.type == "cuda" else 0
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            entrant = kind()
            self.losses[entrant.name] = [timed(entrant, views, masks)[1] for _ in range(WARM_UP)]
            if self.device.type == "cuda":
                self.peak_bytes[entrant.name] = torch.cuda.max_memory_reserved() - before
            self.entrants.append(entrant)
            self.seconds[entrant.name] = []

    def race(self, views: Views, masks: MaskNoise, rounds: int) -> None:
        """Time them in turns, so that a slow minute of the machine falls on both."""
        for _ in range(rounds):
            for entrant in self.entrants:
                taken, loss = timed(entrant, views, masks)
                self.seconds[entrant.name].append(taken)
                self.losses[entrant.name].append(loss)

    def leave(self) -> None:
        """Free what they hold; compiled programs and graphs hold on to their models."""
        self.entrants.clear()
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def rivals(device: torch.device, *, compiled: bool) -> list[tuple[str, Callable[..., Contestant]]]:
    """Who is timed beside the fast model, the most telling first."""
    kinds: list[tuple[str, Callable[..., Contestant]]] = [
        ("reference", Released),
        ("strong", partial(Strong, compiled=compiled)),
    ]
    if device.type == "cuda":
        kinds += [(kind.name, kind) for kind in (FastGraph, *((FastCompiled, FastCompiledGraph) if compiled else ()))]
    return kinds


def costs_of(options: ModelOptions, device: torch.device, dtype: torch.dtype, views: Views, masks: MaskNoise) -> dict[str, Any]:
    """What a step of each costs beside time; the strong one is not compiled, since no counter sees into compiled code."""
    costs = {}
    for name, kind in (("reference", Released), ("strong", partial(Strong, compiled=False)), ("fast", Fast)):
        try:
            costs[name] = counted(kind(options, device, dtype), views, masks)
        except torch.OutOfMemoryError:
            continue
        finally:
            gc.collect()
    return costs


@pytest.mark.parametrize("variant", ["xkd", "mas", "mats"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_step(measuring: bool, variant: Variant, precision: str) -> None:
    """Times the base model's step; at smoke size checks that all contestants compute the same and learn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, options = getattr(torch, precision), model_options(variant, tiny=not measuring)
    compiled = measuring and os.environ.get("XKD_BENCHMARK_COMPILE", "1") == "1"
    rows: list[dict[str, Any]] = []
    named = os.environ.get("XKD_BENCHMARK_CLIPS")
    batches = tuple(map(int, named.split(","))) if named else BATCHES[device.type]
    for clips in batches if measuring else (4,):
        if too_late():
            break
        torch.manual_seed(0)
        views = random_views(options, clips, device)
        masks = build_model(tiny_masks(options), seed=0).draw_masks(views)
        pairs, lost, unreached = [], [], []
        for name, kind in rivals(device, compiled=compiled):
            if too_late():
                unreached.append(name)
                continue
            pair = Pair([partial(kind, options, device, dtype), partial(Fast, options, device, dtype)], device)
            try:
                pair.enter(views, masks)
                pair.race(views, masks, ROUNDS if measuring else 3)
                pairs.append(pair)
            except torch.OutOfMemoryError:
                lost.append(name)
            finally:
                pair.leave()
            check(pair, precision)
        rows.append(row(clips, pairs, costs_of(options, device, dtype, views, masks)))
        rows[-1] |= {"out_of_memory": lost, "not_reached": unreached}
        report(variant, precision, rows[-1])
        if measuring or "XKD_BENCHMARK_RESULTS" in os.environ:  # after every batch size: a later failure loses nothing
            size = "base" if measuring else "tiny"
            result = {"model": f"{variant} {size}", "precision": precision, "strong_is_compiled": compiled, "rows": rows}
            record.write(f"step_{device.type}_{variant}_{precision}", result)
    if not rows:
        pytest.skip(f"not reached within {os.environ['XKD_BENCHMARK_SECONDS']} s")


def tiny_masks(options: ModelOptions) -> ModelOptions:
    """The same views and masks of a model that is built at once."""
    return replace(options, encoder=EncoderOptions(16, 1, 1), decoder=DecoderOptions(16, 1, 1), head=HeadOptions(16, 16, 16))


def too_late() -> bool:
    """Whether the time for benchmarks, XKD_BENCHMARK_SECONDS from their start, is over; never without that."""
    allowed = os.environ.get("XKD_BENCHMARK_SECONDS")
    return allowed is not None and time.perf_counter() - STARTED > float(allowed)


def check(pair: Pair, precision: str) -> None:
    """Both begin with the same loss, and it falls."""
    tolerance = 1e-3 if precision == "float32" else 0.02
    first = [losses[0] for losses in pair.losses.values() if losses]
    assert max(first, default=0) - min(first, default=0) < tolerance * max(first, default=1), pair.losses
    for name, losses in pair.losses.items():
        assert len(losses) < 4 or losses[-1] < losses[0], f"{name} does not learn: {losses}"


def row(clips: int, pairs: list[Pair], costs: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One batch size's figures; the ratios are taken round by round."""
    seconds: dict[str, list[float]] = {}
    peak: dict[str, int] = {}
    ratios = {}
    for pair in pairs:
        (name, times), (_, fast) = pair.seconds.items()
        seconds[name] = times
        seconds.setdefault("fast", []).extend(fast)
        peak |= pair.peak_bytes
        ratios[name] = record.spread([other / own for other, own in zip(times, fast, strict=True)])
    return {
        "clips": clips,
        "seconds": {name: record.spread(times) for name, times in seconds.items()},
        "clips_per_second": {name: clips / statistics.median(times) for name, times in seconds.items()},
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
    for told in ("out_of_memory", "not_reached"):
        if figures[told]:
            print(f"  {told.replace('_', ' ')}: {', '.join(figures[told])}")
    if figures["peak_bytes"]:
        print("  peak GiB: " + ", ".join(f"{name} {size / 2**30:.1f}" for name, size in figures["peak_bytes"].items()))
    for name, costs in figures["costs"].items():
        print(
            f"  {name}: {costs['saved_bytes'] / 2**20:.0f} MiB kept, {costs['launches']} launches, "
            f"{costs['gflop_per_clip']:.1f} GFLOP/clip"
        )
