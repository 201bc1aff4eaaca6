"""The whole training step of several contestants, in turns: the figure that every claim of speed rests on.

XKD_BENCHMARK_CLIPS names the batch sizes, each with an x and its number of rounds where that is not the usual one: ``2,4x15``.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import record
from benchmarks.contestants import Fast, Strong
from benchmarks.race import Race, Row, report, rivals, too_late
from xkd_fast.model.options import (
    AudioOptions,
    DecoderOptions,
    EncoderOptions,
    HeadOptions,
    ModelOptions,
    Variant,
    VideoOptions,
)
from xkd_kernels import obstacle

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = {
    "video": VideoOptions(frames=8, size=32, local_frames=4, local_size=16),
    "audio": AudioOptions(mel_bins=16, frames=64, local_frames=32),
    "encoder": EncoderOptions(32, 2, 2),
    "decoder": DecoderOptions(16, 1, 2),
    "head": HeadOptions(32, 16, 64),
}
CLIPS = {"cuda": "32,128", "cpu": "2"}
ROUNDS = {"cuda": 10, "cpu": 5}
CLOSE = {"float32": 1e-4, "bfloat16": 2e-2}  # the most that two contestants' terms of the loss may differ, relatively


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cases, those that matter most first: a deadline cuts off the last."""
    if "clips" in metafunc.fixturenames:
        measuring = metafunc.config.getoption("--benchmark")
        batches = named_batches(os.environ.get("XKD_BENCHMARK_CLIPS", CLIPS[DEVICE.type])) if measuring else [(4, 3)]
        kinds = [(variant, precision) for precision in ("bfloat16", "float32") for variant in ("xkd", "mas", "mats")]
        cases = [(*kind, *batch) for kind in kinds for batch in batches]
        metafunc.parametrize(("variant", "precision", "clips", "rounds"), cases)


def named_batches(text: str) -> list[tuple[int, int]]:
    """``"2,4x15"`` → clips and rounds of every batch size."""
    try:
        parts = [part.partition("x") for part in text.split(",")]
        pairs = [(int(clips), int(rounds or ROUNDS[DEVICE.type])) for clips, _, rounds in parts]
    except ValueError:
        pairs = [(0, 0)]
    if any(clips < 2 or rounds < 1 for clips, rounds in pairs):
        raise pytest.UsageError(f"XKD_BENCHMARK_CLIPS={text}: wants clips (2 or more) or clips x rounds, such as 2,4x15")
    return pairs


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], list[Row]]:
    """What was measured so far, by variant and precision."""
    return defaultdict(list)


def model_options(variant: Variant, *, tiny: bool) -> ModelOptions:
    """The base model of a variant with the released recipe's local views, or one of its structure that takes no time."""
    sizes: dict[str, Any] = dict(TINY) if tiny else {}
    if variant != "xkd":
        sizes["video"] = VideoOptions(8, 32, 3, 4, 16) if tiny else VideoOptions(local_views=3)
    return ModelOptions(variant=variant, **sizes)


def test_step(
    measuring: bool,
    variant: Variant,
    precision: str,
    clips: int,
    rounds: int,
    rows: dict[tuple[str, str], list[Row]],
) -> None:
    """Times the base model's step; at smoke size checks that all contestants compute the same and learn."""
    title = f"{variant} {precision} {clips} clips"
    if too_late():
        pytest.skip(f"{title}: not reached")
    compiled = measuring and os.environ.get("XKD_BENCHMARK_COMPILE", "1") == "1"
    everything = "XKD_BENCHMARK_SECONDS" not in os.environ or (variant, precision) == ("xkd", "bfloat16")
    race = Race(model_options(variant, tiny=not measuring), DEVICE, getattr(torch, precision), clips)
    rows[variant, precision].append(race.row)
    gpu = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else None
    result = {
        "gpu": gpu,
        "model": f"{variant} {'base' if measuring else 'tiny'}",
        "precision": precision,
        "strong_is_compiled": compiled,
    }
    for _ in race.run(rivals(DEVICE, compiled=compiled, all_choices=everything), rounds):
        if measuring or "XKD_BENCHMARK_RESULTS" in os.environ:  # after every pair: what comes later may fail
            record.write(f"step_{record.place(DEVICE)}_{variant}_{precision}", {**result, "rows": rows[variant, precision]})
    report(title, race.row)
    if race.errors:
        raise race.errors[0]
    for name, difference in race.row["disagreement"].items():
        assert difference < CLOSE[precision], f"{name}'s loss is not the fast model's: {race.row['disagreement']}"
    for name, losses in race.losses.items() if not measuring else ():
        assert losses[-1] < losses[0], f"{name} does not learn: {losses}"


def test_the_yardstick_is_plain_pytorch() -> None:
    """Red if what we are measured against runs our compiled code, in its norms, its teachers or its update."""
    met: dict[str, set[str]] = {}
    for kind in (Strong, Fast):
        contestant = kind(
            model_options("xkd", tiny=True), DEVICE, torch.float32, **({"compiled": False} if kind is Strong else {})
        )
        for parameter in contestant.model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        with OperatorNames() as names:
            contestant.local.step(0.9, 0.9)
            contestant.local.teachers.follow()
        met[contestant.name] = {name for name in names.met if name.startswith("xkd_kernels")}
    assert not met["strong"]
    assert obstacle(DEVICE, torch.float32, "native") or DEVICE.type == "cuda" or met["fast"], "the watch sees nothing"


class OperatorNames(TorchDispatchMode):
    """The names of the operators that are met inside."""

    def __init__(self) -> None:
        super().__init__()
        self.met: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.met.add(str(func))
        return func(*args, **(kwargs or {}))
