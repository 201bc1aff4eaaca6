"""Faster launches of a kernel, found by trying: one thing at a time, from the default on, until nothing is left to try."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from xkd_kernels import configurations
from xkd_kernels.configurations import Launch, default_launch

Key = tuple[str, torch.dtype, str]  # kernel, type, shape class
WARPS, STAGES = (2, 4, 8, 16), (1, 2, 3, 4)
LEAST = {"packed_attention": 16}  # a side of a tile that a matrix product takes
MOST = 4096
GAIN = 0.98  # of the time: what is not faster by more than noise is not another launch


@contextmanager
def launches(chosen: dict[Key, Launch], asked: set[Key] | None = None, *, by_default: bool = False) -> Iterator[None]:
    """Launch kernels as ``chosen`` says, others as ever, or ``by_default``; note in ``asked`` which ones are launched."""
    original = configurations._launch

    def found(kernel: str, device: str | None, dtype: torch.dtype, shape: str) -> Launch:
        if asked is not None:
            asked.add((kernel, dtype, shape))
        if (kernel, dtype, shape) in chosen:
            return chosen[kernel, dtype, shape]
        return default_launch(kernel, dtype, shape) if by_default else original(kernel, device, dtype, shape)

    configurations._launch = found  # type: ignore[assignment]
    try:
        yield
    finally:
        configurations._launch = original


def neighbours(kernel: str, launch: Launch) -> Iterator[list[Launch]]:
    """What may be tried instead of a launch, one thing after the other; the best of each is where the next begins."""
    yield [replace(launch, warps=warps) for warps in WARPS if warps != launch.warps]
    yield [replace(launch, stages=stages) for stages in STAGES if stages != launch.stages]
    least = next((size for name, size in LEAST.items() if kernel.startswith(name)), 1)
    for name, size in launch.meta.items():
        tried = [other for other in (size // 2, size * 2) if least <= other <= MOST]
        yield [replace(launch, meta={**launch.meta, name: other}) for other in tried]


def tuned(key: Key, seconds: Callable[[Launch], float], is_late: Callable[[], bool]) -> tuple[Launch, list[dict[str, Any]]]:
    """The fastest launch of a kernel that was found, and everything that was tried.

    Args:
        key: kernel, type and shape class.
        seconds: of a launch; infinite where it does not run or computes something else.
        is_late: whether to stop with what has been found.
    """
    best = default_launch(*key)
    least = seconds(best)
    tried = [{**asdict(best), "seconds": least}]
    for step in range(2 + len(best.meta)):
        fastest, time = best, least
        for launch in list(neighbours(key[0], best))[step]:
            if is_late():
                break
            found = seconds(launch)
            tried.append({**asdict(launch), "seconds": found})
            if found < GAIN * least and found < time:
                fastest, time = launch, found
        best, least = fastest, time
    return best, tried
