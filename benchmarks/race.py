"""One case of the step's benchmark: the fast model beside one other contestant at a time, in turns.

All of them at once would not fit on a GPU: a contestant leaves before the next one enters. One that does not fit is a result.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, record
from benchmarks.contestants import (
    Contestant,
    Fast,
    Released,
    Strong,
    autocast,
    fast_with,
    initial_model,
)
from benchmarks.memory import PeakMemory, free_unused, retries
from xkd_fast.data.views import MaskNoise, Views
from xkd_fast.engine.heap import keep_freed_memory
from xkd_fast.model.build import random_views
from xkd_fast.model.options import ModelOptions

WARM_UP = 2  # steps before the first timed one: compilation, recording, the optimiser's moments
MOST_HALVINGS = 16  # of a loss scale, from 2¹⁶ to 1
STARTED = time.monotonic()

Kind = Callable[[ModelOptions, torch.device, torch.dtype], Contestant]
Row = dict[str, Any]


def too_late() -> bool:
    """Whether XKD_BENCHMARK_SECONDS have passed since the benchmarks began; never without that."""
    allowed = os.environ.get("XKD_BENCHMARK_SECONDS")
    return allowed is not None and time.monotonic() - STARTED >= float(allowed)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a GPU's memory did not suffice; recordings and compilers wrap the error that says so."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "ALLOC_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def rivals(device: torch.device, *, compiled: bool, all_choices: bool) -> dict[str, Kind]:
    """Who is timed beside the fast model, the most telling first; ``all_choices`` adds all sets of its switches on a GPU."""
    kinds: dict[str, Kind] = {"reference": Released, "strong": partial(Strong, compiled=compiled)}
    if device.type == "cuda":
        sets = [("cuda_graph",)]
        if all_choices:
            sets += [("teacher_stream",), ("teacher_stream", "cuda_graph")]
            sets += [("compile", *others) for others in ((), *sets[::-1]) if compiled]
        kinds |= {kind.name: kind for kind in (fast_with(*switches) for switches in sets)}
    return kinds


class Entrant:
    """A contestant that has warmed up.

    Attributes:
        losses: of every step.
        terms: of the first step's loss.
        peak_bytes: the most memory it took for model, optimiser and warm-up.
    """

    def __init__(self, make: Callable[[], Contestant], device: torch.device, views: Views, masks: MaskNoise) -> None:
        memory = PeakMemory(device)
        self._contestant, self._batch, self.losses = make(), (views, masks), list[float]()
        self.step()
        self.terms = {name: term.item() for name, term in self._contestant.terms.items()}
        for _ in range(WARM_UP - 1):
            self.step()
        for _ in range(MOST_HALVINGS):  # a step that is left out takes less time than one that is not
            before = self._contestant.loss_scale()
            self.step()
            if self._contestant.loss_scale() >= before:
                break
        self.peak_bytes = memory.bytes()

    def step(self) -> float:
        """Seconds of one whole step."""
        start = time.perf_counter()
        loss = self._contestant.step(*self._batch).item()  # waits for the device
        taken = time.perf_counter() - start
        self.losses.append(loss)
        return taken


def counted(contestant: Contestant, views: Views, masks: MaskNoise) -> dict[str, float]:
    """What one step costs beside time. Outside of the timed rounds: counting slows a step down."""

    def forward() -> Tensor:
        with autocast(contestant.device, contestant.dtype):
            return contestant.model(views, masks).total

    kept = measure.saved_bytes(forward)
    gflop = measure.flops(lambda: forward().backward()) / views.batch_size / 1e9
    contestant.model.zero_grad()
    return {
        "saved_bytes": kept,
        "gflop_per_clip": gflop,
        "launches": measure.launches(lambda: contestant.step(views, masks)),
    }


class Race:
    """A case and its figures so far.

    Attributes:
        row: what is written: per contestant ``seconds``, which are ``{"out_of_memory": true}``, ``{"not_reached": true}`` or
            ``{"failed": reason}`` for one that was not timed and so is missing elsewhere, ``clips_per_second``, ``costs`` and
            ``peak_bytes``;
            ``fast_against`` holds ratios taken round by round, ``disagreement`` the largest relative difference of a term of
            the first step's loss to the fast model's; ``allocation_retries`` in a pair's rounds, each of which waits for the
            device, tell that memory was short and the times are not to be trusted.
        losses: of every step, by contestant.
        errors: of contestants that failed, other than by too little memory.
    """

    def __init__(self, options: ModelOptions, device: torch.device, dtype: torch.dtype, clips: int) -> None:
        self._how, self._device = (options, device, dtype), device
        if device.type == "cpu":
            keep_freed_memory()  # for all: with one contestant's memory given back, the next one would fetch it in its own time
        initial_model(options, device)  # drawn before anyone's memory is watched
        torch.manual_seed(0)
        self._views = random_views(options, clips, device)
        video, audio = (torch.rand(clips, part.tokens, device=device) for part in (options.video, options.audio))
        self._masks = MaskNoise(video, audio)
        self.losses: dict[str, list[float]] = {}
        self.errors: list[Exception] = []
        self._seconds: dict[str, list[float]] = {}
        kinds = ("seconds", "clips_per_second", "fast_against", "disagreement", "costs", "peak_bytes", "allocation_retries")
        self.row: Row = {"clips": clips, **{kind: {} for kind in kinds}}

    def run(self, kinds: Mapping[str, Kind], rounds: int, counted: Mapping[str, Kind] | None = None) -> Iterator[Row]:
        """Times every pair, then counts; yields the row whenever there is more in it.

        ``counted``: whose kept bytes, FLOPs and launches are counted beside the fast model's; None = the reference's and the
        strong one's. None may be compiled: nothing can be counted inside of a program.
        """
        fast: list[Entrant] = []
        self._attempt("fast", lambda: fast.append(self._entrant("fast", Fast)))
        for name, kind in kinds.items() if fast else ():
            if too_late():
                self.row["seconds"][name] = {"not_reached": True}
            else:
                self._attempt(name, partial(self._pair, name, kind, fast[0], rounds))
            yield self.row
        fast.clear()
        plain: dict[str, Kind] = {"reference": Released, "strong": partial(Strong, compiled=False)}
        for name, kind in {**(plain if counted is None else counted), "fast": Fast}.items():
            if not too_late():
                self._attempt(name, partial(self._count, name, kind))
        yield self.row

    def _attempt(self, name: str, work: Callable[[], object]) -> None:
        """Do ``work`` and free what it leaves. What ends it is noted, unless the contestant was timed already; others go on."""
        try:
            work()
        except Exception as error:
            if is_out_of_memory(error):
                self.row["seconds"].setdefault(name, {"out_of_memory": True})
            else:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                self.row["seconds"].setdefault(name, {"failed": reason})
                self.errors.append(error.with_traceback(None))
        free_unused(self._device)  # not before the error, whose frames hold tensors, is gone

    def _entrant(self, name: str, kind: Kind) -> Entrant:
        entrant = Entrant(lambda: kind(*self._how), self._device, self._views, self._masks)
        self.losses[name] = entrant.losses
        if entrant.peak_bytes is not None:
            self.row["peak_bytes"][name] = entrant.peak_bytes
        return entrant

    def _pair(self, name: str, kind: Kind, fast: Entrant, rounds: int) -> None:
        rival = self._entrant(name, kind)
        before = retries(self._device)
        both = [(rival.step(), fast.step()) for _ in range(rounds)]  # in turns: a slow minute of the machine falls on both
        self.row["allocation_retries"][name] = retries(self._device) - before
        self._seconds[name] = [own for own, _ in both]
        self._seconds.setdefault("fast", []).extend(own for _, own in both)
        for timed in (name, "fast"):
            spread = record.spread(self._seconds[timed])
            self.row["seconds"][timed] = spread
            self.row["clips_per_second"][timed] = self.row["clips"] / spread["median"]
        self.row["fast_against"][name] = record.spread([other / own for other, own in both])
        self.row["disagreement"][name] = max(abs(rival.terms[term] / own - 1) for term, own in fast.terms.items())

    def _count(self, name: str, kind: Kind) -> None:
        self.row["costs"][name] = counted(kind(*self._how), self._views, self._masks)


def report(title: str, row: Row) -> None:
    """Print a row."""
    speeds = ", ".join(f"{name} {speed:.2f}" for name, speed in row["clips_per_second"].items())
    ratios = ", ".join(
        f"{ratio['median']:.2f} × {name} ({ratio['min']:.2f}-{ratio['max']:.2f})" for name, ratio in row["fast_against"].items()
    )
    print(f"{title}: clips/s {speeds}; fast = {ratios}")
    for name, reason in untimed(row).items():
        print(f"  {name}: {reason}")
    if row["peak_bytes"]:
        print("  peak memory, GiB: " + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in row["peak_bytes"].items()))
    if any(row["allocation_retries"].values()):
        print(f"  memory was short, allocations tried again: {row['allocation_retries']}")
    for name, costs in row["costs"].items():
        print(
            f"  {name}: {costs['saved_bytes'] / 2**20:.0f} MiB kept, {costs['launches']} launches, "
            f"{costs['gflop_per_clip']:.1f} GFLOP/clip"
        )


def untimed(row: Row) -> dict[str, str]:
    """Who has no time, and why."""
    reasons = {name: told for name, told in row["seconds"].items() if "median" not in told}
    return {
        name: f"failed ({told['failed']})" if "failed" in told else next(iter(told)).replace("_", " ")
        for name, told in reasons.items()
    }
