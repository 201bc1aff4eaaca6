"""Attention backends at the base model's shapes: the measurements behind ``model.attention=auto``."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import record
from xkd_fast.model.attention import Attend, eager, recompute, sdpa

BACKENDS: dict[str, Attend] = {"eager": eager, "sdpa": sdpa, "recompute": recompute}
# tokens, head width and blocks, forward and backward: both students' masked and local views, then decoders
TRAINED = ((60, 64, 12), (113, 64, 12), (73, 64, 12), (141, 64, 12), (393, 32, 4), (561, 32, 4))
TEACHERS = ((393, 64, 12), (561, 64, 12))  # forward alone
HEADS = 12


def seconds(
    attend: Attend, clips: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device, *, trained: bool
) -> float:
    """Time of one forward pass from a packed projection, and of the backward pass to it where it is ``trained``."""
    packed = torch.randn(clips, tokens, 3 * HEADS * width, dtype=dtype, device=device, requires_grad=trained)
    start = time.perf_counter()
    mixed = attend(*packed.view(clips, tokens, 3, HEADS, width).permute(2, 0, 3, 1, 4))
    if trained:
        mixed.backward(torch.ones_like(mixed))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_attention(measuring: bool, precision: str) -> None:
    """Times every backend in turns; at smoke size runs each once at each shape."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clips = (32 if device.type == "cuda" else 2) if measuring else 1
    rows, total = [], {part: dict.fromkeys(BACKENDS, 0.0) for part in ("trained", "teachers")}
    for part, shapes in (("trained", TRAINED), ("teachers", TEACHERS)):
        for tokens, width, blocks in shapes:
            taken: dict[str, list[float]] = {name: [] for name in BACKENDS}
            for _ in range(12 if measuring else 1):
                for name, attend in BACKENDS.items():
                    where = (clips, tokens, width, getattr(torch, precision), device)
                    taken[name].append(seconds(attend, *where, trained=part == "trained"))
            timings = {name: record.spread(times[len(times) // 6 :]) for name, times in taken.items()}
            rows.append({"part": part, "tokens": tokens, "head_width": width, "blocks": blocks, "seconds": timings})
            for name, timing in timings.items():
                total[part][name] += blocks * timing["median"]
        sums = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in total[part].items())
        print(f"{precision}, {clips} clips, {part}: {sums}")
    if measuring:
        result = {"precision": precision, "clips": clips, "heads": HEADS, "seconds_per_step": total, "rows": rows}
        record.write(f"attention_{device.type}_{precision}", result)
