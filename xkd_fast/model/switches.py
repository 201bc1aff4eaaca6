"""What ``auto`` means for the fast model's switches: the set that the step's benchmark found to be the fastest on a device.

``measured_steps.json`` holds it by device name, precision and clips per pass; ``python -m benchmarks.adopt`` writes it from the
committed results. Where nothing was measured, every ``auto`` is off.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from xkd_fast.errors import UserError
from xkd_fast.model.options import ModelOptions
from xkd_fast.model.vit import require_compiler

SWITCHES = ("compile", "teacher_stream", "cuda_graph")
MEASURED = Path(__file__).with_name("measured_steps.json")


@cache
def measured_steps() -> dict[str, Any]:
    """The switches that are on in the fastest step, by device name, precision and clips."""
    return json.loads(MEASURED.read_text(encoding="utf-8"))


def settled(
    options: ModelOptions, device: torch.device, precision: str, clips: int, *, obstacle: Callable[[str], str | None]
) -> tuple[ModelOptions, list[str]]:
    """The options with every ``auto`` made true or false, and a line that says why.

    Args:
        options: the model's.
        device: that it will run on.
        precision: of the run, such as "bfloat16".
        clips: per pass of a rank; the measured batch size nearest to it counts.
        obstacle: why a switch cannot be on, or None; a measured set with such a one is not taken. Asked of no other switch.
    """
    open_ones = [name for name in SWITCHES if getattr(options, name) == "auto"]
    idle = [name for name in ("teacher_stream", "cuda_graph") if device.type == "cpu" and getattr(options, name) is True]
    told = [f"{name}: on, which has no effect on a CPU" for name in idle]
    off: dict[str, Any] = dict.fromkeys(open_ones, False)
    if options.implementation != "fast" or not open_ones:
        return replace(options, **off), told
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    batches = measured_steps().get(name, {}).get(precision, {})
    if not batches:
        reason = f"no set of them is known to be the fastest in {precision} on {'this ' if name == 'cpu' else ''}{name}"
        return replace(options, **off), [*told, f"{', '.join(open_ones)}: off, {reason}"]
    nearest = min(batches, key=lambda each: abs(int(each) - clips))
    for wanted in batches[nearest]:
        if wanted in open_ones and (why := obstacle(wanted)):  # the rest of the set has not been measured without it
            why = f"the fastest step of {nearest} clips on {name} had {wanted}, and {why}"
            return replace(options, **off), [*told, f"{', '.join(open_ones)}: off, {why}"]
    on: dict[str, Any] = {switch: switch in batches[nearest] for switch in open_ones}
    where = f"as in the fastest step of {nearest} clips on {name} (XKD, base model)"
    lines = [f"{switch}: {'on' if is_on else 'off'}, {where}" for switch, is_on in on.items()]
    return replace(options, **on), [*told, *lines]


def obstacle_to(options: ModelOptions, zero_stage: int, precision: str, switch: str) -> str | None:
    """Why a switch cannot be on in a run, or None. Asked of "compile" it imports PyTorch's compiler, which takes seconds."""
    if switch == "cuda_graph":
        if options.objective.mmd_scope == "global":
            return "gathering rows from other ranks is not recorded"
        if precision == "float16":
            return "its backward pass is of a loss that is not scaled, as float16 needs it"
        if zero_stage == 3:
            return "ZeRO 3 keeps no weights at fixed places"
    if switch == "compile":
        if options.attention == "xformers":
            return "xformers' mask is made in Python"
        try:
            require_compiler()
        except UserError:
            return "no C++ compiler works here"
    return None
