"""Attention backends at the base model's shapes: the measurements behind ``model.attention=auto``."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import record
from xkd_fast.errors import UserError
from xkd_fast.model.attention import Attention, choose
from xkd_fast.model.packing import Group

# lengths that are packed together, head width and blocks, forward and backward: both students, then decoders
TRAINED = (((60, 73), 64, 12), ((113, 141), 64, 12), ((393,), 32, 4), ((561,), 32, 4))
TEACHERS = (((393,), 64, 12), ((561,), 64, 12))  # forward alone
HEADS = 12


def backends(device: torch.device) -> dict[str, Attention]:
    """Those that run here; on a CPU our kernels would be interpreted, and ``auto`` has ways of its own."""
    found = {name: choose(name) for name in ("eager", "sdpa", "recompute", *(["auto"] if device.type == "cpu" else []))}
    for name in ("triton", "xformers") if device.type == "cuda" else ():
        try:
            found[name] = choose(name)
        except UserError as error:
            print(error)
    return found


def seconds(
    attention: Attention,
    clips: int,
    lengths: tuple[int, ...],
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trained: bool,
) -> float:
    """Time of one forward pass from a packed projection, and of the backward pass to it where it is ``trained``."""
    groups = [Group(clips, length) for length in lengths]
    packed = torch.randn(clips * sum(lengths), 3 * HEADS * width, dtype=dtype, device=device, requires_grad=trained)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    mixed = attention.attend_packed(packed, groups, HEADS)
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
    contestants = backends(device)
    rows, total = [], {part: dict.fromkeys(contestants, 0.0) for part in ("trained", "teachers")}
    for part, shapes in (("trained", TRAINED), ("teachers", TEACHERS)):
        for lengths, width, blocks in shapes:
            taken: dict[str, list[float]] = {name: [] for name in contestants}
            for _ in range(12 if measuring else 1):
                for name, attention in contestants.items():
                    where = (clips, lengths, width, getattr(torch, precision), device)
                    taken[name].append(seconds(attention, *where, trained=part == "trained"))
            timings = {name: record.spread(times[len(times) // 6 :]) for name, times in taken.items()}
            rows.append({"part": part, "tokens": lengths, "head_width": width, "blocks": blocks, "seconds": timings})
            for name, timing in timings.items():
                total[part][name] += blocks * timing["median"]
        sums = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in total[part].items())
        print(f"{precision}, {clips} clips, {part}: {sums}")
    if measuring:
        result = {"precision": precision, "clips": clips, "heads": HEADS, "seconds_per_step": total, "rows": rows}
        record.write(f"attention_{record.place(device)}_{precision}", result)
